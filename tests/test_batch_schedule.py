"""BatchSchedule and torch_lr_scheduler: a schedule in a loop of one's own, beside torch and
bs-scheduler."""

import json
import math
import multiprocessing
import re
from collections.abc import Callable, Iterator
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as torchs
from torch.utils.data import DataLoader, Dataset

import fastsmooth as fs
from fastsmooth.data.order import permutation
from fastsmooth.data.stream import Stream
from fastsmooth.schedule import METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
N = 97
LOADERS = [(0, False), (2, False), (2, True), (4, False), (4, True)]  # workers, persistent
Size = Callable[[int], int]


class Indices(Dataset):
    """Sample i is i."""

    def __init__(self, samples: int = N):
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> int:
        return i


def loader_of(batches, workers=0, persistent=False, samples=N) -> DataLoader:
    context = "fork" if workers else None
    return DataLoader(
        Indices(samples),
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=persistent,
        multiprocessing_context=context,
    )


def by_epoch(epoch: int) -> int:
    return (5, 8, 30)[epoch]


def by_update(update: int) -> int:
    """It changes in mid-epoch, and falls again."""
    return 4 if update < 7 else 9 if update < 16 else 3


def uninterrupted(size: Size, every: str, epochs: int, seed: int = 3) -> Iterator[list[int]]:
    """The batches of a training, cut by hand."""
    update = 0
    for epoch in range(epochs):
        rest = permutation(seed, epoch, N).tolist()
        assert sorted(rest) == list(range(N))
        while rest:
            now = size(epoch if every == "epoch" else update)
            yield rest[:now]
            rest, update = rest[now:], update + 1


CASES = [(by_epoch, "epoch"), (by_update, "update")]


@pytest.mark.parametrize(("workers", "persistent"), LOADERS)
@pytest.mark.parametrize(("size", "every"), CASES, ids=["epoch", "update"])
def test_a_change_arrives_with_the_batch_it_is_for(size, every, workers, persistent):
    batches = fs.BatchSchedule(size, N, every=every, seed=3)
    loader, seen = loader_of(batches, workers, persistent), []
    for epoch in range(epochs := 2 if workers else 3):
        begun, length = len(seen), len(loader)
        assert (batches.epoch, batches.batch) == (epoch, 0)
        for x in loader:
            assert len(x) == batches.batch_size or sum(map(len, seen[begun:])) + len(x) == N
            assert len(loader) == length
            seen.append(x.tolist())
            batches.step()
            assert batches.update == len(seen)
        assert len(seen) - begun == length
        assert sorted(i for batch in seen[begun:] for i in batch) == list(range(N))
    assert seen == list(uninterrupted(size, every, epochs))


@pytest.mark.parametrize(("size", "every"), CASES, ids=["epoch", "update"])
def test_a_training_is_taken_up_at_any_batch(size, every):
    whole = list(uninterrupted(size, every, 3))
    first = fs.BatchSchedule(size, N, every=every, seed=3)
    for k in range(len(whole)):
        state = json.loads(json.dumps(first.state_dict()))
        other = fs.BatchSchedule(size, N, every=every, seed=3)
        other.load_state_dict(state)
        assert other.state_dict() == state and other.batch_size == first.batch_size
        assert len(other) == len(first) and other.update == k
        rest = []
        while len(rest) < len(whole) - k:
            for batch in other:
                rest.append(batch)
                other.step()
                if other.epoch == 3:
                    break
        assert rest == whole[k:]
        again = fs.BatchSchedule(size, N, every=every, seed=3)
        again.load_state_dict(state)
        assert next(iter(again)) == next(iter(first)) == whole[k]
        if k:  # a training that ends at once is where it was
            assert again.state_dict() == state
        first.step()


@pytest.mark.parametrize(
    ("workers", "persistent"),
    [
        loader
        if loader in ((0, False), (2, True))
        else pytest.param(*loader, marks=pytest.mark.full)
        for loader in LOADERS
    ],
)
def test_an_epoch_left_early_goes_on_with_the_batch_after_the_last_trained_on(workers, persistent):
    """In the same loader, and from the state in a new one."""
    whole, seen = list(uninterrupted(by_update, "update", 2)), []
    batches = fs.BatchSchedule(by_update, N, every="update", seed=3)
    loader = loader_of(batches, workers, persistent)
    leave_at = {6, 20}  # just before the size changes, and within the second epoch
    while len(seen) < len(whole):
        for x in loader:
            if len(seen) in leave_at:  # this batch was not trained on
                leave_at.remove(len(seen))
                break
            seen.append(x.tolist())
            batches.step()
        if len(seen) == 20:
            state = batches.state_dict()
            batches = fs.BatchSchedule(by_update, N, every="update", seed=3)
            batches.load_state_dict(state)
            loader = loader_of(batches, workers, persistent)
    assert not leave_at and seen == whole


@pytest.mark.parametrize(
    ("kind", "workers", "ahead"),
    [
        pytest.param("LambdaBS", 0, 0, marks=pytest.mark.full),
        pytest.param("LambdaBS", 2, 1, marks=pytest.mark.full),
        pytest.param("StepBS", 2, 2, marks=pytest.mark.full),
        ("StepBS", 4, 2),
    ],
)
def test_beside_bs_scheduler_whose_change_is_late_by_what_was_drawn_ahead(kind, workers, ahead):
    """Measured with bs-scheduler 1.0: late by prefetch_factor batches for each worker, which by
    torch's default of 2 are 4 batches with 2 workers and 8 with 4; on time without workers alone.
    """
    bs_scheduler = pytest.importorskip("bs_scheduler")
    settings = {"num_workers": workers}
    if workers:
        settings |= {"prefetch_factor": ahead, "multiprocessing_context": "fork"}

    def changes(loader, step) -> list[int]:
        """The first batches of another size."""
        sizes = []
        for x in loader:
            sizes.append(len(x))
            step()
            if len(sizes) == 24:
                break
        return [i for i, (a, b) in enumerate(pairwise(sizes), 1) if a != b]

    loader = DataLoader(Indices(400), batch_size=4, shuffle=True, **settings)
    if kind == "StepBS":
        theirs = bs_scheduler.StepBS(loader, step_size=10, gamma=2.0)
    else:
        theirs = bs_scheduler.LambdaBS(loader, lambda update: 2 ** (update // 10))
    late = workers * ahead
    assert changes(loader, theirs.step) == [i for i in (10 + late, 20 + late) if i < 24]
    ours = fs.BatchSchedule(lambda update: 4 * 2 ** (update // 10), 400, every="update")
    loader = DataLoader(Indices(400), batch_sampler=ours, **settings)
    assert changes(loader, ours.step) == [10, 20]


def schedule_of(method: str, **more) -> fs.Schedule:
    numbers = {"epochs": 8, "lr": 0.2, "batch_size": 6, "optimizer": "shb", "momentum": 0.9}
    if METHODS[method].uses == "milestones":
        numbers["milestones"] = [2, 5]
    return fs.Schedule(method, **numbers | {"images": N} | more)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_drives_the_batches_and_the_optimizer(method):
    schedule = schedule_of(method)
    batches = fs.BatchSchedule(schedule, N)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2, momentum=0.9)
    by_epochs = fs.torch_lr_scheduler(optimizer, schedule)
    ours = fs.NoisySGD([torch.zeros(1)], "shb", lr=0.2, momentum=0.9)
    by_updates = fs.torch_lr_scheduler(ours, schedule, samples=N)
    for epoch in range(schedule.epochs):
        point = schedule(epoch)
        assert len(batches) == schedule.updates(N)[epoch]
        for batch in batches:
            assert batches.point == by_updates.point == point and batches.epoch == epoch
            assert len(batch) == min(point.batch_size, N - batches.cursor)
            assert (ours.param_groups[0]["lr"], ours.param_groups[0]["momentum"]) == (
                by_updates.get_last_lr()[0],
                point.momentum,
            )
            assert by_updates.get_last_lr() == [point.lr]
            batches.step()
            ours.step()
            by_updates.step()
        group = optimizer.param_groups[0]
        assert (group["lr"], group["momentum"]) == (point.lr, point.momentum)
        optimizer.step()
        by_epochs.step()
    assert optimizer.param_groups[0]["lr"] == point.lr  # the last epoch stays in force
    assert ours.param_groups[0]["lr"] == point.lr
    with pytest.raises(ValueError, match="epoch 8 is none of 0 to 7"):
        next(iter(batches))


class Numbers:
    """As a loader of ours, for Stream: the "images" are the indices themselves."""

    class Reader:
        cursor = None

        def __init__(self, segments):
            self.segments, self.left = segments, []

        def begin(self):
            if not self.left:
                self.advance()

        def advance(self):
            segment = next(self.segments, None)
            self.left = [] if segment is None else segment.index[segment.start :].tolist()

        def take(self, count):
            given, self.left = self.left[:count], self.left[count:]
            return given

    def __len__(self):
        return N

    def reader(self, segments):
        return self.Reader(segments)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_batches_are_those_of_the_trainer(world, drop_last):
    """Whatever the number of processes, and every process has its share of them."""
    sizes = (7, 13, 40)

    def size(epoch: int) -> int:
        return sizes[epoch]

    whole = fs.BatchSchedule(size, N, seed=5, drop_last=drop_last)
    parts = [
        fs.BatchSchedule(size, N, seed=5, drop_last=drop_last, rank=r, world=world)
        for r in range(world)
    ]
    streams = [
        Stream(Numbers(), 5, 3, "", drop_last=drop_last, rank=r, world=world) for r in range(world)
    ]
    for epoch in range(3):
        for stream in streams:
            stream.batch_size = sizes[epoch]
        counted = 0
        theirs = zip(*(s.rest_of_epoch() for s in streams), strict=True)
        for batch, given, shares in zip(whole, zip(*parts, strict=True), theirs, strict=True):
            assert list(given) == list(shares)
            assert sorted(chain(*given)) == sorted(batch)
            assert max(map(len, given)) - min(map(len, given)) <= 1
            for one in (whole, *parts):
                one.step()
            counted += 1
        assert counted == (N // sizes[epoch] if drop_last else math.ceil(N / sizes[epoch]))
    states = {json.dumps(one.state_dict()) for one in (whole, *parts)}
    assert len(states) == 1  # so any number of processes takes it up


def on_a_rank(rank: int, place: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    batches, seen = fs.BatchSchedule(by_epoch, N, seed=3), []
    for x in loader_of(batches):
        seen.append(x.tolist())
        batches.step()
    results.put((rank, seen))
    torch.distributed.destroy_process_group()


def test_two_processes_find_their_places_by_torch_distributed(tmp_path):
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    place = f"file://{tmp_path}/meeting"
    both = [fork.Process(target=on_a_rank, args=(r, place, results)) for r in range(2)]
    for process in both:
        process.start()
    found = dict(results.get(timeout=60) for _ in both)
    for process in both:
        process.join()
        assert process.exitcode == 0
    whole = list(uninterrupted(lambda _: 5, "epoch", 1))
    together = [sorted(a + b) for a, b in zip(found[0], found[1], strict=True)]
    assert together == [sorted(batch) for batch in whole]


def test_in_order_and_without_the_last():
    batches = fs.BatchSchedule(lambda epoch: 10, 25, shuffle=False, drop_last=True)
    assert len(batches) == 2
    assert list(batches) == [list(range(10)), list(range(10, 20))]
    # where the size grows, what is left may be too little for the next
    growing = fs.BatchSchedule(
        lambda u: (10, 12, 4)[u % 3], 25, every="update", shuffle=False, drop_last=True
    )
    for epoch, kept in enumerate([(10, 12), (4, 10), (12, 4)]):
        found = []
        for batch in growing:
            found.append(len(batch))
            growing.step()
        assert growing.epoch == epoch + 1 and tuple(found[: len(kept)]) == kept
    whole = fs.BatchSchedule(lambda epoch: 5, 25, drop_last=True)
    assert len(whole) == len(list(whole)) == 5
    counted = fs.BatchSchedule(lambda epoch: np.int64(10), 25, shuffle=False)
    assert list(counted)[-1] == [20, 21, 22, 23, 24]


def test_a_loop_without_steps_says_its_epochs():
    batches = fs.BatchSchedule(by_epoch, N, seed=3)
    seen = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        assert batches.state_dict()["epoch"] == epoch
        seen += list(loader_of(batches))
        with pytest.raises(ValueError, match="a state would say that none was trained on"):
            batches.state_dict()
    assert [x.tolist() for x in seen] == list(uninterrupted(by_epoch, "epoch", 3))


def test_set_epoch_in_a_loop_with_steps():
    batches = fs.BatchSchedule(by_epoch, N, seed=3)
    for epoch in range(3):
        batches.set_epoch(epoch)
        for k, _ in enumerate(batches):
            if k == 2:
                break
            batches.step()
        kept = batches.state_dict()
        batches.set_epoch(epoch)  # which changes nothing
        assert batches.state_dict() == kept
        assert (kept["epoch"], kept["batch"], kept["cursor"]) == (epoch, 2, 2 * by_epoch(epoch))
    batches.set_epoch(1)
    assert (batches.epoch, batches.batch, batches.cursor) == (1, 0, 0)
    by_number = fs.BatchSchedule(by_update, N, every="update", seed=3)
    for k, _ in enumerate(by_number):
        if k == 9:
            break
        by_number.step()
    by_number.set_epoch(1)
    assert by_number.batch_size == by_update(9)
    assert next(iter(by_number)) == permutation(3, 1, N).tolist()[: by_update(9)]


def test_a_look_at_a_batch_costs_nothing():
    batches = fs.BatchSchedule(by_epoch, N, seed=3)
    next(iter(batches))
    batches.set_epoch(0)
    whole = list(uninterrupted(by_epoch, "epoch", 1))
    for k, batch in enumerate(batches):
        assert batch == whole[k]
        batches.step()
        if k == 3:
            assert next(iter(batches)) == whole[4]
            batches.state_dict()
    assert batches.epoch == 1


def test_once_an_epoch_is_not_how_step_is_called():
    batches = fs.BatchSchedule(by_epoch, N)
    for _ in batches:
        pass
    batches.step()
    with pytest.warns(UserWarning, match="20 batches were given, and step.. was called once"):
        list(batches)


def drawn_once() -> fs.BatchSchedule:
    batches = fs.BatchSchedule(by_epoch, N)
    next(iter(batches))
    return batches


def told_twice() -> None:
    batches = drawn_once()
    batches.step()
    batches.step()


def loaded(**changes) -> None:
    state = fs.BatchSchedule(by_epoch, N, seed=3).state_dict() | changes
    fs.BatchSchedule(by_epoch, N, seed=3).load_state_dict(
        {name: value for name, value in state.items() if value is not None}
    )


SGD = torch.optim.SGD
HYBRID = fs.Schedule("hybrid", epochs=5, lr=0.1, batch_size=32)
SHB = fs.Schedule("cosine", epochs=5, lr=0.1, batch_size=32, optimizer="shb", momentum=0.9)


def optimizer_of(kind=SGD, lrs=(0.1,), **more) -> torch.optim.Optimizer:
    return kind([{"params": [torch.zeros(1)], "lr": lr} for lr in lrs], **{"lr": 0.1} | more)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: fs.BatchSchedule(lambda e: 0, N), "gives batch size 0 for epoch 0: it is a whole"),
        (lambda: fs.BatchSchedule(lambda e: -2, N), "gives batch size -2 for epoch 0"),
        (lambda: fs.BatchSchedule(lambda e: 8.0, N), "gives batch size 8.0 for epoch 0"),
        (lambda: fs.BatchSchedule(lambda e: True, N), "gives batch size True for epoch 0"),
        (lambda: fs.BatchSchedule(lambda e: None, N), "gives batch size None for epoch 0"),
        (
            lambda: fs.BatchSchedule(lambda u: 8 - u, N, every="update"),
            "gives batch size 0 for update 8",
        ),
        (lambda: fs.BatchSchedule(by_epoch, 0), "samples 0 is out of range: it is a whole number"),
        (lambda: fs.BatchSchedule(by_epoch, 1.5), "samples 1.5 is out of range"),
        (lambda: fs.BatchSchedule(by_epoch, N, seed=-1), "seed -1 is out of range"),
        (lambda: fs.BatchSchedule(by_epoch, N, every="batch"), "it is 'epoch' or 'update'"),
        (lambda: fs.BatchSchedule(HYBRID, N, every="update"), "a Schedule says what an epoch has"),
        (lambda: fs.BatchSchedule(by_epoch, N, rank=2, world=2), "rank 2 is none of 0 to 1"),
        (lambda: fs.BatchSchedule(by_epoch, N, rank=-1, world=2), "rank -1 is none of 0 to 1"),
        (lambda: fs.BatchSchedule(by_epoch, N, rank=0, world=0), "world 0 is out of range"),
        (lambda: fs.BatchSchedule(by_epoch, N, rank=1), "rank and world go together"),
        (
            lambda: fs.BatchSchedule(lambda e: 8, N, rank=0, world=2),
            "epoch 0 has a batch of 1 samples for 2 processes: give larger batches, or drop_last",
        ),
        (
            lambda: fs.BatchSchedule(lambda e: 98, N, drop_last=True),
            "epoch 0 has no batch: drop_last with batch size 98 and 97 samples",
        ),
        (lambda: list(drawn_once()), "batches of epoch 0 were given before, and step() was called"),
        (lambda: drawn_once().state_dict(), "call step() after each batch that was"),
        (told_twice, "step() was called after more batches than were given, 1 of the training"),
        (lambda: fs.BatchSchedule(by_epoch, N).step(), "after more batches than were given, 0"),
        (lambda: fs.BatchSchedule(by_epoch, N).set_epoch(-1), "epoch -1 is out of range"),
        (
            lambda: fs.BatchSchedule(by_update, N, every="update").set_epoch(1),
            "epoch 1 does not follow after 0 updates in epoch 0: every='update' counts what step()",
        ),
        (lambda: loaded(samples=96), "the state was taken with samples 96, not 97"),
        (lambda: loaded(seed=4), "the state was taken with seed 4, not 3"),
        (lambda: loaded(shuffle=False), "the state was taken with shuffle False, not True"),
        (lambda: loaded(every="update"), "the state was taken with every 'update', not 'epoch'"),
        (lambda: loaded(cursor=None), "the state has no cursor: it is none of a BatchSchedule"),
        (lambda: loaded(cursor=97), "the state's cursor 97 lies outside the 97 samples"),
        (lambda: loaded(update=-1), "the state's update -1 is out of range"),
        (lambda: loaded(epoch="2"), "the state's epoch '2' is out of range"),
        (lambda: fs.torch_lr_scheduler(optimizer_of(), HYBRID, 0), "samples 0 is out of range"),
        (
            lambda: fs.torch_lr_scheduler(optimizer_of(), lambda e: HYBRID(0), 50),
            "samples says how many updates the epochs of a Schedule have",
        ),
        (
            lambda: fs.torch_lr_scheduler(optimizer_of(), lambda e: 0.1),
            "the schedule gives 0.1 for 0: it gives a Point",
        ),
        (
            lambda: fs.torch_lr_scheduler(optimizer_of(lrs=(0.3, 0.03)), HYBRID),
            "the groups have the lrs [0.03, 0.3], and the schedule begins with 0.1",
        ),
        (
            lambda: fs.torch_lr_scheduler(optimizer_of(lrs=(0.0,)), HYBRID),
            "the optimizer begins with lr 0.0: give it the schedule's 0.1",
        ),
        (
            lambda: fs.torch_lr_scheduler(optimizer_of(momentum=0.9), HYBRID),
            "the optimizer has momentum 0.9, and the schedule none",
        ),
        (
            lambda: fs.torch_lr_scheduler(optimizer_of(fs.NoisySGD, form="sgd"), SHB),
            "form sgd has no momentum, and the schedule has 0.9",
        ),
        (
            lambda: fs.torch_lr_scheduler(optimizer_of(), HYBRID, 50).load_state_dict(
                fs.torch_lr_scheduler(optimizer_of(), HYBRID, 60).state_dict()
            ),
            "the state was taken with samples 60, not 50",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        call()
    assert "\n" not in str(refusal.value)


COUNTERPARTS = {
    "cosine": lambda o: torchs.CosineAnnealingLR(o, T_max=8),
    "poly": lambda o: torchs.PolynomialLR(o, total_iters=8, power=0.9),
    "exp": lambda o: torchs.ExponentialLR(o, gamma=0.9),
    "step": lambda o: torchs.MultiStepLR(o, milestones=[2, 5], gamma=0.1),
    "lr": lambda o: torchs.StepLR(o, step_size=1, gamma=math.sqrt(0.5)),
    "constant": lambda o: torchs.ConstantLR(o, factor=1.0),
}


@pytest.mark.parametrize("method", [*COUNTERPARTS, "hybrid", "lr-beta"])
@pytest.mark.parametrize("kind", [SGD, torch.optim.AdamW, fs.NoisySGD])
def test_lr_is_that_of_torchs_own_schedulers(method, kind):
    """Of groups with lrs of their own too, as LambdaLR has them."""
    more = {"form": "shb"} if kind is fs.NoisySGD else {}
    if kind is not torch.optim.AdamW:
        more["momentum"] = 0.9
    schedule = schedule_of(method)
    lrs = (0.02, 0.2, 0.5)
    optimizers = [optimizer_of(kind, lrs, **more) for _ in range(3)]
    ours = fs.torch_lr_scheduler(optimizers[0], schedule)
    assert isinstance(ours, torchs.LRScheduler)
    theirs = [torchs.LambdaLR(optimizers[1], lambda epoch: schedule(min(epoch, 7)).lr / 0.2)]
    if method in COUNTERPARTS:
        theirs.append(COUNTERPARTS[method](optimizers[2]))
    for epoch in range(8):
        for other in theirs:
            assert ours.get_last_lr() == pytest.approx(other.get_last_lr(), rel=1e-12, abs=0)
        assert ours.get_last_lr()[1] == schedule(epoch).lr
        for group, lr in zip(optimizers[0].param_groups, ours.get_last_lr(), strict=True):
            assert group["lr"] == lr
            assert group.get("momentum") in (None, schedule(epoch).momentum)
        assert optimizers[0].param_groups[0].get("betas") in (None, (0.9, 0.999))
        for optimizer, scheduler in zip(optimizers, [ours, *theirs], strict=False):
            optimizer.step()
            scheduler.step()


def test_one_lr_becomes_the_schedules_whatever_it_was():
    optimizer = optimizer_of(lrs=(0.7, 0.7))
    scheduler = fs.torch_lr_scheduler(optimizer, HYBRID)
    assert scheduler.get_last_lr() == [0.1, 0.1]


def test_a_tensor_lr_and_a_nu_that_changes_are_put_in_place():
    lr = torch.tensor(0.1)
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=lr, capturable=False, foreach=False)
    scheduler = fs.torch_lr_scheduler(optimizer, HYBRID)
    held = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(HYBRID(1).lr, rel=1e-6)
    schedule = fs.Schedule(
        "constant", epochs=3, lr=0.1, batch_size=8, optimizer="qhm", momentum=0.9,
        nu=lambda epoch: 0.9 - 0.2 * epoch,
    )  # fmt: skip
    ours = fs.NoisySGD([torch.zeros(1)], "qhm", lr=0.1, momentum=0.9, nu=0.1)
    scheduler = fs.torch_lr_scheduler(ours, schedule)
    for epoch in range(3):
        assert ours.param_groups[0]["nu"] == schedule(epoch).nu
        ours.step()
        scheduler.step()


def trained(updates: int, state: dict | None = None) -> tuple[list[torch.Tensor], dict]:
    """A small training by both, until so many updates of all; its parameters and its states."""
    torch.manual_seed(0)
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    model = nn.Linear(5, 3)
    schedule = schedule_of("beta-batch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    batches = fs.BatchSchedule(schedule, N, seed=1)
    scheduler = fs.torch_lr_scheduler(optimizer, schedule, samples=N)
    parts = {"model": model, "optimizer": optimizer, "batches": batches, "scheduler": scheduler}
    for name in state or {}:
        parts[name].load_state_dict(state[name])
    while batches.update < updates:
        for index in batches:
            assert scheduler.point == batches.point
            assert optimizer.param_groups[0]["lr"] == batches.point.lr
            assert optimizer.param_groups[0]["momentum"] == batches.point.momentum
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            batches.step()
            if batches.update == updates:
                break
    return list(model.parameters()), {name: part.state_dict() for name, part in parts.items()}


def test_a_training_that_is_taken_up_ends_in_the_same_bits(tmp_path):
    whole, _ = trained(60)
    for at in (1, 17, 40):
        torch.save(trained(at)[1], tmp_path / "state.pt")
        for order in (list, reversed):
            state = torch.load(tmp_path / "state.pt", weights_only=True)  # plain numbers
            resumed, _ = trained(60, {name: state[name] for name in order(state)})
            assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_the_state_alone_puts_its_numbers_into_the_groups():
    optimizer = optimizer_of(lrs=(0.1, 0.01))
    scheduler = fs.torch_lr_scheduler(optimizer, HYBRID)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    other = optimizer_of(lrs=(0.1, 0.01))
    fs.torch_lr_scheduler(other, HYBRID).load_state_dict(scheduler.state_dict())
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert other.param_groups[1]["lr"] == pytest.approx(HYBRID(3).lr / 10, rel=1e-12)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_lightning_trains_by_both(tmp_path):
    lightning = pytest.importorskip("lightning")
    schedule = schedule_of("hybrid", decay_epoch=1, epochs=4)
    batches, seen = fs.BatchSchedule(schedule, N, seed=3), []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 3)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
            scheduler = fs.torch_lr_scheduler(optimizer, schedule, samples=N)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def training_step(self, index, _):
            lr = self.optimizers().param_groups[0]["lr"]
            seen.append((self.current_epoch, index.tolist(), lr))
            return self.net(index[:, None] / N).square().mean()

        def on_train_batch_end(self, *_):
            batches.step()

    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), loader_of(batches))
    whole = list(uninterrupted(schedule.batch_size, "epoch", 4))
    assert [index for _, index, _ in seen] == whole
    assert all(lr == schedule(epoch).lr for epoch, _, lr in seen)


@pytest.mark.full
def test_the_hf_trainer_trains_by_both(tmp_path):
    transformers = pytest.importorskip("transformers")
    schedule = schedule_of("hybrid", decay_epoch=1, epochs=4)
    batches, seen = fs.BatchSchedule(schedule, N, seed=3), []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 3)

        def forward(self, index):
            seen.append((index.tolist(), optimizer.param_groups[0]["lr"]))
            return {"loss": self.net(index[:, None] / N).square().mean()}

    class Told(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            batches.step()

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            loader = loader_of(batches)
            loader.collate_fn = lambda index: {"index": torch.tensor(index)}
            return self.accelerator.prepare(loader)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    scheduler = fs.torch_lr_scheduler(optimizer, schedule, samples=N)
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_steps=1, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, optimizers=(optimizer, scheduler), callbacks=[Told()])
    trainer.train()
    whole = list(uninterrupted(schedule.batch_size, "epoch", 4))
    assert [index for index, _ in seen] == whole
    expected = [schedule(e).lr for e, n in enumerate(schedule.updates(N)) for _ in range(n)]
    assert [lr for _, lr in seen] == expected
