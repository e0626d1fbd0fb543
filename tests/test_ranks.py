"""Several processes train the model that one would: against plain PyTorch, against one process, and
to the last bit when interrupted."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from forks import (
    SERVER,
    assert_same_run,
    codes,
    final_state,
    finish,
    free_port,
    logs,
    saved_steps,
    start_ranks,
    wait_for,
)
from rows import read_rows
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from fastsmooth import data, models
from fastsmooth.cli.config import resolve
from fastsmooth.data.order import permutation
from fastsmooth.noise import gradients
from fastsmooth.optim import NoisySGD
from fastsmooth.ranks import Exchange, RankLost, Ranks, in_buckets
from fastsmooth.runfolder.read import read_status
from fastsmooth.training.step import Step
from fastsmooth.training.syncnorm import convert

CPU = torch.device("cpu")
SHORT = ["--epochs", "1", "--log-every", "1"]


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes have: another order of a sum in one layer grows where BatchNorm sees one
    sample."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(out, kind: str) -> list[dict]:
    return [row for row in read_rows(out) if row["kind"] == kind]


def weights_of(out) -> dict:
    return final_state(out)["model"]


# The gradient and BatchNorm


def by_hand(
    world: int, batch: int, lr: float, updates: int | None, beta: float = 0.9
) -> dict[str, torch.Tensor]:
    """resnet8 on the digits as `world` processes train it, in plain PyTorch: every process's share
    of the permutation through the model by itself, gradients and BatchNorm's statistics averaged
    over samples."""
    torch.manual_seed(0)
    images = data.open_data(resolve({}), CPU)
    model = models.build("resnet8", 10)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=beta)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    order = permutation(0, 0, 1437)
    places = torch.arange(1437)
    for at in list(range(0, 1437, batch))[:updates]:
        chosen, mine = order[at : at + batch], places[at : at + batch] % world
        optimizer.zero_grad()
        before = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
        after = [(torch.zeros_like(mean), torch.zeros_like(var)) for mean, var in before]
        for rank in range(world):
            index = chosen[mine == rank]
            if len(index) == 0:
                share = 0.0
            else:
                share = len(index) / len(chosen)
                x, y = next(images.train.batches([index]))
                (F.cross_entropy(model(x), y) * share).backward()
            for m, sums, old in zip(norms, after, before, strict=True):
                sums[0].add_(m.running_mean, alpha=share)
                sums[1].add_(m.running_var, alpha=share)
                m.running_mean.copy_(old[0])
                m.running_var.copy_(old[1])
        for m, sums in zip(norms, after, strict=True):
            m.running_mean.copy_(sums[0])
            m.running_var.copy_(sums[1])
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(
    ("world", "batch"), [(2, 359), (3, 287)]
)  # the last batches have 1 and 2 samples: some shares none
def test_every_process_has_its_share_of_the_batch_and_its_own_batchnorm(world, batch, tmp_path):
    argv = [*SHORT, "--batchsize", str(batch), "--optimizer", "shb", "--lr", "0.01"]
    finish(argv, tmp_path / "run", world)
    expected, found = by_hand(world, batch, 0.01, None), weights_of(tmp_path / "run")
    for name, value in expected.items():
        if "num_batches" in name:
            assert found[name] == -(-1437 // batch)
        else:
            torch.testing.assert_close(
                found[name], value, rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize(
    ("world", "norm", "tolerance"),
    [
        (2, ["--sync-bn", "--drop-last"], 1e-4),
        # BatchNorm over the one sample of the last batch makes much of rounding
        (3, ["--sync-bn"], 1e-3),
        (3, ["--norm", "group"], 2e-5),
    ],
)
def test_what_does_not_depend_on_the_share_is_what_one_process_computes(
    world, norm, tolerance, tmp_path
):
    argv = [*SHORT, "--batchsize", "359", "--optimizer", "nshb"]
    finish([*argv, *norm], tmp_path / "many", world)
    finish([*argv, *(flag for flag in norm if flag != "--sync-bn")], tmp_path / "one")
    many, one = weights_of(tmp_path / "many"), weights_of(tmp_path / "one")
    for name, value in one.items():
        torch.testing.assert_close(
            many[name], value, rtol=2e-4, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
    for a, b in zip(
        rows_of(tmp_path / "many", "step"), rows_of(tmp_path / "one", "step"), strict=True
    ):
        assert a["samples"] == b["samples"] and a["train_acc"] == pytest.approx(
            b["train_acc"], abs=1e-6
        )
        for key in ("train_loss", "grad_norm", "direction_norm"):
            assert a[key] == pytest.approx(b[key], rel=10 * tolerance), key


def normalised(rank: int, world: int, port: int, folder: str) -> None:
    """This process's samples of the batch in `folder` through a SyncBatchNorm, with their share of
    a loss over all."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
        )
    x, weights, owner = torch.load(f"{folder}/batch.pt")
    mine = owner == rank
    model = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3), torch.nn.ReLU(), torch.nn.BatchNorm2d(3)
    ).double()
    if world > 1:
        convert(model)
    own = x[mine].requires_grad_()
    for _ in range(2):
        (model(own) * weights[mine]).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    torch.save(
        (own.grad, grads, dict(model.named_buffers()), model.eval()(x)),
        f"{folder}/{world}-{rank}.pt",
    )


def test_synchronised_batchnorm_is_batchnorm_over_the_batch_of_all(tmp_path):
    """In float64, with shares of 5, 0 and 2 samples, gradients and running statistics included."""
    torch.manual_seed(2)
    x, weights = (
        torch.randn(7, 3, 2, 4, dtype=torch.float64),
        torch.randn(7, 3, 2, 4, dtype=torch.float64),
    )
    owner = torch.tensor([0, 0, 2, 0, 2, 0, 0])
    torch.save((x, weights, owner), tmp_path / "batch.pt")
    port = free_port()
    processes = [
        SERVER.Process(target=normalised, args=(rank, 3, port, str(tmp_path))) for rank in range(3)
    ]
    for process in processes:
        process.start()
    assert codes(processes, 60) == [0, 0, 0]
    torch.save((x, weights, torch.zeros(7)), tmp_path / "batch.pt")
    normalised(0, 1, 0, str(tmp_path))
    of_x, grads, buffers, output = torch.load(tmp_path / "1-0.pt")
    found = [torch.load(tmp_path / f"3-{rank}.pt") for rank in range(3)]
    for rank in range(3):
        torch.testing.assert_close(found[rank][0], of_x[owner == rank])
        torch.testing.assert_close(found[rank][2], buffers)
        torch.testing.assert_close(found[rank][3], output)
    for name, grad in grads.items():
        torch.testing.assert_close(sum(parts[1][name] for parts in found), grad)


def test_evaluation_counts_every_test_image_once(tmp_path):
    """With frozen weights the test loss is the mean over the same batches, whoever computes
    them."""
    argv = [*SHORT, "--lr", "1e-30", "--norm", "group", "--batchsize", "500"]
    for world in (1, 2, 4):  # 360 test images are two batches: two of four processes have none
        finish(argv, tmp_path / str(world), world)
    (one,), *others = (rows_of(tmp_path / str(world), "epoch") for world in (1, 2, 4))
    for (row,) in others:
        assert row["test_acc"] == one["test_acc"] and row["test_loss"] == pytest.approx(
            one["test_loss"], rel=1e-12
        )


def test_micro_batches_give_the_gradient_of_the_batch(tmp_path):
    argv = [*SHORT, "--norm", "group", "--batchsize", "359"]
    finish(argv, tmp_path / "whole")
    finish([*argv, "--micro-batch", "100"], tmp_path / "cut")
    finish([*argv, "--micro-batch", "70"], tmp_path / "two", 2)
    whole = weights_of(tmp_path / "whole")
    for other in ("cut", "two"):
        for name, value in weights_of(tmp_path / other).items():
            torch.testing.assert_close(value, whole[name], rtol=2e-4, atol=2e-5)
    assert "another gradient" not in logs(tmp_path / "cut")
    finish([*SHORT, "--batchsize", "359", "--micro-batch", "100"], tmp_path / "batchnorm")
    assert "BatchNorm sees 100 samples at a time" in logs(tmp_path / "batchnorm")


# The exchange: which bucket starts when, and what it brings


class Branches(nn.Module):
    """Four branches, of which the gradients come in the order in which `rank` computes them; a
    layer that process 0 alone uses, one that nobody uses, one that is frozen."""

    def __init__(self, rank: int, norm: nn.Module):
        super().__init__()
        # in the last bucket, or it would have the others wait for the end
        self.own, self.unused, self.frozen = (nn.Linear(8, 10) for _ in range(3))
        self.frozen.requires_grad_(False)
        self.rank, self.norm = rank, norm
        self.stem = nn.Conv2d(3, 8, 3)
        self.branches = nn.ModuleList(nn.Linear(8, 10) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.stem(x.to(self.stem.weight.dtype)))
        h = h.to(self.own.weight.dtype).mean(dim=(2, 3))
        branches = list(self.branches)[:: -1 if self.rank % 2 else 1]
        y = sum([branch(h) for branch in branches], self.frozen(h))
        return y + self.own(h) if self.rank == 0 else y


def branches(case: str, rank: int) -> Branches:
    torch.manual_seed(0)
    model = Branches(rank, nn.GroupNorm(2, 8) if case == "group" else nn.BatchNorm2d(8))
    if case == "double":
        model = model.double()
    if case == "half":  # in part
        model.stem.to(torch.bfloat16)
        model.norm.to(torch.bfloat16)
    return model.to(memory_format=torch.channels_last)


def batches(world: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """In the last one the last process has no share."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, 3, 5, 5, generator=generator),
            torch.randint(10, (size,), generator=generator),
        )
        for size in (5 * world - 1, 4 * world, world - 1)
    ]


def exchanging(rank: int, world: int, port: int, folder: str, case: str) -> None:
    """Save what Step.gradient leaves of each batch on this process."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    model, order, found = branches(case, rank), [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)
    micro = 2 if case == "micro" else None
    step = Step(model, optimizer, CPU, "fp32", False, micro, Ranks(rank, world))
    for x, y in batches(world):
        loss, correct = step.gradient(x[rank::world], y[rank::world], len(y))
        for p in model.parameters():
            same = p.grad is None or (p.grad.stride(), p.grad.dtype) == (p.stride(), p.dtype)
            assert same and (p.grad is not None) == p.requires_grad
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        places = [p.grad.data_ptr() for p in model.parameters() if p.requires_grad]
        assert not any(place % 16 for place in places)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        found.append((grads, buffers, loss, correct, places, order.copy()))
        order.clear()
    torch.save(found, f"{folder}/{case}-{rank}.pt")


def summed_by_hand(case: str, world: int, micro: int) -> list[tuple]:
    """(gradients, buffers, loss, hits) of each batch in float64, share after share."""
    stood, found = branches(case, 0).double().state_dict(), []
    for x, y in batches(world):
        grads: dict = {}
        buffers = {name: torch.zeros_like(t) for name, t in stood.items() if "running" in name}
        loss = hits = 0
        for rank in range(world):
            model = branches(case, rank).double()
            model.load_state_dict(stood)
            own = y[rank::world]
            for part in zip(x[rank::world].split(micro), own.split(micro), strict=True):
                if len(own):
                    logits = model(part[0].double())
                    value = F.cross_entropy(logits, part[1], reduction="sum") / len(y)
                    value.backward()
                    loss, hits = loss + value, hits + (logits.argmax(1) == part[1]).sum()
            for name, p in model.named_parameters():
                if p.requires_grad:
                    own_grad = torch.zeros_like(p) if p.grad is None else p.grad
                    grads[name] = grads.get(name, 0) + own_grad
            for name, t in buffers.items():
                t.add_(model.state_dict()[name], alpha=len(own) / len(y))
        stood |= buffers
        found.append((grads, buffers, loss, hits))
    return found


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", ["batch", "group", "micro", "double", "half"])
def test_gradients_that_come_in_other_orders_are_added_up_alike(case, world, tmp_path):
    port = free_port()
    processes = [
        SERVER.Process(target=exchanging, args=(rank, world, port, str(tmp_path), case))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    assert codes(processes, 60) == [0] * world
    found = [torch.load(tmp_path / f"{case}-{rank}.pt") for rank in range(world)]
    close = {"rtol": 0.05, "atol": 0.02} if case == "half" else {"rtol": 1e-4, "atol": 1e-6}
    expected = summed_by_hand(case, world, 2 if case == "micro" else 100)
    for number, (grads, buffers, loss, hits) in enumerate(expected):
        at = [process[number] for process in found]
        assert at[0][5] != at[1][5]  # or nothing is tried
        for rank, (own_grads, own_buffers, own_loss, own_hits, places, _) in enumerate(at):
            assert places == found[rank][0][4]
            for name, grad in grads.items():
                assert torch.equal(own_grads[name], at[0][0][name])
                torch.testing.assert_close(own_grads[name].double(), grad, **close)
            for name, buffer in own_buffers.items():
                assert torch.equal(buffer, at[0][1][name])
                if "running" in name:
                    torch.testing.assert_close(buffer.double(), buffers[name], **close)
            torch.testing.assert_close(own_loss.double(), loss.detach().double(), **close)
            assert case == "half" or own_hits == hits


class Group:
    """A group of 8 of which this is process 0, that adds nothing up: `events` has its calls, each
    by its tensor's address and size, among what a test puts there."""

    def __init__(self, monkeypatch):
        self.events: list = []
        self.fails_at: int | None = None  # the call that finds no other process
        self.calls, real = 0, torch.distributed.all_reduce

        def all_reduce(tensor, *args, **kwargs):
            self.calls += 1
            if self.calls == self.fails_at:
                raise RuntimeError("connection closed by peer")
            self.events.append((tensor.data_ptr(), tensor.numel()))
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

    def watch(self, named_parameters) -> None:
        """Put there which gradients come; before anything else hears of them."""
        for name, p in named_parameters:
            p.register_post_accumulate_grad_hook(lambda _, name=name: self.events.append(name))

    def calls_of(self, exchange: Exchange) -> list:
        """The events, the call of a bucket by its number."""
        numbers = {(b.flat.data_ptr(), b.flat.numel()): i for i, b in enumerate(exchange.buckets)}
        return [numbers.get(event, event) for event in self.events]


@pytest.fixture
def group(monkeypatch):
    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield Group(monkeypatch)
    torch.distributed.destroy_process_group()


def step_of(model: nn.Module, compile: bool = False, micro_batch: int | None = None) -> Step:
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)
    return Step(model, optimizer, CPU, "fp32", compile, micro_batch, Ranks(0, 8))


def test_buckets_are_the_parameters_backwards_in_four_of_about_equal_size():
    params = list(models.build("resnet18", 100).parameters())
    groups = in_buckets(params)
    assert [id(p) for g in groups for p in g] == [id(p) for p in reversed(params)]
    shares = [sum(p.nbytes for p in g) / sum(p.nbytes for p in params) for g in groups]
    assert len(groups) == 4 and all(0.15 < share < 0.35 for share in shares)
    assert [len(g) for g in in_buckets(params[:2])] == [1, 1]
    mixed = [p.bfloat16() if p.dim() == 4 else p for p in params]
    for g in in_buckets(mixed):
        assert len({p.dtype for p in g}) == 1
    assert len(in_buckets(mixed)) == 8


@pytest.mark.parametrize("seed", range(10))
def test_a_bucket_starts_when_it_and_those_before_it_are_complete(seed, group):
    """Eight parameters, of which each two are a bucket, with gradients in an order by chance."""
    params = [nn.Parameter(torch.full((3, 5), float(i))) for i in range(8)]
    group.watch((str(i), p) for i, p in enumerate(params))
    exchange = Exchange(params, [], 1, overlap=True)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
    for _ in range(2):
        for p in params:
            p.grad = None
        group.events.clear()
        # autograd goes back from what was computed last
        terms = [params[i].square().sum() for i in reversed(order)]
        exchange.expect([], torch.tensor([2.0]))
        torch.stack(terms).sum().backward()
        expected: list = []
        for i, came in enumerate(order):
            expected.append(str(came))
            for bucket in range(4):
                needed = set(range(7, 5 - 2 * bucket, -1))
                if bucket not in expected and needed <= set(order[: i + 1]):
                    expected.append(bucket)
        assert group.calls_of(exchange) == expected
        assert exchange.finish() == 2.0 and group.calls_of(exchange) == expected
        for i, p in enumerate(params):
            assert (p.grad == 2 * i).all()


def test_most_buckets_travel_while_the_gradients_of_a_network_still_come(group):
    model = models.build("resnet8", 10)
    group.watch(model.named_parameters())
    step = step_of(model)
    step.gradient(torch.randn(4, 3, 32, 32), torch.arange(4), 32)
    events = group.calls_of(step._exchange)
    assert [e for e in events if isinstance(e, int)] == [0, 1, 2, 3]
    names = [name for name, _ in model.named_parameters()]
    groups, came = step._exchange.groups, {e for e in events if isinstance(e, str)}
    assert came == set(names) and events[-1] == 3
    for number in range(3):  # no later than with the first gradient of the bucket after the next
        by_then = events[: events.index(number)]
        assert len(by_then) <= sum(map(len, groups[: number + 2])) + number


def test_all_but_the_last_micro_batch_are_added_up_here(group):
    model = models.build("resnet8", 10, "group")
    group.watch(model.named_parameters())
    step = step_of(model, micro_batch=2)
    step.gradient(torch.randn(5, 3, 32, 32), torch.arange(5), 40)
    events, count = group.calls_of(step._exchange), len(list(model.parameters()))
    assert all(isinstance(e, str) for e in events[: 2 * count])
    assert [e for e in events[2 * count :] if isinstance(e, int)] == [0, 1, 2, 3]
    assert len(events) == 3 * count + 4


def test_an_empty_share_starts_the_same_buckets_with_zeros(group):
    model = models.build("resnet8", 10, "group")
    step = step_of(model)
    for share in (4, 0):  # after a share that left something in the buckets
        step.gradient(torch.randn(share, 3, 32, 32), torch.arange(share), 7)
        assert group.calls_of(step._exchange) == [0, 1, 2, 3]
        assert all(p.grad.any() == (share > 0) for p in model.parameters())
        group.events.clear()


def test_synchronised_batchnorm_has_the_backward_pass_to_itself(group):
    model = convert(models.build("resnet8", 10))
    group.watch(model.named_parameters())
    step = step_of(model)
    step.gradient(torch.randn(4, 3, 32, 32), torch.arange(4), 32)
    events = group.calls_of(step._exchange)
    assert events[-4:] == [0, 1, 2, 3] and not {0, 1, 2, 3} & set(events[:-4])
    assert events[-5] == next(name for name, _ in model.named_parameters())


def compiled_in_no_time(self, graph, inputs):
    """Step's backend without code: what is compiled hands its gradients over in the same way."""
    from torch._dynamo.backends.debugging import aot_eager

    self.compiled_graphs += 1
    return aot_eager(graph, inputs)


def test_a_compiled_model_starts_its_buckets_in_order(group, monkeypatch):
    monkeypatch.setattr(Step, "_counting_backend", compiled_in_no_time)
    torch.manual_seed(0)
    model, plain = (models.build("resnet8", 10, "group") for _ in range(2))
    plain.load_state_dict(model.state_dict())
    step, other = step_of(model, compile=True), step_of(plain)
    for size in (4, 6):
        x, y = torch.randn(size, 3, 32, 32), torch.arange(size)
        group.events.clear()
        step.gradient(x, y, 32)
        assert group.calls_of(step._exchange) == [0, 1, 2, 3]
        other.gradient(x, y, 32)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    # which Dynamo traces anew, with the gradients that are there
    step.evaluate([(x, y)])
    step.gradient(x, y, 32)
    assert step.compiled_graphs == 2


def test_each_batch_has_its_own_gradient_at_the_same_address(group):
    """Nothing is added to what the batch before left in the buckets."""
    model = models.build("resnet8", 10, "group")
    step, x, y = step_of(model), torch.randn(6, 3, 32, 32), torch.arange(6)
    step.gradient(x, y, 48)
    first = [(p.grad.data_ptr(), p.grad.clone()) for p in model.parameters()]
    step.gradient(x[:3], y[:3], 24)
    step.gradient(x, y, 48)
    for p, (place, grad) in zip(model.parameters(), first, strict=True):
        assert p.grad.data_ptr() == place and torch.equal(p.grad, grad)


def test_histories_leave_the_gradient_in_the_buckets_as_it_was(group):
    model = models.build("resnet8", 10, "group")
    step, x, y = step_of(model), torch.randn(6, 3, 32, 32), torch.arange(6)
    step.gradient(x, y, 48)
    before = [p.grad.clone() for p in model.parameters()]
    with gradients.unmoved(model, step.optimizer):
        step.gradient(x[:3], y[:3], 24)
        step.update()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


class Operators(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_exchange_can_be_captured(norm, group):
    """Nothing is read from the device, and no tensor made of what the host alone knows."""
    step = step_of(models.build("resnet8", 10, norm), micro_batch=2)
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    with Operators() as seen:
        step.gradient(x, y, 32)
    assert seen.names.count("c10d.allreduce_.default") == 4
    assert not [n for n in seen.names if "_local_scalar_dense" in n or "lift_fresh" in n]


@pytest.mark.parametrize("bucket", [1, 2, 4])  # the last one starts in the backward pass too
@pytest.mark.parametrize("when", ["starts", "waits"])
def test_a_process_lost_in_the_exchange_is_a_process_lost(bucket, when, group, monkeypatch):
    step = step_of(models.build("resnet8", 10, "group"))
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    monkeypatch.setattr("fastsmooth.ranks.last_words", lambda: {"reason": "no memory"})
    if when == "starts":
        group.fails_at = bucket
    else:
        waiting = step._exchange.buckets[bucket - 1]

        class Broken:
            def wait(self):
                raise RuntimeError("connection closed by peer")

        monkeypatch.setattr(waiting, "start", lambda: setattr(waiting, "_work", Broken()))
    with pytest.raises(RankLost, match="no memory") as lost:
        step.gradient(x, y, 32)
    assert lost.value.words == {"reason": "no memory"}


# Measuring


@pytest.mark.parametrize(
    "flags",
    [["--bn", "eval"], ["--bn", "train", "--sync-bn"], ["--norm", "group", "--micro-batch", "9"]],
)
def test_sampling_measures_the_noise_of_the_whole_batch(flags, tmp_path):
    argv = [
        "--mode",
        "sampling",
        "--steps",
        "0",
        "3",
        "--draws",
        "3",
        "--batchsize",
        "200",
        "--lr",
        "1e-30",
        *flags,
    ]
    finish([*argv, "--save-omega"], tmp_path / "many", 3)
    finish([flag for flag in argv if flag != "--sync-bn"], tmp_path / "one")
    many, one = (
        json.loads((tmp_path / name / "noise.json").read_text())["points"]
        for name in ("many", "one")
    )
    # BatchNorm's statistics are of shares in training, so that only the first point is the same in
    # evaluation mode
    points = zip(many[:1], one[:1], strict=True) if "eval" in flags else zip(many, one, strict=True)
    for a, b in points:
        for key in ("noise_norm", "full_grad_norm", "c2_sampled"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
        assert a["noise_norms"] == pytest.approx(b["noise_norms"], rel=1e-3)
    assert (tmp_path / "many" / "omega-3.npy").exists()


@pytest.mark.parametrize("criterion", ["mean-norm", "full-grad"])
def test_critical_finds_the_crossings_that_one_process_finds(criterion, tmp_path):
    argv = [
        "--mode",
        "critical",
        "--eps",
        "4.5",
        "3.5",
        "--criterion",
        criterion,
        "--norm",
        "group",
        "--epochs",
        "3",
    ]
    argv += ["--batchsize", "100", "--lr", "0.005"]
    found = []
    for world in (1, 2):
        finish(argv, tmp_path / str(world), world)
        found.append(json.loads((tmp_path / str(world) / "critical.json").read_text()))
    assert (
        found[0]["crossings"] == found[1]["crossings"] and found[0]["crossings"]["4.5"] is not None
    )
    assert found[1]["grad_norm_mean"] == pytest.approx(found[0]["grad_norm_mean"], rel=1e-3)


@pytest.mark.parametrize("estimator", ["per-sample", "micro-batch"])
def test_tracked_noise_is_that_of_all_processes(estimator, tmp_path):
    """Against gradients of samples and of parts by plain autograd, at the first update."""
    argv = [
        *SHORT,
        "--norm",
        "group",
        "--batchsize",
        "250",
        "--track-noise",
        "every=100",
        "--estimator",
        estimator,
    ]
    finish(argv, tmp_path / "run", 2)
    (row,) = rows_of(tmp_path / "run", "measure")
    torch.manual_seed(0)
    model = models.build("resnet8", 10, "group")
    images = data.open_data(resolve({}), CPU)
    x, y = next(images.train.batches([permutation(0, 0, 1437)[:250]]))

    def gradient(index: list[int]) -> torch.Tensor:
        grads = torch.autograd.grad(
            F.cross_entropy(model(x[index]), y[index]), list(model.parameters())
        )
        return torch.cat([g.flatten() for g in grads]).double()

    mean = gradient(list(range(250)))
    if estimator == "per-sample":
        shares = [list(range(rank, 250, 2)) for rank in (0, 1)]
        squares = (
            sum((gradient([i]) - gradient(share)).square().sum() for share in shares for i in share)
            / 248
        )
    else:
        parts = [
            part.tolist() for rank in (0, 1) for part in torch.arange(rank, 250, 2).tensor_split(4)
        ]
        squares = sum(len(part) * (gradient(part) - mean).square().sum() for part in parts) / 7
    assert row["c2_sampled"] == pytest.approx(squares.item() * 1436 / 1437, rel=1e-3)
    assert row["grad_norm"] == pytest.approx(mean.norm().item(), rel=1e-3)


# Interruptions and refusals


def test_one_process_writes_and_speaks(tmp_path):
    finish(["--epochs", "1"], tmp_path / "run", 2)
    assert (tmp_path / "run.log").read_text().count("final test accuracy") == 1
    assert (tmp_path / "run.1.log").read_text() == ""
    assert len(rows_of(tmp_path / "run", "epoch")) == 1
    assert json.loads((tmp_path / "run" / "env.json").read_text())["processes"] == 2


THREE = pytest.param(3, ["--micro-batch", "5"], marks=pytest.mark.full)


@pytest.mark.parametrize(("world", "flags"), [(2, []), THREE])
def test_a_signal_to_one_process_saves_and_stops_all(world, flags, tmp_path):
    argv = ["--epochs", "3", "--method", "hybrid", "--checkpoint-every", "7", *flags]
    finish(argv, tmp_path / "undisturbed", world)
    processes = start_ranks(argv, tmp_path / "stopped", world)
    wait_for(tmp_path / "stopped" / "checkpoints" / "ckpt-7.json")
    processes[1].terminate()
    assert codes(processes) == [75] * world
    status = read_status(tmp_path / "stopped")
    assert (status["state"], status["reason"]) == ("preempted", "SIGTERM")
    assert status["step"] == saved_steps(tmp_path / "stopped")[-1]
    finish(["--resume"], tmp_path / "stopped", world)
    assert_same_run(tmp_path / "stopped", tmp_path / "undisturbed")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others_in_one_line(victim, tmp_path):
    argv = ["--epochs", "8", "--checkpoint-every", "7"]
    processes = start_ranks(argv, tmp_path / "run", 2)
    wait_for(tmp_path / "run" / "checkpoints" / "ckpt-7.json")
    processes[victim].kill()
    found = codes(processes, 30)
    assert found[victim] == -signal.SIGKILL and found[1 - victim] == 75
    errors = [line for line in logs(tmp_path / "run").splitlines() if "error" in line]
    assert errors == [
        "fastsmooth: error: another process of the run was lost: start again with --resume"
    ]
    if victim == 1:
        assert read_status(tmp_path / "run")["state"] == "preempted"
    finish(["--resume", "--max-time", "1h"], tmp_path / "run", 2)


# seed 3 gives the image to the second process, seed 4 to the first
@pytest.mark.parametrize("seed", [3, 4])
def test_an_image_that_one_process_cannot_read_ends_all_in_its_words(seed, tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(6):
                noise = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
                Image.fromarray(noise).save(folder / f"{i}.jpg", quality=100)
    whole = (tmp_path / "images" / "train" / "b" / "3.jpg").read_bytes()
    (tmp_path / "images" / "train" / "b" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    argv = [
        "--dataset",
        "folder",
        "--data-dir",
        str(tmp_path / "images"),
        "--loader",
        "torch",
        "--workers",
        "0",
    ]
    argv += ["--model", "resnet8", "--epochs", "9", "--batchsize", "4", "--seed", str(seed)]
    processes = start_ranks(argv, tmp_path / "run", 2)
    assert codes(processes, 60) == [2, 2]
    (line,) = [line for line in logs(tmp_path / "run").splitlines() if "error" in line]
    assert "b/3.jpg" in line
    assert (
        read_status(tmp_path / "run")["state"] == "failed"
        and "3.jpg" in read_status(tmp_path / "run")["reason"]
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batchsize", "2"], "--batchsize 2 is less than one sample for each of the 3 processes"),
        (["--sync-bn", "--micro-batch", "4"], "--micro-batch"),
        (["--sync-bn", "--compile", "on"], "--compile on"),
        (["--lr", "nan"], "--lr"),
        (["--dataset", "folder", "--data-dir", "/nowhere"], "/nowhere"),
        (["--track-noise", "every=2", "--batchsize", "20"], "24 or more"),
    ],
)
def test_what_all_refuse_is_said_once(argv, words, tmp_path):
    assert codes(start_ranks(argv, tmp_path / "run", 3), 60) == [2, 2, 2]
    (line,) = logs(tmp_path / "run").splitlines()
    assert line.startswith("fastsmooth: error: ") and words in line
    assert not (tmp_path / "run").exists()


def test_a_folder_that_only_the_first_process_finds_used_is_refused_by_all(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert codes(start_ranks(["--epochs", "1"], tmp_path / "run", 2), 60) == [2, 2]
    (line,) = logs(tmp_path / "run").splitlines()
    assert "exists" in line


def see_other_images() -> None:
    """The second process has the digits in another order."""
    import dataclasses
    import os

    from fastsmooth import data

    read = data.READERS["digits"]

    def reversed_digits(config):
        images = read(config)
        train = dataclasses.replace(images.train, labels=images.train.labels[::-1].copy())
        return dataclasses.replace(images, train=train)

    if os.environ["RANK"] == "1":
        data.READERS["digits"] = reversed_digits


def test_processes_that_see_other_images_are_refused(tmp_path):
    assert codes(start_ranks(["--epochs", "1"], tmp_path / "run", 2, see_other_images), 60) == [
        2,
        2,
    ]
    (line,) = logs(tmp_path / "run").splitlines()
    assert "process 1 has other images" in line and not (tmp_path / "run").exists()


def have_little_memory() -> None:
    """The second process, as on another machine."""
    from fastsmooth import data

    if os.environ["RANK"] == "1":
        data.fits = lambda *_: (False, "little memory")


def test_processes_for_which_auto_chooses_otherwise_are_refused(tmp_path):
    assert codes(start_ranks(["--epochs", "1"], tmp_path / "run", 2, have_little_memory), 60) == [
        2,
        2,
    ]
    (line,) = logs(tmp_path / "run").splitlines()
    assert "process 1 has --loader threads, process 0 resident: give --loader yourself" in line
    assert not (tmp_path / "run").exists()


def test_torchrun_does_it(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "-m",
        "fastsmooth.train",
    ]
    done = subprocess.run(
        [*command, "--epochs", "1", "--out", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (
        "2 processes share every batch" in done.stdout
        and read_status(tmp_path / "run")["state"] == "done"
    )
