"""Where episodes come from: the expert in the simulator, or learned policies with the expert looking over their shoulder.

Whoever acts, the labels are the expert's, and proprio is from before the action.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robofactory import robots
from robofactory.config import SceneConfig
from robofactory.data.episodes import Episode, encode_png
from robofactory.demos.disturbances import Disturber
from robofactory.demos.turns import Turns
from robofactory.shapes import Action, Observation
from robofactory.sim.env import make_env, make_expert, observe, step
from robofactory.sim.task import find_task

STEPS_AFTER_SUCCESS = 5  # what to do when it is done is learned too: hold
POLICY_EPISODE_STEPS = 100  # at most: a policy that is stuck need not be seen for longer
NOISE_STREAM = 1  # keeps these draws apart from the layout's, which come from the same seed

# What is executed at a step, given what each agent sees and the expert's answers.
Act = Callable[[list[Observation], list[Action]], list[Action]]


class ExpertPlayer:
    """The expert acts; in a share of the episodes it is disturbed. Episodes in which it fails are dropped."""

    def __init__(self, scene: SceneConfig, noise_share: float):
        self.env, self.scene, self.noise_share = make_env(scene), scene, noise_share
        self.max_steps = scene.max_episode_steps

    def play(self, seed: int) -> list[Episode] | None:
        random = np.random.default_rng([seed, NOISE_STREAM])
        disturb = draw_disturbances(self.scene, self.noise_share, random)
        parts, succeeded = play(self.env, seed, self.max_steps, disturb)
        return parts if succeeded else None


class PolicyPlayer:
    """Learned policies and the expert act in turns; every episode is kept, however it ends.

    checkpoints: of each agent's policy.
    """

    def __init__(self, scene: SceneConfig, noise_share: float, checkpoints: Sequence[Path]):
        from robofactory.policy import Policy  # not at the top: the expert alone needs no model

        self.env, self.scene, self.noise_share = make_env(scene), scene, noise_share
        # Of several datasets, these robots are those of the demonstrations, which the run is named after.
        self.policies = [Policy.load(checkpoint, dataset=checkpoint.parent.name) for checkpoint in checkpoints]
        assert len(self.policies) == scene.num_agents, (len(self.policies), scene.num_agents)

    def play(self, seed: int) -> list[Episode]:
        random = np.random.default_rng([seed, NOISE_STREAM])
        disturb = draw_disturbances(self.scene, self.noise_share, random)
        turns = Turns(self.scene.num_agents, random)
        for policy in self.policies:
            policy.start_episode(seed)

        def act(seen: list[Observation], answers: list[Action]) -> list[Action]:
            drives = turns.next()
            actions = [
                policy.act([observation])[0] if is_policy else answer
                for policy, observation, answer, is_policy in zip(self.policies, seen, answers, drives, strict=True)
            ]
            return disturb(seen, actions)

        return play(self.env, seed, POLICY_EPISODE_STEPS, act)[0]


def draw_disturbances(scene: SceneConfig, share: float, random: np.random.Generator) -> Act:
    """What changes the actions of an episode, which is one of the share that is disturbed, or not."""
    is_disturbed = random.random() < share
    num_joints = robots.find(scene.robots[0].uid).num_joints
    disturbances = Disturber(find_task(scene.task).disturbances, scene.num_agents, num_joints, random)

    def disturb(seen: list[Observation], actions: list[Action]) -> list[Action]:
        if not is_disturbed:
            return actions
        return disturbances.disturb(actions, [observation.proprio for observation in seen])

    return disturb


def play(env: Any, seed: int, max_steps: int, act: Act) -> tuple[list[Episode], bool]:
    """Each agent's part of an episode, and whether it succeeded; from then on the expert alone acts, for some steps."""
    # Built anew: what PhysX keeps over a mere reset would make the last bits depend on the episodes before.
    env.reset(seed=seed, options={"reconfigure": True})
    expert = make_expert(env)
    observations, labels, executed = [], [], []
    steps_left, succeeded = max_steps, False
    while steps_left > 0:
        seen, answers = observe(env), expert.act()
        actions = answers if succeeded else act(seen, answers)
        observations.append(seen)
        labels.append(answers)
        executed.append(actions)
        info = step(env, actions)
        steps_left -= 1
        if not succeeded and bool(info["success"]):
            succeeded, steps_left = True, min(steps_left, STEPS_AFTER_SUCCESS)
    return [_part(agent, seed, observations, labels, executed) for agent in range(len(labels[0]))], succeeded


def _part(agent: int, seed: int, observations: list, labels: list, executed: list) -> Episode:
    actions = np.stack([step[agent] for step in labels])
    own = [step[agent] for step in observations]
    return Episode(
        images={view: [encode_png(observation.images[view]) for observation in own] for view in own[0].images},
        proprio=np.stack([observation.proprio for observation in own]).astype(np.float32),
        actions=actions.astype(np.float32),
        perturbed=(np.stack([step[agent] for step in executed]) != actions).any(axis=1),
        instruction=own[0].instruction,
        seed=seed,
    )
