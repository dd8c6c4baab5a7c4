"""Where a run stands: fresh, in the middle of a round, or at the end of one that the next goes on from."""

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from torch import Tensor

from robofactory import checkpoint, documents
from robofactory.codec.codec import Codec
from robofactory.config import RecipeConfig
from robofactory.data.dataset import Splits
from robofactory.documents import Count, Document, PositiveCount
from robofactory.errors import UserError
from robofactory.training import distributed
from robofactory.training.distributed import Topology

MaybeInfinite = Annotated[float, Field(allow_inf_nan=True)]


class Moments(Document):
    """Of AdamW, for one parameter."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class GuardState(Document):
    skipped: Count
    skipped_in_a_row: Count
    spikes_in_a_row: Count
    rollbacks: Count
    losses: list[float]


class LogState(Document):
    sums: list[MaybeInfinite]
    grad_norm: MaybeInfinite
    count: Count


class TrainingState(Document):
    """`training_state.pt`; the fields are those of `Start`."""

    round: Count = 0
    first_epoch: Count = 0
    first_update: Count = 0
    update: Count
    validated: Count
    best_val_loss: MaybeInfinite
    steps_per_epoch: PositiveCount
    global_batch: PositiveCount
    moments: dict[str, Moments]
    guard: GuardState | None
    log: LogState | None


@dataclass(frozen=True)
class Start:
    """Where a training begins, or what a checkpoint says about it.

    directory: the checkpoint whose weights it begins with; None: untrained ones.
    resumes: it is of the same round: optimizer, guard and log go on too.
    round, first_epoch, first_update: of training; the rounds before had the lower epochs and optimizer steps.
    update, validated: optimizer steps that are done, and how many were when it was last validated.
    moments: of the optimizer, by the names of the parameters.
    guard, log: what these two remember.
    """

    directory: Path | None = None
    resumes: bool = False
    round: int = 0
    first_epoch: int = 0
    first_update: int = 0
    update: int = 0
    validated: int = 0
    best_val_loss: float = math.inf
    steps_per_epoch: int = 0
    global_batch: int = 0
    moments: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] | None = None
    log: dict[str, Any] | None = None

    @property
    def epochs_done(self) -> int:
        """In this round; one that ended early counts."""
        return -(-(self.validated - self.first_update) // self.steps_per_epoch)

    def is_complete(self, recipe: RecipeConfig) -> bool:
        """Whether it is the end of its round, by the recipe of that round."""
        num_updates = recipe.training.max_steps or recipe.training.num_epochs * self.steps_per_epoch
        return self.validated - self.first_update >= num_updates

    def with_its_normalization(self, data: Splits) -> Splits:
        """The data for a run that goes on: pictures are normalised as in its checkpoint, see `Codec.normalized_as`."""
        if self.directory is None:
            return data
        return replace(data, codec=data.codec.normalized_as(Codec.load(self.directory)))

    def require_same_policy(self, recipe: RecipeConfig, codec: Codec) -> None:
        """Raises UserError where the checkpoint is of another model or other data; the line says which."""
        if self.directory is None:
            return
        saved_codec = Codec.load(self.directory)
        if checkpoint.load_recipe_of(self.directory).model != recipe.model:
            raise UserError(f"{self.directory} is another model than the recipe's; use the recipe it was trained with, or move the run away")  # fmt: skip
        if saved_codec.fingerprint != codec.fingerprint:
            raise UserError(f"{self.directory} was trained with other data or preprocessing (codec {saved_codec.fingerprint[:12]}, now {codec.fingerprint[:12]}); move the run away, or restore its dataset and recipe")  # fmt: skip

    def require_same_steps(self, recipe: RecipeConfig, steps_per_epoch: int, topology: Topology) -> None:
        """Raises UserError where a step would not have the same samples as before; the line says what to set."""
        now = global_batch(recipe, topology)
        if self.resumes and self.global_batch != now:
            per_part = self.global_batch / (topology.world_size * recipe.training.gradient_accumulate_every)
            fix = f"set dataloader.batch_size={per_part:g}" if per_part.is_integer() else "choose batch_size, gradient_accumulate_every and --gpus so that they multiply to it"  # fmt: skip
            raise UserError(f"the run was trained with {self.global_batch} samples a step (processes x batch_size x gradient_accumulate_every), this would have {now}; {fix}")  # fmt: skip
        saved = checkpoint.load_recipe_of(self.directory).data if self.directory else recipe.data
        for key in ("datasets", "stream_window") if self.resumes else ():
            if (was := getattr(saved, key)) != getattr(recipe.data, key):
                raise UserError(f"the run was trained with data.{key}={was}; the order of its samples would change")
        if self.resumes and self.steps_per_epoch != steps_per_epoch:
            raise UserError(f"the run had {self.steps_per_epoch} steps an epoch, now there are {steps_per_epoch}; restore its dataset and recipe, or move the run away")  # fmt: skip


def global_batch(recipe: RecipeConfig, topology: Topology) -> int:
    """Samples of an optimizer step, over all processes."""
    return recipe.dataloader.batch_size * recipe.training.gradient_accumulate_every * topology.world_size


def find_start(run: Path, recipe: RecipeConfig, round_number: int, resume: bool, topology: Topology) -> Start | None:
    """Where a round of a run begins, from its `latest` checkpoint; None: it is complete.

    Raises:
        UserError: the run holds this round already and `resume` is not given, the round before is not complete, or a
            checkpoint of the run is damaged or not whole.
    """
    if topology.is_main:
        checkpoint.settle(run)
    distributed.wait_for_all(topology)
    if not (run / "latest").exists():
        if round_number > 0:
            raise UserError(f"--round {round_number} goes on from round {round_number - 1}, and {run} has no checkpoint; train that first")  # fmt: skip
        return Start()
    saved = read((run / "latest").resolve())
    if saved.round >= round_number:
        if not resume:
            raise UserError(f"{run} holds a trained policy; continue it with --resume, or move it away")
        return None if saved.round > round_number or saved.is_complete(recipe) else saved
    if saved.round < round_number - 1 or not saved.is_complete(checkpoint.load_recipe_of(run / "latest")):
        raise UserError(f"--round {round_number} goes on from round {round_number - 1}, and {run} is in round {saved.round}; finish that first, with --resume")  # fmt: skip
    return Start(
        saved.directory,
        round=round_number,
        first_epoch=saved.first_epoch + saved.epochs_done,
        first_update=saved.update,
        update=saved.update,
        validated=saved.update,
        best_val_loss=saved.best_val_loss,
    )


def read(directory: Path) -> Start:
    """What a checkpoint knows of its run.

    Raises:
        UserError: it is damaged, or not one of ours; the line names the file.
    """
    checkpoint.verify(directory)
    state = checkpoint.load_training_state(directory)
    documents.check(state, TrainingState, str(directory / checkpoint.STATE), "use another checkpoint")
    known = {each.name for each in fields(Start)} - {"directory", "resumes"}
    return Start(directory, resumes=True, **{key: value for key, value in state.items() if key in known})
