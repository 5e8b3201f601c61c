"""Data sources: batches by step number, and the bundled digits. No JAX."""

from .arrays import ArraySource, epoch_order
from .digits import digits
from .source import DataSource, ShippableSource, checked_batch, source_from_spec

__all__ = [
    "ArraySource",
    "DataSource",
    "ShippableSource",
    "checked_batch",
    "digits",
    "epoch_order",
    "source_from_spec",
]
