"""In which part of the task an episode failed, told for each agent from what the task reports at every step."""

from typing import Any

import numpy as np
from jaxtyping import Bool

NEVER_REACHED, NEVER_HELD, DROPPED = "never reached", "never held", "dropped"
LIFTED_TOO_LITTLE, TILTED, TOO_BRIEF, DID_ITS_PART = "lifted too little", "tilted", "too brief", "did its part"
STAGES = {  # in the order of the task -> what an agent has to be told of
    NEVER_REACHED: "never reached it",
    NEVER_HELD: "never held it",
    DROPPED: "dropped it",
    LIFTED_TOO_LITTLE: "lifted it too little",
    TILTED: "held it tilted",
    TOO_BRIEF: "held it up too briefly",
    DID_ITS_PART: "did its part",
}


class Progress:
    """How far each agent has come in one episode."""

    def __init__(self, num_agents: int):
        self.has_reached = np.zeros(num_agents, bool)
        self.has_held = np.zeros(num_agents, bool)

    def see(self, info: dict[str, Any]) -> None:
        """Called after every step with what the task's `evaluate` says, of one environment.

        reached, held, lifted: of each agent, whether its hand is at its grip, presses on it, and has it high enough.
        level: whether the object is.
        """
        self.reached, self.held, self.lifted = (per_agent(info[key]) for key in ("reached", "held", "lifted"))
        self.is_level = bool(per_agent(info["level"])[0])
        self.has_reached |= self.reached | self.held
        self.has_held |= self.held

    def failed_at(self) -> list[str]:
        """The stage that each agent did not get beyond, for an episode that reached the step limit.

        The object's tilt is nobody's fault while one end is not up: then the agents that hold theirs did their part.
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


def in_words(failed_at: list[str]) -> str:
    """Who failed where: "agent 0 never held it, agent 1 dropped it"."""
    return ", ".join(f"agent {k} {STAGES[stage]}" for k, stage in enumerate(failed_at) if stage != DID_ITS_PART)


def per_agent(value: Any) -> Bool[np.ndarray, " n"]:
    """The flags of what ManiSkill batches over environments, of one environment."""
    return np.asarray(value).reshape(-1).astype(bool)
