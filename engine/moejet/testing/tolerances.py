"""The one table of numerical tolerances, and the two ways to compare with it.

`calc_diff` is one minus the normalised inner product, 1 - 2 <x, y> / (|x|^2 + |y|^2): about half the squared relative
error, so 1e-10 is a relative error near 1e-5. It is blind to single outliers in large tensors; use it with tensors of
moderate size, and with log-probabilities (LOGPROB_LIMITS) end to end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moejet.validation import require_choice

# Output or weight format -> largest calc_diff against the float64 (or transformers) result. The formats of weights
# bound the error against the *unquantised* model; against dequantised weights the limit of the output format holds.
DIFF_LIMITS: dict[str, float] = {
    "fp32": 1e-10,
    "bf16": 1e-5,
    "fp16": 1e-6,
    "fp8": 1e-3,
    "int8": 1e-4,
    "int4_g32": 1e-2,
    "interpreter_bf16": 5e-5,
}

# Dense and expert format -> largest absolute difference of log-probabilities of tokens whose probability is at least
# 1e-4, against transformers in float32 on the same (already rounded) checkpoint.
LOGPROB_LIMITS: dict[str, float] = {
    "fp32": 2e-4,
    "bf16": 0.15,
    "int8": 0.3,
    "fp8": 1.0,
    "int4_g32": 2.0,
}


def calc_diff(actual: Any, expected: Any) -> float:
    """1 - 2 <x, y> / (|x|^2 + |y|^2) in float64; 0 for equal inputs (also for two all-zero ones), 1 for orthogonal.

    Takes numpy arrays or torch tensors of equal shape, any float dtype. NaN anywhere gives NaN.
    """
    x, y = _as_float64(actual).ravel(), _as_float64(expected).ravel()
    if x.shape != y.shape:
        raise ValueError(f"calc_diff: sizes differ: {x.size} and {y.size}")
    denominator = float(x @ x + y @ y)
    if denominator == 0.0:
        return 0.0
    # |x - y|^2 equals the textbook form and does not cancel for nearly equal inputs.
    delta = x - y
    return float(delta @ delta) / denominator


def assert_close(actual: Any, expected: Any, output_format: str, *, what: str = "") -> float:
    """Asserts equal shapes, equal NaN and infinity masks, and calc_diff within DIFF_LIMITS[output_format].

    Returns the difference, for tests that want to print it.
    """
    require_choice("output_format", output_format, DIFF_LIMITS)
    x, y = _as_float64(actual), _as_float64(expected)
    label = f"{what}: " if what else ""
    assert x.shape == y.shape, f"{label}shapes differ: {x.shape} and {y.shape}"
    for name, mask in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        assert np.array_equal(mask(x), mask(y)), f"{label}{name} positions differ"
    finite = np.isfinite(y)
    diff = calc_diff(x[finite], y[finite])
    limit = DIFF_LIMITS[output_format]
    assert diff <= limit, f"{label}calc_diff {diff:.3g} exceeds {limit:.3g} ({output_format})"
    return diff


def logprob_error(actual: Any, expected: Any, *, min_probability: float = 1e-4) -> float:
    """Largest |log p - log q| over entries whose expected probability is at least `min_probability`.

    Shapes: both [..., V] logits or log-probabilities; they are normalised here in float64.
    """
    x, y = _log_softmax(_as_float64(actual)), _log_softmax(_as_float64(expected))
    if x.shape != y.shape:
        raise ValueError(f"logprob_error: shapes differ: {x.shape} and {y.shape}")
    likely = y >= np.log(min_probability)
    return float(np.abs(x - y)[likely].max())


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _as_float64(value: Any) -> npt.NDArray[np.float64]:
    if hasattr(value, "detach"):  # torch; numpy has no bfloat16, so widen there
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)
