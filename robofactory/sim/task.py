"""What a task declares of itself; nothing else in the house knows a word of it. Imports no simulator.

A task is a folder below `robofactory/sim/tasks/`, or a package that names its `Task` in the entry-point group
`robofactory.tasks`. Its `__init__` declares `TASK`; environment and expert are loaded when they are needed.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from robofactory.config import CONFIGS
from robofactory.errors import UserError, did_you_mean

ENTRY_POINTS = "robofactory.tasks"
DID_ITS_PART = "did its part"  # the last stage of every task: this agent is not to blame


class Progress(Protocol):
    """How far each agent has come in one episode."""

    def see(self, info: Mapping[str, Any]) -> None:
        """Called after every step with what the task's `evaluate` returns, of one environment."""
        ...

    def failed_at(self) -> list[str]:
        """The stage that each agent did not get beyond, for an episode that reached the step limit."""
        ...


@dataclass(frozen=True)
class Disturbances:
    """How demonstrations are disturbed on purpose (see `robofactory.demos.disturbances`); ranges are inclusive.

    start: chance in an episode that an arm first moves aside, for so many steps, by so many rad.
    push: chance in a step of a push, its steps, its size in rad of the joint that is pushed furthest.
    flip: chance in a step that the gripper does the opposite, and for how many steps.
    hold: chance in an episode that one arm stays where it is, the step at which that begins, for how many steps.
    last_step: no push or flip begins later: all that is left then is to finish.
    shake_rad: standard deviation of the white noise on every joint.
    """

    start_chance: float = 0.5
    start_steps: tuple[int, int] = (3, 7)
    start_rad: tuple[float, float] = (0.03, 0.10)
    push_chance: float = 0.03
    push_steps: tuple[int, int] = (3, 8)
    push_rad: tuple[float, float] = (0.02, 0.08)
    flip_chance: float = 0.005
    flip_steps: tuple[int, int] = (2, 6)
    hold_chance: float = 0.5
    hold_first_step: tuple[int, int] = (0, 30)
    hold_steps: tuple[int, int] = (5, 30)
    last_step: int = 80
    shake_rad: float = 0.005


@dataclass(frozen=True)
class Task:
    """name: as `--task` and the scene file say it.
    environment, expert: "module:class"; the expert is made from the environment, and has `act` and `phases`.
    objects, success: keys of the scene's sections of these names, all needed.
    stages: in the order of the task, what an agent that got no further is said to have done ("dropped it").
    progress: of so many agents, finds the stage of each from what `evaluate` returns.
    secondary: other success tests in what `evaluate` returns, by what people call them.
    flags: keys of `evaluate` that stages tell in words; they are no measures of an episode.
    scene: its file.
    """

    name: str
    num_agents: int
    environment: str
    expert: str
    objects: tuple[str, ...]
    success: tuple[str, ...]
    stages: Mapping[str, str]
    progress: Callable[[int], Progress]
    scene: Path
    secondary: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    disturbances: Disturbances = Disturbances()

    def blame(self, failed_at: Sequence[str]) -> str:
        """Who failed where, in words: "agent 0 never held it, agent 1 dropped it"."""
        return ", ".join(f"agent {k} {self.stages[at]}" for k, at in enumerate(failed_at) if at != DID_ITS_PART)

    def make_environment_class(self) -> Any:
        return pkgutil.resolve_name(self.environment)

    def make_expert(self, env: Any) -> Any:
        return pkgutil.resolve_name(self.expert)(env)


def tasks() -> dict[str, Task]:
    """Name -> task, of all there are here."""
    folder = Path(__file__).parent / "tasks"
    own = [importlib.import_module(f"robofactory.sim.tasks.{m.name}").TASK for m in pkgutil.iter_modules([str(folder)])]
    others = [entry.load() for entry in entry_points(group=ENTRY_POINTS)]
    return {task.name: task for task in [*own, *others]}


def find_task(name: str, source: str = "") -> Task:
    """The task of a name.

    Args:
        source: what asks for it, for the message.
    Raises:
        UserError: there is none; the line lists those there are.
    """
    known = tasks()
    if name not in known:
        at = f"{source}: key 'task': " if source else ""
        raise UserError(f"{at}unknown task {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    return known[name]


def own_scene(name: str) -> Path:
    """The scene file of one of this package's tasks."""
    return CONFIGS / "table" / f"{name}.yaml"
