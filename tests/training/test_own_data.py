"""Data of any shape, and several datasets in one policy, from the command to the action."""

import json
import re

import numpy as np
import pytest
import torch

from benchmarks.small_runs import JOINTS, NUM_EPISODES, SMALL, TASK, differences, everything, start, write_dataset
from robofactory import checkpoint
from robofactory.codec.codec import Codec
from robofactory.config import load_recipe
from robofactory.data.dataset import load_splits
from robofactory.errors import UserError
from robofactory.paths import dataset_dir, run_dir
from robofactory.policy import Policies, Policy
from robofactory.shapes import Observation
from robofactory.training import train as training
from tests.training.conftest import stop_during

OWN = f"{TASK}_Agent0_{NUM_EPISODES}"
CPU = torch.device("cpu")


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["train", "--recipe", "robot_openvla_tiny", *arguments, *SMALL])
    training.main()


def observation(views, dim):
    random = np.random.default_rng(0)
    images = {view: random.integers(0, 256, (24, 32, 3), np.uint8) for view in views}
    return Observation(images, random.uniform(-1, 1, dim).astype(np.float32), "lift the barrier")


# ----------------------------------------------------------------------------------------------------------- any shape

ARM = [f"joint{k}" for k in range(1, 7)]
SHAPES = {
    "one view, five joints, no gripper": (["front"], [f"axis{k}" for k in range(5)]),
    "four views, two arms": (
        ["front", "back", "left", "right"],
        [f"{side}_{joint}" for side in ("left", "right") for joint in (*ARM, "gripper")],
    ),
    "one number": (["front"], ["slider"]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_policy_of_another_shape_is_trained_resumed_and_acts(home, monkeypatch, shape):
    views, joints = SHAPES[shape]
    write_dataset(dataset_dir("Kitchen", 0, NUM_EPISODES), views=views, joints=joints, scale=3.0, is_simulated=False)
    arguments = ["--task", "Kitchen", f"data.views=[{','.join(views)}]"]
    command(monkeypatch, *arguments, "training.max_steps=4")
    command(monkeypatch, *arguments, "training.max_steps=9", "--resume")
    run = run_dir("openvla", "Kitchen", 0, NUM_EPISODES)
    assert checkpoint.load_training_state(run / "latest")["update"] == 9
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(value) for line in lines for value in line.values() if isinstance(value, float)), lines
    assert {f"val_mae/{joint}" for joint in joints} <= lines[-1].keys()
    assert ("val_gripper_mae" in lines[-1]) == any("gripper" in joint for joint in joints)
    assert (run / "open_loop.png").stat().st_size > 1000

    policy = Policy.load(run / "latest")
    statistics = policy.codec.action_statistics
    assert [n for n, normalized in zip(joints, statistics.normalized, strict=True) if not normalized] == [j for j in joints if "gripper" in j]  # fmt: skip
    for _ in range(2):  # the second time with a draft
        actions = policy.act([observation(views, len(joints))])
        assert actions.shape == (1, len(joints))
        assert ((actions >= statistics.bounds[0] - 1e-5) & (actions <= statistics.bounds[1] + 1e-5)).all()
    with pytest.raises(UserError, match=rf"no view '{views[-1]}' in the observation"):
        policy.act([observation(views[:-1], len(joints))])


def test_a_gripper_in_metres_is_not_passed_through_unseen(home):
    """It would have 5 of the 256 bins."""
    write_dataset(home / "metres", joints=["x", "finger_gripper"])
    recipe = load_recipe("robot_openvla_tiny", SMALL)
    codec = load_splits(home / "metres", recipe).codec
    assert codec.action_statistics.normalized.tolist() == [True, False]
    write_dataset(home / "narrow", joints=["x", "finger"], scale=0.04)
    with pytest.raises(UserError, match=r"dataset narrow: 'finger' passes .* too little .*data\.pass_through=\[\]"):
        load_splits(home / "narrow", load_recipe("robot_openvla_tiny", [*SMALL, "data.pass_through=[finger]"]))
    recipe = load_recipe("robot_openvla_tiny", [*SMALL, "data.pass_through=[]"])
    assert load_splits(home / "metres", recipe).codec.action_statistics.normalized.all()


def test_a_task_that_nobody_knows_needs_data(home, monkeypatch):
    with pytest.raises(
        UserError, match=r"unknown task 'Kitchen'.*a dataset of your own would be in .*Kitchen_Agent0_6"
    ):
        command(monkeypatch, "--task", "Kitchen")


def test_data_of_another_number_of_episodes_is_named(home, monkeypatch):
    """`data.num_episodes` was forgotten: the line said that there was no such task, and not that its data was there."""
    write_dataset(home / "data" / "Kitchen_Agent0_2")
    with pytest.raises(UserError, match=r"Kitchen_Agent0_6; there are Kitchen_Agent0_2, see .*data\.num_episodes"):
        command(monkeypatch, "--task", "Kitchen")


# ----------------------------------------------------------------------------------------------------- several datasets


@pytest.fixture
def others(home):
    """The same kinds of frames with numbers three times as large; and one with as many joints by other names."""
    write_dataset(home / "data" / "large", scale=3.0)
    write_dataset(home / "far" / "renamed", joints=[f"robot_{joint}" for joint in JOINTS])
    return f"data.datasets={{{OWN}: 1, large: 0.5, 'file://{home}/far/renamed': 1.5}}"


def test_a_mixture_is_trained_and_its_policy_acts_for_the_dataset_that_is_named(home, others, capsys):
    start(others, "training.max_steps=5", draws=True)
    assert f"not looked at before training: file://{home}/far/renamed; `robofactory inspect`" in capsys.readouterr().out
    run = run_dir("openvla", TASK, 0, NUM_EPISODES)
    names = [OWN, "large", "renamed"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {f"val_action_mae/{name}" for name in names} <= last.keys()

    seen = observation(("side", "overhead", "wrist"), 8)
    actions = {name: Policy.load(run / "latest", dataset=name).act([seen])[0] for name in names}
    codec = Codec.load(run / "latest")
    for name in names:
        low, high = codec.datasets[name].action.bounds
        assert ((actions[name] >= low - 1e-5) & (actions[name] <= high + 1e-5)).all()
    one, three = (codec.datasets[name].action for name in names[:2])
    np.testing.assert_allclose(3.0 * one.bounds[:, :7], three.bounds[:, :7], rtol=0.05)
    assert (actions["large"] != actions[OWN]).any()

    loaded = [Policies.load({0: run / "latest"}, num_rows=1, datasets={0: name}) for name in names]
    assert len({policies.codecs[0].fingerprint for policies in loaded}) == 3, (
        "an evaluation by other statistics is another evaluation"
    )

    listed = f"{OWN}, large, renamed"
    with pytest.raises(UserError, match=f"several datasets.*--dataset.*: {listed}"):
        Policy.load(run / "latest")
    with pytest.raises(UserError, match=f"not trained on a dataset 'bridge'; it knows {listed}"):
        Policy.load(run / "latest", dataset="bridge")


@pytest.mark.parametrize("update", [8, 13])
def test_a_mixture_resumes_exactly_in_the_middle_of_an_epoch(home, others, monkeypatch, update):
    """With workers, accumulation, a weight that spreads a pass over two epochs, and a dataset that streams."""
    overrides = (others, "dataloader.batch_size=4", "training.gradient_accumulate_every=2", "dataloader.num_workers=2", "data.stream_window=2")  # fmt: skip
    run = run_dir("openvla", TASK, 0, NUM_EPISODES)
    start(*overrides, "training.num_epochs=2")
    undisturbed = everything(run)
    run.rename(home / "undisturbed")

    with monkeypatch.context() as during:
        stop_during(during, update, micro=1)
        with pytest.raises(SystemExit):
            start(*overrides, "training.num_epochs=2")
    start(*overrides, "training.num_epochs=2", resume=True)
    assert differences(everything(run), undisturbed) == []


def test_other_weights_are_not_resumed_with(home, others):
    start(others, "training.max_steps=2")
    swapped = others.replace("1.5", "x").replace("0.5", "1.5").replace("x", "0.5")  # epochs as long as before
    with pytest.raises(UserError, match=r"trained with data\.datasets=.*the order of its samples would change"):
        start(swapped, "training.max_steps=4", resume=True)


def test_every_label_of_a_mixture_is_encoded_with_its_own_statistics(home, others):
    data = load_splits(dataset_dir(TASK, 0, NUM_EPISODES), load_recipe("robot_openvla_tiny", [*SMALL, others]))
    batch, actions = data.examples(9, CPU)
    assert sorted(batch.dataset.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    decoded = data.codec.decode_each(batch.action_tokens.numpy()[:, :8], batch.dataset.tolist())
    np.testing.assert_allclose(decoded, actions, atol=0.02)
    assert abs(actions[batch.dataset == 1, :7]).max() > 1.5
    table = data.describe()
    assert re.search(r"large +50 +0\.5 +25 +16\.7%", table) and table.count("half bin") == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joints": JOINTS[1:]}, r"cannot mix actions of 8 and 7 numbers: .*_6 has joint1, .*; other has joint2"),
        ({"joints": (*JOINTS[1:], JOINTS[0])}, "cannot mix actions whose numbers are in another order"),
        ({"joints": ("gripper1", *JOINTS[1:7], "joint8")}, "of which other numbers pass through.*data.pass_through"),
        ({"views": ["side", "wrist"]}, r"other has no view 'overhead'; it has side, wrist"),
    ],
)
def test_datasets_that_do_not_go_together_are_one_line(home, change, message):
    write_dataset(home / "data" / "other", **change)
    recipe = load_recipe("robot_openvla_tiny", [*SMALL, f"data.datasets={{{OWN}: 1, other: 1}}"])
    with pytest.raises(UserError, match=message) as error:
        load_splits(dataset_dir(TASK, 0, NUM_EPISODES), recipe)
    assert "\n" not in str(error.value)


def test_weights_and_names_that_make_no_sense_are_one_line(home, relabelled):
    with pytest.raises(UserError, match=r"'data\.datasets\.a': must be positive, got -1"):
        load_recipe("robot_openvla_tiny", ["data.datasets={a: -1}"])
    own, round_1 = dataset_dir(TASK, 0, NUM_EPISODES), home / "data" / f"{OWN}_relabelled_1"
    for datasets, message in {
        f"{{{OWN}: 1, somewhere/{OWN}: 1}}": f"two datasets called '{OWN}'",
        "{large: 1}": f"--round adds to {OWN}, which data.datasets leaves out: it has large",
    }.items():
        with pytest.raises(UserError, match=message):
            load_splits(own, load_recipe("robot_openvla_tiny", [*SMALL, f"data.datasets={datasets}"]), [round_1])
