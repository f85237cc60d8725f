"""`moejet doctor`: the report is complete, names problems with remedies, and survives breakage."""

import json

import pytest

from moejet.cli import checks

HEALTHY = [
    {
        "cpu_info": {
            "features": ["avx2"],
            "amx_permission": False,
            "isas": {
                "scalar": {"compiled": True, "usable": True, "reason": ""},
                "avx2": {"compiled": True, "usable": True, "reason": ""},
                "amx": {"compiled": True, "usable": False, "reason": "the CPU lacks amx-tile"},
            },
        }
    },
    {"start": ["scalar", "int8"]},
    {"done": ["scalar", "int8"], "error": 0.007},
    {"start": ["avx2", "int8"]},
    {"done": ["avx2", "int8"], "error": 0.007},
]


@pytest.fixture
def selftest(monkeypatch):
    """Sets what the self-test process reports."""

    def report(lines, problem=""):
        monkeypatch.setattr(checks, "run_selftest", lambda: (lines, problem))

    report(HEALTHY)
    return report


def test_this_installation_is_usable(moejet):
    result = moejet("doctor", "--json")
    report = json.loads(result.out)
    assert result.code == 0, report["problems"]
    assert report["usable"] is True
    assert "scalar" in {line["done"][0] for line in report["kernels"]["selftest"]}


def test_json_holds_the_facts(moejet, selftest):
    report = json.loads(moejet("doctor", "--json").out)
    assert report["cpu"]["allowed_logical_cpus"] >= 1
    assert report["memory"]["total_bytes"] > report["memory"]["available_bytes"] > 0
    for package in ("moejet", "python", "torch", "numpy", "safetensors", "kernel", "libc"):
        assert report["versions"][package]
    assert report["kernels"]["isas"]["amx"]["usable"] is False
    assert report["disk"]["free_bytes"] > 0
    assert "devices" in report["gpu"]


def test_report_for_people(moejet, selftest):
    result = moejet("doctor")
    for text in (
        "amx              not usable: the CPU lacks amx-tile",
        "self-test        2 kernels agree with float64",
        "huge pages",
        "AMX permission",
        "moejet can run here: 0 errors",
    ):
        assert text in result.out
    assert result.code == 0
    assert "\x1b" not in result.out


@pytest.mark.parametrize(
    ("lines", "problem", "message"),
    [
        ([], "ImportError: no moejet._C", "failed at loading moejet._C: ImportError"),
        (HEALTHY[:4], "killed by SIGILL", "failed at avx2 with int8 weights: killed by SIGILL"),
        ([*HEALTHY[:-1], {"done": ["avx2", "int8"], "error": 0.4}], "", "(off by 0.4)"),
        ([*HEALTHY[:-1], {"done": ["avx2", "int8"], "error": None}], "", "(not a number)"),
    ],
)
def test_a_broken_extension_is_reported_with_a_remedy(moejet, selftest, lines, problem, message):
    selftest(lines, problem)
    result = moejet("doctor")
    assert result.code == 1
    assert message in result.out
    assert "install moejet again" in result.out
    assert "moejet cannot run here: 1 error" in result.out
    report = json.loads(moejet("doctor", "--json").out)
    assert report["usable"] is False
    assert report["problems"][-1]["remedy"]
    assert "agree with float64" not in result.out


def test_a_crashing_process_is_seen_from_outside(monkeypatch):
    monkeypatch.setattr(checks, "SELFTEST", ("-c", "import os; os.kill(os.getpid(), 4)"))
    assert checks.run_selftest() == ([], "killed by SIGILL")
    monkeypatch.setattr(checks, "SELFTEST", ("-c", "print('{\"start\": 1}'); raise OSError('x')"))
    assert checks.run_selftest() == ([{"start": 1}], "OSError: x")


def test_a_package_that_cannot_be_imported(moejet, selftest, monkeypatch):
    real = checks.import_module

    def broken(name):
        if name == "tokenizers":
            raise ImportError("libfoo.so: undefined symbol\nsecond line")
        return real(name)

    monkeypatch.setattr(checks, "import_module", broken)
    result = moejet("doctor")
    assert result.code == 1
    assert "cannot be imported (ImportError: libfoo.so: undefined symbol)" in result.out
    assert "--force-reinstall tokenizers" in result.out


def test_tight_machine_gives_warnings(selftest, tmp_path):
    files = {
        "proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 6291456 kB",
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/cgroup.controllers": "cpu memory",
        "sys/fs/cgroup/cpu.max": "50000 100000",
        "sys/fs/cgroup/memory.max": str(1 << 30),
        "sys/fs/cgroup/memory.current": str(1 << 29),
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    report = checks.examine(tmp_path)
    warnings = {check.name: check for check in report.checks if check.status == "warning"}
    assert {"quota", "available", "huge pages"} <= set(warnings)
    assert warnings["available"].value == "0.5 GiB"
    assert "transparent_hugepage" in warnings["huge pages"].remedy
    assert report.facts["memory"]["cgroup_limit_bytes"] == 1 << 30


def test_bad_environment_setting(moejet, selftest, monkeypatch):
    monkeypatch.setenv("MOEJET_MAX_ISA", "sse9")
    result = moejet("doctor")
    assert result.code == 1
    assert "MOEJET_MAX_ISA='sse9'" in result.out
    assert "unset MOEJET_MAX_ISA" in result.out
