"""kernels.tally in each of its implementations, beside sums in Python's own numbers."""

import math

import pytest
import torch
from implementations import DEVICE, every_implementation, needs_triton
from machine_code import machine_code
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastsmooth.kernels import tally as kernel
from fastsmooth.kernels.backend import wide_dtype

WIDE = wide_dtype(DEVICE)
NAN, INF = math.nan, math.inf

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def chosen(implementation, monkeypatch):
    """kernels.tally.tally with this implementation."""
    monkeypatch.setattr(kernel.backend, "choose", lambda device, dtype: implementation)
    return kernel.tally


def real(value, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def integer(value) -> torch.Tensor:
    return torch.tensor(value, device=DEVICE)


def parts_of(count: int, seed: int = 0) -> torch.Tensor:
    """wide [count, 2], not negative, of many magnitudes; what lies beside them is NaN."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 2, dtype=WIDE, generator=generator).mul(3).exp()
    memory = torch.full((count + 4, 2), NAN, dtype=WIDE, device=DEVICE)
    memory[2 : 2 + count] = drawn.to(DEVICE)
    return memory[2 : 2 + count]


def same(found: kernel.State, other: kernel.State) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, other, strict=True))


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_add_up_as_in_pythons_own_numbers(chosen, dtype):
    """Bit for bit: products and sums are rounded to float64 one after the other."""
    state, cursor = kernel.zeros(DEVICE), integer(5)
    sums = {"epoch": [0.0, 0, 0], "window": [0.0, 0, 0]}
    batches = [(0.1, 3, 7), (2.7182818, 0, 1), (1e-30, 7, 7), (0.3, 11, 33), (123.4, 5, 100)]
    for update, (loss, correct, count) in enumerate(batches, 1):
        norms = parts_of(1, update)
        mean = real(loss, dtype)
        if update == 4:  # the window begins anew, and the epoch does not
            for tensor in state.window:
                tensor.zero_()
            sums["window"] = [0.0, 0, 0]
        assert chosen(norms, mean, integer(correct), state, count, cursor, 10 * count) is None
        for total in sums.values():
            total[0] += mean.item() * count
            total[1] += correct
            total[2] += count
        for name, total in sums.items():
            loss_sum, seen = getattr(state, name)
            assert [loss_sum.item(), *seen.tolist()] == total
        assert state.squared_norms.tolist() == norms[0].tolist()
        assert state.updates.item() == update and state.bad_update.item() == 0
    assert cursor.item() == 5 + 10 * (7 + 1 + 7 + 33 + 100)
    for tensor in state.epoch:
        tensor.zero_()
    assert state.epoch.seen.tolist() == [0, 0] and state.window.seen.tolist() == [16, 133]


@every_implementation
@pytest.mark.parametrize("parts", [1, 2, 1023, 1024, 1025, 5000])
def test_parts_are_added_whole_and_to_the_same_bits_each_time(chosen, parts):
    norms, before = parts_of(parts), parts_of(parts)
    found = [kernel.zeros(DEVICE) for _ in range(2)]
    for state in found:
        state.reals.fill_(3.0)  # an earlier update's norms are no part of this one's
        chosen(norms, real(0.5), integer(1), state, 2)
    assert same(*found) and torch.equal(norms, before)
    # n - 1 sums of what is not negative: each rounds by at most half an epsilon
    bound = parts * torch.finfo(WIDE).eps / 2
    for value, column in zip(found[0].squared_norms.tolist(), norms.T.tolist(), strict=True):
        assert value == pytest.approx(math.fsum(column), rel=bound, abs=0)
    assert found[0].bad_update.item() == 0


@every_implementation
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning:triton")
@pytest.mark.parametrize(
    "bad",
    [
        {"loss": NAN}, {"loss": INF}, {"loss": -INF}, {"loss": -INF, "g": INF},
        {"g": NAN}, {"g": INF}, {"m": NAN}, {"m": INF},
        {"g": 1e308, "m": 1e308},  # finite, and their sum is not
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("parts", [1, 1500])
def test_the_first_update_that_is_not_finite_is_kept(chosen, bad, parts):
    state = kernel.zeros(DEVICE)
    found = []
    for update in range(1, 7):
        norms, loss = parts_of(parts), real(1.0)
        if update in (3, 5):
            loss = real(bad.get("loss", 1.0))
            for column, name in enumerate("gm"):
                norms[-1, column] = bad.get(name, 1.0)
        chosen(norms, loss, integer(1), state, 2)
        found.append(state.bad_update.item())
    assert found == [0, 0, 3, 3, 3, 3]
    assert state.updates.item() == 6 and state.epoch.seen.tolist() == [6, 12]


@every_implementation
def test_what_is_largest_is_finite(chosen):
    state = kernel.zeros(DEVICE)
    largest = torch.finfo(WIDE).max
    norms = torch.tensor([[largest / 2, largest / 4]], dtype=WIDE, device=DEVICE)
    chosen(norms, real(-3e38), integer(0), state, 1)
    assert state.bad_update.item() == 0


@every_implementation
def test_counts_are_wider_than_32_bits(chosen):
    state, cursor = kernel.zeros(DEVICE), integer(2**40)
    state.counts.copy_(integer([2**40, 2**41, 2**42, 2**43, 2**31 - 1, 0]))
    chosen(parts_of(1), real(NAN), integer(2**33), state, 2**34, cursor, 2**35)
    counts = [2**40 + 2**33, 2**41 + 2**34, 2**42 + 2**33, 2**43 + 2**34, 2**31, 2**31]
    assert state.counts.tolist() == counts and cursor.item() == 2**40 + 2**35


@every_implementation
@pytest.mark.parametrize("parts", [1, 1023])
def test_the_same_call_again_goes_by_what_is_in_memory_then(chosen, implementation, parts):
    """As a graph of the step plays it: the arguments are the same tensors and numbers each time."""
    norms, loss, correct, cursor = parts_of(parts), real(0.0), integer(0), integer(0)
    state = kernel.zeros(DEVICE)
    given = norms, loss, correct, state, 4, cursor, 4
    expected = 0.0
    for update in range(1, 5):
        loss.fill_(update / 3), correct.fill_(update), norms.fill_(update)
        assert kernel.IMPLEMENTATIONS[implementation](*given) is None
        expected += loss.item() * 4
        assert state.epoch.loss.item() == expected
        assert state.squared_norms.tolist() == [parts * update] * 2
        assert state.updates.item() * 4 == cursor.item() == state.window.seen[1] == 4 * update
    assert state.epoch.seen.tolist() == [1 + 2 + 3 + 4, 16]


@every_implementation
@pytest.mark.parametrize("advanced", [True, False])
def test_nothing_but_the_state_and_the_cursor_is_written(chosen, advanced):
    reals = torch.full((20,), 7.0, dtype=WIDE, device=DEVICE)
    counts = torch.full((20,), 7, device=DEVICE)
    state = kernel.State(reals[5:9].zero_(), counts[5:11].zero_())  # not aligned to 16 bytes
    cursor = counts[15] if advanced else None
    given = parts_of(3), real(0.5), integer(2)
    before = [t.clone() for t in given]
    chosen(*given, state, 2, cursor, 9)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert reals[5:7].tolist() == [1.0, 1.0] and counts[5:11].tolist() == [2, 2, 2, 2, 1, 0]
    beside = [i for i in range(20) if not 5 <= i < 11 and i != 15]
    assert (counts[beside] == 7).all() and counts[15] == (16 if advanced else 7)
    assert (reals[:5] == 7).all() and (reals[9:] == 7).all()


def test_a_new_state_lies_on_the_device_and_is_zero():
    state = kernel.zeros(DEVICE)
    assert [t.tolist() for t in state] == [[0.0] * 4, [0] * 6]
    assert all(t.device.type == DEVICE.type for t in state) and state.reals.dtype == WIDE


def test_the_reference_reads_no_value_on_the_host():
    with FakeTensorMode():  # refuses to
        state, norms = kernel.zeros(torch.device("cpu")), torch.ones(3, 2, dtype=torch.float64)
        loss, correct, cursor = torch.ones(()), *torch.ones(2, dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            loss.item()
        kernel.tally_ref(norms, loss, correct, state, 4, cursor, 4)


def test_what_does_not_fit_is_refused():
    given = dict(norms=parts_of(3), loss=real(0.5), correct=integer(2), state=kernel.zeros(DEVICE))
    given |= dict(count=4, cursor=integer(0))
    norms, state, meta = given["norms"], given["state"], torch.device("meta")
    for name, replaced in [
        ("norms", norms.half()),
        ("norms", norms[:0]),
        ("norms", norms[0]),
        ("norms", norms[:, :1].contiguous()),
        ("norms", norms.t().contiguous().t()),
        ("loss", given["loss"].half()),
        ("loss", given["loss"][None]),
        ("loss", given["loss"].to(meta)),
        ("correct", given["correct"].int()),
        ("correct", given["correct"][None]),
        ("correct", given["correct"].to(meta)),
        ("state.reals", state._replace(reals=state.reals.half())),
        ("state.reals", state._replace(reals=state.reals[:3])),
        ("state.counts", state._replace(counts=state.counts.int())),
        ("state.counts", state._replace(counts=state.counts[:5])),
        ("state.counts", state._replace(counts=state.counts.to(meta))),
        ("cursor", given["cursor"].int()),
        ("cursor", given["cursor"][None]),
        ("cursor", given["cursor"].to(meta)),
    ]:
        argument = name.partition(".")[0]
        with pytest.raises(ValueError, match=rf"^{name} \[.*wanted contiguous") as error:
            kernel.tally(**given | {argument: replaced})
        assert len(str(error.value).splitlines()) == 1
    assert state.counts.tolist() == [0] * 6
    kernel.tally(**given)


@needs_triton
def test_the_kernel_compiles_for_every_architecture_without_a_spill():
    pointers = ["norms", "loss", "correct", "reals", "counts", "cursor"]
    numbers = dict.fromkeys(["parts", "count", "taken"], "i32")
    variants = [
        (
            dict(zip(pointers, ["*fp64", loss, "*i64", "*fp64", "*i64", "*i64"], strict=True))
            | numbers,
            {"ADVANCED": advanced, "BLOCK": kernel.BLOCK},
        )
        for loss in ("*fp32", "*fp64")
        for advanced in (True, False)
    ]
    found = machine_code("tally", variants, ["norms", "reals", "counts"], **kernel.OPTIONS)
    assert len(found) == 3 * 4
    for case, usage, others, widths, sass in found:
        assert "STACK:0" in usage and others.keys() == {"barriers"}, (case, usage, others)
        assert widths["norms"] == [[128], []], (case, widths)
        stored = {pointer for pointer, (_, bits) in widths.items() if bits}
        advanced = {"cursor"} if "'ADVANCED': True" in case else set()
        assert stored == {"reals", "counts"} | advanced, (case, stored)
        # a sum of losses is rounded after the product, as it is on a CPU
        assert "DADD" in sass and "DFMA" not in sass, case
