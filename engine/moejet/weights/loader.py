"""Streams a checkpoint into a model: match every name first, then one reader thread feeds the packing.

The model says what it wants as `{checkpoint name: TensorSpec}`; experts are wanted one by one. `plan_load` maps the
checkpoint's weights (`moejet.weights.sources`) onto those names (stacked experts sliced, parts that text generation
does not use left out) and refuses with all differences at once. Only then is data read (`moejet.weights.reader`).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from moejet.progress import ProgressLine
from moejet.weights.checkpoint import Checkpoint
from moejet.weights.progress import LoadProgress
from moejet.weights.reader import Piece, read_pieces
from moejet.weights.sources import SourceWeight, assemble, plain_name
from moejet.weights.spec import TensorSpec

logger = logging.getLogger(__name__)

_IGNORED = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq"
    r"|(model\.)?(vision_tower|vision_model|visual|mm_projector|multi_modal_projector)\..*"
    r"|step_head\..*"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_STACKED = re.compile(r"(?P<prefix>.*\.experts)\.(?P<kind>gate_up_proj|down_proj)(\.weight)?")
_LISTED = 10
_LISTENER: ContextVar[Callable[[LoadProgress], None] | None] = ContextVar("listener", default=None)


@contextmanager
def on_load_progress(listener: Callable[[LoadProgress], None]) -> Iterator[None]:
    """Calls `listener` after every piece that this thread loads within the context."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


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
    unsupported: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)  # names of weights among them


def load_weights(
    checkpoint: Checkpoint,
    specs: dict[str, TensorSpec],
    *,
    show_progress: bool | None = None,
) -> LoadReport:
    """Calls every spec's `load` once with its tensor, in file order.

    The tensor is contiguous, in its stored dtype (F32, F16 or BF16) and valid during the call only: clone to keep it.
    Layers beyond those of `specs` (multi-token prediction) are left out. show_progress: draw a line on stderr (None: if
    it is a terminal); see also `on_load_progress`. Raises ValueError before anything is loaded if names, shapes or
    dtypes differ. An exception of a `load` ends the reading and passes through with a note that names the tensor.
    """
    plan = plan_load(checkpoint, specs)
    total = sum(piece.num_bytes for piece in plan.pieces)
    line = ProgressLine(enabled=show_progress)
    on_progress = _LISTENER.get()
    start = time.perf_counter()
    done = 0
    try:
        with closing(read_pieces(plan.pieces)) as stream:
            for piece, weight in stream:
                try:
                    piece.spec.take(weight)
                except ValueError as error:
                    where = f"{piece.name} in {piece.source.info.file.name}"
                    raise ValueError(f"{where} cannot be packed: {error}") from error
                except Exception as error:
                    error.add_note(f"while loading {piece.name} from {piece.source.info.file}")
                    raise
                del weight
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


def plan_load(checkpoint: Checkpoint, specs: dict[str, TensorSpec]) -> _Plan:
    """Matches checkpoint and specs without reading data; ValueError lists all differences."""
    plan = _Plan()
    specs = checkpoint.adapt(specs)
    num_layers = 1 + max((_layer_of(name) for name in specs), default=-1)
    wanted = []
    for info in checkpoint:
        name = plain_name(info.name)
        # A tied model has no lm_head of its own even where the file repeats the embedding.
        tied = name.startswith("lm_head.weight") and "lm_head.weight" not in specs
        if tied or _is_ignored(name, num_layers):
            plan.ignored.append(info.name)
        else:
            wanted.append(info)
    sources = assemble(wanted)
    plan.unsupported, plan.broken = sources.unsupported, sources.broken
    plan.unexpected += sources.orphans
    seen: dict[str, str] = {}
    for source in sources.weights:
        for piece in _match(source, specs, plan):
            if piece.name in seen:
                plan.unexpected.append(f"{source.info.name} (same as {seen[piece.name]})")
            else:
                seen[piece.name] = source.info.name
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


def _match(source: SourceWeight, specs: dict[str, TensorSpec], plan: _Plan) -> list[Piece]:
    """Pieces of one weight; what does not fit goes into the lists of `plan`."""
    name = source.name
    if name in specs:
        spec = specs[name]
        if spec.shape != source.shape:
            plan.misshaped.append(
                f"{source.info.name} is {list(source.shape)}, not {list(spec.shape)}"
            )
        return [Piece(name, spec, source, source.info.offset)]
    stacked = _STACKED.fullmatch(name)
    if stacked and source.encoding == "plain":
        pieces = _slice_experts(stacked["prefix"], stacked["kind"], source, specs)
        if pieces is not None:
            return pieces
        if f"{stacked['prefix']}.0.down_proj.weight" in specs:
            plan.misshaped.append(f"{source.info.name} is {list(source.shape)}, which does not fit")
            plan.misfits.append(f"{stacked['prefix']}.")
            return []
    plan.unexpected.append(source.info.name)
    return []


def _slice_experts(
    prefix: str, kind: str, source: SourceWeight, specs: dict[str, TensorSpec]
) -> list[Piece] | None:
    """gate_up_proj [E, 2I, D] or down_proj [E, D, I] as per-expert pieces; None if shapes differ."""
    if len(source.shape) != 3:
        return None
    num_experts, rows, columns = source.shape
    names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    if f"{prefix}.{num_experts}.down_proj.weight" in specs:
        return None
    part_shape = (rows // len(names), columns)
    part_bytes = source.num_bytes // max(1, num_experts * len(names))
    pieces = []
    for expert in range(num_experts):
        for part, projection in enumerate(names):
            spec = specs.get(f"{prefix}.{expert}.{projection}.weight")
            if spec is None or spec.shape != part_shape or rows % len(names):
                return None
            offset = source.info.offset + (expert * len(names) + part) * part_bytes
            pieces.append(Piece(f"{prefix}.{expert}.{projection}.weight", spec, source, offset))
    return pieces


def _is_ignored(name: str, num_layers: int) -> bool:
    return bool(_IGNORED.fullmatch(name)) or _layer_of(name) >= num_layers > 0


def _layer_of(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _refuse(checkpoint: Checkpoint, plan: _Plan, missing: list[str]) -> None:
    problems = []
    if plan.unsupported:
        problems.append(f"{len(plan.unsupported)} of another form: {_few(plan.unsupported, '; ')}")
        # One report is enough: they are there, in a form that cannot be read.
        missing = [name for name in missing if name not in plan.broken]
        stacked = [m["prefix"] for n in plan.broken if (m := _STACKED.fullmatch(n))]
        plan.misfits += [f"{prefix}." for prefix in stacked]
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
            f"the tensors of {checkpoint.root} do not match its {checkpoint.described_in}: "
            + "; ".join(problems)
        )


def _few(names: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return separator.join(names[:_LISTED]) + more
