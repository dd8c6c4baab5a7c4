"""Where a run stands: fresh, in the middle of a round, or at the end of one that the next goes on from."""

from dataclasses import dataclass
from pathlib import Path

from robofactory import checkpoint
from robofactory.config import RecipeConfig, UserError


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    checkpoint: whose weights it begins with; None: untrained ones.
    resumes: the checkpoint is of the same round: its optimizer, schedule and position are taken over too.
    first_epoch, first_update: those of the round; the rounds before had the lower ones.
    """

    checkpoint: Path | None = None
    resumes: bool = False
    first_epoch: int = 0
    first_update: int = 0


def find_start(run: Path, recipe: RecipeConfig, round_number: int, resume: bool) -> Start | None:
    """Where a round of a run begins, from its `latest` checkpoint; None: it is complete.

    Raises:
        UserError: the run holds this round already and `resume` is not given, or the round before is not complete.
    """
    latest = run / "latest"
    if not latest.exists():
        if round_number > 0:
            raise UserError(f"--round {round_number} goes on from round {round_number - 1}, and {run} has no checkpoint; train that first")  # fmt: skip
        return Start()
    state = checkpoint.load_training_state(latest)
    at = state["round"]
    if at >= round_number:
        if not resume:
            raise UserError(f"{run} holds a trained policy; continue it with --resume, or move it away")
        if at > round_number or _is_complete(state, recipe):
            return None
        return Start(latest, True, state["first_epoch"], state["first_update"])
    if at < round_number - 1 or not _is_complete(state, checkpoint.load_recipe_of(latest)):
        raise UserError(f"--round {round_number} goes on from round {round_number - 1}, and {run} is in round {at}; finish that first, with --resume")  # fmt: skip
    return Start(latest, False, state["epoch"], state["update"])


def _is_complete(state: dict, recipe: RecipeConfig) -> bool:
    """Whether a checkpoint is the end of its round, by the recipe of that round."""
    if recipe.training.max_steps is not None:
        return state["update"] - state["first_update"] >= recipe.training.max_steps
    return state["epoch"] - state["first_epoch"] >= recipe.training.num_epochs
