"""Damage to a command line: settings of a recipe that make no sense, or sense that nobody meant."""

import json
from pathlib import Path
from random import Random

from benchmarks.mutations.damage import TOKEN, Damage, Kinds

OVERRIDES = "overrides.json"  # the arguments, as a list
SETTINGS = Kinds()
KEYS = (
    "training.num_epochs", "training.max_steps", "training.learning_rate", "training.seed", "training.weight_decay",
    "training.checkpoint_every", "training.soft_target_sigma_bins", "training.gradient_accumulate_every",
    "training.max_nonfinite_steps", "training.parallel", "dataloader.batch_size", "dataloader.num_workers",
    "data.val_ratio", "data.views", "data.normalization", "data.accept", "data.pass_through",
    "data.datasets", "data.stream_window", "data.image_width", "model.model_name", "model.torch_dtype",
    "model.lora_rank", "model.use_proprio", "model.global_token", "model.architecture.image_size",
    "model.architecture.dino", "model.architecture.language.num_attention_heads", "relabel.num_rounds",
)  # fmt: skip
VALUES = {
    "not_finite": ["nan", ".nan", "inf", "-.inf", "1e999"],
    "huge": [str(10**30), str(2**63), str(2**64), "1e300", str(2**31 + 1)],
    "negative": ["-1", "-0.5", str(-(10**20))],
    "zero": ["0", "0.0", "-0"],
    "to_text": ["words", "'3'", "true story", "caf\u00e9"],
    "to_nothing": ["", "null", "[]", "{}", "''", "~", "[null]", "[[]]"],
    "to_list": ["[1, 2]", "[a, a]", "[side, side]"],
    "to_dictionary": ["{a: 1}", "{: }", "{side: {side: 1}}"],
    "to_boolean": ["true", "no"],
    "nested": ["[" * 3000 + "]" * 3000, "{a: " * 500 + "1" + "}" * 500],
    "long_text": ["x" * 100_000],
    "interpolation": ["${oc.env:" + TOKEN + "}", "${oc.env:NO_SUCH_VARIABLE}", "${training.seed}", "${nothing.there}", "${", "${training}"],
    "control_characters": ["\x1b[2J\x1b]0;x\x07", "a\r\nb"],
    "broken_yaml": ["[1, 2", "{a: 1", "'", "!!python/object/apply:os.system [touch x]", "&a [*a]", "a: b: c", "@", "%"],
    "path_out": ["../outside/secret.txt", "/dev/zero", "../../x", "~/x"],
    "control_mode": ["a/b", "-", "=", "a=b"],
}  # fmt: skip


def register(name: str, values: list[str]) -> None:
    def apply(path: Path, random: Random) -> str:
        argument = f"{random.choice(KEYS)}={random.choice(values)}"
        path.write_text(json.dumps([*json.loads(path.read_text()), argument]))
        return repr(argument[:100])

    SETTINGS[name] = Damage(name, apply)


def register_key(name: str, arguments: list[str]) -> None:
    def apply(path: Path, random: Random) -> str:
        argument = random.choice(arguments)
        path.write_text(json.dumps([*json.loads(path.read_text()), argument]))
        return repr(argument[:100])

    SETTINGS[name] = Damage(name, apply)


for each, some in VALUES.items():
    register(each, some)
register_key("unknown_key", ["training.nothing=1", "training.learning_rat=1", "nothing=1", "training.seed.x=1", "data.views.7=a", "data.views.x=a"])  # fmt: skip
register_key("no_setting", ["training", "=3", "training.=3", ".=3", "..seed=3", "training..seed=3", "a b=3", "training.seed", "training=3", "model=null", "model.architecture=null", "data=[]", "training.seed==3", " ", "[0]=1", "training[seed]=1"])  # fmt: skip
