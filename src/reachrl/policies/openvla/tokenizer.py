"""Prompts as token ids: the OpenVLA prompt format, and a small word-level vocabulary built here."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers

from reachrl.config.language_model import NUM_ACTION_BINS, LanguageModelConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.tokenizer_state import forget_calls

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"

# The words of tabletop instructions. Anything else is spelt letter by letter, then byte by byte.
_WORDS = (
    "0 1 2 3 4 5 6 7 8 9 10 45 90 180 360 a across after against all along an and another around aside at away back "
    "backward backwards ball bar bars base basket basketball be before behind below beside between bin black block "
    "blue board book both bottle bottom bowl box bring brown butter button bypass by cabinet can cap carry center "
    "centre chair cheese chocolate clean clear clockwise close coffee compartment container corner counter "
    "counter-clockwise counterclockwise cover cream cube cup cupboard cylinder degrees desk detach dial direction "
    "disassemble dish disk distance do door down drag drawer dressing drop dunk edge end faucet fill first flat flip "
    "floor fold force forward from front frying fruit get gently goal grab grasp green grey gripper hammer hand "
    "handle hang hinge hit hold hole hoop horizontally in inner insert inside into is it its jar joint juice ketchup "
    "key kick kitchen knob lamp large latch left lever lid lift light lock lower machine make marker mat metal "
    "microwave middle milk moka move mug nail near nearest net next nut object obstacle of off on onto open opening "
    "orange other out outer oven over pan peg pen pick pink piece pin place plate plug point position pot pour press "
    "pudding pull purple push put puck rack raise ramekin reach red remove ring rod rotate rotating revolving round "
    "salad sauce screw second shelf side sideways silver slide slider slot slowly small soccer socket soup spoon spot "
    "square stack stand stick stove sweep swing switch table take tall tap target that the them then third this "
    "through tilt to tomato top tower toward towards toy tray turn twist under unlock unplug until up upper upright "
    "using vertically wall water while white wine window wipe wire with without wooden wrench yellow "
)


def build_tokenizer(config: LanguageModelConfig) -> Tokenizer:
    """Build the word-level vocabulary, laid out like Llama's with the action tokens last.

    The rows are: unknown, BOS, "▁", the two pieces of the prompt template, words, letters, bytes; then unused rows;
    then the 256 action tokens up to `vocab_end`. Padding rows come after. A whole word is one token; a word that is
    not listed falls back to letters and bytes, so any text can be encoded.

    Raises:
        ConfigError: the vocabulary is too small or the special ids are not those of this layout.
    """
    before, after = PROMPT.split("{instruction}")
    template = [before.strip().replace(" ", "▁"), after]
    letters = [chr(code) for code in range(0x21, 0x7F)]
    pieces = [("<unk>", -100.0), ("<s>", -100.0), ("▁", -2.0), ("▁" + template[0], -1.0), (template[1], -1.0)]
    pieces += [("▁" + word, -1.0) for word in _WORDS.split()]
    pieces += [(letter, -10.0) for letter in letters]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    first_action = config.vocab_end - NUM_ACTION_BINS
    expected = (1, 2, config.vocab_end)
    if len(pieces) > first_action or (config.bos_token_id, config.empty_token_id, config.pad_token_id) != expected:
        raise ConfigError(
            f"policy.language_model: the built-in tokenizer needs vocab_size >= "
            f"{len(pieces) + NUM_ACTION_BINS + config.pad_to_multiple_of} (got {config.vocab_size}) and bos_token_id, "
            f"empty_token_id, pad_token_id = {expected} (got "
            f"{(config.bos_token_id, config.empty_token_id, config.pad_token_id)}); "
            "set policy.tokenizer to 'folder' to use another one"
        )
    pieces += [(f"<unused{i}>", -100.0) for i in range(first_action - len(pieces))]
    pieces += [(f"<action{i}>", -100.0) for i in range(NUM_ACTION_BINS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


class PromptTokenizer:
    """Turns an instruction into the prompt's token ids; each instruction is tokenised once."""

    def __init__(self, tokenizer: Tokenizer, config: LanguageModelConfig) -> None:
        forget_calls(tokenizer)
        self.tokenizer = tokenizer
        self.config = config
        self._cache: dict[str, tuple[int, ...]] = {}

    @classmethod
    def from_file(cls, path: Path, config: LanguageModelConfig) -> "PromptTokenizer":
        """Read a `tokenizer.json` (the official one, or one written by `save`).

        Raises:
            CheckpointError: it cannot be read, or is another model's.
        """
        try:
            prompts = cls(Tokenizer.from_file(str(path)), config)
            problems = prompts._problems()
        except Exception as error:  # the tokenizers library raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if problems:
            raise CheckpointError(
                f"{path} is the tokenizer of another model: {'; '.join(problems)}. Put the model's own in its place"
            )
        return prompts

    def _problems(self) -> list[str]:
        """What shows that the vocabulary is not the one the model was trained with."""
        config, ids = self.config, self.tokenizer.get_vocab(with_added_tokens=True)
        problems = [
            f"the id of {token!r} is {ids.get(token)}, expected {expected} ({name})"
            for token, expected, name in (
                ("<s>", config.bos_token_id, "bos_token_id"),
                ("▁", config.empty_token_id, "the token that closes a prompt"),
            )
            if ids.get(token) != expected
        ]
        if (last := max(ids.values(), default=0)) >= config.vocab_size:
            problems.append(f"its last id is {last}, expected at most {config.vocab_size - 1}, the model's")
        first_action = config.vocab_end - NUM_ACTION_BINS
        if not problems and (highest := max(self.prompt_ids("pick up the red block"))) >= first_action:
            problems.append(
                f"a prompt has the token {highest}, expected none from the first action's on, {first_action}"
            )
        return problems

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        path.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")

    def prompt_ids(self, instruction: str) -> tuple[int, ...]:
        """BOS, the prompt's text, and the closing lone space if it is not there already."""
        if instruction not in self._cache:
            text = PROMPT.format(instruction=instruction.lower())
            ids = [self.config.bos_token_id, *self.tokenizer.encode(text, add_special_tokens=False).ids]
            if ids[-1] != self.config.empty_token_id:
                ids.append(self.config.empty_token_id)
            self._cache[instruction] = tuple(ids)
        return self._cache[instruction]
