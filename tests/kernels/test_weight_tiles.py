"""The PTX that makes weights of codes, executed here instruction by instruction: the interpreter has no PTX."""

import re

import pytest
import torch

pytest.importorskip("triton")

from moejet.kernels import weight_tiles

MASK = 0xFFFFFFFF


def run(asm: str, word: int, outputs: int) -> list[int]:
    """Executes a block of 32-bit PTX whose one input follows its outputs."""
    registers = {f"${outputs}": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in re.findall(r"^(\w[\w.]*) (.+);$", asm, re.MULTILINE):
        name, operands = line[0], line[1].split(", ")
        args = [value(operand) for operand in operands[1:]]
        registers[operands[0]] = INSTRUCTIONS[name](*args) & MASK
    return [registers[f"${i}"] for i in range(outputs)]


def prmt(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    chosen = [selector >> 4 * i & 15 for i in range(4)]
    assert max(chosen) < 8  # from 8 on, the sign is repeated
    return int.from_bytes(bytes(source[i] for i in chosen), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    assert table == (0xF0 & 0xCC) | 0xAA
    return (a & b) | c


def fma_bf16x2(a: int, b: int, c: int) -> int:
    x, y, z = (halves(word) for word in (a, b, c))
    exact = x * y + z
    rounded = exact.bfloat16()
    assert torch.equal(rounded.double(), exact)  # so that the order of roundings is no question
    low, high = rounded.view(torch.int16).tolist()
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": fma_bf16x2,
}


def halves(word: int) -> torch.Tensor:
    """The two bf16 in a register, the lower first, as fp64."""
    parts = [word & 0xFFFF, word >> 16]
    signed = [part - 0x10000 if part & 0x8000 else part for part in parts]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).double()


def words() -> list[bytes]:
    """Every byte in each of the four places, beside others."""
    return [bytes((b, 255 - b, b ^ 0x55, b * 7 & 255)) for b in range(256)]


def values(asm: str, codes: bytes, outputs: int) -> torch.Tensor:
    registers = run(asm, int.from_bytes(codes, "little"), outputs)
    return torch.cat([halves(register) for register in registers])


def test_fp8():
    for codes in words():
        finite = bytes(code - 1 if code & 127 == 127 else code for code in codes)
        expected = torch.tensor(list(finite), dtype=torch.uint8).view(torch.float8_e4m3fn)
        assert torch.equal(values(weight_tiles.FP8_VALUES.value, finite, 2), expected.double())


def test_int8():
    for codes in words():
        got = values(weight_tiles.INT8_VALUES.value, codes, 2) * weight_tiles.INT8_RESULT.value
        assert torch.equal(
            got, torch.tensor(list(codes), dtype=torch.uint8).view(torch.int8).double()
        )


def test_int4():
    for codes in words():
        got = values(weight_tiles.INT4_CODES.value, codes, 4)
        expected = torch.tensor([*(code & 15 for code in codes), *(code >> 4 for code in codes)])
        assert torch.equal(got[:4] * 2.0**133, expected[:4].double())
        assert torch.equal(got[4:] * 2.0**129, expected[4:].double())


@pytest.mark.parametrize("exponent", [-105, -20, 0, 17])
def test_int4_scales(exponent):
    """Factors and offsets are exact in bf16, so the one rounding is that of the weight."""
    scale = torch.tensor([1.0, 1.3, -1.9]).bfloat16().double() * 2.0**exponent
    offset = scale * weight_tiles.INT4_OFFSET.value
    for constant, place in ((weight_tiles.INT4_LOW, 133), (weight_tiles.INT4_HIGH, 129)):
        factor = scale * constant.value
        for exact in (factor, offset):
            assert torch.equal(exact.bfloat16().double(), exact)
        for code in range(16):
            got = code * 2.0**-place * factor + offset
            assert torch.equal(got * weight_tiles.INT4_RESULT.value, (code - 8) * scale)
