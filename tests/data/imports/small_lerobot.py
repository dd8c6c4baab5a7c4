"""Small LeRobot datasets in the ways in which others write them, with pyarrow, Pillow and av alone.

Every picture is of one grey level, a function of its episode and frame; a video keeps it to within 3.
"""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from robofactory.data.imports.lerobot import LeRobot
from robofactory.data.imports.source import Options

FPS, SIDE, JOINTS = 10, 32, 3
CAMERA = "observation.images.cam"
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NEW_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
NEW_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
OLD_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
OLD_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


def level(episode: int, frame: int) -> int:
    return 10 + 30 * episode + 4 * frame


def action(episode: int, frame: int) -> np.ndarray:
    return np.array([episode, frame, 0.5], np.float32)


def picture(episode: int, frame: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), level(episode, frame), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def rows(episode: int, length: int, fps: float = FPS, first_s: float = 0.0, is_video: bool = False) -> pa.Table:
    values = np.stack([action(episode, frame) for frame in range(length)])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), JOINTS)
    columns = {
        "action": vectors,
        "observation.state": vectors,
        "timestamp": pa.array((first_s + np.arange(length) / fps).astype(np.float32)),
        "frame_index": pa.array(np.arange(length)),
        "episode_index": pa.array(np.full(length, episode)),
        "index": pa.array(np.arange(length)),
        "task_index": pa.array(np.zeros(length, np.int64)),
    }
    if not is_video:
        files = [{"bytes": png(picture(episode, frame)), "path": None} for frame in range(length)]
        columns[CAMERA] = pa.array(files, IMAGE_TYPE)
    return pa.table(columns)


def write_video(path: Path, pictures: Sequence[np.ndarray], fps: int = FPS, codec: str = "libx264") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for pixels in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())


def write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_info(root: Path, version: str, lengths: Sequence[int], fps: float, is_video: bool, **changes: Any) -> None:
    vector = {"dtype": "float32", "shape": [JOINTS], "names": ["shoulder", "elbow", "gripper"]}
    is_new = version == "v3.0"
    info = {
        "codebase_version": version,
        "robot_type": "arm",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "chunks_size": 1000,
        "fps": fps,
        "data_path": NEW_DATA if is_new else OLD_DATA,
        "video_path": (NEW_VIDEO if is_new else OLD_VIDEO) if is_video else None,
        "features": {
            "action": vector,
            "observation.state": vector,
            CAMERA: {"dtype": "video" if is_video else "image", "shape": [SIDE, SIDE, 3], "names": None},
        },
    }
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(info | changes))


def write_old(
    root: Path, lengths: Sequence[int] = (4, 6), fps: float = FPS, first_s: float = 0.0, is_video: bool = False
) -> Path:
    """Version 2.1, an episode a file."""
    write_info(root, "v2.1", lengths, fps, is_video)
    write_lines(root / "meta/tasks.jsonl", [{"task_index": 0, "task": "push"}])
    write_lines(root / "meta/episodes.jsonl", [{"episode_index": e, "length": n} for e, n in enumerate(lengths)])
    for episode, length in enumerate(lengths):
        write_table(old_data(root, episode), rows(episode, length, fps, first_s, is_video))
        if is_video:
            write_video(old_video(root, episode), [picture(episode, frame) for frame in range(length)])
    return root


def old_data(root: Path, episode: int) -> Path:
    return root / OLD_DATA.format(episode_chunk=0, episode_index=episode)


def old_video(root: Path, episode: int) -> Path:
    return root / OLD_VIDEO.format(episode_chunk=0, episode_index=episode, video_key=CAMERA)


def write_new(
    root: Path,
    grouped: Sequence[Sequence[int]] = ((0, 1), (2, 3)),
    length: int = 4,
    is_video: bool = False,
    first_s: float = 0.0,
) -> Path:
    """Version 3.0; `grouped`: the episodes of each file of rows, and of each video."""
    episodes = [episode for group in grouped for episode in group]
    write_info(root, "v3.0", [length] * len(episodes), FPS, is_video)
    write_table(root / "meta/tasks.parquet", pa.table({"task_index": [0], "__index_level_0__": ["push"]}))
    places: dict[str, list] = {"episode_index": episodes, "length": [length] * len(episodes)}
    places |= {"data/chunk_index": [0] * len(episodes), "data/file_index": []}
    video = {part: [] for part in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")}
    for number, group in enumerate(grouped):
        tables = [rows(episode, length, FPS, first_s, is_video) for episode in group]
        write_table(root / NEW_DATA.format(chunk_index=0, file_index=number), pa.concat_tables(tables))
        places["data/file_index"] += [number] * len(group)
        for place, _ in enumerate(group):
            begin_s = place * length / FPS
            values = (0, number, begin_s, begin_s + length / FPS)
            for part, value in zip(video, values, strict=True):
                video[part].append(value)
        if is_video:
            path = root / NEW_VIDEO.format(video_key=CAMERA, chunk_index=0, file_index=number)
            write_video(path, [picture(episode, frame) for episode in group for frame in range(length)])
    if is_video:
        places |= {f"videos/{CAMERA}/{part}": values for part, values in video.items()}
    write_table(episodes_file(root), pa.table(places))
    return root


def episodes_file(root: Path) -> Path:
    return root / "meta/episodes/chunk-000/file-000.parquet"


# ---------------------------------------------------------------------------------------------------------- changes


def write_lines(path: Path, values: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def change_info(root: Path, change: Callable[[dict[str, Any]], Any] | None = None, **values: Any) -> Path:
    path = root / "meta/info.json"
    info = json.loads(path.read_text()) | values
    if change is not None:
        change(info)
    path.write_text(json.dumps(info))
    return root


def change_column(path: Path, name: str, values: Any) -> None:
    """Another column in place of that one, or beside the others; None: it is gone."""
    table = pq.read_table(path)
    if name in table.column_names:
        table = table.drop_columns(name)
    if values is not None:
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    pq.write_table(table, path)


def change_feature(root: Path, key: str, **values: Any) -> Path:
    return change_info(root, lambda info: info["features"][key].update(values))


# ---------------------------------------------------------------------------------------------------------- reading


def open_source(root: Path, **options: Any) -> LeRobot:
    return LeRobot(root, Options("Push", **options))


def levels(source: LeRobot, episode: int) -> list[int]:
    """The mean level of each picture of the first view."""
    found = []
    for frame in next(iter(source.read(episode).frames.values())):
        pixels = np.asarray(Image.open(io.BytesIO(frame))) if isinstance(frame, bytes) else frame
        if isinstance(pixels, Path):
            pixels = np.asarray(Image.open(pixels))
        found.append(round(float(np.mean(pixels))))
    return found


def check_content(source: LeRobot, lengths: Sequence[int], tolerance: int = 0) -> None:
    """That each episode has its own pictures and actions, all of them and in order."""
    assert source.episode_ids == list(range(len(lengths)))
    for episode, length in enumerate(lengths):
        expected = [level(episode, frame) for frame in range(length)]
        found = levels(source, episode)
        assert len(found) == length and np.abs(np.subtract(found, expected)).max() <= tolerance, (episode, found)
        recording = source.read(episode)
        np.testing.assert_array_equal(recording.actions, [action(episode, frame) for frame in range(length)])
