"""The 7B's training step and action prediction against the libraries as they come, at its own size or one for a CPU.

Three views of 224 px, rank-32 adapters in float32 on a frozen base of random weights. The middle size has two vision
towers of 12 blocks and width 384, and 8 language layers of width 1024. All variants take turns in one run and times are
the fastest of each: on a CPU its own time, so that ratios hold on a busy machine too. Memory is counted by
robofactory.training.footprint, with the attention of a GPU; on a GPU it is measured as well. The floor is the time that
the counted operations take at the rate of one large matrix product, measured in the same run.

training   libraries: transformers' Llama, timm's towers (a view at a time) and peft's adapters at every linear layer, all
           as they come; logits and loss at every position
           all positions: the same on our layers, with adapters in language layers and towers
           ours: frozen towers without gradients, logits at action positions. No layer is recomputed in any of them
actions    whole sequence: everything is computed again for each token
           libraries: transformers' generate() with its key-value cache, timm's towers (a view at a time), no adapters
           ours: robofactory.model.openvla.generate, with no draft and with the right one
"""

import argparse
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from robofactory.config import ModelConfig
from robofactory.errors import UserError, run_command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from robofactory.model.openvla import OpenVLA
    from robofactory.shapes import Batch

TEXT_TOKENS, ACTION_TOKENS = 21, 9  # with BOS; with the end token
NUM_ACTIONS = 8


@dataclass(frozen=True)
class Sizes:
    image: int
    language_width: int
    vocabulary: int
    language_layers: int = 32
    towers: dict[str, Any] | None = None  # None: the published ones


SIZES = {
    "7b": Sizes(224, 4096, 32_064),
    "middle": Sizes(224, 1024, 32_064, 8, {"embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0}),
    "quick": Sizes(56, 128, 1_064, 3, {"embed_dim": 64, "depth": 3, "num_heads": 1, "mlp_ratio": 4.0}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="""\
examples:
  python benchmarks/openvla_speed.py
  python benchmarks/openvla_speed.py --device cuda --size 7b --batch_size 4        (a GPU of 80 GB)""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch_size", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--views", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the frozen weights and of the matrix products; a CPU without instructions for bfloat16 emulates it (default: %(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=3, help="after one of warming up (default: %(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="middle", help="quick shows that it runs, and says nothing about speed (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported

    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA GPU; omit it")
    torch.set_default_device(arguments.device)
    torch.manual_seed(0)
    sizes = SIZES[arguments.size]
    dtype = getattr(torch, arguments.dtype)
    rate = matmul_rate(sizes, arguments.batch_size, dtype)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} thread(s)"
    print(f"{arguments.size}, {arguments.dtype}, batch {arguments.batch_size}, {arguments.views} views, {where}; a large matrix product runs at {rate / 1e9:.0f} GFLOP/s")  # fmt: skip
    benchmark_training(sizes, arguments, dtype, rate)
    benchmark_actions(sizes, arguments, dtype, rate)


# -------------------------------------------------------------------------------------------------------- training


def benchmark_training(sizes: Sizes, arguments: argparse.Namespace, dtype: "torch.dtype", rate: float) -> None:
    batch = random_batch(sizes, arguments.batch_size, arguments.views)
    variants: dict[str, tuple[Callable[[], OpenVLA], Callable[..., Tensor]]] = {
        "libraries": (lambda: build_from_libraries(sizes, dtype), loss_of_libraries),
        "all positions": (lambda: build(sizes, dtype, adapters_in_towers=True), loss_over_all_positions),
        "ours": (lambda: build(sizes, dtype), lambda model, batch: model(batch)[0]),
    }
    steps = {name: training_step(make(), batch, loss, dtype) for name, (make, loss) in variants.items()}
    memory = {name: bytes_above_weights(sizes, arguments, dtype, *variant) for name, variant in variants.items()}
    seconds, flops = take_turns(steps, arguments.repetitions)
    print(f"\n{'training step':<24}{'samples/s':>11}{'ratio':>8}{'GB above weights':>18}{'ratio':>8}{'GFLOP':>9}{'of the floor':>14}")  # fmt: skip
    for name in steps:
        floor = flops[name] / rate
        print(
            f"{name:<24}{arguments.batch_size / seconds[name]:>11.3f}{seconds['libraries'] / seconds[name]:>8.2f}"
            f"{memory[name] / 1e9:>18.2f}{memory[name] / memory['libraries']:>8.2f}{flops[name] / 1e9:>9.0f}"
            f"{seconds[name] / floor:>13.2f}x"
        )
    if arguments.device == "cuda":
        measured = {name: measured_above_weights(step) for name, step in steps.items()}
        print(f"measured on the card, GB above weights: {', '.join(f'{name} {size / 1e9:.2f}' for name, size in measured.items())}")  # fmt: skip
    print_profile(steps["ours"], "ours, where the time goes")


def measured_above_weights(step: Callable[[], None]) -> int:
    """The peak of a step on a GPU beyond what stays allocated before it (the optimizer's state is part of that)."""
    import torch

    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def loss_of_libraries(model: "OpenVLA", batch: "Batch") -> "Tensor":
    import torch

    assert batch.action_tokens is not None
    embedded = embed_view_by_view(model, torch.cat([batch.input_ids, batch.action_tokens], dim=1), batch.pixel_values)
    labels = torch.full(embedded.shape[:2], -100)
    labels[:, -batch.action_tokens.shape[1] :] = batch.action_tokens
    return model.language_model(inputs_embeds=embedded, labels=labels).loss


def embed_view_by_view(model: "OpenVLA", ids: "Tensor", pixel_values: "Tensor") -> "Tensor":
    import torch

    visual = [model.projector(model.vision_backbone(view)) for view in pixel_values.split(1, dim=1)]
    text = model.language_model.model.embed_tokens(ids)
    return torch.cat([text[:, :1], *visual, text[:, 1:]], dim=1)


def loss_over_all_positions(model: "OpenVLA", batch: "Batch") -> "Tensor":
    """As the official fine-tuning has it: logits everywhere, in float32; labels outside of the actions are ignored."""
    import torch
    import torch.nn.functional as F

    assert batch.action_tokens is not None
    hidden, _ = model.embed_inputs(batch)
    hidden = torch.cat([hidden, model.language_model.model.embed_tokens(batch.action_tokens[:, :-1])], dim=1)
    logits = model.language_model.lm_head(model.run_layers(hidden, None, hidden.shape[1])).float()
    labels = torch.full(hidden.shape[:2], -100)
    labels[:, -batch.action_tokens.shape[1] :] = batch.action_tokens
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def training_step(
    model: "OpenVLA", batch: "Batch", loss: Callable[..., "Tensor"], dtype: "torch.dtype"
) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW, as robofactory.training does them."""
    import torch

    from robofactory.training.optim import make_optimizer

    optimizer = make_optimizer(model, 0.01)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bytes_above_weights(
    sizes: Sizes,
    arguments: argparse.Namespace,
    dtype: "torch.dtype",
    make_model: Callable[[], "OpenVLA"],
    loss: Callable[..., Any],
) -> int:
    """The peak of the second step, when the optimizer has its state, without weights and adapters. On fake tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from robofactory.training.footprint import Allocations, fill

    with torch.device("meta"):
        model = make_model()
    model.fused_attention = model.vision_backbone.fused_attention = True
    with torch.device("cpu"), FakeTensorMode(), Allocations() as allocations:
        fill(model, allocations)
        step = training_step(model, random_batch(sizes, arguments.batch_size, arguments.views), loss, dtype)
        step()
        step()
    return allocations.peak - allocations.total["weights"] - allocations.total["adapters"]


# --------------------------------------------------------------------------------------------------------- actions


def benchmark_actions(sizes: Sizes, arguments: argparse.Namespace, dtype: "torch.dtype", rate: float) -> None:
    import torch

    ours, theirs = (make(sizes, dtype).eval().requires_grad_(False) for make in (build_base, build_with_library_layers))
    batch = random_batch(sizes, arguments.batch_size, arguments.views)
    with torch.autocast(arguments.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        draft = ours.generate(batch, NUM_ACTIONS)
    predictions: dict[str, Callable[[], Any]] = {
        "whole sequence": lambda: generate_without_cache(ours, batch),
        "libraries": lambda: generate_by_transformers(theirs, batch),
        "ours, no draft": lambda: ours.generate(batch, NUM_ACTIONS),
        "ours, right draft": lambda: ours.generate(batch, NUM_ACTIONS, draft=draft),
    }

    def in_precision(predict: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), torch.autocast(arguments.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                predict()

        return run

    runs = {name: in_precision(predict) for name, predict in predictions.items()}
    seconds, flops = take_turns(runs, arguments.repetitions)
    passes = dict.fromkeys(runs, NUM_ACTIONS)
    for name in list(runs)[2:]:
        before = ours.num_passes
        runs[name]()
        passes[name] = ours.num_passes - before
    print(f"\n{'actions':<24}{'actions/s':>11}{'ratio':>8}{'passes':>8}{'GFLOP':>9}{'of the floor':>14}")
    for name in runs:
        print(
            f"{name:<24}{arguments.batch_size / seconds[name]:>11.3f}{seconds['libraries'] / seconds[name]:>8.2f}"
            f"{passes[name]:>8}{flops[name] / 1e9:>9.0f}{seconds[name] * rate / flops[name]:>13.2f}x"
        )
    print_profile(runs["ours, right draft"], "ours with the right draft, where the time goes")


def generate_without_cache(model: "OpenVLA", batch: "Batch") -> "Tensor":
    """Greedy, the whole sequence again for each token, over the whole vocabulary."""
    import torch

    language, tokens = model.language_model, []
    for _ in range(NUM_ACTIONS):
        hidden, _ = model.embed_inputs(batch)
        hidden = torch.cat([hidden, *(language.model.embed_tokens(token) for token in tokens)], dim=1)
        tokens.append(language.lm_head(model.run_layers(hidden, None, 1)).argmax(dim=-1))
    return torch.cat(tokens, dim=1)


def generate_by_transformers(model: "OpenVLA", batch: "Batch") -> "Tensor":
    import torch

    embedded = embed_view_by_view(model, batch.input_ids, batch.pixel_values)
    return model.language_model.generate(
        inputs_embeds=embedded,
        attention_mask=torch.ones(embedded.shape[:2], dtype=torch.int64),
        max_new_tokens=NUM_ACTIONS,
        min_new_tokens=NUM_ACTIONS,
        do_sample=False,
    )


# ------------------------------------------------------------------------------------------------ what both parts use


def build(sizes: Sizes, dtype: "torch.dtype", adapters_in_towers: bool = False) -> "OpenVLA":
    """With the recipe's adapters."""
    from robofactory.model.lora import choose_trained

    model = build_base(sizes, dtype)
    choose_trained(model, ModelConfig(lora_vision=adapters_in_towers))
    return model


def build_from_libraries(sizes: Sizes, dtype: "torch.dtype") -> "OpenVLA":
    """The same sizes out of the libraries' own layers, with peft's own adapters at every linear layer but the head."""
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn

    model, recipe = build_with_library_layers(sizes, dtype), ModelConfig()
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear and "lm_head" not in name]
    config = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=linears)
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def build_with_library_layers(sizes: Sizes, dtype: "torch.dtype") -> "OpenVLA":
    """The same weights in transformers' own language model, and timm's towers with the attention they choose."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    model = build_base(sizes, dtype)
    theirs = LlamaForCausalLM(model.language_model.config).to(dtype)
    theirs.load_state_dict(model.language_model.state_dict())
    model.language_model, model.vision_backbone.fused_attention = theirs, True
    return model


def build_base(sizes: Sizes, dtype: "torch.dtype") -> "OpenVLA":
    """Random weights in the published layout, each time the same."""
    import torch

    from robofactory.model.openvla import build_from_config
    from robofactory.model.weights import OPENVLA_7B

    config = OPENVLA_7B | {
        "image_sizes": [sizes.image, sizes.image],
        "text_config": {
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.language_width,
            "intermediate_size": intermediate_width(sizes),
            "num_hidden_layers": sizes.language_layers,
            "num_attention_heads": max(1, sizes.language_width // 128),
        },
    }
    torch.manual_seed(0)
    overrides = None if sizes.towers is None else dict.fromkeys(OPENVLA_7B["timm_model_ids"], sizes.towers)
    return build_from_config(config, global_token=True, timm_overrides=overrides).to(dtype)


def intermediate_width(sizes: Sizes) -> int:
    """Of the language layers' MLP: 11,008 at a width of 4,096."""
    return sizes.language_width * 43 // 16


def random_batch(sizes: Sizes, batch_size: int, num_views: int) -> "Batch":
    import torch

    from robofactory.shapes import Batch

    ids = torch.randint(3, sizes.vocabulary - 64 - 256, (batch_size, TEXT_TOKENS))
    return Batch(
        pixel_values=torch.randn(batch_size, num_views, 6, sizes.image, sizes.image),
        input_ids=ids,
        text_mask=torch.ones_like(ids, dtype=torch.bool),
        action_tokens=torch.randint(sizes.vocabulary - 64 - 256, sizes.vocabulary - 64, (batch_size, ACTION_TOKENS)),
    )


def take_turns(works: dict[str, Callable[[], Any]], repetitions: int) -> tuple[dict[str, float], dict[str, int]]:
    """Of each, the seconds of its fastest turn (CPU time; on a GPU, until all is done), and its operations.

    Counted are all matrix products and convolutions, attention's included, in a first turn that warms up; a
    multiplication and an addition are two operations.
    """
    from torch.utils.flop_counter import FlopCounterMode

    flops = {}
    for name, work in works.items():
        with FlopCounterMode(display=False) as counter:
            work()
        flops[name] = counter.get_total_flops()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            started = clock()
            work()
            seconds[name].append(clock() - started)
    return {name: min(turns) for name, turns in seconds.items()}, flops


def clock() -> float:
    import torch

    if torch.get_default_device().type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(sizes: Sizes, batch_size: int, dtype: "torch.dtype") -> float:
    """FLOP/s of the language layers' largest product, at the number of rows that a step has."""
    import torch

    rows, width = 800 * batch_size, sizes.language_width
    inputs, weight = torch.randn(rows, width).to(dtype), torch.randn(intermediate_width(sizes), width).to(dtype)
    seconds, flops = take_turns({"product": lambda: torch.nn.functional.linear(inputs, weight)}, 5)
    return flops["product"] / seconds["product"]


def print_profile(work: Callable[[], Any], title: str) -> None:
    import torch

    on_gpu = torch.get_default_device().type == "cuda"
    with torch.profiler.profile() as profile:
        work()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = sorted(profile.key_averages(), key=lambda average: -getattr(average, key))
    total = sum(getattr(average, key) for average in averages)
    print(f"\n{title}")
    for average in averages[:8]:
        print(f"  {getattr(average, key) / total:>6.1%}  {average.key[:100]} ({average.count} calls)")


if __name__ == "__main__":
    run_command(main)
