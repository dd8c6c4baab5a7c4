"""The 7B's own path, end to end on a CPU, with a small look-alike of its weights: the same code at another size."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from robofactory import checkpoint
from robofactory.config import load_recipe
from robofactory.data.dataset import load_splits
from robofactory.errors import UserError
from robofactory.export import merge as merging
from robofactory.model.lora import trained_tensors
from robofactory.model.precision import autocast
from robofactory.model.weights import load_openvla
from robofactory.paths import dataset_dir, run_dir
from robofactory.policy import Policy
from robofactory.training import train as training
from tests.published import config, write_published
from tests.test_checkpoint import observation
from tests.training.conftest import NUM_EPISODES, TASK

SMALL = [
    "model.lora_rank=4",
    "training.learning_rate=1e-2",
    "training.num_epochs=2",
    "training.checkpoint_every=1",
    f"data.num_episodes={NUM_EPISODES}",
    "data.val_ratio=0.2",
    "dataloader.batch_size=8",
    "dataloader.num_workers=0",
]
FLOAT32 = "model.torch_dtype=float32"
STATE = {"update": 3, "epoch": 1, "micro": 0}
PROPRIO = {f"proprio_projector.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("weights") / "openvla")


@pytest.fixture
def run(home):
    return run_dir("openvla", TASK, 0, NUM_EPISODES)


def recipe_for(weights, *overrides):
    return load_recipe("robot_openvla", [f"model.model_name={weights}", *SMALL, *overrides])


def start(scene, recipe, resume=False):
    training.train("openvla", scene.task, 0, recipe, resume, bar_position=0)


def val_losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["val_loss"] for line in lines if "val_loss" in line]


def trained_model(recipe):
    """A model as after training, and its codec: every trained number differs from a fresh one."""
    codec = load_splits(dataset_dir(TASK, 0, NUM_EPISODES), recipe).codec
    torch.manual_seed(0)
    model = checkpoint.build_model(recipe, codec).eval()
    with torch.no_grad():
        for parameter in trained_tensors(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, codec


# ---------------------------------------------------------------------------------------------------------- training


def test_the_command_of_the_specification_fine_tunes(run, weights, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in weights.iterdir()}
    command = ["train", "--policy", "openvla", "--task", TASK, "--agent_id", "0"]
    monkeypatch.setattr("sys.argv", [*command, f"model.model_name={weights}", *SMALL, "training.num_epochs=3"])
    training.main()
    files = {"adapter_model.safetensors", "adapter_config.json", "training_state.pt", "codec.json", "config.yaml"}
    saved = {path.name for path in (run / "epoch_3").iterdir()}
    assert saved >= files | {"tokenizer.json"} and "modules.safetensors" not in saved, "there is nothing else to keep"
    losses = val_losses(run)
    assert losses[-1] < losses[0] - 0.3, f"nothing was learned: {losses}"
    said = capsys.readouterr().out
    assert "LoRA, language model" in said and "GB predicted" in said
    assert {path.name: path.read_bytes() for path in weights.iterdir()} == before, "the base is memory-mapped"


def test_a_resumed_fine_tuning_equals_one_that_was_never_stopped(run, scene, weights):
    recipe = recipe_for(weights, FLOAT32, "model.use_proprio=true", "model.lora_vision=true")
    start(scene, recipe)
    undisturbed = {file.name: load_file(file) for file in (run / "epoch_2").glob("*.safetensors")}
    assert undisturbed["modules.safetensors"].keys() > PROPRIO
    losses = val_losses(run)

    (run / "latest").unlink()
    (run / "latest").symlink_to("epoch_1")
    shutil.rmtree(run / "epoch_2")
    start(scene, recipe, resume=True)
    resumed = {file.name: load_file(file) for file in (run / "epoch_2").glob("*.safetensors")}
    different = [name for file in undisturbed for name in undisturbed[file] if not undisturbed[file][name].equal(resumed[file][name])]  # fmt: skip
    assert different == [] and val_losses(run) == losses
    first = load_file(run / "epoch_1" / "modules.safetensors")
    assert all(not first[name].equal(undisturbed["modules.safetensors"][name]) for name in PROPRIO), "it is trained"


def test_weights_that_are_too_large_for_a_cpu_are_refused_by_their_size(weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"7\.6 billion parameters and needs a CUDA GPU.*robot_openvla_tiny"):
        training.require_hardware(load_recipe("robot_openvla"))
    training.require_hardware(recipe_for(weights))


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "overrides", [[FLOAT32], ["model.use_proprio=true", "model.lora_vision=true"], [FLOAT32, "model.use_lora=false"]],
    ids=["adapters", "adapters in the vision towers and proprio, on bfloat16", "full fine-tuning"],
)  # fmt: skip
def test_a_saved_policy_acts_as_the_model_in_memory(home, tmp_path, weights, overrides):
    recipe = recipe_for(weights, *overrides)
    model, codec = trained_model(recipe)
    saved = checkpoint.save(tmp_path / "run", "epoch_1", model, codec, recipe, STATE)
    observations = [observation(seed) for seed in range(2)]
    actions = Policy.load(saved).act(observations)
    np.testing.assert_array_equal(actions, Policy(model, codec).act(observations))
    fresh = checkpoint.build_model(recipe, codec).eval()
    assert (actions != Policy(fresh, codec).act(observations)).any(), "what was trained must matter"


def test_a_checkpoint_holds_what_was_trained_and_not_the_base(home, tmp_path, weights):
    recipe = recipe_for(weights, "model.use_proprio=true", "model.lora_vision=true")
    model, codec = trained_model(recipe)
    saved = checkpoint.save(tmp_path / "run", "epoch_1", model, codec, recipe, STATE)
    adapter, modules = (load_file(saved / name) for name in ("adapter_model.safetensors", "modules.safetensors"))
    prefix = "base_model.model.model.layers."
    assert len(adapter) == 3 * 7 * 2 and all(name.startswith(prefix) and ".lora_" in name for name in adapter)
    assert {name for name in modules if ".lora_" not in name} == PROPRIO
    assert all(name.startswith("vision_backbone.") for name in modules.keys() - PROPRIO)
    assert {tensor.dtype for tensor in [*adapter.values(), *modules.values()]} == {torch.float32}
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(weights)


@torch.no_grad()
def test_plain_peft_puts_the_adapter_on_a_plain_llama(home, tmp_path, weights):
    recipe = recipe_for(weights, FLOAT32)
    model, codec = trained_model(recipe)
    saved = checkpoint.save(tmp_path / "run", "epoch_1", model, codec, recipe, STATE)
    plain = LlamaForCausalLM(LlamaConfig(**config()["text_config"])).eval()
    plain.load_state_dict(load_openvla(weights, global_token=True).language_model.state_dict())
    adapted = PeftModel.from_pretrained(plain, saved)
    batch, _ = load_splits(dataset_dir(TASK, 0, NUM_EPISODES), recipe).examples(2, torch.device("cpu"))
    hidden, _ = model.embed_inputs(batch)
    embedded = model.language_model.model.embed_tokens(batch.action_tokens[:, :-1])
    logits = adapted(inputs_embeds=torch.cat([hidden, embedded], dim=1)).logits[:, -batch.action_tokens.shape[1] :]
    torch.testing.assert_close(logits, model.action_logits(batch), atol=1e-4, rtol=1e-5)
    with adapted.disable_adapter():
        without = adapted(inputs_embeds=torch.cat([hidden, embedded], dim=1)).logits[:, -batch.action_tokens.shape[1] :]
    assert (without - logits).abs().max() > 0.05


def test_a_checkpoint_on_another_base_is_refused_in_one_line(home, tmp_path):
    base = write_published(tmp_path / "base", seed=1)
    recipe = recipe_for(base, FLOAT32)
    model, codec = trained_model(recipe)
    saved = checkpoint.save(tmp_path / "run", "epoch_1", model, codec, recipe, STATE)
    write_published(base, seed=2)
    with pytest.raises(
        UserError, match=r"adapter_model\.safetensors was trained on other weights \(fingerprint"
    ) as error:
        Policy.load(saved)
    assert "\n" not in str(error.value) and str(base) in str(error.value)


# ------------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("overrides", [[FLOAT32], ["model.use_proprio=true", "model.lora_vision=true"]], ids=["float32", "bfloat16"])  # fmt: skip
def test_merged_weights_are_published_ones_that_answer_as_the_policy(
    run, tmp_path, weights, overrides, monkeypatch, capsys
):
    recipe = recipe_for(weights, *overrides)
    model, codec = trained_model(recipe)
    checkpoint.save(run, "epoch_1", model, codec, recipe, STATE)
    data, output = dataset_dir(TASK, 0, NUM_EPISODES), tmp_path / "merged"
    monkeypatch.setattr("sys.argv", ["merge", str(run / "latest"), str(output), "--frames", "4", "--device", "cpu"])
    merging.main()
    said = capsys.readouterr().out
    report = json.loads((output / "merge.json").read_text())
    is_exact = FLOAT32 in overrides
    batch, _ = load_splits(data, recipe).examples(4, torch.device("cpu"))
    with torch.no_grad(), autocast(model):
        logits = model.action_logits(batch).float()
    with torch.no_grad():  # what computing in bfloat16 costs by itself, before anything is merged
        rounding = (copy.deepcopy(model).float().action_logits(batch) - logits).abs().max().item()
    bound = 1e-4 if is_exact else 2 * rounding  # 1.4 times at most over six seeds
    assert report["largest_logit_difference"] < bound < report["largest_logit"]
    assert not is_exact or report["different_action_numbers"] == 0
    assert "rad" in said and ("proprio" in said) == (not is_exact)

    # ---- what the official code reads
    published = json.loads((output / "config.json").read_text())
    assert published["global_token"] is True and published["text_config"] == config()["text_config"]
    assert published["norm_stats"].keys() == {"other", data.name}
    statistics = published["norm_stats"][data.name]["action"]
    assert statistics == codec.action_statistics.official() and len(statistics["q01"]) == 8
    assert not list(tmp_path.glob(".*.tmp"))

    # ---- and so does ours, to act or to train further
    again = load_openvla(output, True, proprio_dim=8 if codec.use_proprio else None, dtype=getattr(torch, recipe.model.torch_dtype))  # fmt: skip
    with torch.no_grad(), autocast(model):
        difference = (again.action_logits(batch).float() - logits).abs().max().item()
    assert difference == pytest.approx(report["largest_logit_difference"], abs=1e-6)
    base = load_openvla(weights, True).state_dict()
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert not again.state_dict()[name].float().equal(base[name])
    further = recipe_for(output, *overrides)
    assert load_splits(data, further).codec.prompt.to_json() == codec.prompt.to_json()


@pytest.mark.parametrize(("option", "value"), [("--frames", "0"), ("--device", "foo")])
def test_merging_refuses_no_frames_and_no_device(tmp_path, monkeypatch, option, value):
    monkeypatch.setattr("sys.argv", ["merge", str(tmp_path), str(tmp_path / "merged"), option, value])
    with pytest.raises(UserError, match=f"{option}: .*{value}"):
        merging.main()


def test_merging_refuses_what_it_cannot_do_and_leaves_nothing(home, tmp_path, weights, recipe, monkeypatch):
    data = dataset_dir(TASK, 0, NUM_EPISODES)
    codec = load_splits(data, recipe).codec
    scratch = checkpoint.save(tmp_path / "tiny", "epoch_1", checkpoint.build_model(recipe, codec), codec, recipe, STATE)
    with pytest.raises(UserError, match="trained from scratch"):
        merging.merge(scratch, tmp_path / "merged", data, 2, "cpu")
    other = recipe_for(weights, FLOAT32, "data.normalization=min_max")
    model, _ = trained_model(other)
    saved = checkpoint.save(tmp_path / "run", "epoch_1", model, codec, other, STATE)
    with pytest.raises(UserError, match="is not the dataset"):
        merging.merge(saved, tmp_path / "merged", data, 2, "cpu")
    saved = checkpoint.save(
        tmp_path / "run", "epoch_2", *trained_model(recipe_for(weights)), recipe_for(weights), STATE
    )

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging.shutil, "copy", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        merging.merge(saved, tmp_path / "merged", data, 2, "cpu")
    assert not list(tmp_path.glob("*merged*"))
