import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import trimesh
from mani_skill.agents.robots.panda.panda import Panda

from robofactory.robots.panda import ROBOT as PANDA
from robofactory.sim import meshes

pytestmark = pytest.mark.sim


def _make(cache: str) -> str:
    import os

    os.environ["XDG_CACHE_HOME"] = cache
    return meshes.with_light_visuals(Panda, PANDA).urdf_path


def test_two_processes_can_make_the_light_meshes_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        paths = pool.map(_make, [str(tmp_path)] * 2)
    assert paths[0] == paths[1]
    directory = Path(paths[0]).parent
    assert [entry.name for entry in directory.parent.iterdir()] == [directory.name], "something temporary was left"
    assert len(list(directory.glob("*.glb"))) == 10
    faces = sum(trimesh.load(path, force="mesh").faces.shape[0] for path in directory.glob("*.glb"))
    assert faces < 10_000, f"{faces} triangles an arm are not light"


def test_clustering_keeps_the_shape_within_a_cell():
    sphere = trimesh.creation.icosphere(subdivisions=4, radius=0.1)
    vertices, faces = meshes.cluster_vertices(sphere.vertices, sphere.faces, 0.02)
    assert len(faces) < len(sphere.faces) / 4
    assert np.all(np.abs(np.linalg.norm(vertices, axis=1) - 0.1) < 0.02)
    assert faces.max() < len(vertices)


def test_an_unwritable_cache_is_the_users_to_fix(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(meshes.UserError, match="XDG_CACHE_HOME"):
        meshes.with_light_visuals(Panda, PANDA)
