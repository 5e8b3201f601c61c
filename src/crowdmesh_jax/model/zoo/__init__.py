"""Models to start with. Imports flax."""

from .lenet import lenet
from .mlp import mlp

__all__ = ["lenet", "mlp"]
