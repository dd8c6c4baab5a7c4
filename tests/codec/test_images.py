import numpy as np
import pytest
import torch
from PIL import Image

from robofactory.codec.images import MEANS, STDS, ImagePipeline, normalize
from tests.official import PARITY


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def ramp(width: int = 400, height: int = 200) -> np.ndarray:
    """Red is the column, green the row, both from 0 to 200."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 200, width).round()[None, :]
    picture[..., 1] = np.linspace(0, 200, height).round()[:, None]
    return picture


def normalized(pictures: np.ndarray) -> torch.Tensor:
    return normalize(torch.from_numpy(pictures))


def test_without_a_crop_pixel_values_equal_the_official_ones_bit_by_bit():
    from safetensors.torch import load_file

    picture = np.asarray(Image.open(PARITY / "image.png").convert("RGB"))
    pixel_values = normalized(ImagePipeline(224, crop_area_ratio=1.0, random_crop=False).encode([picture]))
    assert torch.equal(pixel_values, load_file(PARITY / "expected.safetensors")["pixel_values"])


@pytest.mark.parametrize("size", [(96, 128), (240, 320), (50, 40)])
def test_without_a_crop_pixel_values_equal_the_official_operations(size: tuple[int, int]):
    """The reference: torchvision on a PIL image, one branch a tower, as the official processor does it."""
    from torchvision.transforms import functional as tv

    picture = noise(*size, 3)
    resized = tv.resize(Image.fromarray(picture), [84, 84], tv.InterpolationMode.BICUBIC, antialias=True)
    branches = [tv.normalize(tv.to_tensor(resized), list(m), list(s)) for m, s in zip(MEANS, STDS, strict=True)]
    seen = ImagePipeline(84, 1.0, random_crop=True).encode([picture])
    assert torch.equal(normalized(seen)[0], torch.vstack(branches))


def test_a_mirrored_view_of_an_array_is_read_as_it_looks():
    mirrored = noise(96, 128, 3)[:, ::-1]
    pipeline = ImagePipeline(84, 0.9, True)
    assert np.array_equal(pipeline.encode([mirrored]), pipeline.encode([mirrored.copy()]))


def test_the_centred_crop_keeps_ninety_percent_of_the_area_around_the_centre():
    left, top, right, bottom = ImagePipeline(84, 0.9, True).crop_box(400, 200, 0.5, 0.5)
    side = 0.9**0.5
    assert (right - left, bottom - top) == pytest.approx((400 * side, 200 * side), abs=0.5)
    assert (left + right, top + bottom) == pytest.approx((400, 200), abs=1.0)


@pytest.mark.parametrize("size", [(224, 224), (96, 128), (240, 320)])
def test_whole_pixel_crops_are_what_pillow_makes_of_the_same_box(size: tuple[int, int]):
    """The same filter in other fixed-point arithmetic: at most 2 of 255 levels off, and hardly anywhere."""
    coarse = Image.fromarray(noise(9, 12, 3))  # enlarged: shades and edges; white noise would be clipped everywhere
    picture = np.asarray(coarse.resize(size[::-1], Image.Resampling.BILINEAR))
    pipeline = ImagePipeline(84, 0.9, False)
    box = pipeline.crop_box(size[1], size[0], 0.5, 0.5)
    expected = np.asarray(Image.fromarray(picture).resize((84, 84), Image.Resampling.BICUBIC, box=box)).astype(int)
    off = np.abs(pipeline.encode([picture])[0].transpose(1, 2, 0) - expected)
    assert off.max() <= 2 and off.mean() < 0.05


@pytest.mark.parametrize("place", [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_the_crop_never_leaves_the_picture(place: tuple[float, float]):
    left, top, right, bottom = ImagePipeline(84, 0.9, True).crop_box(127, 95, *place)
    assert left >= 0 and top >= 0 and right <= 127 and bottom <= 95


def test_the_crop_removes_the_borders_from_what_is_seen():
    full = ImagePipeline(84, 1.0, True).encode([ramp()])[0]  # [3, h, w]
    cropped = ImagePipeline(84, 0.9, True).encode([ramp()])[0]
    border = (1 - 0.9**0.5) / 2 * 200  # of the ramp's 200 levels
    assert full[0, 42, 0] < 3 and full[0, 42, -1] > 197
    for channel, first, last in (
        (0, cropped[0, 42, 0], cropped[0, 42, -1]),
        (1, cropped[1, 0, 42], cropped[1, -1, 42]),
    ):
        assert abs(first - border) < 3 and abs(last - (200 - border)) < 3, (channel, first, last)


def test_random_crops_differ_by_view_and_direction_and_come_back_with_the_same_seed():
    pipeline = ImagePipeline(84, 0.9, random_crop=True)
    first, again, other = (pipeline.encode([ramp()] * 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[1], first[2])
    corner = first[:, :2, 0, 0].astype(int)  # red: left edge of the crop; green: its upper edge
    assert (np.abs(corner[:, 0] - corner[:, 1]) > 1).any(), "horizontal and vertical offsets are equal"


def test_without_image_aug_training_sees_the_centred_crop():
    centred = ImagePipeline(84, 0.9, random_crop=True).encode([ramp()])
    assert np.array_equal(ImagePipeline(84, 0.9, random_crop=False).encode([ramp()], torch.Generator()), centred)


def test_pictures_of_different_sizes_go_together():
    assert ImagePipeline(84, 0.9, True).encode([noise(96, 128, 3), noise(300, 200, 3)]).shape == (2, 3, 84, 84)


def test_both_normalisations_are_stacked_dino_first():
    white = normalized(np.full((1, 3, 2, 2), 255, np.uint8))[0, :, 0, 0]
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225, 1.0, 1.0, 1.0]
    np.testing.assert_allclose(white, expected, rtol=1e-6)
