"""Finding, checking and streaming checkpoints: `resolve_model` -> `Checkpoint.open` -> `load_weights`."""

from moejet.weights.checkpoint import Checkpoint, TensorInfo
from moejet.weights.loader import LoadReport, load_weights
from moejet.weights.progress import LoadProgress
from moejet.weights.resolve import TINY_REASONER, resolve_model
from moejet.weights.spec import TensorSpec

__all__ = [
    "TINY_REASONER",
    "Checkpoint",
    "LoadProgress",
    "LoadReport",
    "TensorInfo",
    "TensorSpec",
    "load_weights",
    "resolve_model",
]
