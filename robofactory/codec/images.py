"""Camera pictures -> what the two vision towers see, and back.

    native uint8 picture -> part of it (90 % of the area) -> image_size x image_size, uint8 -> two normalisations

Cropping and resizing are one antialiased bicubic pass over the native picture: one interpolation, no blur from a second
one, and with `crop_area_ratio` 1.0 exactly the official picture. Nothing depends on where the picture comes from.

Crops lie at whole pixels, so that PyTorch's vectorised kernel can resize them: several times faster than Pillow, and
within 2 of its 255 levels. Without a crop Pillow does it, as the official code does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from robofactory.published import PREPROCESSOR, read_preprocessor

# DINOv2 (ImageNet), then SigLIP: what both were trained with. Published weights may say otherwise, see `published`.
MEANS = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
STDS = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))
INTERPOLATION = "bicubic, antialiased, squashed to a square, crops at whole pixels"

Colours = tuple[tuple[float, ...], ...]  # a number for each colour, of DINOv2 and then of SigLIP


@dataclass(frozen=True)
class ImagePipeline:
    """The one way from a camera picture to pixel values.

    image_size: px, height and width of what the model sees.
    crop_area_ratio: part of the area that is kept; each side shrinks by its square root (0.9 -> 0.949).
    random_crop: training draws the position of the crop (as `training.image_aug` says) instead of taking the centre.
    means, stds: of the two normalisations, in [0, 1].
    note: where these are from, for people; empty if there is nothing to say.
    """

    image_size: int
    crop_area_ratio: float
    random_crop: bool
    means: Colours = MEANS
    stds: Colours = STDS
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        assert self.image_size > 0 and 0.0 < self.crop_area_ratio <= 1.0, self

    @classmethod
    def of_weights(cls, weights: Path, image_size: int, crop_area_ratio: float, random_crop: bool) -> "ImagePipeline":
        """With the normalisation that published weights name.

        Args:
            image_size: px, of their `config.json`.
        Raises:
            UserError: their `preprocessor_config.json` asks for what this pipeline does not do.
        """
        pipeline = cls(image_size, crop_area_ratio, random_crop)
        preprocessor = read_preprocessor(weights, image_size)
        if preprocessor is None:
            note = (
                f"warning: no {PREPROCESSOR} in {weights}; pictures are normalised as for DINOv2 and SigLIP themselves"
            )
            return replace(pipeline, note=note)
        means, stds = preprocessor.normalization
        if (means, stds) == (preprocessor.means, preprocessor.stds):
            return replace(pipeline, means=means, stds=stds)
        note = f"pictures are normalised by tvf_normalize_params of {weights / PREPROCESSOR}, as the official code does: means {means}, stds {stds}"  # fmt: skip
        return replace(pipeline, means=means, stds=stds, note=note)

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
            "means": [list(mean) for mean in self.means],
            "stds": [list(std) for std in self.stds],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "ImagePipeline":
        """The inverse, of a `StoredImages`; its interpolation is not read: the codec refuses that of another version."""
        means, stds = (tuple(map(tuple, content[key])) for key in ("means", "stds"))
        return cls(content["image_size"], content["crop_area_ratio"], content["random_crop"], means, stds)

    def normalize(self, pictures: UInt8[Tensor, "*b 3 h w"]) -> Float32[Tensor, "*b 6 h w"]:
        """Pixel values of what `encode` gives."""
        return normalize(pictures, self.means, self.stds)


def normalize(
    pictures: UInt8[Tensor, "*b 3 h w"], means: Colours = MEANS, stds: Colours = STDS
) -> Float32[Tensor, "*b 6 h w"]:
    """Both normalisations, stacked on the channels: DINOv2's three, then SigLIP's."""
    colours = pictures.float().div_(255.0)
    mean, std = (torch.tensor(each, device=pictures.device)[:, :, None, None] for each in (means, stds))  # [2, 3, 1, 1]
    return (colours.unsqueeze(-4) - mean).div_(std).flatten(-4, -3)
