"""Shared set-up: one XLA thread per process: bit-equality is claimed for one machine type."""

import os
import signal

os.environ.setdefault("NPROC", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from hypothesis import HealthCheck, settings

# Other processes share the machine: an example that took long says nothing about the code.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

# A shell that started us in the background made us, and all our children, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
