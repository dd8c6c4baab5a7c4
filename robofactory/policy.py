"""A checkpoint that acts: the only inference path, used by evaluation and by serving alike."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from robofactory import checkpoint
from robofactory.codec.codec import Codec
from robofactory.model.lora import mix
from robofactory.model.openvla import NUM_BINS, OpenVLA
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

    def look(self, observations: Sequence[Observation]) -> "list[Look]":
        """Acts as `act` does, and says how it came to each action: `Look.action` is what `act` would have answered."""
        self.act(observations)
        assert self.last_tokens is not None
        return look_at(self.model, [self.codec] * len(observations), observations, self.last_tokens)


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

    def look(self, memory: Mapping[int, Memory], observations: Sequence[Observation]) -> "dict[int, Look]":
        """By agent: how the actions came about that an episode has just been given for these observations.

        Nothing that is remembered changes: the episode goes on as if nobody had looked.
        """
        looks: dict[int, Look] = {}
        for model, agents in self.parts:
            codecs, seen = [self.codecs[agent] for agent in agents], [observations[agent] for agent in agents]
            tokens = torch.stack([memory[agent].last_tokens for agent in agents])
            looks |= zip(agents, look_at(model, codecs, seen, tokens), strict=True)
        return looks


# -------------------------------------------------------------------------------------------------------------- look


@dataclass(frozen=True)
class Look:
    """How a policy came to one action: what it saw, where it attended, and how likely it found each bin.

    views, pictures: of each view its name and what the model saw: cropped, resized, RGB in [0, 255].
    parts: what the sequence consists of: `start` (the first token, where attention rests that looks for nothing), each
        view, `proprio` if the policy takes it, `text`, `actions before`.
    attention: of the position that answers with each action token, the share that it pays to each part, in each language
        layer; the mean over its heads. Sums to 1 over the parts.
    heat: the share of each patch of a view, mean over layers and action tokens. A view's global token, if the policy has
        one, is in `attention` alone.
    names, values: of each action dimension its name and the value of every bin, in ascending order: rad, or as the gripper.
    probabilities: of each bin, given the action tokens before; at temperature 1, whatever the policy acts at.
    chosen: the bin of the action.
    """

    views: tuple[str, ...]
    pictures: UInt8[np.ndarray, "v h w 3"]
    parts: tuple[str, ...]
    attention: Float32[np.ndarray, "layers a parts"]
    heat: Float32[np.ndarray, "v grid grid"]
    names: tuple[str, ...]
    values: Float32[np.ndarray, "a bins"]
    probabilities: Float32[np.ndarray, "a bins"]
    chosen: Int64[np.ndarray, " a"]

    @property
    def action(self) -> Action:
        return np.take_along_axis(self.values, self.chosen[:, None], axis=1)[:, 0]


@torch.inference_mode()
def look_at(
    model: OpenVLA, codecs: Sequence[Codec], observations: Sequence[Observation], tokens: Int64[Tensor, "b a"]
) -> list[Look]:
    """How the model came to these action tokens: one pass of the whole sequence, the tokens given.

    The pass has other shapes than those that decided the tokens, so sums are rounded otherwise: of two bins that are as
    likely to the last digits, the chosen one may come second.

    Args:
        codecs: one for each observation, which all make batches of one shape.
    """
    examples = [codec.encode_observation(seen) for codec, seen in zip(codecs, observations, strict=True)]
    given = [replace(each, action_tokens=row) for each, row in zip(examples, tokens.cpu(), strict=True)]
    batch = codecs[0].collate(given).to(tokens.device)
    attention: list[Tensor] = []
    with autocast(model):
        logits = model.action_logits(batch, attention)
    first = model.first_action_id
    probabilities = logits[..., first : first + NUM_BINS].float().softmax(dim=-1).flip(-1)  # the first bin: highest id
    chosen = first + NUM_BINS - 1 - tokens
    _, *of_views, of_proprio, _, _ = columns = torch.stack(attention, dim=1).split(model.part_sizes(batch), dim=-1)
    shares = torch.stack([each.sum(dim=-1) for each in columns], dim=-1)  # [b, layers, a, parts]
    is_patch = slice(int(model.vision_backbone.global_token), None)
    patches = torch.stack([each[..., is_patch].mean(dim=(1, 2)) for each in of_views], dim=1)  # [b, v, p]
    grid = math.isqrt(patches.shape[-1])
    looks = []
    for row, (codec, example) in enumerate(zip(codecs, examples, strict=True)):
        parts = ("start", *codec.views, "proprio", "text", "actions before")
        is_there = [part != "proprio" or of_proprio.shape[-1] > 0 for part in parts]
        ids = np.arange(first, first + NUM_BINS)[::-1, None].repeat(codec.action_dim, axis=1)
        looks.append(
            Look(
                views=codec.views,
                pictures=example.pixel_values.permute(0, 2, 3, 1).numpy(),
                parts=tuple(part for part, there in zip(parts, is_there, strict=True) if there),
                attention=shares[row][..., is_there].cpu().numpy(),
                heat=patches[row].unflatten(-1, (grid, grid)).cpu().numpy(),
                names=codec.action_statistics.names,
                values=codec.decode_actions(ids).T,
                probabilities=probabilities[row].cpu().numpy(),
                chosen=chosen[row].cpu().numpy(),
            )
        )
    return looks


def digest_of_weights(checkpoint: Path) -> str:
    """sha256 over the weight files of a checkpoint, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
