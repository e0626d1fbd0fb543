"""kernels.augment in each of its implementations, bit for bit what torchvision makes of PIL
images."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from implementations import DEVICE, every_implementation, needs_cxx, needs_triton
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from fastsmooth.data import augment as drawing
from fastsmooth.data.chunks import normalisation
from fastsmooth.kernels import aot
from fastsmooth.kernels import augment as kernel

ROOT = Path(__file__).resolve().parent.parent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PADDING = {8: 1, 32: 4, 33: 4, 224: 28}
SIZES = list(PADDING)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_size = pytest.mark.parametrize("size", SIZES)


@pytest.fixture
def chosen(implementation, monkeypatch):
    """kernels.augment.augment with this implementation."""
    monkeypatch.setattr(kernel.backend, "choose", lambda device, dtype: implementation)
    return kernel.augment


@pytest.fixture
def few(implementation, size, monkeypatch):
    """Whether to be content with few images: Triton's interpreter takes 30 ms a block. At 224 it
    gets larger blocks."""
    interpreted = implementation == "triton" and DEVICE.type == "cpu"
    if interpreted and size == 224:
        monkeypatch.setattr(kernel, "BLOCK", 1 << 14)
    return interpreted


def stored(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator).to(
        DEVICE
    )


def table() -> torch.Tensor:
    return normalisation(MEAN, STD, DEVICE)


def parameters(count: int, size: int) -> torch.Tensor:
    """float64 [count, 4]: drawn, and among them the corners of their range."""
    drawn = drawing.draw("crop-flip-rotate", size, 5, 2, torch.arange(count))
    ends = (0, 2 * PADDING[size])
    corners = list(itertools.product(ends, ends, (0, 1), (15.0, -15.0, 0.0)))[: count // 2]
    drawn[: len(corners)] = torch.tensor(corners, dtype=torch.float64)
    return drawn


def drawn_moves(params: torch.Tensor, size: int) -> torch.Tensor:
    return drawing.moves("crop-flip-rotate", size, params).to(DEVICE)


def extreme_moves(size: int) -> torch.Tensor:
    """Far and barely out of the image on every side, the largest angles, and any other number for a
    flip."""
    one = drawing.ONE
    rotations = [
        (0, 0, one, 0, 0),
        (one * (size - 1), one * (size - 1), -one, 0, 0),
        (0, one * (size - 1), 0, one, -one),
    ]
    rotations += [
        (2**30, -(2**30), one, 0, 0),
        (-(2**30), 2**30, 0, one, -one),
        (-1, -1, one, 0, 0),
    ]
    rotations += [(one // 2, one // 2, 3 * one, one, -one), (5, 9, one // 7, -one // 3, one // 3)]
    shifts = [(0, 0), (size, 0), (0, -size), (size - 1, 1 - size), (-(2**29), 2**29), (1, 1)]
    rows = [
        (*rotation, *shift, flip)
        for rotation in rotations
        for shift in shifts
        for flip in (0, 1, -3)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def reference(pixels, rows, moves, table):
    count = len(pixels) if rows is None else len(rows)
    return kernel.augment_ref(
        pixels, rows, moves, table, torch.empty(count, *pixels.shape[1:], device=pixels.device)
    )


def torchvision(array: torch.Tensor, row: list[float] | None, size: int) -> torch.Tensor:
    """float32 [S, S, 3] by PIL and torchvision, with given numbers."""
    image = Image.fromarray(array.cpu().numpy())
    if row is not None:
        top, left, flip, angle = row
        image = TF.crop(TF.pad(image, PADDING[size]), int(top), int(left), size, size)
        image = TF.hflip(image) if flip else image
        image = image.rotate(angle, Image.Resampling.NEAREST, fillcolor=(0, 0, 0))
    return T.Normalize(MEAN, STD)(T.ToTensor()(image)).permute(1, 2, 0)


@every_implementation
@every_size
@pytest.mark.parametrize("moved", [True, False])
def test_a_batch_has_torchvisions_bits(chosen, few, size, moved):
    count = 6 if size == 224 else 48
    pixels, params = stored(count, size), parameters(count, size)
    # one image is there more than once
    rows = torch.tensor([3, 0, count - 1, 3, *range(count)], device=DEVICE)
    if few:
        rows = rows[: 4 if size == 224 else 16]
    found = chosen(pixels, rows, drawn_moves(params, size) if moved else None, table())
    assert (
        found.dtype == torch.float32
        and found.shape == (len(rows), size, size, 3)
        and found.is_contiguous()
    )
    for image, i in zip(found.cpu(), rows.tolist(), strict=True):
        assert torch.equal(
            image, torchvision(pixels[i], params[i].tolist() if moved else None, size)
        ), i


@every_implementation
@every_size
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("moved", ["drawn", "extreme", ""])
def test_every_form_has_the_bits_of_the_reference(chosen, few, size, indexed, moved):
    moves = extreme_moves(size)
    moves = moves[:: (37 if size == 224 else 7) if few else (12 if size == 224 else 1)].contiguous()
    count = len(moves)
    pixels = stored(count, size)
    if moved != "extreme":
        moves = drawn_moves(parameters(count, size), size) if moved else None
    rows = torch.arange(count, device=DEVICE).flip(0).repeat(2)[1 : count + 2] if indexed else None
    expected = reference(pixels, rows, moves, table())
    assert torch.equal(chosen(pixels, rows, moves, table()), expected)
    assert expected.isfinite().all()
    if moved == "extreme":  # all black, and not
        black = (expected == table()[:, 0]).flatten(1).all(1)
        assert black.any() and not black.all()


@every_implementation
def test_each_channel_has_its_own_row_of_the_table(chosen):
    pixels = stored(3, 8)
    values = torch.arange(3 * 256, dtype=torch.float32, device=DEVICE).view(3, 256)
    expected = pixels.float() + 256 * torch.arange(3, device=DEVICE)
    assert torch.equal(chosen(pixels, None, None, values), expected)


@every_implementation
@pytest.mark.parametrize("size", [8, 33])
@pytest.mark.parametrize("moved", [True, False])
def test_what_is_given_to_write_to_is_written_and_nothing_beside_it(chosen, size, moved):
    count, values = 5, size * size * 3
    pixels, rows = stored(9, size), torch.tensor([8, 1, 1, 0, 4], device=DEVICE)
    moves = drawn_moves(parameters(9, size), size) if moved else None
    for offset in (0, 1):  # aligned to 16 bytes, and not
        memory = torch.full((64 + count * values + 64,), 7.0, device=DEVICE)
        out = memory[64 + offset : 64 + offset + count * values].view(count, size, size, 3)
        before = pixels.clone()
        assert chosen(pixels, rows, moves, table(), out) is out
        assert torch.equal(out, reference(pixels, rows, moves, table())) and torch.equal(
            pixels, before
        )
        assert (memory[: 64 + offset] == 7).all() and (
            memory[64 + offset + count * values :] == 7
        ).all()


@every_implementation
@pytest.mark.parametrize("size", [8, 32])
def test_a_batch_of_none_is_empty(chosen, size):
    pixels, moves = stored(4, size), drawn_moves(parameters(4, size), size)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for given in [
        (pixels, none, moves),
        (pixels, none, None),
        (pixels[:0], None, moves[:0]),
        (pixels[:0], none, None),
    ]:
        assert chosen(*given, table()).shape == (0, size, size, 3)
    out = torch.empty(0, size, size, 3, device=DEVICE)
    assert chosen(pixels, none, moves, table(), out) is out


@needs_cxx
def test_the_number_of_threads_changes_no_bit():
    pixels, moves = stored(144, 33), extreme_moves(33)
    assert len(moves) == 144
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.append(kernel.augment(pixels, None, moves, table()))
    torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_what_does_not_fit_is_refused():
    pixels, rows, moves = (
        stored(4, 8),
        torch.tensor([0, 3, 1], device=DEVICE),
        drawn_moves(parameters(4, 8), 8),
    )
    out, values = torch.empty(3, 8, 8, 3, device=DEVICE), table()
    apart = torch.zeros(4, 8, 3, 8, dtype=torch.uint8, device=DEVICE).transpose(2, 3)
    meta = torch.device("meta")
    for name, replaced in [
        ("pixels", pixels.float()),
        ("pixels", pixels[0]),
        ("pixels", pixels[:, :7].contiguous()),
        ("pixels", pixels[..., :2].contiguous()),
        ("pixels", pixels.permute(0, 3, 1, 2).contiguous()),
        ("pixels", apart),
        ("rows", rows.int()),
        ("rows", rows[:, None]),
        ("rows", torch.zeros(6, dtype=torch.int64, device=DEVICE)[::2]),
        ("rows", rows.to(meta)),
        ("moves", moves.long()),
        ("moves", moves[:3]),
        ("moves", moves[:, :7].contiguous()),
        ("moves", moves.t().contiguous().t()),
        ("moves", moves.to(meta)),
        ("table", values.double()),
        ("table", values[0]),
        ("table", values[:, :255].contiguous()),
        ("table", values.t().contiguous().t()),
        ("table", values.to(meta)),
        ("out", out.bfloat16()),
        ("out", out[:2]),
        ("out", out[0]),
        ("out", torch.empty(3, 3, 8, 8, device=DEVICE).permute(0, 2, 3, 1)),
        ("out", out.to(meta)),
    ]:
        given = {"pixels": pixels, "rows": rows, "moves": moves, "table": values, "out": out} | {
            name: replaced
        }
        with pytest.raises(ValueError, match=rf"^{name} \[.*wanted contiguous") as error:
            kernel.augment(**given)
        assert len(str(error.value).splitlines()) == 1
    kernel.augment(pixels, rows, moves, values, out)


COMPILE = """
import itertools, json, os, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastsmooth.kernels import aot, augment
kernel = augment._augment_kernel
types = dict(pixels="*u8", rows="*i64", moves="*i32", table="*fp32", out="*fp32", size="i32")
for arch, indexed, moved in itertools.product((80, 90, 100), (True, False), (True, False)):
    constants = dict(INDEXED=indexed, MOVED=moved, BLOCK=augment.BLOCK)
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, attrs)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "kernel.cubin")
        open(path, "wb").write(made.asm["cubin"])
        usage = aot.tool("cuobjdump", "-res-usage", path)
        sass = aot.tool("nvdisasm", "-c", "-ndf", path)
    code = aot.parse(sass, list(types), aot.LIMITS[arch].arguments)
    stores = [8 * a.width for a in code.accesses if not a.load]
    others = {k: len(v) for k, v in code.others.items()}
    print(json.dumps([arch, indexed, moved, usage, others, stores]))
"""


@needs_triton
def test_the_kernel_compiles_for_every_architecture_without_a_spill():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 12 and {arch for arch, *_ in cases} == set(aot.LIMITS)
    for arch, indexed, moved, usage, others, stores in cases:
        case = f"sm_{arch} INDEXED={indexed} MOVED={moved}"
        assert "STACK:0" in usage and not others, (case, usage, others)
        assert stores and set(stores) == {128}, (case, stores)  # bits
