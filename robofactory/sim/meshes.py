"""Robots with light visuals, made at run time from ManiSkill's meshes and kept in the user's cache.

Vertices are the cost of software rendering: a Panda has 135,000 triangles (54-66 ms for each camera on a CPU). Here
all vertices within one cell of a grid become one, per colour and link. Physics is untouched.
"""

# trimesh's annotations are narrower than what they accept.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import trimesh
from jaxtyping import Float, Int
from mani_skill.agents import BaseAgent

from robofactory.errors import UserError
from robofactory.robots import Robot

CELL_M = 0.02  # 3.4 ms for each camera at 224 px; 12 mm cost 6.7 ms and look no different at 96 px
FINE_CELL_M = 0.006  # hand and fingers: what the wrist camera is about
_VERSION = 1  # of this file's output
_VISUAL = re.compile(r'filename="(?P<file>[\w/]*/visual/(?P<name>\w+)\.glb)"')
_RELATIVE = re.compile(r'filename="(?=[^/"])')  # of what stays as it is: collision meshes


def with_light_visuals(agent: type[BaseAgent], robot: Robot) -> type[BaseAgent]:
    """ManiSkill's robot with light visuals; the meshes are made the first time. Any number of processes may ask at once.

    `uid` stays the same, so actions keep their names.

    Raises:
        UserError: the cache directory cannot be written.
    """
    return type(f"{agent.__name__}Low", (agent,), {"urdf_path": str(_cached_urdf(Path(agent.urdf_path), robot))})


def _cached_urdf(source: Path, robot: Robot) -> Path:
    key = f"{_VERSION} {CELL_M} {FINE_CELL_M} {source} {source.stat().st_size}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "robofactory"
    directory = cache / f"{robot.uid}_low_{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not directory.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=cache, prefix=f".{robot.uid}_low_"))
            _write_light(source, temporary, directory, robot.fine_links)
            temporary.chmod(0o755)
        except OSError as error:
            raise UserError(f"cannot write the robot's light meshes to {cache}: {error}; set XDG_CACHE_HOME") from None
        try:
            temporary.rename(directory)
        except OSError:  # another process was first: its directory is complete and equal
            shutil.rmtree(temporary)
    return directory / source.name


def _write_light(source: Path, directory: Path, final_directory: Path, fine: Sequence[str]) -> None:
    description = source.read_text(encoding="utf-8")
    for file, name in sorted(set(_VISUAL.findall(description))):
        light = _light_scene(trimesh.load(source.parent / file), FINE_CELL_M if name in fine else CELL_M)
        light.export(directory / f"{name}.glb", include_normals=True)
    description = _VISUAL.sub(lambda match: f'filename="{final_directory}/{match["name"]}.glb"', description)
    description = _RELATIVE.sub(f'filename="{source.parent}/', description)
    (directory / source.name).write_text(description, encoding="utf-8", newline="\n")
    srdf = source.with_suffix(".srdf")  # the link pairs that never collide; ManiSkill wants it beside the URDF
    shutil.copyfile(srdf, directory / srdf.name)


def _light_scene(scene: trimesh.Scene, cell_m: float) -> trimesh.Scene:
    """One clustered mesh per colour."""
    by_color: dict[tuple[int, ...], list[trimesh.Trimesh]] = {}
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        mesh = scene.geometry[name].copy()
        mesh.apply_transform(transform)
        by_color.setdefault(tuple(mesh.visual.material.baseColorFactor), []).append(mesh)
    light = trimesh.Scene()
    for color, meshes in by_color.items():
        whole = trimesh.util.concatenate([trimesh.Trimesh(m.vertices, m.faces, process=False) for m in meshes])
        vertices, faces = cluster_vertices(whole.vertices, whole.faces, cell_m)
        if len(faces) == 0:  # smaller than a cell, e.g. the lamps of link 6
            continue
        mesh = trimesh.Trimesh(vertices, faces, process=False)
        material = trimesh.visual.material.PBRMaterial(
            baseColorFactor=list(color), roughnessFactor=0.7, metallicFactor=0.0
        )
        mesh.visual = trimesh.visual.TextureVisuals(uv=np.zeros((len(vertices), 2)), material=material)
        light.add_geometry(mesh)
    return light


def cluster_vertices(
    vertices: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"], cell_m: float
) -> tuple[Float[np.ndarray, "m 3"], Int[np.ndarray, "g 3"]]:
    """All vertices within one cell of a grid become their mean; faces that collapse or repeat go."""
    cells = np.floor(np.asarray(vertices) / cell_m).astype(np.int64)
    unique, cluster = np.unique(cells, axis=0, return_inverse=True)
    cluster = cluster.reshape(-1)
    means = np.zeros((len(unique), 3))
    np.add.at(means, cluster, vertices)
    means /= np.bincount(cluster, minlength=len(unique))[:, None]
    merged = cluster[np.asarray(faces)]
    a, b, c = merged.T
    merged = merged[(a != b) & (b != c) & (a != c)]
    _, kept = np.unique(np.sort(merged, axis=1), axis=0, return_index=True)
    return means, merged[np.sort(kept)]
