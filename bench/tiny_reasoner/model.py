"""DeepseekV3ForCausalLM in plain torch, for training and sampling on a CPU.

Shapes: B rows, L positions, D hidden, H heads, T = B * L tokens, E experts, K experts per token.
Names and arithmetic follow the Hugging Face checkpoint; experts are stacked while training
(`w_gate_up` [E, 2I, D], `w_down` [E, D, I]) and written out one by one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The keys of config.json that this model reads, under their Hugging Face names."""

    vocab_size: int = 416
    hidden_size: int = 128
    intermediate_size: int = 256
    moe_intermediate_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.0
    first_k_dense_replace: int = 1
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048

    def to_hf(self, **ids: int) -> dict[str, Any]:
        """The whole config.json."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **asdict(self),
            **ids,
            "hidden_act": "silu",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "rope_interleave": True,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "use_cache": True,
            "torch_dtype": "bfloat16",
            "step_head_pattern": "[A-J](?=[:?])",  # the latest line or check line of every step
        }


class Dispatch(torch.autograd.Function):
    """Rows of x in expert order; the backward is a gather too, which beats a scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        """x [T, D] -> [T * K, D]."""
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Sum each token's K gradients."""
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        return grad.view(-1, ctx.k, grad.shape[1]).sum(1), None, None, None


class Permute(torch.autograd.Function):
    """x[index], where `inverse` undoes `index`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        """Gather."""
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gather back."""
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Moe(nn.Module):
    """Sigmoid router with correction bias and expert groups, routed experts, shared expert."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        e, d, i = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.router = nn.Parameter(torch.randn(e, d) * d**-0.5)
        self.w_gate_up = nn.Parameter(torch.randn(e, 2 * i, d) * d**-0.5)
        self.w_down = nn.Parameter(torch.randn(e, d, i) * i**-0.5)
        self.shared_experts = Mlp(d, i * c.n_shared_experts)
        self.bias: Tensor
        self.load: Tensor
        self.register_buffer("bias", torch.zeros(e))
        self.register_buffer("load", torch.zeros(e), persistent=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """topk_ids [T, K] and topk_weights [T, K]; the bias only takes part in the choice."""
        c = self.c
        scores = torch.sigmoid(x.float() @ self.router.float().T)
        with torch.no_grad():
            choice = (scores + self.bias).view(-1, c.n_group, c.n_routed_experts // c.n_group)
            groups = choice.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
            mask = torch.zeros(choice.shape[:2]).scatter_(1, groups, 1.0).bool()
            choice = choice.masked_fill(~mask[:, :, None], -torch.inf).flatten(1)
            topk_ids = choice.topk(c.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, topk_ids)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return topk_ids, weights * c.routed_scaling_factor

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        topk_ids, topk_weights = self.route(x)
        k = self.c.num_experts_per_tok
        flat = topk_ids.flatten()
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        counts = torch.bincount(flat, minlength=self.c.n_routed_experts)
        if self.training:
            self.load += counts
        rows = Dispatch.apply(x, order, inverse, k).split(counts.tolist())
        outs = []
        for xs, gate_up, down in zip(
            rows, self.w_gate_up.unbind(0), self.w_down.unbind(0), strict=True
        ):
            if len(xs):
                gate, up = (xs @ gate_up.T).chunk(2, dim=-1)
                outs.append((F.silu(gate) * up) @ down.T)
        y = Permute.apply(torch.cat(outs), inverse, order).view(-1, k, x.shape[-1])
        routed = (y * topk_weights[:, :, None].to(y.dtype)).sum(1)
        out: Tensor = routed + self.shared_experts(x)
        return out

    @torch.no_grad()
    def balance(self, rate: float) -> float:
        """Move the bias towards even load (2408.15664); returns max load / mean load."""
        ratio = float(self.load.max() / self.load.mean())
        self.bias += rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()
        return ratio


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Mla(nn.Module):
    """Multi-head latent attention, keys and values expanded (not absorbed)."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        h, nope, rope, v = (
            c.num_attention_heads,
            c.qk_nope_head_dim,
            c.qk_rope_head_dim,
            c.v_head_dim,
        )
        self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
        self.q_a_layernorm = Norm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = nn.Linear(c.q_lora_rank, h * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + rope, bias=False)
        self.kv_a_layernorm = Norm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, h * (nope + v), bias=False)
        self.o_proj = nn.Linear(h * v, c.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: LatentCache | None,
        layer: int,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]; with `cache`, x starts it or is one token that continues it."""
        c = self.c
        b, length, _ = x.shape
        nope, rope = c.qk_nope_head_dim, c.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(b, length, -1, nope + rope).transpose(1, 2)
        q_nope, q_pe = q.split([nope, rope], dim=-1)
        q_pe = rotate(q_pe, cos, sin)
        c_kv, k_pe = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, rope], dim=-1)
        c_kv, k_pe = self.kv_a_layernorm(c_kv), rotate(k_pe, cos, sin)
        if cache is not None:
            latents = cache.extend(layer, torch.cat([c_kv, k_pe], dim=-1))
            if length == 1:
                return self.decode(q_nope, q_pe, latents, mask)
        kv = self.kv_b_proj(c_kv).view(b, length, -1, nope + c.v_head_dim).transpose(1, 2)
        k_nope, v = kv.split([nope, c.v_head_dim], dim=-1)
        k_pe = k_pe[:, None].expand(-1, c.num_attention_heads, -1, -1)
        q = torch.cat([q_nope, q_pe], dim=-1)
        k = torch.cat([k_nope, k_pe], dim=-1)
        out = attend(q, k, v, mask)
        result: Tensor = self.o_proj(out.transpose(1, 2).reshape(b, length, -1))
        return result

    def decode(self, q_nope: Tensor, q_pe: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Absorbed attention of one token per row over latents [B, L, C + R]."""
        c = self.c
        w = self.kv_b_proj.weight.view(c.num_attention_heads, -1, c.kv_lora_rank)
        w_uk, w_uv = w.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        q = torch.cat([torch.einsum("bhn,hnc->bhc", q_nope[:, :, 0], w_uk), q_pe[:, :, 0]], dim=-1)
        scores = q @ latents.transpose(1, 2) * (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], -torch.inf)
        context = scores.softmax(-1) @ latents[..., : c.kv_lora_rank]
        out = torch.einsum("bhc,hvc->bhv", context, w_uv)
        result: Tensor = self.o_proj(out.flatten(1)[:, None])
        return result


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention [B, H, L, *]; without a mask causal, by plain matrix products if that is faster."""
    b, h, length, size = q.shape
    if mask is None and length <= 1024:
        future = torch.full((length, length), -1e9).triu(1).expand(b * h, -1, -1)
        q, k, v = (x.reshape(b * h, length, -1) for x in (q, k, v))
        scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=size**-0.5)
        return (scores.softmax(-1) @ v).view(b, h, length, -1)
    # The fast kernel wants values as wide as keys.
    padded = F.pad(v, (0, size - v.shape[-1]))
    out = F.scaled_dot_product_attention(q, k, padded, attn_mask=mask, is_causal=mask is None)
    return out[..., : v.shape[-1]]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved RoPE: pairs (0, 1), (2, 3), ... of the last dimension turn together."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


class LatentCache:
    """The compressed keys and values, c_kv and k_pe, of every layer for rows of equal length."""

    def __init__(self, c: Config, rows: int, length: int) -> None:
        width = c.kv_lora_rank + c.qk_rope_head_dim
        self.latents = torch.zeros(c.num_hidden_layers, rows, length, width)
        self.filled = 0

    def extend(self, layer: int, new: Tensor) -> Tensor:
        """Store new [B, L, C + R] after what is there and return everything of this layer."""
        end = self.filled + new.shape[1]
        self.latents[layer, :, self.filled : end] = new
        return self.latents[layer, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self.latents = self.latents[:, rows]


class Layer(nn.Module):
    """Pre-norm attention and MLP or MoE."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.index = index
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Mla(c)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        dense = index < c.first_k_dense_replace
        self.mlp: Mlp | Moe = Mlp(c.hidden_size, c.intermediate_size) if dense else Moe(c)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LatentCache | None
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, self.index)
        y = self.post_attention_layernorm(x)
        return x + self.mlp(y.view(-1, y.shape[-1])).view_as(y)


class TinyReasoner(nn.Module):
    """The model with its step head."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.step_head = nn.Linear(c.hidden_size, 1)
        residual_scale = (2 * c.num_hidden_layers) ** -0.5
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "w_down")):
                p.data *= residual_scale
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def moes(self) -> list[Moe]:
        """The MoE blocks."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, Moe)]

    def hidden(
        self,
        ids: Tensor,
        *,
        start: int = 0,
        mask: Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> Tensor:
        """Final-normed hidden states [B, L, D] of ids [B, L] at positions start, start + 1, ..."""
        c = self.c
        half = torch.arange(0, c.qk_rope_head_dim, 2).float() / c.qk_rope_head_dim
        angles = torch.arange(start, start + ids.shape[1])[:, None] * c.rope_theta**-half
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.filled += ids.shape[1]
        out: Tensor = self.norm(x)
        return out

    def export(self, out: Path, **ids: int) -> None:
        """Write config.json and model.safetensors with Hugging Face names."""
        tensors: dict[str, Tensor] = {}
        for name, p in self.state_dict().items():
            if name.startswith(("lm_head", "step_head")):
                tensors[name] = p
            elif name.endswith(".router"):
                tensors["model." + name.removesuffix("router") + "gate.weight"] = p
            elif name.endswith("mlp.bias"):
                # Only differences matter; keep every value above 0, as some implementations
                # give masked groups the score 0.
                key = "model." + name.removesuffix("bias") + "gate.e_score_correction_bias"
                tensors[key] = p - p.min()
            elif name.endswith(("w_gate_up", "w_down")):
                prefix = "model." + name.rpartition(".")[0]
                for e, w in enumerate(p):
                    parts = zip(("gate_proj", "up_proj"), w.chunk(2), strict=True)
                    if name.endswith("w_down"):
                        parts = zip(("down_proj",), (w,), strict=True)
                    for part, value in parts:
                        tensors[f"{prefix}.experts.{e}.{part}.weight"] = value
            else:
                tensors["model." + name] = p
        stored = {
            n: (t.float() if n.endswith("correction_bias") else t.bfloat16()).contiguous().clone()
            for n, t in tensors.items()
        }
        out.mkdir(parents=True, exist_ok=True)
        save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(self.c.to_hf(**ids), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> TinyReasoner:
        """Read an exported directory back, in fp32."""
        raw = json.loads((path / "config.json").read_text())
        c = Config(**{key: raw[key] for key in asdict(Config())})
        model = cls(c)
        tensors = {n: t.float() for n, t in load_file(path / "model.safetensors").items()}
        state: dict[str, Tensor] = {}
        for name in model.state_dict():
            prefix = "model." + name.rpartition(".")[0]
            experts = range(c.n_routed_experts)
            if name.startswith(("lm_head", "step_head")):
                state[name] = tensors[name]
            elif name.endswith(".router"):
                state[name] = tensors[prefix + ".gate.weight"]
            elif name.endswith("mlp.bias"):
                state[name] = tensors[prefix + ".gate.e_score_correction_bias"]
            elif name.endswith("w_down"):
                state[name] = torch.stack(
                    [tensors[f"{prefix}.experts.{e}.down_proj.weight"] for e in experts]
                )
            elif name.endswith("w_gate_up"):
                pairs = [
                    [tensors[f"{prefix}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up")]
                    for e in experts
                ]
                state[name] = torch.stack([torch.cat(pair) for pair in pairs])
            else:
                state[name] = tensors["model." + name]
        model.load_state_dict(state)
        return model.eval()
