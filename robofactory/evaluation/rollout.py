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
from jaxtyping import Float32
from PIL import Image, ImageDraw, ImageFont

from robofactory.config import SceneConfig
from robofactory.evaluation import ablations
from robofactory.evaluation.ablations import Ablation
from robofactory.evaluation.results import FAILURE, SUCCESS, VIDEOS, EpisodeResult
from robofactory.shapes import Action, Observation
from robofactory.sim.task import find_task

EXPERT = "expert"
NO_MEASURE = ("success", "success_robofactory", "elapsed_steps")  # told in other words
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
        self.envs: dict[int, Any] = {}  # by seat

    def __call__(self, seat: int, seed: int) -> Play:
        from robofactory.sim.env import make_env, make_expert, observe, step

        is_seen = bool(self.plan.learned) or self.plan.directory is not None  # the expert alone needs no images
        with Episode(self.plan, seed) as episode:
            if seat not in self.envs:
                self.envs[seat] = make_env(self.plan.scene, render=is_seen)
            env = self.envs[seat]
            # Built anew, from this episode's scene; contacts of the last one would change this in the fourth digit.
            env.unwrapped.config = episode.scene
            env.reset(seed=seed, options={"reconfigure": True})
            expert = make_expert(env)
            while True:
                observations = episode.observe(states_of(env)[0], observe(env) if is_seen else [])
                if episode.is_over:
                    return episode.result(phases=list(expert.phases()))
                actions = expert.act() if len(self.plan.learned) < self.plan.scene.num_agents else None
                answer = (yield observations) if self.plan.learned else None
                actions = episode.act(actions, answer)
                episode.see(of_each(step(env, actions), 1)[0])


class Episode:
    """The record of one episode, whoever steps its simulator: `observe`, `act`, `see` at every step; a last `observe`.

    What the ablation changes is changed here. A context manager: it closes the video, also when an exception ended the
    episode.
    """

    def __init__(self, plan: Plan, seed: int):
        self.plan, self.seed, self.started = plan, seed, time.perf_counter()
        self.perturbation = ablations.begin(plan.ablation, plan.scene, plan.learned, seed)
        agents = range(plan.scene.num_agents)
        names = [f"agent {agent} ({'policy' if agent in plan.learned else EXPERT})" for agent in agents]
        video = None if plan.directory is None else plan.directory / video_name(seed)
        self.film = EpisodeVideo(video, plan.scene.control_freq_hz, names)
        self.observations: list[Observation] = []
        self.info: dict[str, Any] = {}
        self.steps, self.has_succeeded, self.has_succeeded_robofactory = 0, False, False
        self.policy_seconds, self.policy_calls, self.num_passes = 0.0, 0, 0
        self.task = find_task(plan.scene.task)
        self.progress, self.digest = self.task.progress(len(names)), hashlib.sha256()

    def __enter__(self) -> "Episode":
        return self

    def __exit__(self, *error: object) -> None:
        self.film.close()

    @property
    def scene(self) -> SceneConfig:
        """The one to simulate."""
        return self.perturbation.scene

    @property
    def is_over(self) -> bool:
        return self.has_succeeded or self.steps == self.plan.scene.max_episode_steps

    def observe(self, state: np.ndarray, observations: list[Observation]) -> list[Observation]:
        """What every agent is shown of a state of the simulator; without pictures, nothing."""
        self.digest.update(state.tobytes())
        self.observations = self.perturbation.observe(observations)
        self.film.add(
            self.observations, f"seed {self.seed}   step {self.steps}   {'success' if self.has_succeeded else ''}"
        )
        return self.observations

    def act(self, expert_actions: list[Action] | None, answer: Answer | None) -> list[Action]:
        """What every agent executes now: an answer in the place of what the expert would do, and the ablation's part.

        Args:
            expert_actions: of every agent; None where policies drive them all.
            answer: None where the expert drives them all.
        """
        actions = expert_actions or [np.empty(0)] * self.plan.scene.num_agents
        if answer is not None:
            for agent in self.plan.learned:
                actions[agent] = answer.actions[agent]
                for picture in self.observations[agent].images.values():
                    self.digest.update(picture.tobytes())
            self.policy_seconds += answer.seconds
            self.num_passes += answer.num_passes
            self.policy_calls += len(self.plan.learned)
        actions = self.perturbation.act(actions)
        self.digest.update(np.stack(actions).tobytes())
        return actions

    def see(self, info: dict[str, Any]) -> None:
        """What the task's `evaluate` says after the step, see `of_each`."""
        self.info = info
        self.steps += 1
        self.has_succeeded = bool(info["success"])
        self.has_succeeded_robofactory |= bool(info["success_robofactory"])
        self.progress.see(info)

    def result(self, phases: list[str]) -> EpisodeResult:
        """The record of the episode, which is over; its video is complete from now on."""
        assert self.is_over, self.steps
        self.film.close()
        failed_at = [] if self.has_succeeded else self.progress.failed_at()
        calls = self.policy_calls
        return EpisodeResult(
            seed=self.seed,
            outcome=SUCCESS if self.has_succeeded else FAILURE,
            steps=self.steps,
            seconds=round(time.perf_counter() - self.started, 3),
            success_robofactory=self.has_succeeded_robofactory,
            phases=phases,
            failed_at=failed_at,
            reason=None if self.has_succeeded else self.task.blame(failed_at),
            measures=_measures(self.info, (*NO_MEASURE, *self.task.flags)),
            policy_ms=round(1000 * self.policy_seconds / calls, 2) if calls else None,
            passes_per_action=round(self.num_passes / calls, 3) if calls else None,
            digest=self.digest.hexdigest(),
            video=None if self.film.path is None else video_name(self.seed),
        )


def states_of(env: Any) -> Float32[np.ndarray, "b n"]:
    """All that moves, of each environment."""
    return env.unwrapped.get_state().cpu().numpy()


def of_each(info: dict[str, torch.Tensor], num_envs: int) -> list[dict[str, Any]]:
    """What ManiSkill batches over environments, by environment: its number, flag or array under each key."""
    arrays = {key: value.cpu().numpy() for key, value in info.items()}
    return [{key: array[index] for key, array in arrays.items()} for index in range(num_envs)]


def video_name(seed: int) -> str:
    """Where an episode's video lies below the evaluation's directory."""
    return f"{VIDEOS}/seed_{seed}.mp4"


def _measures(info: dict[str, Any], omitted: Sequence[str]) -> dict[str, float]:
    """The finite numbers of the task's `evaluate`; one for each agent where there are as many (`held_0`, `held_1`)."""
    measures: dict[str, float] = {}
    for key, value in info.items():
        numbers = np.asarray(value).reshape(-1)
        if key not in omitted and numbers.dtype.kind in "fiub":
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
        self.close()

    def close(self) -> None:
        """Complete the file; a second time does nothing."""
        if self.path is not None and self.canvas is not None:
            self.container.mux(self.stream.encode(None))
            self.container.close()
            os.replace(_temporary(self.path), self.path)
            self.canvas = None

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
