"""kernels.augment in each of its implementations, bit for bit what torchvision makes of PIL
images."""

import itertools

import pytest
import torch
from implementations import DEVICE, every_implementation, needs_cxx, needs_triton
from machine_code import machine_code
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from fastsmooth.data import augment as drawing
from fastsmooth.data.chunks import normalisation
from fastsmooth.kernels import augment as kernel

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


def integers(shape=()) -> torch.Tensor:
    """int64 zeros."""
    return torch.zeros(shape, dtype=torch.int64, device=DEVICE)


@every_implementation
@pytest.mark.parametrize("size, batch", [(8, 1), (33, 4), (8, 11)])
def test_a_cursor_says_where_in_the_order_the_batch_begins(chosen, implementation, size, batch):
    count = 6
    pixels, moves = stored(count, size), drawn_moves(parameters(count, size), size)
    order = torch.tensor([5, 1, 1, 4, 0, 2, 3, 5, 0, 3, 2], device=DEVICE)
    labels = torch.tensor([7, -1, 2**40, 0, 3, 9], device=DEVICE)
    out, out_labels = torch.empty(batch, size, size, 3, device=DEVICE), integers(batch)
    cursor = integers()
    given = pixels, order, moves, table(), out, cursor, labels, out_labels
    for start in {
        0,
        3 % (12 - batch),
        len(order) - batch,
    }:  # the last one ends where the order does
        # the same arguments each time, as a graph has them: only values in memory are others
        cursor.fill_(start), out.fill_(float("nan")), out_labels.fill_(-7)
        if start:
            kernel.IMPLEMENTATIONS[implementation](*given)
        else:
            assert chosen(*given) is out
        rows = order[start : start + batch]
        assert torch.equal(out, reference(pixels, rows, moves, table()))
        assert torch.equal(out_labels, labels[rows]) and cursor.item() == start


@every_implementation
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("moved", [True, False])
def test_labels_come_with_their_images_and_nothing_beside_them_is_written(chosen, indexed, moved):
    count = 5
    pixels, labels = stored(count, 33), torch.tensor([3, 1, 4, 1, 5], device=DEVICE)
    rows = torch.tensor([4, 0, 0, 2], device=DEVICE) if indexed else None
    moves = drawn_moves(parameters(count, 33), 33) if moved else None
    memory = torch.full((12,), -7, device=DEVICE)
    out_labels = memory[3 : 3 + (4 if indexed else count)]
    found = chosen(pixels, rows, moves, table(), None, None, labels, out_labels)
    assert torch.equal(found, reference(pixels, rows, moves, table()))
    assert out_labels.tolist() == ([5, 3, 3, 4] if indexed else labels.tolist())
    assert (memory[:3] == -7).all() and (memory[3 + len(out_labels) :] == -7).all()


@every_implementation
@pytest.mark.parametrize("size", [8, 33])
@pytest.mark.parametrize("moved", [True, False])
def test_a_bfloat16_table_gives_the_float32_values_rounded(chosen, size, moved):
    pixels, rows = stored(5, size), torch.tensor([4, 0, 0, 2], device=DEVICE)
    moves = drawn_moves(parameters(5, size), size) if moved else None
    expected = reference(pixels, rows, moves, table()).bfloat16()
    for out in (None, torch.empty(4, size, size, 3, dtype=torch.bfloat16, device=DEVICE)):
        found = chosen(pixels, rows, moves, table().bfloat16(), out)
        assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@every_implementation
def test_values_are_looked_up_and_never_converted(chosen):
    pixels = stored(3, 8)
    places = pixels.long() + 256 * torch.arange(3, device=DEVICE)
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        # NaN with payloads, subnormal numbers, minus zero
        patterns = torch.arange(768, device=DEVICE).sub(384).to(bits)
        found = chosen(pixels, None, None, patterns.view(dtype).view(3, 256))
        assert torch.equal(found.view(bits), patterns[places])


@every_implementation
def test_a_batch_has_more_images_than_a_grid_of_blocks_has_rows(chosen, implementation):
    if implementation == "triton" and DEVICE.type == "cpu":
        pytest.skip("the interpreter has no such limit, and takes minutes")
    rows = torch.arange(70000, device=DEVICE) % 7
    pixels = stored(7, 1)
    assert torch.equal(
        chosen(pixels, rows, None, table()), chosen(pixels, None, None, table())[rows]
    )


def test_the_reference_reads_no_value_on_the_host():
    with FakeTensorMode():  # refuses to
        pixels = torch.empty(6, 8, 8, 3, dtype=torch.uint8)
        order, cursor, labels, out_labels = (
            torch.empty(shape, dtype=torch.int64) for shape in (11, (), 6, 4)
        )
        moves, values = torch.empty(6, 8, dtype=torch.int32), torch.empty(3, 256)
        out = torch.empty(4, 8, 8, 3)
        with pytest.raises(DataDependentOutputException):
            cursor.item()
        kernel.augment_ref(pixels, order, moves, values, out, cursor, labels, out_labels)


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
    labels = integers(4)
    assert chosen(pixels, none, moves, table(), out, integers(), labels, none.clone()) is out


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
    cursor, labels, out_labels = (integers(n) for n in ((), 4, 3))
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
        ("out", out[0]),
        ("out", torch.empty(3, 3, 8, 8, device=DEVICE).permute(0, 2, 3, 1)),
        ("out", out.to(meta)),
        ("rows", rows[:2]),  # fewer than are wanted
        ("cursor", cursor.int()),
        ("cursor", cursor[None]),
        ("cursor", cursor.to(meta)),
        ("labels", labels.int()),
        ("labels", labels[:3]),
        ("labels", integers(8)[::2]),
        ("labels", labels.to(meta)),
        ("out_labels", out_labels.int()),
        ("out_labels", out_labels[:2]),
        ("out_labels", integers(6)[::2]),
        ("out_labels", out_labels.to(meta)),
    ]:
        given = dict(pixels=pixels, rows=rows, moves=moves, table=values, out=out, cursor=cursor)
        given |= dict(labels=labels, out_labels=out_labels) | {name: replaced}
        with pytest.raises(ValueError, match=rf"^{name} \[.*wanted contiguous") as error:
            kernel.augment(**given)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"^out \[2, "):
        kernel.augment(pixels, rows, moves, values, out[:2])
    with pytest.raises(ValueError, match=r"^out .* of torch.float32 .*wanted .* of torch.bfloat16"):
        kernel.augment(pixels, rows, moves, values.bfloat16(), out)
    for given in [(None, out), (rows, None)]:
        with pytest.raises(ValueError, match=r"^a cursor needs"):
            kernel.augment(pixels, given[0], moves, values, given[1], cursor)
    for given in [(labels, None), (None, out_labels)]:
        with pytest.raises(ValueError, match=r"^labels and out_labels"):
            kernel.augment(pixels, rows, moves, values, out, None, *given)
    kernel.augment(pixels, rows, moves, values, out)
    kernel.augment(pixels, rows, moves, values, out, cursor, labels, out_labels)


@needs_triton
def test_the_kernel_compiles_for_every_architecture_without_a_spill():
    pointers = ["pixels", "rows", "moves", "table", "out", "cursor", "labels", "out_labels"]
    variants = []
    every = [*itertools.product(("fp32", "bf16"), (True, False), (True, False), (3,))]
    every += [("fp32", True, True, 1), ("bf16", False, False, 1)]
    for kind, indexed, moved, channels in every:
        kinds = ["*u8", "*i64", "*i32", f"*{kind}", f"*{kind}", "*i64", "*i64", "*i64"]
        flags = dict(INDEXED=indexed, MOVED=moved, SHIFTED=indexed, LABELLED=indexed)
        types = dict(zip(pointers, kinds, strict=True)) | {"size": "i32"}
        variants.append((types, flags | {"CHANNELS": channels, "BLOCK": kernel.BLOCK}))
    found = machine_code("augment", variants, [*pointers, "size"])
    assert len(found) == 3 * 10
    for case, usage, others, widths, _ in found:
        # values of one channel are loaded 16 at a time and stored 4: they change places between
        exchanged = {"barriers"} if "'MOVED': False" in case and "'CHANNELS': 1" in case else set()
        assert "STACK:0" in usage and others.keys() <= exchanged, (case, usage, others)
        stores = {pointer: bits for pointer, (_, bits) in widths.items() if bits}
        labels = {"out_labels": [64]} if "'LABELLED': True" in case else {}
        assert stores == {"out": [128]} | labels, (case, stores)
