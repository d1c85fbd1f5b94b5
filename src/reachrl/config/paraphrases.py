"""Instructions in other words: frames and synonyms for any English instruction, and rewordings where there are some.

Levels 1, 2 and 3 are evaluated; 4, 5 and 6 say the same in words of their own, for training.
"""

import re
from collections.abc import Sequence

from reachrl.config.perturbations import Variant
from reachrl.types import Start

_FRAMES = {
    1: ("please {}", "can you {}", "i want you to {}", "{} for me"),
    4: ("now {}", "go ahead and {}", "your next job is to {}", "try to {}"),
}
# The first word is for evaluation, the second one for training.
_SYNONYMS = {
    "ball": ("sphere", "orb"),
    "basket": ("hamper", "crate"),
    "block": ("brick", "chunk"),
    "bottle": ("flask", "carafe"),
    "bowl": ("dish", "basin"),
    "box": ("case", "crate"),
    "bring": ("carry", "transfer"),
    "button": ("switch", "knob"),
    "cabinet": ("cupboard", "closet"),
    "close": ("shut", "close up"),
    "cube": ("dice", "block"),
    "dial": ("knob", "rotary switch"),
    "door": ("hatch", "flap"),
    "drawer": ("compartment", "tray"),
    "faucet": ("tap", "water tap"),
    "goal": ("target", "destination"),
    "hammer": ("drive", "pound"),
    "handle": ("lever", "grip"),
    "hole": ("opening", "gap"),
    "hoop": ("ring", "net"),
    "insert": ("plug", "fit"),
    "kick": ("shoot", "hit"),
    "lever": ("handle", "arm"),
    "lid": ("cover", "cap"),
    "lift": ("raise", "hoist"),
    "lock": ("bolt", "latch"),
    "machine": ("maker", "appliance"),
    "microwave": ("microwave oven", "oven"),
    "move": ("transfer", "bring"),
    "mug": ("cup", "beaker"),
    "nail": ("pin", "spike"),
    "open": ("open up", "make open"),
    "peg": ("pin", "post"),
    "pick up": ("grab", "take"),
    "place": ("put", "set"),
    "plate": ("dish", "disc"),
    "pot": ("jug", "can"),
    "press": ("push", "hit"),
    "puck": ("disk", "disc"),
    "pull": ("drag", "tug"),
    "push": ("shove", "nudge"),
    "put": ("place", "set"),
    "reach": ("go to", "get to"),
    "reach around": ("go around", "get past"),
    "reach over": ("go over", "get across"),
    "shelf": ("rack", "ledge"),
    "slide": ("shift", "glide"),
    "stick": ("rod", "bar"),
    "stove": ("cooker", "hob"),
    "sweep": ("brush", "wipe"),
    "table": ("desk", "bench"),
    "turn": ("twist", "rotate"),
    "turn on": ("switch on", "start"),
    "unlock": ("unbolt", "unlatch"),
    "wall": ("barrier", "partition"),
    "window": ("pane", "casement"),
}
_WORDS = re.compile(r"\b(" + "|".join(sorted(map(re.escape, _SYNONYMS), key=len, reverse=True)) + r")\b")


def paraphrase(sentence: str, level: int, choice: int, rewordings: Sequence[str] = ()) -> str:
    """The instruction in other words; never the instruction itself.

    Args:
        sentence: the instruction.
        level: 1 and 4 put a frame around it; 2 and 5 replace its words by synonyms; 3 and 6 take the first and the
            second of `rewordings`, or do both where there are none.
        choice: which frame, where one is needed.
        rewordings: two other sentences for the same task.

    Raises:
        ValueError: there is no such level.
    """
    if level not in (1, 2, 3, 4, 5, 6):
        raise ValueError(f"language={level}: the rewordings are 1 to 6")
    column, kind = divmod(level - 1, 3)
    frames = _FRAMES[1 + 3 * column]
    frame = frames[choice % len(frames)]
    if kind == 0:
        return frame.format(sentence)
    if kind == 2 and len(rewordings) > column:
        return rewordings[column]
    said = _WORDS.sub(lambda found: _SYNONYMS[found[0]][column], sentence)
    return frame.format(said) if kind == 2 or said == sentence else said


def spoken(sentence: str, start: Start, rewordings: Sequence[str] = ()) -> str:
    """The instruction of an episode: `sentence`, or what its variant makes of it."""
    variant = Variant.of(start)
    if variant is None or variant.axis != "language":
        return sentence
    choice = int(variant.generator(start).integers(1000))
    return paraphrase(sentence, int(variant.value), choice, rewordings)
