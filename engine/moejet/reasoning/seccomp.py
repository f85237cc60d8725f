"""The system calls that a confined Python program may make, as a filter program for the kernel.

An allow-list: memory, clocks, its own signals, and `write` to the two output pipes. Everything else, and so every way
to files, sockets, processes and other programs' memory, fails with EPERM; another architecture's calls end the process.
The filter is classic BPF over `struct seccomp_data` {int nr; u32 arch; u64 ip; u64 args[6]}, see seccomp(2).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW = 0x7FFF0000
DENY = 0x00050000 | 1  # SECCOMP_RET_ERRNO | EPERM
KILL = 0x80000000
NR_OFFSET, ARCH_OFFSET, ARGS_OFFSET = 0, 4, 16
PROT_EXEC = 4
X32_BIT = 0x40000000

# name: (number on x86_64, number on aarch64 or None)
SYSCALLS: dict[str, tuple[int, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "set_robust_list": (273, 99),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "rseq": (334, 293),
}


@dataclass(frozen=True)
class Architecture:
    audit_value: int  # AUDIT_ARCH_*
    column: int  # of SYSCALLS


ARCHITECTURES = {
    "x86_64": Architecture(0xC000003E, 0),
    "aarch64": Architecture(0xC00000B7, 1),
}


def filter_program(machine: str, *, may_read_stdin: bool = False) -> bytes | None:
    """An array of struct sock_filter for `machine` (platform.machine()), or None where its calls are not known here."""
    architecture = ARCHITECTURES.get(machine)
    if architecture is None:
        return None
    numbers = {
        name: number
        for name, columns in SYSCALLS.items()
        if (number := columns[architecture.column]) is not None
    }
    code = [
        _instruction(LOAD, ARCH_OFFSET),
        _instruction(JUMP_EQUAL, architecture.audit_value, 1, 0),
        _instruction(RETURN, KILL),
        _instruction(LOAD, NR_OFFSET),
    ]
    if machine == "x86_64":
        code += [_instruction(JUMP_AT_LEAST, X32_BIT, 0, 1), _instruction(RETURN, KILL)]
    code += _if_first_argument(numbers.pop("write"), (1, 2))
    code += _if_first_argument(numbers.pop("read"), (0,) if may_read_stdin else ())
    for name in ("mmap", "mprotect"):
        code += _unless_executable(numbers.pop(name))
    for number in numbers.values():
        code += [_instruction(JUMP_EQUAL, number, 0, 1), _instruction(RETURN, ALLOW)]
    code.append(_instruction(RETURN, DENY))
    return b"".join(code)


def _instruction(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, k)


def _low_word(argument: int) -> int:
    return ARGS_OFFSET + 8 * argument  # both architectures are little-endian


def _if_first_argument(number: int, values: tuple[int, ...]) -> list[bytes]:
    """Allows call `number` where its first argument, an int, is one of `values`."""
    body = [_instruction(LOAD, _low_word(0))]
    for value in values:
        body += [_instruction(JUMP_EQUAL, value, 0, 1), _instruction(RETURN, ALLOW)]
    body.append(_instruction(RETURN, DENY))
    return [_instruction(JUMP_EQUAL, number, 0, len(body)), *body]


def _unless_executable(number: int) -> list[bytes]:
    """Allows call `number` unless its third argument, the protection, has PROT_EXEC."""
    body = [
        _instruction(LOAD, _low_word(2)),
        _instruction(JUMP_ANY_BIT, PROT_EXEC, 0, 1),
        _instruction(RETURN, DENY),
        _instruction(RETURN, ALLOW),
    ]
    return [_instruction(JUMP_EQUAL, number, 0, len(body)), *body]
