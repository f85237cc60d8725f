"""moejet.reasoning.seccomp: the filter, run by an interpreter of classic BPF, decides as intended on both machines."""

from __future__ import annotations

import struct

import pytest

from moejet.reasoning.seccomp import ALLOW, ARCHITECTURES, DENY, KILL, SYSCALLS, filter_program

FORBIDDEN = {
    "x86_64": {
        "open": 2, "socket": 41, "connect": 42, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62,
        "ptrace": 101, "setuid": 105, "prctl": 157, "mount": 165, "tgkill": 234, "openat": 257, "unshare": 272,
        "prlimit64": 302, "process_vm_readv": 310, "memfd_create": 319, "bpf": 321, "execveat": 322,
        "io_uring_setup": 425, "pidfd_open": 434, "clone3": 435, "openat2": 437,
    },
    "aarch64": {
        "openat": 56, "socket": 198, "connect": 203, "clone": 220, "execve": 221, "kill": 129, "ptrace": 117,
        "setuid": 146, "prctl": 167, "mount": 40, "tgkill": 131, "unshare": 97, "prlimit64": 261,
        "process_vm_readv": 270, "memfd_create": 279, "bpf": 280, "execveat": 281, "io_uring_setup": 425,
        "pidfd_open": 434, "clone3": 435, "openat2": 437,
    },
}  # fmt: skip


def decide(program: bytes, audit: int, nr: int, *args: int) -> int:
    data = struct.pack("<IIQ6Q", nr, audit, 0, *args, *[0] * (6 - len(args)))
    code = [struct.unpack_from("=HBBI", program, 8 * i) for i in range(len(program) // 8)]
    at, accumulator = 0, 0
    while True:
        operation, if_true, if_false, k = code[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif operation == 0x06:
            return int(k)
        else:
            test = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: accumulator & k != 0}
            at += if_true if test[operation] else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("may_read", [False, True])
def test_decisions(machine: str, may_read: bool) -> None:
    program = filter_program(machine, may_read_stdin=may_read)
    assert program is not None
    assert len(program) % 8 == 0
    assert len(program) // 8 < 4096
    here = ARCHITECTURES[machine]
    numbers = {name: columns[here.column] for name, columns in SYSCALLS.items()}
    special = {"write", "read", "mmap", "mprotect"}
    for name, number in numbers.items():
        if name not in special and number is not None:
            assert decide(program, here.audit_value, number) == ALLOW, name
    for name, number in FORBIDDEN[machine].items():
        assert decide(program, here.audit_value, number) == DENY, name
    for name in special:
        assert numbers[name] is not None
    for fd in range(6):
        write = decide(program, here.audit_value, numbers["write"] or 0, fd)
        assert (write == ALLOW) == (fd in (1, 2))
        read = decide(program, here.audit_value, numbers["read"] or 0, fd)
        assert (read == ALLOW) == (may_read and fd == 0)
    for name in ("mmap", "mprotect"):
        for protection in range(8):
            verdict = decide(program, here.audit_value, numbers[name] or 0, 0, 4096, protection)
            assert verdict == (DENY if protection & 4 else ALLOW)
    allowed = {n for n in numbers.values() if n is not None}
    for number in range(600):
        if number not in allowed:
            assert decide(program, here.audit_value, number, 1) == DENY


def test_other_architectures_calls_end_the_process() -> None:
    program = filter_program("x86_64")
    assert program is not None
    assert decide(program, 0x40000003, 4, 1) == KILL  # i386's write
    assert decide(program, ARCHITECTURES["aarch64"].audit_value, 64, 1) == KILL
    assert decide(program, ARCHITECTURES["x86_64"].audit_value, 0x40000001, 1) == KILL  # x32
    assert filter_program("riscv64") is None
