import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from robofactory.config import scene_file
from robofactory.errors import UserError
from robofactory.sim.env import check_scene, make_env, make_expert, observe, observe_each, step

pytestmark = pytest.mark.sim


def preview(*arguments, **environment):
    command = [sys.executable, "-m", "robofactory.sim.env", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


def test_a_scene_that_does_not_fit_its_task_is_one_line_with_file_and_key(scene):
    without_tilt = {key: value for key, value in scene.success.items() if key != "max_tilt_deg"}
    cases = {
        "success.max_tilt_deg": dataclasses.replace(scene, success=without_tilt),
        "success.heigth": dataclasses.replace(scene, success=scene.success | {"heigth": 1.0}),
        "objects.barrier": dataclasses.replace(scene, objects={}),
        "robots": dataclasses.replace(scene, robots=scene.robots[:1]),
        "task": dataclasses.replace(scene, task="LiftBarier-rf"),
    }
    for key, broken in cases.items():
        with pytest.raises(UserError) as error:
            check_scene(broken, "my.yaml")
        assert str(error.value).startswith("my.yaml: ") and f"{key}'" in str(error.value)
        assert "\n" not in str(error.value)


def test_several_environments_need_the_gpu_backend(scene):
    with pytest.raises(UserError, match="backend cpu runs 1 environment"):
        make_env(scene, render=False, num_envs=2)
    with pytest.raises(UserError, match="none of cpu, gpu"):
        make_env(scene, render=False, backend="tpu")


def test_each_agent_observes_its_own_views_joints_and_the_instruction(seeing_env):
    seeing_env.reset(seed=0)
    observations = observe(seeing_env)
    assert len(observations) == 2
    for observation in observations:
        assert list(observation.images) == ["side", "overhead", "wrist"]
        for image in observation.images.values():
            assert image.shape == (96, 128, 3) and image.dtype == np.uint8
        assert observation.proprio.shape == (8,) and observation.proprio.dtype == np.float32
        assert observation.instruction == "lift the barrier"
    first, second = observations
    np.testing.assert_array_equal(first.images["overhead"], second.images["overhead"])
    for view in ("side", "wrist"):
        assert not np.array_equal(first.images[view], second.images[view])


def test_each_parallel_environment_is_observed_by_itself(scene):
    """Real ones need a GPU: here, what a table says of three."""
    uids = [camera.uid for camera in scene.cameras]

    def pictures():
        return {
            uid: torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 2, 2, 3) + 10 * number
            for number, uid in enumerate(uids)
        }

    def proprio(agent):
        return np.arange(3, dtype=np.float32)[:, None] + 10 * agent + np.zeros((3, 8), np.float32)

    table = SimpleNamespace(num_envs=3, config=scene, pictures=pictures, proprio=proprio)
    environments = observe_each(SimpleNamespace(unwrapped=table))
    assert [len(agents) for agents in environments] == [2, 2, 2]
    for index, agents in enumerate(environments):
        for agent, observation in enumerate(agents):
            assert observation.proprio.tolist() == [index + 10.0 * agent] * 8
            for view, image in observation.images.items():
                camera = uids.index(scene.views[view].format(agent=agent))
                assert image.shape == (2, 2, 3) and (image == index + 10 * camera).all()


def test_the_barrier_is_in_every_picture(seeing_env):
    seeing_env.reset(seed=0)
    for agent, observation in enumerate(observe(seeing_env)):
        for view, image in observation.images.items():
            red, green, blue = np.moveaxis(image.astype(int), -1, 0)
            share = np.mean((red > 1.7 * green) & (red > 1.7 * blue) & (red > 80))
            assert share > 0.003, f"{share:.4f} of the {view} view of agent {agent} is barrier"


def test_pictures_follow_the_arms(seeing_env):
    seeing_env.reset(seed=0)
    before = observe(seeing_env)
    expert = make_expert(seeing_env)
    for _ in range(10):
        step(seeing_env, expert.act())
    for old, new in zip(before, observe(seeing_env), strict=True):
        for view in old.images:
            assert not np.array_equal(old.images[view], new.images[view]), view


def test_stepping_renders_nothing(seeing_env, monkeypatch):
    monkeypatch.setattr(type(seeing_env.unwrapped), "pictures", lambda self: pytest.fail("rendered"))
    seeing_env.reset(seed=0)
    actions = make_expert(seeing_env).act()
    observation, *_ = seeing_env.step(seeing_env.unwrapped.as_maniskill(actions))
    assert observation == {}


def test_only_cameras_that_a_view_needs_exist(small_scene):
    wrist_only = dataclasses.replace(small_scene, views={"wrist": small_scene.views["wrist"]})
    env = make_env(wrist_only)
    env.reset(seed=0)
    assert set(env.unwrapped.pictures()) == {"wrist_camera_agent0", "wrist_camera_agent1"}
    assert list(observe(env)[0].images) == ["wrist"]
    env.close()


def test_original_meshes_are_used_when_given_and_missed_when_missing(small_scene, tmp_path):
    import trimesh

    with pytest.raises(UserError, match="assets_dir: no objects/steel_barrier_annotated"):
        make_env(dataclasses.replace(small_scene, assets_dir=str(tmp_path)), render=False)
    folder = tmp_path / "objects/steel_barrier_annotated"
    folder.mkdir(parents=True)
    trimesh.creation.box((1.0, 0.2, 0.4)).export(folder / "textured.obj")
    env = make_env(dataclasses.replace(small_scene, assets_dir=str(tmp_path)))
    env.reset(seed=0)
    red, green, _ = np.moveaxis(observe(env)[0].images["overhead"].astype(int), -1, 0)
    assert np.mean((red > 1.7 * green) & (red > 80)) < 0.003, "the procedural red rail is still there"
    env.close()


def test_preview_draws_every_camera(tmp_path):
    picture = tmp_path / "scene.png"
    result = preview("--config", str(scene_file("LiftBarrier-rf")), "--render", str(picture), "visual_detail=low")
    assert result.returncode == 0, result.stderr
    assert "5 cameras" in result.stdout
    assert Image.open(picture).size == (3 * 320, 2 * (240 + 16))


def test_preview_without_a_vulkan_driver_is_one_line(tmp_path):
    nothing = {"VK_ICD_FILENAMES": str(tmp_path / "no.json"), "VK_DRIVER_FILES": str(tmp_path / "no.json")}
    result = preview("--render", str(tmp_path / "x.png"), "visual_detail=low", **nothing)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: nothing here can render")
    assert "bash setup.sh" in result.stderr and "Traceback" not in result.stderr
