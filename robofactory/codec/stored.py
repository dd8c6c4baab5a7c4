"""`codec.json`: what is in the file, of both formats that were written."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from robofactory.codec.statistics import METHODS
from robofactory.documents import Count, Document

Name = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**21)]
Spread = Annotated[float, Field(gt=0)]
Pixels = Annotated[int, Field(ge=1, le=2**14)]
Both = Field(min_length=2, max_length=2)
Colours = Field(min_length=3, max_length=3)


class StoredImages(Document):
    image_size: Annotated[int, Field(ge=1, le=4096)]
    crop_area_ratio: Annotated[float, Field(gt=0, le=1)]
    random_crop: bool
    means: Annotated[list[Annotated[list[float], Colours]], Both]
    stds: Annotated[list[Annotated[list[Spread], Colours]], Both]


class StoredPrompt(Document):
    """The tokenizer is a file of its own."""

    template: str
    tokenizer: Literal["tiny", "tokenizer.json"]
    tokenizer_sha256: str
    vocab_size: Annotated[int, Field(gt=256, le=2**21)]
    bos_id: TokenId
    end_id: TokenId
    pad_id: TokenId
    suffix_ids: list[TokenId]


class StoredActions(Document):
    bins: Literal[256]
    end_token: bool


class StoredStatistics(Document):
    method: str
    names: Annotated[list[Name], Field(min_length=1)]
    count: Count
    normalized: list[bool]
    min: list[float]
    max: list[float]
    mean: list[float]
    std: list[float]
    q01: list[float]
    q99: list[float]

    @model_validator(mode="after")
    def _is_of_one_vector(self) -> "StoredStatistics":
        if self.method not in METHODS:
            raise ValueError(f"a method of {', '.join(METHODS)}; it is {self.method!r}")
        for key in ("normalized", "min", "max", "mean", "std", "q01", "q99"):
            if len(there := getattr(self, key)) != len(self.names):
                raise ValueError(f"as many entries in {key} ({len(there)}) as in names ({len(self.names)})")
        return self


class StoredLook(Document):
    """How a scene's pictures look, see `config.look_of`; empty for pictures of no scene."""

    visual_detail: str | None = None
    shader: str | None = None
    lighting: dict[str, Any] | None = None
    cameras: list[dict[str, Any]] | None = None
    views: dict[str, str] | None = None
    camera_sizes: dict[str, Annotated[list[Pixels], Both]] = Field(default_factory=dict)
    original_meshes: bool | None = None


class StoredDataset(Document):
    look: StoredLook
    num_episodes: Count
    action: StoredStatistics
    proprio: StoredStatistics


class StoredCodec(Document):
    views: Annotated[list[Name], Field(min_length=1)]
    images: StoredImages
    prompt: StoredPrompt
    actions: StoredActions
    use_proprio: bool
    datasets: Annotated[dict[Name, StoredDataset], Field(min_length=1)]


# --------------------------------------------------------------------------------------------------- the first format


class FirstActions(StoredActions):
    statistics: dict[str, Any]


class FirstProprio(Document):
    used: bool
    statistics: dict[str, Any]


class FirstCodec(Document):
    """It had one dataset, and did not say which."""

    views: list[Name]
    images: dict[str, Any]
    prompt: dict[str, Any]
    actions: FirstActions
    proprio: FirstProprio
    look: dict[str, Any]
