"""Configuration: YAML + `section.key=value` -> one validated, frozen object.

Two kinds, two flags: `--recipe NAME` is the model and its training (`RecipeConfig`), `--config PATH` is the scene of a
task (`SceneConfig`). Defaults live in the dataclasses below and nowhere else. This module imports the standard library
alone at the top, so that `--help` answers on a machine where nothing is installed yet.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from robofactory.errors import UserError, did_you_mean

PACKAGE = Path(__file__).resolve().parent
CONFIGS = PACKAGE / "configs"

FIRST_EVALUATION_SEED = 10_000  # demonstrations are recorded with lower ones, so that no policy is judged on them
SEEDS_A_ROUND = 500  # of relabelling, so that each round has layouts of its own


# ---------------------------------------------------------------------------------------------------------- recipe


@dataclass(frozen=True)
class TowerConfig:
    """Size of one vision transformer trained from scratch; keyword arguments over the timm model."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


@dataclass(frozen=True)
class LanguageConfig:
    """Size of a Llama trained from scratch."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


@dataclass(frozen=True)
class ArchitectureConfig:
    """Sizes of a model that is trained from scratch. The published model brings its own in its `config.json`."""

    image_size: int
    dino: TowerConfig
    siglip: TowerConfig
    language: LanguageConfig


@dataclass(frozen=True)
class ModelConfig:
    model_name: str = (
        "openvla/openvla-7b"  # hub id or directory of published weights; a label when trained from scratch
    )
    use_lora: bool = True
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.0
    lora_vision: bool = False  # adapters in the vision towers too; their activations are then kept for backward
    quantize: str | None = None  # nf4: the frozen language layers in 4 bits (QLoRA), for cards of 24 GB
    torch_dtype: str = "bfloat16"  # or float32: what it computes in (bfloat16 where the device is fast in it), and what
    # the frozen part of published weights is kept in; what is trained is kept in float32
    global_token: bool = True  # one token per view besides its patches (257 instead of 256 at 224 px)
    use_proprio: bool = False
    architecture: ArchitectureConfig | None = None  # given: trained from scratch at these sizes


@dataclass(frozen=True)
class TrainingConfig:
    num_epochs: int = 300
    learning_rate: float = 5.0e-4
    batch_size: int = 16
    image_aug: bool = True
    augment_crop_ratio: float = 0.9  # by area
    checkpoint_every: int = 50  # epochs
    gradient_accumulate_every: int = 1
    weight_decay: float = 0.01
    warmup_ratio: float = 0.03  # of all optimizer steps
    max_grad_norm: float = 1.0
    soft_target_sigma_bins: float = 0.0  # > 0: cross-entropy against a Gaussian over neighbouring bins
    num_recomputed_layers: int | None = None  # first language layers that keep their input alone and compute their
    # activations again in the backward pass: half again the work, a fraction of the memory. None: all of them
    parallel: str = "ddp"  # ddp | fsdp: what several processes do with the weights, each all of them or a part
    auto_batch: bool = False  # out of memory: halve dataloader.batch_size, double gradient_accumulate_every
    max_nonfinite_steps: int = 5  # in a row: their updates are skipped; after the last one training stops
    rollback_on_spike: bool = False  # when the loss stays up: back to the last checkpoint, at half the learning rate
    max_steps: int | None = None  # stop after this many optimizer steps; the schedule is stretched over them
    seed: int = 0


@dataclass(frozen=True)
class DataloaderConfig:
    batch_size: int = cast(int, "${training.batch_size}")  # OmegaConf fills it in
    num_workers: int = 2


@dataclass(frozen=True)
class DataConfig:
    num_episodes: int = 150  # demonstrations: the last part of the dataset's and the checkpoint's directory name
    noise_share: float = 0.5  # of the demonstrations that are recorded with perturbed actions and expert labels
    visual_detail: str = "full"  # full | low: the meshes that demonstrations are rendered with
    image_width: int | None = None  # px; None: each camera's own resolution from the scene file
    image_height: int | None = None
    views: list[str] = field(default_factory=lambda: ["side", "overhead", "wrist"])
    normalization: str = "mean_std"  # mean_std | q01_q99 | min_max
    val_ratio: float = 0.05  # of the episodes
    accept: list[str] = field(default_factory=list)  # errors of the dataset that do not stop training, by name
    datasets: dict[str, float] = field(default_factory=dict)  # name in robofactory/data, path or URL -> weight: how
    # often an epoch has each of its frames. Empty: the demonstrations alone, once
    pass_through: list[str] | None = None  # action dimensions in [-1, 1] already; None: those called "...gripper..."
    stream_window: int = 64  # episodes of a dataset behind a URL that are mixed at a time, and kept on the disk


@dataclass(frozen=True)
class RelabelConfig:
    """Rounds of training that go on from the last one, with more data: episodes that the policies of the last one drove,
    labelled by the expert with what it would have done (DAgger)."""

    num_rounds: int = 1
    num_episodes: int = 60  # a round, at most SEEDS_A_ROUND
    num_epochs: int = 2  # a round, over the demonstrations and everything relabelled so far
    learning_rate: float = 5.0e-4


@dataclass(frozen=True)
class RecipeConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    relabel: RelabelConfig | None = None


# ----------------------------------------------------------------------------------------------------------- scene


@dataclass(frozen=True)
class RobotConfig:
    position: list[float]  # m, world
    yaw_deg: float
    rest_qpos: list[float]  # 7 joints in rad, then both fingers in m
    uid: str = "panda"


@dataclass(frozen=True)
class ObjectConfig:
    """Placed at `position + randomize_position * U[0, 1)` per axis (one-sided, as RoboFactory does)."""

    position: list[float]  # m, world
    quaternion: list[float]  # wxyz
    randomize_position: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # m
    mass_kg: float = 0.1
    friction: float = 0.3


@dataclass(frozen=True)
class CameraConfig:
    """A camera, fixed in the world or mounted on a link of one robot. Give `quaternion` or `target`, not both."""

    uid: str
    position: list[float]  # m; in the frame of the mount link if there is one
    quaternion: list[float] | None = None  # wxyz, x forward, z up
    target: list[float] | None = None  # m: look at this point
    mount_agent: int | None = None
    mount_link: str | None = None
    fov_rad: float = 1.5707963  # vertical
    width: int = 320
    height: int = 240
    near_m: float = 0.01
    far_m: float = 10.0


@dataclass(frozen=True)
class LampConfig:
    """Parallel light, as from the sun; RGB 1 each is RoboFactory's."""

    direction: list[float]  # in which the light travels, world
    rgb: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])


@dataclass(frozen=True)
class LightingConfig:
    """RoboFactory's light; without shadows, they cost three times."""

    ambient_rgb: list[float] = field(default_factory=lambda: [0.4, 0.4, 0.4])
    lamps: list[LampConfig] = field(
        default_factory=lambda: [LampConfig([1.0, 1.0, -1.0]), LampConfig([0.0, 0.0, -1.0])]
    )


@dataclass(frozen=True)
class SceneConfig:
    task: str  # e.g. LiftBarrier-rf
    instruction: str  # plain words for the prompt
    max_episode_steps: int
    robots: list[RobotConfig]
    objects: dict[str, ObjectConfig]
    cameras: list[CameraConfig]
    views: dict[str, str]  # view name -> camera uid; "{agent}" stands for the agent's number
    success: dict[str, float]  # thresholds by name; the task says which it needs
    sim_freq_hz: int = 100
    control_freq_hz: int = 20
    visual_detail: str = "full"  # full | low
    shader: str = "minimal"
    lighting: LightingConfig = field(default_factory=LightingConfig)
    assets_dir: str | None = None  # RoboFactory's original meshes; None: procedural shapes

    @property
    def num_agents(self) -> int:
        return len(self.robots)


# --------------------------------------------------------------------------------------------------------- loading

Config = TypeVar("Config")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> RecipeConfig:
    """The recipe of `configs/{name}.yaml`, or of a YAML file, with overrides such as `training.num_epochs=3`.

    Raises:
        UserError: unknown recipe, key or value; the line names the file and the key.
    """
    path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else CONFIGS / f"{name_or_path}.yaml"
    recipes = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
    if not path.is_file():
        raise UserError(f"unknown recipe {name_or_path!r}; there are {', '.join(recipes)}, or give a .yaml file")
    recipe = from_yaml(RecipeConfig, path.read_text(encoding="utf-8"), str(path), overrides)
    _check_recipe(recipe, path)
    return recipe


def of_round(recipe: RecipeConfig, round_number: int) -> RecipeConfig:
    """The recipe of a round of training: 0 is on the demonstrations alone, see `RelabelConfig` for the later ones.

    Raises:
        UserError: the recipe has no such round.
    """
    num_rounds = recipe.relabel.num_rounds if recipe.relabel else 0
    if not 0 <= round_number <= num_rounds:
        raise UserError(f"--round {round_number}: the recipe has rounds 0 to {num_rounds}; see relabel.num_rounds")
    if round_number == 0 or recipe.relabel is None:
        return recipe
    relabel = recipe.relabel
    training = dataclasses.replace(recipe.training, num_epochs=relabel.num_epochs, learning_rate=relabel.learning_rate)
    return dataclasses.replace(recipe, training=training)


def load_scene(path: str | Path, overrides: Sequence[str] = ()) -> SceneConfig:
    """The scene of a task from its YAML file.

    Raises:
        UserError: a missing file, an unknown key or a bad value; the line names the file and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no scene file {path}; the tasks' own are in {CONFIGS / 'table'}")
    scene = from_yaml(SceneConfig, path.read_text(encoding="utf-8"), str(path), overrides)
    _check_scene(scene, str(path))
    return scene


def overridden(scene: SceneConfig, overrides: Sequence[str]) -> SceneConfig:
    """The scene with overrides on top. Raises UserError as `load_scene`."""
    source = f"the scene of {scene.task}"
    changed = from_yaml(SceneConfig, to_yaml(scene), source, overrides)
    _check_scene(changed, source)
    return changed


def with_pictures(scene: SceneConfig, visual_detail: str | None, width: int | None, height: int | None) -> SceneConfig:
    """The scene with other meshes, or another size (px) of every camera; None leaves what it has."""
    cameras = [
        dataclasses.replace(camera, width=width or camera.width, height=height or camera.height)
        for camera in scene.cameras
    ]
    return dataclasses.replace(scene, cameras=cameras, visual_detail=visual_detail or scene.visual_detail)


def scene_file(task: str) -> Path:
    """The scene file of a task by its name.

    Raises:
        UserError: unknown task; the line lists the known ones.
    """
    from omegaconf import OmegaConf

    scenes: dict[Path, Any] = {path: OmegaConf.load(path) for path in sorted((CONFIGS / "table").glob("*.yaml"))}
    files = {str(scene["task"]): path for path, scene in scenes.items()}
    if task not in files:
        raise UserError(f"unknown task {task!r}{did_you_mean(task, files)}; there are {', '.join(files)}")
    return files[task]


def load_task_scene(task: str, path: str | None, overrides: Sequence[str] = ()) -> SceneConfig:
    """The scene of a task: its own, or the file at `path`.

    Raises:
        UserError: unknown task, or a scene of another task, beside what `load_scene` refuses.
    """
    file = Path(path) if path else scene_file(task)
    scene = load_scene(file, overrides)
    if scene.task != task:
        raise UserError(f"{file} is the scene of {scene.task}, not of {task}")
    return scene


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, as it is saved in every checkpoint and dataset."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def from_yaml(
    kind: type[Config], text: str, source: str = "the configuration", overrides: Sequence[str] = ()
) -> Config:
    """The inverse of `to_yaml`, with overrides on top. What the text does not say has its default.

    Raises:
        UserError: not valid YAML, an unknown or missing key, a value of the wrong type; the line names the source, or
            the override, and the key.
    """
    from omegaconf import MissingMandatoryValue, OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
    from yaml import YAMLError

    defaults, at = OmegaConf.structured(kind), source
    try:
        given = OmegaConf.create(text)
        if not OmegaConf.is_dict(given):
            raise UserError(f"{source}: expected keys with values, not a list")
        config = OmegaConf.merge(defaults, given)
        for override in overrides:
            at = f"override {override!r}"
            key, equals, value = override.partition("=")
            if not (key and equals):
                raise UserError(f"{at}: expected section.key=value")
            parsed: Any = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))
            OmegaConf.update(given, key, parsed["value"], merge=True)
            config = OmegaConf.merge(defaults, given)
        at = source
        return OmegaConf.to_object(config)  # type: ignore[return-value]
    except ConfigKeyError as error:
        raise UserError(f"{at}: unknown key {str(error.full_key)!r}{_meant_key(error)}") from None
    except MissingMandatoryValue as error:
        raise UserError(f"{at}: key {error.full_key!r} is missing") from None
    except (OmegaConfBaseException, TypeError, IndexError) as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{at}: {f'key {key!r}: ' if key else ''}{str(error).splitlines()[0]}") from None
    except YAMLError as error:
        raise UserError(f"{at}: not valid YAML: {' '.join(str(error).split())}") from None


def _meant_key(error: Any) -> str:
    """The key of the same section that is spelled most alike."""
    section, _, name = str(error.full_key).rpartition(".")
    known = [entry.name for entry in dataclasses.fields(error.object_type)]
    return did_you_mean(name, known, f"{section}." if section else "")


def _require(ok: bool, source: Path | str, key: str, problem: str) -> None:
    if not ok:
        raise UserError(f"{source}: key {key!r}: {problem}")


def _check_recipe(recipe: RecipeConfig, path: Path) -> None:
    m, t, d = recipe.model, recipe.training, recipe.data
    one_of = {
        "model.torch_dtype": (m.torch_dtype, ("bfloat16", "float32")),
        "training.parallel": (t.parallel, ("ddp", "fsdp")),
        "data.normalization": (d.normalization, ("mean_std", "q01_q99", "min_max")),
        "data.visual_detail": (d.visual_detail, ("full", "low")),
    }
    for key, (value, allowed) in one_of.items():
        _require(value in allowed, path, key, f"{value!r} is none of {', '.join(allowed)}")
    _require(m.quantize in (None, "nf4"), path, "model.quantize", f"{m.quantize!r} is none of null, nf4")
    positive = {
        "model.lora_rank": m.lora_rank,
        "model.lora_alpha": m.lora_alpha,
        "training.num_epochs": t.num_epochs,
        "training.learning_rate": t.learning_rate,
        "training.checkpoint_every": t.checkpoint_every,
        "training.gradient_accumulate_every": t.gradient_accumulate_every,
        "training.max_grad_norm": t.max_grad_norm,
        "training.max_nonfinite_steps": t.max_nonfinite_steps,
        "dataloader.batch_size": recipe.dataloader.batch_size,
        "data.num_episodes": d.num_episodes,
        "data.stream_window": d.stream_window,
        **({} if t.max_steps is None else {"training.max_steps": t.max_steps}),
        **{f"data.datasets.{name}": weight for name, weight in d.datasets.items()},
        **({f"relabel.{key}": value for key, value in vars(recipe.relabel).items()} if recipe.relabel else {}),
    }
    for key, value in positive.items():
        _require(value > 0, path, key, f"must be positive, got {value}")
    num_relabelled = recipe.relabel.num_episodes if recipe.relabel else 0
    _require(num_relabelled <= SEEDS_A_ROUND, path, "relabel.num_episodes", f"must be at most {SEEDS_A_ROUND}, got {num_relabelled}")  # fmt: skip
    at_least_zero = {
        "training.weight_decay": t.weight_decay,
        "training.soft_target_sigma_bins": t.soft_target_sigma_bins,
        "training.num_recomputed_layers": t.num_recomputed_layers or 0,
        "training.seed": t.seed,
        "dataloader.num_workers": recipe.dataloader.num_workers,
    }
    for key, value in at_least_zero.items():
        _require(value >= 0, path, key, f"must not be negative, got {value}")
    _require(
        0.0 < t.augment_crop_ratio <= 1.0,
        path,
        "training.augment_crop_ratio",
        f"must be in (0, 1], got {t.augment_crop_ratio}",
    )
    _require(0.0 <= m.lora_dropout < 1.0, path, "model.lora_dropout", f"must be in [0, 1), got {m.lora_dropout}")
    _require(0.0 <= t.warmup_ratio <= 1.0, path, "training.warmup_ratio", f"must be in [0, 1], got {t.warmup_ratio}")
    _require(not (m.quantize and t.parallel == "fsdp"), path, "model.quantize", "needs training.parallel=ddp: matrices in 4 bits are not taken apart")  # fmt: skip
    _require(not (t.auto_batch and t.parallel == "fsdp"), path, "training.auto_batch", "needs training.parallel=ddp: a part of a model cannot be tried alone")  # fmt: skip
    _require(0.0 <= d.noise_share <= 1.0, path, "data.noise_share", f"must be in [0, 1], got {d.noise_share}")
    _require(0.0 < d.val_ratio < 1.0, path, "data.val_ratio", f"must be in (0, 1), got {d.val_ratio}")
    _require(len(d.views) > 0, path, "data.views", "must name at least one view")
    _require(
        (d.image_width is None) == (d.image_height is None), path, "data.image_width", "goes together with image_height"
    )
    _require(
        not (m.use_lora and m.architecture),
        path,
        "model.use_lora",
        "a model trained from scratch has no adapters; set it to false",
    )
    for key, value in {"model.lora_vision": m.lora_vision, "model.quantize": m.quantize}.items():
        _require(m.use_lora or not value, path, key, "is for adapters; set model.use_lora to true, or leave it out")


def _check_scene(scene: SceneConfig, source: str) -> None:
    _require(
        scene.visual_detail in ("full", "low"), source, "visual_detail", f"{scene.visual_detail!r} is none of full, low"
    )
    _require(
        scene.control_freq_hz > 0 and scene.sim_freq_hz % scene.control_freq_hz == 0,
        source,
        "sim_freq_hz",
        f"{scene.sim_freq_hz} is no multiple of control_freq_hz={scene.control_freq_hz}",
    )
    _require(
        scene.max_episode_steps > 0, source, "max_episode_steps", f"must be positive, got {scene.max_episode_steps}"
    )
    for index, robot in enumerate(scene.robots):
        _require(
            len(robot.position) == 3, source, f"robots[{index}].position", f"needs 3 numbers, got {len(robot.position)}"
        )
        _require(
            len(robot.rest_qpos) == 9,
            source,
            f"robots[{index}].rest_qpos",
            f"needs 9 numbers, got {len(robot.rest_qpos)}",
        )
    for name, thing in scene.objects.items():
        for key, length in {"position": 3, "randomize_position": 3, "quaternion": 4}.items():
            count = len(getattr(thing, key))
            _require(count == length, source, f"objects.{name}.{key}", f"needs {length} numbers, got {count}")
        _require(thing.mass_kg > 0, source, f"objects.{name}.mass_kg", f"must be positive, got {thing.mass_kg}")
        _require(thing.friction >= 0, source, f"objects.{name}.friction", f"must not be negative, got {thing.friction}")
    lights = {"ambient_rgb": scene.lighting.ambient_rgb}
    for index, lamp in enumerate(scene.lighting.lamps):
        lights |= {f"lamps[{index}].direction": lamp.direction, f"lamps[{index}].rgb": lamp.rgb}
    for key, numbers in lights.items():
        _require(len(numbers) == 3, source, f"lighting.{key}", f"needs 3 numbers, got {len(numbers)}")
    uids = [camera.uid for camera in scene.cameras]
    for index, camera in enumerate(scene.cameras):
        at = f"cameras[{index}]"
        _require(uids.count(camera.uid) == 1, source, f"{at}.uid", f"{camera.uid!r} is there twice")
        _require(len(camera.position) == 3, source, f"{at}.position", f"needs 3 numbers, got {len(camera.position)}")
        for key, length in {"quaternion": 4, "target": 3}.items():
            numbers = getattr(camera, key)
            _require(
                numbers is None or len(numbers) == length,
                source,
                f"{at}.{key}",
                f"needs {length} numbers, got {numbers}",
            )
        _require(
            (camera.quaternion is None) != (camera.target is None), source, at, "give quaternion or target, not both"
        )
        _require(
            (camera.mount_agent is None) == (camera.mount_link is None),
            source,
            at,
            "mount_agent and mount_link go together",
        )
        _require(
            camera.width > 0 and camera.height > 0,
            source,
            f"{at}.width",
            f"{camera.width}x{camera.height} is no image size",
        )
        _require(0 < camera.fov_rad < 3.1415926, source, f"{at}.fov_rad", f"must be in (0, pi), got {camera.fov_rad}")
        _require(
            camera.mount_agent is None or 0 <= camera.mount_agent < len(scene.robots),
            source,
            f"{at}.mount_agent",
            f"there is no agent {camera.mount_agent}",
        )
    for view, pattern in scene.views.items():
        odd = "{" in pattern.replace("{agent}", "") or "}" in pattern.replace("{agent}", "")
        _require(not odd, source, f"views.{view}", f"{pattern!r}: only {{agent}} may stand in braces")
        for agent in range(len(scene.robots)):
            uid = pattern.format(agent=agent)
            _require(uid in uids, source, f"views.{view}", f"no camera {uid!r}; there are {', '.join(uids)}")


# What decides how a scene's pictures look, beside the robots and objects in them and whose meshes these have.
LOOK = ("visual_detail", "shader", "lighting", "cameras", "views")


def look_of(scene: SceneConfig) -> dict[str, Any]:
    """How the scene's pictures look, as a codec keeps it: what a policy must meet again wherever it acts."""
    content = dataclasses.asdict(scene)
    return {key: content[key] for key in LOOK} | {"original_meshes": scene.assets_dir is not None}


def with_look(scene: SceneConfig, look: dict[str, Any]) -> SceneConfig:
    """The scene with pictures that look as `look_of` says.

    A look that an earlier version kept says less, and of the cameras their sizes alone; the rest stays the scene's.

    Raises:
        UserError: the look has a view that the scene has not, or meshes that the scene does not say the place of.
    """
    from omegaconf import OmegaConf

    content = dataclasses.asdict(scene)
    for view, (width, height) in look.get("camera_sizes", {}).items():  # px
        if view not in scene.views:
            raise UserError(f"{scene.task} has no view {view!r}; it has {', '.join(scene.views)}")
        uids = [scene.views[view].format(agent=agent) for agent in range(scene.num_agents)]
        for camera in content["cameras"]:
            if camera["uid"] in uids:
                camera |= {"width": width, "height": height}
    content |= {key: look[key] for key in LOOK if key in look}
    if look.get("original_meshes") and scene.assets_dir is None:
        raise UserError("the policy was trained on pictures of RoboFactory's own meshes; say where they are: assets_dir=DIRECTORY")  # fmt: skip
    if look.get("original_meshes") is False:
        content["assets_dir"] = None
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SceneConfig), content))  # type: ignore[return-value]


def look_differences(one: SceneConfig, other: SceneConfig) -> list[str]:
    """What is not the same in the looks of two scenes."""
    ours, theirs = look_of(one), look_of(other)
    return [key for key in ours if ours[key] != theirs[key]]


# ---------------------------------------------------------------------------------------------------------- machine


def home() -> Path:
    """Where datasets, checkpoints and results are kept: the package's folder, or `$ROBOFACTORY_HOME`."""
    return Path(os.environ.get("ROBOFACTORY_HOME", PACKAGE))


def choose_device(asked: str | None) -> str:
    """The device that `--device` asks for; a CUDA GPU, if there is one, where it asks for none.

    Raises:
        UserError: there is no such device; the line lists those there are.
    """
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    known = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if asked is None:
        return "cuda" if gpus else "cpu"
    if asked not in known:
        raise UserError(f"--device {asked}: no such device here; there is {', '.join(known)}")
    return asked


def require_agent(scene: SceneConfig, agent_id: int) -> None:
    """Raises UserError unless the task has this agent."""
    if not 0 <= agent_id < scene.num_agents:
        agents = ", ".join(str(i) for i in range(scene.num_agents))
        raise UserError(f"{scene.task} has no agent {agent_id}; its agents are {agents}")
