"""Streams a checkpoint into a model: match every name first, then one reader thread feeds the packing.

The model says what it wants as `{checkpoint name: TensorSpec}`; experts are wanted one by one. `plan_load` maps the
checkpoint's tensors onto those names (multimodal prefixes dropped, stacked experts sliced, parts that text generation
does not use left out) and refuses with all differences at once. Only then is data read (`moejet.weights.reader`).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from moejet.weights.checkpoint import TORCH_DTYPES, Checkpoint, TensorInfo
from moejet.weights.progress import LoadProgress, ProgressLine
from moejet.weights.reader import Piece, read_pieces
from moejet.weights.spec import TensorSpec

logger = logging.getLogger(__name__)

# Multimodal checkpoints nest the language model; the longest prefix is tried first.
_PREFIXES = ("model.language_model.", "language_model.")
_IGNORED = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq"
    r"|(model\.)?(vision_tower|vision_model|visual|mm_projector|multi_modal_projector)\..*"
    r"|step_head\..*"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_STACKED = re.compile(r"(?P<prefix>.*\.experts)\.(?P<kind>gate_up_proj|down_proj)(\.weight)?")
_SCALES = re.compile(
    r".*\.(weight_scale_inv|weight_scale|weight_zero_point|weight_shape|input_scale)"
)
_LISTED = 10


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded; `ignored` are names left out on purpose, `absent` optional ones not there."""

    num_tensors: int
    num_bytes: int
    elapsed_s: float
    ignored: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def gbps(self) -> float:
        return self.num_bytes / max(self.elapsed_s, 1e-9) / 1e9


@dataclass(slots=True)
class _Plan:
    pieces: list[Piece] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)  # prefixes of stacked experts among them
    quantised: dict[str, list[str]] = field(default_factory=dict)
    wrong_dtype: list[str] = field(default_factory=list)


def load_weights(
    checkpoint: Checkpoint,
    specs: dict[str, TensorSpec],
    *,
    num_hidden_layers: int | None = None,
    show_progress: bool | None = None,
    on_progress: Callable[[LoadProgress], None] | None = None,
) -> LoadReport:
    """Calls every spec's `load` once with its tensor, in file order.

    The tensor is contiguous, in its stored dtype (F32, F16 or BF16) and valid during the call only: clone to keep it.
    num_hidden_layers: later layers (multi-token prediction) are left out; None: as many as `specs` has ·
    show_progress: draw a line on stderr (None: if it is a terminal) · on_progress: called after every piece.
    Raises ValueError before anything is loaded if names, shapes or dtypes differ. An exception of a `load` or of
    `on_progress` ends the reading and passes through with a note that names the tensor.
    """
    plan = plan_load(checkpoint, specs, num_hidden_layers)
    total = sum(piece.num_bytes for piece in plan.pieces)
    line = ProgressLine(enabled=show_progress)
    start = time.perf_counter()
    done = 0
    try:
        with closing(read_pieces(plan.pieces)) as stream:
            for piece, tensor in stream:
                try:
                    piece.spec.load(tensor)
                except ValueError as error:
                    where = f"{piece.name} in {piece.source.file.name}"
                    raise ValueError(f"{where} cannot be packed: {error}") from error
                except Exception as error:
                    error.add_note(f"while loading {piece.name} from {piece.source.file}")
                    raise
                del tensor
                done += piece.num_bytes
                progress = LoadProgress(done, total, time.perf_counter() - start, piece.name)
                line.update(progress)
                if on_progress is not None:
                    on_progress(progress)
    finally:
        line.close()
    report = LoadReport(
        num_tensors=len(plan.pieces),
        num_bytes=total,
        elapsed_s=time.perf_counter() - start,
        ignored=tuple(plan.ignored),
        absent=tuple(plan.absent),
    )
    logger.info(
        "loaded %d tensors, %.2f GiB in %.1f s (%.2f GB/s)",
        *(report.num_tensors, total / 2**30, report.elapsed_s, report.gbps),
    )
    return report


def plan_load(
    checkpoint: Checkpoint, specs: dict[str, TensorSpec], num_hidden_layers: int | None = None
) -> _Plan:
    """Matches checkpoint and specs without reading data; ValueError lists all differences."""
    plan = _Plan()
    num_layers = num_hidden_layers or 1 + max((_layer_of(name) for name in specs), default=-1)
    seen: dict[str, str] = {}
    for info in checkpoint:
        name = _plain_name(info.name)
        if _is_ignored(name, num_layers) or (name == "lm_head.weight" and name not in specs):
            # A tied model has no lm_head of its own even where the file repeats the embedding.
            plan.ignored.append(info.name)
            continue
        pieces = _match(name, info, specs, plan)
        for piece in pieces:
            if piece.name in seen:
                plan.unexpected.append(f"{info.name} (same as {seen[piece.name]})")
            else:
                seen[piece.name] = info.name
                plan.pieces.append(piece)
    missing: list[str] = []
    for name, spec in specs.items():
        if name not in seen:
            (plan.absent if spec.optional else missing).append(name)
    _refuse(checkpoint, plan, missing)
    if plan.ignored:
        logger.info(
            "left out %d tensors that text generation does not use (%s, ...)",
            *(len(plan.ignored), plan.ignored[0]),
        )
    return plan


def _match(name: str, info: TensorInfo, specs: dict[str, TensorSpec], plan: _Plan) -> list[Piece]:
    """Pieces of one stored tensor; what does not fit goes into the lists of `plan`."""
    if info.dtype not in TORCH_DTYPES:
        if name in specs or _STACKED.fullmatch(name) or name.endswith(".weight_packed"):
            plan.quantised.setdefault(info.dtype, []).append(info.name)
            # One report is enough: the tensor is there, in a form that cannot be read.
            return [Piece(name, specs[name], info, info.offset)] if name in specs else []
    elif name in specs:
        spec = specs[name]
        if spec.shape != info.shape:
            plan.misshaped.append(f"{info.name} is {list(info.shape)}, not {list(spec.shape)}")
        return [Piece(name, spec, info, info.offset)]
    stacked = _STACKED.fullmatch(name)
    if stacked and info.dtype in TORCH_DTYPES:
        pieces = _slice_experts(stacked["prefix"], stacked["kind"], info, specs)
        if pieces is not None:
            return pieces
        if f"{stacked['prefix']}.0.down_proj.weight" in specs:
            plan.misshaped.append(f"{info.name} is {list(info.shape)}, which does not fit")
            plan.misfits.append(f"{stacked['prefix']}.")
            return []
    plan.unexpected.append(info.name)
    return []


def _slice_experts(
    prefix: str, kind: str, info: TensorInfo, specs: dict[str, TensorSpec]
) -> list[Piece] | None:
    """gate_up_proj [E, 2I, D] or down_proj [E, D, I] as per-expert pieces; None if shapes differ."""
    if len(info.shape) != 3:
        return None
    num_experts, rows, columns = info.shape
    names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    if f"{prefix}.{num_experts}.down_proj.weight" in specs:
        return None
    part_shape = (rows // len(names), columns)
    part_bytes = info.num_bytes // max(1, num_experts * len(names))
    pieces = []
    for expert in range(num_experts):
        for part, projection in enumerate(names):
            spec = specs.get(f"{prefix}.{expert}.{projection}.weight")
            if spec is None or spec.shape != part_shape or rows % len(names):
                return None
            offset = info.offset + (expert * len(names) + part) * part_bytes
            pieces.append(Piece(f"{prefix}.{expert}.{projection}.weight", spec, info, offset))
    return pieces


def _plain_name(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return rest if rest.startswith(("model.", "lm_head.")) else f"model.{rest}"
    return name


def _is_ignored(name: str, num_layers: int) -> bool:
    return bool(_IGNORED.fullmatch(name)) or _layer_of(name) >= num_layers > 0


def _layer_of(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _refuse(checkpoint: Checkpoint, plan: _Plan, missing: list[str]) -> None:
    problems = []
    for dtype, names in plan.quantised.items():
        kind = "fp8" if dtype.startswith("F8") else "packed integer"
        if dtype in ("F64", "BOOL"):
            problems.append(
                f"{len(names)} of dtype {dtype} (supported: F32, F16, BF16): {_few(names)}"
            )
        else:
            problems.append(
                f"{len(names)} stored as {dtype}: {kind} checkpoints are not supported yet, use a "
                f"bf16 copy: {_few(names)}"
            )
    if plan.quantised:
        # Scales and the tensors that packed names stand for follow from the dtype.
        plan.unexpected = [n for n in plan.unexpected if not _SCALES.fullmatch(n)]
        packed = {
            _plain_name(n).replace(".weight_packed", ".weight")
            for names in plan.quantised.values()
            for n in names
        }
        stacked = tuple(
            n.rsplit(".experts.", 1)[0] + ".experts." for n in packed if ".experts." in n
        )
        missing = [n for n in missing if n not in packed and not n.startswith(stacked or "\0")]
    missing = [name for name in missing if not name.startswith(tuple(plan.misfits))]
    if missing:
        hint = ""
        if "lm_head.weight" in missing:
            hint = " (no lm_head.weight: does config.json lack tie_word_embeddings?)"
        problems.append(f"{len(missing)} missing: {_few(missing)}{hint}")
    if plan.misshaped:
        problems.append(f"{len(plan.misshaped)} of another shape: {_few(plan.misshaped)}")
    if plan.unexpected:
        problems.append(f"{len(plan.unexpected)} unexpected: {_few(plan.unexpected)}")
    if problems:
        raise ValueError(
            f"the tensors of {checkpoint.root} do not match its config.json: " + "; ".join(problems)
        )


def _few(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
