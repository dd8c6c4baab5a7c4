import dataclasses
from pathlib import Path

import numpy as np
import pytest
from evaluation_samples import sample_observations, sample_scene

from robofactory.errors import UserError
from robofactory.evaluation import evaluate
from robofactory.evaluation.ablations import Perturbation, begin
from robofactory.evaluation.asked_ablations import KINDS, Ablation, read_ablations
from robofactory.shapes import Action, Observation

SCENE = sample_scene()


def started(name: str, value: str, learned: tuple[int, ...] = (0, 1), seed: int = 10_000) -> Perturbation:
    return begin(Ablation(name, value), SCENE, learned, seed)


def seen_at(step: int) -> list[Observation]:
    """Two agents; every picture of every step is another one."""
    random = np.random.default_rng(step)
    return [
        dataclasses.replace(
            each, images={view: random.integers(1, 256, image.shape, dtype=np.uint8) for view, image in each.images.items()}
        )
        for each in sample_observations()
    ]  # fmt: skip


def actions_at(step: int) -> list[Action]:
    return [np.full(8, step + agent / 10, np.float32) for agent in (0, 1)]


def assert_same_but_for(view: str, observations: list[Observation], originals: list[Observation]) -> None:
    for one, other in zip(observations, originals, strict=True):
        assert list(one.images) == list(other.images), "views and their order"
        assert one.instruction == other.instruction and np.array_equal(one.proprio, other.proprio)
        for name in one.images:
            assert name == view or np.array_equal(one.images[name], other.images[name]), name


def test_nothing_is_changed_without_an_ablation():
    perturbation, observations, actions = begin(None, SCENE, [0], 10_000), seen_at(0), actions_at(0)
    assert perturbation.scene == SCENE
    assert all(a is b for a, b in zip(perturbation.observe(observations), observations, strict=True))
    assert all(a is b for a, b in zip(perturbation.act(actions), actions, strict=True))


def test_blackout_makes_one_view_black_and_leaves_the_original_alone():
    observations = seen_at(0)
    changed = started("blackout", "side").observe(observations)
    assert_same_but_for("side", changed, observations)
    assert not any(each.images["side"].any() for each in changed)
    assert all(each.images["side"].all() for each in observations)


def test_freeze_shows_each_agent_its_own_first_picture_of_one_view():
    perturbation, first = started("freeze", "wrist"), seen_at(0)
    for step in range(3):
        observations = seen_at(step)
        changed = perturbation.observe(observations)
        assert_same_but_for("wrist", changed, observations)
        for each, original in zip(changed, first, strict=True):
            assert np.array_equal(each.images["wrist"], original.images["wrist"])
    again = started("freeze", "wrist").observe(seen_at(7))
    assert np.array_equal(again[0].images["wrist"], seen_at(7)[0].images["wrist"]), "an episode must begin afresh"


def test_other_words_are_all_that_instruction_changes():
    observations = seen_at(0)
    changed = started("instruction", "dance").observe(observations)
    assert [each.instruction for each in changed] == ["dance", "dance"]
    for one, other in zip(changed, observations, strict=True):
        assert one.images is other.images and one.proprio is other.proprio


def test_noise_is_on_the_joints_of_learned_agents_alone_and_as_strong_as_asked():
    perturbation = started("action_noise_rad", "0.02", learned=(1,))
    noise = []
    for step in range(400):
        actions = actions_at(step)
        changed = perturbation.act(actions)
        assert changed[0] is actions[0] and changed[1][7] == actions[1][7], "the expert's arm, the gripper"
        noise.append(changed[1][:7] - actions[1][:7])
    assert changed[1].dtype == np.float32
    assert 0.019 < np.std(noise) < 0.021 and abs(np.mean(noise)) < 0.002


def test_an_episode_meets_the_same_noise_again_and_another_seed_other_noise():
    def noise(seed: int) -> np.ndarray:
        return started("action_noise_rad", "0.02", seed=seed).act(actions_at(0))[0]

    assert np.array_equal(noise(10_000), noise(10_000)) and not np.array_equal(noise(10_000), noise(10_001))


def test_delay_executes_every_action_so_many_steps_late():
    perturbation = started("action_delay_steps", "2", learned=(0,))
    executed = [perturbation.act(actions_at(step)) for step in range(5)]
    rest = np.array([*SCENE.robots[0].rest_qpos[:7], 1.0], np.float32)
    assert [np.array_equal(step[0], rest) for step in executed] == [True, True, False, False, False]
    assert [step[0][0] for step in executed[2:]] == [0.0, 1.0, 2.0]
    assert [step[1][0] for step in executed] == pytest.approx([0.1, 1.1, 2.1, 3.1, 4.1]), "the expert is not late"


def test_light_and_lamps_change_the_lighting_alone():
    dark, turned = started("light", "0.5").scene, started("lamp_turn_deg", "90").scene
    for scene in (dark, turned):
        assert dataclasses.replace(scene, lighting=SCENE.lighting) == SCENE
    assert dark.lighting.ambient_rgb == [0.2, 0.2, 0.2] and dark.lighting.lamps[1].rgb == [0.5, 0.5, 0.5]
    assert [lamp.direction for lamp in dark.lighting.lamps] == [lamp.direction for lamp in SCENE.lighting.lamps]
    assert turned.lighting.lamps[0].direction == pytest.approx([-1.0, 1.0, -1.0])
    assert turned.lighting.lamps[1].direction == [0.0, 0.0, -1.0]


@pytest.mark.sim
@pytest.mark.parametrize(("name", "value"), [("camera_shift_m", "0.02"), ("camera_turn_deg", "2")])
def test_cameras_are_moved_by_as_much_as_asked_and_nothing_else_is(name, value):
    from robofactory.sim.cameras import camera_pose

    def angle_deg(one: np.ndarray, other: np.ndarray) -> float:
        apart = min(np.linalg.norm(one - other), np.linalg.norm(one + other))  # of unit quaternions: 2 sin(angle / 4)
        return float(np.rad2deg(4 * np.arcsin(apart / 2)))

    def moves(seed: int) -> tuple[list[float], list[float]]:
        scene = started(name, value, seed=seed).scene
        assert dataclasses.replace(scene, cameras=SCENE.cameras) == SCENE
        shifts, turns = [], []
        for camera, original in zip(scene.cameras, SCENE.cameras, strict=True):
            place = {"position": [0.0, 0.0, 0.0], "quaternion": None, "target": None}
            assert dataclasses.replace(camera, **place) == dataclasses.replace(original, **place)
            pose, before = camera_pose(camera), camera_pose(original)
            shifts.append(float(np.linalg.norm(pose.p - before.p)))
            turns.append(angle_deg(pose.q, before.q))
        return shifts, turns

    shifts, turns = moves(10_000)
    assert shifts == pytest.approx([0.02 if name == "camera_shift_m" else 0.0] * 5, abs=1e-6)
    assert turns == pytest.approx([2.0 if name == "camera_turn_deg" else 0.0] * 5, abs=1e-3)
    directions = {
        tuple(camera.position + (camera.quaternion or []))
        for seed in (10_000, 10_001)
        for camera in started(name, value, seed=seed).scene.cameras
    }
    assert len(directions) == 10, "every camera in every episode in a direction of its own"


# -------------------------------------------------------------------------------------------------------- by name


def read(*asked: str, has_policies: bool = True) -> list[str]:
    return [str(each) for each in read_ablations(asked, SCENE, has_policies)]


def test_without_a_value_a_view_stands_for_each_and_the_others_have_their_usual_one():
    assert read("blackout") == ["blackout=side", "blackout=overhead", "blackout=wrist"]
    assert read("light", "freeze=wrist", "light=0.5") == ["light=0.5", "freeze=wrist"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("blakout", r"unknown ablation 'blakout' \(did you mean 'blackout'\?\); there are blackout, freeze, instr.*_deg$"),
        ("blackout=left", "has no view 'left'; it has side, overhead, wrist"),
        ("action_delay_steps=0.5", "action_delay_steps takes 1, 2, ..., not '0.5'"),
        ("action_noise_rad=-1", "takes 0 or more, not '-1'"),
        ("light=nan", "takes a factor, 0 or more, not 'nan'"),
        ("instruction=", "takes other words, not ''"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_what_is_allowed(asked, message):
    with pytest.raises(UserError, match=message) as caught:
        read(asked)
    assert "\n" not in str(caught.value)


def test_what_the_expert_would_not_notice_is_refused():
    assert read("action_noise_rad", has_policies=False) == ["action_noise_rad=0.02"]
    with pytest.raises(
        UserError, match="looks at no pictures and hears no words; it notices action_noise_rad, action_d"
    ):
        read("blackout=side", has_policies=False)


def test_help_names_every_ablation_with_its_usual_value(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_arguments(["--help"])
    said = capsys.readouterr().out
    for name, kind in KINDS.items():
        usual = f"'{kind.usual}'" if name == "instruction" else kind.usual or "VIEW"
        assert f"{name}={usual}" in said


def test_ablations_have_folders_of_their_own_whatever_their_words():
    names = {Ablation("instruction", words).directory for words in ("a/b", "a b", "a_b", "../..", "a" * 300)}
    assert len(names) == 5 and all(Path(name).name == name and len(name) < 80 for name in names)
    assert Ablation("camera_shift_m", "0.02").directory == "camera_shift_m=0.02"


# ------------------------------------------------------------------------------------------------------ in the scene


@pytest.mark.sim
def test_the_simulator_shows_the_other_light_and_the_other_cameras_and_then_the_first_again():
    """One environment, several episodes: each is built from its own scene."""
    from robofactory.sim.env import make_env, observe

    scene = sample_scene(
        "visual_detail=low", *(f"cameras.{k}.{side}" for k in range(5) for side in ("width=48", "height=36"))
    )
    env = make_env(scene)

    def pictures(ablation: Ablation | None) -> dict[str, np.ndarray]:
        env.unwrapped.config = begin(ablation, scene, [0, 1], 10_000).scene  # type: ignore[attr-defined]
        env.reset(seed=10_000, options={"reconfigure": True})
        return {view: image.astype(int) for view, image in observe(env)[0].images.items()}

    plain = pictures(None)
    dark = pictures(Ablation("light", "0.25"))
    moved = pictures(Ablation("camera_turn_deg", "10"))
    turned = pictures(Ablation("lamp_turn_deg", "180"))
    for view, image in plain.items():
        assert dark[view].mean() < 0.7 * image.mean()
        assert np.abs(moved[view] - image).mean() > 1
    assert max(np.abs(turned[view] - image).mean() for view, image in plain.items()) > 0.5
    again = pictures(None)
    assert all(np.array_equal(again[view], image) for view, image in plain.items())
