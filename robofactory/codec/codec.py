"""Everything that must be the same in training and on the robot: one object, saved with every checkpoint.

observation -> views in order, pixel values, prompt ids, normalised proprio     (encode)
action <-> vocabulary ids                                                       (encode, decode)
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt8
from torch import Tensor

from robofactory import documents
from robofactory.codec.action_tokens import ActionTokens
from robofactory.codec.images import ImagePipeline
from robofactory.codec.prompt import TOKENIZER_FILE, Prompt, read_published_config
from robofactory.codec.statistics import DatasetStatistics, Statistics, require_alike
from robofactory.codec.stored import FirstCodec, StoredCodec
from robofactory.config import RecipeConfig
from robofactory.errors import UserError, brief
from robofactory.files import write_atomically
from robofactory.paths import find_weights
from robofactory.shapes import Batch, Observation

FILE = "codec.json"
FORMAT = 2


@dataclass(frozen=True)
class Example:
    """One sample of a `Stacked`, before padding. The fields are as there, without the axis b."""

    pixel_values: UInt8[Tensor, "v 3 h w"]
    input_ids: Int64[Tensor, " t"]
    proprio: Float32[Tensor, " s"] | None = None
    action_tokens: Int64[Tensor, " a"] | None = None
    dataset: Int64[Tensor, ""] | None = None


@dataclass(frozen=True)
class Stacked(Batch):
    """A `Batch` whose pictures are as the data workers hand them over, an eighth of the bytes: not normalised yet."""

    pixel_values: UInt8[Tensor, "b v 3 h w"]


@dataclass(frozen=True, eq=False)
class Codec:
    """Observations and actions <-> what the model sees and says. Two codecs are the same if `fingerprint` is.

    views: names, in the order the model sees them. An observation may have more.
    end_token: an end token is learned after the actions, as the official model does.
    datasets: by name, all that the policy is trained on; each has its own statistics.
    dataset: whose statistics these observations and actions are of; see `for_dataset`. None while there are several to
        choose from.
    """

    views: tuple[str, ...]
    images: ImagePipeline
    prompt: Prompt
    action_tokens: ActionTokens
    use_proprio: bool
    end_token: bool
    datasets: dict[str, DatasetStatistics]
    dataset: str | None = None

    def __post_init__(self) -> None:
        if len(self.datasets) == 1:
            object.__setattr__(self, "dataset", next(iter(self.datasets)))

    @classmethod
    def create(cls, recipe: RecipeConfig, datasets: Mapping[str, DatasetStatistics]) -> "Codec":
        """The codec of a recipe and its training data.

        Raises:
            UserError: the datasets do not go together, or no published weights by the recipe's name.
            FileNotFoundError: a file of the recipe's published weights is not there.
        """
        require_alike(datasets, recipe.model.use_proprio)
        prompt, images = inputs_of(recipe)
        return cls(
            views=tuple(recipe.data.views),
            images=images,
            prompt=prompt,
            action_tokens=ActionTokens(prompt.vocab_size),
            use_proprio=recipe.model.use_proprio,
            end_token=recipe.model.architecture is None,
            datasets=dict(datasets),
        )

    def normalized_as(self, earlier: "Codec") -> "Codec":
        """With the pictures' normalisation of an earlier codec: a policy keeps the one it was trained with.

        Published weights may have come without their `preprocessor_config.json`, or a version of this project trained
        on them that did not read it.
        """
        images = replace(self.images, means=earlier.images.means, stds=earlier.images.stds, note="")
        return self if images == self.images else replace(self, images=images)

    # -------------------------------------------------------------------------------------------------- statistics

    def for_dataset(self, name: str | None) -> "Codec":
        """The same codec with the statistics of one of its datasets.

        Args:
            name: None: the only one.
        Raises:
            UserError: there is none of that name, or more than one to choose from; the line lists them.
        """
        known = ", ".join(self.datasets)
        if name is None and len(self.datasets) > 1:
            raise UserError(f"the policy was trained on several datasets, each with its own statistics: choose with --dataset, or Policy.load(..., dataset=...): {known}")  # fmt: skip
        if name is not None and name not in self.datasets:
            raise UserError(f"the policy was not trained on a dataset {name!r}; it knows {known}")
        return self if name in (None, self.dataset) else replace(self, dataset=name)

    @property
    def chosen(self) -> DatasetStatistics:
        assert self.dataset is not None, f"of which dataset? {list(self.datasets)}"
        return self.datasets[self.dataset]

    @property
    def action_statistics(self) -> Statistics:
        return self.chosen.action

    @property
    def proprio_statistics(self) -> Statistics:
        return self.chosen.proprio

    @property
    def look(self) -> dict[str, Any]:
        return self.chosen.look

    # ------------------------------------------------------------------------------------------------------ sizes

    @property
    def image_size(self) -> int:
        return self.images.image_size

    @property
    def action_dim(self) -> int:
        return len(self._any.action.names)

    @property
    def proprio_dim(self) -> int:
        return len(self._any.proprio.names)

    @property
    def _any(self) -> DatasetStatistics:
        """For what is the same in all of them."""
        return next(iter(self.datasets.values()))

    @property
    def vocab_size(self) -> int:
        """Ids of text and actions together; the last 256 are the actions."""
        return self.prompt.vocab_size

    @property
    def half_bin(self) -> Float64[np.ndarray, " a"]:
        """The largest decoding error of an action that is not `clipped`, in physical units."""
        return self.action_statistics.scale * self.action_tokens.half_bin

    # ----------------------------------------------------------------------------------------------- observations

    def encode_observation(self, observation: Observation, generator: torch.Generator | None = None) -> Example:
        """What the model sees of one observation.

        Args:
            generator: given in training: random crops, if the recipe asks for them. None: centred.
        Raises:
            UserError: a view is missing, or something has the wrong dtype or shape or is not finite.
        """
        return Example(
            pixel_values=torch.from_numpy(
                self.images.encode([self._picture(observation, view) for view in self.views], generator)
            ),
            input_ids=self.prompt.encode(observation.instruction),
            proprio=self._proprio(observation) if self.use_proprio else None,
        )

    def encode_example(
        self, observation: Observation, action: Float[np.ndarray, " a"], generator: torch.Generator | None = None
    ) -> Example:
        """One training example: the observation, and the ids that are learned (actions, then an end token if any)."""
        ids = self.encode_actions(action)
        if self.end_token:
            ids = np.append(ids, self.prompt.end_id)
        example, index = self.encode_observation(observation, generator), list(self.datasets).index(str(self.dataset))
        return replace(example, action_tokens=torch.from_numpy(ids), dataset=torch.tensor(index))

    def stack(self, examples: Sequence[Example]) -> Stacked:
        """One batch. Shorter prompts are padded on the right; without actions, for generation, on the left."""
        length = max(len(example.input_ids) for example in examples)
        input_ids = torch.full((len(examples), length), self.prompt.pad_id)  # [b, t]
        text_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, example in enumerate(examples):
            start = 0 if example.action_tokens is not None else length - len(example.input_ids)
            columns = slice(start, start + len(example.input_ids))
            input_ids[row, columns], text_mask[row, columns] = example.input_ids, True
        proprio = [example.proprio for example in examples if example.proprio is not None]
        tokens = [example.action_tokens for example in examples if example.action_tokens is not None]
        datasets = [example.dataset for example in examples if example.dataset is not None]
        assert len(proprio) in (0, len(examples)) and len(tokens) in (0, len(examples)), (len(proprio), len(tokens))
        return Stacked(
            pixel_values=torch.stack([example.pixel_values for example in examples]),
            input_ids=input_ids,
            text_mask=text_mask,
            proprio=torch.stack(proprio) if proprio else None,
            action_tokens=torch.stack(tokens) if tokens else None,
            dataset=torch.stack(datasets) if datasets else None,
        )

    def normalized(self, stacked: Batch) -> Batch:
        """The batch as the model sees it, on the device where it is."""
        assert isinstance(stacked, Stacked), "it is normalised already"
        return Batch(**vars(stacked) | {"pixel_values": self.images.normalize(stacked.pixel_values)})

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Both at once."""
        return self.normalized(self.stack(examples))

    def encode_observations(self, observations: Sequence[Observation]) -> Batch:
        """What the policy sees: centred crops, no actions."""
        return self.collate([self.encode_observation(observation) for observation in observations])

    def _picture(self, observation: Observation, view: str) -> UInt8[np.ndarray, "_h _w 3"]:
        if view not in observation.images:
            has = ", ".join(observation.images) or "none"
            raise UserError(f"no view {view!r} in the observation (it has {has}); expected {', '.join(self.views)}")
        picture = observation.images[view]
        expected = "a uint8 array [height, width, 3], RGB in [0, 255]"
        is_array = isinstance(picture, np.ndarray)
        if not is_array or picture.dtype != np.uint8 or picture.shape[2:] != (3,) or 0 in picture.shape:
            raise UserError(f"view {view!r} is {_describe(picture)}; expected {expected}")
        return picture

    def _proprio(self, observation: Observation) -> Float32[Tensor, " s"]:
        proprio = observation.proprio
        names = ", ".join(self.proprio_statistics.names)
        if not isinstance(proprio, np.ndarray) or proprio.dtype.kind != "f" or proprio.shape != (self.proprio_dim,):
            raise UserError(f"proprio is {_describe(proprio)}; expected float32 [{self.proprio_dim}]: {names}")
        if not np.isfinite(proprio).all():
            raise UserError(f"proprio is not finite: {proprio.tolist()}; expected {self.proprio_dim} numbers: {names}")
        return torch.from_numpy(self.proprio_statistics.normalize(proprio).astype(np.float32))

    # ---------------------------------------------------------------------------------------------------- actions

    def encode_actions(self, actions: Float[np.ndarray, "*b a"]) -> Int64[np.ndarray, "*b a"]:
        """Vocabulary ids of actions in physical units; what lies beyond the bins is clipped.

        Raises:
            UserError: the wrong number of dimensions, NaN or infinity.
        """
        names = ", ".join(self.action_statistics.names)
        if actions.shape[-1] != self.action_dim:
            raise UserError(f"an action has {actions.shape[-1]} numbers; expected {self.action_dim}: {names}")
        if not np.isfinite(actions).all():
            at = np.isfinite(actions).reshape(-1, self.action_dim).all(axis=0).argmin()
            raise UserError(
                f"an action's {self.action_statistics.names[at]!r} is not finite; expected numbers: {names}"
            )
        return self.action_tokens.encode(self.action_statistics.normalize(actions))

    def decode_actions(self, ids: Int64[np.ndarray, "*b a"]) -> Float32[np.ndarray, "*b a"]:
        """Actions in physical units, at the centres of their bins: rad, and the gripper in [-1, 1]."""
        assert ids.shape[-1] == self.action_dim, (ids.shape, self.action_dim)
        return self.action_statistics.denormalize(self.action_tokens.decode(ids)).astype(np.float32)

    def decode_each(self, ids: Int64[np.ndarray, "b a"], datasets: Sequence[int]) -> Float32[np.ndarray, "b a"]:
        """The same, each row with the statistics of its own dataset."""
        names = list(self.datasets)
        rows = zip(ids, datasets, strict=True)
        return np.stack([self.for_dataset(names[dataset]).decode_actions(row) for row, dataset in rows])

    def clipped(self, actions: Float[np.ndarray, "*b a"]) -> Bool[np.ndarray, "*b a"]:
        """Where an action lies beyond its bins, so that its decoding is off by more than half a bin."""
        return self.action_statistics.outside(actions)

    def action_table(self, actions: Float[np.ndarray, "n a"]) -> str:
        """For people: range and precision of each action dimension, and what the bins do to these actions."""
        statistics, half_bin = self.action_statistics, self.half_bin
        error = np.abs(self.decode_actions(self.encode_actions(actions)) - actions).max(axis=0)
        clipped = self.clipped(actions).mean(axis=0)
        names = [brief(name, 40) for name in statistics.names]
        width = max(9, *map(len, names))
        bins, count = self.action_tokens.num_bins, statistics.count
        lines = [
            f"actions: {bins} bins per dimension, {statistics.method} of {count} steps; rad, or passed through",
            f"{'dimension':<{width}} {'min':>9} {'max':>9} {'range':>9} {'half bin':>9} {'worst':>9} {'clipped':>8}",
        ]
        for at, name in enumerate(names):
            low, high = statistics.min[at], statistics.max[at]
            span = f"{low:9.4f} {high:9.4f} {high - low:9.4f}"
            note = "" if statistics.normalized[at] else "  passes through"
            lines.append(f"{name:<{width}} {span} {half_bin[at]:9.5f} {error[at]:9.5f} {clipped[at]:8.2%}{note}")
        return "\n".join(lines)

    # ------------------------------------------------------------------------------------------------------- disk

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "views": list(self.views),
            "images": self.images.to_json(),
            "prompt": self.prompt.to_json(),
            "actions": {
                "bins": self.action_tokens.num_bins,
                "first_id": self.action_tokens.first_id,
                "end_token": self.end_token,
            },
            "use_proprio": self.use_proprio,
            "datasets": {name: dataset.to_json() for name, dataset in self.datasets.items()},
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything in codec.json, and of the choice where there is one between several datasets."""
        choice = {"dataset": self.dataset} if self.dataset is not None and len(self.datasets) > 1 else {}
        return _fingerprint(self._content() | choice)

    def save(self, directory: Path) -> None:
        """Write `codec.json`, and the tokenizer beside it if it is not the shipped one; each whole or not at all."""
        if self.prompt.tokenizer_name == TOKENIZER_FILE:
            write_atomically(directory / TOKENIZER_FILE, self.prompt.tokenizer_text)
        write_atomically(
            directory / FILE, _readable(self._content() | {"fingerprint": _fingerprint(self._content())}) + "\n"
        )

    @classmethod
    def load(cls, directory: Path) -> "Codec":
        """The codec that `save` wrote.

        Raises:
            FileNotFoundError: no codec.json, or no tokenizer, in the directory.
            UserError: the file is truncated, was edited, is of another version, or the tokenizer is another one.
        """
        path = directory / FILE
        if not path.exists():
            raise FileNotFoundError(f"no {FILE} in {directory}; actions cannot be decoded. Choose another checkpoint")
        content = documents.read_json(path, dict, "use another checkpoint")
        if content.get("format") not in (1, FORMAT):
            raise UserError(f"{path} is not a codec of format {FORMAT}; use the version of robofactory that wrote it")
        stated = content.pop("fingerprint", None)
        if stated != _fingerprint(content):
            raise UserError(f"{path} was edited or damaged: it does not match its fingerprint. Restore the file")
        if content["format"] == 1:
            documents.check(content, FirstCodec, str(path))
            content = _with_datasets(content, directory.resolve().parent.name)
        documents.check(content, StoredCodec, str(path))
        prompt = Prompt.from_json(content["prompt"], directory)
        codec = cls(
            views=tuple(content["views"]),
            images=ImagePipeline.from_json(content["images"]),
            prompt=prompt,
            action_tokens=ActionTokens(prompt.vocab_size, content["actions"]["bins"]),
            use_proprio=content["use_proprio"],
            end_token=content["actions"]["end_token"],
            datasets={name: DatasetStatistics.from_json(each) for name, each in content["datasets"].items()},
        )
        if codec._content() != content:  # e.g. other pixel means: this code would not do what the file says
            raise UserError(f"{path} asks for what this version of robofactory does not do; use the one that wrote it")
        return codec


def inputs_of(recipe: RecipeConfig) -> tuple[Prompt, ImagePipeline]:
    """How a recipe's model reads text and pictures, whatever it is trained on.

    Raises:
        UserError: no published weights by the recipe's name, or they want what this project does not do.
        FileNotFoundError: a file of theirs is not there.
    """
    crop = recipe.training.augment_crop_ratio, recipe.training.image_aug
    if recipe.model.architecture is not None:
        return Prompt.tiny(), ImagePipeline(recipe.model.architecture.image_size, *crop)
    weights = find_weights(recipe.model.model_name)
    image_size = read_published_config(weights).image_sizes[0]
    return Prompt.from_weights(weights), ImagePipeline.of_weights(weights, image_size, *crop)


def _with_datasets(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Format 1 had one dataset, and did not say which: it had the name of the run."""
    actions, proprio = dict(content["actions"]), content["proprio"]
    dataset = {"look": content["look"], "num_episodes": 0, "action": actions.pop("statistics"), "proprio": proprio["statistics"]}  # fmt: skip
    kept = {key: content[key] for key in ("views", "images", "prompt")}
    return kept | {"format": FORMAT, "actions": actions, "use_proprio": proprio["used"], "datasets": {name: dataset}}


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def _fingerprint(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def _readable(value: Any, indent: str = "") -> str:
    """JSON with one line for each entry of a dictionary, lists on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    deeper = indent + "  "
    lines = [f"{deeper}{json.dumps(key)}: {_readable(entry, deeper)}" for key, entry in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + indent + "}"
