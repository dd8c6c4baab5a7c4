"""Settings that fit a card, for the same optimizer steps: micro-batch, accumulation and recomputed layers."""

import dataclasses
import itertools

from robofactory.config import RecipeConfig
from robofactory.training.footprint import Footprint, predict

# What a card needs beside the bytes that are asked for: rules of thumb, not measured here.
FRAGMENTATION, CONTEXT_GB = 0.1, 1.0
SMALLEST_BATCH = 2  # of a proposal: 1,600 tokens keep a GPU busy


def needed_gb(peak_gb: float) -> float:
    """On a card, for a predicted peak."""
    return peak_gb * (1.0 + FRAGMENTATION) + CONTEXT_GB


def propose(recipe: RecipeConfig, footprint: Footprint, gpu_gb: float) -> tuple[RecipeConfig, Footprint] | None:
    """Micro-batch, accumulation and recomputation that fit, with as many samples an optimizer step as the recipe has.

    As few layers are recomputed as possible, since recomputing all of them is half again the work, while a small
    micro-batch costs nearly nothing; the rest of the room makes the micro-batch larger. None if nothing fits.
    """
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


def estimate_gb(all_recomputed: Footprint, none_recomputed: Footprint, batch_size: int, num_recomputed: int) -> float:
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


def settings(recipe: RecipeConfig) -> str:
    """As they are given on the command line."""
    return (
        f"dataloader.batch_size={recipe.dataloader.batch_size} "
        f"training.gradient_accumulate_every={recipe.training.gradient_accumulate_every} "
        f"training.num_recomputed_layers={recipe.training.num_recomputed_layers}"
    )
