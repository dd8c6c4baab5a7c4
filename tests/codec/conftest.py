import pytest
from codec_samples import make_codec

from robofactory.codec.codec import Codec


@pytest.fixture
def codec() -> Codec:
    return make_codec()
