"""Play a task in simulation with trained policies and report how often they succeed.

Every agent of the task acts by its own checkpoint, one policy call per control step; or one does, beside the scripted
expert. Several episodes run side by side, and the policies answer them in batches. Results, videos and a report that
opens without a network land in one directory.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robofactory import arguments as read
from robofactory.config import (
    FIRST_EVALUATION_SEED,
    SceneConfig,
    Within,
    choose_device,
    load_task_scene,
    look_differences,
    overridden,
    require_agent,
    to_yaml,
    with_look,
)
from robofactory.errors import UserError, run_command
from robofactory.paths import expert_results_dir, find_checkpoints, results_dir

if TYPE_CHECKING:
    from robofactory.evaluation.asked_ablations import Ablation

EXPERT = "expert"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = read.Parser(
        prog="robofactory evaluate",
        description=__doc__,
        epilog="""\
examples:
  bash eval.sh --policy openvla --task LiftBarrier-rf \\
      --config robofactory/configs/table/lift_barrier.yaml --checkpoint epoch_300
  bash eval.sh --task LiftBarrier-rf --checkpoint latest --partner expert --agent_id 0    agent 0 beside the expert
  bash eval.sh --task LiftBarrier-rf --policy expert --videos 2                           the expert: a sanity check
  bash eval.sh --task LiftBarrier-rf --until 5 --ablate blackout action_delay_steps=1     what success rests on
  bash eval.sh --task LiftBarrier-rf --checkpoint 'my/runs/LiftBarrier-rf_Agent{agent}_150/epoch_8'

ablations, each played on the same seeds as the unchanged evaluation (without =VALUE: as given here; of a view: each):
  blackout=VIEW  freeze=VIEW       pictures of a camera all black; or always the first of the episode
  instruction='open the drawer'    other words
  action_noise_rad=0.02            standard deviation of white noise on the joint targets of the policies
  action_delay_steps=2             the policies' actions are executed this many steps late
  light=0.5  lamp_turn_deg=90      all light this many times as strong; lamps turned about the vertical
  camera_shift_m=0.02  camera_turn_deg=2    each camera by so much, in a random direction in every episode

Any key of the scene may be overridden, for instance success.max_tilt_deg=5. What cameras see is as the policy was
trained (cameras, lighting, visual_detail, shader, meshes), but for what is overridden.""",
    )
    add = parser.add_argument
    add(
        "--policy",
        default="openvla",
        choices=["openvla", EXPERT],
        help="kind of policy, or the scripted expert for every agent (default: openvla)",
    )
    add("--task", type=read.name, required=True, help="for instance LiftBarrier-rf")
    add("--config", type=read.path, help="scene of the task, .yaml (default: the task's own)")
    add(
        "--checkpoint",
        type=read.checkpoint,
        help="epoch_N, latest, or the path of a checkpoint directory (it has a '/'), where '{agent}' stands for the "
        "agent's number (default: latest)",
    )
    add(
        "--data_num",
        type=read.whole(1),
        help="demonstrations the policies were trained on, the end of the run's name (default: the only one there is)",
    )
    add(
        "--dataset",
        help="of policies that were trained on several: whose statistics they act by; '{agent}' stands for the agent's "
        "number (default: the only one there is)",
    )
    add("--partner", choices=[EXPERT], help="the scripted expert drives all agents but --agent_id")
    add("--agent_id", type=read.whole(0), help="with --partner: the agent that its policy drives")
    add(
        "--episodes",
        type=read.whole(1, 1_000_000),
        help="how many, one per seed (default: 50; with --until the most that could be needed)",
    )
    add(
        "--until",
        metavar="±POINTS",
        help="stop after the first seed that makes the 95 %% interval no wider than this to each side, for instance ±5 "
        "or 5; an interval that decides itself when to stop covers the true rate a little less often",
    )
    add("--ablate", nargs="+", action="extend", default=[], metavar="NAME[=VALUE]", help="play this too; see below")
    add(
        "--seed",
        type=read.whole(FIRST_EVALUATION_SEED, read.LAST_SEED - 1_000_000, below="those below are the demonstrations'"),
        default=FIRST_EVALUATION_SEED,
        help="of the first episode; demonstrations have those below 10000 (default: 10000)",
    )
    add(
        "--max_steps", type=read.whole(1), help="control steps after which an episode has failed (default: the scene's)"
    )
    add(
        "--temperature",
        type=read.number(Within("[0, inf)", "at least 0")),
        default=0.0,
        help="0 takes the likeliest action token, above samples (default: 0)",
    )
    add(
        "--time_limit",
        type=read.number(Within("(0, 1e6]")),
        default=600.0,
        metavar="SECONDS",
        help="a process that hangs for this long is killed, and its episode has timed out (default: 600)",
    )
    add("--workers", type=read.whole(1, read.MOST_WORKERS), help="processes that simulate (default: one for each core)")
    add(
        "--batch",
        type=read.whole(1, 10_000),
        help="episodes in one batch for the policies; on the CPU, as many others are simulated meanwhile (default: 4; "
        "8 on a GPU)",
    )
    add(
        "--simulator",
        default="cpu",
        choices=["cpu", "gpu"],
        help="where physics runs. gpu: --batch episodes at a time in ManiSkill's parallel simulation, pictures too; where "
        "policies drive every agent (default: cpu)",
    )
    add("--device", type=read.device, help="where the policies run: cpu, cuda (default: cuda if there is one)")
    add(
        "--output",
        type=read.path,
        help="directory for results (default: robofactory/results/POLICY/TASK_NUM/CHECKPOINT)",
    )
    add(
        "--videos",
        type=read.whole(0),
        default=8,
        help="episodes whose video is kept: the worst, the best, then other failures before successes (default: 8)",
    )
    add("overrides", nargs="*", metavar="section.key=value", help="override the scene")
    args = parser.parse_intermixed_args(arguments)
    of_policies = ("checkpoint", "data_num", "dataset", "batch", "device")
    if args.policy == EXPERT and (given := [name for name in of_policies if getattr(args, name) is not None]):
        raise UserError(f"--policy expert has no use for --{given[0]}; omit it")
    args.checkpoint = args.checkpoint or "latest"
    if args.simulator == "gpu" and args.workers is not None:
        raise UserError(f"--workers {args.workers}: --simulator gpu has one process; give --batch, or use cpu")
    if args.until is not None:
        args.until = half_width(args.until)
    return args


def half_width(text: str) -> float:
    """What `±5` or `5` asks for, in points."""
    try:
        points = float(text.removeprefix("±"))
    except ValueError:
        points = 0.0
    if not 0 < points <= 50:
        raise UserError(f"--until {text}: expected points above 0 and at most 50, such as ±5")
    return points


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from robofactory import files
    from robofactory.evaluation.asked_ablations import read_ablations

    scene = load_task_scene(args.task, args.config, args.overrides)
    learned = learned_agents(scene, args.policy, args.partner, args.agent_id)
    ablated = read_ablations(args.ablate, scene, bool(learned))
    if args.simulator == "gpu":
        require_lockstep(scene.num_agents - len(learned), ablated)
    checkpoints = find_checkpoints(args.policy, args.task, learned, args.checkpoint, args.data_num)
    root = args.output or results_root(args.policy, args.task, checkpoints, args.checkpoint)
    with files.owned(root / directory_name(learned, scene.num_agents)):
        evaluate(args, scene, checkpoints, ablated, root)


def evaluate(
    args: argparse.Namespace, scene: SceneConfig, checkpoints: dict[int, Path], ablated: "list[Ablation]", root: Path
) -> None:
    """Play what is asked for, as it is and with each ablation, below `root`; report it.

    Args:
        checkpoints: of the agents that learned policies drive.
    """
    from robofactory.evaluation import (
        ablations,
        checkpoints_report,
        looking,
        paired_report,
        playing,
        report,
        results,
        rollout,
    )
    from robofactory.html.page import spared
    from robofactory.policy import Policies, digest_of_weights
    from robofactory.sim.env import require_gpu_physics

    num_episodes = args.episodes or (results.episodes_enough(args.until) if args.until else 50)

    # ---- what they see
    learned = list(checkpoints)
    if args.simulator == "gpu":
        require_gpu_physics()
    device, num_workers, num_threads = hardware(
        args.device, 1 if args.simulator == "gpu" else args.workers, bool(learned)
    )
    batch_size = (args.batch or (8 if device.startswith("cuda") else 4)) if learned else 1
    datasets = {agent: args.dataset and args.dataset.replace("{agent}", str(agent)) for agent in checkpoints}
    policies = Policies.load(checkpoints, batch_size, device, args.temperature, datasets) if learned else None
    codecs = {} if policies is None else policies.codecs
    scene = scene_as_trained(scene, {agent: codec.look for agent, codec in codecs.items()}, args.overrides)
    if args.max_steps:
        scene = dataclasses.replace(scene, max_episode_steps=args.max_steps)
    per_agent = [checkpoints.get(agent) for agent in range(scene.num_agents)]
    protocol = results.Protocol(
        task=scene.task,
        policy=args.policy,
        checkpoint=checkpoint_name(checkpoints, args.checkpoint) if learned else None,
        drivers=[args.policy if agent in checkpoints else EXPERT for agent in range(scene.num_agents)],
        checkpoints=[None if path is None else str(path) for path in per_agent],
        fingerprints=[codecs[agent].fingerprint if agent in codecs else None for agent in range(scene.num_agents)],
        weights=[None if path is None else digest_of_weights(path) for path in per_agent],
        first_seed=args.seed,
        num_episodes=num_episodes,
        until=args.until,
        max_steps=scene.max_episode_steps,
        temperature=args.temperature,
        batch_size=batch_size,
        ablation=None,
        scene=to_yaml(scene),
        simulator=args.simulator,
        renderer=results.renderer(),
        device=results.device_name(device),
        versions=results.versions(),
    )

    # ---- play what is not played yet: as it is, and on the same seeds each ablation
    directory = root / directory_name(learned, scene.num_agents)
    plan = rollout.Plan(scene, learned, None, num_threads)
    play = partial(
        playing.play, num_workers=num_workers, time_limit_s=args.time_limit, policies=policies, num_videos=args.videos
    )
    evaluation = play(protocol, plan, directory)
    if policies is not None and args.simulator == "cpu":  # a GPU does not repeat an episode to the bit
        looking.look_at_best_and_worst(evaluation, plan, directory, num_workers, args.time_limit, policies)
    same_seeds = dataclasses.replace(protocol, num_episodes=len(evaluation.episodes), until=None)
    for ablation in ablated:
        play(
            dataclasses.replace(same_seeds, ablation=str(ablation)),
            dataclasses.replace(plan, ablation=ablation),
            directory / ablations.ABLATIONS / ablation.directory,
        )

    # ---- report: everything is on the disk, so nothing that is drawn of it can be a reason to fail
    print(f"\n{report.as_text(evaluation)}")
    if compared := paired_report.ablations_of(directory, evaluation):
        print(f"\n{paired_report.as_text(evaluation, compared)}")
    print(f"\nepisodes, videos: {directory}")
    results_of_runs = root.parent if learned and not args.output else None  # of all checkpoints
    with spared("the report", print):
        print(f"report: {report.write_report_of_root(root, results_of_runs)}")
    if results_of_runs is not None:
        with spared("the report over checkpoints", print):
            print(f"over checkpoints: {checkpoints_report.write_report(results_of_runs)}")


# --------------------------------------------------------------------------------------------------- who drives whom


def learned_agents(scene: SceneConfig, policy: str, partner: str | None, agent_id: int | None) -> list[int]:
    """The agents that a checkpoint drives; the expert has the others."""
    if (partner is None) != (agent_id is None):
        raise UserError(
            "--partner expert and --agent_id go together: the agent acts by its policy, the expert for others"
        )
    if policy == EXPERT:
        if partner is not None:
            raise UserError("--policy expert drives every agent already; omit --partner and --agent_id")
        return []
    if agent_id is None:
        return list(range(scene.num_agents))
    require_agent(scene, agent_id)
    return [agent_id]


def require_lockstep(num_experts: int, ablations: "Sequence[Ablation]") -> None:
    """Raises UserError for what parallel simulation cannot do."""
    if num_experts:
        raise UserError("--simulator gpu: the expert reads one environment; use cpu, or let policies drive every agent")
    for ablation in ablations:
        if ablation.kind.has_scene_per_episode:
            raise UserError(f"--simulator gpu: {ablation} changes the scene from episode to episode; play it on cpu")


def checkpoint_name(checkpoints: dict[int, Path], asked: str) -> str:
    """`epoch_N` where every agent has the same, also when `latest` was asked for."""
    names = {path.name for path in checkpoints.values()}
    return names.pop() if len(names) == 1 else Path(asked).name


def results_root(policy: str, task: str, checkpoints: dict[int, Path], asked: str) -> Path:
    """Where the evaluations of these checkpoints lie side by side under one report."""
    if not checkpoints:
        return expert_results_dir(task)
    runs = [path.parent.name for path in checkpoints.values()]
    numbers = {match[1] for match in (re.fullmatch(rf"{re.escape(task)}_Agent\d+_(\d+)", run) for run in runs) if match}
    if len(numbers) != 1:
        raise UserError(f"{runs[0]} is not named {task}_Agent0_150 or alike; say with --output where the results go")
    return results_dir(policy, task, int(numbers.pop()), checkpoint_name(checkpoints, asked))


def directory_name(learned: list[int], num_agents: int) -> str:
    if not learned:
        return "expert"
    return "all_agents" if len(learned) == num_agents else f"agent{learned[0]}_beside_expert"


# --------------------------------------------------------------------------------------------------- what they see


def scene_as_trained(scene: SceneConfig, looks: dict[int, dict[str, Any]], overrides: Sequence[str]) -> SceneConfig:
    """The scene rendered as the policies were trained, except for what the user asked for in so many words.

    Raises:
        UserError: the policies were trained on different looks: no scene suits both.
    """
    if not looks:
        return scene
    (first, as_trained), *others = ((agent, with_look(scene, look)) for agent, look in looks.items())
    for agent, other in others:
        if differ := look_differences(as_trained, other):
            raise UserError(
                f"agent {first} was trained on pictures with {describe(as_trained)}, agent {agent} with "
                f"{describe(other)}; they differ in {', '.join(differ)}: train both alike, or evaluate each beside the "
                "expert (--partner expert --agent_id K)"
            )
    if not looks[first]:
        print(f"warning: the policies do not say what pictures they were trained on; rendering with {describe(scene)}")
        return scene
    asked = overridden(as_trained, overrides)
    if differ := look_differences(as_trained, asked):
        print(
            f"warning: rendering with {describe(asked)} as asked; trained with {describe(as_trained)}: other "
            f"{', '.join(differ)}"
        )
    else:
        unused = look_differences(scene, asked)
        print(
            f"rendering as in training: {describe(asked)}"
            + (f"; the scene's own {', '.join(unused)} not used" if unused else "")
        )
    return asked


def describe(scene: SceneConfig) -> str:
    """How its pictures look, in a few words."""
    shown = {pattern.format(agent=agent) for pattern in scene.views.values() for agent in range(scene.num_agents)}
    sizes = sorted({f"{camera.width}x{camera.height}" for camera in scene.cameras if camera.uid in shown})
    return f"{scene.visual_detail} detail, {scene.shader} shader, {' and '.join(sizes)} px"


# ------------------------------------------------------------------------------------------------------------- play


def hardware(device: str | None, workers: int | None, has_policies: bool) -> tuple[str, int, int]:
    """Device of the policies, number of processes that simulate, threads in each; sets those of the policies."""
    import torch

    device = choose_device(device)
    cores = len(os.sched_getaffinity(0))
    workers = workers or cores
    num_threads = max(1, cores // workers)
    if has_policies:  # while they answer one half of the episodes, the other half is stepped
        torch.set_num_threads(max(1, cores // 2))
    for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):  # of numpy and torch; of Mesa's software renderer
        os.environ.setdefault(name, str(num_threads))
    return device, workers, num_threads


if __name__ == "__main__":
    run_command(main)
