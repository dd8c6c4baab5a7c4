"""The 7B's training command on this GPU, before 15 GB of weights are downloaded: random ones of its size and layout.

Writes weights and a small dataset into a directory, trains with the recipe robot_openvla, stops, resumes, lets the
policy act, and merges it. Shows predicted and measured peak memory, samples/s, and milliseconds an action.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from robofactory.errors import UserError, run_command
from robofactory.paths import dataset_dir, run_dir

TASK, AGENT, NUM_EPISODES, LENGTH = "LiftBarrier-rf", 0, 6, 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="""\
examples:
  python benchmarks/openvla_7b.py my/random_7b
  python benchmarks/openvla_7b.py my/random_7b --no_merge dataloader.batch_size=8 model.quantize=nf4""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, help="to write into: 16 GB of weights, 2 GB of checkpoints, 15 GB merged; those that are there are used again")  # fmt: skip
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps, half of them before it is stopped (default: %(default)s)")  # fmt: skip
    parser.add_argument("--no_merge", action="store_true", help="leave the merging out")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the recipe")
    arguments = parser.parse_intermixed_args()
    import torch

    if not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU; robofactory memory predicts the memory without one")
    weights = arguments.directory / "weights"
    os.environ |= {"ROBOFACTORY_HOME": str(arguments.directory), "WANDB_MODE": "disabled"}
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}", flush=True)
    if not (weights / "config.json").exists():
        timed("random weights", lambda: write_weights(weights))
    if not dataset_dir(TASK, AGENT, NUM_EPISODES).exists():
        from small_runs import write_dataset

        write_dataset(dataset_dir(TASK, AGENT, NUM_EPISODES), NUM_EPISODES, LENGTH)
    torch.cuda.empty_cache()  # the trainings below need it all

    recipe = [f"model.model_name={weights}", f"data.num_episodes={NUM_EPISODES}", "training.num_epochs=1"]
    command = ["robofactory.training.train", "--task", TASK, "--agent_id", str(AGENT), "--resume", *recipe]
    command += arguments.overrides
    for title, steps in (("training", arguments.steps // 2), ("resumed", arguments.steps)):
        timed(title, lambda steps=steps: run(*command, f"training.max_steps={steps}"))
    checkpoint = run_dir("openvla", TASK, AGENT, NUM_EPISODES) / "latest"
    for line in (checkpoint.parent / "metrics.jsonl").read_text().splitlines():
        numbers = json.loads(line)
        print({key: numbers[key] for key in ("step", "train_loss", "samples_per_s", "data_wait_share", "peak_memory_gb") if key in numbers})  # fmt: skip
    act(checkpoint)
    if not arguments.no_merge:
        torch.cuda.empty_cache()
        timed("merging", lambda: run("robofactory.export.merge", str(checkpoint), str(arguments.directory / "merged")))


def timed(title: str, work: Callable[[], None]) -> None:
    started = time.perf_counter()
    work()
    print(f"== {title}: {time.perf_counter() - started:.0f} s", flush=True)


def run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments])
    if done.returncode != 0:
        sys.exit(done.returncode)


def write_weights(directory: Path) -> None:
    import torch

    from robofactory.model.openvla import build_from_config
    from robofactory.model.weights import OPENVLA_7B, save_openvla

    directory.mkdir(parents=True)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = build_from_config(OPENVLA_7B, global_token=True)
    torch.set_default_dtype(torch.float32)
    tokenizer().save(str(directory / "tokenizer.json"))
    save_openvla(model, directory)
    (directory / "config.json").write_text(
        json.dumps(OPENVLA_7B | {"pad_token_id": 32_000, "image_resize_strategy": "resize-naive"})
    )  # last: now it is whole


def tokenizer():
    """A word, a token: about as many of them in a prompt as Llama's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from robofactory.codec.prompt import LONE_SPACE, TEMPLATE

    words = f"{TEMPLATE} lift the barrier".replace(":", " : ").replace("?", " ? ").split()
    ids = {token: number for number, token in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", LONE_SPACE, *words]))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def act(checkpoint: Path) -> None:
    """Print how long the policy takes for an action, over the frames of an episode."""
    import torch

    from robofactory.data.episodes import DatasetReader
    from robofactory.policy import Policy

    policy = Policy.load(checkpoint, "cuda")
    reader = DatasetReader(dataset_dir(TASK, AGENT, NUM_EPISODES))
    observations = [reader.frame(0, index)[0] for index in range(20)]
    for title, forgets in (("alone", True), ("with the draft of the action before", False)):
        milliseconds = []
        policy.start_episode(0)
        before = policy.num_passes
        for observation in observations:
            if forgets:
                policy.start_episode(0)
            torch.cuda.synchronize()
            started = time.perf_counter()
            policy.act([observation])
            milliseconds.append(1000 * (time.perf_counter() - started))
        passes = (policy.num_passes - before) / len(observations)
        print(f"an action, {title}: {sorted(milliseconds)[len(milliseconds) // 2]:.0f} ms, {passes:.1f} passes; {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")  # fmt: skip


if __name__ == "__main__":
    run_command(main)
