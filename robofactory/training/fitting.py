"""Out of GPU memory: explained in one message, or avoided by smaller micro-batches of the same global batch."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from robofactory.config import RecipeConfig, UserError
from robofactory.data.dataset import Splits
from robofactory.model.openvla import OpenVLA
from robofactory.model.precision import autocast
from robofactory.training import footprint
from robofactory.training.distributed import Topology, any_rank


@contextlib.contextmanager
def out_of_memory_explained(recipe: RecipeConfig) -> Iterator[None]:
    """Raises UserError instead of CUDA's own words, which name no remedy of ours."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(f"out of GPU memory ({reason}) with dataloader.batch_size={recipe.dataloader.batch_size}; {_remedy(recipe)}") from None  # fmt: skip


def _remedy(recipe: RecipeConfig) -> str:
    size, accumulate = recipe.dataloader.batch_size, recipe.training.gradient_accumulate_every
    if size == 1:
        return "it cannot be smaller: use a GPU with more memory, or several with training.parallel=fsdp"
    smaller = replace(recipe, dataloader=replace(recipe.dataloader, batch_size=size // 2))
    peak_gb = footprint.predict(smaller).peak_gb if recipe.model.quantize is None else None
    predicted = "" if peak_gb is None else f" ({peak_gb:.1f} GB predicted)"
    remedies = f"dataloader.batch_size={size // 2} training.gradient_accumulate_every={accumulate * 2}"
    return f"the same steps in less memory: {remedies}{predicted}; or let training.auto_batch=true find it"


def halve_batch_until_it_fits(recipe: RecipeConfig, model: OpenVLA, data: Splits, topology: Topology) -> RecipeConfig:
    """The recipe with the largest micro-batch that fits on every process, and the same global batch.

    Tries forward and backward of each size, with room taken for what a step needs besides.

    Raises:
        UserError: an odd batch does not fit, or not even one sample.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    copies = 2 + (topology.world_size > 1)  # two moments of the optimizer, and the gradients on their way
    room = [torch.empty_like(p) for p in trainable for _ in range(copies)]
    while any_rank(not _fits(recipe, model, data, topology.device), topology):
        size, accumulate = recipe.dataloader.batch_size, recipe.training.gradient_accumulate_every
        if size % 2:
            raise UserError(f"out of GPU memory with dataloader.batch_size={size}, which cannot be halved; {_remedy(recipe)}")  # fmt: skip
        recipe = replace(
            recipe,
            dataloader=replace(recipe.dataloader, batch_size=size // 2),
            training=replace(recipe.training, gradient_accumulate_every=accumulate * 2),
        )
    del room
    return recipe


def _fits(recipe: RecipeConfig, model: OpenVLA, data: Splits, device: torch.device) -> bool:
    try:
        batch, _ = data.examples(recipe.dataloader.batch_size, device)
        with autocast(model):
            loss, *_ = model(batch, recipe.training.soft_target_sigma_bins)
        loss.backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # a size that does not fit is not in the run's own peak
