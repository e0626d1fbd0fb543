"""The machine code of the Triton kernels, compiled and read without a GPU.

    python -m fastsmooth.kernels.aot [--json] [--arch 80 90 100] [--kernel NAME ...]

For each architecture and configuration: compile what a launch would compile, disassemble it, and
print its registers, spills, shared memory and occupancy, the widths of its global accesses, and the
bytes that its hot loop moves a parameter (update) or a column of G (persample_noise) beside the
least possible; for the kernels of per-sample shares, how many of its instructions are of tensor
cores. Nothing runs, and no figure is a time.

How the bytes are counted. The hot loop is the longest loop that accesses the tensors. A trip moves
one tile, BLOCK parameters with their K gradients or COLUMNS columns, and counts as a whole one with
every lane at work.
    masks: in update a block inside its tensor takes a path without masks, the last block of a
        tensor a masked one beside it in the same loop. There the accesses without a predicate are
        the main path, the others the ragged path. In persample_noise every access is masked and all
        are the main path; no row is masked off where B is a power of two.
    inner loops: with more rows than one tile holds, their accesses happen once for each tile of
        rows.
    unrolling: the gradients that a trip of the innermost loop loads must be one tile, or the
        program refuses to count.
    replicas: a tile may have fewer elements of p and m than lanes load in one access. "issued"
        counts what all lanes load, "bytes" at most a tile an access, since the other lanes find the
        element in the same cache lines. One lane stores an element, the others being masked off: it
        counts once in both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from fastsmooth.kernels import aot_shares, persample_noise, update
from fastsmooth.kernels.aot_shares import ShareCase
from fastsmooth.messages import BAD_INPUT, DONE, end_with, note, show

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError:  # no triton outside Linux: main says so
    triton = None


class Refusal(Exception):
    """What cannot be done here, in one line."""


class Limits(NamedTuple):
    """Of a multiprocessor; and where a kernel's arguments begin in constant bank 0."""

    warps: int
    blocks: int
    registers: int
    shared: int  # bytes
    arguments: int  # bytes


# CUDA C++ Programming Guide, Compute Capabilities, table "Technical Specifications per Compute
# Capability"
LIMITS = {
    80: Limits(64, 32, 65536, 164 * 1024, 0x160),
    90: Limits(64, 32, 65536, 228 * 1024, 0x210),
    100: Limits(64, 32, 65536, 228 * 1024, 0x380),
}
# cuda_occupancy.h of the CUDA toolkit, for all three: a warp takes registers in units of 256, out
# of one of four partitions; a block takes shared memory in units of 128 bytes, with 1,024 for the
# system
REGISTER_UNIT, PARTITIONS, SHARED_UNIT, SHARED_SYSTEM = 256, 4, 128, 1024


# Configurations


DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Case(NamedTuple):
    """One configuration. The momentum is float32, and so are the parameters of persample_noise."""

    kernel: str
    kind: str
    dtype: torch.dtype  # of the gradients, and of the parameters of update
    rows: int = 1  # gradients of a parameter: K of update, B of persample_noise
    # addresses are divisible by 16; for persample_noise, P is by a vector of 16 bytes
    aligned: bool = True

    def __str__(self) -> str:
        rows = f" {'K' if self.kernel == 'update' else 'B'}={self.rows}" if self.rows > 1 else ""
        return f"{self.kind} {DTYPES[self.dtype]}{rows}{'' if self.aligned else ' unaligned'}"

    @property
    def gradient(self) -> str:
        return "g" if self.kernel == "update" else "G"

    @property
    def moved(self) -> dict[str, int]:
        """What is loaded and stored, with the bytes of an element."""
        p = {"p": self.dtype.itemsize if self.kernel == "update" else 4}
        return p if self.kind == "plain" else p | {"m": 4}

    @property
    def minimum(self) -> int:
        """Bytes a parameter or column, each element loaded once and stored once."""
        return self.rows * self.dtype.itemsize + 2 * sum(self.moved.values())


DIRECTIONS = {"plain": update.PLAIN, "buffer": update.BUFFER, "mixed": update.MIXED}
CASES = [
    *(Case("update", kind, dtype) for kind in DIRECTIONS for dtype in DTYPES),
    *(Case("update", "buffer", dtype, rows) for rows in (2, 4, 8) for dtype in DTYPES),
    *(Case("update", kind, torch.float32, 8) for kind in ("plain", "mixed")),
    *(Case("update", "buffer", torch.float32, rows, aligned=False) for rows in (1, 8)),
    *(
        Case("persample_noise", "buffer", dtype, rows)
        for rows in (2, 8, 32, 64, 256, 1024)
        for dtype in DTYPES
    ),
    Case("persample_noise", "plain", torch.float32, 64),
    *(
        Case("persample_noise", "buffer", torch.float32, rows, aligned=False)
        for rows in (64, 256, 1024)
    ),
]


class Launch(NamedTuple):
    """The kernel, what it is given, and the tile that its innermost loop takes in one trip."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    rows: int
    columns: int


def launch(case: Case) -> Launch:
    scalars = dict.fromkeys(["lr", "beta", "alpha", "fresh", "kept", "decay"], "*fp64")
    constants = {"wide": triton.language.float32, "kind": DIRECTIONS[case.kind]}
    if case.kernel == "update":
        types = {"chunks": "*i64", "rows": "*i64", **scalars, "sums": "*fp64", "noises": "*fp64"}
        constants |= {"dtype": triton.language.dtype(DTYPES[case.dtype]), "aligned": case.aligned}
        block = update.block_of(case.rows)
        constants |= {"K": case.rows, "BLOCK": block, "BLOCKS": update.CHUNK // block}
        kernel = update._update_kernel
        return Launch(kernel, types, constants, update.WARPS, case.rows, block)
    cut = persample_noise.tile(case.rows, case.dtype, case.aligned)
    types = {"G": f"*{DTYPES[case.dtype]}", "p": "*fp32", "m": "*fp32", **scalars}
    types |= {"row_sums": "*fp64", "sums": "*fp64", "B": "i32", "length": "i32"}
    constants |= {
        "VECTOR": 16 // case.dtype.itemsize if case.aligned else 1,
        "ROWS": cut.ROWS,
        "COLUMNS": cut.COLUMNS,
    }
    constants |= {"whole": cut.whole, "shared": cut.shared}
    return Launch(
        persample_noise._persample_noise_kernel, types, constants, cut.warps, cut.ROWS, cut.COLUMNS
    )


def compiled(case: Case | ShareCase, arch: int) -> Any:
    """As Triton's launcher does it, which marks the arguments that are divisible by 16, unless the
    kernel asks it not to."""
    if isinstance(case, ShareCase):
        kernel, types, constants, warps, _, numbers = aot_shares.launch(case)
    else:
        kernel, types, constants, warps, *_ = launch(case)
        numbers = ["B"] if "B" in types and case.rows % 16 == 0 else []
    marked = [p.name for p in kernel.params if not p.do_not_specialize_on_alignment]
    divisible = [name for name in marked if types.get(name, "").startswith("*")] + numbers
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    try:
        return triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}
        )
    except Exception as error:  # of any stage of the compiler
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refusal(
            f"triton {triton.__version__} cannot compile {case.kernel} for sm_{arch}: {said}"
        ) from None


# SASS

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z]\w*)(\S*)\s*([^;]*?)\s*;")
LABEL = re.compile(r"\.L_\w+")
REGISTER = re.compile(r"\bU?R\d+\b")
CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")
WIDTH = re.compile(r"\.[US]?(8|16|32|64|128|256)\b")
KINDS = {"BAR": "barriers", "LDL": "spills", "STL": "spills"}
KINDS |= dict.fromkeys(["ATOM", "ATOMG", "ATOMS", "RED", "REDG"], "atomics")
# a tensor core's product on sm_80, sm_90 and sm_100
KINDS |= dict.fromkeys(["HMMA", "HGMMA", "UTCHMMA"], "products")
# by which sm_100 notes in shared memory which tensor memory is taken: no sums
BOOKKEEPING = {("ATOMS", ".OR"), ("ATOMS", ".AND")}
# where update's table of tensors has them in a row, in bytes; its gradients follow
ADDRESSES = {8: "p", 16: "m"}
ENTRY = re.compile(r"\+(0x[0-9a-f]+)$")


class Access(NamedTuple):
    """A load or store of global memory."""

    line: int
    load: bool
    masked: bool
    width: int  # bytes a thread
    # the argument of the kernel, or the entry of update's table, that its address is made from
    tensor: str


class Code(NamedTuple):
    accesses: list[Access]
    loops: list[tuple[int, int]]  # line of the label, line of the branch back to it
    others: dict[str, list[int]]  # lines of the kinds in KINDS


class Origins:
    """The pointers that the value in each register is made from, as the SASS is read from the top
    down."""

    def __init__(self, pointers: Sequence[str], base: int):
        # the first arguments, 8 bytes each, and where they begin
        self.pointers, self.base = pointers, base
        self.held: dict[str, set[str]] = {}
        # what was held where a branch goes there
        self.at_label: dict[str, dict[str, set[str]]] = {}
        self.reached = True

    def of(self, text: str) -> set[str]:
        return set().union(*(self.held.get(register, ()) for register in REGISTER.findall(text)))

    def branch(self, label: str, always: bool) -> None:
        self.at_label.setdefault(label, dict(self.held))
        self.reached = not always

    def arrive(self, label: str) -> None:
        if not self.reached:
            self.held = dict(self.at_label.get(label, {}))
        self.reached = True

    def write(self, register: str, words: int, constants: list[str], origin: set[str]) -> None:
        kind, number = register.rstrip("0123456789"), register.lstrip("UR")
        for word in range(words):
            slots = [(int(at, 16) - self.base + 4 * word) // 8 for at in constants]
            names = [self.pointers[slot] for slot in slots if 0 <= slot < len(self.pointers)]
            self.held[f"{kind}{int(number) + word}"] = origin.union(names)


def parse(sass: str, pointers: Sequence[str], base: int) -> Code:
    code, labels, origins = Code([], [], defaultdict(list)), {}, Origins(pointers, base)
    for line, text in enumerate(sass.splitlines()):
        if label := LABEL.match(text):
            labels[label[0]] = line
            origins.arrive(label[0])
        if not (instruction := INSTRUCTION.match(text)):
            continue
        predicate, name, suffix, operands = instruction.groups()
        first, _, others = operands.partition(",")
        width = int(bits[1]) // 8 if (bits := WIDTH.search(suffix)) else 4
        loads = name.startswith(("LD", "ULD"))
        origin = set() if loads or name in ("SHFL", "S2R", "S2UR") else origins.of(others)
        # sm_80 leaves some loops by a CALL
        if name in ("BRA", "CALL") and (target := LABEL.search(operands)):
            origins.branch(
                target[0], always=name == "BRA" and not predicate and operands.startswith("`")
            )
            if target[0] in labels:
                code.loops.append((labels[target[0]], line))
        elif name in KINDS and (name, suffix) not in BOOKKEEPING:
            code.others[KINDS[name]].append(line)
            if name == "STL":  # a pointer may be among what is spilled
                origins.held[first] = origins.of(others)
            elif name == "LDL":
                origin = origins.held.get(others.strip(), set())
        elif name in ("LDG", "LDGSTS", "STG"):  # the second goes to shared memory
            # after the descriptor, which sm_80 has not
            address = re.findall(r"\[(.*?)\]", operands)[-1]
            tensor = "|".join(sorted(origins.of(address)))
            code.accesses.append(Access(line, name != "STG", bool(predicate), width, tensor))
            if tensor == "rows" and (entry := ENTRY.search(address)):
                origin = {ADDRESSES.get(int(entry[1], 16), "g")}
        if name != "STG" and REGISTER.fullmatch(first):
            words = max(1, width // 4) if loads else 2 if suffix.startswith((".WIDE", ".64")) else 1
            origins.write(first, words, CONSTANT.findall(others), origin)
    return code


def traffic(case: Case, code: Code) -> dict[str, Any]:
    """Widths in bits, and bytes a parameter or column, of the hot loop."""
    _, _, _, warps, rows, columns = launch(case)
    tile = {tensor: columns * size for tensor, size in case.moved.items()} | {"row_sums": rows * 8}
    tile[case.gradient] = rows * columns * case.dtype.itemsize
    loops = [
        (a, b)
        for a, b in code.loops
        if any(a < t.line < b and t.tensor in tile for t in code.accesses)
    ]
    start, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    hot = [a for a in code.accesses if start < a.line < end]
    ragged = [a for a in hot if a.masked and case.kernel == "update"]
    main = [a for a in hot if a not in ragged]
    inner = [loop for loop in loops if loop != (start, end)]
    whole_tiles = all(
        sum(32 * warps * t.width for t in main if t.tensor == case.gradient and a < t.line < b)
        == tile[case.gradient]
        for a, b in inner or [(start, end)]
    )
    expected = {(case.gradient, True), *itertools.product(case.moved, (True, False))}
    if not whole_tiles or {(a.tensor, a.load) for a in hot if a.tensor != "row_sums"} != expected:
        raise Refusal(f"{case.kernel} {case}: its loop is not one that aot.py can count")

    issued = moved = 0
    replicated = set()
    for a in main:
        trips = -(-case.rows // rows) if any(first < a.line < last for first, last in inner) else 1
        lanes = 32 * warps * a.width
        once = lanes if a.tensor == case.gradient else min(lanes, tile[a.tensor])
        issued += trips * (lanes if a.load else once)
        moved += trips * once
        if a.load and lanes > once and a.tensor in case.moved:
            replicated.add(a.tensor)
    return {
        "widths": widths(main),
        "ragged_widths": widths(ragged),
        "issued": issued / columns,
        "bytes": moved / columns,
        "minimum": case.minimum,
        "replicated": sorted(replicated),
        "ordered": all(ordered(main, code.others["barriers"], tensor) for tensor in replicated),
    }


def widths(accesses: list[Access]) -> dict[str, list[list[int]]]:
    """Of the loads and of the stores of each tensor: {"p": [[32, 128], [32]]}."""
    loads: dict[str, set[int]] = defaultdict(set)
    stores: dict[str, set[int]] = defaultdict(set)
    for a in accesses:
        (loads if a.load else stores)[a.tensor].add(8 * a.width)
    return {t: [sorted(loads[t]), sorted(stores[t])] for t in sorted(loads.keys() | stores)}


def ordered(accesses: list[Access], barriers: list[int], tensor: str) -> bool:
    """Whether all lanes have loaded an element before the one that stores it does so: a barrier
    lies between."""
    last = max(a.line for a in accesses if a.tensor == tensor and a.load)
    first = min(a.line for a in accesses if a.tensor == tensor and not a.load)
    return any(last < barrier < first for barrier in barriers)


def occupancy(arch: int, warps: int, registers: int, shared: int) -> tuple[float, str]:
    """Resident warps over the most there can be, and what keeps more away."""
    limits = LIMITS[arch]
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    of_block = -(-(shared + SHARED_SYSTEM) // SHARED_UNIT) * SHARED_UNIT
    blocks = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": limits.registers // PARTITIONS // of_warp * PARTITIONS // warps,
        "shared memory": limits.shared // of_block,
    }
    scarce = min(blocks, key=lambda limit: blocks[limit])
    return blocks[scarce] * warps / limits.warps, scarce


# The report


def tool(name: str, *arguments: str) -> str:
    """What one of the CUDA tools that come with Triton prints."""
    try:
        path = getattr(triton.knobs.nvidia, name).path
    except (RuntimeError, OSError):
        raise Refusal(
            f"triton {triton.__version__} has no {name} that works: install triton anew"
        ) from None
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Refusal(
            f"{path}: {(done.stderr.strip().splitlines() or ['failed without a word'])[-1]}"
        )
    return done.stdout


def examine(case: Case | ShareCase, arch: int) -> dict[str, Any]:
    """One configuration, a line of --json: `stack` and `shared` in bytes, `spills` and `atomics` in
    instructions."""
    binary = compiled(case, arch)
    if isinstance(case, ShareCase):
        _, types, constants, warps, tile, _ = aot_shares.launch(case)
    else:
        _, types, constants, warps, *tile = launch(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", str(path))
        sass = tool("nvdisasm", "-c", "-ndf", str(path))
    registers, stack = (int(re.findall(rf"{word}:(\d+)", usage)[0]) for word in ("REG", "STACK"))
    shared = binary.metadata.shared
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    code = parse(sass, pointers, LIMITS[arch].arguments)
    share, scarce = occupancy(arch, warps, registers, shared)
    row = {
        "arch": arch, "kernel": case.kernel, "case": str(case),
        "tile": tile, "warps": warps, "registers": registers, "stack": stack,
        "spills": len(code.others["spills"]), "atomics": len(code.others["atomics"]),
        "shared": shared, "occupancy": share, "occupancy_limit": scarce,
    }  # fmt: skip
    if not isinstance(case, ShareCase):
        return row | {"rows": case.rows, "aligned": case.aligned} | traffic(case, code)
    row |= {"stages": constants.get("stages", ""), "multiplies": case.multiplies}
    return row | {"products": len(code.others["products"]), "widths": widths(code.accesses)}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, of rows that all have bytes or all have products."""
    heads = ["kernel", "case", "tile", "warps", "registers", "stack", "spills", "shared"]
    heads += ["occupancy", "widths"]
    counted = ["issued", "bytes", "minimum"] if "bytes" in rows[0] else []
    heads += ["replicas", *counted] if counted else ["stages", "products"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = row | {key: f"{row[key]:g}" for key in counted}
        cells["tile"] = "x".join(map(str, row["tile"]))
        cells["occupancy"] = f"{100 * row['occupancy']:.3g} % ({row['occupancy_limit']})"
        cells["widths"] = short(row["widths"])
        if row.get("ragged_widths"):
            cells["widths"] += f"; ragged {short(row['ragged_widths'])}"
        if counted:
            unordered = ["unordered"] if not row["ordered"] else []
            cells["replicas"] = " ".join([*row["replicated"], *unordered])
        lines.append(f"| {' | '.join(str(cells[key]) for key in heads)} |")
    return lines


def short(widths: dict[str, list[list[int]]]) -> str:
    """{"p": [[32, 128], [32]]} as "p 32+128/32"."""
    bits = {
        tensor: "/".join("+".join(map(str, some)) for some in both if some)
        for tensor, both in widths.items()
    }
    return ", ".join(f"{tensor} {text}" for tensor, text in bits.items())


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal(message)


def report(argv: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m fastsmooth.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one object a line instead of tables")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(LIMITS), metavar="N", help="sm_N: %(default)s"
    )
    families: list[Sequence[Case | ShareCase]] = [CASES, aot_shares.CASES]
    names = list(dict.fromkeys(case.kernel for family in families for case in family))
    parser.add_argument("--kernel", nargs="+", default=names, metavar="NAME", help="all of them")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.kernel if name not in names]:
        raise Refusal(f"--kernel {unknown[0]}: choose from {', '.join(names)}")
    if unknown := [arch for arch in args.arch if arch not in LIMITS]:
        raise Refusal(f"--arch {unknown[0]}: choose from {', '.join(map(str, LIMITS))}")
    if triton is None:
        raise Refusal(
            "triton is not installed (it comes with PyTorch for Linux): pip install triton"
        )
    if triton.knobs.runtime.interpret:
        raise Refusal(
            "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it"
        )
    for name in ("cuobjdump", "nvdisasm"):
        tool(name, "--version")
    for arch in args.arch:  # before LLVM, which would abort
        if f"sm_{arch}" not in tool("ptxas_blackwell" if arch >= 100 else "ptxas", "--help"):
            raise Refusal(
                f"--arch {arch}: triton {triton.__version__} cannot compile for sm_{arch}"
            )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for arch in args.arch:
            lines = [] if args.json else [f"### sm_{arch}, Triton {triton.__version__}", ""]
            for family in families:
                chosen = [case for case in family if case.kernel in args.kernel]
                rows = list(pool.map(examine, chosen, itertools.repeat(arch)))
                if args.json:
                    lines += [json.dumps(row) for row in rows]
                elif rows:
                    lines += [*table(rows), ""]
            show(*lines, whole=True)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        report(argv)
    except Refusal as refusal:
        note(f"aot: {refusal}")
        return BAD_INPUT
    return DONE


if __name__ == "__main__":
    end_with(main)
