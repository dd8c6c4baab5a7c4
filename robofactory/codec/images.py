"""Camera pictures -> what the two vision towers see, and back.

    native uint8 picture -> part of it (90 % of the area) -> image_size x image_size, uint8 -> two normalisations

Cropping and resizing are one antialiased bicubic pass over the native picture: one interpolation, no blur from a second
one, and with `crop_area_ratio` 1.0 exactly the official picture. Nothing depends on where the picture comes from.

Crops lie at whole pixels, so that PyTorch's vectorised kernel can resize them: several times faster than Pillow, and
within 2 of its 255 levels. Without a crop Pillow does it, as the official code does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

# DINOv2 (ImageNet), then SigLIP. Source: preprocessor_config.json of openvla-7b.
MEANS = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
STDS = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))
INTERPOLATION = "bicubic, antialiased, squashed to a square, crops at whole pixels"

_MEANS = torch.tensor(MEANS)[:, :, None, None]  # [2, 3, 1, 1]
_STDS = torch.tensor(STDS)[:, :, None, None]


@dataclass(frozen=True)
class ImagePipeline:
    """The one way from a camera picture to pixel values.

    image_size: px, height and width of what the model sees.
    crop_area_ratio: part of the area that is kept; each side shrinks by its square root (0.9 -> 0.949).
    random_crop: training draws the position of the crop (as `training.image_aug` says) instead of taking the centre.
    """

    image_size: int
    crop_area_ratio: float
    random_crop: bool

    def __post_init__(self) -> None:
        assert self.image_size > 0 and 0.0 < self.crop_area_ratio <= 1.0, self

    def crop_box(self, width: int, height: int, left: float, top: float) -> tuple[int, int, int, int]:
        """Left, upper, right and lower edge of the crop in pixels of the native picture.

        Args:
            left, top: where the crop lies, in [0, 1]; 0.5 is the centre.
        """
        side = math.sqrt(self.crop_area_ratio)
        kept_width, kept_height = max(1, round(side * width)), max(1, round(side * height))
        x, y = round(left * (width - kept_width)), round(top * (height - kept_height))
        return x, y, x + kept_width, y + kept_height

    def encode(
        self, pictures: Sequence[UInt8[np.ndarray, "_h _w 3"]], generator: torch.Generator | None = None
    ) -> UInt8[np.ndarray, "v 3 h w"]:
        """What is seen of the views of one sample, not normalised yet.

        Args:
            pictures: one a view, RGB in [0, 255], channels last, each of any size.
            generator: of training, for the random crop (each view its own); None takes the centre.
        """
        if generator is not None and self.random_crop:
            places = torch.rand(len(pictures), 2, generator=generator).tolist()
        else:
            places = [(0.5, 0.5)] * len(pictures)
        seen = []
        for picture, (left, top) in zip(pictures, places, strict=True):
            height, width = picture.shape[:2]
            x0, y0, x1, y1 = self.crop_box(width, height, left, top)
            seen.append(self._resize(picture[y0:y1, x0:x1]))
        return np.ascontiguousarray(np.stack(seen).transpose(0, 3, 1, 2))  # NumPy takes half of PyTorch's time for that

    def _resize(self, picture: UInt8[np.ndarray, "_h _w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        size = (self.image_size, self.image_size)
        if self.crop_area_ratio == 1.0:
            return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]  # channels last: vectorised
        resized = functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        return resized[0].permute(1, 2, 0).numpy()

    def to_json(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "crop_area_ratio": self.crop_area_ratio,
            "random_crop": self.random_crop,
            "interpolation": INTERPOLATION,
            "means": [list(mean) for mean in MEANS],
            "stds": [list(std) for std in STDS],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "ImagePipeline":
        """What is constant here is not read: the codec's fingerprint tells another version apart."""
        return cls(content["image_size"], content["crop_area_ratio"], content["random_crop"])


def normalize(pictures: UInt8[Tensor, "*b 3 h w"]) -> Float32[Tensor, "*b 6 h w"]:
    """Both normalisations, stacked on the channels: DINOv2's three, then SigLIP's."""
    colours = pictures.float().div_(255.0)
    means, stds = _MEANS.to(pictures.device), _STDS.to(pictures.device)
    return (colours.unsqueeze(-4) - means).div_(stds).flatten(-4, -3)
