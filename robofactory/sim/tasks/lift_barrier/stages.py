"""In which part of the task an episode failed, for each agent."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool

from robofactory.sim.task import DID_ITS_PART

NEVER_REACHED, NEVER_HELD, DROPPED = "never reached", "never held", "dropped"
LIFTED_TOO_LITTLE, TILTED, TOO_BRIEF = "lifted too little", "tilted", "too brief"
STAGES = {  # in the order of the task -> what an agent has done that got no further
    NEVER_REACHED: "never reached it",
    NEVER_HELD: "never held it",
    DROPPED: "dropped it",
    LIFTED_TOO_LITTLE: "lifted it too little",
    TILTED: "held it tilted",
    TOO_BRIEF: "held it up too briefly",
    DID_ITS_PART: "did its part",
}


class LiftBarrierProgress:
    """How far each agent has come in one episode."""

    def __init__(self, num_agents: int):
        self.has_reached = np.zeros(num_agents, bool)
        self.has_held = np.zeros(num_agents, bool)

    def see(self, info: Mapping[str, Any]) -> None:
        """reached, held, lifted: whether each agent's hand is at its grip, presses on it, and has it high enough.
        level: whether the barrier is.
        """
        self.reached, self.held, self.lifted = (_flags(info[key]) for key in ("reached", "held", "lifted"))
        self.is_level = bool(_flags(info["level"])[0])
        self.has_reached |= self.reached | self.held
        self.has_held |= self.held

    def failed_at(self) -> list[str]:
        """The stage that each agent did not get beyond.

        The barrier's tilt is nobody's fault while one end is not up: then the agents that hold theirs did their part.
        """
        stages = [self._stage(agent) for agent in range(len(self.held))]
        if set(stages) == {DID_ITS_PART}:
            return [TOO_BRIEF if self.is_level else TILTED] * len(stages)
        return stages

    def _stage(self, agent: int) -> str:
        if self.held[agent]:
            return DID_ITS_PART if self.lifted[agent] else LIFTED_TOO_LITTLE
        if self.has_held[agent]:
            return DROPPED
        return NEVER_HELD if self.has_reached[agent] else NEVER_REACHED


def _flags(value: Any) -> Bool[np.ndarray, " n"]:
    return np.asarray(value).reshape(-1).astype(bool)
