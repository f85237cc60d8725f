"""Measured ceilings: every kind gives a figure or a reason, and figures hang together."""

import json
import math
import os

import pytest

from moejet import _C, ceilings
from moejet.cli import bench_ceilings
from moejet.config import ARITHMETICS
from moejet.experts.cpu_experts import create_pool

SECONDS = 0.02
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def pool():
    cpus = sorted(os.sched_getaffinity(0))
    made = _C.ThreadPool(cpus[:2]) if len(cpus) > 1 else _C.ThreadPool([0, 1], pin=False)
    yield made
    made.close()


def test_every_ceiling_has_a_figure_or_a_reason(pool):
    measured = ceilings.measure_ceilings(pool, seconds=SECONDS, num_bytes=32 * MEGABYTE)
    names = [ceilings.DRAM_READ, *ceilings.arithmetic_names()]
    assert [(c.name, c.threads) for c in measured] == [(n, t) for t in (1, 2) for n in names]
    for ceiling in measured:
        assert json.loads(json.dumps(ceiling.as_dict())) == ceiling.as_dict()
        if ceiling.reason:
            assert (ceiling.value, ceiling.low, ceiling.high, ceiling.variant) == (None,) * 4
            continue
        assert 0 < ceiling.low <= ceiling.value <= ceiling.high < math.inf
        assert ceiling.variants[ceiling.variant] == ceiling.value
        assert ceiling.unit == ("GB/s" if ceiling.name == "dram_read" else ceiling.unit)


def test_what_the_processor_lacks_is_named(pool):
    features = _C.cpu_info()["features"]
    isas = _C.cpu_info()["isas"]
    known = _C.arithmetic_ceilings()
    assert list(known) == ceilings.arithmetic_names()
    for name, state in known.items():
        isa = name.split("_")[0]
        assert state["variants"]
        if not isas[isa]["usable"]:
            assert state["reason"] == isas[isa]["reason"]
            with pytest.raises(ValueError, match="cannot be measured here"):
                _C.measure_arithmetic(name, state["variants"][0], SECONDS, pool)
        elif name != "avx512_bf16_dot" and (name != "amx_int8" or "amx_int8" in features):
            assert state["reason"] == ""


def test_no_figure_is_beyond_any_processor(pool):
    """64 multiply-adds of fp32 per cycle and thread (int8: four times as many), 2048 of int8 in tiles."""
    meter = ceilings.Meter(pool)
    for name in ceilings.arithmetic_names():
        per_cycle = 1024 * 2 if name.startswith("amx") else 64 * 4
        value = meter.arithmetic(name, SECONDS).value
        assert value is None or 1e-4 < value < 2 * per_cycle * 6e9 / 1e12 * pool.num_threads


def test_the_best_variant_is_kept(pool):
    meter = ceilings.Meter(pool, num_bytes=8 * MEGABYTE)
    first = meter.read(SECONDS)
    again = meter.read(SECONDS)
    assert again.variant == first.variant
    assert again.variants.keys() == first.variants.keys()
    with pytest.raises(ValueError, match="no ceiling: use one of amx_bf16"):
        meter.arithmetic("avx9000")


@pytest.mark.parametrize("num_bytes", [1, 5000, 3 * MEGABYTE + 17, 130 * MEGABYTE])
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16", "amx"])
def test_reads_of_any_size(pool, num_bytes, isa, usable_isa):
    probe = _C.ReadProbe(num_bytes, pool)
    assert num_bytes <= probe.nbytes <= num_bytes + 2 * 30 * MEGABYTE
    for streams in (1, 2, 4, 8):
        for prefetch in (0, 4096):
            samples = probe.measure(streams, prefetch, 0.001, pool, usable_isa(isa))
            assert len(samples) >= 3
            assert min(samples) > 0


def test_wrong_arguments_are_refused(pool):
    probe = _C.ReadProbe(MEGABYTE, pool)
    single = create_pool(1)
    name, state = next((n, s) for n, s in _C.arithmetic_ceilings().items())
    for call, message in (
        (lambda: _C.ReadProbe(0, pool), "num_bytes=0"),
        (lambda: probe.measure(3, 0, SECONDS, pool), "num_streams=3"),
        (lambda: probe.measure(16, 0, SECONDS, pool), "num_streams=16"),
        (lambda: probe.measure(1, -1, SECONDS, pool), "prefetch_bytes=-1"),
        (lambda: probe.measure(1, 0, 0.0, pool), "seconds=0"),
        (lambda: probe.measure(1, 0, math.nan, pool), "seconds=nan"),
        (lambda: probe.measure(1, 0, SECONDS, single), "pool has 1 threads"),
        (lambda: probe.measure(1, 0, SECONDS, pool, "avx3"), "avx3"),
        (lambda: _C.measure_arithmetic("x", "", SECONDS, pool), "name='x' is no ceiling"),
        (lambda: _C.measure_arithmetic(name, "7 sums", SECONDS, pool), "variant='7 sums'"),
        (lambda: _C.measure_arithmetic(name, state["variants"][0], -1.0, pool), "seconds=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    single.close()


def test_each_kernel_has_its_bound():
    names = ceilings.arithmetic_names()
    for isa in ("avx2", "avx512", "avx512_bf16", "amx"):
        for weight_format in ("int4_g32", "int8", "fp8", "bf16"):
            for tiles in ARITHMETICS:
                arithmetic = ceilings.arithmetic_of(isa, weight_format, tiles)
                assert ceilings.bounding_ceiling(isa, arithmetic) in names
    for tiles, integers in (("bf16", "amx_bf16"), ("int8", "amx_int8")):
        arithmetic = ceilings.arithmetic_of("amx", "int4_g32", tiles)
        assert ceilings.bounding_ceiling("amx", arithmetic) == integers
        arithmetic = ceilings.arithmetic_of("amx", "bf16", tiles)
        assert ceilings.bounding_ceiling("amx", arithmetic) == "amx_bf16"
        assert ceilings.arithmetic_of("avx512", "int4_g32", tiles) == "int8"
    assert ceilings.bounding_ceiling("scalar", "int8") is None


def test_the_buffer_fits_into_memory(monkeypatch):
    monkeypatch.setattr(ceilings.topology, "available_bytes", lambda: 400 * MEGABYTE)
    assert ceilings.read_buffer_bytes() == 100 * MEGABYTE
    monkeypatch.setattr(ceilings.topology, "available_bytes", lambda: None)
    for caches, expected in ((None, 512), (32, 512), (480, 3840), (1152, 4096)):
        monkeypatch.setattr(
            ceilings.topology, "all_caches_bytes", lambda cpus, mb=caches: mb and mb * MEGABYTE
        )
        assert ceilings.read_buffer_bytes() == expected * MEGABYTE


def test_table_has_a_column_per_thread_count():
    some = [
        ceilings.Ceiling("dram_read", "GB/s", 1, 12.34, 11.0, 13.0, "1 stream"),
        ceilings.Ceiling("amx_bf16", "TFLOP/s", 1, reason="needs amx_tile"),
        ceilings.Ceiling("dram_read", "GB/s", 8, 98.76, 11.0, 13.0, "4 streams"),
        ceilings.Ceiling("amx_bf16", "TFLOP/s", 8, reason="needs amx_tile"),
    ]
    lines = bench_ceilings.render(some).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["ceiling", "1 thread", "8 threads", "unit", "best way"]
    assert cells[2] == ["dram_read", "12.3", "98.8", "GB/s", "4 streams"]
    assert cells[3] == ["amx_bf16", "-", "-", "TFLOP/s", ""]
