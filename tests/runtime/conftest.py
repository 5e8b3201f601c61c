"""Runs here are about what surrounds training: what they compile is compiled once."""

from __future__ import annotations

import jax
import pytest

import crowdmesh_jax as cm


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """All runs share compiled programs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def crew():
    """Three devices in this process."""
    with cm.launch(cm.Crowd.local((1.0, 0.5, 0.5)), transport="memory") as crew:
        yield crew
