"""Out of GPU memory: explained in one message, or avoided by smaller micro-batches of the same global batch."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from robofactory.config import RecipeConfig
from robofactory.data.dataset import Splits
from robofactory.errors import UserError
from robofactory.model.openvla import OpenVLA
from robofactory.model.precision import autocast
from robofactory.training import footprint, proposal
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
    """What fits this card for the same optimizer steps, where that can be predicted; otherwise what takes less."""
    t, size = recipe.training, recipe.dataloader.batch_size
    larger = "use a GPU with more memory, or several with training.parallel=fsdp"
    automatic = "" if t.auto_batch or t.parallel == "fsdp" else "; or let training.auto_batch=true find it"
    part = max((n for n in range(1, size) if size % n == 0), default=None)
    less = f"dataloader.batch_size=1 cannot be smaller: {larger}"
    if part is not None:
        accumulate = t.gradient_accumulate_every * size // part
        less = f"the same steps in less memory: dataloader.batch_size={part} training.gradient_accumulate_every={accumulate}{automatic}"  # fmt: skip
    if not footprint.is_predictable(recipe):
        return less
    gpu_gb, now = card_gb(), footprint.predict(recipe)
    if proposal.needed_gb(now.peak_gb) <= gpu_gb:
        return f"it should fit, with {now.peak_gb:.1f} of {gpu_gb:.0f} GB predicted: see who else uses the GPU (nvidia-smi); {less}"  # fmt: skip
    best = proposal.propose(recipe, now, gpu_gb)
    if best is None:
        return f"no settings for the same steps are predicted to fit {gpu_gb:.0f} GB: {larger}"
    chosen, predicted = best
    return f"the same steps in {gpu_gb:.0f} GB: {proposal.settings(chosen)} ({predicted.peak_gb:.1f} GB predicted){automatic}"  # fmt: skip


def card_gb() -> float:
    """Memory of the GPU that this process uses, in GB."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9


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
