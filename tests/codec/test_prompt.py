import json
import pickle
from pathlib import Path

import pytest
from codec_samples import llama_lookalike

from robofactory.codec.prompt import INSTRUCTIONS, TINY_TOKENIZER, Prompt, build_tiny_tokenizer
from robofactory.errors import UserError
from tests.official import PARITY

TEXTS = ["lift the barrier", "Ünïcödé  木 \U0001f916\n\t x", "<s> </s> <pad> <action 3> <unused 1>", "don't; 12,5!"]


def test_the_shipped_tokenizer_is_what_the_builder_makes():
    assert TINY_TOKENIZER.read_text(encoding="utf-8") == build_tiny_tokenizer()


def test_the_lift_barrier_prompt_is_short():
    ids = Prompt.tiny().encode("lift the barrier").tolist()
    assert len(ids) < 20 and ids[0] == Prompt.tiny().bos_id


def test_every_known_instruction_is_whole_words():
    for instruction in INSTRUCTIONS:
        assert len(Prompt.tiny().encode(instruction)) == 14 + len(instruction.split()), instruction


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips_and_never_makes_a_special_or_action_id(text: str):
    prompt = Prompt.tiny()
    ids = prompt.tokenizer.encode(text, add_special_tokens=False).ids
    assert prompt.tokenizer.decode(ids) == text
    assert all(3 <= token_id < prompt.vocab_size - 256 for token_id in ids), ids


def test_the_last_256_ids_are_the_actions_and_the_first_bin_is_the_highest():
    vocabulary = json.loads(Prompt.tiny().tokenizer_text)["model"]["vocab"]
    assert len(vocabulary) % 64 == 0
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert [vocabulary[f"<action {bin_}>"] for bin_ in range(256)] == list(reversed(range(320, 576)))


def test_the_instruction_is_lowercased_and_the_prompt_is_kept():
    prompt = Prompt.tiny()
    assert prompt.encode("Lift THE Barrier").tolist() == prompt.encode("lift the barrier").tolist()
    first = prompt.encode("lift the barrier")
    first[0] = 7  # a caller's change must not reach the next one
    assert prompt.encode("lift the barrier")[0] == prompt.bos_id


def test_braces_in_an_instruction_are_plain_text():
    prompt = Prompt.tiny()
    assert "{instruction} {0}" in prompt.tokenizer.decode(prompt.encode("{instruction} {0}").tolist()[1:])


@pytest.mark.parametrize("instruction", ["", "  \n", "bad \ud800 text"])
def test_an_instruction_that_says_nothing_is_refused(instruction: str):
    with pytest.raises(UserError, match="instruction"):
        Prompt.tiny().encode(instruction)


def test_a_prompt_survives_the_way_to_a_data_worker():
    prompt = Prompt.tiny()
    expected = prompt.encode("lift the barrier").tolist()
    assert pickle.loads(pickle.dumps(prompt)).encode("lift the barrier").tolist() == expected


def test_llama_ids_equal_the_official_prompt(tmp_path: Path):
    from safetensors.numpy import load_file

    prompt = Prompt.from_weights(llama_lookalike(tmp_path))
    official = load_file(PARITY / "expected.safetensors")["input_ids"][0].tolist()
    assert prompt.encode("lift the barrier").tolist() == official
    assert (prompt.vocab_size, prompt.end_id, prompt.pad_id) == (32000, 2, 32000)


def test_weights_without_a_tokenizer_or_of_another_kind_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no .*config\.json"):
        Prompt.from_weights(tmp_path)
    llama_lookalike(tmp_path)
    (tmp_path / "tokenizer.json").write_text(build_tiny_tokenizer())
    with pytest.raises(UserError, match="not Llama's tokenizer"):
        Prompt.from_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: key 'use_fused_vision_backbone' is missing"):
        Prompt.from_weights(tmp_path)
