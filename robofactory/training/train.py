"""Fine-tune OpenVLA, or train the tiny one from scratch, on the demonstrations of one agent."""

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from robofactory.config import (
    RecipeConfig,
    SceneConfig,
    UserError,
    dataset_dir,
    load_recipe,
    load_task_scene,
    of_round,
    relabelled_dir,
    require_agent,
    run_command,
    run_dir,
)

if TYPE_CHECKING:
    from robofactory.shapes import Batch
    from robofactory.training.distributed import Topology
    from robofactory.training.rounds import Start

LARGEST_ON_A_CPU = 100_000_000  # parameters of published weights that are fine-tuned without a GPU


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  bash train.sh --policy openvla --task LiftBarrier-rf --agent_id 0 --recipe robot_openvla_tiny     (a laptop's CPU)
  bash train.sh --policy openvla --task LiftBarrier-rf --agent_id 0 --gpus 8                        (the 7B)
  bash train.sh --task LiftBarrier-rf --all_agents --recipe robot_openvla_tiny training.num_epochs=4

Any key of the recipe may be overridden: model.*, training.*, dataloader.*, data.*; the keys are in
robofactory/config.py. Out of memory: dataloader.batch_size=8 training.gradient_accumulate_every=2.
Demonstrations are recorded first when there are none.""",
    )
    parser.add_argument("--policy", default="openvla", choices=["openvla"], help="kind of policy (default: openvla)")
    parser.add_argument("--task", required=True, help="for instance LiftBarrier-rf")
    agents = parser.add_mutually_exclusive_group()
    agents.add_argument("--agent_id", type=int, default=0, help="whose policy to train (default: 0)")
    agents.add_argument(
        "--all_agents", action="store_true", help="train every agent of the task, side by side on a CPU"
    )
    parser.add_argument("--recipe", default="robot_openvla", help="model and training: a name in robofactory/configs or a .yaml file (default: robot_openvla, the 7B)")  # fmt: skip
    parser.add_argument("--config", help="scene of the task, .yaml (default: the task's own)")
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU (default: 1)")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run's latest checkpoint, if there is one"
    )
    parser.add_argument("--round", type=int, default=0, help="above 0: go on with what robofactory record --relabel recorded (default: 0, the demonstrations alone)")  # fmt: skip
    parser.add_argument("--bar_position", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the recipe")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse_arguments()
    if args.all_agents and args.gpus > 1:
        raise UserError("--all_agents shares one machine's cores or its one GPU; with --gpus, train one --agent_id after the other")  # fmt: skip
    scene = load_task_scene(args.task, args.config)
    recipe = of_round(load_recipe(args.recipe, args.overrides), args.round)
    require_agent(scene, args.agent_id)
    require_hardware(recipe)
    for agent_id in range(scene.num_agents) if args.all_agents else [args.agent_id]:
        record_if_missing(scene, args.config, recipe, agent_id)
    if args.all_agents:
        train_all_agents(scene.num_agents)
    else:
        train(args.policy, scene, args.agent_id, recipe, args.resume, args.bar_position, args.round)


def require_hardware(recipe: RecipeConfig) -> None:
    """A large model wants a GPU; never a silent switch to something smaller."""
    import torch

    from robofactory.model.lora import build_untrained
    from robofactory.model.weights import published_config

    m = recipe.model
    if m.architecture is not None or torch.cuda.is_available():
        return
    model = build_untrained(m, published_config(m.model_name), proprio_dim=None)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters > LARGEST_ON_A_CPU:
        raise UserError(f"{m.model_name} has {num_parameters / 1e9:.1f} billion parameters and needs a CUDA GPU, there is none; on a CPU use --recipe robot_openvla_tiny")  # fmt: skip


def record_if_missing(scene: SceneConfig, scene_path: str | None, recipe: RecipeConfig, agent_id: int) -> None:
    """Record the demonstrations the recipe asks for, in a process of its own: training never imports the simulator."""
    data = recipe.data
    directory = dataset_dir(scene.task, agent_id, data.num_episodes)
    if (directory / "meta" / "info.json").exists():
        return
    command = ["-m", "robofactory.demos.record", "--task", scene.task, "--num", str(data.num_episodes)]
    command += ["--noise", str(data.noise_share), "--visual_detail", data.visual_detail]
    if data.image_width is not None:
        command += ["--width", str(data.image_width), "--height", str(data.image_height)]
    if scene_path is not None:
        command += ["--config", scene_path]
    if "WORLD_SIZE" in os.environ:
        raise UserError(f"no demonstrations in {directory}; record them first: python {' '.join(command)}")
    done = subprocess.run([sys.executable, *command])
    if done.returncode != 0:
        sys.exit(done.returncode)


def train_all_agents(num_agents: int) -> None:
    """One process an agent, side by side, the cores shared between them: faster than one after the other on a CPU."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--all_agents"]
    command = [sys.executable, "-m", "robofactory.training.train", *arguments]
    threads = max(1, (os.cpu_count() or 1) // num_agents)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    processes = [
        subprocess.Popen([*command, "--agent_id", str(agent), "--bar_position", str(agent)], env=environment)
        for agent in range(num_agents)
    ]
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:  # the children got the signal too: they finish their step and save
        codes = [process.wait() for process in processes]
    failed = [code for code in codes if code != 0]
    if failed:
        sys.exit(failed[0])


# ------------------------------------------------------------------------------------------------------ the training


def train(
    policy: str,
    scene: SceneConfig,
    agent_id: int,
    recipe: RecipeConfig,
    resume: bool,
    bar_position: int,
    round_number: int = 0,
) -> None:
    """Train one agent's policy; everything in the order of time.

    Args:
        recipe: of this round, see `config.of_round`.
        round_number: above 0, the run goes on from the end of the round before, with a new optimizer and schedule, on
            the demonstrations and all episodes relabelled up to this round.
    """
    import torch
    from torch.nn.utils import clip_grad_norm_

    from robofactory import checkpoint
    from robofactory.data.dataset import load_splits
    from robofactory.model.lora import parameter_table
    from robofactory.model.precision import autocast
    from robofactory.training import distributed, footprint, optim
    from robofactory.training.log import Log
    from robofactory.training.metrics import mean, score, validate
    from robofactory.training.preflight import preflight
    from robofactory.training.rounds import find_start

    # ---- where the run stands
    num_demonstrations = recipe.data.num_episodes
    run = run_dir(policy, scene.task, agent_id, num_demonstrations)
    start = find_start(run, recipe, round_number, resume)
    if start is None:
        print(f"trained already: {run / 'latest'}")
        return

    # ---- processes and random numbers
    t = recipe.training
    topology = distributed.start()
    device = topology.device
    torch.manual_seed(t.seed)

    # ---- data: split by episode, encoded by the codec that is saved with the policy
    relabelled = [
        relabelled_dir(scene.task, agent_id, num_demonstrations, number) for number in range(1, round_number + 1)
    ]
    data = load_splits(dataset_dir(scene.task, agent_id, num_demonstrations), recipe, relabelled)
    codec = data.codec
    train_batches = data.train_batches(topology.rank, topology.world_size)
    val_batches = data.val_batches(topology.rank, topology.world_size)
    updates_per_epoch = -(-train_batches.num_batches // t.gradient_accumulate_every)
    num_updates = t.max_steps or t.num_epochs * updates_per_epoch  # of this round
    num_epochs = -(-num_updates // updates_per_epoch)
    last_update, last_epoch = start.first_update + num_updates, start.first_epoch + num_epochs

    # ---- model, proven to be connected before anything is spent
    model = checkpoint.build_model(recipe, codec, device)
    model.num_recomputed_layers = t.num_recomputed_layers
    preflight(model, codec, *data.examples(min(8, recipe.dataloader.batch_size), device))
    optimizer = optim.make_optimizer(model, t.learning_rate, t.weight_decay)
    schedule = optim.make_schedule(optimizer, num_updates, t.warmup_ratio)
    trainable = [p for p in model.parameters() if p.requires_grad]

    update, first_epoch, first_micro = restore(start, model, codec, recipe, optimizer, schedule)
    wrapped = distributed.wrap(model, topology)
    log = Log(run, dataclasses.asdict(recipe), topology, last_update, update, bar_position)
    log.message(parameter_table(model))
    memory = ""
    if device.type == "cuda" and topology.is_main and recipe.model.quantize is None:
        memory = f"peak memory: {footprint.predict(recipe).peak_gb:.1f} GB predicted"
        log.message(memory)
    log.message(codec.action_table(data.train_actions()))
    log.input_images(*data.input_images())
    stop = StopSignal()

    def save(name: str, epoch: int, micro: int) -> None:
        if topology.is_main:
            state = {
                "round": round_number, "first_epoch": start.first_epoch, "first_update": start.first_update,
                "update": update, "epoch": epoch, "micro": micro,
                "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
            }  # fmt: skip
            checkpoint.save(run, name, model, codec, recipe, state)

    # ---- the loop
    for epoch in range(first_epoch, last_epoch):
        model.train()
        micro = first_micro if epoch == first_epoch else 0
        for window in windows(train_batches.epoch(epoch, first_batch=micro), t.gradient_accumulate_every):
            measured = []
            for index, batch in enumerate(window):
                batch = batch.to(device)
                is_last = index == len(window) - 1
                with contextlib.nullcontext() if is_last or wrapped is model else wrapped.no_sync():  # type: ignore
                    with autocast(model):
                        loss, predicted = wrapped(batch, t.soft_target_sigma_bins)
                    (loss / len(window)).backward()
                measured.append({"train_loss": loss.item()} | score(codec, predicted, batch))
            values = mean(measured) | {"grad_norm": clip_grad_norm_(trainable, t.max_grad_norm).item()}
            require_finite(values, epoch, update, topology)
            lr = float(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            update, micro = update + 1, micro + len(window)
            log.step(sum(len(batch.input_ids) for batch in window), values, lr, epoch)
            if distributed.any_rank(stop.requested, topology):
                save(f"step_{update}", epoch, micro)
                log.message(f"stopped at step {update}; --resume continues from {run / f'step_{update}'}")
                log.close()
                sys.exit(130)
            if update == last_update:
                break
        log.epoch(epoch=epoch + 1, **validate(model, codec, val_batches.epoch(0), t.soft_target_sigma_bins, topology))
        if (epoch + 1) % t.checkpoint_every == 0 or epoch + 1 == last_epoch:
            save(f"epoch_{epoch + 1}", epoch + 1, 0)

    log.close()
    if memory:
        log.message(f"{memory}, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB measured")
    log.message(f"trained: {run / 'latest'}; curves in {run / 'curves.png'}")
    distributed.stop()


def windows(batches: "Iterable[Batch]", size: int) -> "Iterator[list[Batch]]":
    """The micro-batches of each optimizer step; the last window of an epoch may be shorter."""
    window: list[Batch] = []
    for batch in batches:
        window.append(batch)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def require_finite(values: dict[str, float], epoch: int, update: int, topology: "Topology") -> None:
    """The same verdict on all processes, before the weights move."""
    from robofactory.training.distributed import any_rank

    if any_rank(not math.isfinite(values["train_loss"] + values["grad_norm"]), topology):
        raise UserError(
            f"loss {values['train_loss']} with gradient norm {values['grad_norm']} in epoch {epoch}, step {update}; the "
            "weights were not touched. Resume with a lower training.learning_rate"
        )


def restore(
    start: "Start", model: Any, codec: Any, recipe: RecipeConfig, optimizer: Any, schedule: Any
) -> tuple[int, int, int]:
    """Load what the start says; the optimizer step, epoch and micro-batch to go on with.

    Raises:
        UserError: the checkpoint is of another model or other data, or a file is missing.
    """
    from robofactory import checkpoint

    if start.checkpoint is None:
        return 0, 0, 0
    directory = start.checkpoint
    saved_codec = type(codec).load(directory)
    if checkpoint.load_recipe_of(directory).model != recipe.model:
        raise UserError(f"{directory} is another model than the recipe's; use the recipe it was trained with, or move the run away")  # fmt: skip
    if saved_codec.fingerprint != codec.fingerprint:
        raise UserError(f"{directory} was trained with other data or preprocessing (codec {saved_codec.fingerprint[:12]}, now {codec.fingerprint[:12]}); move the run away, or restore its dataset and recipe")  # fmt: skip
    checkpoint.load_trained(directory, model)
    if not start.resumes:
        return start.first_update, start.first_epoch, 0
    state = checkpoint.load_training_state(directory)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["update"], state["epoch"], state["micro"]


class StopSignal:
    """The first SIGINT or SIGTERM asks the loop to finish its step and save; the second stops at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.requested = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)


if __name__ == "__main__":
    run_command(main)
