"""A checkpoint that acts: the only inference path, used by evaluation and by serving alike."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from robofactory import checkpoint
from robofactory.codec.codec import Codec
from robofactory.model.lora import mix
from robofactory.model.openvla import OpenVLA
from robofactory.model.precision import autocast
from robofactory.shapes import Action, Observation


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
            generators = [self.generator] * len(observations)
            tokens = self.model.generate(batch, self.codec.action_dim, self.temperature, generators, draft)
        self.last_tokens = tokens
        return self.codec.decode_actions(tokens.cpu().numpy())


@dataclass
class Memory:
    """What a policy carries from one step of an episode to the next: the draws to come, and where to begin."""

    generator: torch.Generator
    last_tokens: Int64[Tensor, " a"]


class Policies:
    """The policies of several agents, each of which acts in several episodes at a time, all in one batch.

    Policies that are adapters of one base share it in memory, and answer in one pass over it. An episode does not depend
    on the others, to the bit: a batch always has the same shape, with copies in the place of episodes that have nothing
    to ask, and an episode keeps its row. In another row, or a batch of another size, sums are rounded differently.
    """

    def __init__(
        self, models: Mapping[int, OpenVLA], codecs: Mapping[int, Codec], num_rows: int, temperature: float = 0.0
    ):
        """The models and codecs are by agent; `num_rows` is the number of episodes in a batch."""
        self.codecs, self.num_rows, self.temperature = codecs, num_rows, temperature
        self.device = next(next(iter(models.values())).parameters()).device
        alike: dict[tuple[int, ...], list[int]] = {}  # agents on one base whose batches have one shape
        for agent, model in models.items():
            base, codec = model.language_model.model.embed_tokens.weight, codecs[agent]
            sizes = id(base), len(codec.views), codec.proprio_dim, codec.action_dim
            alike.setdefault(sizes, []).append(agent)
        self.parts = [
            (models[agents[0]] if len(agents) == 1 else mix([models[agent] for agent in agents]), agents)
            for agents in alike.values()
        ]

    @classmethod
    def load(
        cls,
        checkpoints: Mapping[int, Path],
        num_rows: int,
        device: str = "cpu",
        temperature: float = 0.0,
        datasets: Mapping[int, str | None] | None = None,
    ) -> "Policies":
        """Raises UserError when a directory is no checkpoint; the line names the file that is missing or wrong.

        Args:
            datasets: by agent, whose statistics its policy acts by, see `Policy.load`.
        """
        loaded = dict(zip(checkpoints, checkpoint.load_models(list(checkpoints.values()), device), strict=True))
        models = {agent: model for agent, (model, _, _) in loaded.items()}
        codecs = {agent: codec.for_dataset((datasets or {}).get(agent)) for agent, (_, codec, _) in loaded.items()}
        return cls(models, codecs, num_rows, temperature)

    def start_episode(self, seed: int) -> dict[int, Memory]:
        """By agent: what the episode of a seed begins with."""
        return {
            agent: Memory(
                torch.Generator(self.device).manual_seed(seed),
                torch.full((self.codecs[agent].action_dim,), model.first_action_id, device=self.device),
            )
            for model, agents in self.parts
            for agent in agents
        }

    @torch.inference_mode()
    def act(
        self, asked: Mapping[int, tuple[dict[int, Memory], Sequence[Observation]]]
    ) -> dict[int, tuple[dict[int, Action], int]]:
        """The actions of each episode that asks, by agent, and how many passes through the language layers they took.

        Args:
            asked: row -> the episode's memory, which is brought up to date, and what every agent of the scene sees.
        """
        assert asked and set(asked) <= set(range(self.num_rows)), (set(asked), self.num_rows)
        answers: dict[int, tuple[dict[int, Action], int]] = {row: ({}, 0) for row in asked}
        for model, agents in self.parts:
            memories = {(agent, row): memory[agent] for agent in agents for row, (memory, _) in asked.items()}
            examples = {at: self.codecs[at[0]].encode_observation(asked[at[1]][1][at[0]]) for at in memories}
            places = [(agent, row) for agent in agents for row in range(self.num_rows)]
            sources = [at if at in memories else (at[0], min(asked)) for at in places]
            codec = self.codecs[agents[0]]  # the other agents' has the same prompt and sizes
            batch = codec.collate([examples[source] for source in sources]).to(self.device)
            generators = [memories[at].generator if at in memories else torch.Generator(self.device) for at in places]
            draft = torch.stack([memories[source].last_tokens for source in sources])
            with autocast(model):
                tokens = model.generate(batch, codec.action_dim, self.temperature, generators, draft)
            ids = tokens.cpu().numpy()
            for index, (agent, row) in enumerate(places):
                if row in asked:
                    memories[agent, row].last_tokens = tokens[index]
                    actions, passes = answers[row]
                    actions[agent] = self.codecs[agent].decode_actions(ids[index])
                    answers[row] = actions, passes + model.row_passes[index]
        return answers


def digest_of_weights(checkpoint: Path) -> str:
    """sha256 over the weight files of a checkpoint, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
