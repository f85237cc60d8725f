"""Checking and streaming checkpoints: `Checkpoint.open` -> `load_weights`."""

from moejet.weights.checkpoint import Checkpoint, TensorInfo
from moejet.weights.loader import LoadReport, load_weights
from moejet.weights.progress import LoadProgress
from moejet.weights.spec import TensorSpec

__all__ = [
    "Checkpoint",
    "LoadProgress",
    "LoadReport",
    "TensorInfo",
    "TensorSpec",
    "load_weights",
]
