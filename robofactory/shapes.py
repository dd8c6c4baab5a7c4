"""What crosses between the stages: one place for every shape, dtype, unit and range.

Axis legend, used in every annotation of this package:
    b batch   v view   p patch   t text token   a action dimension   s proprio dimension
    d model width   h w image height and width   n samples or frames
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What one agent knows before it acts, in physical units: nothing is resized or normalised yet.

    images: view name ("side", "overhead", "wrist", ...) -> RGB in [0, 255], channels last, any size.
    proprio: measured joint positions in rad, then the gripper in [-1, 1] (-1 closed, +1 open), before the action.
    instruction: plain words, e.g. "lift the barrier".
    """

    images: dict[str, UInt8[np.ndarray, "_h _w 3"]]
    proprio: Float32[np.ndarray, " s"]
    instruction: str


# Absolute joint targets in rad, then the gripper command in [-1, 1] (-1 close, +1 open): what `pd_joint_pos` executes.
Action = Float32[np.ndarray, " a"]


@dataclass(frozen=True)
class Batch:
    """What the model sees. Made by the codec alone, in training and on the robot.

    pixel_values: per view the DINOv2-normalised image (3 channels), then the SigLIP-normalised one (3 channels).
    input_ids, text_mask: BOS and the prompt; `text_mask` is False on padding, which may stand on either side.
    proprio: normalised by the training data's statistics; None when the model takes none.
    action_tokens: vocabulary ids after the prompt that are learned (a action dimensions, then an end token if the
        codec asks for one); None at inference.
    dataset: index among those that the codec knows, which the model does not look at; None at inference.
    """

    pixel_values: Float[Tensor, "b v 6 h w"]
    input_ids: Int64[Tensor, "b t"]
    text_mask: Bool[Tensor, "b t"]
    proprio: Float[Tensor, "b s"] | None = None
    action_tokens: Int64[Tensor, "b a"] | None = None
    dataset: Int64[Tensor, " b"] | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; the copy overlaps with computation when the memory is pinned."""
        tensors = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})
