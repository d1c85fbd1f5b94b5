"""The prompt format and the built-in vocabulary."""

import pytest

from reachrl.config.metaworld_tasks import INSTRUCTIONS
from reachrl.config.policy import LanguageModelConfig
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
