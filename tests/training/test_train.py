"""What a user of the trainer relies on: it learns, it resumes exactly, it refuses what would ruin a run."""

import json

import pytest
import torch
from safetensors.torch import load_file

from robofactory.config import load_recipe, load_scene, of_round, scene_file, to_yaml
from robofactory.data import lerobot
from robofactory.errors import UserError
from robofactory.paths import dataset_dir, run_dir
from robofactory.training.train import main, parse_arguments, train, train_all_agents
from tests.training.conftest import NUM_EPISODES, SMALL, TASK, stop_during


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(home):
    return run_dir("openvla", TASK, 0, NUM_EPISODES)


def start(scene, recipe, resume=False, round_number=0):
    train("openvla", scene.task, 0, recipe, resume, bar_position=0, round_number=round_number)


def test_training_lowers_the_loss_and_leaves_what_the_seed_promises(run, scene):
    start(scene, load_recipe("robot_openvla_tiny", [*SMALL, "training.num_epochs=12", "training.checkpoint_every=5", "training.learning_rate=3e-3"]))  # fmt: skip
    val = [line["val_loss"] for line in metrics_of(run) if "val_loss" in line]
    assert len(val) == 12 and val[-1] < val[0] - 0.5, f"validation loss did not fall: {val}"
    assert sorted(p.name for p in run.glob("epoch_*")) == ["epoch_10", "epoch_12", "epoch_5"]
    assert (run / "latest").resolve() == (run / "epoch_12").resolve()
    assert {"codec.json", "config.yaml", "modules.safetensors", "training_state.pt"} <= {p.name for p in (run / "latest").iterdir()}  # fmt: skip
    assert (run / "curves.png").stat().st_size > 1000 and (run / "input_images.png").stat().st_size > 1000


def test_a_second_run_never_overwrites_a_trained_policy(run, scene, recipe):
    start(scene, recipe)
    before = (run / "latest" / "modules.safetensors").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        start(scene, recipe)
    assert (run / "latest" / "modules.safetensors").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(run, scene, recipe):
    start(scene, recipe)
    before = (run / "metrics.jsonl").read_text()
    start(scene, recipe, resume=True)
    assert (run / "metrics.jsonl").read_text() == before


# ------------------------------------------------------------------------------------------------------------- rounds

RELABEL = ["relabel={num_rounds: 2, num_episodes: 2, num_epochs: 1, learning_rate: 1.0e-3}"]


@pytest.fixture
def recipes():
    """Of the rounds 0, 1 and 2."""
    recipe = load_recipe("robot_openvla_tiny", [*SMALL, *RELABEL])
    return [of_round(recipe, number) for number in range(3)]


def test_a_round_goes_on_from_the_one_before_with_the_relabelled_episodes(run, scene, recipes, relabelled):
    start(scene, recipes[0])
    first = load_file(run / "epoch_3" / "modules.safetensors")
    start(scene, recipes[1], round_number=1)
    assert (run / "latest").resolve().name == "epoch_4"
    second = load_file(run / "epoch_4" / "modules.safetensors")
    change = torch.stack([(second[key] - first[key]).norm() for key in first]).norm()
    size = torch.stack([tensor.norm() for tensor in first.values()]).norm()
    assert 0 < change < 0.2 * size, f"weights of size {size:.3g} moved by {change:.3g}: were they taken over?"
    codecs = [(run / name / "codec.json").read_bytes() for name in ("epoch_3", "epoch_4")]
    assert codecs[0] == codecs[1]
    steps = [line["step"] for line in metrics_of(run) if "val_loss" in line]
    demonstrations, everything = steps[0], steps[3] - steps[2]
    assert steps == sorted(steps) and everything > demonstrations, "an epoch is longer with the relabelled episodes"


def test_a_round_resumes_exactly(run, scene, recipes, relabelled, home, monkeypatch):
    start(scene, recipes[0])
    start(scene, recipes[1], round_number=1)
    undisturbed = load_file(run / "epoch_4" / "modules.safetensors")
    run.rename(home / "undisturbed")

    start(scene, recipes[0])
    with monkeypatch.context() as during:
        stop_during(during, update=22)
        with pytest.raises(SystemExit):
            start(scene, recipes[1], round_number=1)
    start(scene, recipes[1], resume=True, round_number=1)
    resumed = load_file(run / "epoch_4" / "modules.safetensors")
    assert [k for k in undisturbed if not torch.equal(undisturbed[k], resumed[k])] == []


def test_a_complete_round_is_not_trained_again(run, scene, recipes, relabelled, capsys):
    start(scene, recipes[0])
    start(scene, recipes[1], round_number=1)
    before = (run / "latest" / "modules.safetensors").read_bytes()
    for number in (0, 1):  # what runs/laptop.sh does the second time
        start(scene, recipes[number], resume=True, round_number=number)
        assert "trained already" in capsys.readouterr().out
    assert (run / "latest" / "modules.safetensors").read_bytes() == before


def test_rounds_come_in_order(run, scene, recipes, relabelled, monkeypatch):
    with pytest.raises(UserError, match=r"--round 1 goes on from round 0, and .* has no checkpoint"):
        start(scene, recipes[1], round_number=1)
    stop_during(monkeypatch, update=0)
    with pytest.raises(SystemExit):
        start(scene, recipes[0])
    with pytest.raises(UserError, match="is in round 0; finish that first"):
        start(scene, recipes[1], round_number=1)


def test_a_round_that_the_recipe_has_not_is_refused():
    with pytest.raises(UserError, match="--round 3: the recipe has rounds 0 to 2"):
        of_round(load_recipe("robot_openvla_tiny", RELABEL), 3)
    with pytest.raises(UserError, match=r"relabel\.num_rounds.: must be positive"):
        load_recipe("robot_openvla_tiny", ["relabel={num_rounds: 0}"])


def test_a_dataset_with_an_error_is_not_trained_on_unless_the_recipe_accepts_it(run, scene):
    for episode in range(NUM_EPISODES):
        file = lerobot.data_file(dataset_dir(TASK, 0, NUM_EPISODES), episode)
        table = lerobot.open_parquet(file).read()
        side = table.schema.get_field_index("observation.images.side")
        file.write_bytes(lerobot.to_parquet(table.set_column(side, table.schema.field(side), table["observation.images.wrist"])))  # fmt: skip
    with pytest.raises(UserError, match=r"duplicated_camera: .*data\.accept='\[duplicated_camera\]'"):
        start(scene, load_recipe("robot_openvla_tiny", SMALL))
    assert not run.exists()
    start(
        scene, load_recipe("robot_openvla_tiny", [*SMALL, "training.num_epochs=1", "data.accept=[duplicated_camera]"])
    )
    assert (run / "epoch_1").is_dir()


def test_accumulating_two_half_batches_equals_one_whole(run, scene, home):
    losses = []
    for name, half in {
        "whole": [],
        "halves": ["dataloader.batch_size=4", "training.gradient_accumulate_every=2"],
    }.items():
        start(scene, load_recipe("robot_openvla_tiny", [*SMALL, "training.num_epochs=1", *half]))
        losses.append(metrics_of(run)[-1]["val_loss"])
        run.rename(home / name)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2), "bf16 rounding apart, the steps are the same"


def test_the_7b_without_a_gpu_names_the_tiny_recipe(monkeypatch):
    from robofactory.training import train as module

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="robot_openvla_tiny"):
        module.require_hardware(load_recipe("robot_openvla"))


def test_flags_and_overrides_may_be_mixed(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["train", "--task", TASK, "training.num_epochs=2", "--agent_id", "1", "data.num_episodes=3"]
    )
    args = parse_arguments()
    assert (args.agent_id, args.overrides) == (1, ["training.num_epochs=2", "data.num_episodes=3"])


def test_a_scene_that_the_demonstrations_are_not_of_is_refused(home, tmp_path, monkeypatch):
    """--config did nothing once there were demonstrations."""
    scene = tmp_path / "own.yaml"
    scene.write_text(to_yaml(load_scene(scene_file(TASK), ["robots.0.yaw_deg=85"])))
    pictures = ["data.visual_detail=full", "data.image_width=320", "data.image_height=240"]  # as they were recorded
    arguments = ["--task", TASK, "--recipe", "robot_openvla_tiny", *SMALL, "training.max_steps=1", *pictures]
    monkeypatch.setattr("sys.argv", ["train", *arguments, "--config", str(scene)])
    with pytest.raises(UserError, match=r"in another scene \(yaw_deg: 90.0 there, yaw_deg: 85.0 by --config"):
        main()
    monkeypatch.setattr("sys.argv", ["train", *arguments, "--config", str(scene_file(TASK))])
    main()
    assert (run_dir("openvla", TASK, 0, NUM_EPISODES) / "latest").is_dir()


@pytest.mark.parametrize("number", ["0", "-2"])
def test_a_number_of_gpus_that_makes_no_sense_is_one_line(monkeypatch, number):
    monkeypatch.setattr("sys.argv", ["train", "--task", TASK, "--gpus", number])
    with pytest.raises(UserError, match=f"--gpus: must be at least 1, got {number}; see robofactory train --help"):
        main()


def test_more_gpus_than_there_are_is_one_line(home, monkeypatch):
    """It ended inside CUDA, in a process of the launcher."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("sys.argv", ["train", "--task", TASK, "--recipe", "robot_openvla_tiny", "--gpus", "3", *SMALL])
    with pytest.raises(UserError, match="--gpus 3: this machine has 2"):
        main()


def test_weights_are_looked_for_before_demonstrations_are_recorded(tmp_path, monkeypatch):
    """On a machine with a GPU it recorded for an hour, and then found no weights."""
    from robofactory.training import children

    monkeypatch.setenv("ROBOFACTORY_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(children, "run", lambda *_, **__: pytest.fail("it records"))
    monkeypatch.setattr("sys.argv", ["train", "--task", TASK, f"model.model_name={tmp_path}"])
    with pytest.raises(UserError, match="holds no published model"):
        main()


def test_several_gpus_are_as_many_processes_of_the_same_command(home, monkeypatch):
    from robofactory.training import distributed

    launched = []
    monkeypatch.setattr(distributed, "launch", lambda *given: launched.append(given) or 7)
    arguments = ["--task", TASK, "--recipe", "robot_openvla_tiny", "--gpus", "2", *SMALL]
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert launched == [(2, "robofactory.training.train", arguments)] and ended.value.code == 7


@pytest.mark.parametrize("has_gpu", [False, True])
def test_all_agents_share_the_cores_and_take_turns_on_a_gpu(monkeypatch, has_gpu):
    """Two trainings of a 7B at once do not fit the memory of one GPU."""
    from robofactory.training import children

    at_once = []
    monkeypatch.setattr(children, "run", lambda commands, **_: at_once.append([line[line.index("--agent_id") + 1] for line in commands.values()]))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("sys.argv", ["train", "--task", TASK, "--all_agents"])
    train_all_agents(2)
    assert at_once == ([["0"], ["1"]] if has_gpu else [["0", "1"]])
