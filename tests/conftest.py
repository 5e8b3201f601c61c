"""Shared set-up: one XLA thread per process, so that bit-equality claims are about one machine type."""

import os

os.environ.setdefault("NPROC", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
