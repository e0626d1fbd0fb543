"""SAM and GSAM beside the papers' equations written out in float64; and all flags that change the
step together, killed and gone on with."""

import json
import os
import signal

import pytest
import torch
from exact import EXACT
from forks import assert_same_run, final_state, finish, start, wait_for
from rows import read_rows
from said import refused, said
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.func import functional_call
from torch.nn import functional as F

from fastsmooth.cli.config import resolve
from fastsmooth.optim import NoisySGD
from fastsmooth.train import main
from fastsmooth.training import joining
from fastsmooth.training.joining import Facts, choose_measure
from fastsmooth.training.sam import Sam
from fastsmooth.training.step import Step
from fastsmooth.training.update import Update

CPU = torch.device("cpu")
KINDS = {"sam": Sam(0.3), "gsam": Sam(0.3, 0.4)}


def network(norm: str = "group") -> nn.Module:
    torch.manual_seed(0)
    normed = nn.BatchNorm2d(4) if norm == "batch" else nn.GroupNorm(2, 4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), normed, nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)
    )


def batches(count: int, dtype: torch.dtype = torch.float32):
    numbers = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, 3, 4, 4, generator=numbers).to(dtype)
        yield x, torch.randint(5, (8,), generator=numbers)


def by_hand(norm: str, sam: Sam, updates: int, parts: int = 1) -> tuple[dict[str, Tensor], list]:
    """(weights and buffers, losses) of heavy ball along the direction of the papers, in float64,
    with vectors of all weights."""
    model = network(norm).double()
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    buffers = dict(model.named_buffers())

    def named(vector: Tensor) -> dict[str, Tensor]:
        pieces = vector.split([shape.numel() for shape in shapes])
        return {
            name: piece.view(shape)
            for name, piece, shape in zip(names, pieces, shapes, strict=True)
        }

    def slope(vector: Tensor, x: Tensor, y: Tensor, state: dict[str, Tensor]):
        vector = vector.detach().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        for some in zip(x.chunk(parts), y.chunk(parts), strict=True):
            logits = functional_call(model, named(vector) | state, (some[0],))
            loss = loss + F.cross_entropy(logits, some[1]) / parts
        return loss.item(), torch.autograd.grad(loss, vector)[0]

    momentum, losses = torch.zeros_like(w), []
    for x, y in batches(updates, torch.float64):
        loss, g = slope(w, x, y, buffers)  # moves the buffers
        losses.append(loss)
        aside = {name: b.clone() for name, b in buffers.items()}
        _, g_p = slope(w + sam.rho * g / g.norm(), x, y, aside)
        parallel = (g @ g_p) / (g_p @ g_p) * g_p
        direction = g_p - sam.alpha * (g - parallel)
        momentum = 0.9 * momentum + direction
        w = w - 0.1 * momentum
    return named(w) | buffers, losses


def stepped(norm: str, sam: Sam, compile: bool = False, micro: int | None = None) -> Update:
    model = network(norm)
    optimizer = NoisySGD(model.parameters(), "shb", 0.1, 0.9)
    return Update(Step(model, optimizer, CPU, "fp32", compile, micro, sam=sam), CPU, [])


@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_the_papers_equations(kind, norm, micro):
    """Running statistics move by the pass at the weights alone; with parts it is SAM of the whole
    batch."""
    update = stepped(norm, KINDS[kind], micro=micro)
    expected, losses = by_hand(norm, KINDS[kind], 6, 8 // (micro or 8))
    for (x, y), loss in zip(batches(6), losses, strict=True):
        assert update.step.parts_apart(8) == 1
        update((x, y), 8)
        assert update.window.means()[0] == pytest.approx(loss, rel=1e-4)
        update.window.reset()
    found = update.step.model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=2e-4, atol=2e-5)


def test_the_direction_has_float64s_digits_of_the_equations():
    """Sam alone, of a model in float64, whose weights are afterwards the very same."""
    for sam in KINDS.values():
        model = network("batch").double()
        x, y = next(batches(1, torch.float64))
        before = {name: t.clone() for name, t in model.state_dict().items()}

        def gradient(model=model, x=x, y=y):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

        gradient()
        moved = {name: b.clone() for name, b in model.named_buffers()}
        sam.apply(model, list(model.parameters()), gradient)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name])
        for name, b in model.named_buffers():  # as the first pass left them
            assert torch.equal(b, moved[name]) and not torch.equal(b, before[name])
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        expected, _ = by_hand("batch", sam, 1)
        end = torch.cat([expected[name].flatten() for name, _ in model.named_parameters()])
        began = torch.cat([before[name].flatten() for name, _ in model.named_parameters()])
        torch.testing.assert_close(found, (began - end) / 0.1, rtol=1e-9, atol=1e-12)


def test_gsam_turns_what_sam_has_by_what_is_perpendicular_alone():
    """Which leaves its part along g_p."""
    flat = []
    for sam in (*KINDS.values(), None):
        update = stepped("group", sam)
        update.step.gradient(*next(batches(1)))
        grads = [p.grad.flatten().double() for p in update.step.model.parameters()]
        flat.append(torch.cat(grads))
    uphill, turned, plain = flat
    across = plain - (plain @ uphill) / (uphill @ uphill) * uphill
    assert across.norm() > 0.05 * plain.norm()
    torch.testing.assert_close(uphill - turned, 0.4 * across, rtol=1e-3, atol=1e-5)


def test_a_gradient_of_zero_moves_nothing():
    """||g|| is no divisor then."""
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()

    def gradient() -> None:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    gradient()
    Sam(0.1, 0.5).apply(model, list(model.parameters()), gradient)
    assert torch.equal(model.weight, before)
    assert not any(p.grad.any() for p in model.parameters())


def test_a_gradient_that_is_not_finite_is_noticed():
    update = stepped("group", Sam(0.1))
    (x, y), *_ = batches(1)
    update((x, y), 8)
    assert update.kept.bad_update == 0
    update((x * float("inf"), y), 8)
    assert update.kept.bad_update == 2


def test_a_weight_that_takes_part_by_chance_alone_is_no_hindrance():
    """Stochastic depth may leave a layer out of one of the two passes."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    kept = [True, False]

    def gradient() -> None:
        model.zero_grad(set_to_none=True)
        hidden = model[0](x) if kept.pop(0) else x
        F.cross_entropy(model[1](hidden), y).backward()

    gradient()
    Sam(0.1, 0.5).apply(model, list(model.parameters()), gradient)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def compiled_in_no_time(self, graph, inputs):
    """Step's backend without code of its own."""
    self.compiled_graphs += 1
    return aot_eager(graph, inputs)


def test_a_compiled_step_is_compiled_once_and_does_the_same(monkeypatch):
    monkeypatch.setattr(Step, "_counting_backend", compiled_in_no_time)
    plain, compiled = stepped("group", KINDS["gsam"]), stepped("group", KINDS["gsam"], True)
    for x, y in batches(3):
        for update in (plain, compiled):
            update((x, y), 8)
    assert compiled.step.compiled_graphs == 1
    for p, q in zip(plain.step.model.parameters(), compiled.step.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


RUN = ["--norm", "group", "--batchsize", "240", "--budget", "updates=3", "--log-every", "1"]


def test_two_processes_train_what_one_does(tmp_path):
    """The first gradient is that of the whole batch, so that the way uphill is."""
    argv = [*RUN, "--sam", "rho=0.2,alpha=0.3", "--optimizer", "shb", "--clip-norm", "1"]
    argv += ["--ema", "0.9"]
    for world in (1, 2):
        finish(argv, tmp_path / f"{world}", world)
    one, two = (final_state(tmp_path / f"{world}") for world in (1, 2))
    for name in one["model"]:
        torch.testing.assert_close(one["model"][name], two["model"][name], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one["ema"][name], two["ema"][name], rtol=1e-3, atol=1e-5)
    rows = [[r for r in read_rows(tmp_path / w) if r["kind"] == "step"] for w in ("1", "2")]
    for a, b in zip(*rows, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_rows_of_a_run_have_no_delta_and_c2_of_the_plain_gradient(tmp_path):
    flags = ["--batchsize", "64", "--norm", "group", "--budget", "updates=1", "--log-every", "1"]
    flags += ["--track-noise", "every=1"]
    assert main([*flags, "--out", str(tmp_path / "plain")]) == 0
    shown = said(main, [*flags, "--sam", "rho=0.5", "--out", str(tmp_path / "sam")])
    assert shown.code == 0, shown
    assert "C2 is of the plain gradient at the weights, not of that of --sam" in shown.out
    plain, of_sam = (
        {row["kind"]: row for row in read_rows(tmp_path / name)} for name in ("plain", "sam")
    )
    assert all(row["delta"] is None for row in of_sam.values())
    assert of_sam["measure"]["delta_measured"] is None
    for name in ("c2_sampled", "grad_norm"):
        assert of_sam["measure"][name] == plain["measure"][name]
    assert of_sam["step"]["train_loss"] == plain["step"]["train_loss"]
    assert of_sam["step"]["grad_norm"] != pytest.approx(plain["step"]["grad_norm"], rel=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mode sampling", "--mode sampling is of the plain step"),
        ("--mode critical", "--mode critical is of the plain step"),
        ("--measure step --track-noise every=5", "--measure step: the update of --sam"),
        ("--quantities cabs --track-noise every=5", "--quantities cabs is a rule of plain SGD"),
    ],
)
def test_measurements_of_the_plain_step_are_refused(flags, message, tmp_path):
    argv = ["--sam", "rho=0.05", *flags.split(), "--out", str(tmp_path / "run")]
    assert refused(main, argv).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["0.05", "rho=0", "rho=0.1,beta=1", "rho=x", "alpha=1", "rho="])
def test_values_that_are_none_are_refused(value):
    assert refused(main, ["--sam", value]).startswith("--sam: ")


def test_the_step_does_not_measure_under_sam(monkeypatch):
    monkeypatch.setattr(joining, "difference", lambda *given: "")
    x, y = torch.randn(4, 3, 4, 4), torch.arange(4)
    flags = {"sam": "rho=0.1", "track_noise": "every=5", "bn": "batch"}
    meta = x.to("meta")  # as on a GPU, where auto would measure by the step
    monkeypatch.setattr(type(meta), "device", torch.device("cuda"), raising=False)
    c = resolve(flags)
    assert choose_measure(Facts(c, "per-sample", 1), network(), meta, y, False) == (
        "apart",
        "--sam trains along another gradient",
    )


def test_a_plan_counts_both_gradients():
    costs = []
    for flags in ([], ["--sam", "rho=0.1"]):
        (line,) = (
            line
            for line in said(main, ["--epochs", "2", *flags, "--plan"]).out.splitlines()
            if line.startswith("cost")
        )
        costs.append(int(line.split(" updates, ")[1].split()[0].replace(",", "")))
    assert costs[1] == 2 * costs[0]


# All together

ALL = [
    *EXACT, "--epochs", "2", "--batchsize", "240", "--checkpoint-every", "2", "--log-every", "4",
    "--label-smoothing", "0.1", "--loss", "bce", "--top5", "--ema", "0.9", "--clip-norm", "0.05",
    "--weight-decay", "0.01", "--decay-weights-only", "--sam", "rho=0.1,alpha=0.2",
    "--optimizer", "shb", "--lr", "0.05", "--micro-batch", "60", "--track-noise", "every=3",
]  # fmt: skip


def test_a_run_with_all_of_them_goes_on_in_the_same_bits(tmp_path):
    finish(ALL, tmp_path / "undisturbed")
    process = start(ALL, tmp_path / "killed")
    wait_for(tmp_path / "killed" / "checkpoints" / "ckpt-8.json")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finish([*ALL, "--resume"], tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")
    a, b = (
        json.loads((tmp_path / n / "summary.json").read_text()) for n in ("killed", "undisturbed")
    )
    for name in ("best_ema_test_acc", "final_ema_test_top5", "final_test_top5"):
        assert a[name] == b[name]


def test_no_update_waits_for_the_device(monkeypatch, tmp_path):
    """Between two logged rows no number is read back."""
    reads = []
    item, tolist = Tensor.item, Tensor.tolist
    monkeypatch.setattr(Tensor, "item", lambda t: reads.append(1) or item(t))
    monkeypatch.setattr(Tensor, "tolist", lambda t: reads.append(1) or tolist(t))
    flags = ["--sam", "rho=0.1,alpha=0.2", "--clip-norm", "0.1", "--ema", "0.9", "--loss", "bce"]
    counts = []
    for updates in (3, 9):
        reads.clear()
        out = str(tmp_path / f"{updates}")
        argv = [*flags, "--budget", f"updates={updates}", "--log-every", "100000", "--out", out]
        assert main(argv) == 0
        counts.append(len(reads))
    assert counts[0] == counts[1]
