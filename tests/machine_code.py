"""What the kernels are compiled to that kernels/aot.py has no table of."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import importlib, json, os, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastsmooth.kernels import aot
name, cases = json.load(sys.stdin)
kernel = getattr(importlib.import_module(f"fastsmooth.kernels.{name}"), f"_{name}_kernel")
for arch, types, constants, divisible, options in cases:
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, attrs)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "kernel.cubin")
        open(path, "wb").write(made.asm["cubin"])
        usage = aot.tool("cuobjdump", "-res-usage", path)
        sass = aot.tool("nvdisasm", "-c", "-ndf", path)
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    code = aot.parse(sass, pointers, aot.LIMITS[arch].arguments)
    others = {kind: len(lines) for kind, lines in code.others.items()}
    print(json.dumps([usage, others, aot.widths(code.accesses), sass]))
"""


def machine_code(
    name: str,
    variants: list[tuple[dict[str, str], dict[str, Any]]],
    divisible: list[str],
    **options: Any,
) -> list[tuple[str, str, dict[str, int], dict[str, list[list[int]]], str]]:
    """The kernel _NAME_kernel of kernels/NAME.py, compiled for every architecture in each variant:
    (types of its arguments, pointers first; constants). Those in `divisible` are by 16.

    Gives (which it is, resource usage, barriers, spills and atomics, bits of the loads and stores
    of each pointer, SASS) of each. It is compiled in another process, since the tests' own
    interprets kernels.
    """
    cases = [
        (arch, types, constants, divisible, options)
        for arch, (types, constants) in itertools.product((80, 90, 100), variants)
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([name, cases]),
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        (f"sm_{arch} {types} {constants}", *one)
        for (arch, types, constants, *_), one in zip(cases, found, strict=True)
    ]
