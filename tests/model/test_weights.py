import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from robofactory.errors import UserError
from robofactory.model.openvla import OpenVLA, build_from_config
from robofactory.model.weights import fingerprint, load_openvla, official_name, save_openvla
from robofactory.paths import find_weights

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}
CONFIG = {
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "image_sizes": [28, 28],
    "use_fused_vision_backbone": True,
    "arch_specifier": "no-align+fused-gelu-mlp",
    "n_action_bins": 256,
    "pad_to_multiple_of": 64,
    "text_config": {
        "vocab_size": 464,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
OVERRIDES = {model_id: SMALL for model_id in CONFIG["timm_model_ids"]}


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, OpenVLA, dict[str, torch.Tensor]]:
    """A directory in the official layout, the model it was written from, and its tensors by official name."""
    torch.manual_seed(0)
    model = build_from_config(CONFIG, global_token=True, timm_overrides=OVERRIDES)
    tensors = {official_name(name): tensor for name, tensor in model.state_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, model, tensors


def shard(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_of_a_published_directory_is_loaded(published, sharded: bool):
    directory, original, tensors = published
    if sharded:
        shard(directory, tensors)
    model = load_openvla(directory, global_token=True, timm_overrides=OVERRIDES)
    for name, tensor in original.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000], ids=["one file", "shards"])
def test_what_is_read_and_written_is_the_same_bit_for_bit(published, tmp_path: Path, shard_bytes: int):
    directory, _, tensors = published
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    model = load_openvla(directory, global_token=True, dtype=torch.bfloat16, timm_overrides=OVERRIDES)
    written = tmp_path / "written"
    written.mkdir()
    save_openvla(model, written, shard_bytes)
    files = sorted(written.glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert (len(files) > 5) == (shard_bytes < 10**9) and max(sizes) <= shard_bytes
    again = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert again.keys() == tensors.keys()
    assert all(again[name].dtype == torch.bfloat16 and again[name].equal(tensors[name]) for name in tensors)
    assert fingerprint(written) == fingerprint(directory)
    (written / "config.json").write_text((directory / "config.json").read_text())
    reread = load_openvla(written, global_token=True, dtype=torch.bfloat16, timm_overrides=OVERRIDES)
    assert all(reread.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_a_proprio_projector_is_written_beside_the_official_files_and_read_again(published, tmp_path: Path):
    directory, _, tensors = published
    model = load_openvla(directory, global_token=True, proprio_dim=8, timm_overrides=OVERRIDES)
    save_openvla(model, directory)
    assert load_file(directory / "model.safetensors").keys() == tensors.keys()
    reread = load_openvla(directory, global_token=True, proprio_dim=8, timm_overrides=OVERRIDES)
    assert all(reread.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_the_fingerprint_tells_other_weights_and_not_other_files(published):
    directory, _, tensors = published
    first = fingerprint(directory)
    tensors["projector.fc1.bias"] = tensors["projector.fc1.bias"] + 1e-3
    save_file(tensors, directory / "model.safetensors")
    changed = fingerprint(directory)
    shard(directory, tensors)
    assert fingerprint(directory) == changed != first


def test_layer_scale_is_read_by_its_published_name(published):
    _, _, tensors = published
    assert "vision_backbone.featurizer.blocks.0.ls1.scale_factor" in tensors
    assert not any("gamma" in name for name in tensors)


def test_weights_arrive_in_the_dtype_asked_for(published):
    model = load_openvla(published[0], global_token=True, dtype=torch.bfloat16, timm_overrides=OVERRIDES)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_proprio_projector_is_new_and_everything_else_loaded(published):
    directory, original, _ = published
    model = load_openvla(directory, global_token=True, proprio_dim=8, timm_overrides=OVERRIDES)
    new = set(model.state_dict()) - set(original.state_dict())
    assert new == {f"proprio_projector.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}


def test_every_missing_unknown_and_misshapen_tensor_is_named_at_once(published):
    directory, _, tensors = published
    del tensors["projector.fc2.bias"], tensors["language_model.lm_head.weight"]
    tensors["projector.fc1.bias"] = torch.zeros(3)
    tensors["value_head.weight"] = torch.zeros(1)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_openvla(directory, global_token=True, timm_overrides=OVERRIDES)
    for problem in (
        "missing projector.fc2.bias [64]",
        "missing language_model.lm_head.weight [464, 64]",
        "projector.fc1.bias has shape [3], expected [256]",
        "unknown value_head.weight",
    ):
        assert problem in str(error.value)


def test_a_truncated_file_is_named(published):
    path = published[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_openvla(published[0], global_token=True, timm_overrides=OVERRIDES)


def test_a_tensor_that_only_the_index_has_is_named(published):
    directory, _, tensors = published
    shard(directory, tensors)
    part = load_file(directory / "b.safetensors")
    name = sorted(part)[0]
    save_file({key: tensor for key, tensor in part.items() if key != name}, directory / "b.safetensors")
    with pytest.raises(UserError, match=f"{name} should be in b.safetensors, and is missing there"):
        load_openvla(directory, global_token=True, timm_overrides=OVERRIDES)


def test_a_missing_shard_is_named(published):
    directory, _, tensors = published
    shard(directory, tensors)
    (directory / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors is missing"):
        load_openvla(directory, global_token=True, timm_overrides=OVERRIDES)


def test_a_model_that_is_nowhere_is_one_line_that_names_the_tiny_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("openvla/openvla-7b-not-here", "no/such/directory"):
        with pytest.raises(UserError) as error:
            find_weights(name)
        assert "--recipe robot_openvla_tiny" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"has no config\.json"):
        find_weights(str(tmp_path))
