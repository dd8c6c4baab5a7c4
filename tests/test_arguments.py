"""What the command line alone can decide is refused at once, in words about that argument, before anything is loaded."""

import json
import os
import subprocess
import sys
import time

import pytest

from robofactory import arguments, config, paths
from robofactory.config import Within
from robofactory.errors import UserError

TASK = "LiftBarrier-rf"
SEED = str(2**70)
REFUSED = {
    # ---- train
    ("train",): "the following arguments are required: --task; see robofactory train --help",
    ("train", "--task", TASK, "--round", "-1"): "--round: must be at least 0, got -1",
    ("train", "--task", TASK, "--round", "1"): "--round 1: the recipe has rounds 0 to 0",
    ("train", "--task", TASK, "--gpus", "0"): "--gpus: must be at least 1, got 0",
    ("train", "--task", TASK, "--gpus", "many"): "--gpus: 'many' is no whole number",
    ("train", "--task", TASK, "--gpus", "2", "--all_agents"): "--all_agents shares one machine's cores",
    ("train", "--task", TASK, "--agent_id", "-1"): "--agent_id: must be at least 0, got -1",
    ("train", "--task", TASK, "--agent_id", "2"): "LiftBarrier-rf has no agent 2; its agents are 0, 1",
    ("train", "--task", TASK, "--agent_id", "0", "--all_agents"): "--all_agents: not allowed with argument --agent_id",
    ("train", "--task", "LiftBarier-rf"): "unknown task 'LiftBarier-rf' (did you mean 'LiftBarrier-rf'?)",
    ("train", "--task", "../../x"): "--task: '../../x' is no name, because of '/'",
    ("train", "--task", TASK, "--policy", "../x"): "--policy: invalid choice: '../x'",
    ("train", "--task", TASK, "--recipe", "robot_openvla_tinny"): "unknown recipe 'robot_openvla_tinny' (did you mean",
    ("train", "--task", TASK, "--recipe", ""): "unknown recipe ''",
    ("train", "--task", TASK, "--recipe", "/"): "unknown recipe '/'",
    ("train", "--task", TASK, "--config", ""): "--config: '' is no path",
    ("train", "--task", TASK, "--config", "/nowhere.yaml"): "no scene file /nowhere.yaml",
    ("train", "--replay", "/nowhere"): "--replay /nowhere: no such directory",
    ("train", "--task", TASK, "training.num_epoch=3"): "unknown key 'training.num_epoch' (did you mean",
    ("train", "--task", TASK, "data.views=[side, side]"): "key 'data.views': 'side' is there twice",
    ("train", "--task", TASK, f"training.seed={SEED}"): "key 'training.seed': 1180591620717411303424 does not fit",
    ("train", "--task", TASK, "data.image_width=0"): "key 'data.image_width': must be in [1, 8192], got 0",
    ("train", "--task", TASK, "data.datasets={..: 1}"): "'..' is no name",
    ("train", "--task", TASK, "data.datasets={/nowhere: 1}"): "data.datasets: there is no directory /nowhere",
    # ---- memory, summary
    ("memory", "--gpu", "nan"): "--gpu: invalid int value: 'nan'",
    ("memory", "model.lora_rank=0"): "key 'model.lora_rank': must be positive, got 0",
    ("summary", "--proprio_dim", "0"): "--proprio_dim: must be at least 1, got 0",
    ("summary", "--text_tokens", "-1"): "--text_tokens: must be at least 0, got -1",
    # ---- record
    ("record", "--task", TASK, "--num", "0"): "--num: must be at least 1, got 0",
    ("record", "--task", TASK, "--num", "9" * 60): "is no whole number",
    ("record", "--task", TASK, "--workers", "0"): "--workers: must be at least 1, got 0",
    ("record", "--task", TASK, "--workers", "100000"): "--workers: must be at most 256, got 100000",
    ("record", "--task", TASK, "--noise", "nan"): "--noise: 'nan' is no number",
    ("record", "--task", TASK, "--noise", "1e999"): "--noise: must be finite, got 1e999",
    ("record", "--task", TASK, "--noise", "1.5"): "--noise: must be in [0, 1], got 1.5",
    ("record", "--task", TASK, "--seed", "-1"): "--seed: must be at least 0, got -1; see",
    ("record", "--task", TASK, "--seed", "10000"): "must be at most 9999, got 10000; those above are for evaluation",
    ("record", "--task", TASK, "--width", "0"): "--width: must be at least 1, got 0",
    ("record", "--task", "nothing"): "unknown task 'nothing'; there are LiftBarrier-rf",
    ("record", "--task", TASK, "success=null"): "key 'success': null is no section",
    ("record", "--task", TASK, "robots=[]"): "key 'robots': needs at least one, got none",
    ("record", "--task", TASK, "cameras.0.mount_agent=-1"): "key 'cameras[0].mount_agent': must be at least 0",
    # ---- evaluate
    ("evaluate", "--task", ""): "--task: '' is no name",
    ("evaluate", "--task", TASK, "--episodes", "0"): "--episodes: must be at least 1, got 0",
    (
        "evaluate",
        "--task",
        TASK,
        "--seed",
        "42",
    ): "--seed: must be at least 10000, got 42; those below are the demonstr",
    ("evaluate", "--task", TASK, "--seed", SEED): "--seed: must be at most 4293967295, got 1180591620717411303424",
    ("evaluate", "--task", TASK, "--temperature", "nan"): "--temperature: 'nan' is no number",
    ("evaluate", "--task", TASK, "--temperature", "-1"): "--temperature: must be at least 0, got -1",
    ("evaluate", "--task", TASK, "--time_limit", "0"): "--time_limit: must be in (0, 1e6], got 0",
    ("evaluate", "--task", TASK, "--batch", "0"): "--batch: must be at least 1, got 0",
    ("evaluate", "--task", TASK, "--videos", "-1"): "--videos: must be at least 0, got -1",
    ("evaluate", "--task", TASK, "--data_num", "0"): "--data_num: must be at least 1, got 0",
    ("evaluate", "--task", TASK, "--checkpoint", ""): "--checkpoint: '' is no name",
    ("evaluate", "--task", TASK, "--checkpoint", ".."): "--checkpoint: '..' is no name",
    ("evaluate", "--task", TASK, "--checkpoint", "epoch_1"): "agent 0 of LiftBarrier-rf has no trained policy",
    ("evaluate", "--task", TASK, "--device", "tpu"): "--device: 'tpu' is neither cpu nor cuda",
    ("evaluate", "--task", TASK, "--output", ""): "--output: '' is no path",
    ("evaluate", "--task", TASK, "--until", "nan"): "--until nan: expected points above 0",
    ("evaluate", "--task", TASK, "--ablate", "blackot"): "unknown ablation 'blackot' (did you mean 'blackout'?)",
    ("evaluate", "--task", TASK, "--ablate", "light=nan"): "--ablate light=nan: light takes a factor, 0 or more",
    ("evaluate", "--task", TASK, "--simulator", "gpu", "--policy", "expert"): "the expert reads one environment",
    # ---- the others
    ("compare", "/nowhere", "/nowhere"): "/nowhere is no directory; give one that an evaluation wrote",
    ("merge", "/nowhere", "out"): "/nowhere is no complete checkpoint: it has no manifest.json",
    ("merge", "/", "out", "--frames", "0"): "--frames: must be at least 1, got 0",
    ("inspect", "/nowhere"): "no dataset at /nowhere; see ",
    ("inspect", ""): "dataset: '' is no path",
    ("preview", "--seed", "-1"): "--seed: must be at least 0, got -1",
    ("preview", "--steps", "-1"): "--steps: must be at least 0, got -1",
    ("preview", "--render", "x.jpg"): "--render x.jpg: the picture is a .png",
    ("preview", "views={side: head_camera_{agent}}"): "not valid YAML",
}
HEAVY = ["torch", "numpy", "pyarrow", "transformers", "sapien", "gymnasium", "matplotlib", "tqdm", "wandb"]
EACH = f"""
import contextlib, io, json, runpy, sys
from robofactory.__main__ import STAGES
for stage, *rest in json.load(sys.stdin):
    sys.argv, error = [f"robofactory {{stage}}", *rest], io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            code = runpy.run_module(STAGES[stage][0], run_name="__main__", alter_sys=True) and 0
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, error.getvalue(), [name for name in {HEAVY} if name in sys.modules]]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[tuple[str, ...], tuple[int, str, list[str]]]:
    """What each of these commands answers, one after the other in one process."""
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"ROBOFACTORY_HOME": str(home), "PYTHONPATH": str(config.PACKAGE.parent)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", EACH], input=json.dumps(list(REFUSED)).encode(), env=environment, stdout=subprocess.PIPE
    )
    assert (time.monotonic() - started) / len(REFUSED) < 1.0
    assert not list(home.iterdir()), "nothing is created"
    return dict(zip(REFUSED, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("command", REFUSED, ids=" ".join)
def test_a_command_line_is_refused_before_anything_is_loaded(answers, command):
    code, error, loaded = answers[command]
    assert (code, loaded) == (2, [])
    assert error.startswith("error: ") and error.count("\n") == 1 and REFUSED[command] in error, error


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    ["LiftBarrier-rf", "PushT", "größer", "把方块", "नमस्ते", "a.b", "a_b+c", "pick, then place", "A1=b@c", "x" * 150],
)
def test_a_name_may_be_in_any_script(name):
    assert paths.require_name(name) == arguments.name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "/abs", "a/b", "a\\b", "a\nb", "a\0b", "a\x1b[31m", ".hidden", "-x", " a", "a ", "a.", "~", "a*", "a?b",
        "{agent}", "a:b", "a|b", "\u202eabc", "\ud800", "x" * 151, "把" * 51,
    ],
)  # fmt: skip
def test_no_name_leads_out_of_its_directory(monkeypatch, tmp_path, name):
    """`--task ../../outside` of an import was written there."""
    monkeypatch.setenv("ROBOFACTORY_HOME", str(tmp_path))
    for place in (
        lambda: paths.dataset_dir(name, 0, 1),
        lambda: paths.relabelled_dir(name, 0, 1, 1),
        lambda: paths.run_dir("openvla", name, 0, 1),
        lambda: paths.run_dir(name, "T", 0, 1),
        lambda: paths.results_dir("openvla", name, 1, "latest"),
        lambda: paths.results_dir(name, "T", 1, "latest"),
        lambda: paths.results_dir("openvla", "T", 1, name),
        lambda: paths.expert_results_dir(name),
    ):
        with pytest.raises(UserError, match=r"is no name|is too long for a name|no path") as refused:
            place()
        assert len(str(refused.value)) < 300


def test_a_dataset_is_a_name_a_path_or_a_url(monkeypatch, tmp_path):
    monkeypatch.setenv("ROBOFACTORY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.dataset_place("T_Agent0_1") == str(tmp_path / "home" / "data" / "T_Agent0_1")
    assert paths.dataset_place("~/own") == str(tmp_path / "own") and paths.dataset_place("../own") == "../own"
    assert paths.dataset_place("s3://bucket/own") == "s3://bucket/own"
    with pytest.raises(UserError, match="is no name"):
        paths.dataset_place("..")


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (arguments.whole(0), "007", 7),
        (arguments.whole(-5), "-5", -5),
        (arguments.number(Within("[0, 1]")), "1e-3", 0.001),
        (arguments.number(Within("[0, 1]")), "-0", 0.0),
        (arguments.number(Within("[0, 1]")), ".5", 0.5),
        (arguments.device, "cuda:12", "cuda:12"),
        (arguments.checkpoint, "my/{agent}/epoch_1", "my/{agent}/epoch_1"),
        (arguments.checkpoint, "latest", "latest"),
    ],
)
def test_an_argument_has_the_value_that_is_written(read, text, value):
    assert read(text) == value
