"""A policy is told apart by its weights."""

from robofactory.policy import digest_of_weights


def test_the_weights_and_not_only_the_statistics_are_fingerprinted(tmp_path):
    (tmp_path / "modules.safetensors").write_bytes(b"one")
    before = digest_of_weights(tmp_path)
    (tmp_path / "modules.safetensors").write_bytes(b"two")
    assert digest_of_weights(tmp_path) != before
