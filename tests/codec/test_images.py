import numpy as np
import pytest
import torch
from codec_samples import PARITY, needs_parity
from PIL import Image

from robofactory.codec.images import MEANS, STDS, ImagePipeline, normalize, pictures_seen


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def ramp(width: int = 400, height: int = 200) -> np.ndarray:
    """Red is the column, green the row, both from 0 to 200."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 200, width).round()[None, :]
    picture[..., 1] = np.linspace(0, 200, height).round()[:, None]
    return picture


@needs_parity
def test_without_a_crop_pixel_values_equal_the_official_ones_bit_by_bit():
    from safetensors.torch import load_file

    picture = np.asarray(Image.open(PARITY / "image.png").convert("RGB"))
    pixel_values = ImagePipeline(224, crop_area_ratio=1.0, random_crop=False).encode([picture])
    assert torch.equal(pixel_values, load_file(PARITY / "expected.safetensors")["pixel_values"])


@pytest.mark.parametrize("size", [(96, 128), (240, 320), (50, 40)])
def test_without_a_crop_pixel_values_equal_the_official_operations(size: tuple[int, int]):
    """The reference: torchvision on a PIL image, one branch a tower, as the official processor does it."""
    from torchvision.transforms import functional as tv

    picture = noise(*size, 3)
    resized = tv.resize(Image.fromarray(picture), [84, 84], tv.InterpolationMode.BICUBIC, antialias=True)
    branches = [tv.normalize(tv.to_tensor(resized), list(m), list(s)) for m, s in zip(MEANS, STDS, strict=True)]
    assert torch.equal(ImagePipeline(84, 1.0, random_crop=True).encode([picture])[0], torch.vstack(branches))


def test_a_mirrored_view_of_an_array_is_read_as_it_looks():
    mirrored = noise(96, 128, 3)[:, ::-1]
    pipeline = ImagePipeline(84, 0.9, True)
    assert torch.equal(pipeline.encode([mirrored]), pipeline.encode([mirrored.copy()]))


def test_the_centred_crop_keeps_ninety_percent_of_the_area_around_the_centre():
    left, top, right, bottom = ImagePipeline(84, 0.9, True).crop_box(400, 200, 0.5, 0.5)
    assert (right - left) * (bottom - top) == pytest.approx(0.9 * 400 * 200)
    assert (right - left) / (bottom - top) == pytest.approx(2.0)
    assert (left + right, top + bottom) == pytest.approx((400, 200))


@pytest.mark.parametrize("place", [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_the_crop_never_leaves_the_picture(place: tuple[float, float]):
    left, top, right, bottom = ImagePipeline(84, 0.9, True).crop_box(127, 95, *place)
    assert left >= 0 and top >= 0 and right <= 127 and bottom <= 95


def test_the_crop_removes_the_borders_from_what_is_seen():
    full = pictures_seen(ImagePipeline(84, 1.0, True).encode([ramp()]))[0]
    cropped = pictures_seen(ImagePipeline(84, 0.9, True).encode([ramp()]))[0]
    border = (1 - 0.9**0.5) / 2 * 200  # of the ramp's 200 levels
    assert full[42, 0, 0] < 3 and full[42, -1, 0] > 197
    for channel, first, last in (
        (0, cropped[42, 0, 0], cropped[42, -1, 0]),
        (1, cropped[0, 42, 1], cropped[-1, 42, 1]),
    ):
        assert abs(first - border) < 3 and abs(last - (200 - border)) < 3, (channel, first, last)


def test_random_crops_differ_by_view_and_direction_and_come_back_with_the_same_seed():
    pipeline = ImagePipeline(84, 0.9, random_crop=True)
    first, again, other = (pipeline.encode([ramp()] * 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    corner = pictures_seen(first)[:, 0, 0, :2].astype(int)  # red: left edge of the crop; green: its upper edge
    assert (np.abs(corner[:, 0] - corner[:, 1]) > 1).any(), "horizontal and vertical offsets are equal"


def test_without_image_aug_training_sees_the_centred_crop():
    centred = ImagePipeline(84, 0.9, random_crop=True).encode([ramp()])
    assert torch.equal(ImagePipeline(84, 0.9, random_crop=False).encode([ramp()], torch.Generator()), centred)


def test_pictures_of_different_sizes_go_together():
    assert ImagePipeline(84, 0.9, True).encode([noise(96, 128, 3), noise(300, 200, 3)]).shape == (2, 6, 84, 84)


def test_pictures_seen_is_the_inverse_of_normalize():
    pictures = noise(3, 32, 32, 3)
    np.testing.assert_array_equal(pictures_seen(normalize(pictures)), pictures)
    np.testing.assert_array_equal(pictures_seen(normalize(pictures)[None])[0], pictures)


def test_both_normalisations_are_stacked_dino_first():
    white = normalize(np.full((1, 2, 2, 3), 255, np.uint8))[0, :, 0, 0]
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225, 1.0, 1.0, 1.0]
    np.testing.assert_allclose(white, expected, rtol=1e-6)
