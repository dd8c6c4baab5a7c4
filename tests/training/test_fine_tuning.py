"""The 7B's own path, end to end on a CPU, with a small look-alike of its weights: the same code at another size."""

import json

import pytest

from robofactory.config import load_recipe, run_dir
from robofactory.training.train import main, train
from tests.published import write_published
from tests.training.conftest import NUM_EPISODES, TASK

SMALL = [
    "model.lora_rank=4",
    "training.learning_rate=1e-2",
    "training.num_epochs=3",
    "training.checkpoint_every=1",
    f"data.num_episodes={NUM_EPISODES}",
    "data.val_ratio=0.2",
    "dataloader.batch_size=8",
    "dataloader.num_workers=0",
]


@pytest.fixture
def weights(tmp_path):
    return write_published(tmp_path / "openvla")


@pytest.fixture
def run(home):
    return run_dir("openvla", TASK, 0, NUM_EPISODES)


def recipe_for(weights, *overrides):
    return load_recipe("robot_openvla", [f"model.model_name={weights}", *SMALL, *overrides])


def start(scene, recipe, resume=False):
    train("openvla", scene, 0, recipe, resume, bar_position=0)


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_command_of_the_specification_fine_tunes(run, weights, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in weights.iterdir()}
    command = ["train", "--policy", "openvla", "--task", TASK, "--agent_id", "0"]
    monkeypatch.setattr("sys.argv", [*command, f"model.model_name={weights}", *SMALL, "training.num_epochs=6"])
    main()
    assert {p.name for p in (run / "latest").iterdir()} >= {
        "adapter_model.safetensors", "adapter_config.json", "training_state.pt", "codec.json", "config.yaml", "tokenizer.json",
    }  # fmt: skip
    losses = [line["val_loss"] for line in metrics_of(run) if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.5, f"nothing was learned: {losses}"
    assert "LoRA, language model" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in weights.iterdir()} == before, (
        "the base is memory-mapped, not edited"
    )
