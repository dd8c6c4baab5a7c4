"""A checkpoint that acts: the only inference path, used by evaluation and by serving alike."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from robofactory import checkpoint
from robofactory.codec.codec import Codec
from robofactory.model.openvla import OpenVLA
from robofactory.model.precision import autocast
from robofactory.shapes import Observation


class Policy:
    """Observations in, actions out. One policy controls one agent; several observations make one batch.

    The last action of a batch is where the search for its next one begins. It makes the answer faster and never another
    one, so it does not matter when the observations of a call do not continue those of the call before. Over two
    LiftBarrier rollouts: 3.0 passes an action, 4.2 without it, 3.2 with the last two actions carried on in a line.
    """

    def __init__(self, model: OpenVLA, codec: Codec, temperature: float = 0.0, seed: int = 0):
        self.model, self.codec, self.temperature = model, codec, temperature
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device)
        self.start_episode(seed)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str = "cpu",
        temperature: float = 0.0,
        seed: int = 0,
        dataset: str | None = None,
    ) -> "Policy":
        """The policy of a checkpoint.

        Args:
            dataset: of those it was trained on, the one that its robot is like: actions have its statistics. None: the
                only one. (The official `unnorm_key`.)
        Raises:
            UserError: the directory is no checkpoint, and the line names the file that is missing or wrong; or there is
                no such dataset, or more than one to choose from, and the line lists them.
        """
        model, codec, _ = checkpoint.load_model(Path(directory), device)
        return cls(model, codec.for_dataset(dataset), temperature, seed)

    def start_episode(self, seed: int) -> None:
        """Make what follows depend on the seed and the observations alone: sampled actions, and the count of passes."""
        self.generator.manual_seed(seed)
        self.last_tokens: Tensor | None = None

    @property
    def num_passes(self) -> int:
        """Through the language layers so far. An action takes the prompt's, and 1 to 8 short ones for its 8 tokens."""
        return self.model.num_passes

    @property
    def fingerprint(self) -> str:
        """Of the preprocessing and the statistics (hex digest)."""
        return self.codec.fingerprint

    @torch.inference_mode()
    def act(self, observations: Sequence[Observation]) -> Float32[np.ndarray, "b a"]:
        """Absolute joint targets in rad and the gripper command in [-1, 1] for each observation.

        Greedy for temperature 0, otherwise sampled. Raises UserError for an observation the policy was not trained on
        (a missing view, a wrong dtype, a NaN).
        """
        batch = self.codec.encode_observations(observations).to(self.device)
        draft = self.last_tokens
        if draft is not None and len(draft) != len(observations):
            draft = None
        with autocast(self.model):
            tokens = self.model.generate(batch, self.codec.action_dim, self.temperature, self.generator, draft)
        self.last_tokens = tokens
        return self.codec.decode_actions(tokens.cpu().numpy())


def digest_of_weights(checkpoint: Path) -> str:
    """sha256 over the weight files of a checkpoint, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
