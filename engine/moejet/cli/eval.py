"""`moejet eval`: strategies on a file of problems, with accuracy, intervals, paired tests and what they cost."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moejet
from moejet.cli import options
from moejet.cli.effort import add_effort_option, template_of, with_level
from moejet.cli.plot import add_plot_option, check_plot, save_accuracy
from moejet.cli.strategies import check_specs, models_by_name
from moejet.cli.terminal import note
from moejet.progress import ProgressLine, bar, duration

if TYPE_CHECKING:
    from moejet.llm import LLM
    from moejet.reasoning.datasets import Problem, Shape
    from moejet.reasoning.eval_runs import Job, ResultsFile
    from moejet.request import SamplingParams

_FORMATS = {"math": "math500"}
_EPILOG = """\
examples:
  moejet eval problems.jsonl --strategy single --strategy vote:8
  moejet eval aime.jsonl --model org/name --format aime -k 16 --out aime.results.jsonl
  moejet eval gsm8k.jsonl --strategy adaptive:16 --limit 100 --report gsm8k.md --plot gsm8k.png

Every further strategy is compared with the first one on the same problems. With --out, each result is on disk as soon
as it is there; --resume goes on with such a file, also with more strategies, samples or problems.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet eval`."""
    parser.usage = "moejet eval [options] FILE"
    parser.epilog = _EPILOG
    parser.add_argument(
        "file",
        metavar="FILE",
        help="problems with their answers, one JSON object per line",
    )
    parser.add_argument(
        "--model",
        default=options.DEFAULT_MODEL,
        metavar="MODEL",
        help="directory, GGUF file or hub id (org/name, org/name:QUANT); default: the embedded tiny reasoner",
    )
    parser.add_argument(
        "--format",
        choices=("auto", "aime", "math", "gsm8k", "gpqa", "plain"),
        default="auto",
        help="names of the fields, and how answers are found and compared (default auto: by the first line)",
    )
    parser.add_argument(
        "--duplicates",
        choices=("error", "drop", "keep"),
        default="error",
        help="what becomes of questions that are there twice (default error)",
    )
    parser.add_argument(
        "--limit", type=options.count, metavar="N", help="the first N problems only"
    )
    group = parser.add_argument_group("strategies")
    group.add_argument(
        "--strategy",
        action="append",
        metavar="SPEC",
        help="such as single (default), vote:16, best:8:logprob, adaptive:16, or auto: what suits "
        "--effort (repeatable)",
    )
    add_effort_option(group)
    group.add_argument(
        "-k",
        "--samples",
        type=options.count,
        default=1,
        metavar="N",
        help="runs per problem (default 1)",
    )
    group.add_argument(
        "--budget-tokens",
        type=options.count,
        metavar="N",
        help="tokens that all branches of a run may generate together",
    )
    group.add_argument(
        "--concurrency",
        type=options.count,
        default=8,
        metavar="N",
        help="runs at a time (default 8)",
    )
    group.add_argument("--system", metavar="TEXT", help="system message before each problem")
    group.add_argument(
        "--instruction",
        metavar="TEXT",
        help="what follows each question (default: by the format, how to state the answer; '': nothing)",
    )
    _add_output_options(parser)
    options.add_sampling_options(parser)
    options.add_engine_options(parser)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=options.output_file,
        metavar="RESULTS.jsonl",
        help="keep each result as it comes",
    )
    group.add_argument("--resume", action="store_true", help="go on with the file of --out")
    group.add_argument(
        "--texts", action="store_true", help="keep the texts of the answers in --out"
    )
    group.add_argument(
        "--json", type=options.output_file, metavar="OUT.json", help="write the report as JSON"
    )
    group.add_argument(
        "--report", type=options.output_file, metavar="OUT.md", help="write the report as Markdown"
    )
    add_plot_option(group, "accuracy against tokens")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    _check(args)
    options.quiet_openmp()
    from moejet.reasoning.datasets import load_problems, shape_of

    shape = shape_of(args.file) if args.format == "auto" else _FORMATS.get(args.format, args.format)
    problems = load_problems(
        args.file,
        shape,
        seed=_seed(args),
        duplicates=args.duplicates,
    )
    with (
        options.open_llm(args.model, options.engine_options(args)) as llm,
        models_by_name(llm, args.model, args) as load,
    ):
        evaluation = Evaluation(llm, problems, shape, args, load)
        found = evaluation.run()
    _write(found, args)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be known to go wrong before anything is loaded."""
    options.sampling_changes(args)
    if args.strategy:
        check_specs(specs_of(args.strategy, args.effort))
    if args.resume and args.out is None:
        raise ValueError("--resume needs --out, the file to go on with")
    if args.texts and args.out is None:
        raise ValueError("--texts needs --out, the file to keep them in")
    check_plot(args.plot)


def _seed(args: argparse.Namespace) -> int:
    return 0 if args.seed is None else int(args.seed)


class Evaluation:
    """Everything that is fixed before the first run."""

    def __init__(
        self,
        llm: "LLM",
        problems: "list[Problem]",
        shape: "Shape",
        args: argparse.Namespace,
        load: "Callable[[str], LLM]",
    ):
        from moejet.reasoning.datasets import answer_key
        from moejet.reasoning.eval_runs import INSTRUCTIONS, jobs_of, prompt_of
        from moejet.reasoning.specs import parse_strategy

        self.llm, self.args, self.shape = llm, args, shape
        self.key = answer_key(shape)
        self.params = replace(
            with_level(options.sampling_params(args, llm), args.effort, args.model, llm), seed=None
        )
        self.strategies = {
            spec: parse_strategy(spec, llm, load=load)
            for spec in specs_of(args.strategy, args.effort)
        }
        self.jobs = jobs_of(problems, args.samples, _seed(args), limit=args.limit)
        self.problems = problems[: args.limit]
        self.instruction = INSTRUCTIONS[shape] if args.instruction is None else args.instruction
        self.template = template_of(args.effort, llm)
        self.prompts = {
            problem.id: prompt_of(
                llm,
                problem,
                instruction=self.instruction,
                system=args.system,
                template=self.template,
            )
            for problem in self.problems
        }
        self.settings = self._settings(problems)

    def _settings(self, problems: "list[Problem]") -> dict[str, Any]:
        """What results depend on; strategies, samples and the number of problems are told apart line by line."""
        from moejet.reasoning.eval_runs import digest_of

        config, args = self.llm.config, self.args
        names = ("model", "revision", "expert_format", "dense_format", "cache_dtype", "arithmetic")
        return {
            "version": moejet.__version__,
            **{name: getattr(config, name) for name in names},
            "max_context": self.llm.max_context,
            "file": Path(args.file).name,
            "problems": digest_of(problems),
            "format": self.shape,
            "system": args.system,
            "instruction": self.instruction,
            "effort": args.effort,
            "budget_tokens": args.budget_tokens,
            "seed": _seed(args),
            **_sampling(self.params),
        }

    def run(self) -> dict[str, Any]:
        """Does what is not in the file yet; returns the report."""
        from moejet.reasoning.eval_report import outcomes_of, report
        from moejet.reasoning.eval_runs import ResultsFile

        results = ResultsFile.open(self.args.out, self.settings, resume=self.args.resume)
        left = {
            spec: [j for j in self.jobs if (spec, j.problem.id, j.sample) not in results.rows]
            for spec in self.strategies
        }
        try:
            self._run_all(left, results)
        except KeyboardInterrupt:
            self._explain_interruption(left, results)
            raise
        finally:
            results.close()
        ids = [problem.id for problem in self.problems]
        outcomes = [
            outcomes_of(spec, results.rows, ids, self.args.samples, self.key)
            for spec in self.strategies
        ]
        return report(outcomes, self.settings, self.llm.model_config)

    def _run_all(self, left: "Mapping[str, list[Job]]", results: "ResultsFile") -> None:
        from moejet.reasoning.budget import Budget
        from moejet.reasoning.eval_runs import Row, run_jobs

        total = len(self.jobs) * len(self.strategies)
        line = ProgressLine(enabled=False if self.args.quiet else None)
        progress = _Progress(total - sum(map(len, left.values())), total, line)
        for spec, jobs in left.items():

            def on_row(row: Row) -> None:
                results.add(row)
                progress.add(row.strategy, row.correct)

            progress.begin(spec)
            try:
                run_jobs(
                    self.llm,
                    spec,
                    self.strategies[spec],
                    jobs,
                    self.prompts,
                    key=self.key,
                    shape=self.shape,
                    template=self.template,
                    params=self.params,
                    budget=Budget(total_tokens=self.args.budget_tokens),
                    concurrency=self.args.concurrency,
                    keep_text=self.args.texts,
                    on_row=on_row,
                )
            finally:
                line.close()

    def _explain_interruption(
        self, left: "Mapping[str, list[Job]]", results: "ResultsFile"
    ) -> None:
        total = sum(map(len, left.values()))
        missing = sum(
            (spec, job.problem.id, job.sample) not in results.rows
            for spec, jobs in left.items()
            for job in jobs
        )
        text = f"stopped with {missing} of {total} runs to do"
        if self.args.out is not None:
            text += f": the same command with --resume goes on with {self.args.out}"
        note(text)


def specs_of(given: Sequence[str] | None, effort: str | None) -> list[str]:
    """The strategies' specifications, `auto` replaced. Raises ValueError for one that is there twice."""
    from moejet.cli.effort import resolve_strategy

    specs = [resolve_strategy(spec.strip(), effort) for spec in given or ["single"]]
    twice = next((spec for spec in specs if specs.count(spec) > 1), None)
    if twice is not None:
        raise ValueError(f"--strategy {twice} is given twice: name each strategy once")
    return specs


def _sampling(params: "SamplingParams") -> dict[str, Any]:
    names = [field for field, _, _ in options.SAMPLING.values() if field != "seed"]
    names += ["stop", "stop_in_reasoning", "ignore_eos", "max_thinking_tokens"]
    return {name: getattr(params, name) for name in names}


class _Progress:
    """The bar: runs done of all strategies, and the accuracy so far of the one that runs."""

    def __init__(self, done: int, total: int, line: ProgressLine):
        self._at_start = self._done = done
        self._total = total
        self._line = line
        self._start_s = time.monotonic()
        self._right: list[bool] = []

    def begin(self, spec: str) -> None:
        self._right.clear()
        self._show(spec)

    def add(self, spec: str, correct: bool) -> None:
        self._done += 1
        self._right.append(correct)
        self._show(spec)

    def _show(self, spec: str) -> None:
        text = f"{bar(self._done / self._total)} {self._done}/{self._total} {spec}"
        if self._right:
            text += f" · {sum(self._right) / len(self._right):.1%} right"
        if (new := self._done - self._at_start) and self._done < self._total:
            per_run = (time.monotonic() - self._start_s) / new
            text += f" · {duration(per_run * (self._total - self._done))} left"
        self._line.update(text)


def _write(found: dict[str, Any], args: argparse.Namespace) -> None:
    from moejet.reasoning import eval_plot, eval_report

    print(eval_report.accuracy_table(found))
    if len(found["strategies"]) > 1:
        print("\n" + eval_report.versus_table(found))
    print("\n" + eval_report.cost_table(found))
    points = eval_plot.points_of(found)
    if len(points) > 1:
        print("\n" + eval_plot.text_plot(points))
    sys.stdout.flush()
    writers: list[tuple[Path | None, Callable[[Path], object]]] = [
        (args.json, lambda path: path.write_text(json.dumps(found, indent=1) + "\n")),
        (args.report, lambda path: path.write_text(eval_report.markdown(found))),
        (args.plot, lambda path: save_accuracy(points, path, f"{args.model} on {args.file}")),
    ]
    for path, write in writers:
        if path is not None:
            write(path)
            if not args.quiet:
                note(f"wrote {path}")
