import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import numpy as np
import pytest
import torch
from evaluation_samples import TASK, sample_observations, sample_scene, untrained_policies
from worker_samples import fail_to_set_up, play_asking, play_asking_together

from robofactory.config import with_look
from robofactory.errors import UserError
from robofactory.evaluation import evaluate, parallel, results, workers
from robofactory.evaluation.parallel import Lockstep
from robofactory.evaluation.results import CRASH, FAILURE, SUCCESS, TIME_OUT, EpisodeResult
from robofactory.evaluation.rollout import Answer, Plan, Rollout
from robofactory.policy import Policies

MAX_STEPS = 5
ANSWER_S, ANSWER_PASSES = 0.5, 6


# -------------------------------------------------------------------------------------------------------- lockstep


class CountingEnv(gym.Env):
    """Environments in which agents go to where they are told to, and succeed after as many steps as their seed says."""

    def __init__(self, scene, num_envs: int, breaks_at: int | None):
        self.config, self.num_envs, self.breaks_at = scene, num_envs, breaks_at

    def reset(self, *, seed: Any = None, options=None):
        assert options == {"reconfigure": True} and len(seed) == self.num_envs
        self.seeds, self.num_steps = torch.tensor(seed), 0
        self.places = self.seeds[:, None, None] + torch.tensor([[0.25], [0.5]]).expand(2, 8)  # [b, 2, 8]
        self.executed: list[np.ndarray] = []
        return {}, {}

    def get_state(self) -> torch.Tensor:
        return self.places.flatten(1)

    def proprio(self, agent: int) -> np.ndarray:
        return self.places[:, agent].numpy()

    def as_maniskill(self, actions: list[np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(("panda-0", "panda-1"), actions, strict=True))

    def step(self, action: dict[str, np.ndarray]):
        self.num_steps += 1
        if self.num_steps == self.breaks_at:
            raise RuntimeError("an illegal memory access")
        self.executed.append(np.stack([action["panda-0"], action["panda-1"]], axis=1))
        self.places = torch.tensor(self.executed[-1])
        both = torch.ones(self.num_envs, 2, dtype=torch.bool)
        info = {
            "elapsed_steps": torch.full((self.num_envs,), self.num_steps),
            "success": self.seeds == self.num_steps,
            "success_robofactory": self.seeds == self.num_steps + 1,  # a step before, and then no more
            "reached": both,
            "held": both & (self.num_steps < 3),
            "lifted": ~both,
            "level": both[:, 0],
            "end_height_m": self.places[:, :, 0],
            "tilt_deg": self.seeds * 1.5,
        }
        return {}, None, None, None, info


@pytest.fixture
def lockstep(monkeypatch):
    """Makes one of so many rows; the environment may break at a step."""

    def make(num_rows: int, directory: Path | None = None, breaks_at: int | None = None) -> Lockstep:
        scene = dataclasses.replace(sample_scene(), max_episode_steps=MAX_STEPS)
        env = CountingEnv(scene, num_rows, breaks_at)
        monkeypatch.setattr("robofactory.sim.env.make_env", lambda scene, num_envs, backend: env)
        seen = sample_observations()
        monkeypatch.setattr("robofactory.sim.env.observe_each", lambda env: [seen] * env.num_envs)
        return Lockstep(Plan(scene, [0, 1], directory, 1), num_rows)

    return make


def play(lockstep: Lockstep, seeds: dict[int, int]) -> tuple[dict[int, EpisodeResult], list[list[int]]]:
    """The episodes by seed, in the order they end, and which rows asked at each turn. Each row is told to go on its way."""
    round = lockstep(0, seeds)
    ended, asked = [], []
    try:
        turn = next(round)
        while True:
            ended += turn.ended
            asked.append(list(turn.observations))
            step = np.float32(len(asked))
            goals = {row: np.full(8, 100 * seeds[row] + step, np.float32) for row in turn.observations}
            actions = {row: Answer({0: goal, 1: -goal}, ANSWER_S, ANSWER_PASSES) for row, goal in goals.items()}
            turn = round.send(actions)
    except StopIteration as end:
        assert not end.value.observations
        ended += end.value.ended
    return {episode.seed: dataclasses.replace(episode, seconds=0.0) for episode in ended}, asked


def test_every_environment_ends_at_its_own_success_and_asks_no_more(lockstep):
    episodes, asked = play(lockstep(4), {0: 4, 1: 9, 2: 2, 3: 7})
    assert list(episodes) == [2, 4, 9, 7]
    assert asked == [[0, 1, 2, 3]] * 2 + [[0, 1, 3]] * 2 + [[1, 3]]
    assert {seed: (e.outcome, e.steps) for seed, e in episodes.items()} == {
        2: (SUCCESS, 2), 4: (SUCCESS, 4), 9: (FAILURE, MAX_STEPS), 7: (FAILURE, MAX_STEPS)
    }  # fmt: skip
    assert [episodes[seed].failed_at for seed in (2, 9)] == [[], ["dropped", "dropped"]]
    assert [episodes[seed].success_robofactory for seed in (2, 4, 9, 7)] == [True, True, False, False]
    for seed, episode in episodes.items():
        assert episode.measures == {
            "end_height_m_0": 100.0 * seed + episode.steps,
            "end_height_m_1": -100.0 * seed - episode.steps,
            "tilt_deg": 1.5 * seed,
            "held_0": float(episode.steps < 3),
            "held_1": float(episode.steps < 3),
        }, "the numbers at its own last step, of its own environment"
        assert episode.policy_ms == 1000 * ANSWER_S / 2 and episode.passes_per_action == ANSWER_PASSES / 2


def test_an_episode_is_the_same_whoever_is_played_beside_it(lockstep):
    alone, _ = play(lockstep(4), {1: 4})
    together, _ = play(lockstep(4), {0: 8, 1: 4, 2: 1})
    assert together[4] == alone[4]
    assert len({episode.digest for episode in together.values()}) == 3, "equal digests would prove nothing"


def test_what_has_ended_is_told_its_last_action_and_who_plays_nothing_keeps_its_posture(lockstep):
    simulation = lockstep(3)
    play(simulation, {0: 2, 2: 9})
    executed = simulation.env.executed
    assert len(executed) == MAX_STEPS
    assert [actions[0, 0, 0] for actions in executed] == [201, 202, 202, 202, 202]
    assert [actions[2, 1, 0] for actions in executed] == [-901, -902, -903, -904, -905]
    for actions in executed:
        np.testing.assert_array_equal(actions[1], np.repeat([[2.25], [2.5]], 8, axis=1))


def num_frames(video: Path) -> int:
    with av.open(str(video)) as container:
        return len(list(container.decode(video=0)))


def test_every_episode_has_a_video_up_to_its_end_and_a_crashed_one_up_to_the_crash(lockstep, tmp_path):
    with pytest.raises(RuntimeError, match="illegal memory access"):
        play(lockstep(3, tmp_path, breaks_at=4), {0: 2, 1: 3, 2: 9})
    assert {path.name: num_frames(path) for path in (tmp_path / "videos").iterdir()} == {
        "seed_2.mp4": 3, "seed_3.mp4": 4, "seed_9.mp4": 4
    }  # fmt: skip
    episodes, _ = play(lockstep(3, tmp_path), {0: 4})
    assert episodes[4].video == "videos/seed_4.mp4" and num_frames(tmp_path / "videos/seed_4.mp4") == 5


# ------------------------------------------------------------------------------------------------------- episodes

PATIENT_S = 600.0


def by_seed(episodes) -> dict[int, EpisodeResult]:
    """Without the times, which no two runs share, and what the expert says, who cannot look on a GPU."""
    return {each.seed: dataclasses.replace(each, seconds=0.0, policy_ms=None, phases=[]) for each in episodes}


@pytest.fixture(scope="module")
def policies(models) -> Policies:
    return Policies(*models, num_rows=3, temperature=0.5)


@pytest.fixture(scope="module")
def calm(policies) -> dict[int, EpisodeResult]:
    """The episodes of 7 seeds, 6 to 8 steps long, played in processes."""
    return by_seed(workers.play_episodes(partial(play_asking, False, 0.0), range(7), 1, PATIENT_S, policies))


def test_lockstep_plays_what_processes_play_also_where_seeds_fill_no_batch(policies, calm):
    together = list(parallel.play_episodes(play_asking_together, range(7), PATIENT_S, policies))
    assert [episode.seed for episode in together] == [0, 1, 2, 3, 4, 5, 6], "shorter ones end first"
    assert by_seed(together) == calm
    some = by_seed(parallel.play_episodes(play_asking_together, [1, 4, 5], PATIENT_S, policies))
    assert some == {seed: calm[seed] for seed in (1, 4, 5)}, "two of one row are played one after the other"


def test_a_crash_of_the_simulator_is_one_of_the_episodes_that_it_was_playing(policies, calm, capfd):
    crashing = partial(play_asking_together, crashing_turn=7)  # seed 0 has ended after 6 steps
    episodes = by_seed(parallel.play_episodes(crashing, range(7), PATIENT_S, policies))
    assert {seed: each.reason for seed, each in episodes.items() if each.outcome == CRASH} == dict.fromkeys(
        (1, 2), "RuntimeError: the simulator exploded"
    )
    assert {seed: each for seed, each in episodes.items() if seed not in (1, 2)} == {
        seed: each for seed, each in calm.items() if seed not in (1, 2)
    }
    assert "Traceback" in capfd.readouterr().err


def test_a_simulator_that_hangs_is_killed_and_the_others_are_played_by_a_fresh_one(policies, calm):
    started = time.perf_counter()
    list(parallel.play_episodes(play_asking_together, range(3), PATIENT_S, policies))
    limit_s = 2 + time.perf_counter() - started  # beginning a process and playing are within it, on any machine
    hanging = partial(play_asking_together, hanging_seed=1)
    episodes = by_seed(parallel.play_episodes(hanging, range(5), limit_s, policies))
    assert [(seed, episodes[seed].outcome) for seed in (0, 1, 2)] == [(seed, TIME_OUT) for seed in (0, 1, 2)]
    assert episodes[0].reason == f"no answer within {limit_s:g} s"
    assert [episodes[seed] for seed in (3, 4)] == [calm[seed] for seed in (3, 4)]


def test_a_simulator_that_cannot_be_set_up_stops_the_evaluation_with_one_line(policies):
    with pytest.raises(UserError, match="could not be set up: RuntimeError: no Vulkan device"):
        list(parallel.play_episodes(fail_to_set_up, range(3), PATIENT_S, policies))


# ------------------------------------------------------------------------------------------------------- simulator


@pytest.mark.sim
def test_one_environment_in_lockstep_plays_what_a_process_plays_to_the_last_bit(tmp_path):
    """The same code as on a GPU, with physics where there is one everywhere."""
    untrained_policies(tmp_path)
    checkpoints = {agent: tmp_path / f"{TASK}_Agent{agent}_3" / "epoch_1" for agent in (0, 1)}
    policies = Policies.load(checkpoints, num_rows=1, temperature=1.0)
    scene = dataclasses.replace(with_look(sample_scene(), policies.codecs[0].look), max_episode_steps=6)
    plan, seeds = Plan(scene, [0, 1], None, 1), [10_000, 10_001]
    alone = by_seed(workers.play_episodes(partial(Rollout, plan), seeds, 1, PATIENT_S, policies))
    lockstep = partial(Lockstep, plan, num_rows=1, backend="cpu")
    assert by_seed(parallel.play_episodes(lockstep, seeds, PATIENT_S, policies)) == alone
    assert [alone[seed].steps for seed in seeds] == [6, 6] and alone[10_000].digest != alone[10_001].digest


@pytest.fixture
def gpu_physics() -> None:
    from robofactory.sim.env import require_gpu_physics

    try:
        require_gpu_physics()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.sim
@pytest.mark.gpu
def test_environments_on_a_gpu_begin_as_their_seeds_do_on_the_cpu(gpu_physics):
    from robofactory.sim.env import make_env, observe, observe_each

    sizes = {view: [64, 48] for view in ("side", "overhead", "wrist")}
    scene = with_look(sample_scene(), {"visual_detail": "low", "shader": "minimal", "camera_sizes": sizes})
    seeds = list(range(10_000, 10_008))
    env, single = make_env(scene, num_envs=8, backend="gpu"), make_env(scene)
    env.reset(seed=seeds, options={"reconfigure": True})  # type: ignore[arg-type]
    poses, seen = env.unwrapped.barrier.pose.raw_pose.cpu(), observe_each(env)  # type: ignore[attr-defined]
    expected = []
    for seed, pose in zip(seeds, poses, strict=True):
        single.reset(seed=seed, options={"reconfigure": True})
        torch.testing.assert_close(pose, single.unwrapped.barrier.pose.raw_pose[0], atol=1e-4, rtol=0)  # type: ignore[attr-defined]
        expected.append(observe(single))
    for agent in (0, 1):
        for view in scene.views:
            ours, theirs = (
                np.stack([each[agent].images[view] for each in pictures]).astype(float) for pictures in (seen, expected)
            )
            # Another renderer draws them: each is more like the CPU's of its own seed than like that of any other.
            distances = np.abs(ours[:, None] - theirs[None]).mean(axis=(2, 3, 4))
            assert distances.argmin(axis=1).tolist() == list(range(8)), (agent, view, distances)
        for mine, other in zip(seen, expected, strict=True):
            np.testing.assert_allclose(mine[agent].proprio, other[agent].proprio, atol=1e-4)


@pytest.mark.sim
@pytest.mark.gpu
def test_an_evaluation_on_a_gpu_plays_all_seeds_and_says_where(gpu_physics, tmp_path):
    untrained_policies(tmp_path)
    arguments = ["--task", TASK, "--checkpoint", str(tmp_path / f"{TASK}_Agent{{agent}}_3" / "epoch_1")]
    arguments += ["--simulator", "gpu", "--batch", "8", "--max_steps", "6", "--videos", "2"]
    evaluate.main([*arguments, "--episodes", "11", "--output", str(tmp_path / "results")])
    evaluation = results.load(tmp_path / "results" / "all_agents")
    assert evaluation.is_complete and evaluation.protocol.simulator == "gpu"
    assert [(e.outcome, e.steps) for e in evaluation.episodes] == [(FAILURE, 6)] * 11
    assert len({episode.digest for episode in evaluation.episodes}) == 11
    assert sum(episode.video is not None for episode in evaluation.episodes) == 2
