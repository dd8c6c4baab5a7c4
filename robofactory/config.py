"""Configuration: YAML + `section.key=value` -> one validated, frozen object.

Two kinds, two flags: `--recipe NAME` is the model and its training (`RecipeConfig`), `--config PATH` is the scene of a
task (`SceneConfig`). Defaults live in the dataclasses below and nowhere else. This module imports the standard library
alone at the top, so that `--help` answers on a machine where nothing is installed yet.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from robofactory.errors import UserError, did_you_mean

PACKAGE = Path(__file__).resolve().parent
CONFIGS = PACKAGE / "configs"

FIRST_EVALUATION_SEED = 10_000  # demonstrations are recorded with lower ones, so that no policy is judged on them
SEEDS_A_ROUND = 500  # of relabelling, so that each round has layouts of its own
PATCH = 14  # px, the side of a patch of both vision towers
THAT_OF_TRAINING: Any = "${training.batch_size}"  # a reference, which `settings` resolves


# ---------------------------------------------------------------------------------------------------------- limits


@dataclass(frozen=True)
class Within:
    """A limit of numbers, written as an interval: `(0, 1]` has 1 and does not have 0. Gives what is wrong, or None."""

    interval: str
    in_words: str = ""

    def __call__(self, value: float | int) -> str | None:
        low, high = map(float, self.interval[1:-1].split(","))
        is_above = value >= low if self.interval[0] == "[" else value > low
        is_below = value <= high if self.interval[-1] == "]" else value < high
        return None if is_above and is_below else f"must be {self.in_words or f'in {self.interval}'}, got {value}"


def _names(values: list[str]) -> str | None:
    """A limit of lists: there is at least one, each once."""
    if not values:
        return "must name at least one"
    twice = [each for each in values if values.count(each) > 1]
    return f"{twice[0]!r} is there twice" if twice else None


def _not_empty(values: Any) -> str | None:
    return None if values else "needs at least one, got none"


def _numbers(count: int) -> Any:
    return lambda values: None if len(values) == count else f"needs {count} numbers, got {len(values)}"


PositiveInt = Annotated[int, Within("(0, inf)", "positive")]
PositiveFloat = Annotated[float, Within("(0, inf)", "positive")]
CountInt = Annotated[int, Within("[0, inf)", "at least 0")]
AtLeastZero = Annotated[float, Within("[0, inf)", "at least 0")]
Share = Annotated[float, Within("[0, 1]")]
Pixels = Annotated[int, Within("[1, 8192]")]
Vector = Annotated[list[float], _numbers(3)]
Quaternion = Annotated[
    list[float], _numbers(4), lambda values: None if any(values) else "must not be all zeros"
]  # wxyz


# ---------------------------------------------------------------------------------------------------------- recipe


@dataclass(frozen=True)
class TowerConfig:
    """Size of one vision transformer trained from scratch; keyword arguments over the timm model."""

    embed_dim: PositiveInt
    depth: PositiveInt
    num_heads: PositiveInt
    mlp_ratio: PositiveFloat = 4.0


@dataclass(frozen=True)
class LanguageConfig:
    """Size of a Llama trained from scratch."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt


@dataclass(frozen=True)
class ArchitectureConfig:
    """Sizes of a model that is trained from scratch. The published model brings its own in its `config.json`."""

    image_size: PositiveInt  # px, a multiple of PATCH
    dino: TowerConfig
    siglip: TowerConfig
    language: LanguageConfig


@dataclass(frozen=True)
class ModelConfig:
    model_name: str = (
        "openvla/openvla-7b"  # hub id or directory of published weights; a label when trained from scratch
    )
    use_lora: bool = True
    lora_rank: PositiveInt = 32
    lora_alpha: PositiveInt = 64
    lora_dropout: Annotated[float, Within("[0, 1)")] = 0.0
    lora_vision: bool = False  # adapters in the vision towers too; their activations are then kept for backward
    quantize: Literal["nf4"] | None = None  # nf4: the frozen language layers in 4 bits (QLoRA), for cards of 24 GB
    # What it computes in (bfloat16 where the device is fast in it), and what the frozen part of published weights is kept
    # in; what is trained is kept in float32
    torch_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    global_token: bool = True  # one token per view besides its patches (257 instead of 256 at 224 px)
    use_proprio: bool = False
    architecture: ArchitectureConfig | None = None  # given: trained from scratch at these sizes


@dataclass(frozen=True)
class TrainingConfig:
    num_epochs: PositiveInt = 300
    learning_rate: PositiveFloat = 5.0e-4
    batch_size: PositiveInt = 16
    image_aug: bool = True
    augment_crop_ratio: Annotated[float, Within("(0, 1]")] = 0.9  # by area
    checkpoint_every: PositiveInt = 50  # epochs
    gradient_accumulate_every: PositiveInt = 1
    weight_decay: AtLeastZero = 0.01
    warmup_ratio: Share = 0.03  # of all optimizer steps
    max_grad_norm: PositiveFloat = 1.0
    soft_target_sigma_bins: AtLeastZero = 0.0  # > 0: cross-entropy against a Gaussian over neighbouring bins
    num_recomputed_layers: CountInt | None = None  # first language layers that keep only their input and compute their
    # activations again in the backward pass: half again the work, a fraction of the memory. None: all of them
    parallel: Literal["ddp", "fsdp"] = "ddp"  # what several processes do with the weights, each all of them or a part
    auto_batch: bool = False  # out of memory: halve dataloader.batch_size, double gradient_accumulate_every
    max_nonfinite_steps: PositiveInt = 5  # in a row: their updates are skipped; after the last one training stops
    rollback_on_spike: bool = False  # when the loss stays up: back to the last checkpoint, at half the learning rate
    max_steps: PositiveInt | None = None  # stop after this many optimizer steps; the schedule is stretched over them
    seed: CountInt = 0


@dataclass(frozen=True)
class DataloaderConfig:
    batch_size: PositiveInt = THAT_OF_TRAINING
    num_workers: CountInt = 2


@dataclass(frozen=True)
class DataConfig:
    num_episodes: PositiveInt = (
        150  # demonstrations: the last part of the dataset's and the checkpoint's directory name
    )
    noise_share: Share = 0.5  # of the demonstrations that are recorded with perturbed actions and expert labels
    visual_detail: Literal["full", "low"] = "full"  # the meshes that demonstrations are rendered with
    image_width: Pixels | None = None  # None: each camera's own resolution from the scene file
    image_height: Pixels | None = None
    views: Annotated[list[str], _names] = field(default_factory=lambda: ["side", "overhead", "wrist"])
    normalization: Literal["mean_std", "q01_q99", "min_max"] = "mean_std"
    val_ratio: Annotated[float, Within("(0, 1)")] = 0.05  # of the episodes
    accept: list[str] = field(default_factory=list)  # errors of the dataset that do not stop training, by name
    datasets: dict[str, PositiveFloat] = field(
        default_factory=dict
    )  # name in robofactory/data, path or URL -> weight: how
    # often an epoch has each of its frames. Empty: the demonstrations alone, once
    pass_through: list[str] | None = None  # action dimensions in [-1, 1] already; None: those called "...gripper..."
    stream_window: PositiveInt = 64  # episodes of a dataset behind a URL that are mixed at a time, and kept on the disk


@dataclass(frozen=True)
class RelabelConfig:
    """Rounds of training that go on from the last one, with more data: episodes that the policies of the last one drove,
    labelled by the expert with what it would have done (DAgger)."""

    num_rounds: PositiveInt = 1
    num_episodes: Annotated[int, Within(f"[1, {SEEDS_A_ROUND}]")] = 60  # per round
    num_epochs: PositiveInt = 2  # per round, over the demonstrations and everything relabelled so far
    learning_rate: PositiveFloat = 5.0e-4


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
    position: Vector  # m, world
    yaw_deg: float
    rest_qpos: Annotated[list[float], _numbers(9)]  # 7 joints in rad, then both fingers in m
    uid: str = "panda"


@dataclass(frozen=True)
class ObjectConfig:
    """Placed at `position + randomize_position * U[0, 1)` per axis (one-sided, as RoboFactory does)."""

    position: Vector  # m, world
    quaternion: Quaternion
    randomize_position: Vector = field(default_factory=lambda: [0.0, 0.0, 0.0])  # m
    mass_kg: PositiveFloat = 0.1
    friction: AtLeastZero = 0.3


@dataclass(frozen=True)
class CameraConfig:
    """A camera, fixed in the world or mounted on a link of one robot. Give `quaternion` or `target`, not both."""

    uid: str
    position: Vector  # m; in the frame of the mount link if there is one
    quaternion: Quaternion | None = None  # x forward, z up
    target: Vector | None = None  # m: look at this point
    mount_agent: CountInt | None = None
    mount_link: str | None = None
    fov_rad: Annotated[float, Within("(0, 3.1415926)")] = 1.5707963  # vertical
    width: Pixels = 320
    height: Pixels = 240
    near_m: PositiveFloat = 0.01
    far_m: PositiveFloat = 10.0


@dataclass(frozen=True)
class LampConfig:
    """Parallel light, as from the sun; RGB 1 each is RoboFactory's."""

    direction: Vector  # in which the light travels, world
    rgb: Vector = field(default_factory=lambda: [1.0, 1.0, 1.0])


@dataclass(frozen=True)
class LightingConfig:
    """RoboFactory's light, but without its shadows, with which rendering costs three times as much."""

    ambient_rgb: Vector = field(default_factory=lambda: [0.4, 0.4, 0.4])
    lamps: list[LampConfig] = field(
        default_factory=lambda: [LampConfig([1.0, 1.0, -1.0]), LampConfig([0.0, 0.0, -1.0])]
    )


@dataclass(frozen=True)
class SceneConfig:
    task: str  # e.g. LiftBarrier-rf
    instruction: str  # plain words for the prompt
    max_episode_steps: PositiveInt
    robots: Annotated[list[RobotConfig], _not_empty]
    objects: dict[str, ObjectConfig]
    cameras: Annotated[list[CameraConfig], _not_empty]
    views: Annotated[dict[str, str], _not_empty]  # view name -> camera uid; "{agent}" stands for the agent's number
    success: Annotated[dict[str, float], _not_empty]  # thresholds by name; the task says which it needs
    sim_freq_hz: PositiveInt = 100
    control_freq_hz: PositiveInt = 20
    visual_detail: Literal["full", "low"] = "full"
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
    recipes = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    path = recipes.get(name_or_path)
    if path is None and name_or_path.endswith((".yaml", ".yml")):
        path = path_of(name_or_path)
    if path is None or not path.is_file():
        meant = did_you_mean(name_or_path, recipes)
        raise UserError(f"unknown recipe {name_or_path!r}{meant}; there are {', '.join(recipes)}, or give a .yaml file")
    return from_yaml(RecipeConfig, _text_of(path), str(path), overrides)


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
    path = path_of(path)
    if not path.is_file():
        raise UserError(f"no scene file {path}; the tasks' own are in {CONFIGS / 'table'}")
    return from_yaml(SceneConfig, _text_of(path), str(path), overrides)


def overridden(scene: SceneConfig, overrides: Sequence[str]) -> SceneConfig:
    """The scene with overrides on top. Raises UserError as `load_scene`."""
    return from_yaml(SceneConfig, to_yaml(scene), f"the scene of {scene.task}", overrides)


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
    from robofactory import settings

    paths = sorted((CONFIGS / "table").glob("*.yaml"))
    files = {str(settings.tree(_text_of(path), str(path))["task"]): path for path in paths}
    if task not in files:
        raise UserError(f"unknown task {task!r}{did_you_mean(task, files)}; there are {', '.join(files)}")
    return files[task]


def load_task_scene(task: str, path: str | Path | None, overrides: Sequence[str] = ()) -> SceneConfig:
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
    from robofactory import settings

    return settings.write(config)


def from_yaml(
    kind: type[Config], text: str, source: str = "the configuration", overrides: Sequence[str] = ()
) -> Config:
    """The inverse of `to_yaml`, with overrides on top. What the text does not say has its default.

    Raises:
        UserError: not valid YAML, an unknown or missing key, a value that is not allowed or does not go together with
            another; the line names the source, or the override, and the key.
    """
    from robofactory import settings

    return settings.read(kind, text, source, overrides, PROBLEMS[kind])


def _text_of(path: Path) -> str:
    from robofactory import files, settings

    return files.read_text(path, settings.MAX_BYTES)


def _problems_of_recipe(recipe: RecipeConfig) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of the values that do not go together."""
    m, t, d = recipe.model, recipe.training, recipe.data
    if m.quantize and t.parallel == "fsdp":
        yield "model.quantize", "needs training.parallel=ddp: matrices in 4 bits are not taken apart"
    if t.auto_batch and t.parallel == "fsdp":
        yield "training.auto_batch", "needs training.parallel=ddp: a part of a model cannot be tried by itself"
    if (d.image_width is None) != (d.image_height is None):
        yield "data.image_width", "goes together with image_height"
    if m.use_lora and m.architecture:
        yield "model.use_lora", "a model trained from scratch has no adapters; set it to false"
    for key, value in {"model.lora_vision": m.lora_vision, "model.quantize": m.quantize}.items():
        if value and not m.use_lora:
            yield key, "is for adapters; set model.use_lora to true, or omit it"
    if m.architecture:
        yield from _problems_of_sizes(m.architecture)


def _problems_of_sizes(sizes: ArchitectureConfig) -> Iterator[tuple[str, str]]:
    at = "model.architecture"
    if sizes.image_size % PATCH:
        yield f"{at}.image_size", f"{sizes.image_size} is no multiple of {PATCH}, the side of a patch"
    for name, tower in {"dino": sizes.dino, "siglip": sizes.siglip}.items():
        if tower.embed_dim % tower.num_heads:
            yield f"{at}.{name}.embed_dim", f"{tower.embed_dim} is no multiple of num_heads={tower.num_heads}"
    width, heads = sizes.language.hidden_size, sizes.language.num_attention_heads
    if width % (2 * heads):  # rotary positions turn pairs
        yield f"{at}.language.hidden_size", f"{width} is no multiple of 2 x num_attention_heads={heads}"


def _problems_of_scene(scene: SceneConfig) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of the values that do not go together."""
    if scene.sim_freq_hz % scene.control_freq_hz:
        yield "sim_freq_hz", f"{scene.sim_freq_hz} is no multiple of control_freq_hz={scene.control_freq_hz}"
    uids = [camera.uid for camera in scene.cameras]
    for index, camera in enumerate(scene.cameras):
        at = f"cameras[{index}]"
        if uids.count(camera.uid) > 1:
            yield f"{at}.uid", f"{camera.uid!r} is there twice"
        if (camera.quaternion is None) == (camera.target is None):
            yield at, "give quaternion or target, not both"
        if (camera.mount_agent is None) != (camera.mount_link is None):
            yield at, "mount_agent and mount_link go together"
        if camera.mount_agent is not None and camera.mount_agent >= scene.num_agents:
            yield f"{at}.mount_agent", f"there is no agent {camera.mount_agent}"
        if camera.near_m >= camera.far_m:
            yield f"{at}.near_m", f"{camera.near_m} is not below far_m={camera.far_m}"
    for view, pattern in scene.views.items():
        if {"{", "}"} & {*pattern.replace("{agent}", "")}:
            yield f"views.{view}", f"{pattern!r}: only {{agent}} may stand in braces"
        for agent in range(scene.num_agents):
            if (uid := pattern.replace("{agent}", str(agent))) not in uids:
                yield f"views.{view}", f"no camera {uid!r}; there are {', '.join(uids)}"


PROBLEMS: dict[type, Any] = {RecipeConfig: _problems_of_recipe, SceneConfig: _problems_of_scene}


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
        UserError: the look has a view that the scene does not have, meshes that the scene does not say the place of, or
            values that no scene may have.
    """
    from robofactory import settings

    source = "the pictures that the policy was trained on"
    content = dataclasses.asdict(scene)
    sizes = settings.typed(dict[str, Annotated[list[Pixels], _numbers(2)]], look.get("camera_sizes", {}), source)
    for view, (width, height) in sizes.items():
        if view not in scene.views:
            raise UserError(f"{scene.task} has no view {view!r}; it has {', '.join(scene.views)}")
        uids = [scene.views[view].format(agent=agent) for agent in range(scene.num_agents)]
        for camera in content["cameras"]:
            if camera["uid"] in uids:
                camera |= {"width": width, "height": height}
    content |= {key: look[key] for key in LOOK if key in look}
    if look.get("original_meshes") and scene.assets_dir is None:
        raise UserError(
            "the policy was trained on pictures of RoboFactory's own meshes; say where they are: assets_dir=DIRECTORY"
        )
    if look.get("original_meshes") is False:
        content["assets_dir"] = None
    return settings.typed(SceneConfig, content, source, _problems_of_scene)


def look_differences(one: SceneConfig, other: SceneConfig) -> list[str]:
    """What is not the same in the looks of two scenes."""
    ours, theirs = look_of(one), look_of(other)
    return [key for key in ours if ours[key] != theirs[key]]


# ---------------------------------------------------------------------------------------------------------- machine


def path_of(text: str | Path) -> Path:
    """The path that somebody wrote; `~` is the home directory, as in a shell.

    Raises:
        UserError: it is empty, no file system knows such a name, or there is no such user.
    """
    try:
        path = Path(text).expanduser()
        os.fsencode(path)
    except RuntimeError:
        raise UserError(f"{str(text)!r}: there is no such home directory") from None
    except UnicodeEncodeError:
        raise UserError(f"{str(text)!r} cannot be written in the encoding of this system's file names") from None
    if not str(text) or "\0" in str(text):
        raise UserError(f"{str(text)!r} is no path")
    return path


def home() -> Path:
    """Where datasets, checkpoints and results are kept: the package's folder, or `$ROBOFACTORY_HOME`."""
    return path_of(os.environ.get("ROBOFACTORY_HOME") or PACKAGE)


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
