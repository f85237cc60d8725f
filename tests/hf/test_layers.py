"""One experts module: layouts, expert parallelism, formats, fp8, and what is refused."""

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import FineGrainedFP8Config
from transformers.activations import ACT2FN
from transformers.integrations.finegrained_fp8 import (
    ALL_FP8_EXPERTS_FUNCTIONS,
    FP8Experts,
    replace_with_fp8_linear,
)
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

import moejet.hf

NUM, HIDDEN, INNER, TOP_K = 6, 72, 40, 3


class Experts(nn.Module):
    """What the decorator of transformers makes of a model's experts, with any layout."""

    def __init__(self, config: Any, *, is_transposed: bool = False, hidden_act: str = "silu"):
        super().__init__()
        self.num_experts = NUM
        generator = torch.Generator().manual_seed(0)

        def random(rows: int, cols: int) -> nn.Parameter:
            w = torch.randn(NUM, rows, cols, generator=generator) / cols**0.5
            return nn.Parameter(w.transpose(1, 2).contiguous() if is_transposed else w)

        self.gate_up_proj = random(2 * INNER, HIDDEN)
        self.down_proj = random(HIDDEN, INNER)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, *args: Tensor) -> Tensor:
        return batched_mm_experts_forward(self, *args)


def interleaved_gate(self: Any, gate_up: Tensor) -> Tensor:
    result: Tensor = self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]
    return result


def make_experts(
    name: str = "moejet",
    *,
    gate: Callable[..., Tensor] | None = None,
    act: str = "silu",
    **flags: Any,
) -> Any:
    body = {} if gate is None else {"_apply_gate": gate}
    kind = use_experts_implementation(type("SomeExperts", (Experts,), body), **flags)
    config = SimpleNamespace(_experts_implementation=name)
    return kind(config, is_transposed=flags.get("is_transposed", False), hidden_act=act)


def routed(tokens: int = 9, hidden: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator)
    ids = [torch.randperm(NUM, generator=generator)[:TOP_K] for _ in range(tokens)]
    return (
        x,
        torch.stack(ids) if ids else torch.empty(0, TOP_K, dtype=torch.int64),
        torch.rand(tokens, TOP_K, generator=generator),
    )


@torch.no_grad()
def both(module: Any, *args: Tensor) -> tuple[Tensor, Tensor]:
    expected = batched_mm_experts_forward(module, *args)
    return module(*args), expected


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("gate", [None, interleaved_gate])
@pytest.mark.parametrize("tokens", [0, 1, 9, 130])
def test_layouts(tokens: int, gate: Callable[..., Tensor] | None, is_transposed: bool) -> None:
    module = make_experts(gate=gate, is_transposed=is_transposed, is_concatenated=gate is None)
    before = {name: w.detach().clone() for name, w in module.named_parameters()}
    actual, expected = both(module, *routed(tokens))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert [*module.parameters()] == []
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], w) for name, w in before.items())


def test_a_clamp_beyond_all_values_is_noticed() -> None:
    def clamped(self: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=1e4)) * up

    with torch.no_grad(), pytest.raises(ValueError, match=r"silu\(gate\) \* up"):
        make_experts(gate=clamped)(*routed())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype: torch.dtype) -> None:
    module = make_experts().to(dtype)
    x, ids, mix = routed()
    reference = copy.deepcopy(module).float()
    with torch.no_grad():
        actual = module(x.to(dtype), ids, mix.to(dtype))
        exact = batched_mm_experts_forward(
            reference, x.to(dtype).float(), ids, mix.to(dtype).float()
        )
    assert actual.dtype == dtype
    assert module._moejet_packed.experts.format == {"b": "bf16", "f": "fp32"}[str(dtype)[6]]
    # One rounding at the end.
    assert (actual.float() - exact).abs().max() < torch.finfo(dtype).eps * exact.abs().max()
    assert module.state_dict()["down_proj"].dtype == dtype


@pytest.mark.parametrize("expert_format", ["int4_g32", "int8", "fp8", "bf16"])
def test_rounding_formats(expert_format: str) -> None:
    moejet.hf.register("rounded", expert_format=expert_format, num_threads=1)
    module = make_experts("rounded")
    rounded = make_experts("eager")
    actual, _ = both(module, *routed())
    packed = module._moejet_packed.experts
    assert packed.format == expert_format
    with torch.no_grad():
        for e in range(NUM):
            gate, up, down = packed.dequantize(e)
            rounded.gate_up_proj[e] = torch.cat((gate, up))
            rounded.down_proj[e] = down
        expected = batched_mm_experts_forward(rounded, *routed())
    assert (actual - expected).norm() < 0.02 * expected.norm()
    with pytest.raises(RuntimeError, match=f"packed as {expert_format}, .*are gone"):
        module.state_dict()
    module.config._experts_implementation = "eager"
    with torch.no_grad(), pytest.raises(RuntimeError, match="are gone"):
        module(*routed())


def test_expert_parallelism_skips_other_ranks_experts() -> None:
    module = make_experts()
    x, ids, mix = routed()
    ids[::2, 1], mix[::2, 1] = NUM, 0.0
    with torch.no_grad(), pytest.raises(ValueError, match="topk_ids"):
        make_experts()(x, ids, mix)
    module._is_expert_parallel = True
    torch.testing.assert_close(*both(module, x, ids, mix), rtol=1e-5, atol=1e-5)


def test_leading_dimensions_and_strides() -> None:
    module = make_experts()
    x, ids, mix = routed(12)
    actual, expected = both(module, x, ids, mix)
    with torch.no_grad():
        strided = module(x.T.contiguous().T, ids.T.contiguous().T, mix.T.contiguous().T)
        shaped = module(x.view(3, 4, -1), ids.view(3, 4, -1), mix.view(3, 4, -1))
    assert torch.equal(actual, strided)
    assert torch.equal(actual, shaped.view(12, -1))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "has_post_expert_norm", True), "a norm follows"),
        (lambda m: setattr(m, "_hf_hook", SimpleNamespace(offload=True)), "device_map"),
        (lambda m: m.to("meta"), "not been loaded"),
        (lambda m: m.double(), "torch.float64"),
        (lambda m: setattr(m, "down_proj", None), "down_proj is a NoneType"),
        (lambda m: setattr(m, "is_transposed", True), "does not fit"),
    ],
)
def test_refusals(change: Callable[[Any], Any], message: str) -> None:
    module = make_experts()
    change(module)
    with torch.no_grad(), pytest.raises(ValueError, match=rf"SomeExperts: moejet .*{message}"):
        module(*routed())
    assert "_moejet_packed" not in module.__dict__


def test_bad_weights_leave_the_layer_as_it_was() -> None:
    moejet.hf.register("rounded", expert_format="int8", num_threads=1)
    module = make_experts("rounded")
    with torch.no_grad():
        module.down_proj[-1, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            module(*routed())
        module.down_proj[-1, 0, 0] = 0.0
        module(*routed())
    assert module.down_proj is None


def test_gradients_are_refused() -> None:
    module = make_experts()
    x, ids, mix = routed()
    for args in ((x.requires_grad_(), ids, mix), (x.detach(), ids, mix.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match=r"SomeExperts: .*no_grad\(\)"):
            module(*args)
        with torch.no_grad():
            module(*args)
        with torch.inference_mode():
            module(*args)
    module(x.detach(), ids, mix)


def test_copies_share_and_pickle_refuses() -> None:
    module = make_experts()
    unpacked = copy.deepcopy(module)
    actual, _ = both(module, *routed())
    twin = copy.deepcopy(module)
    assert twin._moejet_packed is module._moejet_packed
    del module
    with torch.no_grad():
        assert torch.equal(twin(*routed()), actual)
        assert torch.equal(unpacked(*routed()), actual)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(twin._moejet_packed)


class Fp8Experts(FP8Experts):
    """A class of our own: the decorator changes the class it is given."""


use_experts_implementation(Fp8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)


def fp8_module(hidden: int = 200, inner: int = 128, **options: Any) -> Any:
    config = SimpleNamespace(
        _experts_implementation="moejet",
        hidden_size=hidden,
        num_experts=NUM,
        moe_intermediate_size=inner,
        hidden_act="silu",
        swiglu_limit=options.pop("swiglu_limit", None),
    )
    module = Fp8Experts(config, **{"block_size": (128, 128), **options})
    fill_fp8(module)
    return module


@torch.no_grad()
def fill_fp8(module: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for name in ("gate_up_proj", "down_proj"):
        w, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        w.copy_(torch.randn(w.shape, generator=generator).mul_(50))
        scale.copy_(torch.rand(scale.shape, generator=generator) / (50 * w.shape[2] ** 0.5))


def fp8_values(module: Any, name: str) -> Tensor:
    """[E, rows, cols]: codes times the factor of their block, fp32."""
    w, scale = getattr(module, name).float(), getattr(module, f"{name}_scale_inv").float()
    wide = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    return w * wide[:, : w.shape[1], : w.shape[2]]


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize(("hidden", "inner"), [(200, 128), (128, 256)])
def test_fp8_codes_and_scales_are_kept(hidden: int, inner: int, scale_fmt: str) -> None:
    module = fp8_module(hidden, inner, scale_fmt=scale_fmt)
    gate_up, down = fp8_values(module, "gate_up_proj"), fp8_values(module, "down_proj")
    x, ids, mix = routed(9, hidden)
    with torch.no_grad():
        actual = module(x, ids, mix)
    packed = module._moejet_packed.experts
    assert packed.format == "fp8"
    assert [*module.parameters()] == []
    expected = torch.zeros(9, hidden, dtype=torch.float64)
    for e in range(NUM):
        gate, up, w_down = packed.dequantize(e)
        assert torch.equal(torch.cat((gate, up)), gate_up[e])
        assert torch.equal(w_down, down[e])
        tokens, slots = (ids == e).nonzero(as_tuple=True)
        g, u = (x[tokens].double() @ w.double().T for w in gate_up[e].chunk(2))
        y = (g * torch.sigmoid(g) * u) @ down[e].double().T
        expected.index_add_(0, tokens, mix[tokens, slots].double()[:, None] * y)
    assert (actual - expected).norm() < 1e-5 * expected.norm()
    with pytest.raises(RuntimeError, match="are gone"):
        module.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": 96}, "not a multiple of 128"),
        ({"block_size": (64, 64)}, "128 x 128"),
        ({"block_size": None}, "128 x 128"),
        ({"activation_scheme": "static"}, "activation_scheme='static'"),
        ({"swiglu_limit": 7.0}, r"silu\(gate\) \* up"),
        ({"expert_dtype": "fp4"}, "torch.int8"),
    ],
)
def test_fp8_refusals(options: dict[str, Any], message: str) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        fp8_module(**options)(*routed(9, 200))


def test_a_model_with_fp8_experts_generates(tiny_model: Callable[..., nn.Module]) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128}
    quantised = tiny_model(implementation="moejet", **sizes)
    plain = copy.deepcopy(quantised)
    plain.set_experts_implementation("eager")
    replace_with_fp8_linear(
        quantised,
        modules_to_not_convert=["proj", "lm_head"],
        quantization_config=FineGrainedFP8Config(weight_block_size=(128, 128)),
        pre_quantized=True,
    )
    for layer, twin in zip(quantised.model.layers, plain.model.layers, strict=True):
        layer.mlp.experts.to_empty(device="cpu")
        fill_fp8(layer.mlp.experts)
        for name in ("gate_up_proj", "down_proj"):
            getattr(twin.mlp.experts, name).data = fp8_values(layer.mlp.experts, name)
    prompt = torch.tensor([[5, 17, 99, 4]])
    expected = plain.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(quantised.generate(prompt, max_new_tokens=12, do_sample=False), expected)
    assert quantised.model.layers[0].mlp.experts._moejet_packed.experts.format == "fp8"
