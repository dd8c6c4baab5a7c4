import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_samples import TASK, film, sample_evaluation, sample_scene
from worker_samples import play_with_trouble, sample_episode

from robofactory.config import UserError, find_checkpoints, look_of, to_yaml, with_look
from robofactory.evaluation import evaluate, results
from robofactory.evaluation.results import CRASH, FAILURE, SUCCESS


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBOFACTORY_HOME", str(tmp_path))
    return tmp_path


def trained(home: Path, agent: int, num: int, *names: str) -> Path:
    run = home / "checkpoints" / "openvla" / f"{TASK}_Agent{agent}_{num}"
    for name in names:
        (run / name).mkdir(parents=True)
    (run / "latest").symlink_to(names[-1])
    return run


def test_help_answers_on_bare_python():
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        "import sys; sys.path.insert(0, '.'); sys.argv = ['eval.sh', '--help']; ",
    ]
    command[-1] += "from robofactory.evaluation.evaluate import main; main()"
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "--checkpoint" in done.stdout


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_latest_is_the_newest_epoch_of_each_agent_and_names_its_results(home):
    runs = [trained(home, agent, 150, "epoch_2", "epoch_4") for agent in (0, 1)]
    found = find_checkpoints("openvla", TASK, [0, 1], "latest", None)
    assert found == {agent: (run / "epoch_4").resolve() for agent, run in enumerate(runs)}
    root = evaluate.results_root("openvla", TASK, found, "latest")
    assert root == home / "results" / "openvla" / f"{TASK}_150" / "epoch_4"


def test_a_missing_epoch_lists_those_there_are(home):
    trained(home, 0, 150, "epoch_2", "epoch_4")
    with pytest.raises(UserError, match=r"no checkpoint 'epoch_300'.*epoch_2, epoch_4"):
        find_checkpoints("openvla", TASK, [0], "epoch_300", None)


def test_an_untrained_agent_is_told_how_to_train(home):
    trained(home, 0, 150, "epoch_2")
    with pytest.raises(UserError, match=r"agent 1 of LiftBarrier-rf has no trained policy.*train\.sh.*--agent_id 1"):
        find_checkpoints("openvla", TASK, [0, 1], "epoch_2", None)


def test_several_runs_need_data_num_and_it_chooses(home):
    trained(home, 0, 20, "epoch_2")
    run = trained(home, 0, 150, "epoch_2")
    with pytest.raises(UserError, match=r"agent 0: 20, 150.*--data_num"):
        find_checkpoints("openvla", TASK, [0], "epoch_2", None)
    assert find_checkpoints("openvla", TASK, [0], "epoch_2", 150) == {0: (run / "epoch_2").resolve()}
    with pytest.raises(UserError, match=r"--data_num 99: agent 0 .* from 20, 150 demonstrations"):
        find_checkpoints("openvla", TASK, [0], "epoch_2", 99)


def test_a_path_may_stand_for_every_agent(home):
    runs = [trained(home, agent, 150, "epoch_2") for agent in (0, 1)]
    pattern = str(home / "checkpoints" / "openvla" / f"{TASK}_Agent{{agent}}_150" / "epoch_2")
    found = find_checkpoints("openvla", TASK, [0, 1], pattern, None)
    assert found == {agent: (run / "epoch_2").resolve() for agent, run in enumerate(runs)}
    with pytest.raises(UserError, match="is one directory for 2 agents"):
        find_checkpoints("openvla", TASK, [0, 1], str(runs[0] / "epoch_2"), None)
    with pytest.raises(UserError, match="no checkpoint directory"):
        find_checkpoints("openvla", TASK, [0], str(home / "nowhere"), None)
    with pytest.raises(UserError, match="--output"):
        evaluate.results_root("openvla", TASK, {0: home / "downloads" / "policy"}, "latest")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "LiftBarier-rf"], "did you mean 'LiftBarrier-rf'"),
        (["--task", TASK, "--seed", "42"], "overlap the demonstrations'"),
        (["--task", TASK, "--episodes", "0"], "--episodes 0: must be 1 or more"),
        (["--task", TASK, "--partner", "expert"], "go together"),
        (["--task", TASK, "--partner", "expert", "--agent_id", "2"], "no agent 2; its agents are 0, 1"),
        (["--task", TASK, "--policy", "expert", "--partner", "expert", "--agent_id", "0"], "every agent already"),
        (["--task", TASK, "--checkpoint", "epoch_1"], "has no trained policy"),
        (["--task", TASK, "succes.max_tilt_deg=5"], "unknown key"),
    ],
)
def test_a_mistake_is_one_line(home, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluate.main(arguments)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- look

LOW = {
    "visual_detail": "low",
    "shader": "minimal",
    "camera_sizes": {"side": [128, 96], "overhead": [128, 96], "wrist": [64, 48]},
}


def test_pictures_are_rendered_as_in_training(capsys):
    scene = evaluate.scene_as_trained(sample_scene(), {0: LOW, 1: LOW}, [])
    assert look_of(scene) == LOW
    sizes = {camera.uid: (camera.width, camera.height) for camera in scene.cameras}
    assert sizes["head_camera_agent1"] == (128, 96) and sizes["wrist_camera_agent1"] == (64, 48)
    assert "rendering as in training: low detail, minimal shader, 128x96 and 64x48 px" in capsys.readouterr().out


def test_only_an_explicit_override_changes_the_look_and_is_warned_of(capsys):
    overrides = ["visual_detail=full"]
    scene = evaluate.scene_as_trained(sample_scene(*overrides), {0: LOW}, overrides)
    assert look_of(scene) == LOW | {"visual_detail": "full"}
    assert "warning: rendering with full detail" in capsys.readouterr().out


def test_policies_of_different_looks_cannot_act_together():
    with pytest.raises(UserError, match=r"agent 0 .* low detail.* agent 1 .* full detail.*train both alike"):
        evaluate.scene_as_trained(sample_scene(), {0: LOW, 1: LOW | {"visual_detail": "full"}}, [])


# ------------------------------------------------------------------------------------------------------------- play


def numbered(num_episodes: int) -> results.Protocol:
    return dataclasses.replace(sample_evaluation([]).protocol, first_seed=0, num_episodes=num_episodes)


def test_what_is_complete_is_kept_and_only_the_rest_is_played(tmp_path):
    """Two episodes were done when it was interrupted; their steps tell them from episodes played again."""
    protocol = numbered(5)
    done = [dataclasses.replace(sample_episode(0), steps=11), dataclasses.replace(sample_episode(3), steps=12)]
    results.save(results.Evaluation(protocol, done), tmp_path)
    found = evaluate.episodes_played(tmp_path, protocol)
    evaluation = evaluate.play(protocol, found, tmp_path, play_with_trouble, num_workers=1)
    assert [(e.seed, e.outcome) for e in evaluation.episodes] == [
        (0, SUCCESS), (1, CRASH), (2, FAILURE), (3, SUCCESS), (4, SUCCESS)
    ]  # fmt: skip
    assert [evaluation.episodes[0].steps, evaluation.episodes[3].steps] == [11, 12]
    assert results.load(tmp_path) == evaluation and evaluation.is_complete


def test_another_policy_starts_over_and_a_complete_evaluation_is_kept(tmp_path):
    protocol = numbered(2)
    results.save(results.Evaluation(protocol, [sample_episode(0)]), tmp_path)
    retrained = dataclasses.replace(protocol, weights=["ef" * 32, None])
    assert evaluate.episodes_played(tmp_path, retrained) == []
    assert len(evaluate.episodes_played(tmp_path, protocol)) == 1
    results.save(results.Evaluation(protocol, [sample_episode(0), sample_episode(1)]), tmp_path)
    assert len(evaluate.episodes_played(tmp_path, protocol)) == protocol.num_episodes, (
        "a complete one is not played again"
    )


@pytest.mark.parametrize(
    ("num_videos", "kept"),
    [(0, []), (2, [10_001, 10_003]), (4, [10_000, 10_001, 10_003, 10_005]), (99, [10_000 + k for k in range(6)])],
)
def test_videos_of_failures_are_kept_before_successes(tmp_path, num_videos, kept):
    evaluation = sample_evaluation([SUCCESS, FAILURE, SUCCESS, FAILURE, SUCCESS, FAILURE])
    episodes = [dataclasses.replace(e, video=film(tmp_path, e.seed, 1)) for e in evaluation.episodes]
    evaluation = evaluate.keep_videos(dataclasses.replace(evaluation, episodes=episodes), tmp_path, num_videos)
    on_disk = sorted(int(path.stem.removeprefix("seed_")) for path in (tmp_path / "videos").iterdir())
    assert on_disk == kept
    assert [episode.seed for episode in evaluation.episodes if episode.video] == kept


# -------------------------------------------------------------------------------------------------------- simulator


@pytest.mark.sim
def test_the_expert_lifts_the_barrier_and_the_whole_report_is_written(home, capsys):
    small = {view: [64, 48] for view in ("side", "overhead", "wrist")}
    (home / "small.yaml").write_text(to_yaml(with_look(sample_scene(), LOW | {"camera_sizes": small})))
    arguments = ["--task", TASK, "--config", str(home / "small.yaml"), "--policy", "expert"]
    evaluate.main([*arguments, "--episodes", "2", "--videos", "1", "--workers", "1"])
    root = home / "results" / "expert" / TASK
    episodes = json.loads((root / "expert" / "episodes.json").read_text())
    assert [episode["outcome"] for episode in episodes] == ["success", "success"]
    assert min(episode["measures"]["end_height_m_0"] for episode in episodes) > 0.15
    assert [bool(episode["video"]) for episode in episodes] == [True, False]
    assert "2/2 = 100" in capsys.readouterr().out
    assert "data:video/mp4" in (root / "report.html").read_text()


@pytest.mark.sim
def test_an_episode_does_not_depend_on_what_its_worker_played_before():
    """Contacts and drive targets survived a plain reset: seed 10004 ended 0.6 mm elsewhere after another episode."""
    from robofactory.evaluation.rollout import Plan, Rollout

    play = Rollout(Plan(sample_scene("visual_detail=low"), [None, None], {}, 0.0, "cpu", None, 1))
    alone = play(10_004)
    play(10_002)
    after_another = play(10_004)
    assert after_another.measures == alone.measures and after_another.steps == alone.steps
