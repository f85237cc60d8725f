"""bench/gpu_hybrid over a simulated device and tiny shapes: every case, and processes that hang, die or are late."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "bench" / "gpu_hybrid"


@pytest.fixture(scope="module")
def modules():
    """(cases, measure, __main__) of the benchmark, imported as `python bench/gpu_hybrid` does."""
    import importlib
    import importlib.util

    sys.path.insert(0, str(HERE))
    try:
        cases, measure = importlib.import_module("cases"), importlib.import_module("measure")
        spec = importlib.util.spec_from_file_location("gpu_hybrid_main", HERE / "__main__.py")
        main = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(main)
        yield cases, measure, main
    finally:
        sys.path.remove(str(HERE))
        for name in ("cases", "measure"):
            sys.modules.pop(name, None)


def _case(cases, name):
    return next(case for case in cases.CASES if case.name == name)


def _run(modules, name) -> dict[str, dict]:
    cases, measure, _ = modules
    given: dict[str, dict] = {}

    def give(measured, figures):
        json.dumps(figures)
        given[measured] = given.get(measured, {}) | figures
        assert isinstance(measure.summary(figures), str)

    case = _case(cases, name)
    measure.KINDS[case.kind](case, cases.TINY, "simulated", True, give)
    return given


@pytest.mark.parametrize(("name", "resident"), [("lite-half", 40), ("lite-all", 80)])
def test_models(name, resident, modules):
    given = _run(modules, name)
    assert given["load"]["experts_on_gpu"] == resident
    assert given["load"]["routed_experts"] == 80
    assert set(given) >= {"decode", "decode xb2", "pp20"}
    for measured in ("decode", "decode xb2", "pp20"):
        assert given[measured]["wall_ms"] > 0
        assert given[measured]["ceilings"]["dram_read"] > 0
    assert (given["decode"]["cpu_ms"] > 0) == (resident < 80)


def test_slices_are_extrapolated_and_say_so(modules):
    given = _run(modules, "v3-slice")
    assert given["slices"]["layers"] == [2, 4]
    whole = given["decode of 6 layers, extrapolated"]
    few, many = (given[f"decode of {n} layers"]["wall_ms"] for n in (2, 4))
    assert whole["step_ms"] == pytest.approx(many + 2 * (many - few) / 2)
    assert whole["extrapolated"] is True


def test_prompts_that_stream(modules):
    if _case(modules[0], "lite-none-streamed").missing:
        pytest.skip("this version does not stream")
    prompt = _run(modules, "lite-none-streamed")["pp20"]
    assert prompt["streamed_bytes"] > 0
    assert prompt["cpu_ms"] < prompt["wall_ms"]


def test_soak(modules):
    soak = _run(modules, "soak")["soak"]
    assert soak["tokens_equal"] is True
    assert soak["tokens"] == 12
    assert len(soak["medians_ms"]) == 5


def test_kill(modules):
    given = _run(modules, "kill")
    assert [name for name in given if name != "load"] == [
        "failing worker, prompt",
        "failing worker, decode",
        "pool that is gone, decode",
    ]
    assert all(given[name]["in_time"] for name in given if name != "load")
    assert given["failing worker, decode"]["recovers"] is True
    assert "failed as asked" in given["failing worker, prompt"]["error"]


def test_slices_follow_the_memory(modules):
    cases, _, _ = modules
    model = cases.PRESETS["deepseek-v3"]
    layer = 256 * 3 * 7168 * 2048 * 4.5 / 8
    assert cases.slices_of(model, 128 << 30) == (4, 11)
    assert cases.slices_of(model, 1 << 40) == (4, 11)
    few, many = cases.slices_of(model, 40 << 30)
    assert few == 4
    assert (many - 3) * layer < 0.7 * (40 << 30) < (many - 1) * layer + (6 << 30)
    assert cases.slices_of(model, None)[1] > 4
    assert cases.slices_of(model, 1 << 30) == (4, 5)


def test_all_cases_fit_into_a_quarter_of_an_hour(modules):
    cases, _, _ = modules
    assert sum(case.expected_s for case in cases.CASES) < 15 * 60
    assert all(case.expected_s < case.timeout_s for case in cases.CASES)
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)


STAND_IN = """
import json, sys, time
name = sys.argv[sys.argv.index("--child") + 1]
print(json.dumps({"measure": "decode", "wall_ms": 1.5}), flush=True)
if name == "soak":
    time.sleep(60)
if name == "kill":
    sys.exit("out of memory")
print("not a figure")
"""


@pytest.fixture
def runner(modules, tmp_path):
    main = modules[2]
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    command = [sys.executable, str(tmp_path / "stand_in.py")]
    return main.Runner(tmp_path / "out" / "results.jsonl", "simulated", True, command)


def _rows(runner) -> list[dict]:
    return [json.loads(line) for line in runner._results.read_text().splitlines()]


def test_figures_of_processes_that_end_badly_are_kept(modules, runner, capsys):
    cases, _, _ = modules
    lite, soak, kill = (_case(cases, name) for name in ("lite-half", "soak", "kill"))
    assert runner.run(lite, 20) == "ok"
    assert runner.run(soak, 1.5) == "timeout"
    assert runner.run(kill, 20) == "exit code 1: out of memory"
    rows = _rows(runner)
    assert [(row["case"], row["measure"]) for row in rows] == [
        (case.name, measure) for case in (lite, soak, kill) for measure in ("decode", "end")
    ]
    assert all(row["wall_ms"] == 1.5 for row in rows[::2])
    assert [row["status"] for row in rows[1::2]] == ["ok", "timeout", "exit code 1: out of memory"]
    assert {row["bench"] for row in rows} == {"gpu_hybrid"}
    assert rows[3]["seconds"] < 10
    assert "lite-half: decode: 1.50 ms" in capsys.readouterr().out


def test_what_has_ended_well_is_not_run_again(modules, runner, capsys):
    cases, _, main = modules
    lite, kill = (_case(cases, name) for name in ("lite-half", "kill"))
    assert main.run_all(runner, [lite, kill], 10, again=False) == 1
    assert "not done: kill" in capsys.readouterr().err
    before = len(_rows(runner))
    assert main.run_all(runner, [lite, kill], 10, again=False) == 1
    assert "lite-half: done before" in capsys.readouterr().out
    assert len(_rows(runner)) == before + 2
    assert main.run_all(runner, [lite], 10, again=True) == 0
    assert len(_rows(runner)) == before + 4


def test_without_time_or_options_cases_are_left_out(modules, runner):
    cases, _, main = modules
    lite = _case(cases, "lite-half")
    unknown = cases.replace(lite, name="x", options={"of_the_future": 3})
    assert main.run_all(runner, [unknown], 10, again=False) == 0
    assert main.run_all(runner, [lite], 0.1, again=False) == 1
    assert [row["status"] for row in _rows(runner)] == [
        "not in this version: of_the_future",
        "no time: 6 s of 150 are left",
    ]
    assert cases.replace(lite, options={"of_the_future": 0}).missing == []


def test_the_command(modules, tmp_path, capfd):
    main = modules[2]
    file = tmp_path / "results.jsonl"
    options = ["--device", "simulated", "--tiny", "--results", str(file)]
    assert main.main([*options, "--only", "kill"]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["measure"] for row in rows][-1] == "end"
    assert rows[-1]["status"] == "ok"
    assert rows[-1]["gpu"] is None
    assert sum(row.get("in_time", False) for row in rows) == 3
    with pytest.raises(SystemExit):
        main.main([*options, "--only", "nothing"])
    assert "--only 'nothing' is none of lite-half" in capfd.readouterr().err
