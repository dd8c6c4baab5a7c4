"""The door to the simulator: make a task's environment and its expert, observe as the agents do, preview the cameras.

robofactory preview --config robofactory/configs/table/lift_barrier.yaml --render scene.png
"""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from robofactory import arguments
from robofactory.config import SceneConfig, load_scene, scene_file
from robofactory.errors import UserError, run_command

if TYPE_CHECKING:  # this module answers --help on a machine where nothing is installed
    import gymnasium as gym

    from robofactory.shapes import Action, Observation
else:
    Observation = Any


def make_env(scene: SceneConfig, render: bool = True, num_envs: int = 1, backend: str = "cpu") -> "gym.Env":
    """The task's environment, see `step`. Stepping renders nothing.

    `reset(seed=s)` gives the same layout to the bit. The same actions then give the same motion to about a millimetre:
    PhysX keeps its contact caches from one episode to the next.

    Args:
        render: whether cameras exist. Without, no graphics driver is needed.
        backend: where physics runs and pictures are rendered, "cpu" (one environment) or "gpu".
    Raises:
        UserError: a scene that does not fit its task, no device that can render, or none for physics on the GPU.
    """
    from robofactory.sim.task import find_task

    check_scene(scene, f"scene {scene.task}")
    if backend not in ("cpu", "gpu"):
        raise UserError(f"backend {backend!r} is none of cpu, gpu")
    if backend == "cpu" and num_envs != 1:
        raise UserError(f"backend cpu runs 1 environment a process, not {num_envs}; start more processes, or use gpu")
    if backend == "gpu":
        require_gpu_physics()
    import gymnasium as gym
    from mani_skill.utils.registration import REGISTERED_ENVS, register_env

    from robofactory.sim.scene import robots_of

    # Mesa writes its shader cache in a thread of low priority. On a busy machine a process could not end for minutes,
    # because that thread never came to run; starting without the cache takes no longer (7 s of CPU).
    os.environ.setdefault("MESA_SHADER_CACHE_DISABLE", "true")
    task = find_task(scene.task)
    if task.name not in REGISTERED_ENVS:
        register_env(task.name)(task.make_environment_class())
    (control_mode,) = {robot.control_mode for robot in robots_of(scene)}
    try:
        return gym.make(
            scene.task,
            scene=scene,
            max_episode_steps=scene.max_episode_steps,
            num_envs=num_envs,
            obs_mode="none",
            reward_mode="none",
            control_mode=control_mode,
            sim_backend=f"physx_{'cuda' if backend == 'gpu' else 'cpu'}",
            render_backend=("gpu" if backend == "gpu" else "cpu") if render else "none",
        )
    except RuntimeError as error:
        # SAPIEN's own words: "vk::createInstanceUnique: ...", "failed to find a rendering device"
        if render and ("vk::" in str(error) or "render" in str(error).lower()):
            driver = "a Vulkan driver: bash setup.sh" if backend == "cpu" else "the GPU's Vulkan driver"
            raise UserError(f"nothing here can render ({error}); install {driver}") from None
        raise


def require_gpu_physics() -> None:
    """Loads PhysX's library for GPUs, which SAPIEN downloads the first time (`~/.sapien/physx`).

    Raises:
        UserError: there is no CUDA GPU, or the library cannot be had.
    """
    import sapien
    import torch

    if not torch.cuda.is_available():
        raise UserError("physics on the GPU: there is no CUDA GPU here; simulate on the CPU")
    try:
        sapien.physx.enable_gpu()
    except (OSError, RuntimeError, BadZipFile) as error:  # no network, no libcuda.so; SAPIEN's own; not the library
        raise UserError(f"physics on the GPU: {' '.join(str(error).split())}; simulate on the CPU") from None


def observe(env: "gym.Env") -> list[Observation]:
    """What each agent sees and feels now, in the order of the agents. Renders every camera once.

    Images are the environment's cameras under the scene's view names. Of several parallel environments, the first.
    """
    return observe_each(env)[0]


def observe_each(env: "gym.Env") -> list[list[Observation]]:
    """For each of the parallel environments, what `observe` gives. Renders every camera of all of them once, together."""
    from robofactory.shapes import Observation
    from robofactory.sim.cameras import view_cameras

    table: Any = env.unwrapped
    pictures = {uid: picture.cpu().numpy() for uid, picture in table.pictures().items()}  # [b, h, w, 3]
    proprio = [table.proprio(agent) for agent in range(table.config.num_agents)]  # [b, s]

    def of(index: int, agent: int) -> Observation:
        images = {view: pictures[uid][index] for view, uid in view_cameras(table.config, agent).items()}
        return Observation(images, proprio[agent][index], table.config.instruction)

    return [[of(index, agent) for agent in range(table.config.num_agents)] for index in range(table.num_envs)]


def make_expert(env: "gym.Env") -> Any:
    """The task's scripted expert: `act() -> [float32[a] per agent]` and `phases() -> [str per agent]`.

    Raises:
        UserError: several parallel environments; the expert reads one.
    """
    from robofactory.sim.task import find_task

    table: Any = env.unwrapped
    if table.num_envs != 1:
        raise UserError(f"the expert drives 1 environment, not {table.num_envs}")
    return find_task(table.config.task).make_expert(env)


def step(env: "gym.Env", actions: "Iterable[Action]") -> dict[str, Any]:
    """Execute an action of each agent, in their order; what the task's `evaluate` returns.

    Of parallel environments, the actions of each agent are float32 [b, a].
    """
    table: Any = env.unwrapped
    return env.step(table.as_maniskill(actions))[-1]


def check_scene(scene: SceneConfig, source: str) -> None:
    """Raises UserError, naming `source` and the key, unless the scene has what its task needs."""
    from robofactory.sim.task import find_task

    task = find_task(scene.task, source)
    for section, present, needed in (
        ("objects", scene.objects, task.objects),
        ("success", scene.success, task.success),
    ):
        for name in needed:
            if name not in present:
                raise UserError(f"{source}: key '{section}.{name}' is missing; {scene.task} needs it")
        for name in present:
            if name not in needed:
                raise UserError(f"{source}: unknown key '{section}.{name}'; {scene.task} has {', '.join(needed)}")
    if scene.num_agents != task.num_agents:
        raise UserError(f"{source}: key 'robots': {scene.task} takes {task.num_agents}, got {scene.num_agents}")


def main() -> None:
    parser = arguments.Parser(
        prog="robofactory preview",
        description="Draw what every camera of a scene sees, one labelled PNG.",
        epilog="example: robofactory preview --render scene.png --seed 7 --steps 20 visual_detail=low",
    )
    parser.add_argument("--config", type=arguments.path, help="the scene file (default: that of --task)")
    parser.add_argument("--task", type=arguments.name, default="LiftBarrier-rf", help="(default: %(default)s)")
    parser.add_argument(
        "--render",
        type=arguments.path,
        default="preview.png",
        metavar="PNG",
        help="file to write (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=arguments.whole(0, arguments.LAST_SEED), default=0, help="of the layout (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=arguments.whole(0), default=0, help="of the expert before the picture (default: %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the scene file")
    args = parser.parse_args()
    if args.render.suffix != ".png":
        raise UserError(f"--render {args.render}: the picture is a .png")
    if not args.render.absolute().parent.is_dir():
        raise UserError(f"--render {args.render}: no such directory")

    path = args.config or scene_file(args.task)
    scene = load_scene(path, args.overrides)
    check_scene(scene, str(path))
    env = make_env(scene)
    env.reset(seed=args.seed)
    expert = make_expert(env)
    table: Any = env.unwrapped
    for _ in range(args.steps):
        step(env, expert.act())

    from PIL import Image

    from robofactory.sim.cameras import label_grid, view_cameras

    views = {
        uid: f"{view} of agent {agent}" if "{agent}" in scene.views[view] else view
        for agent in range(scene.num_agents)
        for view, uid in view_cameras(scene, agent).items()
    }
    pictures = {f"{views[uid]}  ({uid})": picture[0].cpu().numpy() for uid, picture in table.pictures().items()}
    Image.fromarray(label_grid(pictures)).save(args.render)
    print(f"{args.render}: {len(pictures)} cameras of {scene.task}, seed {args.seed}, after {args.steps} steps")


if __name__ == "__main__":
    run_command(main)
