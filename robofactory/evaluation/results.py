"""What an evaluation says: one record per episode, the protocol that produced them, and the numbers over all of them.

On disk `{directory}/episodes.json` and `{directory}/summary.json`, both replaced atomically after every episode: an
interrupted evaluation keeps what was complete.
"""

import json
import math
import operator
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from robofactory import documents, files
from robofactory.config import PACKAGE
from robofactory.documents import Count, Document, PositiveCount
from robofactory.errors import UserError, shown
from robofactory.files import write_atomically
from robofactory.sim.task import tasks

SUCCESS, FAILURE, CRASH, TIME_OUT = "success", "failure", "crash", "timeout"
EPISODES, SUMMARY, VIDEOS = "episodes.json", "summary.json", "videos"
FORMAT_VERSION = 2
AGAIN = "evaluate again"
Z_95 = 1.959963984540054  # the 97.5 % point of the standard normal

# Of what is on disk; other fields are another version's.
WRITTEN = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", hide_input_in_errors=True)
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Amount = Annotated[float, Field(ge=0.0, le=1e12)]


def _one_of(*allowed: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return AfterValidator(check)


@dataclass(frozen=True)
class EpisodeResult:
    """One episode.

    outcome: "success" (the task's honest test), "failure" (the step limit came first), "crash" (an exception in the
        simulator or the policy) or "timeout" (nothing came back within the wall-clock limit, and the process was
        killed). The last two say nothing about the policy and are counted in no rate.
    seconds: wall time with rendering, video and policy.
    success_robofactory: RoboFactory's own, looser test was met at some step.
    phases: what the expert would do next, one per agent, at the last step; empty on a GPU, where it cannot look.
    failed_at: the part of the task where a failure ended, one of the task's stages per agent; else empty.
    reason: why it was no success, in words; for a crash the exception.
    measures: numbers of the task's `evaluate` at the last step (heights in m, tilt in degrees, ...).
    policy_ms, passes_per_action: means over the policies' actions, of wall time (a batch's is shared among its actions)
        and of passes through the language layers; None when the expert drove every agent.
    digest: sha256 over every state of the simulator, every picture a policy was shown and every action that was
        executed: equal if all of them are, to the last bit; empty for what is not judged.
    video: path below the evaluation's directory.
    """

    __pydantic_config__ = WRITTEN

    seed: Seed
    outcome: Annotated[str, _one_of(SUCCESS, FAILURE, CRASH, TIME_OUT)]
    steps: Count
    seconds: Amount
    success_robofactory: bool
    phases: list[str]
    failed_at: list[str]
    reason: str | None
    measures: dict[str, float]
    policy_ms: Amount | None
    passes_per_action: Amount | None
    digest: str
    video: str | None

    @property
    def is_judged(self) -> bool:
        """It ran to its end, so it says something about the policy."""
        return self.outcome in (SUCCESS, FAILURE)

    @property
    def is_success(self) -> bool:
        return self.outcome == SUCCESS


@dataclass(frozen=True)
class Protocol:
    """All that decides what happens in the episodes.

    The same protocol on the same machine repeats them to the bit, with the simulator on the CPU.
    """

    __pydantic_config__ = WRITTEN

    task: str
    policy: str
    checkpoint: str | None
    drivers: list[str]  # per agent: the policy's name, or "expert"
    checkpoints: list[str | None]  # per agent: the directory; None for the expert
    fingerprints: list[str | None]  # per agent: of preprocessing and statistics
    weights: list[str | None]  # per agent: sha256 over the weight files
    first_seed: Seed
    num_episodes: Count  # at most, with `until`
    until: (
        Annotated[float, Field(gt=0.0, le=50.0)] | None
    )  # stop once the 95 % interval is no wider than this to each side, in points
    max_steps: PositiveCount
    temperature: Annotated[float, Field(ge=0.0)]
    batch_size: PositiveCount  # episodes that the policies answer together; the size changes how sums are rounded
    ablation: str | None  # what `ablations.py` changes in these episodes
    scene: str  # YAML, before the ablation
    simulator: str  # where physics runs, "cpu" or "gpu": contacts are solved otherwise
    renderer: str
    device: str  # where the policies run: what decides how their sums are rounded
    versions: dict[str, str]

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.num_episodes)

    @property
    def title(self) -> str:
        learned = [agent for agent, driver in enumerate(self.drivers) if driver != "expert"]
        if not learned:
            who = "The scripted expert drives every agent"
        elif len(learned) == len(self.drivers):
            who = "All agents by their learned policies" if len(learned) > 1 else "The learned policy"
        else:
            named = ", ".join(str(agent) for agent in learned)
            who = f"Agent {named} by its learned policy, the expert beside it"
        return who if self.ablation is None else f"{who}, with {self.ablation}"

    def differences(self, other: "Protocol") -> list[str]:
        """The names of the fields that another one has otherwise; a commit alone changes nothing of an episode."""
        ours, theirs = (asdict(each) | {"versions": each.versions | {"commit": ""}} for each in (self, other))
        return [name for name in ours if ours[name] != theirs[name]]


@dataclass(frozen=True)
class Evaluation:
    protocol: Protocol
    episodes: list[EpisodeResult]  # by seed

    @property
    def is_complete(self) -> bool:
        stopped = self.stopped
        expected = self.protocol.seeds if stopped is None else stopped.seeds
        return len(self.seeds) == len(expected) and all(map(operator.eq, self.seeds, expected))

    @property
    def seeds(self) -> list[int]:
        """Those that were played."""
        return [episode.seed for episode in self.episodes]

    @property
    def stopped(self) -> "Evaluation | None":
        """Up to the first seed after which `until` is met; None while it is not.

        A question of the seeds in their order: it does not matter which episodes ended first, and what was played
        beyond is no part of the evaluation.
        """
        if self.protocol.until is None:
            return None
        successes = trials = 0
        for index, (episode, seed) in enumerate(zip(self.episodes, self.protocol.seeds, strict=False)):
            if episode.seed != seed:
                return None  # one before it is still being played
            successes, trials = successes + episode.is_success, trials + episode.is_judged
            low, high = wilson_interval(successes, trials)
            if 100 * (high - low) / 2 <= self.protocol.until:
                return Evaluation(self.protocol, self.episodes[: index + 1])
        return None

    def count(self, outcome: str) -> int:
        return sum(episode.outcome == outcome for episode in self.episodes)

    @property
    def judged(self) -> list[EpisodeResult]:
        """The episodes that ran to their end: those a rate is a rate of."""
        return [episode for episode in self.episodes if episode.is_judged]

    @property
    def stages(self) -> list[str]:
        """In the order of the task; of a task that is not here, in the order in which failures ended there."""
        task = tasks().get(self.protocol.task)
        return list(task.stages if task else dict.fromkeys(at for e in self.episodes for at in e.failed_at))

    @property
    def failed_at(self) -> dict[str, list[int]]:
        """Stage -> how many failures ended there, of each agent; stages where some did, in their order."""
        failures = [episode for episode in self.episodes if episode.outcome == FAILURE]
        agents = range(len(self.protocol.drivers))
        counts = {
            stage: [sum(e.failed_at[agent] == stage for e in failures) for agent in agents] for stage in self.stages
        }
        return {stage: numbers for stage, numbers in counts.items() if any(numbers)}

    @property
    def best_to_worst(self) -> list[EpisodeResult]:
        """The judged episodes: successes, the fastest first; then failures, those that came furthest first.

        How far a failure came is told by the agent that fell behind, then by all of them; after that by the seed.
        """
        order = self.stages

        def place(episode: EpisodeResult) -> tuple[Any, ...]:
            if episode.is_success:
                return (0, episode.steps, 0, episode.seed)
            stages = [order.index(stage) for stage in episode.failed_at]
            return (1, -min(stages), -sum(stages), episode.seed)

        return sorted(self.judged, key=place)

    @property
    def best_and_worst(self) -> dict[str, EpisodeResult]:
        """What they are called -> the episodes; of one judged episode the best alone, of none none."""
        if not (episodes := self.best_to_worst):
            return {}
        best, worst = episodes[0], episodes[-1]
        called = {f"Best: {'the fastest success' if best.is_success else 'the failure that came furthest'}": best}
        if len(episodes) > 1:
            called[f"Worst: {'the slowest success' if worst.is_success else 'the earliest failure'}"] = worst
        return called

    def summary(self) -> dict[str, Any]:
        """Rates with 95 % intervals, means over the judged episodes, and why the others failed."""
        judged = self.judged
        robofactory = sum(episode.success_robofactory for episode in judged)
        policy_ms = [episode.policy_ms for episode in judged if episode.policy_ms is not None]
        passes = [episode.passes_per_action for episode in judged if episode.passes_per_action is not None]
        return {
            "episodes": len(self.episodes),
            "successes": self.count(SUCCESS),
            "failures": self.count(FAILURE),
            "crashes": self.count(CRASH),
            "timeouts": self.count(TIME_OUT),
            "success": _rate(self.count(SUCCESS), len(judged)),
            "success_robofactory": _rate(robofactory, len(judged)),
            "mean_steps": _mean([episode.steps for episode in judged]),
            "mean_steps_of_successes": _mean([e.steps for e in judged if e.outcome == SUCCESS]),
            "mean_seconds": _mean([episode.seconds for episode in judged]),
            "mean_policy_ms": _mean(policy_ms),
            "mean_passes_per_action": _mean(passes),
            "failed_because": dict(Counter(e.reason for e in judged if e.outcome == FAILURE).most_common()),
            "failed_in_phases": dict(
                Counter(", ".join(e.phases) for e in judged if e.outcome == FAILURE and e.phases).most_common()
            ),
            "failed_at": self.failed_at,
            "crashed_because": dict(Counter(e.reason for e in self.episodes if not e.is_judged).most_common()),
        }


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The Wilson score interval for a proportion at 95 % confidence.

    Good for few trials and for rates near 0 and 1, where the normal approximation is not; (0, 1) for no trials.
    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    assert 0 <= successes <= trials, (successes, trials)
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    centre = rate + Z_95**2 / (2 * trials)
    half_width = Z_95 * math.sqrt(rate * (1 - rate) / trials + Z_95**2 / (4 * trials**2))
    scale = 1 + Z_95**2 / trials
    low = 0.0 if successes == 0 else (centre - half_width) / scale  # exact at the ends, no rounding residue
    high = 1.0 if successes == trials else (centre + half_width) / scale
    return low, high


def episodes_enough(half_width: float) -> int:
    """So many judged episodes make the 95 % interval no wider than this many points to each side, whatever the rate.

    Wilson's interval is widest at a rate of 1/2, and there z / (2 sqrt(n + z^2)) to each side.
    """
    return max(1, math.ceil(Z_95**2 * (2500 / half_width**2 - 1)))


def renderer() -> str:
    """The graphics device that draws the pictures."""
    import sapien

    summary = sapien.render.get_device_summary().strip().splitlines()
    return summary[0].strip() if summary else "none"


def device_name(device: str) -> str:
    """The device with the name of its chip and its number of threads."""
    import torch

    if device.startswith("cuda"):
        return f"{device}, {torch.cuda.get_device_name(device)}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{device}, {models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of the software that decides what happens in an episode."""
    packages = ("robofactory", "torch", "transformers", "timm", "numpy", "mani_skill", "sapien")
    found = {"python": platform.python_version(), "platform": platform.platform()} | {n: version(n) for n in packages}
    return found | {"commit": commit_of(PACKAGE.parent)}


def commit_of(checkout: Path) -> str:
    """Of the checkout itself: a package that is installed somewhere in another repository has none."""
    if not (checkout / ".git").exists():
        return "unknown"
    try:
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git here, or no commit yet
        return "unknown"


def save(evaluation: Evaluation, directory: Path) -> None:
    """Write both files; each is the old one or the new one at any moment."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / EPISODES, _json([asdict(episode) for episode in evaluation.episodes]))
    head = {"format_version": FORMAT_VERSION, "complete": evaluation.is_complete, "title": evaluation.protocol.title}
    write_atomically(
        directory / SUMMARY,
        _json({**head, "results": evaluation.summary(), "protocol": asdict(evaluation.protocol)}),
    )


class _Summary(Document):
    format_version: int
    protocol: dict[str, Any] = Field(default_factory=dict)


class _ThisSummary(Document):
    protocol: Protocol


def load(directory: Path) -> Evaluation:
    """The inverse of `save`, of whoever's results.

    Raises:
        UserError: a file is missing, cut short, of another version, or says what no evaluation does; the line names it.
    """
    summary, episodes = directory / SUMMARY, directory / EPISODES
    for path in (summary, episodes):
        if not path.exists():
            below = ", ".join(sorted(found.parent.name for found in directory.glob(f"[!.]*/{SUMMARY}")))
            raise UserError(
                f"no {path.name} in {directory}; it holds no evaluation{below and f', but these do: {shown(below)}'}"
            )
    text, listed = (files.read_text(path, documents.MAX_BYTES, AGAIN) for path in (summary, episodes))
    head = documents.parse_json(text, _Summary, str(summary), AGAIN)
    if head.format_version != FORMAT_VERSION:
        raise UserError(
            f"{summary} has format {head.format_version}, this version reads {FORMAT_VERSION}; evaluate again"
        )
    of_episodes = documents.parse_json(listed, list[dict[str, Any]], str(episodes), AGAIN)
    if set(head.protocol) != _names(Protocol) or any(set(each) != _names(EpisodeResult) for each in of_episodes):
        raise UserError(f"{directory} has other fields than this version writes; evaluate again")
    evaluation = Evaluation(
        documents.parse_json(text, _ThisSummary, str(summary), AGAIN).protocol,
        documents.parse_json(listed, list[EpisodeResult], str(episodes), AGAIN),
    )
    _require_consistent(evaluation, directory)
    return evaluation


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def _require_consistent(evaluation: Evaluation, directory: Path) -> None:
    """Raises UserError where what is said of agents and seeds does not go together."""
    protocol, seeds = evaluation.protocol, evaluation.seeds
    of_agents = {name: len(getattr(protocol, name)) for name in ("drivers", "checkpoints", "fingerprints", "weights")}
    wrong = None
    if len(set(of_agents.values())) > 1 or not protocol.drivers:
        wrong = (
            f"the protocol is not of one number of agents: {', '.join(f'{n} {name}' for name, n in of_agents.items())}"
        )
    for agent, path in enumerate(protocol.checkpoints):
        if not wrong and path is not None and None in (protocol.fingerprints[agent], protocol.weights[agent]):
            wrong = f"agent {agent} has a checkpoint without fingerprint or weights"
    for before, after in pairwise(seeds):
        if before >= after:
            wrong = wrong or f"seed {after} comes after {before}; each is there once, in order"
    stages = evaluation.stages
    for episode in evaluation.episodes:
        if episode.outcome == FAILURE and len(episode.failed_at) != len(protocol.drivers):
            wrong = wrong or f"the failure of seed {episode.seed} does not say of each agent where it failed"
        if unknown := [stage for stage in episode.failed_at if stage not in stages]:
            wrong = wrong or f"seed {episode.seed} failed at {unknown[0]!r}, which is none of {', '.join(stages)}"
    if wrong:
        raise UserError(f"{directory}: {wrong}; evaluate again")


def _rate(successes: int, trials: int) -> dict[str, Any]:
    return {
        "count": successes,
        "of": trials,
        "rate": successes / trials if trials else None,
        "interval_95": list(wilson_interval(successes, trials)),
    }


def _mean(values: Sequence[float | int]) -> float | None:
    return sum(values) / len(values) if values else None


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
