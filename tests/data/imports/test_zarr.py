"""Diffusion Policy's zarr in RoboFactory's layout, and others'."""

from pathlib import Path

import content
import numcodecs
import numpy as np
import pytest
import zarr

from robofactory.errors import UserError

CHUNK = 4  # frames, so that an episode begins within one


def write(path: Path, state: np.ndarray | None = None, channels_last: bool = False) -> Path:
    """Both episodes, one behind the other; RoboFactory's state is the action."""
    each = [(episode, frame) for episode, length in enumerate(content.LENGTHS) for frame in range(length)]
    actions = np.stack([content.action(*one) for one in each])
    add = adder(path)
    for name, camera in {"head_camera": "front", "wrist_camera": "wrist"}.items():
        pictures = np.stack([content.picture(camera, *one) for one in each])
        add(f"data/{name}", pictures if channels_last else pictures.transpose(0, 3, 1, 2))
    add("data/action", actions)
    add("data/tcp_action", actions)
    add("data/state", actions if state is None else state)
    add("meta/episode_ends", np.cumsum(content.LENGTHS))
    return path


def adder(path: Path):
    """Format 2 and Blosc, as RoboFactory's zarr 2.18 writes them."""
    root = zarr.open_group(path, mode="w", zarr_format=2)
    blosc = numcodecs.Blosc(cname="zstd", clevel=3, shuffle=1)

    def add(name: str, values: np.ndarray) -> None:
        chunks = (CHUNK, *values.shape[1:])
        root.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=blosc)[:] = values

    return add


MEASURED = np.stack(
    [content.state(episode, frame) for episode, length in enumerate(content.LENGTHS) for frame in range(length)]
)


def test_robofactorys_state_is_found_out_and_left_away(run_import, tmp_path, capsys):
    """It is the action once more: what learns from it copies its input, and stands still on the robot."""
    path = write(tmp_path / "Push_Agent0_2.zarr")
    reader = run_import("zarr", path, "--instruction", "push")
    content.check(reader, has_proprio=False, instructions=("push", "push"), side="front")
    assert set(reader.views) == {"side", "wrist"}
    assert "state is a copy of action, no measurement: imported without proprio" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"state is a copy of action, no measurement; omit --proprio_key"):
        run_import("zarr", path, "--instruction", "push", "--proprio_key", "state")


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_state_that_was_measured_is_kept(run_import, tmp_path, capsys, channels_last):
    path = write(tmp_path / "demo.zarr", state=MEASURED, channels_last=channels_last)
    arguments = ["--camera", "front=head_camera", "wrist=wrist_camera", "--instruction", "push", "--fps", "10"]
    reader = run_import("zarr", path, *arguments)
    content.check(reader, instructions=("push", "push"))
    assert reader.description.fps == 10 and "copy" not in capsys.readouterr().err


def test_the_global_camera_lies_in_a_zarr_of_its_own(run_import, tmp_path):
    path = write(tmp_path / "Push_Agent0_2.zarr")
    beside = write(tmp_path / "Push_global_2.zarr")
    reader = run_import("zarr", path, "--instruction", "push")
    assert set(reader.views) == {"side", "wrist", "overhead"}
    np.testing.assert_array_equal(reader.frame(1, 2)[0].images["overhead"], content.picture("front", 1, 2))
    adder(beside)("meta/episode_ends", np.array([4, 13]))
    with pytest.raises(UserError, match=r"Push_global_2\.zarr has other episodes than"):
        run_import("zarr", path, "--instruction", "push")


def test_a_wrong_name_or_a_broken_zarr_is_one_line(run_import, tmp_path):
    path = write(tmp_path / "demo.zarr")
    words = ["--instruction", "push"]
    with pytest.raises(UserError, match="no camera 'top'; it has head_camera, wrist_camera"):
        run_import("zarr", path, *words, "--camera", "side=top")
    with pytest.raises(UserError, match="no action 'act'; it has action, state, tcp_action"):
        run_import("zarr", path, *words, "--action_key", "act")
    zarr.open_group(path, mode="a")["data/action"].resize((12, 3))
    with pytest.raises(UserError, match="action has 12 frames, its episodes 13; it is incomplete"):
        run_import("zarr", path, *words)
    with pytest.raises(UserError, match=r"nowhere\.zarr does not exist"):
        run_import("zarr", tmp_path / "nowhere.zarr", *words)
