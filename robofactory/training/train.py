"""Fine-tune OpenVLA, or train the tiny one from scratch, on the demonstrations of one agent."""

import argparse
import contextlib
import dataclasses
import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from robofactory import arguments
from robofactory.config import RecipeConfig, load_recipe, load_task_scene, of_round, require_agent, with_pictures
from robofactory.errors import EXIT_STOPPED, UserError, run_command
from robofactory.paths import dataset_dir, dataset_place, find_weights, relabelled_dir, run_dir

OPEN_LOOP_FRAMES = 64  # of a held-out episode, at every checkpoint that is kept
PREFLIGHT_EXAMPLES = 8

LARGEST_ON_A_CPU = 100_000_000  # parameters of published weights that are fine-tuned without a GPU


def parse_arguments() -> argparse.Namespace:
    parser = arguments.Parser(
        prog="robofactory train",
        allow_abbrev=False,  # the processes of --all_agents would not know the short form
        description=__doc__,
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
    parser.add_argument("--task", type=arguments.name, help="for instance LiftBarrier-rf")
    agents = parser.add_mutually_exclusive_group()
    agents.add_argument("--agent_id", type=arguments.whole(0), help="whose policy to train (default: 0)")
    agents.add_argument(
        "--all_agents",
        action="store_true",
        help="train every agent of the task: side by side on a CPU, one after the other on a GPU",
    )
    parser.add_argument("--recipe", default="robot_openvla", help="model and training: a name in robofactory/configs or a .yaml file (default: robot_openvla, the 7B)")  # fmt: skip
    parser.add_argument("--config", type=arguments.path, help="scene of the task, .yaml (default: the task's own)")
    parser.add_argument("--gpus", type=arguments.whole(1), default=1, help="processes, one for each GPU (default: 1); on several machines, see docs/slurm.sh")  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run's latest checkpoint, if there is one"
    )
    parser.add_argument("--round", type=arguments.whole(0), default=0, help="above 0: go on with what robofactory record --round recorded (default: 0, the demonstrations alone)")  # fmt: skip
    parser.add_argument("--replay", type=arguments.path, metavar="DIRECTORY", help="run the step that training gave up at again, from the directory it named")  # fmt: skip
    parser.add_argument("--bar_position", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the recipe")
    args = parser.parse_intermixed_args()
    if not (args.task or args.replay):
        parser.error("the following arguments are required: --task")
    args.agent_id = args.agent_id or 0  # no default: argparse would not know it from --agent_id 0 beside --all_agents
    return args


def main() -> None:
    args = parse_arguments()
    if args.all_agents and args.gpus > 1:
        raise UserError("--all_agents shares one machine's cores or its one GPU; with --gpus, train one --agent_id after the other")  # fmt: skip
    if args.replay:
        if not args.replay.is_dir():
            raise UserError(f"--replay {args.replay}: no such directory")
        from robofactory.training import replay

        print(replay.run_again(args.replay))
        return
    recipe = of_round(load_recipe(args.recipe, args.overrides), args.round)
    agents = [args.agent_id]
    if args.all_agents:
        agents = list(range(load_task_scene(args.task, args.config).num_agents))
    demonstrations = [dataset_dir(args.task, agent_id, recipe.data.num_episodes) for agent_id in agents]
    if recipe.data.datasets:
        for place in map(dataset_place, recipe.data.datasets):
            if "://" not in place and not Path(place).is_dir() and Path(place) not in demonstrations:
                raise UserError(f"data.datasets: there is no directory {place}")
        demonstrations = [directory for directory in demonstrations if directory.name in recipe.data.datasets]
    if args.config or not all(map(is_recorded, demonstrations)):
        require_task(args.task, args.config, args.agent_id, recipe.data.num_episodes)
    runs = [run_dir(args.policy, args.task, agent_id, recipe.data.num_episodes) for agent_id in agents]
    with owned(runs):
        if args.config:
            require_same_scene(args.task, args.config, recipe, [each for each in demonstrations if is_recorded(each)])
        require_hardware(recipe, args.gpus)
        for directory in demonstrations:
            record_if_missing(directory, args)
        if not args.all_agents and (args.gpus == 1 or "WORLD_SIZE" in os.environ):
            from robofactory.training import fitting

            with fitting.out_of_memory_explained(recipe):
                train(args.policy, args.task, args.agent_id, recipe, args.resume, args.bar_position, args.round)
            return
    if args.all_agents:  # each of these processes owns its run
        train_all_agents(len(agents))
    else:
        from robofactory.training import distributed

        sys.exit(distributed.launch(args.gpus, "robofactory.training.train", sys.argv[1:]))


@contextlib.contextmanager
def owned(runs: list[Path]) -> Iterator[None]:
    """Hold runs for writing; of several processes of a training the main one does."""
    from robofactory import files

    with contextlib.ExitStack() as ours:
        for run in runs if os.environ.get("RANK", "0") == "0" else ():
            ours.enter_context(files.owned(run))
        yield


def require_hardware(recipe: RecipeConfig, num_gpus: int = 1) -> None:
    """Each process wants a GPU if there are any, a large model wants one anyway, and its weights: before an hour is spent
    on demonstrations. Never a silent switch to something smaller."""
    import torch

    from robofactory.codec.codec import inputs_of
    from robofactory.model.lora import build_untrained
    from robofactory.model.weights import fingerprint, published_config

    has_gpu = torch.cuda.is_available()
    if has_gpu and num_gpus > torch.cuda.device_count():
        raise UserError(f"--gpus {num_gpus}: this machine has {torch.cuda.device_count()}; one process for each GPU")
    m = recipe.model
    if m.architecture is not None:
        return
    if not has_gpu:
        model = build_untrained(m, published_config(m.model_name), proprio_dim=None)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if num_parameters > LARGEST_ON_A_CPU:
            raise UserError(f"{m.model_name} has {num_parameters / 1e9:.1f} billion parameters and needs a CUDA GPU, there is none; on a CPU use --recipe robot_openvla_tiny")  # fmt: skip
    inputs_of(recipe)
    fingerprint(find_weights(m.model_name))  # reads what the files say they hold


def is_recorded(demonstrations: Path) -> bool:
    return (demonstrations / "meta" / "info.json").exists()


def require_task(task: str, scene_path: Path | None, agent_id: int, num_episodes: int) -> None:
    """Raises UserError unless it is a task and an agent of ours. Data that is there already needs neither."""
    try:
        scene = load_task_scene(task, scene_path)
    except UserError as error:
        own = dataset_dir(task, agent_id, num_episodes)
        others = sorted(
            path.parent.parent.name for path in own.parent.glob(f"{glob.escape(task)}_Agent*_*/meta/info.json")
        )
        there = f"; there are {', '.join(others)}, see --agent_id and data.num_episodes" if others else ""
        line = f"{error}; a dataset of your own would be in {own}{there}"
        raise UserError(str(error) if scene_path else line) from None
    require_agent(scene, agent_id)


def require_same_scene(task: str, scene_path: Path, recipe: RecipeConfig, recorded: list[Path]) -> None:
    """Raises UserError where demonstrations that are there already would not have been recorded in this scene."""
    from robofactory.data.description import require_scene

    d = recipe.data
    scene = with_pictures(load_task_scene(task, scene_path), d.visual_detail, d.image_width, d.image_height)
    for directory in recorded:
        require_scene(directory, scene)


def record_if_missing(directory: Path, args: argparse.Namespace) -> None:
    """Record the demonstrations the recipe asks for, in a process of its own: training never imports the simulator."""
    from robofactory.training import children

    if is_recorded(directory):
        return
    command = ["-m", "robofactory.demos.record", "--task", args.task, "--recipe", args.recipe, *args.overrides]
    if args.config is not None:
        command += ["--config", str(args.config)]
    if "WORLD_SIZE" in os.environ:
        raise UserError(f"no demonstrations in {directory}; record them first: python {' '.join(command)}")
    children.run({"the recording": command})


def train_all_agents(num_agents: int) -> None:
    """A process an agent. On a CPU side by side, the cores shared between them, which is faster than one after the other;
    a GPU has the memory for one."""
    import torch

    from robofactory.training import children

    arguments = [argument for argument in sys.argv[1:] if argument != "--all_agents"]
    of_agent = ["-m", "robofactory.training.train", *arguments, "--agent_id"]
    commands = {f"the training of agent {n}": [*of_agent, str(n)] for n in range(num_agents)}
    if torch.cuda.is_available():
        for name, command in commands.items():
            children.run({name: command})
    else:
        threads = max(1, (os.cpu_count() or 1) // num_agents)
        for line, command in enumerate(commands.values()):
            command += ["--bar_position", str(line)]
        children.run(commands, OMP_NUM_THREADS=str(threads))


# ------------------------------------------------------------------------------------------------------ the training


def train(
    policy: str,
    task: str,
    agent_id: int,
    recipe: RecipeConfig,
    resume: bool,
    bar_position: int,
    round_number: int = 0,
) -> None:
    """Train one agent's policy; everything in the order of time.

    Order, crops and random numbers are functions of seed, epoch and step, so a run that was stopped anywhere goes on
    from its checkpoint as if nothing had happened: bit for bit.

    Args:
        recipe: of this round, see `config.of_round`.
        round_number: above 0, the run goes on from the end of the round before, with a new optimizer and schedule, on
            the demonstrations and all episodes relabelled up to this round.
    """
    import torch
    from torch.nn.utils import clip_grad_norm_

    from robofactory import checkpoint
    from robofactory.data.dataset import load_splits, locate_datasets
    from robofactory.data.findings import require_sound
    from robofactory.model.lora import parameter_table
    from robofactory.model.precision import autocast
    from robofactory.training import distributed, fitting, footprint, optim, replay, resuming
    from robofactory.training.guard import Guard, Verdict
    from robofactory.training.log import Log
    from robofactory.training.metrics import Meter, check_open_loop, validate
    from robofactory.training.preflight import preflight

    # ---- processes, and where the run stands
    t = recipe.training
    topology = distributed.start()
    device = topology.device
    num_demonstrations = recipe.data.num_episodes
    run = run_dir(policy, task, agent_id, num_demonstrations)
    start = resuming.find_start(run, recipe, round_number, resume, topology)
    if start is None:
        print(f"trained already: {run / 'latest'}")
        return distributed.stop()

    # ---- data: looked at, split by episode, encoded by the codec that is saved with the policy
    relabelled = [relabelled_dir(task, agent_id, num_demonstrations, n) for n in range(1, round_number + 1)]
    demonstrations = dataset_dir(task, agent_id, num_demonstrations)
    places = locate_datasets(demonstrations, recipe).values()
    on_this_disk = [Path(place) for place in places if "://" not in place]
    if topology.is_main and (passing := ", ".join(place for place in places if "://" in place)):
        print(f"not looked at before training: {passing}; `robofactory inspect` takes a copy on a disk")
    require_sound([*on_this_disk, *relabelled], recipe.data.views, recipe.data.accept, recipe.data.pass_through)
    data = start.with_its_normalization(load_splits(demonstrations, recipe, relabelled))
    codec, meter = data.codec, Meter(data.codec, device)
    start.require_same_policy(recipe, codec)

    # ---- model, in batches that fit, proven to be connected before anything is spent
    torch.manual_seed(t.seed)
    model = checkpoint.build_model(recipe, codec, distributed.device_to_build_on(topology, t.parallel))
    model.num_recomputed_layers = t.num_recomputed_layers
    if start.directory is not None:
        checkpoint.load_trained(start.directory, model)
    if t.auto_batch:
        recipe = fitting.halve_batch_until_it_fits(recipe, model, data, topology)
        data, t = dataclasses.replace(data, recipe=recipe), recipe.training
    wrapped = distributed.wrap(model, topology, t.parallel)
    preflight(model, wrapped, codec, *data.examples(min(PREFLIGHT_EXAMPLES, recipe.dataloader.batch_size), device))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.make_optimizer(model, t.weight_decay)
    optim.restore_moments(model, optimizer, start.moments)

    # ---- batches; `update` optimizer steps are done, `validated` of them when it was last validated
    batches = data.train_batches(topology.rank, topology.world_size)
    val_batches = data.val_batches(topology.rank, topology.world_size)
    steps_per_epoch = batches.num_steps
    num_updates = t.max_steps or t.num_epochs * steps_per_epoch  # of this round
    last_update = start.first_update + num_updates
    start.require_same_steps(recipe, steps_per_epoch, topology)
    update, validated, best_val_loss = start.update, start.validated, start.best_val_loss

    # ---- what watches over it
    guard = Guard(t.max_nonfinite_steps, t.rollback_on_spike, start.guard)
    log = Log(run, recipe, topology, meter, bar_position)
    log.start_at(update, last_update, start.log)
    log.message(parameter_table(model))
    memory = ""
    if topology.is_main and recipe.model.architecture is None and footprint.is_predictable(recipe):
        dims = {"action_dim": codec.action_dim, "proprio_dim": codec.proprio_dim}
        memory = f"peak memory: {footprint.predict(recipe, **dims).peak_gb:.1f} GB predicted"
        log.message(memory)
    log.message(data.describe())
    log.input_images(*data.input_images())
    stop = distributed.StopSignal(topology)

    def save(directory: Path, name: str, keep: bool = False, best: bool = False) -> None:
        state = {
            "round": round_number, "first_epoch": start.first_epoch, "first_update": start.first_update,
            "update": update, "validated": validated, "best_val_loss": best_val_loss,
            "steps_per_epoch": steps_per_epoch, "global_batch": resuming.global_batch(recipe, topology),
            "moments": optim.moments_of(model, optimizer), "guard": guard.state(), "log": log.state(),
        }  # fmt: skip
        checkpoint.save(directory, name, model, codec, recipe, state, keep=keep, best=best)

    def save_and_stop() -> NoReturn:
        save(run, f"step_{update}")
        log.message(f"stopped at step {update}; --resume continues from {run / f'step_{update}'}")
        log.close()
        distributed.stop()
        sys.exit(EXIT_STOPPED)

    if t.rollback_on_spike and not start.resumes:
        save(run, f"step_{update}")  # so that there always is something of this round to go back to

    # ---- the loop
    while validated < last_update:
        epoch_in_round = (validated - start.first_update) // steps_per_epoch
        epoch = start.first_epoch + epoch_in_round
        epoch_start = start.first_update + epoch_in_round * steps_per_epoch
        epoch_steps = min(steps_per_epoch, last_update - epoch_start)
        model.train()
        for window in log.watch(batches.epoch(epoch, update - epoch_start, epoch_steps)):
            distributed.seed_step(t.seed, update, topology)
            # The mean over the samples of the step, whichever process has them: not a mean of means.
            weight = topology.world_size / batches.order.step_size(update - epoch_start)
            sums = meter.nothing()
            for micro, batch in enumerate(window):
                batch = codec.normalized(batch.to(device))
                with distributed.backward_of(wrapped, is_last=micro + 1 == t.gradient_accumulate_every):
                    with autocast(model):
                        loss, predicted, entropy = wrapped(batch, t.soft_target_sigma_bins)
                    (loss * (len(batch.input_ids) * weight)).backward()
                sums += meter.measure(loss, predicted, entropy, batch)
            grad_norm = checkpoint.whole(clip_grad_norm_(trainable, t.max_grad_norm)).item()

            # One message a step: from here on every process knows the same, and so decides the same.
            message = torch.cat([sums, sums.new_tensor([log.waited, stop.requested])])
            *seen, waited, is_stopped = distributed.sum_over_ranks(message, topology).tolist()
            verdict = guard.judge(loss=seen[1] / seen[0], grad_norm=grad_norm)
            progress = optim.schedule(update - start.first_update, num_updates, t.warmup_ratio)
            lr = t.learning_rate * guard.learning_rate_factor * progress
            if verdict in (Verdict.APPLY, Verdict.SPIKE):
                optim.set_learning_rate(optimizer, lr)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ends_epoch = update + 1 == epoch_start + epoch_steps
            log.step(verdict, seen, grad_norm, waited, ends_epoch=ends_epoch, epoch=epoch + 1, lr=lr, skipped_steps=guard.skipped)  # fmt: skip
            if verdict is Verdict.GIVE_UP:
                save(run / "replay", f"step_{update}")
                replay.save_batches(run / "replay" / f"step_{update}", batches, epoch, update - epoch_start, topology)
                log.close()
                distributed.fail(guard.last_words(run / "replay" / f"step_{update}"), topology)
            update += 1
            if verdict is Verdict.ROLL_BACK:
                back = resuming.read((run / "latest").resolve())
                checkpoint.load_trained(run / "latest", model)
                optim.restore_moments(model, optimizer, back.moments)
                guard.roll_back(back.guard)
                log.start_at(back.update, last_update, back.log)
                log.event("rolled_back", f"from step {update}; the learning rate is now {guard.learning_rate_factor:g} of what it was")  # fmt: skip
                update, validated, best_val_loss = back.update, back.validated, back.best_val_loss
                break
            if is_stopped:
                save_and_stop()
        else:
            scores = validate(model, meter, val_batches.validation(), t.soft_target_sigma_bins, topology, stop.agreed)
            if scores is None:  # a signal came meanwhile; after a resume it is validated again
                save_and_stop()
            if reason := guard.why_no_policy(scores["val_loss"], is_last=update == last_update):
                log.event("failed", reason)
                log.close()
                distributed.fail(f"{reason}; nothing was saved of it, {run / 'latest'} stays what it was; --resume with a lower training.learning_rate", topology)  # fmt: skip
            validated = update
            is_kept = (epoch + 1) % t.checkpoint_every == 0 or update == last_update
            if is_kept:
                curves = check_open_loop(model, *data.open_loop(OPEN_LOOP_FRAMES, device))
                log.open_loop(curves)
                scores["open_loop_mae_rad"] = curves.mae_rad
            log.epoch(epoch=epoch + 1, **scores)
            is_best, best_val_loss = scores["val_loss"] < best_val_loss, min(best_val_loss, scores["val_loss"])
            save(run, f"epoch_{epoch + 1}", keep=is_kept, best=is_best)

    log.close()
    if memory and device.type == "cuda":
        log.message(f"{memory}, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB measured")
    if guard.skipped:
        log.message(f"skipped {guard.skipped} of {last_update} steps: loss or gradient were not finite")
    log.message(f"trained: {run / 'latest'}; curves in {run / 'curves.png'}, all of it in {run / 'run.html'}")
    distributed.stop()


if __name__ == "__main__":
    run_command(main)
