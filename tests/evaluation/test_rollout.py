import av
import numpy as np
import pytest
from evaluation_samples import film, sample_observations

from robofactory.evaluation.rollout import EpisodeVideo


def test_a_video_has_every_frame_all_agents_and_all_views(tmp_path):
    path = tmp_path / film(tmp_path, seed=10_000, num_frames=7)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 20
    assert len(frames) == 7
    height, width, _ = frames[0].shape
    assert height % 2 == 0 and width % 2 == 0, "yuv420p needs even sides"
    assert width >= 2 * 21 * 12 and height >= 2 * 15 * 12, "small pictures are enlarged"
    upper, lower = frames[3][height // 4], frames[3][3 * height // 4]
    for row, grey in ((upper, 60), (lower, 200)):
        for column in (width // 4, 3 * width // 4):
            assert np.abs(row[column].astype(int) - grey).max() < 12, "an agent's view is not where it belongs"
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat"), "the index must stand first, or a browser loads all before it plays"


def test_a_crashed_episode_leaves_the_video_up_to_the_crash(tmp_path):
    with pytest.raises(RuntimeError), EpisodeVideo(tmp_path / "seed.mp4", 20, ["agent 0", "agent 1"]) as video:
        video.add(sample_observations(), "step 0")
        raise RuntimeError("the simulator exploded")
    with av.open(str(tmp_path / "seed.mp4")) as container:
        assert len(list(container.decode(video=0))) == 1
    assert len(list(tmp_path.iterdir())) == 1
