"""Models to start with, and their registry. Imports flax."""

from .gpt2 import gpt2
from .lenet import lenet
from .mlp import mlp
from .registry import Entry, build, models

__all__ = ["Entry", "build", "gpt2", "lenet", "mlp", "models"]
