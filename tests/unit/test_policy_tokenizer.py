"""The prompt format and the built-in vocabulary."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers

from reachrl.config.language_model import LanguageModelConfig
from reachrl.config.metaworld_tasks import INSTRUCTIONS
from reachrl.errors import ConfigError
from reachrl.policies.openvla.tokenizer import PromptTokenizer, build_tokenizer

CONFIG = LanguageModelConfig()


@pytest.fixture(scope="module")
def prompts() -> PromptTokenizer:
    return PromptTokenizer(build_tokenizer(CONFIG), CONFIG)


def text_of(prompts: PromptTokenizer, instruction: str) -> str:
    ids = prompts.prompt_ids(instruction)
    assert ids[0] == CONFIG.bos_token_id and ids[-1] == CONFIG.empty_token_id
    return prompts.tokenizer.decode(list(ids[1:-1]), skip_special_tokens=False)


@pytest.mark.parametrize(
    "instruction",
    [
        "Push the puck to the goal",
        "defenestrate 3.5 zorks!",
        "öffne die Tür",
        "按下 the button 🤖",
        "",
        "a  b\tc",
        "{x}",
    ],
)
def test_any_text_survives_letter_for_letter(prompts: PromptTokenizer, instruction: str) -> None:
    expected = "In: What action should the robot take to " + instruction.lower() + "?\nOut:"
    assert text_of(prompts, instruction) == expected


def test_words_of_the_embedded_tasks_are_single_tokens(prompts: PromptTokenizer) -> None:
    for instruction in INSTRUCTIONS.values():
        # BOS, two pieces of the template, the words, the closing lone space
        assert len(prompts.prompt_ids(instruction)) == len(instruction.split()) + 4, instruction


def test_the_closing_token_is_not_doubled(prompts: PromptTokenizer) -> None:
    ids = prompts.prompt_ids("reach the goal")
    assert ids[-2] != CONFIG.empty_token_id and ids.count(CONFIG.bos_token_id) == 1


def test_action_rows_and_padding_lie_behind_the_words(prompts: PromptTokenizer) -> None:
    tokenizer = prompts.tokenizer
    assert tokenizer.get_vocab_size() == CONFIG.vocab_end == CONFIG.pad_token_id
    assert tokenizer.token_to_id("<action0>") == CONFIG.vocab_end - 256
    assert tokenizer.token_to_id("<action255>") == CONFIG.vocab_end - 1
    used = {token for text in INSTRUCTIONS.values() for token in prompts.prompt_ids(text)}
    assert max(used) < CONFIG.vocab_end - 256


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        build_tokenizer(LanguageModelConfig(vocab_size=576, pad_token_id=512))
    with pytest.raises(ConfigError, match="empty_token_id"):
        build_tokenizer(LanguageModelConfig(empty_token_id=5))


def test_a_saved_tokenizer_reads_back(prompts: PromptTokenizer, tmp_path) -> None:
    prompts.save(tmp_path / "tokenizer.json")
    again = PromptTokenizer.from_file(tmp_path / "tokenizer.json", CONFIG)
    for instruction in [*INSTRUCTIONS.values(), "flurb über"]:
        assert again.prompt_ids(instruction) == prompts.prompt_ids(instruction)


def test_state_of_a_call_that_the_file_keeps_never_acts(tmp_path) -> None:
    """Truncation and padding as `tokenizers` saves them, and BPE's dropout: ids as of the vocabulary alone."""
    path, text = tmp_path / "tokenizer.json", "push the puck to the goal " * 4
    for tokenizer in (build_tokenizer(CONFIG), small_bpe(dropout=None)):
        expected = PromptTokenizer(Tokenizer.from_str(tokenizer.to_str()), CONFIG).prompt_ids(text)
        tokenizer.enable_truncation(6)
        tokenizer.enable_padding(length=90, pad_id=CONFIG.pad_token_id, pad_token="<pad>")
        tokenizer.save(str(path))
        assert json.loads(path.read_text())["truncation"]["max_length"] == 6
        assert len(Tokenizer.from_file(str(path)).encode(text).ids) == 90
        assert PromptTokenizer.from_file(path, CONFIG).prompt_ids(text) == expected
        assert PromptTokenizer(tokenizer, CONFIG).prompt_ids(text) == expected
    sampling = build_tokenizer(CONFIG)
    expected_words = PromptTokenizer(build_tokenizer(CONFIG), CONFIG).prompt_ids(text)
    sampling.model.alpha = 0.01  # of Unigram: nearly any pieces
    assert sampling.encode(text).ids != build_tokenizer(CONFIG).encode(text).ids
    assert PromptTokenizer(sampling, CONFIG).prompt_ids(text) == expected_words
    small_bpe(dropout=0.5).save(str(path))
    assert PromptTokenizer.from_file(path, CONFIG).prompt_ids(text) == expected


def small_bpe(dropout: float | None) -> Tokenizer:
    """Letters, and `to` and `the` as pieces of their own."""
    letters = ["<unk>", "<s>", "▁", *sorted({*"In:WhatactionshouldtherobotaketopushthepucktothegoalOut?", "\n"})]
    pieces = [*letters, "to", "th", "the"]
    merges = [("t", "o"), ("t", "h"), ("th", "e")]
    made = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, dropout=dropout, unk_token="<unk>")
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    return made
