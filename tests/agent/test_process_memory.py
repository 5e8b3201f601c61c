"""The figures that an agent reports of its own process."""

import os
import platform
import subprocess
import sys
from pathlib import Path

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
from crowdmesh_jax.agent.memory import memory_use, return_freed_memory, trim
if {tamed}: return_freed_memory()
import numpy as np
big = np.ones(24 * 2**20, np.uint8)
del big
arrays = [np.ones(4 * 2**20, np.uint8) for _ in range(32)]
kept = arrays[-1]
del arrays
if {tamed}: trim()
print(memory_use().now_bytes)
"""


def run(code: str, **environment: str) -> int:
    return int(
        subprocess.check_output(
            [sys.executable, "-c", code], text=True, env={**os.environ, **environment}
        )
    )


@linux
def test_what_loading_freed_goes_back_to_the_system():
    """glibc alone keeps it, in a heap below one array that lives, once a larger one was freed."""
    assert run(FREES.format(tamed=False)) - run(FREES.format(tamed=True)) > 64 * 2**20


FAULTS = """
from crowdmesh_jax.agent.memory import return_freed_memory
if {tamed}: return_freed_memory()
import resource, threading
def step():
    blocks = [b"x" * int({mb} * 2**20) for _ in range(4)]  # numpy asks for large pages itself
def steps(count):
    thread = threading.Thread(target=lambda: [step() for _ in range(count)])
    thread.start()
    thread.join()
steps(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@linux
def test_arrays_that_come_again_each_step_are_not_faulted_in_anew():
    """10 MB that 20 blocks of half a MB need are 2,560 pages; mapped apart, each is a fault."""
    assert run(FAULTS.format(tamed=True, mb=0.5)) < 500
    mapped = "glibc.malloc.mmap_threshold=262144"
    assert run(FAULTS.format(tamed=False, mb=0.5), GLIBC_TUNABLES=mapped) > 2_000


REUSES = """
from crowdmesh_jax.agent.memory import memory_use, return_freed_memory
if {tamed}: return_freed_memory()
kept = []
for _ in range(8):
    block = b"x" * (24 * 2**20)
    kept.append(b"x" * (4 * 2**20))  # stands above it in a heap, which so cannot shrink
    del block
    kept.append(b"x" * (5 * 2**20))  # and this one takes a part of the hole
print(memory_use().now_bytes)
"""


@linux
def test_large_blocks_leave_no_holes_among_those_that_stay():
    """Of 72 MB that stay, a heap for all makes more: what is free between them stays resident."""
    heap = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=67108864"
    assert (
        run(REUSES.format(tamed=False), GLIBC_TUNABLES=heap) - run(REUSES.format(tamed=True))
        > 10 * 2**20
    )


@linux
def test_large_blocks_are_faulted_in_by_large_pages_where_the_system_has_them():
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    libc = platform.libc_ver()[1]
    if not modes.exists() or "[never]" in modes.read_text() or libc < "2.35":
        pytest.skip("needs transparent huge pages and glibc 2.35")
    # Of 800 MB, 204,800 pages; the memory may be too scattered for large pages everywhere.
    assert run(FAULTS.format(tamed=True, mb=40), **memory.ENVIRONMENT) < 150_000
