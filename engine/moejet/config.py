"""Model and engine configuration.

Hugging Face's config.json is read by `moejet.hf_config`. Published dimensions of real models are in `moejet.presets`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from moejet.hf_config import Quantization, read_hf_config
from moejet.rope_config import RopeConfig
from moejet.validation import (
    checked,
    near_miss,
    require_choice,
    require_int,
    require_number,
    short,
)

ExpertFormat = Literal["auto", "native", "int4_g32", "int8", "fp8", "bf16", "fp32"]
DenseFormat = Literal["auto", "native", "int8", "int4_g32", "fp8", "bf16", "fp32"]
CacheDtype = Literal["fp8", "bf16", "fp32"]
Arithmetic = Literal["bf16", "int8"]
# Packed formats; "auto" and "native" stand for one of them, by the checkpoint.
EXPERT_FORMATS: tuple[str, ...] = get_args(ExpertFormat)[2:]
_NATIVE_FORMATS: dict[Quantization | None, ExpertFormat] = {
    None: "bf16",
    "fp8": "fp8",
    "int4": "int4_g32",
}
DENSE_FORMATS: tuple[str, ...] = get_args(DenseFormat)[2:]
# int4 checkpoints leave their dense matrices in bf16.
_NATIVE_DENSE: dict[Quantization | None, DenseFormat] = {None: "bf16", "fp8": "fp8", "int4": "bf16"}
# Blocks of GGUF files, packed without another quantisation; no engine option.
GGUF_FORMATS = ("q4_0", "q8_0", "q4_k", "q5_k", "q6_k")
CACHE_DTYPES: tuple[str, ...] = get_args(CacheDtype)
PackedCache = Literal["auto", "on", "off", "verify"]
# Tokens of a request where the option is not given and the model allows more.
DEFAULT_MAX_CONTEXT = 32768
DEVICES = ("auto", "cpu", "cuda", "simulated")
ARITHMETICS: tuple[str, ...] = get_args(Arithmetic)
# Bits per weight, scales included.
FORMAT_BITS = {
    "int4_g32": 4.5,
    "int8": 8.25,
    "fp8": 8.125,
    "bf16": 16.0,
    "fp32": 32.0,
    "q4_0": 4.5,
    "q8_0": 8.5,
    "q4_k": 4.5,
    "q5_k": 5.5,
    "q6_k": 6.625,
}
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
# Their kernels compute a row the same way whatever the number of rows.
INVARIANT_ISAS = ISAS[:3]

_LARGEST_SIZE = 1 << 24
_LARGEST = {"num_hidden_layers": 1000, "num_experts": 100_000, "max_position_embeddings": 1 << 31}
_ROUTERS = {("softmax", "greedy"), ("softmax", "group_limited_greedy"), ("sigmoid", "noaux_tc")}


@dataclass(frozen=True, slots=True)
@checked
class ModelConfig:
    """Architecture of one DeepSeek-family model; field names follow Hugging Face's config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    first_k_dense_replace: int
    q_lora_rank: int | None = None
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    rope_interleave: bool = True
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    num_nextn_predict_layers: int = 0
    quantization: Quantization | None = None
    # GGUF files mix formats: (gate and up, down) of every MoE layer.
    expert_formats: tuple[tuple[str, str], ...] = ()
    # (name, format) of the dense matrices: `moejet.weights.gguf_formats`.
    dense_formats: tuple[tuple[str, str], ...] = ()

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Cached values per token and layer: kv_lora_rank + qk_rope_head_dim."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        return max(0, self.num_hidden_layers - self.first_k_dense_replace)

    @property
    def softmax_scale(self) -> float:
        return float(self.qk_head_dim**-0.5 * self.rope.softmax_mscale)

    @property
    def num_dense_parameters(self) -> int:
        """Weights of all but routed experts; norms and biases are too small to count."""
        heads, q_in = self.num_attention_heads, self.q_lora_rank or self.hidden_size
        attention = (self.q_lora_rank or 0) * self.hidden_size + q_in * heads * self.qk_head_dim
        attention += self.hidden_size * self.latent_dim
        attention += self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        attention += heads * self.v_head_dim * self.hidden_size
        shared = 3 * self.hidden_size * self.moe_intermediate_size * self.num_shared_experts
        moe = shared + self.num_experts * self.hidden_size
        dense = 3 * self.hidden_size * self.intermediate_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        num_dense = self.num_hidden_layers - self.num_moe_layers
        blocks = self.num_hidden_layers * attention + self.num_moe_layers * moe + num_dense * dense
        return blocks + tables

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"):
            _require_positive(name, getattr(self, name))
        for name in ("num_hidden_layers", "num_attention_heads", "kv_lora_rank", "v_head_dim"):
            _require_positive(name, getattr(self, name))
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "num_experts", "num_experts_per_tok"):
            _require_positive(name, getattr(self, name))
        for name in ("max_position_embeddings", "n_group", "topk_group"):
            _require_positive(name, getattr(self, name))
        if self.q_lora_rank is not None:
            _require_positive("q_lora_rank", self.q_lora_rank)
        require_int("num_shared_experts", self.num_shared_experts, 0, _LARGEST_SIZE)
        for name in ("first_k_dense_replace", "num_nextn_predict_layers"):
            require_int(name, getattr(self, name), 0, _LARGEST_SIZE)
        for name in ("rms_norm_eps", "routed_scaling_factor"):
            require_number(name, getattr(self, name), 0)
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even")
        if self.num_experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"n_group={self.n_group}, topk_group={self.topk_group} do not divide "
                f"n_routed_experts={self.num_experts}: check the router keys of config.json"
            )
        selectable = self.num_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > selectable:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {selectable} experts "
                "that the router may choose from"
            )
        if (self.scoring_func, self.topk_method) not in _ROUTERS:
            known = ", ".join(f"{s} + {t}" for s, t in sorted(_ROUTERS))
            raise ValueError(
                f"scoring_func={short(self.scoring_func)} with topk_method={short(self.topk_method)} is not "
                f"supported; supported: {known}"
            )

    @classmethod
    def from_hf(cls, source: str | Path | dict[str, Any]) -> ModelConfig:
        """Reads a Hugging Face config.json (a file, a directory that holds one, or the parsed dict).

        Raises ValueError naming the key, its value and what is supported, if the model cannot be computed exactly.
        """
        return cls(**read_hf_config(source))


def _require_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name}={value!r} must be a positive integer")
    # What a damaged file claims shall not be worked through.
    if value > (largest := _LARGEST.get(name, _LARGEST_SIZE)):
        raise ValueError(f"{name}={value} is more than any model has ({largest} is allowed)")


@dataclass(frozen=True, slots=True)
@checked
class EngineConfig:
    """How to run a model.

    model: alias, directory, GGUF file or hub id (org/name; org/name:Q4_K_M of several GGUF quantisations)
    expert_format: packed form of routed experts; "native": the checkpoint's own; "auto": its own where that has about
    4 bits, otherwise int4_g32
    dense_format: packed form of all other matrices; "native": the checkpoint's own; "auto": for quantised GGUF files
    their own, otherwise int8 · cache_dtype: latent cache; "fp8" takes 0.57 of bf16's bytes
    max_context: tokens per request (None: the model's, at most 32768) · max_num_requests: that run together
    max_batch_tokens: tokens per step, so also the prefill chunk · max_mixed_tokens: of these, how many may be prompts
    while other requests generate, which wait for them · block_size: tokens per cache block
    prefix_caching: keep what was computed and use it again for requests that begin alike
    prefix_disk_gib: keep it on disk as well, up to so many GiB in all, for the next start and for other processes
    (0: do not) · prefix_dir: where (None: prefix in the directory of MOEJET_CACHE)
    prefix_min_tokens: shorter contexts do not go to disk
    cache_tokens: capacity of the latent cache (None: max_context, or 8192 if that is more)
    packed_cache: keep packed weights on disk for the next start ("auto": if they are large; "verify": compare checksums
    on loading; MOEJET_CACHE says where) · num_threads: CPU workers (None: physical cores that this process may use)
    deterministic: a request's tokens depend on nothing but itself, its parameters and its seed: not on what runs beside
    it, how its prompt is cut, or what was found in the cache. Slower prompts: kernels are those of AVX-512 at most, and
    attention keeps one form · isa: "auto" or the instruction set to use
    arithmetic: what AMX tiles multiply int4_g32 and int8 weights in; "int8" is faster and less exact (activations
    share a scale per 128 inputs), other instruction sets compute these formats with int8 activations either way
    device: "auto" is "cuda" where torch and Triton see a GPU and no other option asks for the CPU, else "cpu"
    ("simulated", for tests: the GPU's path over CPU tensors and torch's references) · vram_gib: GPU memory to use at
    most (None: what is free) · gpu_experts: routed experts, of all layers together, that live on the GPU (None: as many
    as fit); the others live in RAM and the CPU computes them
    expert_cache: of those in RAM, how many may have a copy on the GPU as well, of all layers together: those that are
    used most, exchanged while the model runs ("auto": half of the memory that is left for experts, or what gpu_experts
    leaves; none in fp32). GPU and CPU round differently, so tokens may then depend on what was computed before
    stream_prefill_tokens: steps with prompts of at least so many tokens copy the experts in RAM to the GPU, layer by
    layer, and compute all of them there ("auto": where that is faster, as measured while loading, but not experts in
    fp32, which the GPU has as int8; 0: never)
    seed: base of requests that bring none of their own
    show_progress: a bar while loading (None: if stderr is a terminal)
    """

    model: str
    revision: str | None = None
    expert_format: ExpertFormat = "auto"
    dense_format: DenseFormat = "auto"
    cache_dtype: CacheDtype = "bf16"
    max_context: int | None = None
    max_num_requests: int = 64
    max_batch_tokens: int = 2048
    max_mixed_tokens: int = 256
    prefix_caching: bool = True
    prefix_disk_gib: float = 0.0
    prefix_dir: str | Path | None = None
    prefix_min_tokens: int = 256
    cache_tokens: int | None = None
    block_size: int = 32
    packed_cache: PackedCache = "auto"
    num_threads: int | None = None
    deterministic: bool = False
    isa: str = "auto"
    arithmetic: Arithmetic = "bf16"
    device: str = "auto"
    vram_gib: float | None = None
    gpu_experts: int | None = None
    expert_cache: int | Literal["auto"] = 0
    stream_prefill_tokens: int | Literal["auto"] = "auto"
    seed: int | None = None
    show_progress: bool | None = None

    def for_model(self, model: ModelConfig) -> EngineConfig:
        """This configuration with the packed formats that "auto" and "native" mean for a checkpoint.

        "native" stays for GGUF files: their matrices have formats of their own (`expert_formats_of`,
        `dense_formats_of`).
        """
        experts, dense = self.expert_format, self.dense_format
        if model.quantization == "gguf":
            experts_quantised = any("bf16" not in formats for formats in model.expert_formats)
            dense_quantised = any(format != "bf16" for _, format in model.dense_formats)
            native: ExpertFormat = "native" if experts_quantised else "bf16"
            native_dense: DenseFormat = "native" if dense_quantised else "bf16"
        else:
            experts_quantised = dense_quantised = False
            native = _NATIVE_FORMATS[model.quantization]
            native_dense = _NATIVE_DENSE[model.quantization]
        if experts in ("auto", "native"):
            experts = native if experts_quantised or experts == "native" else "int4_g32"
        if dense in ("auto", "native"):
            dense = native_dense if dense_quantised or dense == "native" else "int8"
        return replace(self, expert_format=experts, dense_format=dense)

    def expert_formats_of(self, model: ModelConfig) -> tuple[tuple[str, str], ...]:
        """(gate and up, down) of every MoE layer, once `for_model` has decided."""
        if self.expert_format == "native":
            return model.expert_formats
        return ((self.expert_format, self.expert_format),) * model.num_moe_layers

    def dense_formats_of(self, model: ModelConfig) -> tuple[str, dict[str, str]]:
        """(the format of dense matrices, that of those with one of their own by name), once `for_model` has decided."""
        if self.dense_format == "native":
            return "int8", dict(model.dense_formats)
        return self.dense_format, {}

    @classmethod
    def create(cls, **options: Any) -> EngineConfig:
        """Builds the configuration; an unknown option raises ValueError with the nearest known name."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                hint = near_miss(name, known) or f"; known: {', '.join(known)}"
                raise ValueError(f"unknown engine option {name!r}{hint}")
        return cls(**options)

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError(f"model={self.model!r} must be an alias, a directory or a hub id")
        require_choice("isa", self.isa, ("auto", *ISAS, "amx_emulated"))
        for name in (
            *("max_num_requests", "max_batch_tokens", "max_mixed_tokens", "block_size"),
            "prefix_min_tokens",
        ):
            _require_positive(name, getattr(self, name))
        require_choice("device", self.device, DEVICES)
        self._check_prefix_disk()
        self._check_vram()
        for name in ("max_context", "cache_tokens", "num_threads"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if self.deterministic and self.isa not in ("auto", *INVARIANT_ISAS):
            raise ValueError(
                f"isa={self.isa!r} cannot be deterministic: it chooses its arithmetic by the number "
                f"of rows; use one of {', '.join(INVARIANT_ISAS)}"
            )

    def _check_prefix_disk(self) -> None:
        gib, where = self.prefix_disk_gib, self.prefix_dir
        require_number("prefix_disk_gib", gib, 0, hint="GiB; 0: nothing goes to disk")
        if where is not None and (not str(where) or "\0" in str(where)):
            raise ValueError(f"prefix_dir={where!r} must be a directory")
        if gib and not self.prefix_caching:
            raise ValueError(f"prefix_disk_gib={gib!r} needs prefix_caching=True")

    def _check_vram(self) -> None:
        require_number("vram_gib", self.vram_gib, above=0, hint="GiB", or_none=True)
        require_int("gpu_experts", self.gpu_experts, 0, or_none=True)
        if self.expert_cache != "auto":
            require_int("expert_cache", self.expert_cache, 0, hint="experts, or 'auto'")
        if (tokens := self.stream_prefill_tokens) != "auto":
            require_int("stream_prefill_tokens", tokens, 0, hint="or 'auto'; 0: never")
