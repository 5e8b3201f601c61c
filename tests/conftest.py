"""Shared set-up: one XLA thread per process: bit-equality is claimed for one machine type."""

import atexit
import os
import shutil
import signal
import tempfile

os.environ.setdefault("NPROC", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Rates measured beside other tests must not become those of the user's own plans. Workers of one
# call share the folder, and programs compiled in it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="crowdmesh-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

from hypothesis import HealthCheck, settings

# Other processes share the machine: an example that took long says nothing about the code.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

# A shell that started us in the background made us, and all our children, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
