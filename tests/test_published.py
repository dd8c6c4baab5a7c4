"""Published weights are files of others: what they say is done, or refused in one line that says what differs."""

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from robofactory import checkpoint
from robofactory.codec.codec import Codec
from robofactory.codec.images import MEANS, STDS, ImagePipeline
from robofactory.codec.prompt import Prompt
from robofactory.codec.statistics import DatasetStatistics
from robofactory.config import load_recipe
from robofactory.errors import UserError
from robofactory.model.openvla import build_from_config
from robofactory.model.weights import INDEX, fingerprint, load_openvla
from robofactory.policy import Policy
from tests.published import NUM_IDS, config, preprocessor, write_published
from tests.test_checkpoint import STATE, observation

OFFICIAL = ((0.484375, 0.455078125, 0.40625), (0.5,) * 3), ((0.228515625, 0.2236328125, 0.224609375), (0.5,) * 3)
NAME = "projector.fc1.bias"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published") / "weights")


@pytest.fixture
def weights(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "weights")


def make_codec(weights: Path) -> Codec:
    recipe = load_recipe("robot_openvla", [f"model.model_name={weights}", "model.lora_rank=2"])
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 8))
    names = [f"joint{number}" for number in range(1, 8)] + ["gripper"]
    return Codec.create(recipe, {"some": DatasetStatistics.measure(actions, actions, names, "mean_std", {}, 5)})


def write(weights: Path, file: str, content: object) -> None:
    (weights / file).write_text(json.dumps(content))


# ----------------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_normalised_by_the_numbers_that_the_official_processor_uses(weights):
    """They were normalised by its means and standard deviations, of which those numbers are rounded: 0.008 off."""
    codec = make_codec(weights)
    stacked = codec.stack([codec.encode_observation(observation())])
    pixels = stacked.pixel_values.double() / 255.0  # [1, v, 3, h, w]
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, :, None, None] for each in OFFICIAL)
    expected = torch.cat([(pixels - mean[tower]) / std[tower] for tower in range(2)], dim=2)
    seen = codec.normalized(stacked).pixel_values
    assert (seen - expected).abs().max() < 1e-6
    assert (ImagePipeline(28, 0.9, True).normalize(stacked.pixel_values) - expected).abs().max() > 0.005
    assert "tvf_normalize_params" in codec.images.note and "0.484375" in codec.images.note


def test_a_file_of_means_alone_is_used_as_it_is(weights):
    content = preprocessor(means=[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], stds=[[1, 2, 3], [4, 5, 6]])
    write(weights, "preprocessor_config.json", {k: v for k, v in content.items() if not k.startswith("tvf_")})
    images = make_codec(weights).images
    assert (images.means, images.stds) == (((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ((1, 2, 3), (4, 5, 6)))
    assert images.note == ""


def test_without_the_file_it_is_as_before_and_said(weights):
    (weights / "preprocessor_config.json").unlink()
    images = make_codec(weights).images
    assert (images.means, images.stds) == (MEANS, STDS) and "no preprocessor_config.json" in images.note


def test_what_a_codec_writes_of_its_pictures_is_what_it_always_was():
    """So fingerprints of before are those of now."""
    assert ImagePipeline(84, 0.9, True).to_json() == {
        "image_size": 84,
        "crop_area_ratio": 0.9,
        "random_crop": True,
        "interpolation": "bicubic, antialiased, squashed to a square, crops at whole pixels",
        "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
        "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
    }


def test_a_codec_keeps_the_normalisation_without_the_weights(weights, tmp_path):
    codec = make_codec(weights)
    codec.save(tmp_path)
    shutil.rmtree(weights)
    loaded = Codec.load(tmp_path)
    assert (loaded.images.means, loaded.images.stds) == OFFICIAL
    assert loaded.fingerprint == codec.fingerprint
    seen = [each.encode_observations([observation()]).pixel_values for each in (codec, loaded)]
    assert seen[0].equal(seen[1])


def test_a_policy_of_before_keeps_the_normalisation_it_was_trained_with(weights, tmp_path):
    """Its checkpoint has the constants, whatever the weights' file says now: to act, and to go on."""
    recipe = load_recipe("robot_openvla", [f"model.model_name={weights}", "model.lora_rank=2"])
    now = make_codec(weights)
    before = replace(now, images=replace(now.images, means=MEANS, stds=STDS))
    model = checkpoint.build_model(recipe, before)
    saved = checkpoint.save(tmp_path / "run", "epoch_1", model, before, recipe, STATE)
    policy = Policy.load(saved)
    assert (policy.codec.images.means, policy.codec.images.stds) == (MEANS, STDS)
    assert policy.fingerprint == before.fingerprint != now.fingerprint
    assert now.normalized_as(policy.codec).fingerprint == before.fingerprint


STRANGE = {
    "letterbox": {"image_resize_strategy": "letterbox"},
    "resize-crop": {"image_resize_strategy": "resize-crop"},
    "it letterboxes all the same": {"tvf_do_letterbox": True},
    "another interpolation": {"interpolations": ["bicubic", "bilinear"]},
    "another one where it is read": {
        "tvf_resize_params": [{"size": [28, 28], "interpolation": 2, "max_size": None}] * 2
    },
    "the shape is kept": {"tvf_resize_params": [{"size": 28, "interpolation": 3, "max_size": None}] * 2},
    "a smaller crop": {"tvf_crop_params": [{"output_size": [14, 14]}] * 2},
    "another size": {"input_sizes": [[3, 56, 56]] * 2, "tvf_resize_params": None, "tvf_crop_params": None},
    "two sizes": {"input_sizes": [[3, 28, 28], [3, 56, 56]]},
    "no square": {"input_sizes": [[3, 28, 56]] * 2},
    "grey": {"input_sizes": [[1, 28, 28]] * 2},
    "one tower": {"use_fused_vision_backbone": False},
    "one normalisation": {"tvf_normalize_params": [{"mean": [0.5] * 3, "std": [0.5] * 3}]},
    "two colours": {"means": [[0.5] * 2] * 2},
    "nothing to divide by": {"tvf_normalize_params": [{"mean": [0.5] * 3, "std": [0.5, 0.0, 0.5]}] * 2},
    "text": {"tvf_normalize_params": [{"mean": ["0.5"] * 3, "std": [0.5] * 3}] * 2},
    "no numbers": {"tvf_normalize_params": None, "means": None},
    "not finite": {"stds": [[float("nan")] * 3] * 2},
    "absurd": {"input_sizes": [[3, 10**9, 10**9]] * 2},
    "null": {"input_sizes": None},
}


@pytest.mark.parametrize("strange", STRANGE)
def test_pictures_that_this_project_does_not_make_are_refused(weights, strange):
    write(weights, "preprocessor_config.json", preprocessor(**STRANGE[strange]))
    with pytest.raises(UserError, match=r"preprocessor_config\.json: (key '|there is|input_sizes is)") as error:
        make_codec(weights)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


# ------------------------------------------------------------------------------------------------------- config.json


TEXT = config()["text_config"]
BAD_CONFIGS = {
    "another model": {"model_type": "llava"},
    "null sizes": {"image_sizes": None},
    "text": {"image_sizes": "28"},
    "other sizes": {"image_sizes": [28, 42]},
    "no picture": {"image_sizes": [0, 0]},
    "absurd pictures": {"image_sizes": [10**9, 10**9]},
    "an unknown tower": {"timm_model_ids": ["resnet50", "vit_so400m_patch14_siglip_224"]},
    "a tower from the hub": {"timm_model_ids": ["hf-hub:some/one", "vit_so400m_patch14_siglip_224"]},
    "one tower": {"timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m"]},
    "a tower that is none": {"timm_model_ids": [None, 3]},
    "another activation": {"timm_override_act_layers": ["gelu", None]},
    "towers of text": {"timm_overrides": "small"},
    "absurd towers": {"timm_overrides": {config()["timm_model_ids"][0]: {"embed_dim": 32, "depth": 10**9, "num_heads": 2}}},
    "heads that do not divide": {
        "timm_overrides": {config()["timm_model_ids"][0]: {"embed_dim": 32, "depth": 3, "num_heads": 5}}
    },
    "other bins": {"n_action_bins": 128},
    "no text_config": {"text_config": None},
    "a list": {"text_config": []},
    "no vocabulary": {"text_config": {key: value for key, value in TEXT.items() if key != "vocab_size"}},
    "no ids left": {"pad_to_multiple_of": TEXT["vocab_size"]},
    "a negative padding": {"pad_to_multiple_of": -64},
    "an absurd vocabulary": {"text_config": TEXT | {"vocab_size": 10**9}},
    "an absurd width": {"text_config": TEXT | {"hidden_size": 10**9}},
    "absurdly many layers": {"text_config": TEXT | {"num_hidden_layers": 10**9}},
    "no layers": {"text_config": TEXT | {"num_hidden_layers": 0}},
    "a negative width": {"text_config": TEXT | {"intermediate_size": -1}},
    "a fractional width": {"text_config": TEXT | {"hidden_size": 64.5}},
    "query heads that do not divide": {"text_config": TEXT | {"num_attention_heads": 5}},
    "key heads that do not divide": {"text_config": TEXT | {"num_key_value_heads": 3}},
    "another activation of Llama": {"text_config": TEXT | {"hidden_act": "no_such"}},
    "another language model": {"text_config": TEXT | {"model_type": "mistral"}},
    "scaled positions": {"text_config": TEXT | {"rope_scaling": {"type": "linear", "factor": 2.0}}},
    "positions of transformers 5": {"text_config": TEXT | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}},
    "tied embeddings": {"text_config": TEXT | {"tie_word_embeddings": True}},
    "padding beyond": {"text_config": TEXT | {"pad_token_id": 10**6}},
    "statistics of text": {"norm_stats": "bridge"},
    "statistics of nothing": {"norm_stats": {"bridge": None}},
    "statistics without bounds": {"norm_stats": {"bridge": {"action": {"q01": [0.0]}}}},
    "statistics of two lengths": {"norm_stats": {"bridge": {"action": {"q01": [0.0], "q99": [1.0, 1.0]}}}},
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_CONFIGS)
def test_a_configuration_that_cannot_be_built_is_one_line(weights, bad):
    content = config(**BAD_CONFIGS[bad])
    write(weights, "config.json", content)
    for read in (Prompt.from_weights, lambda path: load_openvla(path, global_token=True)):
        with pytest.raises(UserError, match=r"config\.json: (key '|there is)") as error:
            read(weights)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(UserError, match=r"config\.json: (key '|there is)"):
        build_from_config(content, global_token=True)


@pytest.mark.parametrize("content", ["", "null", "[]", "{", '{"a": ' + "[" * 10_000, "\ufeff{}", "NaN"])
def test_a_configuration_that_is_no_object_is_one_line(weights, content):
    (weights / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json( is not valid JSON|: there is|: key)"):
        load_openvla(weights, global_token=True)


def test_statistics_of_null_are_none(weights):
    """They trained, and failed in merge."""
    write(weights, "config.json", config(norm_stats=None))
    assert load_openvla(weights, global_token=True).base_fingerprint


@pytest.mark.parametrize("change", [{"pad_token_id": 10**6}, {"pad_token_id": None}, {"image_resize_strategy": "letterbox"}])  # fmt: skip
def test_what_only_inputs_need_is_checked_where_they_are_made(weights, change):
    write(weights, "config.json", config(**change))
    with pytest.raises(UserError, match=r"config\.json: (key '|there is)"):
        make_codec(weights)


# ----------------------------------------------------------------------------------------------------------- tensors


def shard_of(weights: Path, name: str) -> Path:
    return weights / json.loads((weights / INDEX).read_text())["weight_map"][name]


def change_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/outside.safetensors", "link.safetensors", "none.safetensors", "", "."])  # fmt: skip
def test_a_shard_lies_beside_its_index(weights, shard):
    outside = weights.parent / "outside.safetensors"
    shutil.copy(shard_of(weights, NAME), outside)
    (weights / "link.safetensors").symlink_to(outside)
    index = json.loads((weights / INDEX).read_text())
    index["weight_map"][NAME] = str(outside) if shard.startswith("/") else shard
    write(weights, INDEX, index)
    for read in (fingerprint, lambda path: load_openvla(path, global_token=True)):
        with pytest.raises(UserError, match=r"is refused|is missing|is no regular file"):
            read(weights)


@pytest.mark.parametrize("index", [None, [], {}, {"weight_map": {}}, {"weight_map": [NAME]}, {"weight_map": {NAME: 3}}])
def test_an_index_that_is_none_is_one_line(weights, index):
    write(weights, INDEX, index)
    with pytest.raises(UserError, match=r"index\.json: (key 'weight_map|there is)"):
        load_openvla(weights, global_token=True)


def test_a_tensor_in_two_shards_is_refused(weights):
    """The model read the one, the fingerprint the other."""
    other = next(path for path in sorted(weights.glob("*.safetensors")) if path != shard_of(weights, NAME))
    change_tensors(other, **{NAME: torch.ones_like(load_file(shard_of(weights, NAME))[NAME])})
    for read in (fingerprint, lambda path: load_openvla(path, global_token=True)):
        with pytest.raises(UserError, match=rf"{other.name} holds {NAME}, and .* names {shard_of(weights, NAME).name}"):
            read(weights)


def test_a_shard_holds_what_the_index_says(weights):
    path = shard_of(weights, NAME)
    change_tensors(path, **{NAME: None})
    with pytest.raises(UserError, match=rf"{NAME} should be in {path.name}, and is missing there"):
        fingerprint(weights)
    change_tensors(path, **{NAME: torch.zeros(3), "more": torch.zeros(3)})
    with pytest.raises(UserError, match=f"{path.name} holds more, and .* does not name it"):
        fingerprint(weights)


KINDS = [torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.uint8]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_weights_are_floating_point(weights, kind):
    path = shard_of(weights, NAME)
    change_tensors(path, **{NAME: load_file(path)[NAME].to(kind)})
    with pytest.raises(UserError, match=f"{NAME} is of .*, expected one of BF16, F16, F32, F64"):
        load_openvla(weights, global_token=True)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_weights_are_finite(weights, number):
    """One number of a tensor is enough; 1e39 is infinity in the dtype that is computed in."""
    path = shard_of(weights, NAME)
    tensor = load_file(path)[NAME].double()
    tensor[-1] = number
    change_tensors(path, **{NAME: tensor})
    with pytest.raises(UserError, match=f"{NAME} has NaN or infinity"):
        load_openvla(weights, global_token=True)


def test_large_weights_are_finite_too(weights):
    """Their sum is not."""
    path = shard_of(weights, NAME)
    change_tensors(path, **{NAME: torch.full_like(load_file(path)[NAME], 3e38, dtype=torch.float32)})
    assert load_openvla(weights, global_token=True).projector.fc1.bias[0] == 3e38


def header(text: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text


LIES = {
    "empty": b"",
    "short": b"abc",
    "a gigantic header": header(b"{}", 10**18),
    "no JSON": header(b"x" * 100),
    "a list": header(b"[]"),
    "nested": header(b'{"a":' + b"[" * 100_000),
    "more than there is": header(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
    "a negative shape": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + bytes(4),
    "a pickle": b"\x80\x04" + bytes(100),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_shard_that_lies_is_named(weights, lie):
    path = shard_of(weights, NAME)
    path.write_bytes(LIES[lie])
    for read in (fingerprint, lambda where: load_openvla(where, global_token=True)):
        with pytest.raises(UserError, match=rf"{path.name} cannot be read"):
            read(weights)


@pytest.mark.parametrize("instead", ["pointer", "fifo", "directory", "nothing"])
def test_a_shard_is_a_file_with_content(weights, instead):
    path = shard_of(weights, NAME)
    path.unlink()
    if instead == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    elif instead != "nothing":
        os.mkfifo(path) if instead == "fifo" else path.mkdir()
    with pytest.raises(UserError, match=rf"{path.name} is (a Git LFS pointer.*git lfs pull|no regular file|missing)"):
        load_openvla(weights, global_token=True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_not_read(weights, name):
    for path in weights.glob("model*"):
        path.unlink()
    (weights / name).write_bytes(b"\x80")
    with pytest.raises(UserError, match=rf"only {name}, which could run code .* convert it to safetensors"):
        load_openvla(weights, global_token=True)


# --------------------------------------------------------------------------------------------------------- tokenizer


def tokenizer(**model) -> str:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3}
    base = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>"}
    return json.dumps({"version": "1.0", "model": base | model})


TOKENIZERS = {
    "empty": "",
    "null": "null",
    "a list": "[]",
    "no model": "{}",
    "truncated": tokenizer()[:80],
    "not UTF-8": b"\xff\xfe{}",
    "merges of nothing": tokenizer(merges=["x y"]),
    "an absurd id": tokenizer(vocab={"<s>": 10**12}),
    "an id without a row": tokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": NUM_IDS + 64}),
    "other words": tokenizer(vocab={"<unk>": 0, "a": 1}),
    "chance": tokenizer(dropout=0.1),
    "an aborting normaliser": '{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA"}, "model": {}}',
    "a pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}


@pytest.mark.parametrize("bad", TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_one_line(weights, bad):
    content = TOKENIZERS[bad]
    path = weights / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"tokenizer\.json(:| is| has)") as error:
        Prompt.from_weights(weights)
    assert "\n" not in str(error.value)


def test_a_tokenizer_neither_cuts_nor_fills(weights):
    content = json.loads((weights / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}  # fmt: skip
    expected = Prompt.from_weights(weights).encode("lift the barrier")
    write(weights, "tokenizer.json", content)
    assert Prompt.from_weights(weights).encode("lift the barrier").equal(expected)
