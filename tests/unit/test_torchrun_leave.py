"""How processes that `torchrun` started end."""

import os
import signal
import subprocess
import sys

import pytest

# Like a tensor that another thread lets go of: whoever takes the interpreter down meets it.
PROGRAM = """
import atexit, os
from reachrl import torchrun
class Held:
    def __del__(self, abort=os.abort):
        abort()
held = Held()
atexit.register(print, "ended")
print("worked", end=" ")
torchrun.leave(3)
"""


@pytest.mark.parametrize(("size", "code"), [("1", -signal.SIGABRT), ("2", 3)])
def test_among_others_the_interpreter_is_not_taken_down(size: str, code: int) -> None:
    environment = os.environ | {"WORLD_SIZE": size, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if size == "2":
        assert done.stdout == "worked ended\n"  # what was to be done at the end is done, and nothing said is lost
