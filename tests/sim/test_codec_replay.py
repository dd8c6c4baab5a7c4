"""The codec keeps what matters of an action: the decoded demonstrations still lift the barrier."""

import pytest

from benchmarks.codec_replay import replayed_share


@pytest.mark.sim
def test_demonstrations_through_encode_and_decode_still_lift_the_barrier():
    replayed, recorded, _ = replayed_share(num_episodes=4)
    assert recorded == 4
    assert replayed == 4, f"{replayed} of {recorded} lifted after the actions went through 256 bins and back"
