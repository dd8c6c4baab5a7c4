"""Play a task in simulation with trained policies and report how often they succeed.

Every agent of the task acts by its own checkpoint, one policy call per control step; or one does, beside the scripted
expert. Several episodes run side by side, and the policies answer them in batches. Results, videos and a report that opens without a network land in one directory.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robofactory.config import (
    SceneConfig,
    UserError,
    expert_results_dir,
    find_checkpoints,
    load_task_scene,
    look_of,
    require_agent,
    results_dir,
    run_command,
    to_yaml,
    with_look,
)

if TYPE_CHECKING:
    from robofactory.evaluation.results import EpisodeResult, Evaluation, Protocol
    from robofactory.evaluation.workers import Setup
    from robofactory.policy import Policies

EXPERT = "expert"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="eval.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  bash eval.sh --policy openvla --task LiftBarrier-rf \\
      --config robofactory/configs/table/lift_barrier.yaml --checkpoint epoch_300
  bash eval.sh --task LiftBarrier-rf --checkpoint latest --partner expert --agent_id 0    agent 0 beside the expert
  bash eval.sh --task LiftBarrier-rf --policy expert --videos 2                           the expert: a sanity check
  bash eval.sh --task LiftBarrier-rf --checkpoint 'my/runs/LiftBarrier-rf_Agent{agent}_150/epoch_8'

Any key of the scene may be overridden, for instance success.max_tilt_deg=5. Pictures are rendered as the policy was
trained unless visual_detail or shader is overridden.""",
    )
    add = parser.add_argument
    add(
        "--policy",
        default="openvla",
        choices=["openvla", EXPERT],
        help="kind of policy, or the scripted expert for every agent (default: openvla)",
    )
    add("--task", required=True, help="for instance LiftBarrier-rf")
    add("--config", help="scene of the task, .yaml (default: the task's own)")
    add(
        "--checkpoint",
        default="latest",
        help="epoch_N, latest, or the path of a checkpoint directory (it has a '/'), where '{agent}' stands for the "
        "agent's number (default: latest)",
    )
    add(
        "--data_num",
        type=int,
        help="demonstrations the policies were trained on, the end of the run's name (default: the only one there is)",
    )
    add(
        "--dataset",
        help="of policies that were trained on several: whose statistics they act by; '{agent}' stands for the agent's "
        "number (default: the only one there is)",
    )
    add("--partner", choices=[EXPERT], help="the scripted expert drives all agents but --agent_id")
    add("--agent_id", type=int, help="with --partner: the agent that its policy drives")
    add("--episodes", type=int, default=50, help="how many, one a seed (default: 50)")
    add(
        "--seed",
        type=int,
        default=10_000,
        help="of the first episode; demonstrations have those below 10000 (default: 10000)",
    )
    add("--max_steps", type=int, help="control steps after which an episode has failed (default: the scene's)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest action token, above samples (default: 0)")
    add("--workers", type=int, help="processes that simulate (default: one a core)")
    add(
        "--batch",
        type=int,
        help="episodes that the policies answer together, of twice as many (default: 4; 8 on a GPU)",
    )
    add("--device", help="where the policies run: cpu, cuda (default: cuda if there is one)")
    add("--output", type=Path, help="directory for results (default: robofactory/results/POLICY/TASK_NUM/CHECKPOINT)")
    add("--videos", type=int, default=8, help="episodes whose video is kept, failures before successes (default: 8)")
    add("overrides", nargs="*", metavar="section.key=value", help="override the scene")
    args = parser.parse_intermixed_args(arguments)
    for name, least in {"episodes": 1, "videos": 0, "temperature": 0, "max_steps": 1, "workers": 1, "batch": 1}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be {least} or more")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from robofactory.evaluation import report, results, rollout
    from robofactory.policy import Policies, digest_of_weights

    results.require_unseen_seeds(args.seed, args.episodes)

    # ---- who drives whom, and what they see
    scene = load_task_scene(args.task, args.config, args.overrides)
    learned = learned_agents(scene, args.policy, args.partner, args.agent_id)
    checkpoints = find_checkpoints(args.policy, args.task, learned, args.checkpoint, args.data_num)
    root = args.output or results_root(args.policy, args.task, checkpoints, args.checkpoint)
    device, num_workers, num_threads = hardware(args.device, args.workers, bool(learned))
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
        num_episodes=args.episodes,
        max_steps=scene.max_episode_steps,
        temperature=args.temperature,
        batch_size=batch_size,
        scene=to_yaml(scene),
        renderer=results.renderer(),
        versions=results.versions(),
    )

    # ---- play what is not played yet
    directory = root / directory_name(learned, scene.num_agents)
    directory.mkdir(parents=True, exist_ok=True)
    print(f"{protocol.title}: {args.episodes} episodes of {scene.task} in {num_workers} processes, into {directory}")
    plan = rollout.Plan(scene, learned, directory if args.videos else None, num_threads)
    done = episodes_played(directory, protocol)
    evaluation = play(protocol, done, directory, partial(rollout.Rollout, plan), num_workers, policies)

    # ---- keep some videos, report
    evaluation = keep_videos(evaluation, directory, args.videos)
    results.save(evaluation, directory)
    html = report.write_report_of_root(root)
    print(f"\n{report.as_text(evaluation)}\n\nepisodes, videos: {directory}\nreport: {html}")


# --------------------------------------------------------------------------------------------------- who drives whom


def learned_agents(scene: SceneConfig, policy: str, partner: str | None, agent_id: int | None) -> list[int]:
    """The agents that a checkpoint drives; the expert has the others."""
    if (partner is None) != (agent_id is None):
        raise UserError(
            "--partner expert and --agent_id go together: the agent acts by its policy, the expert for others"
        )
    if policy == EXPERT:
        if partner is not None:
            raise UserError("--policy expert drives every agent already; leave --partner and --agent_id away")
        return []
    if agent_id is None:
        return list(range(scene.num_agents))
    require_agent(scene, agent_id)
    return [agent_id]


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
    (first, look), *others = looks.items()
    for agent, other in others:
        if other != look:
            raise UserError(
                f"agent {first} was trained on pictures with {describe(look)}, agent {agent} with {describe(other)}; "
                f"train both alike, or evaluate each beside the expert (--partner expert --agent_id K)"
            )
    if not look:
        given = describe(look_of(scene))
        print(f"warning: the policies do not say what pictures they were trained on; rendering with {given}")
        return scene
    asked = {override.partition("=")[0] for override in overrides} & {"visual_detail", "shader"}
    trained = with_look(scene, look)
    scene = dataclasses.replace(trained, **{key: getattr(scene, key) for key in asked})
    if scene == trained:
        print(f"rendering as in training: {describe(look)}")
    else:
        print(f"warning: rendering with {describe(look_of(scene))} as asked; trained with {describe(look)}")
    return scene


def describe(look: dict[str, Any]) -> str:
    if not look:
        return "an unknown look"
    sizes = sorted({f"{width}x{height}" for width, height in look["camera_sizes"].values()})
    return f"{look['visual_detail']} detail, {look['shader']} shader, {' and '.join(sizes)} px"


# ------------------------------------------------------------------------------------------------------------- play


def hardware(device: str | None, workers: int | None, has_policies: bool) -> tuple[str, int, int]:
    """Device of the policies, number of processes that simulate, threads in each; sets those of the policies."""
    import torch

    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: there is no CUDA GPU; leave it away, or use cpu")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cores = len(os.sched_getaffinity(0))
    workers = workers or cores
    num_threads = max(1, cores // workers)
    if has_policies:  # while they answer one half of the episodes, the other half is stepped
        torch.set_num_threads(max(1, cores // 2))
    for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):  # of numpy and torch; of Mesa's software renderer
        os.environ.setdefault(name, str(num_threads))
    return device, workers, num_threads


def episodes_played(directory: Path, protocol: "Protocol") -> "list[EpisodeResult]":
    """The episodes that an earlier evaluation by the same protocol has already played; all of them if it was complete."""
    from robofactory.evaluation import results

    if not (directory / results.SUMMARY).exists():
        return []
    try:
        earlier = results.load(directory)
    except UserError:  # of another version: its numbers are replaced
        return []
    if earlier.protocol != protocol:
        return []
    print(
        f"{len(earlier.episodes)} episodes of this evaluation are done already (delete {directory} to play them again)"
    )
    return earlier.episodes


def play(
    protocol: "Protocol",
    done: "list[EpisodeResult]",
    directory: Path,
    setup: "Setup",
    num_workers: int,
    policies: "Policies | None" = None,
) -> "Evaluation":
    """The whole evaluation; what is complete is on disk after every episode."""
    from tqdm import tqdm

    from robofactory.evaluation import results, rollout, workers

    episodes = list(done)
    played = {episode.seed for episode in done}
    remove_videos(directory, keep={episode.video for episode in done})
    seeds = [seed for seed in protocol.seeds if seed not in played]
    bar = tqdm(total=protocol.num_episodes, initial=len(done), unit="episode", dynamic_ncols=True, disable=None)
    with bar:
        for episode in workers.play_episodes(setup, seeds, num_workers, policies):
            if episode.outcome == results.CRASH:
                tqdm.write(f"seed {episode.seed} crashed: {episode.reason}")
                if (directory / rollout.video_name(episode.seed)).exists():
                    episode = dataclasses.replace(episode, video=rollout.video_name(episode.seed))
            episodes = sorted([*episodes, episode], key=lambda episode: episode.seed)
            evaluation = results.Evaluation(protocol, episodes)
            results.save(evaluation, directory)
            rate = f"success {evaluation.count(results.SUCCESS)}/{len(evaluation.judged)}"
            bar.set_postfix_str(rate)
            bar.update()
            if bar.disable and len(episodes) % 10 == 0:  # piped into a file: a line now and then
                print(f"{len(episodes)}/{protocol.num_episodes} episodes, {rate}", flush=True)
    return results.Evaluation(protocol, episodes)


def keep_videos(evaluation: "Evaluation", directory: Path, num_videos: int) -> "Evaluation":
    """Delete all videos but so many: crashes and failures first, yet a quarter successes if there are."""
    from robofactory.evaluation import results

    filmed = [episode for episode in evaluation.episodes if episode.video]
    good = [episode.video for episode in filmed if episode.outcome == results.SUCCESS]
    bad = [episode.video for episode in filmed if episode.outcome != results.SUCCESS]
    num_bad = min(len(bad), num_videos - min(len(good), num_videos // 4))
    kept = set(bad[:num_bad] + good[: num_videos - num_bad])
    remove_videos(directory, keep=kept)
    episodes = [e if e.video in kept else dataclasses.replace(e, video=None) for e in evaluation.episodes]
    return results.Evaluation(evaluation.protocol, episodes)


def remove_videos(directory: Path, keep: set[str | None]) -> None:
    from robofactory.evaluation.results import VIDEOS

    for path in (directory / VIDEOS).glob("*.mp4"):
        if f"{VIDEOS}/{path.name}" not in keep:
            path.unlink()


if __name__ == "__main__":
    run_command(main)
