"""The scene's cameras: which of them are rendered, where they stand, and what an agent observes through them."""

# SAPIEN's and ManiSkill's annotations are narrower than what they accept.
# pyright: reportArgumentType=false

import dataclasses

import numpy as np
import sapien
import torch
from jaxtyping import Float64, UInt8
from mani_skill.sensors.camera import Camera
from mani_skill.sensors.camera import CameraConfig as SensorConfig
from mani_skill.utils import sapien_utils
from transforms3d.quaternions import axangle2quat, qmult

from robofactory.config import CameraConfig, SceneConfig


def view_cameras(scene: SceneConfig, agent: int) -> dict[str, str]:
    """View name -> camera uid, as one agent sees it."""
    return {view: pattern.format(agent=agent) for view, pattern in scene.views.items()}


def rendered_cameras(scene: SceneConfig) -> list[CameraConfig]:
    """The cameras that some agent's views need; the others would only cost time."""
    needed = {uid for agent in range(scene.num_agents) for uid in view_cameras(scene, agent).values()}
    return [camera for camera in scene.cameras if camera.uid in needed]


def sensor_config(camera: CameraConfig, links: list, shader: str) -> SensorConfig:
    """ManiSkill's description of one camera; `links` are those of the robot it is mounted on."""
    mount = sapien_utils.get_obj_by_name(links, camera.mount_link) if camera.mount_link else None
    return SensorConfig(
        uid=camera.uid,
        pose=camera_pose(camera),
        width=camera.width,
        height=camera.height,
        fov=camera.fov_rad,
        near=camera.near_m,
        far=camera.far_m,
        shader_pack=shader,
        mount=mount,
    )


def camera_pose(camera: CameraConfig) -> sapien.Pose:
    """In the world, or in the frame of the link it is mounted on."""
    if camera.target is not None:
        return sapien_utils.look_at(camera.position, camera.target).sp
    return sapien.Pose(camera.position, camera.quaternion)


def moved(
    camera: CameraConfig, shift_m: Float64[np.ndarray, " 3"], turn_rad: Float64[np.ndarray, " 3"]
) -> CameraConfig:
    """The camera elsewhere: shifted, and turned about itself.

    Args:
        shift_m: in the frame its position is given in.
        turn_rad: the axis in that frame, as long as the angle.
    """
    pose, angle = camera_pose(camera), np.linalg.norm(turn_rad)
    turn = axangle2quat(turn_rad / angle, angle) if angle else np.array([1.0, 0.0, 0.0, 0.0])
    position, quaternion = (pose.p + shift_m).tolist(), qmult(turn, pose.q).tolist()
    return dataclasses.replace(camera, position=position, quaternion=quaternion, target=None)


def take_pictures(cameras: dict[str, Camera]) -> dict[str, UInt8[torch.Tensor, "b h w 3"]]:
    """uid -> RGB of every camera, now. The scene's `update_render` comes before."""
    for camera in cameras.values():
        camera.capture()
    pictures = {}
    for uid, camera in cameras.items():
        pictures[uid] = camera.get_obs(rgb=True, depth=False, position=False, segmentation=False)["rgb"]
    return pictures


def label_grid(pictures: dict[str, UInt8[np.ndarray, "_h _w 3"]]) -> UInt8[np.ndarray, "_H _W 3"]:
    """All pictures side by side, three in a row, each under its name."""
    from PIL import Image, ImageDraw

    columns, bar = 3, 16
    width = max(picture.shape[1] for picture in pictures.values())
    height = max(picture.shape[0] for picture in pictures.values()) + bar
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, picture) in enumerate(pictures.items()):
        left, top = index % columns * width, index // columns * height
        draw.text((left + 4, top + 2), name, fill="black")
        sheet.paste(Image.fromarray(picture), (left, top + bar))
    return np.asarray(sheet)
