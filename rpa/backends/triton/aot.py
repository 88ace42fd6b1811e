"""Ahead-of-time compilation with no GPU: machine code for a chip, and the registers, spills and memory it takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rpa.backends.triton import kernel as kernels
from rpa.backends.triton import plan as planning
from rpa.config import RaggedPageAttentionv2Config
from rpa.signature import Signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int8": "*i8", "float8_e4m3fn": "*fp8e4nv",
    "float8_e5m2": "*fp8e5",
}  # fmt: skip
_SINGLES = ("sinks", "k_scale", "v_scale", "lse", "part_acc", "part_ml")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, bytes spilled a thread, bytes of shared memory a program."""

    registers: int
    spilled: int
    shared: int


def compile_launch(kernel: Any, launch: planning.Launch, signature: Signature, target: str) -> Any:
    """The compiled kernel of one launch; `.asm` holds `cubin` or `hsaco` and every stage before."""
    constants = dict(launch.constants)
    if "COMPUTE" in constants:
        constants["COMPUTE"] = getattr(tl, constants["COMPUTE"])
    pointers = {"queries": POINTERS[signature.q_dtype], "output": POINTERS[signature.q_dtype],
                "kv_pages": POINTERS[signature.kv_dtype]} | dict.fromkeys(_SINGLES, "*fp32")  # fmt: skip
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else pointers.get(n, "*i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants},
    )
    chip = TARGETS[target]
    capability = divmod(int(chip.arch), 10) if chip.backend == "cuda" else None
    options = planning.compiler_options(launch, capability)
    options |= {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=chip, options=options)


def compile_call(signature: Signature, config: RaggedPageAttentionv2Config, target: str) -> dict[str, Resources]:
    """Resources of every launch of a call, by kernel; nothing here needs a GPU."""
    plan = planning.make(signature, config)
    launches: dict[str, tuple[Any, planning.Launch]] = {"attend": (kernels.attend_kernel, plan.attend)}
    if plan.combine:
        launches["combine"] = (kernels.combine_kernel, plan.combine)
    return {
        name: resources(compile_launch(kernel, launch, signature, target), target)
        for name, (kernel, launch) in launches.items()
    }


def resources(compiled: Any, target: str) -> Resources:
    """Read from the machine code itself."""
    shared = int(compiled.metadata.shared)
    if target.startswith("gfx"):
        found = {key: int(n) for key, n in re.findall(r"\.(\w+)_count:\s+(\d+)", compiled.asm["amdgcn"])}
        return Resources(found["vgpr"], 4 * (found["vgpr_spill"] + found["sgpr_spill"]), shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert match, text.stdout
    return Resources(int(match[1]), int(match[2]), shared)
