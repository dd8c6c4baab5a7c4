import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_samples import (
    NAMES,
    create,
    llama_lookalike,
    make_actions,
    make_codec,
    make_observation,
    make_recipe,
)

from robofactory.codec import prompt as prompt_module
from robofactory.codec.codec import Codec
from robofactory.codec.images import normalize
from robofactory.codec.statistics import METHODS, DatasetStatistics
from robofactory.config import ModelConfig, RecipeConfig
from robofactory.errors import UserError
from robofactory.shapes import Observation
from tests.official import PARITY

# ------------------------------------------------------------------------------------------------------------ actions


@pytest.mark.parametrize("method", METHODS)
def test_every_training_action_decodes_within_half_a_bin(method: str):
    codec, actions = make_codec(make_recipe(method)), make_actions()
    error = np.abs(codec.decode_actions(codec.encode_actions(actions)) - actions)
    clipped = codec.clipped(actions)
    assert (error <= codec.half_bin + 3e-7)[~clipped].all()  # 3e-7: float32
    if method == "q01_q99":
        assert 0.005 < clipped[:, :7].mean() < 0.03
    else:
        assert not clipped.any()


def test_action_ids_are_the_last_of_the_vocabulary(codec: Codec):
    ids = codec.encode_actions(make_actions())
    assert ids.min() >= codec.vocab_size - 256 and ids.max() < codec.vocab_size
    assert codec.decode_actions(ids).dtype == np.float32


def test_the_table_states_half_a_bin_of_each_joint_in_rad(codec: Codec):
    table = codec.action_table(make_actions())
    assert len(table.splitlines()) == 2 + 8
    for name, half_bin in zip(NAMES, codec.half_bin, strict=True):
        line = next(line for line in table.splitlines() if line.startswith(name))
        assert f"{half_bin:.5f}" in line and "0.00%" in line


@pytest.mark.parametrize(
    ("action", "message"),
    [(np.zeros(7, np.float32), "7 numbers; expected 8: joint_1"), (np.full(8, np.nan, np.float32), "'joint_1'")],
)
def test_a_bad_action_is_refused(codec: Codec, action: np.ndarray, message: str):
    with pytest.raises(UserError, match=message):
        codec.encode_actions(action)


def test_each_dataset_has_its_own_meaning_of_a_token():
    recipe, actions = make_recipe(), make_actions()
    near, far = (DatasetStatistics.measure(a, a, NAMES, "min_max", {"of": k}, 3) for k, a in enumerate((actions, wide(actions))))  # fmt: skip
    both = Codec.create(recipe, {"near": near, "far": far})
    ids = both.for_dataset("near").encode_actions(actions)
    assert (both.for_dataset("far").encode_actions(wide(actions)) == ids).mean() > 0.99  # the rest is rounding
    np.testing.assert_allclose(both.for_dataset("far").decode_actions(ids)[:, 0], 2 * both.for_dataset("near").decode_actions(ids)[:, 0], rtol=1e-5)  # fmt: skip
    mixed = both.decode_each(ids[:2], [1, 0])
    assert (mixed[0] == both.for_dataset("far").decode_actions(ids[0])).all()
    assert (mixed[1] == both.for_dataset("near").decode_actions(ids[1])).all()
    assert (both.dataset, both.for_dataset("far").look, both.for_dataset("near").look) == (None, {"of": 1}, {"of": 0})
    codecs = [both, both.for_dataset("far"), both.for_dataset("near"), Codec.create(recipe, {"near": near})]
    assert len({codec.fingerprint for codec in codecs}) == 4


def wide(actions: np.ndarray) -> np.ndarray:
    return actions * np.array([2.0] * 7 + [1.0], np.float32)


def test_other_dimensions_than_eight_and_other_names_work():
    actions = make_actions()[:, [7, 0, 1]]
    names = ["grip", "x", "y"]
    recipe = make_recipe()
    codec = create(recipe, actions, actions[:, :2], names, {}, pass_through=["grip"], proprio_names=["a", "b"])
    assert (codec.action_dim, codec.proprio_dim) == (3, 2)
    np.testing.assert_allclose(codec.half_bin[0], 1 / 255)


# ------------------------------------------------------------------------------------------------------- observations


def test_one_observation_and_a_batch_of_them_are_encoded_alike(codec: Codec):
    observations = [make_observation(0), make_observation(1, "pick up the meat from the grill now")]
    batch = codec.encode_observations(observations)
    assert batch.pixel_values.shape == (2, 3, 6, 84, 84) and batch.action_tokens is None
    for row, observation in enumerate(observations):
        single = codec.encode_observation(observation)
        assert torch.equal(batch.pixel_values[row], normalize(single.pixel_values))
        assert torch.equal(batch.proprio[row], single.proprio)
        assert torch.equal(batch.input_ids[row, batch.text_mask[row]], single.input_ids)


def test_views_are_in_the_recipe_s_order_whatever_the_observation_s(codec: Codec):
    observation = make_observation()
    shuffled = replace(observation, images=dict(reversed(observation.images.items())))
    expected = codec.encode_observation(observation).pixel_values
    assert torch.equal(codec.encode_observation(shuffled).pixel_values, expected)
    assert not torch.equal(expected[0], expected[1])


def test_training_examples_carry_the_labels_and_a_random_crop(codec: Codec):
    observation, action = make_observation(), make_actions()[5]
    example = codec.encode_example(observation, action, torch.Generator().manual_seed(0))
    assert example.action_tokens.tolist() == codec.encode_actions(action).tolist()
    assert not torch.equal(example.pixel_values, codec.encode_observation(observation).pixel_values)
    batch = codec.collate([example, example])
    assert batch.action_tokens.shape == (2, 8)


def test_prompts_are_padded_on_the_right_to_train_and_on_the_left_to_generate(codec: Codec):
    short, long = (make_observation(0, text) for text in ("lift", "lift the barrier"))
    examples = [codec.encode_example(observation, make_actions()[0]) for observation in (short, long)]
    lengths = [len(example.input_ids) for example in examples]
    for batch, left in (
        (codec.collate(examples), 0),
        (codec.encode_observations([short, long]), lengths[1] - lengths[0]),
    ):
        columns = slice(left, left + lengths[0])
        assert batch.input_ids[0, columns].equal(examples[0].input_ids) and batch.text_mask[0, columns].all()
        assert batch.text_mask.sum(dim=1).tolist() == lengths
        assert (batch.input_ids[~batch.text_mask] == codec.prompt.pad_id).all()


def test_proprio_is_normalised_by_its_own_statistics(codec: Codec):
    observation = make_observation()
    expected = codec.proprio_statistics.normalize(observation.proprio)
    np.testing.assert_allclose(codec.encode_observation(observation).proprio, expected, atol=1e-7)
    without = replace(codec, use_proprio=False)
    assert without.encode_observations([observation]).proprio is None


def break_view(value):
    def change(observation: Observation) -> None:
        observation.images["overhead"] = value  # past the constructor, where the test run checks types

    return change


def break_proprio(value):
    return lambda observation: object.__setattr__(observation, "proprio", value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.images.pop("wrist"), r"no view 'wrist'.*has side, overhead.*expected side, overhead, wrist"),
        (break_view(np.zeros((96, 128, 3), np.float32)), r"'overhead' is float32 \[96, 128, 3\]; expected a uint8"),
        (break_view(np.zeros((3, 96, 128), np.uint8)), r"'overhead' is uint8 \[3, 96, 128\]; expected"),
        (break_view(np.zeros((96, 128), np.uint8)), r"'overhead' is uint8 \[96, 128\]; expected"),
        (break_view(np.zeros((0, 128, 3), np.uint8)), r"'overhead' is uint8 \[0, 128, 3\]; expected"),
        (break_view(b"png"), r"'overhead' is a bytes; expected"),
        (break_proprio(np.full(8, np.nan, np.float32)), "proprio is not finite"),
        (break_proprio(np.zeros(7, np.float32)), r"proprio is float32 \[7\]; expected float32 \[8\]: joint_1"),
        (break_proprio([0.0] * 8), "proprio is a list; expected"),
    ],
)
def test_a_bad_observation_is_one_line_that_says_what_is_expected(codec: Codec, change, message: str):
    observation = make_observation()
    change(observation)
    with pytest.raises(UserError, match=message) as caught:
        codec.encode_observation(observation)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_codec_is_the_same_codec(tmp_path: Path, method: str):
    codec = make_codec(make_recipe(method))
    codec.save(tmp_path)
    loaded = Codec.load(tmp_path)
    observation, actions = make_observation(), make_actions()
    assert loaded.fingerprint == codec.fingerprint and loaded.look == codec.look and loaded.views == codec.views
    a, b = codec.encode_observation(observation), loaded.encode_observation(observation)
    assert torch.equal(a.pixel_values, b.pixel_values) and torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a.proprio, b.proprio)
    ids = codec.encode_actions(actions)
    assert (loaded.encode_actions(actions) == ids).all()
    assert loaded.decode_actions(ids).tobytes() == codec.decode_actions(ids).tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["codec.json"]


def test_saving_again_gives_the_same_bytes_and_people_can_read_them(tmp_path: Path, codec: Codec):
    codec.save(tmp_path)
    text = (tmp_path / "codec.json").read_text()
    Codec.load(tmp_path).save(tmp_path)
    assert (tmp_path / "codec.json").read_text() == text
    assert len(text.splitlines()) < 100 and max(map(len, text.splitlines())) < 250


def test_the_fingerprint_depends_on_everything_that_changes_what_is_seen_or_done():
    actions, recipe = make_actions(), make_recipe()
    other_look = create(recipe, actions, actions * np.float32(0.5), NAMES, {"visual_detail": "full"})
    moved = create(recipe, actions[:-1], actions * np.float32(0.5), NAMES, make_codec().look)
    codecs = [make_codec(), other_look, moved, make_codec(make_recipe("min_max")), make_codec(make_recipe(crop=0.8))]
    fewer_views = replace(make_codec(), views=("side",))
    assert len({codec.fingerprint for codec in [*codecs, fewer_views]}) == 6
    assert make_codec().fingerprint == make_codec().fingerprint


def test_an_edited_file_is_refused(tmp_path: Path, codec: Codec):
    codec.save(tmp_path)
    content = json.loads((tmp_path / "codec.json").read_text())
    content["datasets"]["some"]["action"]["mean"][0] += 1e-9
    (tmp_path / "codec.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"codec\.json was edited or damaged"):
        Codec.load(tmp_path)


def test_a_file_of_the_first_format_still_decodes(tmp_path: Path, codec: Codec):
    """It had one dataset and no name for it; the run's is the dataset's."""
    directory = tmp_path / "LiftBarrier-rf_Agent0_150" / "epoch_1"
    directory.mkdir(parents=True)
    codec.save(directory)
    content = json.loads((directory / "codec.json").read_text())
    (dataset,) = content.pop("datasets").values()
    content |= {"format": 1, "look": dataset["look"]}
    content["actions"]["statistics"] = dataset["action"]
    content["proprio"] = {"used": content.pop("use_proprio"), "statistics": dataset["proprio"]}
    del content["fingerprint"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    (directory / "codec.json").write_text(json.dumps(content))
    loaded = Codec.load(directory)
    assert loaded.dataset == "LiftBarrier-rf_Agent0_150" and loaded.look == codec.look
    ids = codec.encode_actions(make_actions())
    assert loaded.decode_actions(ids).tobytes() == codec.decode_actions(ids).tobytes()
    content["actions"]["statistics"]["max"][0] += 1.0
    (directory / "codec.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="edited or damaged"):
        Codec.load(directory)


def test_a_truncated_a_missing_and_a_foreign_file_are_refused(tmp_path: Path, codec: Codec):
    with pytest.raises(FileNotFoundError, match=r"no codec\.json"):
        Codec.load(tmp_path)
    codec.save(tmp_path)
    path = tmp_path / "codec.json"
    path.write_text(path.read_text()[:300])
    with pytest.raises(UserError, match="not valid JSON"):
        Codec.load(tmp_path)
    path.write_text('{"format": 99}')
    with pytest.raises(UserError, match="not a codec of format 2"):
        Codec.load(tmp_path)


def test_another_tokenizer_in_the_package_is_refused(tmp_path: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch):
    codec.save(tmp_path)
    other = tmp_path / "other.json"
    other.write_text(prompt_module.TINY_TOKENIZER.read_text() + " ")
    monkeypatch.setattr(prompt_module, "TINY_TOKENIZER", other)
    with pytest.raises(UserError, match="not the tokenizer that the codec"):
        Codec.load(tmp_path)


def test_preprocessing_this_version_does_not_do_is_refused(tmp_path: Path, codec: Codec, monkeypatch):
    """The file is intact, but this code has other constants (here the interpolation): it would see something else."""
    from robofactory.codec import images

    codec.save(tmp_path)
    monkeypatch.setattr(images, "INTERPOLATION", "bilinear")
    with pytest.raises(UserError, match="does not do"):
        Codec.load(tmp_path)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch):
    codec.save(tmp_path)
    before = (tmp_path / "codec.json").read_text()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        make_codec(make_recipe("min_max")).save(tmp_path)
    assert (tmp_path / "codec.json").read_text() == before


def test_a_codec_survives_the_way_to_a_data_worker(codec: Codec):
    observation = make_observation()
    before = codec.encode_observation(observation)
    after = pickle.loads(pickle.dumps(codec)).encode_observation(observation)
    assert torch.equal(before.pixel_values, after.pixel_values) and torch.equal(before.input_ids, after.input_ids)


# ----------------------------------------------------------------------------------------------- the published model


def published(directory: Path) -> Codec:
    recipe = RecipeConfig(model=ModelConfig(model_name=str(llama_lookalike(directory))))
    return create(recipe, make_actions(), make_actions(), NAMES, {})


def test_published_weights_bring_image_size_vocabulary_and_the_end_token(tmp_path: Path):
    from safetensors.numpy import load_file

    codec = published(tmp_path)
    official = load_file(PARITY / "expected.safetensors")
    assert (codec.image_size, codec.vocab_size, codec.end_token, codec.use_proprio) == (224, 32000, True, False)
    example = codec.encode_example(make_observation(), make_actions()[0])
    assert example.action_tokens.shape == (9,) and example.action_tokens[-1] == 2
    labels = official["train_input_ids"][0, -9:-1]
    encoded = codec.action_tokens.encode(codec.action_tokens.decode(labels))
    assert (encoded == np.where(labels == 31744, 31745, labels)).all()  # these two decode alike
    sequence = [*example.input_ids.tolist(), *labels.tolist(), codec.prompt.end_id]
    assert sequence == official["train_input_ids"][0].tolist()


def test_a_published_tokenizer_is_kept_beside_the_codec(tmp_path: Path):
    weights, checkpoint = tmp_path / "weights", tmp_path / "checkpoint"
    weights.mkdir()
    checkpoint.mkdir()
    codec = published(weights)
    codec.save(checkpoint)
    (weights / "tokenizer.json").unlink()
    loaded = Codec.load(checkpoint)
    assert loaded.fingerprint == codec.fingerprint
    assert loaded.prompt.encode("lift the barrier").tolist() == codec.prompt.encode("lift the barrier").tolist()
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Codec.load(checkpoint)


def test_a_directory_without_weights_is_one_line(tmp_path: Path):
    recipe = RecipeConfig(model=ModelConfig(model_name=str(tmp_path)))
    with pytest.raises(UserError, match=r"holds no published model: it has no config\.json"):
        create(recipe, make_actions(), make_actions(), NAMES, {})
