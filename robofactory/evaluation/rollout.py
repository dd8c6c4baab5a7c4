"""One episode: the simulator, who drives each agent, what an ablation changes, and the video.

An episode is a generator: it asks for the actions of learned policies and knows nothing of who answers.
"""

import hashlib
import math
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from robofactory.config import SceneConfig
from robofactory.evaluation import ablations
from robofactory.evaluation.ablations import Ablation
from robofactory.evaluation.failures import Progress, in_words
from robofactory.evaluation.results import FAILURE, SUCCESS, VIDEOS, EpisodeResult
from robofactory.shapes import Action, Observation

EXPERT = "expert"
NO_MEASURE = ("success", "success_robofactory", "elapsed_steps", "reached", "lifted", "level")  # told in other words
TILE_HEIGHT = 192  # px in a video; smaller camera images are enlarged to about this, by a whole factor
BAR, GAP = 18, 4  # px: height of a label, space between tiles
BACKGROUND, TEXT = (24, 26, 31), (226, 230, 236)


@dataclass(frozen=True)
class Plan:
    """What a worker process needs to build its simulators."""

    scene: SceneConfig  # its `max_episode_steps` is the step limit
    learned: list[int]  # the agents that policies drive; the scripted expert has the others
    directory: Path | None  # videos go below it; None: no videos
    num_threads: int
    ablation: Ablation | None = None  # what is different in every episode


@dataclass(frozen=True)
class Answer:
    """What the policies do next in an episode."""

    actions: dict[int, Action]  # by agent
    seconds: float  # this episode's share of the time it took
    num_passes: int  # through the language layers, of all agents


Play = Generator[list[Observation], Answer, EpisodeResult]  # asks with what every agent sees


class Rollout:
    """The simulators of a plan, one for each seat: where one episode is played at a time."""

    def __init__(self, plan: Plan):
        torch.set_num_threads(plan.num_threads)
        self.plan = plan
        self.is_seen = bool(plan.learned) or plan.directory is not None  # the expert alone needs no images
        self.envs: dict[int, Any] = {}  # by seat

    def __call__(self, seat: int, seed: int) -> Play:
        from robofactory.sim.env import make_env, make_expert, observe

        started, policy_seconds, policy_calls, num_passes = time.perf_counter(), 0.0, 0, 0
        if seat not in self.envs:
            self.envs[seat] = make_env(self.plan.scene, render=self.is_seen)
        env = self.envs[seat]
        video = None if self.plan.directory is None else self.plan.directory / video_name(seed)
        learned = self.plan.learned
        names = [f"agent {k} ({'policy' if k in learned else EXPERT})" for k in range(self.plan.scene.num_agents)]
        info: dict[str, Any] = {}
        has_succeeded, has_succeeded_robofactory, steps = False, False, 0
        progress, digest = Progress(len(names)), hashlib.sha256()
        perturbation = ablations.begin(self.plan.ablation, self.plan.scene, learned, seed)
        # Built anew, from this episode's scene; contacts of the last one would change this in the fourth digit.
        env.unwrapped.config = perturbation.scene
        env.reset(seed=seed, options={"reconfigure": True})
        expert = make_expert(env)
        with EpisodeVideo(video, self.plan.scene.control_freq_hz, names) as film:
            while True:
                digest.update(env.unwrapped.get_state().cpu().numpy().tobytes())
                observations = perturbation.observe(observe(env)) if self.is_seen else []
                film.add(observations, f"seed {seed}   step {steps}   {'success' if has_succeeded else ''}")
                if has_succeeded or steps == self.plan.scene.max_episode_steps:
                    break
                actions = expert.act() if len(learned) < len(names) else [np.empty(0)] * len(names)
                if learned:
                    answer = yield observations
                    for agent in learned:
                        actions[agent] = answer.actions[agent]
                        for picture in observations[agent].images.values():
                            digest.update(picture.tobytes())
                    policy_seconds += answer.seconds
                    num_passes += answer.num_passes
                    policy_calls += len(learned)
                actions = perturbation.act(actions)
                digest.update(np.stack(actions).tobytes())
                _, _, _, _, info = env.step({f"panda-{k}": action for k, action in enumerate(actions)})
                steps += 1
                has_succeeded = bool(_number(info["success"]))
                has_succeeded_robofactory |= bool(_number(info["success_robofactory"]))
                progress.see(info)
        failed_at = [] if has_succeeded else progress.failed_at()
        return EpisodeResult(
            seed=seed,
            outcome=SUCCESS if has_succeeded else FAILURE,
            steps=steps,
            seconds=round(time.perf_counter() - started, 3),
            success_robofactory=has_succeeded_robofactory,
            phases=list(expert.phases()),
            failed_at=failed_at,
            reason=None if has_succeeded else in_words(failed_at),
            measures=_measures(info),
            policy_ms=round(1000 * policy_seconds / policy_calls, 2) if policy_calls else None,
            passes_per_action=round(num_passes / policy_calls, 3) if policy_calls else None,
            digest=digest.hexdigest(),
            video=None if video is None else video_name(seed),
        )


def video_name(seed: int) -> str:
    """Where an episode's video lies below the evaluation's directory."""
    return f"{VIDEOS}/seed_{seed}.mp4"


def _number(value: Any) -> float:
    """The first element of what ManiSkill batches over environments (a tensor [1], an array or a plain number)."""
    return float(np.asarray(value).reshape(-1)[0])


def _measures(info: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of the task's `evaluate`; one for each agent where there are as many (`held_0`, `held_1`)."""
    measures: dict[str, float] = {}
    for key, value in info.items():
        numbers = np.asarray(value).reshape(-1)
        if key not in NO_MEASURE and numbers.dtype.kind in "fiub":
            names = [key] if len(numbers) == 1 else [f"{key}_{index}" for index in range(len(numbers))]
            measures |= {n: round(float(x), 5) for n, x in zip(names, numbers, strict=True) if math.isfinite(x)}
    return measures


# ----------------------------------------------------------------------------------------------------------- video


class EpisodeVideo:
    """An MP4 (h264, yuv420p: plays in every browser) with one row per agent and one column per view.

    Encoded frame by frame as the episode runs: nothing is kept in memory. A context manager: the file appears under its
    name when the episode is over, also when an exception ended it. Without a path it writes nothing.
    """

    def __init__(self, path: Path | None, fps: int, row_labels: Sequence[str]):
        self.path, self.fps, self.row_labels = path, fps, row_labels
        self.font = ImageFont.load_default(13)
        self.canvas: Image.Image | None = None

    def __enter__(self) -> "EpisodeVideo":
        return self

    def __exit__(self, *error: object) -> None:
        if self.path is not None and self.canvas is not None:
            self.container.mux(self.stream.encode(None))
            self.container.close()
            os.replace(_temporary(self.path), self.path)

    def add(self, observations: Sequence[Observation], caption: str) -> None:
        """One frame: what every agent sees now, and a line of text below."""
        if self.path is None:
            return
        if self.canvas is None:
            self.canvas = self._open(self.path, observations)
        for row, observation in enumerate(observations):
            for column, image in enumerate(observation.images.values()):
                tile = Image.fromarray(image).resize(self.tile, Image.Resampling.BICUBIC)
                self.canvas.paste(tile, self._corner(row, column))
        draw = ImageDraw.Draw(self.canvas)
        bottom = self.canvas.height - BAR
        draw.rectangle((0, bottom - GAP, self.canvas.width, self.canvas.height), fill=BACKGROUND)
        draw.text((GAP, bottom), caption, fill=TEXT, font=self.font)
        frame = av.VideoFrame.from_ndarray(np.asarray(self.canvas), format="rgb24")
        self.container.mux(self.stream.encode(frame))

    def _open(self, path: Path, observations: Sequence[Observation]) -> Image.Image:
        """Start the file; gives the canvas with its labels drawn."""
        sizes = [image.shape[:2] for observation in observations for image in observation.images.values()]
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        factor = max(1, round(TILE_HEIGHT / height))
        self.tile = (width * factor, height * factor)
        columns = max(len(observation.images) for observation in observations)
        right, bottom = self._corner(len(observations), columns)
        # below the last row stands the caption; yuv420p stores colour at half size, so both sides are even
        canvas = Image.new("RGB", (right + right % 2, bottom + GAP + (bottom + GAP) % 2), BACKGROUND)
        draw = ImageDraw.Draw(canvas)
        for row, (observation, label) in enumerate(zip(observations, self.row_labels, strict=True)):
            for column, view in enumerate(observation.images):
                x, y = self._corner(row, column)
                draw.text((x + 2, y - BAR), f"{label}  {view}", fill=TEXT, font=self.font)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.container = av.open(str(_temporary(path)), "w", format="mp4", options={"movflags": "+faststart"})
        self.stream = self.container.add_stream("libx264", rate=Fraction(self.fps))
        self.stream.width, self.stream.height, self.stream.pix_fmt = *canvas.size, "yuv420p"
        self.stream.options = {"crf": "24", "preset": "veryfast"}
        self.stream.codec_context.thread_count = 1  # the workers already fill the cores
        return canvas

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        """Upper left pixel of a tile, below its label."""
        return GAP + column * (self.tile[0] + GAP), BAR + GAP + row * (self.tile[1] + BAR + GAP)


def _temporary(video: Path) -> Path:
    return video.with_name(f".{video.stem}.tmp.mp4")
