"""Models as chains of layers, and training jobs: what a user writes, checked on shapes alone."""

from . import losses
from .job import TrainingJob
from .layer import Layer
from .randomness import init_key, layer_key
from .specs import LayerSpecs, ModelSpecs
from .staged import StagedModel, call_layer
from .trees import leaf_paths

__all__ = [
    "Layer",
    "LayerSpecs",
    "ModelSpecs",
    "StagedModel",
    "TrainingJob",
    "call_layer",
    "init_key",
    "layer_key",
    "leaf_paths",
    "losses",
]
