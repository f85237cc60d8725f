"""Modules import one another in one direction: no cycles, and no layer knows of those above it.

Imports are read from the sources, those inside functions as well. What stands under `if TYPE_CHECKING:` makes no
cycle, as it is gone when the program runs, but must not point upwards either.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import moejet

PACKAGE = Path(moejet.__file__).parent

# From the bottom to the top; a package stands for all its modules unless one of them is named on its own. A module
# may import those of its own layer and of those below.
LAYERS = {
    "files and facts": """
        _C __init__ atomic_file chat_template config environment expected_errors extension framed_file hf_config
        huge_pages hybrid_statistics json_file latent_layout model_cost presets progress rope_config thinking
        tiktoken_files tokenizer tokenizer_files tool_markers topology validation
    """,
    "requests": """
        batch cache_blocks engine_counters engine_state grammar mailbox output policy prefix_groups prompt_reader
        request request_rules sample_state statistics step_plan ticket watchdog
    """,
    "weights": "weights",
    "hub": "hub resolve",
    "kernels": "kernels",
    "ops": "ops",
    "experts": "experts",
    "layers": "device_batch layers staging",
    "models": "models",
    "runners": "ceilings cpu_program decode_graphs gpu_ceilings gpu_memory gpu_runner plan runner sampler scoring",
    "engine": """
        block_file block_pool choices commit decode_traffic engine gpu_loading group isolation loading prefix_store
        prefix_tier scheduler step_compute step_head
    """,
    "library": "advance branch engine_loop engine_thread hf hf_layer hybrid_timing llm request_stream session timing",
    "reasoning": "reasoning",
    "asynchronous library": "async_llm",
    "server": "server",
    "command line": "cli __main__",
}
# Only tests and benchmarks import moejet.testing.
MAY_IMPORT_TESTING = {"moejet.cli.bench_gpu", "moejet.cli.bench_moe"}


@dataclass(frozen=True)
class Import:
    """kind: "module" (when the importing one is imported), "function" (when it is called) or "type"."""

    source: str
    target: str
    kind: str
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.source} imports {self.target} ({self.kind} level)"


def _modules() -> dict[str, Path]:
    """Name to file of every module; moejet.kernels is a symbolic link."""
    found = {}
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py":
                parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


class _Reader(ast.NodeVisitor):
    """Collects (name, kind, line) of what a file imports."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, int]] = []
        self._kind = "module"

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(alias.name, self._kind, node.lineno) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"line {node.lineno}: relative imports are not used here"
        for alias in node.names:
            self.found.append((f"{node.module}.{alias.name}", self._kind, node.lineno))

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_as("function" if self._kind == "module" else self._kind, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        is_type = ast.unparse(node.test).endswith("TYPE_CHECKING")
        self._visit_as("type" if is_type else self._kind, node.body)
        self._visit_as(self._kind, node.orelse)

    def _visit_as(self, kind: str, nodes: list[ast.stmt]) -> None:
        before, self._kind = self._kind, kind
        for node in nodes:
            self.visit(node)
        self._kind = before


def _imports(modules: dict[str, Path]) -> list[Import]:
    result = set()
    for source, file in modules.items():
        reader = _Reader()
        reader.visit(ast.parse(file.read_text()))
        for name, kind, line in reader.found:
            target = name
            while target and target not in modules:  # of a name, the module that has it
                target = target.rpartition(".")[0]
            if target and target not in (source, "moejet"):
                where = file.relative_to(PACKAGE.parent)
                result.add(Import(source, target, kind, where, line))
    return sorted(result, key=lambda i: (i.source, i.line, i.target))


def _cycles(imports: list[Import]) -> Iterator[list[Import]]:
    """For every import that closes a circle in a walk through all modules, the imports of the circle."""
    after: dict[str, list[Import]] = {}
    for one in imports:
        after.setdefault(one.source, []).append(one)
    done: set[str] = set()

    def walk(module: str, path: list[Import]) -> Iterator[list[Import]]:
        on_path = [one.source for one in path]
        for one in after.get(module, ()):
            if one.target in (*on_path, module):
                yield [*path, one][(*on_path, module).index(one.target) :]
            elif one.target not in done:
                yield from walk(one.target, [*path, one])
        done.add(module)

    for module in sorted(after):
        if module not in done:
            yield from walk(module, [])


def _layer_of() -> dict[str, int]:
    names = list(LAYERS.values())
    return {f"moejet.{m}": rank for rank, text in enumerate(names) for m in text.split()}


def _rank(module: str, ranks: dict[str, int]) -> int | None:
    while module and module not in ranks:
        module = module.rpartition(".")[0]
    return ranks.get(module)


MODULES = _modules()
IMPORTS = _imports(MODULES)


def test_no_module_imports_itself_by_way_of_others():
    cycles = _cycles([one for one in IMPORTS if one.kind != "type"])
    text = "\n\n".join("\n".join(map(str, cycle)) for cycle in cycles)
    assert not text, f"import cycles: move what both need to a module below them\n{text}"


def test_every_module_has_a_layer():
    ranks = _layer_of()
    # moejet.kernels has no file of its own.
    known = {
        *MODULES,
        *(name.rpartition(".")[0] for name in MODULES),
        "moejet.__init__",
        "moejet._C",
    }
    assert not (set(ranks) - known), "LAYERS names what does not exist"
    product = [m for m in MODULES if m != "moejet" and not m.startswith("moejet.testing")]
    missing = [module for module in product if _rank(module, ranks) is None]
    assert not missing, "name the layer of each in LAYERS (tests/test_import_graph.py)"


def test_layers_import_only_what_is_below():
    ranks, names = _layer_of(), list(LAYERS)
    wrong = []
    for one in IMPORTS:
        source, target = _rank(one.source, ranks), _rank(one.target, ranks)
        if source is not None and target is not None and source < target:
            wrong.append(f"{one}: {names[source]!r} is below {names[target]!r}")
    assert not wrong, "move what is needed down, or its user up:\n" + "\n".join(wrong)


def test_the_product_does_not_need_what_is_for_tests():
    wrong = [
        str(one)
        for one in IMPORTS
        if one.target.startswith("moejet.testing")
        and not one.source.startswith("moejet.testing")
        and one.source not in MAY_IMPORT_TESTING
    ]
    assert not wrong, "moejet.testing is for tests and benchmarks:\n" + "\n".join(wrong)


def test_cycles_are_found():
    def one(source: str, target: str) -> Import:
        return Import(source, target, "module", Path("x.py"), 1)

    imports = [one("a", "b"), one("b", "c"), one("c", "b"), one("a", "c")]
    assert list(_cycles(imports)) == [[imports[1], imports[2]]]
    assert list(_cycles(imports[:2] + imports[3:])) == []
