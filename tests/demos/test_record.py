"""Recording: in order, all or nothing, and the same result however it was run."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from players import BlindPlayer, CrampedPlayer, DyingPlayer, HangingPlayer, HopelessPlayer, MadeUpPlayer, small_scene

from robofactory import files
from robofactory.config import FIRST_EVALUATION_SEED, load_recipe
from robofactory.data import lerobot
from robofactory.data.episodes import DatasetReader
from robofactory.demos.record import main, record, relabel
from robofactory.errors import UserError
from robofactory.paths import relabelled_dir
from robofactory.robots.panda import ROBOT as PANDA

NUM = 8
SEEDS = [0, 2, 3, 4, 6, 7, 8, 10]  # MadeUpPlayer fails on 1, 5, 9, ...


def record_made_up(home: Path, num: int = NUM, make_player=MadeUpPlayer, **options) -> list[Path]:
    return record(
        small_scene(), num, directories=[home / "agent0", home / "agent1"], make_player=make_player, **options
    )


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.glob("**/*")) if p.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """Recorded at once by one worker."""
    home = tmp_path_factory.mktemp("reference")
    record_made_up(home, workers=1)
    return home


def test_episodes_are_the_first_seeds_that_succeed_in_order(reference):
    for agent in (0, 1):
        reader = DatasetReader(reference / f"agent{agent}")
        assert reader.seeds == SEEDS
        assert reader.description.agent_id == agent and reader.description.joint_names == PANDA.names
        assert reader.description.image_sizes == {"side": (12, 16), "overhead": (12, 16), "wrist": (12, 16)}
    meta = lerobot.read_json(reference / "agent0" / "meta" / "robofactory.json")
    assert meta["dropped_seeds"] == [1, 5, 9]


def test_the_number_of_workers_does_not_change_a_bit(reference, tmp_path):
    record_made_up(tmp_path, workers=2)
    assert files_of(tmp_path) == files_of(reference)


def test_an_interruption_does_not_change_a_bit(reference, tmp_path, monkeypatch):
    """The disk is full at one agent's fourth episode; the same call goes on when there is room."""
    write, count = files.write_atomically, []

    def full_later(path, data):
        if path.name == "file-003.parquet" and "agent1" in str(path):
            count.append(path)
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(files, "write_atomically", full_later)
    with pytest.raises(UserError, match="the disk is full"):
        record_made_up(tmp_path, workers=1)
    monkeypatch.undo()
    assert (
        count and len(list(tmp_path.glob("agent0/data/*/*"))) == 4 and len(list(tmp_path.glob("agent1/data/*/*"))) == 3
    )
    record_made_up(tmp_path, workers=2)
    assert files_of(tmp_path) == files_of(reference)


def test_a_lost_dataset_of_one_agent_is_made_again(reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "agent1")
    record_made_up(tmp_path, workers=1)
    assert files_of(tmp_path) == files_of(reference)


RECORDING = """
import sys
from pathlib import Path
from robofactory.errors import run_command
from robofactory.demos.record import record
sys.path.insert(0, {tests!r})
from players import SlowPlayer, small_scene
if __name__ == "__main__":
    home = Path({home!r})
    directories = [home / "agent0", home / "agent1"]
    run_command(lambda: record(small_scene(), 8, workers=1, directories=directories, make_player=SlowPlayer))
"""


def test_stopped_at_any_time_the_same_command_continues(reference, tmp_path):
    """Ctrl-C after some episodes, kill -9 after some more; then it may finish."""
    home, pids = tmp_path / "home", tmp_path / "pids"
    pids.mkdir()
    script = tmp_path / "recording.py"
    script.write_text(RECORDING.format(tests=str(Path(__file__).parent), home=str(home)))
    environment = os.environ | {"PIDS": str(pids), "OMP_NUM_THREADS": "1"}
    errors = {}
    for how, after in ((signal.SIGINT, 2), (signal.SIGKILL, 4)):
        run = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True)
        _wait_for((home / f"agent0/data/chunk-000/file-{after:03d}.parquet").exists)
        run.send_signal(how)
        errors[how] = run.communicate(timeout=100)[1]
        assert run.returncode == (130 if how == signal.SIGINT else -9), errors[how]
        workers = [Path("/proc", file.name, "exe") for file in pids.iterdir()]  # a zombie has no exe
        _wait_for(lambda workers=workers: not any(worker.exists() for worker in workers))  # none outlives its parent
        for file in home.glob("**/file-*.parquet"):
            lerobot.read_parquet(file, ["action"])  # whole
        assert not (home / "agent0/meta/info.json").exists()
    assert "the same command continues" in errors[signal.SIGINT] and "Traceback" not in errors[signal.SIGINT]
    subprocess.run([sys.executable, str(script)], env=environment, check=True)
    assert files_of(home) == files_of(reference)


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_complete_dataset_is_left_as_it_is(reference, tmp_path, capsys):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*.parquet")}
    record_made_up(tmp_path, make_player=DyingPlayer)  # no worker is started
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*.parquet")}
    assert "8 episodes (0 perturbed), 3 seeds dropped" in capsys.readouterr().out


def test_other_noise_or_another_scene_is_not_mixed_in(reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"another noise_share .* delete it or choose another --num"):
        record_made_up(tmp_path, noise_share=0.5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num": 0}, "--num must be at least 1, got 0"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"noise_share": 1.5}, r"--noise must be in \[0, 1\], got 1.5"),
        ({"first_seed": FIRST_EVALUATION_SEED}, "--seed must be in .* for evaluation"),
    ],
)
def test_bad_numbers_are_named(tmp_path, options, problem):
    with pytest.raises(UserError, match=problem):
        record_made_up(tmp_path, **options)


def test_the_seeds_of_the_evaluation_are_never_recorded(tmp_path):
    with pytest.raises(UserError, match="seed 10000 is for evaluation"):
        record_made_up(tmp_path, first_seed=FIRST_EVALUATION_SEED - 3, workers=1)
    assert len(list(tmp_path.glob("agent0/data/*/*.parquet"))) == 2  # 9997 fails, 9998 and 9999 are there


def test_an_expert_that_always_fails_ends_the_recording(tmp_path):
    with pytest.raises(UserError, match="the expert failed on 50 seeds in a row"):
        record_made_up(tmp_path, make_player=HopelessPlayer, workers=1)


def test_a_worker_that_dies_is_told_with_its_seed(tmp_path):
    with pytest.raises(UserError, match=r"the process that recorded seed 3 died \(exit code 9\).*fewer --workers"):
        record_made_up(tmp_path, make_player=DyingPlayer, workers=1)
    assert seeds_on_disk(tmp_path) == [0, 2]


def test_a_worker_that_hangs_is_ended_with_the_line_that_says_which_setting_helps(tmp_path):
    """A driver that hung in one episode hung the recording for ever."""
    with pytest.raises(
        UserError, match=r"seed 0 died \(no answer within 2 s\).*a higher --time_limit; the same command"
    ):
        record_made_up(tmp_path, make_player=HangingPlayer, workers=1, time_limit_s=2.0)
    assert not multiprocessing.active_children()


def test_a_full_disk_in_a_worker_is_told_as_one(tmp_path):
    """It was told as a process that had died, perhaps for memory."""
    with pytest.raises(UserError, match=r"^No space left on device: /cache/mesh\.ply$"):
        record_made_up(tmp_path, make_player=CrampedPlayer, workers=1)


def test_two_recordings_into_one_dataset_are_noticed(tmp_path):
    with (
        files.owned(tmp_path / "agent1"),
        pytest.raises(UserError, match=rf"agent1 is being written by process {os.getpid()} on"),
    ):
        record_made_up(tmp_path, workers=1)
    record_made_up(tmp_path, num=1, workers=1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_a_worker_cannot_do_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^no device here can render; install a Vulkan driver$"):
        record_made_up(tmp_path, make_player=BlindPlayer, workers=1)


def seeds_on_disk(home: Path) -> list[int]:
    from robofactory.data.episodes import DatasetWriter
    from robofactory.demos.record import describe

    return DatasetWriter(home / "agent0", describe(small_scene(), 0, 0.0, 0, "expert")).seeds


# ------------------------------------------------------------------------------------------------ with the simulator


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("simulated")
    record(small_scene(), 3, noise_share=0.6, workers=1, directories=[home / "agent0", home / "agent1"])
    return home


@pytest.mark.sim
def test_simulated_recording_is_the_same_bit_for_bit_with_two_workers(simulated, tmp_path):
    """A mere reset of the simulator is not enough for that: contacts would depend on the episodes played before."""
    record(small_scene(), 3, noise_share=0.6, workers=2, directories=[tmp_path / "agent0", tmp_path / "agent1"])
    assert files_of(tmp_path) == files_of(simulated)


@pytest.mark.sim
def test_proprio_is_measured_before_the_action_and_differs_from_it(simulated):
    """Stored as the commanded action, it would be the label itself, and a policy trained on it never moves."""
    rest = np.array(small_scene().robots[0].rest_qpos[:7])
    for agent in (0, 1):
        reader = DatasetReader(simulated / f"agent{agent}")
        for episode in range(reader.num_episodes):
            proprio, actions = reader.proprio(episode), reader.actions(episode)
            np.testing.assert_allclose(proprio[0, :7], rest, atol=1e-3)  # nothing has moved yet
            assert proprio[0, 7] == pytest.approx(1.0, abs=1e-3)
            gap = np.abs(actions[:, :7] - proprio[:, :7]).max(axis=1)
            assert (gap[:10] > 0.005).all()  # on its way, the target leads
            calm = ~reader.all_perturbed[reader.episode_frames(episode)]
            if calm.all():  # the arm follows: the next measurement lies between this one and its target
                way, moved = actions[:10, :7] - proprio[:10, :7], proprio[1:11, :7] - proprio[:10, :7]
                share = (way * moved).sum() / (way * way).sum()
                assert 0.05 < share < 0.95


@pytest.mark.sim
def test_perturbed_frames_are_marked_and_labelled_by_the_expert(simulated):
    reader = DatasetReader(simulated / "agent0")
    kinds = [reader.all_perturbed[reader.episode_frames(episode)] for episode in range(reader.num_episodes)]
    assert any(kind.any() for kind in kinds) and any(not kind.any() for kind in kinds)
    for episode, kind in enumerate(kinds):
        assert not kind[-5:].any()  # after success it holds, undisturbed
        assert set(np.unique(reader.actions(episode)[:, 7])) == {-1.0, 1.0}  # the expert's, whatever was executed


@pytest.mark.sim
def test_pictures_of_all_views_change_while_the_arms_move(simulated):
    reader = DatasetReader(simulated / "agent1")
    first, last = reader.frame(0, 0)[0].images, reader.frame(0, int(reader.episode_lengths[0]) - 1)[0].images
    assert list(first) == ["side", "overhead", "wrist"]
    for view in first:
        assert first[view].shape == (12, 16, 3) and first[view].std() > 5
        assert np.abs(first[view].astype(int) - last[view]).mean() > 1


# ------------------------------------------------------------------------------------------------------- relabelling


@pytest.fixture
def with_policies(simulated, tmp_path, monkeypatch) -> Path:
    """`$ROBOFACTORY_HOME` with three demonstrations of each agent, and a policy that has learned nothing yet."""
    import torch

    from robofactory import checkpoint
    from robofactory.config import load_recipe
    from robofactory.data.dataset import load_splits
    from robofactory.paths import dataset_dir, run_dir

    monkeypatch.setenv("ROBOFACTORY_HOME", str(tmp_path))
    tower, language = "{embed_dim: 32, depth: 2, num_heads: 2}", "hidden_size: 32, intermediate_size: 64"
    sizes = [
        f"dino={tower}",
        f"siglip={tower}",
        f"language={{{language}, num_hidden_layers: 1, num_attention_heads: 2}}",
    ]
    recipe = load_recipe("robot_openvla_tiny", [f"model.architecture.{size}" for size in ("image_size=28", *sizes)])
    for agent in (0, 1):
        directory = dataset_dir("LiftBarrier-rf", agent, 3)
        shutil.copytree(simulated / f"agent{agent}", directory)
        codec = load_splits(directory, recipe).codec
        torch.manual_seed(agent)
        model = checkpoint.build_model(recipe, codec)
        checkpoint.save(run_dir("openvla", "LiftBarrier-rf", agent, 3), "epoch_1", model, codec, recipe, {"update": 1})
    return tmp_path


@pytest.mark.sim
def test_relabelled_episodes_are_driven_by_the_policies_and_labelled_by_the_expert(with_policies):
    directories = relabel("LiftBarrier-rf", 2, 1, None, noise_share=0.0, workers=1)
    for agent, directory in enumerate(directories):
        assert directory == with_policies / "data" / f"LiftBarrier-rf_Agent{agent}_3_relabelled_1"
        reader = DatasetReader(directory)
        demonstrations = DatasetReader(with_policies / "data" / f"LiftBarrier-rf_Agent{agent}_3")
        assert min(reader.seeds) > max(demonstrations.seeds), "layouts that the demonstrations do not have"
        assert reader.description.scene_yaml == demonstrations.description.scene_yaml
        assert reader.description.driver.startswith("openvla, weights ")
        assert reader.episode_lengths.tolist() == [100, 100]  # they fail, and are kept
        assert 0.5 < reader.all_perturbed.mean() < 1.0  # most of the time the policy drives
        assert set(np.unique(reader.all_actions[:, 7])) <= {-1.0, 1.0}  # the expert's; a decoded bin is neither
        assert [reader.actions(episode)[0, 7] for episode in (0, 1)] == [1.0, 1.0]  # far away, it keeps the hand open
        lead = np.abs(reader.all_actions[:, :7] - reader.all_proprio[:, :7]).max(axis=1)
        assert lead.max() <= 0.061, "the labels are the expert's, who never leads by more than 0.06 rad"


@pytest.mark.sim
def test_relabelling_goes_on_with_the_same_policies_only(with_policies, capsys):
    directories = [relabelled_dir("LiftBarrier-rf", agent, 3, 1) for agent in (0, 1)]
    relabel("LiftBarrier-rf", 1, 1, None, noise_share=0.0, workers=1)
    weights = with_policies / "checkpoints" / "openvla" / "LiftBarrier-rf_Agent1_3" / "epoch_1" / "modules.safetensors"
    before = [files_of(directory) for directory in directories]
    weights.write_bytes(weights.read_bytes().replace(b"\x00\x00", b"\x00\x01", 1))
    relabel("LiftBarrier-rf", 1, 1, None, noise_share=0.0, workers=1)  # complete: nothing to do
    assert "recorded already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"_relabelled_1 was recorded with another driver"):
        relabel("LiftBarrier-rf", 2, 1, None, noise_share=0.0, workers=1)
    assert [files_of(directory) for directory in directories] == before


def test_relabelling_without_policies_says_how_to_train_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBOFACTORY_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"agent 0 of LiftBarrier-rf has no trained policy; train it: bash train\.sh"):
        relabel("LiftBarrier-rf", 2, 1, None, noise_share=0.0, workers=1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--round", "1", "--width", "64"], "--round records the scene and pictures of the demonstrations"),
        (["--round", "-1"], "--round: must be at least 0, got -1"),
        (["--round", "1", "--num", "501"], "--num 501: a round has at most 500"),
        (["--round", "1", "visual_detail=low"], "--round records the scene and pictures of the demonstrations"),
        (["--round", "9", "--recipe", "robot_openvla_tiny"], "--round 9: the recipe has rounds 0 to"),
        (["data.num_episodes=3"], "data.num_episodes=3: only a recipe has such keys; name it with --recipe"),
        (["--data_num", "150"], "--data_num says whose policies drive, and goes with --round"),
    ],
)
def test_options_that_would_be_ignored_are_refused(monkeypatch, options, problem):
    monkeypatch.setattr("sys.argv", ["record", "--task", "LiftBarrier-rf", "--num", "2", *options])
    with pytest.raises(UserError, match=problem):
        main()


def test_a_recipe_says_what_is_recorded_unless_the_command_does(monkeypatch):
    calls = []
    monkeypatch.setattr("robofactory.demos.record.record", lambda scene, num, **options: calls.append((scene, num, options)))  # fmt: skip
    given = ["--noise", "0.25", "data.num_episodes=6", "objects.barrier.mass_kg=0.5", "training.num_epochs=1"]
    monkeypatch.setattr("sys.argv", ["record", "--task", "LiftBarrier-rf", "--recipe", "robot_openvla_tiny", *given])
    main()
    ((scene, num, options),) = calls
    recipe = load_recipe("robot_openvla_tiny")
    assert (num, options["noise_share"]) == (6, 0.25)
    assert scene.visual_detail == recipe.data.visual_detail == "low"
    assert {(c.width, c.height) for c in scene.cameras} == {(recipe.data.image_width, recipe.data.image_height)}
    assert scene.objects["barrier"].mass_kg == 0.5


def test_what_is_said_of_the_scene_wins_over_the_recipes_pictures(monkeypatch):
    """`visual_detail=low` was recorded in full detail, `cameras.0.width=64` with the recipe's 128."""
    calls = []
    monkeypatch.setattr("robofactory.demos.record.record", lambda scene, num, **options: calls.append(scene))
    for recipe, override in (("robot_openvla", "visual_detail=low"), ("robot_openvla_tiny", "cameras.0.width=64")):
        monkeypatch.setattr("sys.argv", ["record", "--task", "LiftBarrier-rf", "--recipe", recipe, override])
        main()
    full, tiny = calls
    assert full.visual_detail == "low"
    assert [camera.width for camera in tiny.cameras] == [64, 128, 128, 128, 128]


@pytest.mark.parametrize("flag", ["--width", "--height"])
def test_a_picture_has_a_size(monkeypatch, flag):
    monkeypatch.setattr("sys.argv", ["record", "--task", "LiftBarrier-rf", flag, "0"])
    with pytest.raises(UserError, match=f"{flag}: must be at least 1, got 0"):
        main()


def test_a_recipe_says_how_many_episodes_a_round_relabels(monkeypatch):
    calls = []
    monkeypatch.setattr("robofactory.demos.record.relabel", lambda *given, **options: calls.append(given))
    monkeypatch.setattr("sys.argv", ["record", "--task", "LiftBarrier-rf", "--recipe", "robot_openvla_tiny", "--round", "1", "relabel.num_episodes=7"])  # fmt: skip
    main()
    assert calls == [("LiftBarrier-rf", 7, 1, load_recipe("robot_openvla_tiny").data.num_episodes)]
