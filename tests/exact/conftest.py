"""Agents that live as long as the session, and which part of the matrix runs."""

from __future__ import annotations

import jax
import pytest

import crowdmesh_jax as cm

from .cases import STAGES, full_matrix, pairwise


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        always = set(pairwise())
        cells = []
        for case in full_matrix():
            marks = [pytest.mark.xdist_group(case.family)]  # what a family compiles is kept
            if case not in always:
                marks.append(pytest.mark.exact)
            cells.append(pytest.param(case, id=str(case), marks=marks))
        metafunc.parametrize("case", cells)


@pytest.fixture(scope="session")
def compiled_cache(tmp_path_factory):
    """Oracle, schedules and transports share programs: each is compiled once."""
    folder = tmp_path_factory.mktemp("compiled")
    shared = folder / "shared"
    shared.mkdir()
    for index in range(max(STAGES)):
        (folder / f"device-{index}").symlink_to(shared)
    jax.config.update("jax_compilation_cache_dir", str(shared))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def crews(compiled_cache):
    """One crew per transport, four devices each."""
    crowd = cm.Crowd.local((1.0,) * max(STAGES))
    with (
        cm.launch(crowd, transport="memory") as memory,
        cm.launch(crowd, transport="grpc", cache_dir=compiled_cache) as grpc,
    ):
        yield {"memory": memory, "grpc": grpc}
