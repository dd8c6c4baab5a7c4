"""Speed of the small model on this machine's CPU: training samples/s, and milliseconds for one action.

Each line changes one thing about the recipe. Figures are the fastest of several repetitions in CPU time of this
process, so that other work on the machine disturbs them little; run with nothing else on for figures to quote.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from robofactory.config import ArchitectureConfig, load_recipe
from robofactory.errors import run_command

if TYPE_CHECKING:
    from robofactory.model.openvla import OpenVLA
    from robofactory.shapes import Batch

VOCAB_SIZE, TEXT_LENGTH, NUM_VIEWS, PROPRIO_DIM, ACTION_DIM = 512, 18, 3, 8, 8  # of a LiftBarrier batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python benchmarks/model_speed.py --threads 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="robot_openvla_tiny", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s, as each agent trains")
    parser.add_argument("--repetitions", type=int, default=8, help="default: %(default)s")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported

    import torch

    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe)
    base = recipe.model.architecture
    assert base is not None, f"{arguments.recipe} is not trained from scratch"

    print(f"batch {recipe.dataloader.batch_size}, {NUM_VIEWS} views, {arguments.threads} thread(s)")
    print(f"{'variant':<44}{'params':>9}{'samples/s':>11}{'ms/action':>11}")
    for name, architecture, global_token, fused, dtype in variants(base, recipe.model.global_token):
        model = build(architecture, global_token, fused)
        batch = random_batch(recipe.dataloader.batch_size, architecture.image_size)
        train_s = fastest(training_step(model, batch, dtype), arguments.repetitions)
        action_s = fastest(one_action(model, random_batch(1, architecture.image_size), dtype), arguments.repetitions)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        samples_per_s = recipe.dataloader.batch_size / train_s
        print(f"{name:<44}{num_parameters / 1e6:>8.2f}M{samples_per_s:>11.1f}{1e3 * action_s:>11.1f}", flush=True)


def variants(base: ArchitectureConfig, global_token: bool) -> list[tuple[str, ArchitectureConfig, bool, bool, str]]:
    """(name, sizes, global token, fused attention, dtype)."""
    wider = replace(base.language, hidden_size=256, intermediate_size=704, num_attention_heads=4)
    return [
        ("the recipe", base, global_token, False, "bfloat16"),
        ("float32", base, global_token, False, "float32"),
        ("PyTorch's fused attention", base, global_token, True, "bfloat16"),
        ("the other choice of global token", base, not global_token, False, "bfloat16"),
        ("112 px", replace(base, image_size=112), global_token, False, "bfloat16"),
        ("language width 256", replace(base, language=wider), global_token, False, "bfloat16"),
    ]


def build(architecture: ArchitectureConfig, global_token: bool, fused: bool) -> "OpenVLA":
    from robofactory.model.openvla import build_from_scratch

    model = build_from_scratch(architecture, VOCAB_SIZE, PROPRIO_DIM, global_token)
    model.fused_attention = model.vision_backbone.fused_attention = fused
    return model


def random_batch(batch_size: int, image_size: int) -> "Batch":
    import torch

    from robofactory.shapes import Batch

    ids = torch.randint(0, VOCAB_SIZE - 256, (batch_size, TEXT_LENGTH))
    return Batch(
        pixel_values=torch.randn(batch_size, NUM_VIEWS, 6, image_size, image_size),
        input_ids=ids,
        text_mask=torch.ones_like(ids, dtype=torch.bool),
        proprio=torch.randn(batch_size, PROPRIO_DIM),
        action_tokens=torch.randint(VOCAB_SIZE - 256, VOCAB_SIZE, (batch_size, ACTION_DIM)),
    )


def training_step(model: "OpenVLA", batch: "Batch", dtype: str) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW, as robofactory.training does them."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss, *_ = model(batch, soft_target_sigma_bins=2.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def one_action(model: "OpenVLA", batch: "Batch", dtype: str) -> Callable[[], None]:
    import torch

    def act() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            model.generate(batch, ACTION_DIM)

    return act


def fastest(work: Callable[[], None], repetitions: int) -> float:
    """Seconds of CPU time, after two repetitions of warming up."""
    durations_s = []
    for _ in range(2 + repetitions):
        started = time.process_time()
        work()
        durations_s.append(time.process_time() - started)
    return min(durations_s[2:])


if __name__ == "__main__":
    run_command(main)
