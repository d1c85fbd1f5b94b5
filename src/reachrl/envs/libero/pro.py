"""One task of LIBERO-PRO in a LIBERO simulation: its definition, its start states, and things that LIBERO lacks."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from reachrl.config.libero_pro import INSTALL_PRO, definition_file, states_file
from reachrl.envs.libero.assets import INSTALL_ASSETS
from reachrl.envs.libero.installation import TaskFiles, import_upstream
from reachrl.errors import ConfigError

# New things, and what of LIBERO's each is like in all but its looks: how it is turned, opened and switched on.
_LIKE = {
    "bigger_akita_black_bowl": "akita_black_bowl",
    "bigger_alphabet_soup": "alphabet_soup",
    "black_bowl": "akita_black_bowl",
    "blue_ketchup": "alphabet_soup",
    "brown_rack": "wine_rack",
    "green_bbq_sauce": "bbq_sauce",
    "green_butter": "butter",
    "green_chocolate_pudding": "chocolate_pudding",
    "red_basket": "basket",
    "red_cream_cheese": "cream_cheese",
    "red_salad_dressing": "salad_dressing",
    "white_bottle": "wine_bottle",
    "yellow_cabinet": "wooden_cabinet",
    "yellow_milk": "alphabet_soup",
    "yellow_moka_pot": "moka_pot",
    "yellow_plate": "plate",
    "yellow_stove": "flat_stove",
    "yellow_tomato_sauce": "tomato_sauce",
}


def pro_files(suite: str, kind: str, task: str, assets: Path) -> TaskFiles:
    """Definition and start states of a perturbed task; LIBERO then knows the things in it.

    Args:
        suite: of the base task.
        kind: axis.
        task: name of the base task.
        assets: folder with meshes and textures.

    Raises:
        MissingExtra: the package is not installed.
        ConfigError: a file is missing or damaged, or the assets lack the new things.
    """
    definition = definition_file(suite, kind, task)
    if not definition.is_file():
        raise ConfigError(f"{definition} is missing; run  {INSTALL_PRO}")
    if kind == "object":
        _teach(assets)
    return TaskFiles(name=f"{task}_{kind}", definition=definition, starts=_states(states_file(suite, kind, task)))


def _states(path: Path) -> np.ndarray:
    """Time, joint positions and velocities, f64[50 K]; nothing in the file is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            states = archive["states"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read as stored start states ({error}); run  {INSTALL_PRO}") from error
    if states.ndim != 2 or states.dtype != np.float64 or not np.isfinite(states).all():
        raise ConfigError(f"{path} holds {states.dtype}{list(states.shape)}, expected start states as float64[50 K]")
    return states


def _teach(assets: Path) -> None:
    """Register the new things with upstream, which looks up what a definition names."""
    lacking = sorted(_LIKE.keys() - {path.stem for path in assets.rglob("*.xml")})
    if lacking:
        raise ConfigError(
            f"LIBERO-PRO's axis object needs {len(lacking)} things that {assets} lacks ({lacking[0]}); "
            f"run  {INSTALL_ASSETS}  and leave env.assets unset"
        )
    import_upstream(assets)
    from libero.libero.envs import base_object  # pyright: ignore[reportMissingImports]

    for name, like in _LIKE.items():
        if name not in base_object.OBJECTS_DICT:
            made = _variety(base_object.OBJECTS_DICT[like], name)
            base_object.OBJECTS_DICT[name] = made
            if like in base_object.VISUAL_CHANGE_OBJECTS_DICT:
                base_object.VISUAL_CHANGE_OBJECTS_DICT[name] = made


def _variety(like: Any, name: str) -> type:
    """A class of upstream's with the mesh of another thing; upstream reads its category in its name."""

    def __init__(self: Any, **given: Any) -> None:
        like.__init__(self, obj_name=name, **given)

    return type(name.title().replace("_", ""), (like,), {"__init__": __init__})
