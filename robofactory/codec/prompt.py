"""The instruction as token ids.

Two tokenizers: the one of the published model (Llama-2, from the directory of its weights), and a tiny one that is
shipped beside this file. In both the last 256 ids of the vocabulary stand for actions.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from robofactory import documents, files
from robofactory.codec.sentencepiece import read_sentencepiece
from robofactory.errors import UserError
from robofactory.published import ADVICE, CONFIG, PublishedPolicy, read_config

TEMPLATE = "In: What action should the robot take to {instruction}?\nOut:"  # Source: OpenVLA, PurePromptBuilder
TINY_TOKENIZER = Path(__file__).with_name("tiny_tokenizer.json")
TOKENIZER_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
LONE_SPACE = "\u2581"  # 29871: the official training text is "Out: " and then the actions, so it stands between them
MAX_CACHED_PROMPTS = 1024

# Words that the tiny tokenizer has one id for: of the template, and of RoboFactory's eleven tasks (both wordings).
INSTRUCTIONS = (
    "lift the barrier together with the other robot",
    "stack the cube on top of the other cube",
    "stack the cubes together with the other robots",
    "align the camera with the target object",
    "pass the object along the robot chain",
    "deliver the object",
    "take a photo of the target object",
    "pass the shoe to the other robot",
    "place the food on the plate",
    "strike the cube to the target location",
    "pick up the meat from the grill",
)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Instruction -> `[BOS] prompt [suffix]`. Build it with `tiny` or `from_weights`.

    tokenizer_name: "tiny" (shipped with the package) or "tokenizer.json" (kept beside codec.json).
    tokenizer_text: the tokenizer's file.
    vocab_size: of text and actions together; the action ids are its end. (The published model's embedding has more
        rows, for padding.)
    suffix_ids: stand between the prompt and the actions; appended unless the prompt ends with them.
    """

    tokenizer_name: str
    tokenizer_text: str
    vocab_size: int
    bos_id: int
    end_id: int
    pad_id: int
    suffix_ids: tuple[int, ...]
    template: str = TEMPLATE
    _cache: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def tiny(cls) -> "Prompt":
        """The tokenizer that is shipped: one id a byte, one for each word of the known instructions."""
        text = TINY_TOKENIZER.read_text(encoding="utf-8")
        ids = json.loads(text)["model"]["vocab"]
        return cls("tiny", text, len(ids), ids["<s>"], ids["</s>"], ids["<pad>"], suffix_ids=())

    @classmethod
    def from_weights(cls, directory: Path) -> "Prompt":
        """The tokenizer of published OpenVLA weights.

        Raises:
            FileNotFoundError: no `config.json`, or neither `tokenizer.json` nor `tokenizer.model`, there.
            UserError: they are not of an OpenVLA on Llama.
        """
        config = read_published_config(directory)
        path = directory / TOKENIZER_FILE
        if path.exists() or path.is_symlink():
            text = files.read_text(path, documents.MAX_BYTES, ADVICE)
        elif (path := directory / SENTENCEPIECE_FILE).exists():
            text = read_sentencepiece(path).to_str()
        else:
            raise FileNotFoundError(f"neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE} in {directory}; copy one there from the published model")  # fmt: skip
        ids = read_tokenizer(text, str(path)).get_vocab()
        for token in ("<s>", "</s>", LONE_SPACE):
            if token not in ids:
                raise UserError(f"{path} has no token {token!r}; it is not Llama's tokenizer")
        if (highest := max(ids.values())) >= (rows := config.text_config.vocab_size):
            raise UserError(f"{path} has ids up to {highest}, and config.json beside it says text_config.vocab_size {rows}; they are not of one model")  # fmt: skip
        suffix_ids = (ids[LONE_SPACE],)
        return cls(TOKENIZER_FILE, text, config.num_ids, ids["<s>"], ids["</s>"], config.pad_token_id, suffix_ids)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.tokenizer_text, self.tokenizer_name)

    @cached_property
    def tokenizer_sha256(self) -> str:
        return hashlib.sha256(self.tokenizer_text.encode("utf-8")).hexdigest()

    @cached_property
    def highest_id(self) -> int:
        """Of everything that a prompt can have; a model needs a row for each."""
        return max(self.bos_id, self.end_id, self.pad_id, *self.suffix_ids, *self.tokenizer.get_vocab().values())

    def encode(self, instruction: str) -> Int64[Tensor, " t"]:
        """BOS, the prompt and the suffix, if any. Kept for the next time the same instruction comes.

        Raises:
            UserError: the instruction is empty or no valid text.
        """
        if instruction not in self._cache:
            if not instruction.strip():
                raise UserError("the instruction is empty; say in plain words what to do, e.g. 'lift the barrier'")
            text = self.template.replace("{instruction}", instruction.lower())
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise UserError(f"the instruction {instruction!a} is no valid Unicode text") from None
            ids = (self.bos_id, *self.tokenizer.encode(text, add_special_tokens=False).ids)
            if ids[len(ids) - len(self.suffix_ids) :] != self.suffix_ids:
                ids += self.suffix_ids
            if len(self._cache) >= MAX_CACHED_PROMPTS:
                self._cache.clear()
            self._cache[instruction] = ids
        return torch.tensor(self._cache[instruction], dtype=torch.int64)

    def to_json(self) -> dict[str, Any]:
        return {
            "template": self.template,
            "tokenizer": self.tokenizer_name,
            "tokenizer_sha256": self.tokenizer_sha256,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "end_id": self.end_id,
            "pad_id": self.pad_id,
            "suffix_ids": list(self.suffix_ids),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any], directory: Path) -> "Prompt":
        """The inverse of `to_json`; a tokenizer that is not the shipped one is read from `directory`.

        Args:
            content: a `StoredPrompt`, checked.

        Raises:
            FileNotFoundError: its file is not there.
            UserError: the tokenizer is another one than the codec was made with.
        """
        is_tiny = content["tokenizer"] == "tiny"
        path = TINY_TOKENIZER if is_tiny else directory / TOKENIZER_FILE
        if not path.exists():
            raise FileNotFoundError(f"no {path.name} in {path.parent}; copy it from where the checkpoint was made")
        numbers = {key: content[key] for key in ("template", "vocab_size", "bos_id", "end_id", "pad_id")}
        text, suffix_ids = files.read_text(path, documents.MAX_BYTES), tuple(content["suffix_ids"])
        prompt = cls(content["tokenizer"], text, suffix_ids=suffix_ids, **numbers)
        if prompt.tokenizer_sha256 != content["tokenizer_sha256"]:
            fix = "install the version of robofactory it was made with" if is_tiny else "restore the file"
            raise UserError(f"{path} is not the tokenizer that the codec in {directory} was made with; {fix}")
        return prompt


def read_published_config(directory: Path) -> PublishedPolicy:
    """The `config.json` of published OpenVLA weights.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is not of an OpenVLA whose images and actions this package can encode.
    """
    path = directory / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"no {path}; model.model_name must be a directory of OpenVLA weights")
    return documents.check(read_config(directory), PublishedPolicy, str(path))


def read_tokenizer(text: str, source: str) -> Tokenizer:
    """A tokenizer from the text of its file, to encode each text whole and always alike.

    Raises:
        UserError: it is none.
    """
    if '"Precompiled"' in text:  # a normaliser; where its table is damaged, the library aborts
        raise UserError(f"{source} is not Llama's tokenizer; {ADVICE}")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more exact
        raise UserError(f"{source} is no tokenizer ({' '.join(str(error).split())[:120]}); {ADVICE}") from None
    if getattr(tokenizer.model, "dropout", None):
        raise UserError(f"{source}: model.dropout is {tokenizer.model.dropout}, so a text would not always get the same ids; set it to null")  # fmt: skip
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def build_tiny_tokenizer() -> str:
    """The text of `tiny_tokenizer.json`: byte-level BPE without merges but with whole words.

    Ids: `<pad>`, `<s>`, `</s>`; 256 bytes; the words; unused ids up to a multiple of 64; 256 actions. A word of text is
    looked up whole, otherwise it is spelled in bytes, so any text can be written. Special ids and action ids are no
    tokens of text: whoever writes "<s>" in an instruction gets three characters.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    text = " ".join((TEMPLATE.replace("{instruction}", INSTRUCTIONS[0]), *INSTRUCTIONS))
    words = sorted({word for word, _ in split.pre_tokenize_str(text) if len(word) > 1})
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    tokens += [f"<unused {number}>" for number in range(-len(tokens) % 64)]
    tokens += [f"<action {number}>" for number in reversed(range(256))]  # the first bin has the highest id
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer.to_str(pretty=True) + "\n"
