import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from robofactory import config, paths
from robofactory.config import RecipeConfig, SceneConfig, load_recipe, load_scene
from robofactory.errors import UserError, run_command

SCENE = config.CONFIGS / "table" / "lift_barrier.yaml"

# The configuration of the specification, to the letter.
SEED = """
model:
  model_name: "openvla/openvla-7b"
  use_lora: true
  lora_rank: 32
  lora_alpha: 64
  torch_dtype: "bfloat16"

training:
  num_epochs: 300
  learning_rate: 5.0e-4
  batch_size: 16
  image_aug: true
  augment_crop_ratio: 0.9
  checkpoint_every: 50
"""

# Its two remedies against running out of memory.
REDUCE_BATCH_SIZE = """
dataloader:
  batch_size: 8
"""
ADD_ACCUMULATION = """
training:
  gradient_accumulate_every: 2  # Effective batch = 8 x 2 = 16
"""


def write(directory: Path, text: str) -> str:
    (directory / "recipe.yaml").write_text(text)
    return str(directory / "recipe.yaml")


def message(*overrides: str, recipe: str = "robot_openvla_tiny") -> str:
    """The one line that a user reads."""
    with pytest.raises(UserError) as error:
        load_recipe(recipe, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


def scene_message(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_scene(SCENE, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------ the seed


def test_the_published_recipe_is_the_seeds_snippet():
    """Same sections, same keys, same values: what the seed does not show is a default, not a line of the file."""
    assert yaml.safe_load((config.CONFIGS / "robot_openvla.yaml").read_text()) == yaml.safe_load(SEED)


def test_the_7b_trains_with_the_seeds_batch_size():
    assert load_recipe("robot_openvla").dataloader.batch_size == 16


def test_both_remedies_against_running_out_of_memory_work_as_written(tmp_path):
    recipe = load_recipe(write(tmp_path, SEED + REDUCE_BATCH_SIZE))
    assert (recipe.training.batch_size, recipe.dataloader.batch_size) == (16, 8), "the loader's own value wins"
    recipe = load_recipe(write(tmp_path, REDUCE_BATCH_SIZE + ADD_ACCUMULATION))
    assert (recipe.dataloader.batch_size, recipe.training.gradient_accumulate_every) == (8, 2)


def test_both_remedies_work_as_overrides():
    recipe = load_recipe("robot_openvla", ["dataloader.batch_size=8", "training.gradient_accumulate_every=2"])
    assert (recipe.dataloader.batch_size, recipe.training.gradient_accumulate_every) == (8, 2)


def test_the_loaders_batch_size_follows_the_trainings():
    assert load_recipe("robot_openvla", ["training.batch_size=4"]).dataloader.batch_size == 4


def test_the_lora_of_the_seed_has_no_dropout():
    assert load_recipe("robot_openvla").model.lora_dropout == 0.0


# ------------------------------------------------------------------------------------------------ overrides, round trip


def test_overrides_take_their_types_from_the_dataclass():
    overrides = ["training.learning_rate=1e-3", "data.views=[side, wrist]", "training.image_aug=false"]
    recipe = load_recipe("robot_openvla_tiny", overrides)
    assert recipe.training.learning_rate == 0.001
    assert recipe.data.views == ["side", "wrist"]
    assert recipe.training.image_aug is False


def test_the_last_override_wins():
    assert load_recipe("robot_openvla", ["training.seed=1", "training.seed=2"]).training.seed == 2


def test_overrides_reach_into_lists_and_named_objects():
    scene = load_scene(SCENE, ["cameras.0.width=64", "objects.barrier.mass_kg=0.5"])
    assert scene.cameras[0].width == 64
    assert scene.cameras[1].width != 64
    assert scene.objects["barrier"].mass_kg == 0.5


@pytest.mark.parametrize("name", ["robot_openvla", "robot_openvla_tiny"])
def test_a_recipe_survives_the_way_through_a_checkpoint(name):
    recipe = load_recipe(name, ["dataloader.batch_size=3"])
    assert config.from_yaml(RecipeConfig, config.to_yaml(recipe)) == recipe


def test_a_scene_survives_the_way_through_a_dataset():
    scene = load_scene(SCENE, ["cameras.0.width=64"])
    assert config.from_yaml(SceneConfig, config.to_yaml(scene)) == scene


def test_overrides_of_a_scene_win_over_what_it_was():
    scene = config.overridden(config.with_pictures(load_scene(SCENE), "low", 128, 96), ["cameras.0.width=64"])
    assert [camera.width for camera in scene.cameras] == [64, 128, 128, 128, 128] and scene.visual_detail == "low"
    with pytest.raises(
        UserError, match=r"override 'cameras.0.width=-3': key 'cameras\[0\].width': must be in \[1, 8192\]"
    ):
        config.overridden(scene, ["cameras.0.width=-3"])


def test_every_recipe_and_scene_of_the_package_loads():
    for path in config.CONFIGS.glob("*.yaml"):
        assert load_recipe(path.stem)
    for path in (config.CONFIGS / "table").glob("*.yaml"):
        scene = load_scene(path)
        assert config.scene_file(scene.task) == path


def test_a_look_put_on_a_scene_is_the_look_it_has():
    other = ["visual_detail=low", "cameras.0.width=64", "cameras.2.fov_rad=1.0", "lighting.ambient_rgb=[1, 1, 1]"]
    look = config.look_of(load_scene(SCENE, other))
    scene = load_scene(SCENE)
    assert config.look_of(scene) != look
    assert config.look_of(config.with_look(scene, look)) == look


# -------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("training.num_epoch=3", "training.num_epochs"),
        ("trainin.num_epochs=3", "training"),
        ("model.lora_rnk=3", "model.lora_rank"),
        ("model.architecture.language.hiden_size=64", "model.architecture.language.hidden_size"),
    ],
)
def test_an_unknown_key_names_itself_and_the_one_that_was_meant(override, meant):
    text = message(override)
    assert repr(override) in text
    assert f"did you mean {meant!r}?" in text


@pytest.mark.parametrize(
    ("override", "meant"),
    [("objects.barrier.mass=1", "objects.barrier.mass_kg"), ("cameras.0.fov=1", "cameras[0].fov_rad")],
)
def test_an_unknown_key_of_a_scene_names_the_one_that_was_meant(override, meant):
    assert f"did you mean {meant!r}?" in scene_message(override)


def test_an_unknown_key_in_a_file_names_the_file(tmp_path):
    path = write(tmp_path, "model:\n  lora_rnk: 8\n")
    assert message(recipe=path) == f"{path}: unknown key 'model.lora_rnk' (did you mean 'model.lora_rank'?)"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.num_epochs=many", "training.num_epochs"),
        ("training.num_epochs=", "training.num_epochs"),
        ("training.num_epochs=0", "training.num_epochs"),
        ("training.learning_rate=-1", "training.learning_rate"),
        ("training.augment_crop_ratio=1.5", "training.augment_crop_ratio"),
        ("training.image_aug=maybe", "training.image_aug"),
        ("dataloader.batch_size=0", "dataloader.batch_size"),
        ("training.max_steps=0", "training.max_steps"),
        ("training.warmup_ratio=2", "training.warmup_ratio"),
        ("training.weight_decay=-1", "training.weight_decay"),
        ("training.num_recomputed_layers=-1", "training.num_recomputed_layers"),
        ("dataloader.num_workers=-1", "dataloader.num_workers"),
        ("model.torch_dtype=float64", "model.torch_dtype"),
        ("model.lora_dropout=2", "model.lora_dropout"),
        ("model.use_lora=true", "model.use_lora"),
        ("data.views=[]", "data.views"),
        ("data.val_ratio=1.0", "data.val_ratio"),
        ("data.noise_share=2", "data.noise_share"),
        ("data.normalization=zscore", "data.normalization"),
        ("data.visual_detail=medium", "data.visual_detail"),
        ("data.image_width=null", "data.image_width"),
        ("relabel.num_episodes=501", "relabel.num_episodes"),
        ("training.learning_rate=.nan", "training.learning_rate"),
        ("training.learning_rate=.inf", "training.learning_rate"),
        ("training.learning_rate=1e999", "training.learning_rate"),
        ("training.weight_decay=nan", "training.weight_decay"),
        ("training.num_epochs=true", "training.num_epochs"),
        ("training.num_epochs=3.0", "training.num_epochs"),
        ("training.num_epochs=1e3", "training.num_epochs"),
        ("training.num_epochs=007", "training.num_epochs"),
        ("training.num_epochs=1:30", "training.num_epochs"),
        ("training.learning_rate=yes", "training.learning_rate"),
        ("training.seed=-1", "training.seed"),
        ("training.seed=9223372036854775808", "training.seed"),
        ("training.seed=1180591620717411303424", "training.seed"),
        ("model.model_name=null", "model.model_name"),
        ("model.model_name=true", "model.model_name"),
        ("model.model_name=1.50", "model.model_name"),
        ("data.datasets={a: .nan}", "data.datasets.a"),
        ("data.datasets={a: 0}", "data.datasets.a"),
        ("data.views=[side, side]", "data.views"),
        ("data.views=side", "data.views"),
        ("data.image_width=0", "data.image_width"),
        ("data.image_height=100000", "data.image_height"),
        ("model.architecture.image_size=0", "model.architecture.image_size"),
        ("model.architecture.image_size=57", "model.architecture.image_size"),
        ("model.architecture.dino.num_heads=0", "model.architecture.dino.num_heads"),
        ("model.architecture.dino.num_heads=3", "model.architecture.dino.embed_dim"),
        ("model.architecture.siglip.embed_dim=129", "model.architecture.siglip.embed_dim"),
        ("model.architecture.language.num_attention_heads=5", "model.architecture.language.hidden_size"),
        ("model.architecture.language.hidden_size=0", "model.architecture.language.hidden_size"),
        ("model.architecture.dino=null", "model.architecture.dino"),
    ],
)
def test_a_bad_value_names_its_key(override, key):
    assert f"key {key!r}" in message(override)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("cameras.0.fov_rad=9", "cameras[0].fov_rad"),
        ("cameras.0.width=-3", "cameras[0].width"),
        ("cameras.0.target=[1, 2]", "cameras[0].target"),
        ("cameras.1.uid=head_camera_agent0", "cameras[0].uid"),
        ("cameras.9.width=3", "cameras[9]"),
        ("robots.0.rest_qpos=[1]", "robots[0].rest_qpos"),
        ("objects.barrier.mass_kg=-1", "objects.barrier.mass_kg"),
        ("objects.barrier.position=[1, 2]", "objects.barrier.position"),
        ("views.side=nope", "views.side"),
        ("lighting.ambient_rgb=[1]", "lighting.ambient_rgb"),
        ("lighting.lamps=[{direction: [1, 2]}]", "lighting.lamps[0].direction"),
        ("views.side='{agnt}'", "views.side"),
        ("success.max_tilt_deg=steep", "success.max_tilt_deg"),
        ("control_freq_hz=0", "control_freq_hz"),
        ("control_freq_hz=30", "sim_freq_hz"),
        ("robots=[]", "robots"),
        ("cameras=[]", "cameras"),
        ("max_episode_steps=9223372036854775808", "max_episode_steps"),
        ("robots.0.position=[0, .nan, 0]", "robots[0].position[1]"),
        ("objects.barrier.friction=.inf", "objects.barrier.friction"),
        ("objects.barrier.quaternion=[0, 0, 0, 0]", "objects.barrier.quaternion"),
        ("success.hold_steps=-.inf", "success.hold_steps"),
        ("cameras.3.mount_agent=-1", "cameras[3].mount_agent"),
        ("cameras.3.mount_agent=2", "cameras[3].mount_agent"),
        ("cameras.0.height=0", "cameras[0].height"),
        ("cameras.0.far_m=0.001", "cameras[0].near_m"),
        ("visual_detail=medium", "visual_detail"),
        ("max_episode_steps=0", "max_episode_steps"),
    ],
)
def test_a_bad_value_of_a_scene_names_its_key(override, key):
    assert f"key '{key}" in scene_message(override)


def test_a_base_in_4_bits_is_not_taken_apart():
    text = message("model.quantize=nf4", "training.parallel=fsdp", recipe="robot_openvla")
    assert "'model.quantize': needs training.parallel=ddp" in text


def test_a_bad_value_says_what_is_allowed():
    assert "'float64' is none of bfloat16, float32" in message("model.torch_dtype=float64")


@pytest.mark.parametrize("override", ["fast", "=3"])
def test_an_override_without_key_or_value_says_how_it_is_written(override):
    assert "section.key=value" in message(override)


@pytest.mark.parametrize(
    "text", ["model: [1", "- 1\n- 2\n", "model: 3\n", "just words", "training: {num_epochs: many}"]
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text):
    path = write(tmp_path, text)
    assert message(recipe=path).startswith(path)


def test_a_missing_key_is_named(tmp_path):
    path = write(tmp_path, "model: {use_lora: false, architecture: {image_size: 84}}")
    assert message(recipe=path) == f"{path}: key 'model.architecture.dino' is missing"


def test_an_unknown_recipe_lists_those_there_are():
    text = message(recipe="robot_openvla_tinny")
    assert "'robot_openvla_tinny'" in text
    assert "robot_openvla, robot_openvla_tiny" in text


def test_an_unknown_task_names_the_one_that_was_meant():
    with pytest.raises(UserError, match=r"'LiftBarier-rf' \(did you mean 'LiftBarrier-rf'\?\)"):
        config.scene_file("LiftBarier-rf")


def test_an_unknown_agent_lists_those_there_are():
    with pytest.raises(UserError, match="LiftBarrier-rf has no agent 2; its agents are 0, 1"):
        config.require_agent(load_scene(SCENE), 2)


def test_a_missing_checkpoint_lists_those_there_are(tmp_path):
    for name in ("epoch_10", "epoch_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / paths.MANIFEST).touch()
    with pytest.raises(UserError, match=r"no checkpoint 'epoch_3'; .* has epoch_2, epoch_10"):
        paths.find_checkpoint(tmp_path, "epoch_3")


def test_an_unknown_device_lists_those_there_are(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert config.choose_device(None) == config.choose_device("cpu") == "cpu"
    for name in ("cuda", "foo"):
        with pytest.raises(UserError, match=f"--device {name}: no such device here; there is cpu$"):
            config.choose_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [config.choose_device(name) for name in (None, "cuda:1")] == ["cuda", "cuda:1"]
    with pytest.raises(UserError, match="there is cpu, cuda, cuda:0, cuda:1"):
        config.choose_device("cuda:2")


# --------------------------------------------------------------------------------------------------------- paths, doors


def test_checkpoints_lie_where_the_seed_says(monkeypatch):
    monkeypatch.delenv("ROBOFACTORY_HOME", raising=False)
    run = paths.run_dir("openvla", "LiftBarrier-rf", 0, 150)
    assert run == config.PACKAGE / "checkpoints" / "openvla" / "LiftBarrier-rf_Agent0_150"


def test_home_moves_everything_that_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("ROBOFACTORY_HOME", str(tmp_path))
    for path in (
        paths.dataset_dir("T", 0, 1),
        paths.run_dir("openvla", "T", 0, 1),
        paths.results_dir("openvla", "T", 1, "epoch_1"),
        paths.expert_results_dir("T"),
    ):
        assert path.is_relative_to(tmp_path)


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys):
    def main() -> None:
        raise UserError("no such thing; do another")

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: no such thing; do another\n"


def test_a_file_that_cannot_be_written_is_one_line_that_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ROBOFACTORY_HOME", str(tmp_path))
    (tmp_path / "checkpoints").write_text("a file where a folder should be")

    def write_to_a_full_disk() -> None:
        with open("/dev/full", "w") as file:
            file.write("metrics")

    for main, line in {
        (tmp_path / "checkpoints" / "run").mkdir: f"error: Not a directory: {tmp_path}/checkpoints/run\n",
        write_to_a_full_disk: "error: No space left on device\n",
    }.items():
        with pytest.raises(SystemExit) as end:
            run_command(main)
        assert end.value.code == 2
        assert capsys.readouterr().err == line


def test_what_no_user_can_fix_keeps_its_trace():
    def main() -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        run_command(main)


def test_config_loads_on_a_machine_with_no_packages():
    load = f"import sys; sys.path.append({str(config.PACKAGE.parent)!r}); import robofactory.config"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", load]).returncode == 0
