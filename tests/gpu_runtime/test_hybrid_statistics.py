"""The figures of a step from numbers as a bench run would have read them; no GPU, no model."""

import json

import pytest

from moejet.hybrid_statistics import (
    Ceilings,
    HandOver,
    Readings,
    Vram,
    delta,
    derive,
    drift,
    extrapolate,
)

# Ten steps of a model with 58 MoE layers, hidden size 7168, eight experts per token, all in RAM.
HAND_OVER = HandOver(1, 58, 7168, 8, 2, inputs=40_000, results=4)
READINGS = Readings(
    num_tokens=1,
    wall_s=[0.100] * 5 + [0.102] * 5,
    span_s=[0.0995] * 10,
    alone_s=[0.012] * 10,
    cpu_s=0.9,
    cpu_wait_s=0.08,
    cpu_layers=580,
    cpu_experts=4640,
    cpu_bytes=int(115e9),
    handover_s=9e-6,
    hand_over=HAND_OVER,
    asked_experts=4640.0,
)
CEILINGS = Ceilings(dram_read=150.0, host_to_device=50.0, device_to_host=48.0, device_copy=4000.0)


def _changed(**values) -> Readings:
    return Readings(**{name: getattr(READINGS, name) for name in READINGS.__slots__} | values)


def test_a_step_that_the_cpu_bounds():
    figures = derive(READINGS, CEILINGS)
    assert figures["wall_ms"] == pytest.approx(101.0)
    assert (figures["wall_ms_p20"], figures["wall_ms_p80"]) == pytest.approx((100.0, 102.0))
    assert figures["tokens_per_s"] == pytest.approx(1 / 0.101)
    assert figures["cpu_ms"] == pytest.approx(90.0)
    assert figures["cpu_share"] == pytest.approx(90 / 101)
    # The GPU waits for 87.5 of the CPU's 90 ms; in the other 2.5 it works too.
    assert figures["waiting_ms"] == pytest.approx(87.5)
    assert figures["overlap"] == pytest.approx(2.5 / 90)
    assert figures["host_ms"] == pytest.approx(1.5)
    assert figures["cpu_wait_ms"] == pytest.approx(8.0)
    assert figures["cpu_gbps"] == pytest.approx(115 / 0.9)
    assert figures["cpu_of_dram"] == pytest.approx(115 / 0.9 / 150)
    assert figures["handover_us"] == pytest.approx(9.0)
    assert figures["expert_hit_rate"] == 0.0
    assert figures["copy_gbps"] is None
    assert figures["vram"] is None
    json.dumps(figures)


def test_bytes_over_the_bus():
    assert HAND_OVER.to_cpu == 58 * (7168 * 2 + 8 * 8) + 4
    assert HAND_OVER.to_gpu == 58 * 7168 * 2 + 40_000
    figures = derive(
        _changed(streamed_bytes=int(40e9), fetched_bytes=int(10e9), copy_s=1.25), CEILINGS
    )
    assert figures["pcie_to_cpu_bytes"] == HAND_OVER.to_cpu
    assert figures["pcie_to_gpu_bytes"] == HAND_OVER.to_gpu + int(5e9)
    assert figures["streamed_bytes"] == int(4e9)
    assert figures["fetched_bytes"] == int(1e9)
    assert figures["copy_gbps"] == pytest.approx(40.0)
    assert figures["copy_of_ceiling"] == pytest.approx(0.8)
    assert figures["pcie_gbps"] == pytest.approx((HAND_OVER.to_gpu + 5e9) / 0.101 / 1e9)


def test_half_of_the_experts_found_on_the_gpu():
    figures = derive(_changed(cpu_experts=2320, cpu_s=0.45, span_s=[0.0505] * 10), CEILINGS)
    assert figures["expert_hit_rate"] == 0.5
    # Waits 38.5 of 45 ms.
    assert figures["overlap"] == pytest.approx(6.5 / 45)


def test_all_experts_on_the_gpu():
    nothing = HandOver(1, 0, 7168, 8, 2)
    figures = derive(
        _changed(
            cpu_s=0.0,
            cpu_wait_s=0.0,
            cpu_layers=0,
            cpu_experts=0,
            cpu_bytes=0,
            handover_s=None,
            hand_over=nothing,
            span_s=[0.0119] * 10,  # noise: shorter than alone
        ),
        Ceilings(),
    )
    assert figures["overlap"] is None
    assert figures["waiting_ms"] == 0.0
    assert figures["cpu_gbps"] is None
    assert figures["cpu_of_dram"] is None
    assert figures["expert_hit_rate"] == 1.0
    assert figures["handover_us"] is None
    assert figures["pcie_gbps"] is None


def test_shares_stay_shares_in_noise():
    assert derive(_changed(alone_s=[0.2] * 10), CEILINGS)["overlap"] == 1.0
    assert derive(_changed(alone_s=[0.0] * 10), CEILINGS)["overlap"] == 0.0
    assert derive(_changed(asked_experts=None), CEILINGS)["expert_hit_rate"] is None
    single = derive(_changed(wall_s=[0.1], span_s=[0.1], alone_s=[]), CEILINGS)
    assert single["wall_ms_p20"] is None
    assert single["alone_ms"] is None
    assert single["overlap"] is None


def test_memory_beside_the_plan():
    vram = Vram(planned=20 << 30, budget=24 << 30, reserved=18 << 30)
    figures = derive(READINGS, CEILINGS, vram)["vram"]
    assert figures["reserved_of_plan"] == pytest.approx(0.9)
    assert figures["reserved_of_budget"] == pytest.approx(0.75)
    assert figures["device_used"] is None


def test_extrapolation_is_a_line_through_two_slices():
    whole = extrapolate((4, 0.010), (12, 0.026), 61)
    assert whole["layer_ms"] == pytest.approx(2.0)
    assert whole["step_ms"] == pytest.approx(26 + 49 * 2)
    assert whole["tokens_per_s"] == pytest.approx(1000 / 124)
    assert whole["extrapolated"] is True
    assert "t(m) + (L - m)" in whole["formula"]
    for few, many, layers in ((4, 4, 61), (12, 4, 61), (4, 62, 61)):
        with pytest.raises(ValueError, match="must differ and not exceed"):
            extrapolate((few, 0.01), (many, 0.02), layers)


def test_drift_of_a_thousand_steps():
    steady = drift([0.010, 0.011] * 500)
    assert len(steady["medians_ms"]) == 10
    assert steady["drift"] == pytest.approx(0.0)
    assert steady["slowest_ms"] == pytest.approx(11.0)
    assert drift([0.010] * 900 + [0.012] * 100)["drift"] == pytest.approx(0.2)
    # What does not fill a part counts only where it is all there is.
    assert drift([0.010] * 100 + [9.0] * 50)["medians_ms"] == pytest.approx([10.0])
    assert drift([0.010] * 30)["medians_ms"] == pytest.approx([10.0])


def test_counters_between_two_readings():
    before = {"layer_s": [1.0, 2.0], "wait_s": 0.5, "layers": 4}
    after = {"layer_s": [1.5, 2.25], "wait_s": 0.75, "layers": 8}
    assert delta(after, before) == {"layer_s": 0.75, "wait_s": 0.25, "layers": 4}
