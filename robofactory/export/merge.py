"""Write a fine-tuned policy as published weights are: adapters merged, statistics in config.json.

Policy and merged model answer the same frames of the dataset; how far they differ is printed and saved as merge.json.
"""

import argparse
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robofactory import arguments
from robofactory.config import choose_device, home
from robofactory.errors import UserError, run_command
from robofactory.paths import MANIFEST, find_weights

if TYPE_CHECKING:
    import numpy as np
    import torch

    from robofactory.codec.codec import Codec
    from robofactory.model.openvla import OpenVLA
    from robofactory.shapes import Batch


def parse_arguments() -> argparse.Namespace:
    parser = arguments.Parser(
        prog="robofactory merge",
        description=__doc__,
        epilog="""\
example:
  robofactory merge robofactory/checkpoints/openvla/LiftBarrier-rf_Agent0_150/latest my/openvla-7b-lift-barrier

The official code un-normalises with unnorm_key=LiftBarrier-rf_Agent0_150. Crop its pictures as codec.json says. It knows
one view and 256 tokens: for use there, train with data.views=[side] model.global_token=false. model.model_name takes
the directory to fine-tune it further.""",
    )
    parser.add_argument("checkpoint", type=arguments.path, help="directory of a checkpoint of a fine-tuned model")
    parser.add_argument("output", type=arguments.path, help="directory to make")
    parser.add_argument("--data", type=arguments.path, help="its dataset (default: the one with the run's name)")
    parser.add_argument("--frames", type=arguments.whole(1, 100_000), default=8, help="to compare both on (default: 8)")
    parser.add_argument("--device", type=arguments.device, help="cpu, cuda (default: cuda if there is one)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    checkpoint = args.checkpoint.resolve()  # `latest` is a link
    data = args.data or home() / "data" / checkpoint.parent.name
    require_paths(checkpoint, args.output, data)
    print(merge(checkpoint, args.output, data, args.frames, choose_device(args.device)))


def require_paths(checkpoint: Path, output: Path, data: Path) -> None:
    """Raises UserError for what can be told before anything heavy is loaded."""
    if output.exists() or output.is_symlink():
        from robofactory import files

        with files.owned(output):  # what another process makes is said to be; a lock that a killed one left is freed
            pass
        raise UserError(f"{output} exists; choose another directory, or move it away")
    parents = [each for each in output.absolute().parents if each.exists()]
    if not parents[0].is_dir() or not os.access(parents[0], os.W_OK):
        raise UserError(f"{output} cannot be made: {parents[0]} is no directory to write in; choose another one")
    if not (checkpoint / MANIFEST).is_file():
        raise UserError(f"{checkpoint} is no complete checkpoint: it has no {MANIFEST}; give the directory of one, such as a run's latest")  # fmt: skip
    if not data.is_dir():
        raise UserError(f"{data} is not there; give the dataset that the policy was trained on with --data")


def merge(checkpoint: Path, output: Path, data: Path, num_frames: int, device: str) -> str:
    """Make the directory `output`, whole or not at all; what to say about it.

    Raises:
        UserError: no checkpoint of a fine-tuned model, or not its dataset or its base weights; the directory exists, or
            another process is making it.
    """
    from robofactory import files

    require_paths(checkpoint, output, data)
    with files.owned(output):
        if output.exists():  # another process has just made it
            raise UserError(f"{output} exists; choose another directory, or move it away")
        return _merge(checkpoint, output, data, num_frames, device)


def _merge(checkpoint: Path, output: Path, data: Path, num_frames: int, device: str) -> str:
    import torch
    from safetensors import SafetensorError

    from robofactory import documents
    from robofactory.checkpoint import build_model, load_recipe_of, load_trained, verify
    from robofactory.codec.codec import Codec
    from robofactory.data.dataset import load_splits
    from robofactory.model.lora import merge_adapters
    from robofactory.model.weights import save_openvla
    from robofactory.published import CONFIG, PREPROCESSOR, read_config, written_preprocessor

    # ---- the policy, with the base in the dtype that it is merged in; all that can be refused first
    recipe = load_recipe_of(checkpoint)
    if recipe.model.architecture is not None:
        raise UserError(f"{checkpoint} was trained from scratch at its own sizes; only fine-tuned weights have an official form")  # fmt: skip
    verify(checkpoint)
    codec, base = Codec.load(checkpoint), find_weights(recipe.model.model_name)
    published, small_files = read_config(base), files_to_copy(base)
    splits = load_splits(data, recipe)
    splits = dataclasses.replace(splits, codec=splits.codec.normalized_as(codec))
    if splits.codec.fingerprint != codec.fingerprint:
        raise UserError(f"{data} is not the dataset that {checkpoint} was trained on; give it with --data")
    m = dataclasses.replace(recipe.model, quantize=None)
    model = build_model(dataclasses.replace(recipe, model=m), codec, device)
    load_trained(checkpoint, model)

    # ---- before and after
    batch, _ = splits.examples(num_frames, torch.device(device))
    before = answers(model.eval(), codec, batch)
    merge_adapters(model)
    model.to(getattr(torch, m.torch_dtype))
    report = compare(codec, before, answers(model, codec, batch))

    # ---- the directory
    statistics = {name: dataset.official() for name, dataset in codec.datasets.items()}
    norm_stats = (published.get("norm_stats") or {}) | statistics
    ours = {"global_token": m.global_token, "views": list(codec.views), "use_proprio": codec.use_proprio}
    config = published | ours | {"norm_stats": norm_stats, "torch_dtype": m.torch_dtype}
    has_pictures = PREPROCESSOR in (path.name for path in small_files)
    given = documents.read_json(base / PREPROCESSOR, dict) if has_pictures else {}
    pictures = written_preprocessor(given, codec.image_size, codec.images.means, codec.images.stds)
    contents = {CONFIG: config, PREPROCESSOR: pictures, "dataset_statistics.json": statistics, "merge.json": report}
    temporary = output.with_name(f".{output.name}.merge.tmp")  # what a merge that was killed had written goes
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for path in small_files:
            shutil.copy(path, temporary)
        codec.save(temporary)
        for file, content in contents.items():
            (temporary / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
        save_openvla(model, temporary)
        flush(temporary)
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write {output} ({error}); make room, or choose another directory") from None
    return describe(output, report, ours)


def answers(model: "OpenVLA", codec: "Codec", batch: "Batch") -> "tuple[torch.Tensor, np.ndarray]":
    """Logits at the dataset's own action tokens, in float32, and the actions the model generates by itself."""
    import torch

    from robofactory.model.precision import autocast

    with torch.no_grad(), autocast(model):
        logits = model.action_logits(batch).float()
        tokens = model.generate(dataclasses.replace(batch, action_tokens=None), codec.action_dim)
    assert batch.dataset is not None
    return logits, codec.decode_each(tokens.cpu().numpy(), batch.dataset.tolist())


def compare(
    codec: "Codec",
    before: "tuple[torch.Tensor, np.ndarray]",
    after: "tuple[torch.Tensor, np.ndarray]",
) -> dict[str, float | int]:
    """The largest differences; those of actions over the joints, in rad."""
    joints = next(iter(codec.datasets.values())).action.joints
    actions = abs(before[1] - after[1])
    return {
        "frames": len(actions),
        "largest_logit": float(before[0].abs().max()),
        "largest_logit_difference": float((before[0] - after[0]).abs().max()),
        "largest_action_difference_rad": float(actions[:, joints].max()),
        "different_action_numbers": int((actions > 0).sum()),
        "action_numbers": int(actions.size),
    }


def files_to_copy(base: Path) -> list[Path]:
    """Tokenizer, preprocessor and remote code of the base, as they are; what is ours is written over them.

    Raises:
        UserError: one of them lies elsewhere, or is no file.
    """
    from robofactory import files

    names = [path.name for path in base.iterdir() if path.suffix in (".json", ".model", ".py")]
    return [files.inside(base, name, base) for name in sorted(names) if not name.endswith(".index.json")]


def flush(directory: Path) -> None:
    """Files and directory on disk, so that a rename never shows a half-written one."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def describe(output: Path, report: dict[str, float | int], ours: dict[str, Any]) -> str:
    lines = [
        f"on {report['frames']} frames, adapters against merged weights:",
        f"  largest difference of a logit  {report['largest_logit_difference']:.4g} (the largest logit is {report['largest_logit']:.4g})",
        f"  largest difference of a joint  {report['largest_action_difference_rad']:.4g} rad; "
        f"{report['different_action_numbers']} of {report['action_numbers']} numbers fell into another bin",
        f"merged: {output}",
    ]
    beyond = {
        "the global token of each view (model.global_token)": ours["global_token"],
        f"{len(ours['views'])} views": len(ours["views"]) > 1,
        "proprio": ours["use_proprio"],
    }
    if any(beyond.values()):
        features = ", ".join(feature for feature, used in beyond.items() if used)
        lines.append(f"The official code loads it but has no {features}: fine-tune or evaluate it further here.")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
