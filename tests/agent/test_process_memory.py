"""The figures that an agent reports of its own process."""

import subprocess
import sys

import numpy as np
import pytest

from crowdmesh_jax.agent import memory

linux = pytest.mark.skipif(not memory.STATUS.exists(), reason="needs /proc")


@linux
def test_an_array_shows_in_what_is_held_and_in_the_peak_until_that_is_reset():
    memory.reset_peak()
    before = memory.memory_use()
    array = np.ones(64 * 2**20, np.uint8)
    held = memory.memory_use()
    assert held.now_bytes - before.now_bytes >= 60 * 2**20
    del array
    memory.trim()
    after = memory.memory_use()
    assert after.peak_bytes >= held.now_bytes - 2**20, "the kernel counts in batches of pages"
    assert after.now_bytes <= held.now_bytes - 60 * 2**20
    memory.reset_peak()
    assert memory.memory_use().peak_bytes < held.now_bytes - 50 * 2**20


def test_without_proc_the_peak_since_the_start_stands_for_both(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    use = memory.memory_use()
    assert use.now_bytes == use.peak_bytes > 10 * 2**20


FREES = """
from crowdmesh_jax.agent.memory import memory_use, return_freed_memory
if {tamed}: return_freed_memory()
import numpy as np
big = np.ones(24 * 2**20, np.uint8)
del big
arrays = [np.ones(4 * 2**20, np.uint8) for _ in range(32)]
kept = arrays[-1]
del arrays
print(memory_use().now_bytes)
"""


@linux
def test_freed_arrays_of_some_megabytes_go_back_to_the_system():
    """glibc alone keeps them, in a heap below one array that lives, once a larger one was freed."""

    def left(tamed: bool) -> int:
        code = FREES.format(tamed=tamed)
        return int(subprocess.check_output([sys.executable, "-c", code], text=True))

    assert left(False) - left(True) > 64 * 2**20
