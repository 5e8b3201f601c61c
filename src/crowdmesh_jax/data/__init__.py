"""Data sources: batches by step number; readers of files; the bundled digits. No JAX."""

from .arrays import ArraySource, epoch_order
from .audio import Clips, log_mel, mfcc, read_clips, read_wav
from .checks import check_labels
from .digits import digits
from .idx import fashion_mnist, read_idx
from .npz import cut_windows, read_npz
from .source import DataSource, ShippableSource, checked_batch, known_targets, source_from_spec
from .text import TextSource, Vocabulary, read_text

__all__ = [
    "ArraySource",
    "Clips",
    "DataSource",
    "ShippableSource",
    "TextSource",
    "Vocabulary",
    "check_labels",
    "checked_batch",
    "cut_windows",
    "digits",
    "epoch_order",
    "fashion_mnist",
    "known_targets",
    "log_mel",
    "mfcc",
    "read_clips",
    "read_idx",
    "read_npz",
    "read_text",
    "read_wav",
    "source_from_spec",
]
