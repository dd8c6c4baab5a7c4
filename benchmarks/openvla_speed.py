"""The 7B's training step and action prediction against the straightforward ones, at a size that a CPU can run.

Two vision towers of 12 blocks and width 384, 8 language layers of width 1024, three views of 224 px, rank-32 adapters in
float32 on a frozen base. All variants take turns in one run and times are the fastest of each in CPU time, so that
ratios hold on a busy machine too. Memory is counted by robofactory.training.footprint, with the attention of a GPU. The
floor is the time that the counted operations take at the rate of one large matrix product, measured in the same run.

training   straightforward: adapters and gradients in the vision towers too, logits at every position, in float32
           ours: frozen towers without gradients, logits at action positions. No layer is recomputed in either
actions    whole sequence: everything is computed again for each token
           transformers: its own generate() with its own key-value cache, each view through the towers on its own
           ours: robofactory.model.openvla.generate, with no draft and with the right one
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from robofactory.config import ModelConfig, run_command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from robofactory.model.openvla import OpenVLA
    from robofactory.shapes import Batch

TEXT_TOKENS, ACTION_TOKENS = 21, 9  # with BOS; with the end token
NUM_ACTIONS = 8


@dataclass(frozen=True)
class Sizes:
    image: int = 224
    depth: int = 12
    vision_width: int = 384
    language_layers: int = 8
    language_width: int = 1024
    vocabulary: int = 32_064


QUICK = Sizes(image=56, depth=3, vision_width=64, language_layers=3, language_width=128, vocabulary=1_064)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python benchmarks/openvla_speed.py --repetitions 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch_size", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--views", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the frozen weights and of the matrix products; a CPU without instructions for bfloat16 emulates it (default: %(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=3, help="after one of warming up (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a far smaller model: shows that it runs, says nothing about speed")  # fmt: skip
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported

    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = QUICK if arguments.quick else Sizes()
    dtype = getattr(torch, arguments.dtype)
    rate = matmul_rate(sizes, arguments.batch_size, dtype)
    print(f"{arguments.dtype}, batch {arguments.batch_size}, {arguments.views} views, {arguments.threads} thread(s); a large matrix product runs at {rate / 1e9:.0f} GFLOP/s")  # fmt: skip
    benchmark_training(sizes, arguments, dtype, rate)
    benchmark_actions(sizes, arguments, dtype, rate)


# -------------------------------------------------------------------------------------------------------- training


def benchmark_training(sizes: Sizes, arguments: argparse.Namespace, dtype: "torch.dtype", rate: float) -> None:
    import torch

    batch = random_batch(sizes, arguments.batch_size, arguments.views)
    losses = {"straightforward": loss_over_all_positions, "ours": lambda model, batch: model(batch)[0]}
    models = {name: build(sizes, dtype, adapters_in_towers=name != "ours") for name in losses}
    steps = {name: training_step(models[name], batch, loss, dtype) for name, loss in losses.items()}
    memory = {name: bytes_above_weights(sizes, arguments, dtype, name != "ours", loss) for name, loss in losses.items()}
    seconds, flops = take_turns(steps, arguments.repetitions)
    print(f"\n{'training step':<24}{'samples/s':>11}{'ratio':>8}{'GB above weights':>18}{'ratio':>8}{'GFLOP':>9}{'of the floor':>14}")  # fmt: skip
    for name in steps:
        floor = flops[name] / rate
        print(
            f"{name:<24}{arguments.batch_size / seconds[name]:>11.3f}{seconds['straightforward'] / seconds[name]:>8.2f}"
            f"{memory[name] / 1e9:>18.2f}{memory[name] / memory['straightforward']:>8.2f}{flops[name] / 1e9:>9.0f}"
            f"{seconds[name] / floor:>13.2f}x"
        )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        steps["ours"]()
    print_profile(profile, "ours, where the time goes")


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
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
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
    adapters_in_towers: bool,
    loss: Callable[..., Any],
) -> int:
    """The peak of the second step, when the optimizer has its state, without weights and adapters. On fake tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from robofactory.training.footprint import Allocations, fill

    with torch.device("meta"):
        model = build(sizes, dtype, adapters_in_towers)
    model.fused_attention = model.vision_backbone.fused_attention = True
    with FakeTensorMode(), Allocations() as allocations:
        fill(model, allocations)
        step = training_step(model, random_batch(sizes, arguments.batch_size, arguments.views), loss, dtype)
        step()
        step()
    return allocations.peak - allocations.total["weights"] - allocations.total["adapters"]


# --------------------------------------------------------------------------------------------------------- actions


def benchmark_actions(sizes: Sizes, arguments: argparse.Namespace, dtype: "torch.dtype", rate: float) -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    from robofactory.model.lora import merge_adapters

    model = build(sizes, dtype).eval()
    merge_adapters(model)
    llama = LlamaForCausalLM(model.language_model.config).to(dtype).eval()
    llama.load_state_dict(model.language_model.state_dict())
    batch = random_batch(sizes, arguments.batch_size, arguments.views)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        draft = model.generate(batch, NUM_ACTIONS)
    predictions: dict[str, Callable[[], Any]] = {
        "whole sequence": lambda: generate_without_cache(model, batch),
        "transformers": lambda: generate_by_transformers(model, llama, batch),
        "ours, no draft": lambda: model.generate(batch, NUM_ACTIONS),
        "ours, right draft": lambda: model.generate(batch, NUM_ACTIONS, draft=draft),
    }

    def in_precision(predict: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                predict()

        return run

    runs = {name: in_precision(predict) for name, predict in predictions.items()}
    seconds, flops = take_turns(runs, arguments.repetitions)
    passes = dict.fromkeys(runs, NUM_ACTIONS)
    for name in list(runs)[2:]:
        before = model.num_passes
        runs[name]()
        passes[name] = model.num_passes - before
    print(f"\n{'actions':<24}{'actions/s':>11}{'ratio':>8}{'passes':>8}{'GFLOP':>9}{'of the floor':>14}")
    for name in runs:
        print(
            f"{name:<24}{arguments.batch_size / seconds[name]:>11.3f}{seconds['transformers'] / seconds[name]:>8.2f}"
            f"{passes[name]:>8}{flops[name] / 1e9:>9.0f}{seconds[name] * rate / flops[name]:>13.2f}x"
        )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        runs["ours, right draft"]()
    print_profile(profile, "ours with the right draft, where the time goes")


def generate_without_cache(model: "OpenVLA", batch: "Batch") -> "Tensor":
    """Greedy, the whole sequence again for each token, over the whole vocabulary."""
    import torch

    language, tokens = model.language_model, []
    for _ in range(NUM_ACTIONS):
        hidden, _ = model.embed_inputs(batch)
        hidden = torch.cat([hidden, *(language.model.embed_tokens(token) for token in tokens)], dim=1)
        tokens.append(language.lm_head(model.run_layers(hidden, None, 1)).argmax(dim=-1))
    return torch.cat(tokens, dim=1)


def generate_by_transformers(model: "OpenVLA", llama: Any, batch: "Batch") -> "Tensor":
    import torch

    views = batch.pixel_values.split(1, dim=1)
    visual = torch.cat([model.projector(model.vision_backbone(view)) for view in views], dim=1)
    text = llama.model.embed_tokens(batch.input_ids)
    embedded = torch.cat([text[:, :1], visual, text[:, 1:]], dim=1)
    return llama.generate(
        inputs_embeds=embedded,
        attention_mask=torch.ones(embedded.shape[:2], dtype=torch.int64),
        max_new_tokens=NUM_ACTIONS,
        min_new_tokens=NUM_ACTIONS,
        do_sample=False,
    )


# ------------------------------------------------------------------------------------------------ what both parts use


def build(sizes: Sizes, dtype: "torch.dtype", adapters_in_towers: bool = False) -> "OpenVLA":
    """Random weights in the published layout, with the recipe's adapters."""
    import torch

    from robofactory.model.lora import choose_trained
    from robofactory.model.openvla import build_from_config
    from robofactory.model.weights import OPENVLA_7B

    tower = {"embed_dim": sizes.vision_width, "depth": sizes.depth, "num_heads": sizes.vision_width // 64 or 1}
    config = OPENVLA_7B | {
        "image_sizes": [sizes.image, sizes.image],
        "text_config": {
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.language_width,
            "intermediate_size": sizes.language_width * 11 // 4,
            "num_hidden_layers": sizes.language_layers,
            "num_attention_heads": max(1, sizes.language_width // 128),
        },
    }
    torch.manual_seed(0)
    overrides = {model_id: {**tower, "mlp_ratio": 4.0} for model_id in OPENVLA_7B["timm_model_ids"]}
    model = build_from_config(config, global_token=True, timm_overrides=overrides).to(dtype)
    choose_trained(model, ModelConfig(lora_vision=adapters_in_towers))
    return model


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
    """Of each, the seconds of CPU time in its fastest turn, and its operations.

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
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
    return {name: min(turns) for name, turns in seconds.items()}, flops


def matmul_rate(sizes: Sizes, batch_size: int, dtype: "torch.dtype") -> float:
    """FLOP/s of the language layers' largest product, at the number of rows that a step has."""
    import torch

    rows, width = 800 * batch_size, sizes.language_width
    inputs, weight = torch.randn(rows, width).to(dtype), torch.randn(width * 11 // 4, width).to(dtype)
    seconds, flops = take_turns({"product": lambda: torch.nn.functional.linear(inputs, weight)}, 5)
    return flops["product"] / seconds["product"]


def print_profile(profile: Any, title: str) -> None:
    averages = sorted(profile.key_averages(), key=lambda average: -average.self_cpu_time_total)
    total = sum(average.self_cpu_time_total for average in averages)
    print(f"\n{title}")
    for average in averages[:8]:
        print(f"  {average.self_cpu_time_total / total:>6.1%}  {average.key} ({average.count} calls)")


if __name__ == "__main__":
    run_command(main)
