"""What the fixtures hold: a function of episode and frame, for the script that wrote them and the test that reads them."""

import numpy as np

FPS = 10
LENGTHS = (5, 8)
HEIGHT, WIDTH = 48, 64
CAMERAS = ("front", "wrist")
JOINTS = ["shoulder", "elbow", "gripper"]
TASKS = ("push the cube", "open the drawer")  # of the first and of the second episode


def picture(camera: str, episode: int, frame: int) -> np.ndarray:
    """uint8 [h, w, 3]: slopes in two colours and a level that only this frame has; smooth, so that a video keeps it."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    level = 20 + 100 * CAMERAS.index(camera) + 8 * frame + 50 * episode
    return np.stack([2 * x + 40, 2 * y + 40, np.full_like(x, level)], axis=-1).astype(np.uint8)


def state(episode: int, frame: int) -> np.ndarray:
    return np.array([0.1 * frame, -0.2 * frame + episode, 0.5], np.float32)


def action(episode: int, frame: int) -> np.ndarray:
    return state(episode, frame) + np.float32(0.05)


def check(
    reader, tolerance: int = 0, has_proprio: bool = True, instructions: tuple[str, ...] = TASKS, **sources
) -> None:
    """That a dataset of ours holds exactly this.

    tolerance: of the colours, for what went through a video; neighbouring frames differ by 8.
    sources: view -> the camera it was taken from, if not its namesake.
    """
    cameras = {view: sources.get(view, view) for view in reader.views}
    assert reader.episode_lengths.tolist() == list(LENGTHS) and reader.instructions == list(instructions)
    for episode, length in enumerate(LENGTHS):
        for frame in range(length):
            observation, found = reader.frame(episode, frame)
            np.testing.assert_array_equal(found, action(episode, frame))
            expected = state(episode, frame) if has_proprio else np.zeros(0, np.float32)
            np.testing.assert_array_equal(observation.proprio, expected)
            for view, camera in cameras.items():
                error = observation.images[view].astype(int) - picture(camera, episode, frame)
                assert np.abs(error).max() <= tolerance, (view, episode, frame)
                assert np.abs(error.mean()) <= tolerance / 4, (view, episode, frame)
