"""A small look-alike of openvla-7b: the official layout, a tokenizer that behaves as Llama's, random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers

from robofactory.model.openvla import build_from_config
from robofactory.model.weights import OPENVLA_7B, save_openvla

NUM_IDS = 512  # of text and actions; the embedding has 64 more rows, as the official one


def config(**changes: Any) -> dict[str, Any]:
    """An official `config.json` of a small model; grouped keys, so that nothing can rely on equal widths."""
    dino, siglip = OPENVLA_7B["timm_model_ids"]
    small = {
        "model_type": "openvla",
        "image_sizes": [28, 28],
        "image_resize_strategy": "resize-naive",
        "pad_token_id": NUM_IDS,
        "timm_overrides": {
            dino: {"embed_dim": 32, "depth": 3, "num_heads": 2},
            siglip: {"embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0},
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": NUM_IDS + 64,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": NUM_IDS,
        },
        "norm_stats": {"other": {"action": {"q01": [-1.0], "q99": [1.0], "mask": [True]}}},
        "torch_dtype": "bfloat16",
    }
    return OPENVLA_7B | small | changes


def write_published(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Weights in bfloat16 in several shards, `config.json` and `tokenizer.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = build_from_config(config(**changes), global_token=True)
    with torch.no_grad():  # a fresh model's outputs are nearly uniform
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_openvla(model.bfloat16(), directory, shard_bytes=100_000)
    (directory / "config.json").write_text(json.dumps(config(**changes)))
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor(config(**changes)["image_sizes"][0])))
    llama_like_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def preprocessor(image_size: int = 28, **changes: Any) -> dict[str, Any]:
    """A `preprocessor_config.json` as openvla-7b's: the means are one thing, what is used is them rounded to bfloat16."""
    size = [image_size] * 2
    resize = {"antialias": True, "interpolation": 3, "max_size": None, "size": size}
    means, stds = [[0.485, 0.456, 0.406], [0.5] * 3], [[0.229, 0.224, 0.225], [0.5] * 3]
    used = [([0.484375, 0.455078125, 0.40625], [0.228515625, 0.2236328125, 0.224609375]), ([0.5] * 3, [0.5] * 3)]
    content = {
        "image_processor_type": "PrismaticImageProcessor",
        "processor_class": "PrismaticProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, *size]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": means,
        "stds": stds,
        "tvf_crop_params": [{"output_size": size}] * 2,
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [{"inplace": False, "mean": mean, "std": std} for mean, std in used],
        "tvf_resize_params": [resize] * 2,
        "use_fused_vision_backbone": True,
    }
    return content | changes


def llama_like_tokenizer() -> Tokenizer:
    """BOS 1, end 2, a space in front, words that start with U+2581, and U+2581 alone as an id of its own."""
    characters = "\u2581\n?:.,'-" + "".join(map(chr, range(ord("a"), ord("z") + 1))) + "IWO0123456789"
    vocabulary = ["<unk>", "<s>", "</s>", *characters]
    merges = [("\u2581", letter) for letter in "acdhilmorst"] + [("\u2581t", "h"), ("\u2581th", "e"), ("e", "r")]
    vocabulary += [left + right for left, right in merges]
    vocabulary += [f"<filler {number}>" for number in range(NUM_IDS - len(vocabulary))]  # the last 256 mean actions
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])  # type: ignore
    return tokenizer
