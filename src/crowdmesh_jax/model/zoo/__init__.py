"""Models to start with, and their registry. Imports flax."""

from .ds_cnn import ds_cnn
from .gpt2 import gpt2
from .har import har_cnn, har_lstm
from .lenet import lenet
from .mlp import mlp
from .mobilenet import mobilenet_v2
from .registry import Entry, build, models
from .resnet import resnet18, resnet50

__all__ = [
    "Entry",
    "build",
    "ds_cnn",
    "gpt2",
    "har_cnn",
    "har_lstm",
    "lenet",
    "mlp",
    "mobilenet_v2",
    "models",
    "resnet18",
    "resnet50",
]
