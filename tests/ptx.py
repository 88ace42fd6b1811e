"""A warp that runs the few PTX instructions of `rpa.backends.pallas_gpu.rows`, on a machine without a GPU.

32 lanes in step, branches taken by all or none. Integers are Python's, wrapped to 32 bits where they are stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

LANES = np.arange(32)
COMPARE = {
    "gt": np.greater,
    "ge": np.greater_equal,
    "le": np.less_equal,
    "lt": np.less,
    "eq": np.equal,
    "ne": np.not_equal,
}
BINARY: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "mul": np.multiply,
}


def lines_of(text: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, declarations left out, and where each label stands."""
    code, labels = [], {}
    text = re.sub(r"\.reg[^;]*;", "", text.strip().strip("{}"))
    for part in re.split(r"[;\n]", re.sub(r"(\w+):", r"\1:;", text)):
        part = part.strip()
        if part.endswith(":"):
            labels[part[:-1]] = len(code)
        elif part:
            code.append(part)
    return code, labels


def run(text: str, inputs: Mapping[str, int], memory: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    """The registers after the last instruction, [32] each.

    Args:
        inputs: the operands that are read, by name ("$5"). memory: int32 arrays by address; what lies outside them is
            an error to read.
    """
    code, labels = lines_of(text)
    registers = {name: np.full(32, value, np.int64) for name, value in inputs.items()}
    registers["%laneid"] = LANES.astype(np.int64)

    def value(operand: str) -> np.ndarray:
        return registers[operand] if operand in registers else np.full(32, int(operand, 0), np.int64)

    def load(operand: str, active: np.ndarray) -> np.ndarray:
        base, _, offset = operand.strip("[]").partition("+")
        found = np.zeros(32, np.int64)
        for lane in np.flatnonzero(active):
            address = int(registers[base][lane]) + int(offset or 0)
            start = max(s for s in memory if s <= address)
            word, rest = divmod(address - start, 4)
            assert rest == 0
            assert word < len(memory[start]), f"lane {lane} reads past an array"
            found[lane] = memory[start][word]
        return found

    at = 0
    for _ in range(100_000):
        if at >= len(code):
            return registers
        line, active = code[at], np.ones(32, bool)
        at += 1
        if line.startswith("@p "):
            line, active = line[3:], registers["p"].astype(bool)
        name, _, rest = line.partition(" ")
        operands = [x.strip() for x in rest.split(",")]
        kind = name.split(".")
        if kind[0] == "bra":
            assert active.all() or not active.any(), "lanes part"
            at = labels[operands[0]] if active.all() else at
            continue
        if kind[0] == "ld":
            result = load(operands[1], active)
        elif kind[0] == "mov":
            result = value(operands[1])
        elif kind[0] == "setp":
            result = COMPARE[kind[1]](value(operands[1]), value(operands[2]))
            result = result & registers[operands[3]].astype(bool) if kind[2] == "and" else result
        elif kind[0] == "vote":
            result = np.full(32, sum(1 << int(lane) for lane in np.flatnonzero(registers[operands[1]])), np.int64)
        elif kind[0] == "brev":
            result = np.asarray([int(f"{int(x) & 0xFFFFFFFF:032b}"[::-1], 2) for x in value(operands[1])])
        elif kind[:2] == ["bfind", "shiftamt"]:
            result = np.asarray([32 - int(x).bit_length() if x else 0xFFFFFFFF for x in value(operands[1])])
        elif kind[0] == "redux":
            result = np.full(32, value(operands[1]).max())
        else:
            result = BINARY[kind[0]](value(operands[1]), value(operands[2]))
        wide = kind[-1] == "s64" or "wide" in kind or kind[0] in ("vote", "brev", "bfind", "setp")
        result = np.asarray(result, np.int64)
        result = result if wide else (result + 2**31) % 2**32 - 2**31
        before = registers.get(operands[0], np.zeros(32, np.int64))
        registers[operands[0]] = np.where(active, result, before)
    raise AssertionError("it does not end")
