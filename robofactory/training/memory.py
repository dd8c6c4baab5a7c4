"""Predict the peak GPU memory of a training step, in under a minute on a CPU, and propose what fits a card.

Nothing is downloaded or computed: the real step runs on tensors that have a size and no data. GB are 10^9 bytes.
"""

import argparse
import dataclasses
import itertools
from typing import TYPE_CHECKING

from robofactory.config import RecipeConfig, load_recipe, run_command

if TYPE_CHECKING:
    from robofactory.training.footprint import Footprint

# What a card needs beside the bytes that are asked for: rules of thumb, not measured here.
FRAGMENTATION, CONTEXT_GB = 0.1, 1.0
SMALLEST_BATCH = 2  # of a proposal: 1,600 tokens keep a GPU busy


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="robofactory memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  robofactory memory --recipe robot_openvla
  robofactory memory --recipe robot_openvla --gpu 24
  robofactory memory --recipe robot_openvla model.lora_vision=true dataloader.batch_size=8""",
    )
    parser.add_argument("--recipe", default="robot_openvla", help="a name in robofactory/configs or a .yaml file (default: robot_openvla)")  # fmt: skip
    parser.add_argument("--gpu", type=int, choices=[24, 40, 80], help="GB of the card to propose settings for")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the recipe")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse_arguments()
    recipe = load_recipe(args.recipe, args.overrides)
    from robofactory.training.footprint import predict

    footprint = predict(recipe)
    print(f"{recipe.model.model_name}, {len(recipe.data.views)} views: {describe(footprint)}\n\n{table(footprint)}")
    if args.gpu is not None:
        print(f"\n{proposal(recipe, footprint, float(args.gpu))}")


def describe(footprint: "Footprint") -> str:
    f = footprint
    return (
        f"batch {f.batch_size} x {f.num_tokens} tokens, {f.num_recomputed} of {f.num_layers} language layers recomputed"
    )


def table(footprint: "Footprint") -> str:
    """Line by line, in GB: what each part holds at the peak, and at its own most."""
    f = footprint
    lines = [f"{part:<12}{size / 1e9:>8.2f}{f.most[part] / 1e9:>12.2f}" for part, size in f.at_peak.items()]
    reserve = f"{FRAGMENTATION:.0%} for fragmentation and {CONTEXT_GB:.0f} GB for CUDA itself"
    return "\n".join(
        [
            f"{'GB':<12}{'at peak':>8}{'at its own':>12}",
            *lines,
            f"{'peak':<12}{f.peak_gb:>8.2f}   reached by {f.operation}",
            f"{'on a card':<12}{needed_gb(f.peak_gb):>8.2f}   with {reserve}",
        ]
    )


def needed_gb(peak_gb: float) -> float:
    return peak_gb * (1.0 + FRAGMENTATION) + CONTEXT_GB


# --------------------------------------------------------------------------------------------------------- proposal


def proposal(recipe: RecipeConfig, footprint: "Footprint", gpu_gb: float) -> str:
    """In words: whether the recipe fits the card, and the settings for the same optimizer steps that waste least on it."""
    fits = "fits" if needed_gb(footprint.peak_gb) <= gpu_gb else "does not fit"
    best = propose(recipe, footprint, gpu_gb)
    if best is None:
        return f"{gpu_gb:.0f} GB: the recipe {fits}, nor does a batch of {SMALLEST_BATCH} with all layers recomputed"
    chosen, predicted = best
    settings = (
        f"dataloader.batch_size={chosen.dataloader.batch_size} "
        f"training.gradient_accumulate_every={chosen.training.gradient_accumulate_every} "
        f"training.num_recomputed_layers={chosen.training.num_recomputed_layers}"
    )
    return (
        f"{gpu_gb:.0f} GB: the recipe {fits}; fastest for the same optimizer steps:\n  {settings}\n"
        f"  peak {predicted.peak_gb:.2f} GB, on a card {needed_gb(predicted.peak_gb):.2f} GB"
    )


def propose(recipe: RecipeConfig, footprint: "Footprint", gpu_gb: float) -> "tuple[RecipeConfig, Footprint] | None":
    """Micro-batch, accumulation and recomputation that fit, with as many samples an optimizer step as the recipe has.

    As few layers are recomputed as possible, since recomputing all of them is half again the work, while a small
    micro-batch costs nearly nothing; the rest of the room makes the micro-batch larger. None if nothing fits.
    """
    from robofactory.training.footprint import predict

    samples = recipe.dataloader.batch_size * recipe.training.gradient_accumulate_every
    num_layers = footprint.num_layers
    whole, none = (
        footprint if footprint.num_recomputed == n else predict(with_settings(recipe, samples, footprint.batch_size, n))
        for n in (num_layers, 0)
    )
    batch_sizes = [n for n in range(samples, 0, -1) if samples % n == 0 and n >= min(SMALLEST_BATCH, samples)]
    for num_recomputed, batch_size in itertools.product(range(num_layers + 1), batch_sizes):
        if needed_gb(estimate_gb(whole, none, batch_size, num_recomputed)) <= gpu_gb:
            chosen = with_settings(recipe, samples, batch_size, num_recomputed)
            predicted = predict(chosen)
            if needed_gb(predicted.peak_gb) <= gpu_gb:
                return chosen, predicted
    return None


def estimate_gb(
    all_recomputed: "Footprint", none_recomputed: "Footprint", batch_size: int, num_recomputed: int
) -> float:
    """The peak between two predictions. What grows does so in proportion to the batch, and to the number of layers that
    keep their activations; the first of these is free, since a layer that is recomputed is whole for that time too.
    """
    growing = ("activations", "logits", "batch")
    low, high = (sum(f.at_peak[part] for part in growing) for f in (all_recomputed, none_recomputed))
    num_layers = all_recomputed.num_layers
    share = max(0, num_layers - num_recomputed - 1) / max(1, num_layers - 1)
    grown = (low + share * (high - low)) * batch_size / all_recomputed.batch_size
    return all_recomputed.peak_gb + (grown - low) / 1e9


def with_settings(recipe: RecipeConfig, samples: int, batch_size: int, num_recomputed: int) -> RecipeConfig:
    return dataclasses.replace(
        recipe,
        dataloader=dataclasses.replace(recipe.dataloader, batch_size=batch_size),
        training=dataclasses.replace(
            recipe.training,
            gradient_accumulate_every=samples // batch_size,
            num_recomputed_layers=num_recomputed,
        ),
    )


if __name__ == "__main__":
    run_command(main)
