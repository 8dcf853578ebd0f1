"""The Triton kernel, without a GPU: interpreted it agrees with the algebra, and it compiles for the GPUs it is for.

Triton decides at import whether it interprets, so each test has an interpreter process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="this platform has no Triton")

WIDTHS = {192: "bf16", 2880: "bf16", 4096: "bf16", 8192: "fp16"}

COMPILE = """
import json, pathlib, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from steering.engine import triton_kernel
from steering.engine.triton_kernel import FLOATS_PER_WARP, MAX_WARPS, SPARED_AT_ONCE

cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
made = []
for arch in (80, 90):
    for width, dtype in json.loads(sys.argv[1]).items():
        block = triton.next_power_of_2(int(width))
        for kernel in (triton_kernel.decide_kernel, triton_kernel.edit_kernel):
            source = ASTSource(
                fn=kernel,
                signature={
                    "hidden": "*" + dtype, "residual": "*" + dtype, "token_rows": "*i32", "rows": "*fp32",
                    "table": "*fp32", "hidden_stride": "i32", "residual_stride": "i32", "WIDTH": "constexpr",
                    "BLOCK": "constexpr",
                },
                constexprs={"WIDTH": int(width), "BLOCK": block},
            )
            warps = min(MAX_WARPS, max(1, block // FLOATS_PER_WARP))
            code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
            cubin = pathlib.Path(sys.argv[2]) / f"{arch}-{width}.cubin"
            cubin.write_bytes(code.asm["cubin"])
            usage = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True).stdout
            facts = {"arch": arch, "dtype": dtype, "shared": code.metadata.shared, "usage": usage}
            made.append(facts | {"ptx": code.asm["ptx"], "is_writing": kernel is triton_kernel.edit_kernel})
    for ids in ("*i32", "*i64"):
        source = ASTSource(
            fn=triton_kernel.spare_kernel,
            signature={"input_ids": ids, "token_rows": "*i32", "rows": "*fp32", "tokens": "i32", "BLOCK": "constexpr"},
            constexprs={"BLOCK": SPARED_AT_ONCE},
        )
        triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 1})
print(json.dumps(made))
"""


def python(*arguments: str, **environment: str) -> str:
    """Run this interpreter; returns what it printed, fails with what it complained of."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(Path.cwd()), *(path for path in sys.path if path)])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env=clean | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_interpreted_kernel_is_the_algebra() -> None:
    """The cases that the plain torch op is judged by, in every dtype, contiguous and strided, at two widths, whichever
    program of a launch runs first.
    """
    printed = python("-m", "tests.unit.engine.cases", TRITON_INTERPRET="1")
    spared, captured, observed, decided, judged = (int(part.rpartition(":")[2]) for part in printed.split(","))
    assert judged > 100
    assert spared > 500
    assert decided > 50
    assert captured > 50
    assert observed > 50


def test_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """Ahead of time, to machine code for Ampere and Hopper: rounds to nearest, and keeps x and the sum in registers."""
    printed = python("-c", COMPILE, json.dumps(WIDTHS), str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    made = json.loads(printed)
    assert len(made) == 2 * 2 * len(WIDTHS)
    for code in made:
        assert f".target sm_{code['arch']}" in code["ptx"]
        if code["is_writing"]:
            assert f"cvt.rn.{code['dtype'].replace('fp', 'f')}" in code["ptx"]
        assert code["shared"] <= 64, "only the partial sums of each warp are shared"
        assert "LOCAL:0" in code["usage"], "registers were spilled to local memory"
        assert "STACK:0" in code["usage"]
