"""Runs one program behind the sandbox's closed doors; imported by sandbox_child.py only. Standard library only.

With a list of allowed modules the program also passes a screen over its syntax tree and gets reduced builtins. That is
the sandbox's second layer: it explains what is not wanted in plainer words than EPERM; the kernel's layers protect.
"""

from __future__ import annotations

import _ast as ast
import builtins
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

EXIT_ERROR, EXIT_MEMORY, EXIT_REFUSED, EXIT_UNAVAILABLE = 1, 250, 251, 252

_NAMES = "__import__ __loader__ __spec__ breakpoint compile eval exec globals help locals open vars"
_ATTRIBUTES = """ag_frame builtins cr_frame ctypes f_back f_builtins f_globals f_locals gc gi_frame importlib inspect io
marshal mmap modules os pickle posix shutil signal socket subprocess sys tb_frame tb_next tempfile threading"""
_DUNDERS = """init name doc len str repr eq lt le gt ge hash add sub mul truediv floordiv mod pow neg iter next call
getitem setitem contains enter exit post_init abs bool int float new version"""
FORBIDDEN_NAMES = frozenset(_NAMES.split())
FORBIDDEN_ATTRIBUTES = frozenset(_ATTRIBUTES.split())
COMMON_DUNDERS = frozenset(f"__{name}__" for name in _DUNDERS.split())
_SYS = (
    "stdin stdout stderr exit setrecursionlimit getrecursionlimit maxsize float_info version_info "
    "set_int_max_str_digits"
)


class suppress:
    """contextlib's, without the cost of importing that."""

    def __init__(self, *errors: type[BaseException]):
        self.errors = errors

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, self.errors)


def run(code: str, *, allowed: set[str] | None) -> None:
    """Runs the program and ends the process; `allowed` modules only and reduced builtins, or None for all."""
    status = EXIT_ERROR
    try:
        flags = int(ast.PyCF_ONLY_AST)
        tree: ast.Module = compile(code, "<program>", "exec", flags, dont_inherit=True)
        problems = [] if allowed is None else screen(tree, allowed)
        if problems:
            sys.stderr.write("".join(f"{problem}\n" for problem in problems[:10]))
            status = EXIT_REFUSED
        else:
            scope: dict[str, Any] = {"__name__": "__main__"}
            scope["__builtins__"] = builtins if allowed is None else _reduced_builtins(allowed)
            exec(compile(tree, "<program>", "exec", dont_inherit=True), scope)
            status = 0
    except SystemExit as error:
        status = _exit_status(error.code)
    except MemoryError:
        status = EXIT_MEMORY
    except BaseException as error:
        with suppress(BaseException):
            _print_error(error, code)
    with suppress(BaseException):
        sys.stdout.flush()
    with suppress(BaseException):
        sys.stderr.flush()
    os._exit(status)


def _exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if (code & 0xFF) < EXIT_MEMORY else EXIT_ERROR
    sys.stderr.write(f"{code}\n")
    return EXIT_ERROR


def _print_error(error: BaseException, code: str) -> None:
    """Like Python's own report, but without its files."""
    lines = code.splitlines()
    report = []
    traceback = error.__traceback__
    while traceback is not None:
        frame_code, number = traceback.tb_frame.f_code, traceback.tb_lineno
        if frame_code.co_filename == "<program>":
            text = lines[number - 1].strip() if 0 < number <= len(lines) else ""
            report.append(f"  line {number}, in {frame_code.co_name}\n    {text}\n")
        traceback = traceback.tb_next
    if len(report) > 8:
        report[4:-4] = ["  ...\n"]
    sys.stderr.write("".join(report) + f"{type(error).__name__}: {error}\n")


def _reduced_builtins(allowed: set[str]) -> dict[str, Any]:
    scope = {k: v for k, v in vars(builtins).items() if k not in FORBIDDEN_NAMES}
    stand_in = type(sys)("sys")  # what programs want of sys, without sys.modules
    for name in _SYS.split():
        setattr(stand_in, name, getattr(sys, name))
    stand_in.argv = ["<program>"]  # type: ignore[attr-defined]

    def guarded_import(
        name: str,
        globals: dict[str, Any] | None = None,
        locals: dict[str, Any] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> Any:
        if name == "sys":
            return stand_in
        if name != "_strptime" and (level or name.partition(".")[0] not in allowed):
            raise ImportError(f"module {name!r} may not be imported here")
        return builtins.__import__(name, globals, locals, fromlist, level)

    def guarded_getattr(target: object, name: str, *default: object) -> Any:
        if is_forbidden_attribute(str(name)):
            raise AttributeError(f"attribute {name!r} may not be used here")
        return getattr(target, name, *default)

    return scope | {
        "__import__": guarded_import,
        "getattr": guarded_getattr,
        "exit": sys.exit,
        "quit": sys.exit,
    }


def is_forbidden_attribute(name: str) -> bool:
    return name.strip("_") in FORBIDDEN_ATTRIBUTES or (
        name.startswith("__") and name.endswith("__") and name not in COMMON_DUNDERS
    )


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for field in node._fields:
            value = getattr(node, field, None)
            items = value if isinstance(value, list) else [value]
            waiting += [item for item in items if isinstance(item, ast.AST)]


def screen(tree: ast.AST, allowed: set[str]) -> list[str]:
    """What in a program is not wanted: the lines with unwanted imports, names and attributes."""
    problems = []
    for node in _walk(tree):
        line = f"line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            for name in names:
                if name.partition(".")[0] not in allowed | {"sys"}:
                    problems.append(f"{line}: module {name!r} may not be imported here")
            if isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names]
                problems += [
                    f"{line}: {name!r} may not be imported here"
                    for name in names
                    if is_forbidden_attribute(name)
                ]
        elif isinstance(node, ast.Attribute) and is_forbidden_attribute(node.attr):
            problems.append(f"{line}: attribute {node.attr!r} may not be used here")
        elif isinstance(node, ast.MatchClass):
            names = [name for name in node.kwd_attrs if is_forbidden_attribute(name)]
            problems += [f"{line}: attribute {name!r} may not be used here" for name in names]
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            problems.append(f"{line}: {node.id!r} may not be used here")
    return problems
