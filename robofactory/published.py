"""What published weights say of themselves: `config.json` and `preprocessor_config.json`, as the official code writes them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Strict, model_validator

from robofactory import documents
from robofactory.documents import Count, Document, PositiveCount
from robofactory.errors import UserError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
ADVICE = "copy it again from the published model"

# Nobody's model is larger; a declared size beyond these is refused before anything is built.
MOST_WIDE, MOST_LAYERS = 2**17, 1024
Width = Annotated[int, Field(ge=1, le=MOST_WIDE)]
Depth = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
ImageSize = Annotated[int, Field(ge=1, le=4096)]  # px
Listed = Strict(False)  # a tuple here is a list there
Triple = Annotated[tuple[float, float, float], Listed]  # a number for each colour
Spread = Annotated[float, Field(gt=0)]
Spreads = Annotated[tuple[Spread, Spread, Spread], Listed]


class TowerSizes(Document):
    """What `timm_overrides`, a key of this project, may change about a vision tower."""

    model_config = ConfigDict(extra="forbid")

    embed_dim: Width
    depth: Annotated[int, Field(ge=2, le=MOST_LAYERS)]  # the output of the second-to-last block is used
    num_heads: Width
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0

    @model_validator(mode="after")
    def _divides(self) -> "TowerSizes":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim ({self.embed_dim}) must be a multiple of num_heads ({self.num_heads})")
        return self


class Rope(Document):
    """Positions as Llama 2 has them; a scaled variant would be silently computed as this one."""

    model_config = ConfigDict(extra="forbid")

    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"
    rope_theta: Annotated[float, Field(gt=0)] | None = None


class TextConfig(Document):
    """Llama's configuration, as far as it decides what is computed. Defaults are those of `LlamaConfig`."""

    model_type: Literal["llama"] = "llama"
    vocab_size: Annotated[int, Field(ge=1, le=2**21)]
    hidden_size: Width = 4096
    intermediate_size: Width = 11008
    num_hidden_layers: Depth = 32
    num_attention_heads: Width = 32
    num_key_value_heads: Width | None = None
    head_dim: Width | None = None
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: PositiveCount = 2048
    initializer_range: Annotated[float, Field(ge=0)] = 0.02
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: Literal[False] = False
    pad_token_id: Count | None = None

    @model_validator(mode="after")
    def _divides(self) -> "TextConfig":
        heads, groups = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads ({heads})")
        if heads % groups:
            raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups})")
        if (self.head_dim or self.hidden_size // heads) % 2:
            raise ValueError("the width of a head must be even, its numbers are rotated in pairs")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id ({self.pad_token_id}) must be below vocab_size ({self.vocab_size})")
        return self

    def for_llama(self) -> dict[str, Any]:
        """Keyword arguments of `LlamaConfig`."""
        return self.model_dump(exclude={"rope_scaling"}, exclude_unset=True, exclude_none=True)


class Bounds(Document):
    """Of a dataset's actions: the values that -1 and +1 stand for."""

    q01: list[float]
    q99: list[float]

    @model_validator(mode="after")
    def _is_one_vector(self) -> "Bounds":
        if len(self.q01) != len(self.q99):
            raise ValueError(f"as many numbers in q01 ({len(self.q01)}) as in q99 ({len(self.q99)})")
        return self


class NormStats(Document):
    action: Bounds


class PublishedConfig(Document):
    """`config.json`, as far as it describes the model."""

    model_type: Literal["openvla"] = "openvla"
    use_fused_vision_backbone: Literal[True]
    arch_specifier: Literal["no-align+fused-gelu-mlp"]
    n_action_bins: Literal[256]
    timm_model_ids: Annotated[
        tuple[
            Literal["vit_large_patch14_reg4_dinov2.lvd142m"],
            Literal["vit_so400m_patch14_siglip_224", "vit_so400m_patch14_siglip_384"],
        ],
        Listed,
    ]
    timm_override_act_layers: Annotated[tuple[None, None], Listed]
    timm_overrides: dict[str, TowerSizes] = Field(default_factory=dict)
    image_sizes: Annotated[tuple[ImageSize, ImageSize], Listed]
    pad_to_multiple_of: Count
    text_config: TextConfig
    norm_stats: dict[str, NormStats] | None = None

    @model_validator(mode="after")
    def _has_room_for_actions(self) -> "PublishedConfig":
        if self.num_ids <= self.n_action_bins:
            raise ValueError(f"text_config.vocab_size less pad_to_multiple_of above {self.n_action_bins}, for text and the actions; it is {self.num_ids}")  # fmt: skip
        if len(set(self.image_sizes)) != 1:
            raise ValueError(f"equal image_sizes; they are {list(self.image_sizes)}")
        return self

    @property
    def num_ids(self) -> int:
        """Of text and actions; the embedding has more rows, for padding."""
        return self.text_config.vocab_size - self.pad_to_multiple_of


class PublishedPolicy(PublishedConfig):
    """`config.json`, as far as it says how pictures and text become the model's inputs, too."""

    image_resize_strategy: Literal["resize-naive"]
    pad_token_id: Count

    @model_validator(mode="after")
    def _pads_with_a_row(self) -> "PublishedPolicy":
        if self.pad_token_id >= self.text_config.vocab_size:
            raise ValueError(f"pad_token_id below text_config.vocab_size; it is {self.pad_token_id}")
        return self


def read_config(directory: Path) -> dict[str, Any]:
    """The published `config.json`, as it is there, checked.

    Raises:
        UserError: it is missing, or describes no model that this project can build.
    """
    content = documents.read_json(directory / CONFIG, dict, ADVICE)
    documents.check(content, PublishedConfig, str(directory / CONFIG))
    return content


# ------------------------------------------------------------------------------------------------------------ pictures


class Resize(Document):
    size: Annotated[tuple[ImageSize, ImageSize], Listed]  # the official code then squashes; one number keeps the shape
    interpolation: Literal["bicubic", 3]  # 3 is Pillow's number for it
    max_size: None = None


class CenterCrop(Document):
    output_size: Annotated[tuple[ImageSize, ImageSize], Listed]


class Normalize(Document):
    mean: Triple
    std: Spreads


class Preprocessor(Document):
    """`preprocessor_config.json`: what the official processor does with a picture, and this project does too.

    The official code computes the keys `tvf_...` from the others, and where the file has them, takes those. Of
    openvla-7b they are other numbers: its means and standard deviations were rounded to bfloat16 there. Whether resizing
    is antialiased is not read: of a Pillow picture, which the official code resizes, it always is.
    """

    image_resize_strategy: Literal["resize-naive"]
    use_fused_vision_backbone: Literal[True] = True
    input_sizes: Annotated[tuple[Annotated[tuple[Literal[3], ImageSize, ImageSize], Listed], ...], Listed, Field(min_length=2, max_length=2)]  # fmt: skip
    interpolations: Annotated[tuple[Literal["bicubic"], Literal["bicubic"]], Listed] = ("bicubic", "bicubic")
    means: Annotated[tuple[Triple, Triple], Listed] | None = None
    stds: Annotated[tuple[Spreads, Spreads], Listed] | None = None
    tvf_do_letterbox: Literal[False] = False
    tvf_resize_params: Annotated[tuple[Resize, Resize], Listed] | None = None
    tvf_crop_params: Annotated[tuple[CenterCrop, CenterCrop], Listed] | None = None
    tvf_normalize_params: Annotated[tuple[Normalize, Normalize], Listed] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "Preprocessor":
        if self.tvf_normalize_params is None and (self.means is None or self.stds is None):
            raise ValueError("tvf_normalize_params, or means and stds")
        sizes = {size for _, *both in self.input_sizes for size in both}
        sizes |= {size for resize in self.tvf_resize_params or () for size in resize.size}
        sizes |= {size for crop in self.tvf_crop_params or () for size in crop.output_size}
        if len(sizes) != 1:
            raise ValueError(f"one size, the same for both towers, in input_sizes, tvf_resize_params and tvf_crop_params; there are {sorted(sizes)}")  # fmt: skip
        return self

    @property
    def image_size(self) -> int:
        return self.input_sizes[0][1]

    @property
    def normalization(self) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
        """Means and standard deviations, DINOv2's and then SigLIP's."""
        if self.tvf_normalize_params is not None:
            return tuple(p.mean for p in self.tvf_normalize_params), tuple(p.std for p in self.tvf_normalize_params)
        assert self.means is not None and self.stds is not None
        return self.means, self.stds


def read_preprocessor(directory: Path, image_size: int) -> Preprocessor | None:
    """The published `preprocessor_config.json`; None where there is none.

    Args:
        image_size: px, of `config.json`.
    Raises:
        UserError: it asks for what this project does not do, or contradicts `config.json`; the line says what differs.
    """
    path = directory / PREPROCESSOR
    if not path.exists() and not path.is_symlink():
        return None
    preprocessor = documents.read_json(path, Preprocessor, "pictures cannot be made as these weights want them")
    if preprocessor.image_size != image_size:
        raise UserError(f"{path}: input_sizes is {preprocessor.image_size} x {preprocessor.image_size}, and {CONFIG} beside it says image_sizes {image_size}; {ADVICE}")  # fmt: skip
    return preprocessor


def written_preprocessor(
    given: dict[str, Any], image_size: int, means: tuple[tuple[float, ...], ...], stds: tuple[tuple[float, ...], ...]
) -> dict[str, Any]:
    """A `preprocessor_config.json` with these numbers, where the official code reads them.

    Args:
        given: what the base's file says; what is not about pictures stays.
    """
    size = [image_size, image_size]
    resize = {"antialias": True, "interpolation": 3, "max_size": None, "size": size}
    return {"image_processor_type": "PrismaticImageProcessor", "processor_class": "PrismaticProcessor"} | given | {
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, *size]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": given.get("means", [list(mean) for mean in means]),
        "stds": given.get("stds", [list(std) for std in stds]),
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_resize_params": [resize] * 2,
        "tvf_crop_params": [{"output_size": size}] * 2,
        "tvf_normalize_params": [
            {"inplace": False, "mean": list(mean), "std": list(std)} for mean, std in zip(means, stds, strict=True)
        ],
    }  # fmt: skip
