"""ReachRL: improve a vision-language-action policy with online reinforcement learning.

`load_config`, `load_policy`, `train` and `evaluate` are what a script or a notebook needs. They are imported when they
are first used, so that `import reachrl` loads nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from reachrl import allocator, threads

if TYPE_CHECKING:
    from reachrl.api import evaluate, train
    from reachrl.backends.policy_loading import load_policy
    from reachrl.config.loading import load_config

__all__ = ["__version__", "evaluate", "load_config", "load_policy", "train"]
__version__ = "0.1.0"

_LAZY = {
    "evaluate": "reachrl.api",
    "load_config": "reachrl.config.loading",
    "load_policy": "reachrl.backends.policy_loading",
    "train": "reachrl.api",
}

threads.bound_spinning()  # before anything loads an OpenMP runtime
allocator.use_huge_pages()  # before the first tensor


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
