"""What MuJoCo holds on to is given back, and nothing else is touched."""

import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco")

XML = """<mujoco>
  <asset>
    <texture name="t" type="2d" builtin="checker" width="512" height="512" rgb1="1 0 0" rgb2="0 1 0"/>
    <material name="m" texture="t"/>
  </asset>
  <worldbody><body name="b" pos="1 2 3"><freejoint/><geom size=".1" material="m"/></body></worldbody>
</mujoco>"""


def arrays(model) -> dict[str, np.ndarray]:
    found = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    return {name: value.copy() for name, value in found.items() if isinstance(value, np.ndarray)}


def test_only_the_pixels_of_textures_are_released():
    from reachrl.envs.mujoco_memory import release_textures

    model = mujoco.MjModel.from_xml_string(XML)
    before = arrays(model)
    release_textures(model)
    after = arrays(model)
    pixels = before.pop("tex_data")
    assert all(np.array_equal(values, after[name]) for name, values in before.items())
    rest = np.flatnonzero(after["tex_data"])
    assert pixels.size == 3 * 512 * 512 and rest.size <= 2 * 4096  # whole pages: what lies at the ends stays


def test_releasing_a_compilation_leaves_models_alone():
    from reachrl.envs.mujoco_memory import release_compilation

    model = mujoco.MjModel.from_xml_string(XML)
    before = arrays(model)
    release_compilation()
    assert all(np.array_equal(values, getattr(model, name)) for name, values in before.items())
