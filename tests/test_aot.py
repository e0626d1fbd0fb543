"""What kernels/README.md says about the machine code, held against the machine code itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsmooth.kernels import aot, aot_shares

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_INTERPRETER = {
    name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
}
needs_triton = pytest.mark.skipif(aot.triton is None, reason="triton is not installed")


STEPS, SHARES = (
    list(dict.fromkeys(case.kernel for case in cases)) for cases in (aot.CASES, aot_shares.CASES)
)


def examined(*flags):
    command = [sys.executable, "-m", "fastsmooth.kernels.aot", "--json", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=WITHOUT_INTERPRETER, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def archs(request):
    """Every architecture with --full, else sm_90: a compilation of all takes a minute."""
    return list(aot.LIMITS) if request.config.getoption("--full") else [90]


@pytest.fixture(scope="session")
def rows(archs):
    """Every configuration of a step's kernels, compiled once."""
    return examined("--kernel", *STEPS, "--arch", *map(str, archs))


@pytest.fixture(scope="session")
def shares(archs):
    """Those of per-sample shares."""
    return examined("--kernel", *SHARES, "--arch", *map(str, archs))


def failing(rows, holds):
    """The configurations for which something does not hold, by name."""
    return [f"sm_{row['arch']} {row['kernel']} {row['case']}" for row in rows if not holds(row)]


# The machine code


@needs_triton
def test_every_kernel_is_compiled_for_every_architecture(rows, archs):
    kernels = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"def _(\w+)_kernel\(", path.read_text())
        # no loop of theirs has bytes to be counted; test_kernels_augment.py and
        # test_kernels_tally.py compile them
    } - {"augment", "tally"}
    assert kernels == {*STEPS, *SHARES}
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (k, arch) for k in STEPS for arch in archs
    }
    assert (
        len({(row["arch"], row["kernel"], row["case"]) for row in rows})
        == len(rows)
        == len(archs) * len(aot.CASES)
    )


@needs_triton
def test_no_configuration_spills(rows):
    assert not failing(rows, lambda row: row["stack"] == row["spills"] == 0)


@needs_triton
def test_every_access_of_an_aligned_update_is_128_bits_wide(rows):
    """But for eight gradients in bfloat16: there a thread has four values of each."""
    some = [row for row in rows if row["kernel"] == "update" and row["aligned"]]

    def wide(row):
        bits = 64 if row["case"] == "buffer bf16 K=8" else 128
        widths = {"g": [[bits], []], "p": [[bits], [bits]], "m": [[128], [128]]}
        found = row["widths"]
        return found.items() <= widths.items() and {"g", "p"} <= found.keys()

    assert not failing(some, wide)


@needs_triton
def test_the_update_is_compiled_for_several_gradients_a_parameter(rows, archs):
    found = {(row["rows"], row["arch"]) for row in rows if row["kernel"] == "update"}
    assert found == {(K, arch) for K in (1, 2, 4, 8) for arch in archs}


@needs_triton
def test_gradients_of_samples_are_loaded_128_bits_at_a_time(rows):
    some = [row for row in rows if row["kernel"] == "persample_noise" and row["aligned"]]
    assert not failing(some, lambda row: row["widths"]["G"] == [[128], []])


@needs_triton
def test_what_fits_in_one_tile_moves_the_least_possible(rows):
    some = [row for row in rows if row["rows"] <= 256]
    assert not failing(some, lambda row: row["minimum"] <= row["bytes"] <= 1.05 * row["minimum"])


@needs_triton
def test_lanes_ask_for_no_more_than_is_moved_unless_they_share_elements(rows):
    assert not failing(rows, lambda row: row["replicated"] or row["issued"] == row["bytes"])
    assert not failing(
        rows, lambda row: not row["replicated"] or row["tile"][1] < 32 * row["warps"]
    )


@needs_triton
def test_more_rows_than_a_tile_holds_are_read_twice_and_no_more(rows):
    some = [row for row in rows if row["rows"] > 256]
    assert some and not failing(some, lambda row: 1.9 < row["bytes"] / row["minimum"] < 2.3)


@needs_triton
def test_an_element_that_lanes_share_is_loaded_by_all_before_it_is_stored(rows):
    assert any(row["replicated"] for row in rows)
    assert not failing(rows, lambda row: row["ordered"])


@needs_triton
def test_nothing_is_summed_by_atomics(rows):
    assert not failing(rows, lambda row: row["atomics"] == 0)


@needs_triton
def test_the_readme_has_the_tables_that_the_program_prints(rows, shares):
    readme = (ROOT / "kernels" / "README.md").read_text()
    if f"Triton {aot.triton.__version__}\n" not in readme:
        pytest.skip("the tables are of another version of Triton")
    for family in (rows, shares):
        for arch in {row["arch"] for row in family}:
            lines = aot.table([row for row in family if row["arch"] == arch])
            assert "\n".join(lines) in readme, (
                f"sm_{arch}: put what python -m fastsmooth.kernels.aot prints into the README"
            )


# Per-sample shares


@needs_triton
def test_every_configuration_of_shares_is_compiled(shares):
    assert len({(row["arch"], row["kernel"], row["case"]) for row in shares}) == len(shares)
    assert len(shares) % len(aot_shares.CASES) == 0 and shares


@needs_triton
def test_no_share_is_spilt_or_summed_by_atomics(shares):
    assert not failing(shares, lambda row: row["stack"] == row["spills"] == row["atomics"] == 0)


@needs_triton
def test_products_are_those_of_tensor_cores_but_of_plain_float32_and_few_pixels(shares):
    assert {
        row["case"] for row in shares if row["kernel"] == "conv_tile" and not row["products"]
    } == {"512-100 1x1 norms bf16", "128-128 16x16 noise fp32"}
    assert not failing(shares, lambda row: bool(row["products"]) == row["multiplies"])


@needs_triton
def test_operands_of_whole_tiles_are_loaded_64_bits_at_a_time_or_more(shares):
    """But TF32, which sm_90 and sm_100 want transposed: it goes to shared memory by the value."""

    def wide(row):
        least = 32 if "tf32" in row["case"].split() else 64
        return all(min(row["widths"][name][0]) >= least for name in ("x", "dy"))

    whole = [row for row in shares if row["multiplies"] and "3-64" not in row["case"]]
    assert whole and not failing(whole, wide)
    sums = [row for row in shares if row["kernel"] == "affine_grads"]
    assert sums and not failing(sums, lambda row: row["widths"]["x"] == [[128], []])


# Reading it

LOOP = """
        /*0000*/                   LDC.64 R2, c[0x0][0x218] ;
        /*0010*/                   ULDC.128 UR4, c[0x0][0x220] ;
        /*0020*/                   LDG.E.64 R4, desc[UR8][R2.64+0x8] ;
        /*0030*/                   LDG.E.64 R6, desc[UR8][R2.64+0x20] ;
.L_x_1:
        /*0040*/              @P0  CALL.REL.NOINC `(.L_x_0) ;
        /*0050*/                   LDG.E.128 R12, desc[UR8][R6.64] ;
        /*0060*/                   LDG.E.64 R6, desc[UR8][R4.64+0x800] ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/                   STG.E.64 desc[UR8][R4.64+0x800], R12 ;
        /*0090*/                   BRA `(.L_x_2) ;
.L_x_0:
        /*00a0*/              @!P1 LDG.E.U16 R16, desc[UR8][R6.64] ;
        /*00b0*/                   IADD3 R18, P2, R9, UR6, RZ ;
        /*00c0*/                   STL [R1+0x10], R18 ;
.L_x_2:
        /*00d0*/              @P3  BRA `(.L_x_1) ;
        /*00d8*/                   ATOMS.OR RZ, [UR6+0x14], R3 ;
        /*00e0*/                   RED.E.ADD.F32 desc[UR8][R18.64], R16 ;
        /*00f0*/                   LDL R20, [R1+0x10] ;
        /*0100*/                   STG.E desc[UR8][R20.64], R16 ;
        /*0110*/                   EXIT ;
"""


def test_reading_finds_whose_addresses_they_are_and_what_is_masked():
    code = aot.parse(LOOP, ["chunks", "rows", "lr", "beta"], 0x210)
    table, loop, end = code.accesses[:2], code.accesses[2:6], code.accesses[6]
    assert [a.tensor for a in table] == ["rows", "rows"] and end.tensor == "beta"
    assert [(a.tensor, a.load, a.width, a.masked) for a in loop] == [
        ("g", True, 16, False),
        ("p", True, 8, False),
        ("p", False, 8, False),
        ("g", True, 2, True),  # R6 holds its address still: the other path was not taken
    ]
    assert [LOOP.splitlines()[line].split()[0] for line in code.loops[0]] == [".L_x_1:", "/*00d0*/"]
    assert {kind: len(lines) for kind, lines in code.others.items()} == {
        "barriers": 1,
        "spills": 2,
        "atomics": 1,
    }
    assert aot.widths(loop) == {"g": [[16, 128], []], "p": [[64], [64]]}
    assert aot.ordered(loop, code.others["barriers"], "p") and not aot.ordered(loop, [], "p")


@needs_triton
def test_a_loop_that_moves_no_whole_tile_is_not_counted():
    code = aot.parse(LOOP, ["chunks", "rows", "lr", "beta"], 0x210)
    case = aot.Case("update", "plain", torch.float32)
    with pytest.raises(aot.Refusal, match="count"):
        aot.traffic(case, code)
    gradients = next(a for a in code.accesses if a.tensor == "g")
    code.accesses.append(gradients)  # 128 threads load 16 bytes twice: a block of 1,024
    found = aot.traffic(case, code)
    assert (found["bytes"], found["minimum"]) == (4 + 1 + 1, 12)
    assert (found["widths"]["g"], found["ragged_widths"]) == ([[128], []], {"g": [[16], []]})


@pytest.mark.parametrize(
    "arch, warps, registers, shared, share, limit",
    [
        (90, 4, 64, 0, 32 / 64, "registers"),  # 2,048 a warp, 8 in each partition of 16,384
        (80, 4, 255, 0, 8 / 64, "registers"),  # 8,192 a warp
        (90, 4, 33, 0, 48 / 64, "registers"),  # 1,056 rounded up to 1,280: 12 a partition
        (80, 8, 32, 80 * 1024, 16 / 64, "shared memory"),  # 81 KB of 164 twice
        (90, 8, 32, 75 * 1024, 24 / 64, "shared memory"),  # 76 KB of 228 three times
        (100, 1, 32, 0, 32 / 64, "blocks"),
        (100, 8, 32, 0, 1, "warps"),
    ],
)
def test_occupancy_is_that_of_the_scarcest_resource(arch, warps, registers, shared, share, limit):
    assert aot.occupancy(arch, warps, registers, shared) == (share, limit)


# Refusals


def refused(capsys, *argv):
    assert aot.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("aot: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--arch", "42"], "42"),
        (["--arch", "90", "75"], "75"),
        (["--arch", "h"], "'h'"),
        (["--kernel", "updat"], "choose from update, persample_noise, conv_tile"),
        (["-x"], "-x"),
    ],
)
def test_unknown_arguments_are_refused(capsys, argv, word):
    assert word in refused(capsys, *argv)


def test_a_missing_triton_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(aot, "triton", None)
    assert "pip install triton" in refused(capsys)


@needs_triton
def test_interpreted_kernels_are_refused():
    command = [sys.executable, "-m", "fastsmooth.kernels.aot"]
    env = WITHOUT_INTERPRETER | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "TRITON_INTERPRET" in done.stderr and "unset it" in done.stderr


@needs_triton
def test_a_missing_disassembler_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        vars(aot.triton.knobs.nvidia_knobs)["nvdisasm"], "default_path", str(tmp_path / "nvdisasm")
    )
    assert "no nvdisasm" in refused(capsys)


@needs_triton
def test_an_architecture_that_this_triton_cannot_compile_for_is_refused(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(aot.LIMITS, 42, aot.LIMITS[80])
    assert "cannot compile for sm_42" in refused(capsys, "--arch", "42")
