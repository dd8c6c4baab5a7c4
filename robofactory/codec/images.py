"""Camera pictures -> what the two vision towers see, and back.

    native uint8 picture -> part of it (90 % of the area) -> image_size x image_size, uint8 -> two normalisations

Cropping and resizing are one antialiased bicubic pass over the native picture: one interpolation, no blur from a second
one, and with `crop_area_ratio` 1.0 exactly the official picture. Nothing depends on where the picture comes from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from torch import Tensor

# DINOv2 (ImageNet), then SigLIP. Source: preprocessor_config.json of openvla-7b.
MEANS = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
STDS = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))
INTERPOLATION = "bicubic, antialiased, squashed to a square"

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

    def crop_box(self, width: int, height: int, left: float, top: float) -> tuple[float, float, float, float]:
        """Left, upper, right and lower edge of the crop in pixels of the native picture, with fractions.

        Args:
            left, top: where the crop lies, in [0, 1]; 0.5 is the centre.
        """
        side = math.sqrt(self.crop_area_ratio)
        x, y = left * (1.0 - side) * width, top * (1.0 - side) * height
        return x, y, min(x + side * width, width), min(y + side * height, height)

    def encode(
        self, pictures: Sequence[UInt8[np.ndarray, "_h _w 3"]], generator: torch.Generator | None = None
    ) -> Float32[Tensor, "v 6 h w"]:
        """Pixel values of the views of one sample.

        Args:
            pictures: one a view, RGB in [0, 255], channels last, each of any size.
            generator: of training, for the random crop (each view its own); None takes the centre.
        """
        if generator is not None and self.random_crop:
            places = torch.rand(len(pictures), 2, generator=generator).tolist()
        else:
            places = [(0.5, 0.5)] * len(pictures)
        size = (self.image_size, self.image_size)
        seen = np.empty((len(pictures), *size, 3), np.uint8)
        for index, (picture, (left, top)) in enumerate(zip(pictures, places, strict=True)):
            height, width = picture.shape[:2]
            box = self.crop_box(width, height, left, top)
            seen[index] = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC, box=box))
        return normalize(seen)

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
        return cls(content["image_size"], content["crop_area_ratio"], content["random_crop"])


def normalize(pictures: UInt8[np.ndarray, "v h w 3"]) -> Float32[Tensor, "v 6 h w"]:
    """Both normalisations, stacked on the channels: DINOv2's three, then SigLIP's."""
    values = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()[:, None].float().div_(255.0)  # [v, 1, 3, h, w]
    return ((values - _MEANS).div_(_STDS)).flatten(1, 2)  # [v, 6, h, w]


def pictures_seen(pixel_values: Float[Tensor, "*b 6 h w"]) -> UInt8[np.ndarray, "*b h w 3"]:
    """The pictures that pixel values were made of, after crop and resize: exactly what the model sees."""
    values = pixel_values[..., :3, :, :].detach().cpu().float() * _STDS[0] + _MEANS[0]
    return (values * 255.0).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous().numpy()
