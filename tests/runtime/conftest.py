"""Runs here are about what surrounds training: each job is exported and compiled once."""

from __future__ import annotations

import jax
import pytest

import crowdmesh_jax as cm
import crowdmesh_jax.runtime.train


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of one job and plan share its bundles, and all of them compiled programs."""
    import sys

    module = sys.modules["crowdmesh_jax.runtime.train"]
    export, made = module.build_bundles, {}

    def build_bundles(job, plan, *specs):
        key = id(job), plan.digest()
        if key not in made:
            made[key] = job, export(job, plan, *specs)  # the job lives on, so its id stays its own
        return made[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build_bundles", build_bundles)
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
