"""Predict the peak GPU memory of a training step, in under a minute on a CPU, and propose what fits a card.

Nothing is downloaded or computed: the real step runs on tensors that have a size and no data. GB are 10^9 bytes.
"""

import argparse
from typing import TYPE_CHECKING

from robofactory import arguments
from robofactory.config import RecipeConfig, load_recipe
from robofactory.errors import run_command

if TYPE_CHECKING:
    from robofactory.training.footprint import Footprint


def parse_arguments() -> argparse.Namespace:
    parser = arguments.Parser(
        prog="robofactory memory",
        description=__doc__,
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
    from robofactory.training.proposal import CONTEXT_GB, FRAGMENTATION, needed_gb

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


def proposal(recipe: RecipeConfig, footprint: "Footprint", gpu_gb: float) -> str:
    """In words: whether the recipe fits the card, and the settings for the same optimizer steps that waste least on it."""
    from robofactory.training.proposal import SMALLEST_BATCH, needed_gb, propose, settings

    fits = "fits" if needed_gb(footprint.peak_gb) <= gpu_gb else "does not fit"
    best = propose(recipe, footprint, gpu_gb)
    if best is None:
        return f"{gpu_gb:.0f} GB: the recipe {fits}, nor does a batch of {SMALLEST_BATCH} with all layers recomputed"
    chosen, predicted = best
    return (
        f"{gpu_gb:.0f} GB: the recipe {fits}; fastest for the same optimizer steps:\n  {settings(chosen)}\n"
        f"  peak {predicted.peak_gb:.2f} GB, on a card {needed_gb(predicted.peak_gb):.2f} GB"
    )


if __name__ == "__main__":
    run_command(main)
