"""An evaluation by its protocol: what is played already is kept, what is missing is played, some videos are kept."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from robofactory import files
from robofactory.errors import UserError, shown
from robofactory.evaluation import parallel, workers
from robofactory.evaluation.results import (
    EPISODES,
    SUCCESS,
    SUMMARY,
    VIDEOS,
    EpisodeResult,
    Evaluation,
    Protocol,
    load,
    save,
)
from robofactory.evaluation.rollout import Plan, Rollout, video_name
from robofactory.policy import Policies

PlayEpisodes = Callable[[Sequence[int]], Iterator[EpisodeResult]]  # of these seeds, in the order they end


def play(
    protocol: Protocol,
    plan: Plan,
    directory: Path,
    num_workers: int,
    time_limit_s: float,
    policies: Policies | None,
    num_videos: int,
) -> Evaluation:
    """Play what is not played yet, keep so many videos, and save all in the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (EPISODES, SUMMARY):
        files.remove_leftovers(directory / name)
    at_most = "" if protocol.until is None else f", or until ±{protocol.until:g} points"
    on_gpu = protocol.simulator == "gpu"
    where = f"{protocol.batch_size} at a time on the GPU" if on_gpu else f"in {num_workers} processes"
    title = shown(protocol.title)
    print(f"{title}: {protocol.num_episodes} episodes of {protocol.task}{at_most}, {where}, into {directory}")
    plan = dataclasses.replace(plan, directory=directory if num_videos else None)

    def play_episodes(seeds: Sequence[int]) -> Iterator[EpisodeResult]:
        if on_gpu:
            assert policies is not None, "parallel simulation is for policies"
            setup = partial(parallel.Lockstep, plan, policies.num_rows)
            return parallel.play_episodes(setup, seeds, time_limit_s, policies)
        return workers.play_episodes(partial(Rollout, plan), seeds, num_workers, time_limit_s, policies)

    evaluation = play_missing(protocol, episodes_played(directory, protocol), directory, play_episodes)
    evaluation = keep_videos(evaluation, directory, num_videos)
    save(evaluation, directory)
    return evaluation


def episodes_played(directory: Path, protocol: Protocol) -> list[EpisodeResult]:
    """The episodes of this protocol that an earlier evaluation has played; how many it was to play does not matter.

    Those that crashed or timed out are played again: less memory in use, or a higher --time_limit, may have mended it.

    Raises:
        UserError: the directory holds an evaluation by another protocol, or one that cannot be read.
    """
    if not (directory / SUMMARY).exists():
        return []
    instead = "move it away or delete it, or say with --output where this one goes"
    try:
        earlier = load(directory)
    except UserError as error:
        raise UserError(f"{error}: {instead}") from None
    differences = [name for name in earlier.protocol.differences(protocol) if name not in ("num_episodes", "until")]
    if differences:
        raise UserError(f"{directory} holds an evaluation that differs in {', '.join(differences)}; {instead}")
    played = [episode for episode in earlier.episodes if episode.seed in protocol.seeds]
    done = [episode for episode in played if episode.is_judged]
    again = f"; {len(played) - len(done)} that crashed or timed out are played again" if len(done) < len(played) else ""
    print(f"{len(done)} episodes of this evaluation are done already (delete {directory} to play them again){again}")
    return done


def play_missing(
    protocol: Protocol, done: list[EpisodeResult], directory: Path, play_episodes: PlayEpisodes
) -> Evaluation:
    """The whole evaluation; what is complete is on disk after every episode.

    With `until` it ends with the first seed that is enough; episodes that others were ahead with are dropped.
    """
    evaluation = Evaluation(protocol, list(done))
    if evaluation.stopped is not None:
        return evaluation.stopped
    played = {episode.seed for episode in done}
    remove_videos(directory, keep={episode.video for episode in done})
    seeds = [seed for seed in protocol.seeds if seed not in played]
    bar = tqdm(total=protocol.num_episodes, initial=len(done), unit="episode", dynamic_ncols=True, disable=None)
    with bar:
        for episode in play_episodes(seeds):
            if not episode.is_judged:
                tqdm.write(shown(f"seed {episode.seed}, {episode.outcome}: {episode.reason}"))
                if (directory / video_name(episode.seed)).exists():
                    episode = dataclasses.replace(episode, video=video_name(episode.seed))
            episodes = sorted([*evaluation.episodes, episode], key=lambda episode: episode.seed)
            evaluation = Evaluation(protocol, episodes)
            save(evaluation.stopped or evaluation, directory)
            rate = f"success {evaluation.count(SUCCESS)}/{len(evaluation.judged)}"
            bar.set_postfix_str(rate)
            bar.update()
            if bar.disable and len(episodes) % 10 == 0:  # piped into a file: a line now and then
                print(f"{len(episodes)}/{protocol.num_episodes} episodes, {rate}", flush=True)
            if evaluation.stopped is not None:
                return evaluation.stopped
    return evaluation


def keep_videos(evaluation: Evaluation, directory: Path, num_videos: int) -> Evaluation:
    """Delete all videos but so many: of the worst episode, the best, those not judged, other failures, other successes."""
    worst_first = evaluation.best_to_worst[::-1]
    order = [*worst_first[:1], *worst_first[-1:], *(e for e in evaluation.episodes if not e.is_judged), *worst_first]
    kept = set(list(dict.fromkeys(episode.video for episode in order if episode.video))[:num_videos])
    remove_videos(directory, keep=kept)
    episodes = [e if e.video in kept else dataclasses.replace(e, video=None) for e in evaluation.episodes]
    return Evaluation(evaluation.protocol, episodes)


def remove_videos(directory: Path, keep: Collection[str | None]) -> None:
    for path in (directory / VIDEOS).glob("*.mp4"):
        if f"{VIDEOS}/{path.name}" not in keep:
            path.unlink()
