"""What others made of a checkpoint or a run is refused in one line, before anything is changed or memory is taken."""

import dataclasses
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from robofactory import checkpoint
from robofactory.config import load_recipe, to_yaml
from robofactory.errors import UserError
from robofactory.model.openvla import build_from_scratch
from robofactory.policy import Policy
from robofactory.training import optim, resuming
from robofactory.training.distributed import Topology
from tests.test_checkpoint import parts  # noqa: F401  # a fixture

WHOLE = {
    "update": 3, "validated": 3, "best_val_loss": float("inf"), "steps_per_epoch": 3, "global_batch": 8, "moments": {},
    "guard": {"skipped": 0, "skipped_in_a_row": 0, "spikes_in_a_row": 0, "rollbacks": 0, "losses": [1.0]},
    "log": {"sums": [0.0, float("nan")], "grad_norm": 0.0, "count": 0},
}  # fmt: skip


@pytest.fixture
def run(parts, tmp_path):  # noqa: F811
    """Two whole checkpoints; `latest` is the second."""
    for epoch in (1, 2):
        model, codec, recipe = parts
        checkpoint.save(tmp_path / "run", f"epoch_{epoch}", model, codec, recipe, WHOLE | {"update": 3 * epoch})
    return tmp_path / "run"


def contents(run: Path) -> dict[str, bytes | str]:
    """Every file and link below a run."""
    return {
        str(path.relative_to(run)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def sign(directory: Path) -> None:
    """Make the manifest fit what is there, as a forger would."""
    (directory / "manifest.json").unlink()
    checkpoint.write_manifest(directory, update=3, keep=True)


def start(run: Path, resume: bool = True):
    return resuming.find_start(run, load_recipe("robot_openvla_tiny"), 0, resume, Topology(0, 1, torch.device("cpu")))


def directory_of(found: resuming.Start | None) -> Path | None:
    return None if found is None else found.directory


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize(
    ("newest", "lost", "resume"),
    [
        ("epoch_2", "manifest.json", True),
        ("epoch_2", "manifest.json", False),
        ("step_9", "manifest.json", True),
        ("epoch_3", "everything", True),
        ("epoch_3", "all but one file", True),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_never_passed_over(run, lost, newest, resume):
    """`--resume` began from nothing, or from an older one, and overwrote what was left."""
    if newest != "epoch_2":
        (run / "epoch_2").rename(run / newest)
        checkpoint._link(run, "latest", newest)
    for path in (run / newest).iterdir():
        if path.name == "manifest.json" or (
            lost != "manifest.json" and (lost == "everything" or path.name != "codec.json")
        ):
            path.unlink()
    before = contents(run)
    there = {
        "manifest.json": "codec.json, config.yaml, modules.safetensors, training_state.pt",
        "everything": "nothing",
    }
    with pytest.raises(UserError, match=rf"{newest} is no complete checkpoint: it has no manifest\.json \(there is {there.get(lost, 'codec.json')}\); .*to go on from epoch_1"):  # fmt: skip
        start(run, resume)
    assert contents(run) == before


@pytest.mark.parametrize("name", ["codec.json", "config.yaml", "modules.safetensors", "training_state.pt"])
def test_a_run_that_lost_a_file_of_its_newest_checkpoint_is_refused(run, name):
    (run / "epoch_2" / name).unlink()
    before = contents(run)
    with pytest.raises(UserError, match=rf"(epoch_2/|no ){name}.*another checkpoint \(epoch_1\)"):
        start(run)
    assert contents(run) == before


def test_a_run_that_lost_all_its_checkpoints_is_not_begun_anew(run):
    for epoch in ("epoch_1", "epoch_2"):
        (run / epoch).rename(run.parent / epoch)
    with pytest.raises(UserError, match="latest leads to epoch_2, which is not there; put it back, or delete the link"):
        start(run)


def test_what_was_deleted_by_hand_is_said(run, capsys):
    (run / "epoch_2").rename(run.parent / "epoch_2")
    assert directory_of(start(run)) == run / "epoch_1"
    assert "latest leads to epoch_2, which is not there: going on from epoch_1" in capsys.readouterr().out


@pytest.mark.parametrize("link", ["latest", "best"])
def test_a_link_that_a_copy_made_a_directory_is_found_before_training(run, link):
    """It was found after an epoch, when the link could not be replaced."""
    (run / link).unlink(missing_ok=True)
    copied = run / link
    copied.mkdir()
    for path in (run / "epoch_2").iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=rf"{link} is no link .*delete it, it is a copy of epoch_2"):
        start(run)
    (run / "epoch_2").rename(run.parent / "epoch_2")
    with pytest.raises(UserError, match=rf"{link} is no link .*rename it to step_6"):
        start(run)


@pytest.mark.parametrize("target", ["/", "..", "../other", ".", "wandb", "/tmp/epoch_2"])
def test_latest_leads_nowhere_but_to_a_checkpoint_of_the_run(run, target):
    checkpoint._link(run, "latest", target)
    before = contents(run)
    with pytest.raises(UserError, match=r"latest leads to .* no checkpoint of this run; delete the link"):
        start(run)
    assert contents(run) == before


def test_an_absolute_link_to_a_checkpoint_of_the_run_is_one_of_its_own(run):
    checkpoint._link(run, "latest", str(run / "epoch_2"))
    assert directory_of(start(run)) == run / "epoch_2"


def test_only_leftovers_of_checkpoints_are_cleaned_away(run):
    """Every `.*.tmp` and `.*.old` of a run was deleted, and every copy of a checkpoint that was saved to go."""
    for name in (".notes.tmp", ".epoch_x.tmp", ".draft.old", "wandb", "copy of epoch_1"):
        (run / name).mkdir()
        (run / name / "mine").write_text("mine")
    (run / ".epoch_7.tmp").write_text("a file of that name is mine, too")
    checkpoint.write_manifest(run / "copy of epoch_1", update=0, keep=False)
    mine = contents(run)
    for name in (".epoch_3.tmp", ".step_4.old"):
        (run / name).mkdir()
        (run / name / "codec.json").write_text("half")
    (run / ".latest.tmp").symlink_to("epoch_1")
    assert checkpoint.settle(run) == run / "epoch_2"
    checkpoint._delete_superseded(run)
    assert contents(run) == mine


# ------------------------------------------------------------------------------------------------------ a checkpoint


def test_weights_that_are_not_finite_are_not_saved(parts, run):  # noqa: F811
    model, codec, recipe = parts
    before = contents(run)
    bias = model.projector.fc1.bias
    old = bias.detach().clone()
    try:
        with torch.no_grad():
            bias[3] = float("nan")
        with pytest.raises(UserError, match=r"cannot save .*epoch_3: 1 of its tensors have NaN .*projector\.fc1\.bias"):
            checkpoint.save(run, "epoch_3", model, codec, recipe, WHOLE)
    finally:
        bias.data.copy_(old)
    assert contents(run) == before


@pytest.mark.parametrize("damage", ["nan", "int64", "missing", "shape"])
def test_weights_of_a_forged_checkpoint_are_refused(run, damage):
    path = run / "epoch_2" / "modules.safetensors"
    tensors = load_file(path)
    name = "projector.fc1.bias"
    changed = {"nan": tensors[name] * torch.inf, "int64": tensors[name].long(), "shape": tensors[name][:-1]}
    tensors |= {name: changed[damage]} if damage in changed else {}
    save_file({key: t for key, t in tensors.items() if damage != "missing" or key != name}, path, {"format": "pt"})
    sign(run / "epoch_2")
    with pytest.raises(UserError, match=rf"modules\.safetensors(: {name} has NaN| does not fit .*: {name})"):
        Policy.load(run / "epoch_2")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link", "fifo", ""])
def test_a_manifest_names_no_file_beyond_its_directory(run, name):
    (run / "outside").write_text("x")
    (run / "epoch_2" / "link").symlink_to("/etc/hostname")
    os.mkfifo(run / "epoch_2" / "fifo")
    path = run / "epoch_2" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"files": {name: {"bytes": 1, "sha256": ""}} | manifest["files"]}))
    with pytest.raises(UserError, match=r"is refused|is no regular file"):
        checkpoint.verify(run / "epoch_2")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


FORGED = {
    "empty": b"", "text": b"state", "pickle": pickle.dumps(WHOLE), "code": pickle.dumps(RunsCode()),
    "a list": [WHOLE], "a number for a count": WHOLE | {"update": 3.5}, "a negative step": WHOLE | {"update": -1},
    "no guard": {key: value for key, value in WHOLE.items() if key != "guard"}, "text for the log": WHOLE | {"log": "x"},
    "a loss that is none": WHOLE | {"guard": WHOLE["guard"] | {"losses": [None]}},
    "no moments": WHOLE | {"moments": {"x": {"step": torch.ones(())}}}, "no steps": WHOLE | {"steps_per_epoch": 0},
}  # fmt: skip


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_training_state_is_one_line_and_runs_no_code(run, forged, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = run / "epoch_2" / "training_state.pt"
    path.write_bytes(FORGED[forged]) if isinstance(FORGED[forged], bytes) else torch.save(FORGED[forged], path)
    sign(run / "epoch_2")
    with pytest.raises(UserError, match=r"training_state\.pt( cannot be read| is no training state|: key)") as error:
        resuming.read(run / "epoch_2")
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_a_compressed_training_state_is_not_unpacked(run):
    path = run / "epoch_2" / "training_state.pt"
    content = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    sign(run / "epoch_2")
    with pytest.raises(UserError, match=r"training_state\.pt is no training state"):
        checkpoint.load_training_state(run / "epoch_2")


def test_a_whole_training_state_is_read(run):
    saved = resuming.read(run / "epoch_2")
    assert saved.update == 6 and saved.guard == WHOLE["guard"] and saved.resumes


def test_an_optimizers_state_of_another_model_is_refused(parts):  # noqa: F811
    model, _, _ = parts
    optimizer = optim.make_optimizer(model, 0.0)
    moments = {"step": torch.ones(()), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    for name in ("projector.fc1.weight", "nothing"):
        with pytest.raises(UserError, match=rf"an optimizer's state of '{name}'"):
            optim.restore_moments(model, optimizer, {name: moments})


@pytest.mark.parametrize("size", ["hidden_size=1000000000", "num_hidden_layers=1000000000", "hidden_size=65536"])
def test_a_recipe_of_absurd_sizes_takes_no_memory(run, parts, monkeypatch, size):  # noqa: F811
    recipe = parts[2]
    key, value = size.split("=")
    language = dataclasses.replace(recipe.model.architecture.language, **{key: int(value)})
    architecture = dataclasses.replace(recipe.model.architecture, language=language)
    model = dataclasses.replace(recipe.model, architecture=architecture)
    (run / "epoch_2" / "config.yaml").write_text(to_yaml(dataclasses.replace(recipe, model=model)))
    sign(run / "epoch_2")

    def on_meta(*arguments):
        assert torch.empty(()).is_meta, "memory would be taken"
        return build_from_scratch(*arguments)

    monkeypatch.setattr(checkpoint, "build_from_scratch", on_meta)
    with pytest.raises(UserError, match=rf"{key}={value} must be at most|does not fit config\.yaml"):
        Policy.load(run / "epoch_2")
