"""Does the action codec lose anything that matters? Expert actions through 256 bins and back, replayed in the simulator.

    python benchmarks/codec_replay.py [--episodes 100]

Records the scripted expert's actions, measures a codec on them as training would, replays each episode from its seed
with decode(encode(action)) in place of the action, open loop, and counts how many still lift the barrier.
"""

import argparse

import numpy as np
import torch
from tqdm import tqdm

from robofactory.codec.codec import Codec
from robofactory.codec.statistics import DatasetStatistics
from robofactory.config import load_recipe, load_scene, look_of, scene_file
from robofactory.sim.env import make_env, make_expert

TASK = "LiftBarrier-rf"


def play(env, seed, next_actions, max_steps):
    """Whether the barrier was lifted, and the actions [n, agents, 8] that did it."""
    env.reset(seed=seed, options={"reconfigure": True})
    expert = make_expert(env)
    actions = []
    for step in range(max_steps):
        actions.append(np.stack(next_actions(expert, step)))
        _, _, _, _, info = env.step(env.unwrapped.as_maniskill(actions[-1]))
        if info["success"].item():
            return True, np.stack(actions)
    return False, np.stack(actions)


def replayed_share(num_episodes: int, first_seed: int = 0) -> tuple[int, int, str]:
    """(episodes lifted by the decoded actions, episodes lifted by the expert, the codecs' tables)."""
    scene = load_scene(scene_file(TASK), ["visual_detail=low"])
    env = make_env(scene, render=False)
    seeds = range(first_seed, first_seed + num_episodes)
    played = {s: play(env, s, lambda expert, _: expert.act(), scene.max_episode_steps) for s in tqdm(seeds, "expert")}
    lifted = {seed: actions for seed, (success, actions) in played.items() if success}

    recipe, names = load_recipe("robot_openvla_tiny"), [f"joint{i}" for i in range(1, 8)] + ["gripper"]
    everything = np.concatenate(list(lifted.values()))  # [n, agents, 8]
    codecs = [
        Codec.create(
            recipe, {f"agent {k}": DatasetStatistics.measure(a, a, names, "mean_std", look_of(scene), len(lifted))}
        )
        for k, a in enumerate(everything.swapaxes(0, 1))
    ]
    tables = "\n\n".join(codec.action_table(everything[:, agent]) for agent, codec in enumerate(codecs))
    count = 0
    for seed, actions in tqdm(lifted.items(), "decoded"):
        decoded = np.stack([c.decode_actions(c.encode_actions(actions[:, k])) for k, c in enumerate(codecs)], axis=1)
        # A few steps more than the expert needed: the last action stands.
        count += play(env, seed, lambda _, step, d=decoded: d[min(step, len(d) - 1)], len(decoded) + 20)[0]
    env.close()
    return count, len(lifted), tables


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100, help="seeds to record and replay (default: 100)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    replayed, recorded, action_tables = replayed_share(arguments.episodes)
    print(action_tables)
    print(f"\nlifted: {recorded} of {arguments.episodes} by the expert, {replayed} of these {recorded} by the decoded actions ({replayed / recorded:.0%})")  # fmt: skip
