"""The noise in a loop of accelerate: that of a plain loop on the same batches, and no trace of it
in the training. Against the real library, on the CPU."""

import importlib.util
from contextlib import nullcontext

import plainloop
import pytest
import torch
from forks import assert_same_bits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fastsmooth as fs
from fastsmooth.noise.losses import NotCovered

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="needs accelerate"
)
DATA = plainloop.images()


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One thread, as the processes have; every test has an Accelerator of its own."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.set_num_threads(before)


def accelerator_of(**options):
    from accelerate import Accelerator

    return Accelerator(**options)


def memory():
    """A tracker that keeps what it gets."""
    from accelerate.tracking import GeneralTracker

    class Memory(GeneralTracker):
        name, requires_logging_directory, tracker = "memory", False, None

        def __init__(self):
            super().__init__()
            self.rows = []

        def store_init_configuration(self, values):
            pass

        def log(self, values, step, **options):
            self.rows.append((step, values))

    return Memory()


def loop(accelerator, model, data, *, every=3, epochs=1, clip=None, measured=True, inside=False):
    """Train as accelerate's pages do: (tracker of the noise, what it gave at every call, what was
    logged, optimizer)."""
    from fastsmooth.adapters.accelerate import AcceleratedTracker

    accelerator.trackers = [logged := memory()]
    model, optimizer, loader = accelerator.prepare(model, plainloop.optimizer_of(model), data)
    noise, given = None, []
    if measured:
        noise = AcceleratedTracker(accelerator, model, optimizer, samples=70, every=every)
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                with accelerator.autocast() if inside else nullcontext():
                    if noise:
                        given.append(noise(x, y))
                    loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        if noise:
            noise.end_epoch()
    return noise, given, logged.rows, optimizer


# The numbers


AUTOCAST = {"context": lambda: torch.autocast("cpu", torch.bfloat16)}


@pytest.mark.parametrize(
    ("options", "host", "inside"),
    [
        ({}, {}, False),
        ({"gradient_accumulation_steps": 4}, {"micro_batches": 4}, False),
        ({"mixed_precision": "bf16", "gradient_accumulation_steps": 2}, AUTOCAST, True),
    ],
    ids=["plain", "accumulated", "bf16 about the loop"],
)
def test_the_noise_is_that_of_a_plain_loop(options, host, inside):
    count = options.get("gradient_accumulation_steps", 1)
    # nine batches, the last of six; of four micro-batches an update the last has but one
    model, twin, data = plainloop.network(), plainloop.network(), DataLoader(DATA, 8)
    rows = plainloop.plain(
        twin, list(data), every=2, samples=70, epochs=2, **(host | {"micro_batches": count})
    )
    _, given, logged, _ = loop(
        accelerator_of(**options), model, data, every=2, epochs=2, inside=inside
    )
    plainloop.assert_same_rows(logged, rows)
    assert_same_bits(dict(model.state_dict()), dict(twin.state_dict()))
    # a row comes with the last micro-batch of its update
    ends = [i for i in range(18) if (i % 9 + 1) % count == 0 or i % 9 == 8]
    assert [i for i, row in enumerate(given) if row] == ends[::2]


def test_fp16_is_measured_in_float32():
    """Gradients that vanish in float16, under the forward that prepare() makes on a GPU."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    from fastsmooth.adapters.accelerate import AcceleratedTracker

    def weak():
        net = plainloop.network()
        with torch.no_grad():
            net[-1].weight.mul_(1e-7)
        return net

    accelerator, model = accelerator_of(mixed_precision="fp16"), weak()
    model._original_forward = model.forward
    half = torch.autocast("cpu", torch.float16)
    model.forward = convert_outputs_to_fp32(half(model.forward))
    prepared = model.forward
    noise = AcceleratedTracker(
        accelerator, model, plainloop.optimizer_of(model), samples=70, every=1
    )
    x, y = next(iter(DataLoader(DATA, 35)))
    row = noise(x, y)
    ((_, wanted), _) = plainloop.plain(weak(), list(DataLoader(DATA, 35)), every=1, samples=70)
    assert row["c2_sampled"] == pytest.approx(wanted["c2_sampled"], rel=1e-6)
    assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-6)
    assert model.forward is prepared


@pytest.mark.full
def test_a_compiled_model_is_compiled_no_more_than_without():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def trained(measured):
        torch.compiler.reset()
        net = plainloop.network()
        model = torch.compile(net, backend=backend)
        logged = loop(
            accelerator_of(mixed_precision="bf16"), model, DataLoader(DATA, 10), measured=measured
        )[2]
        return net, logged

    net, logged = trained(True)
    count = len(graphs)
    without, _ = trained(False)
    assert count and len(graphs) == 2 * count
    assert_same_bits(dict(net.state_dict()), dict(without.state_dict()))
    rows = plainloop.plain(
        plainloop.network(), list(DataLoader(DATA, 10)), every=3, samples=70, **AUTOCAST
    )
    plainloop.assert_same_rows(logged, rows)


def test_delta_is_that_of_the_optimizer_that_was_prepared():
    from fastsmooth.adapters.accelerate import AcceleratedTracker

    accelerator, x, y = accelerator_of(), *next(iter(DataLoader(DATA, 8)))
    model = plainloop.network()
    for optimizer, known in (
        (torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), True),
        (torch.optim.Adam(model.parameters(), 0.1), False),
    ):
        prepared = accelerator.prepare(optimizer)
        row = AcceleratedTracker(accelerator, model, prepared, samples=70, every=1)(x, y)
        other = AcceleratedTracker(accelerator, model, prepared, samples=70, every=1, clips=True)
        assert other(x, y) == row | {"delta_measured": None}
        assert (row["delta_measured"] is not None) == known
        if known:
            smoothing = fs.Smoothing("shb", c2=row["c2_sampled"], k2=row["k2"])
            assert row["delta_measured"] == smoothing.degree(0.1, 8, 0.9)


# The training


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.full),
        {"gradient_accumulation_steps": 2, "mixed_precision": "bf16"},
    ],
    ids=["plain", "all at once"],
)
def test_training_keeps_its_bits(options):
    """With dropout and BatchNorm, and batches in a random order."""

    def run(measured):
        torch.manual_seed(3)
        model = plainloop.network(mixing=True)
        noise, _, _, optimizer = loop(
            accelerator_of(**options),
            model,
            DataLoader(DATA, 8, shuffle=True),
            every=1,
            epochs=2,
            clip=0.5,
            measured=measured,
        )
        bits = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
        return bits | {"random": torch.get_rng_state()}, noise

    measured, noise = run(True)
    assert_same_bits(measured, run(False)[0])
    assert noise.watch.noise.count >= 8


def test_epochs():
    _, _, logged, _ = loop(
        accelerator_of(), plainloop.network(), DataLoader(DATA, 8), every="2ep", epochs=4
    )
    assert [update for update, _ in logged] == [0, 18]


def test_accumulation_over_the_end_of_an_epoch():
    """Where a measurement falls due between two micro-batches of an update, it waits: those that
    are left are not its batch."""
    from accelerate.utils import GradientAccumulationPlugin

    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    _, given, logged, _ = loop(
        accelerator_of(gradient_accumulation_plugin=plugin),
        plainloop.network(),
        DataLoader(DATA, 8),
        every="1ep",
        epochs=2,
    )
    # nine micro-batches an epoch: the update of 8 and 9 begins in the first
    assert [i for i, row in enumerate(given) if row] == [1, 11]
    assert [update for update, _ in logged] == [0, 5]


def test_a_saved_state_goes_on(tmp_path):
    from fastsmooth.adapters.accelerate import AcceleratedTracker

    data = list(DataLoader(DATA, 8))

    def parts():
        accelerator = accelerator_of()
        model = plainloop.network()
        model, optimizer = accelerator.prepare(model, plainloop.optimizer_of(model))
        noise = AcceleratedTracker(accelerator, model, optimizer, samples=70, every=4)
        accelerator.register_for_checkpointing(noise)

        def train(batches):
            rows = []
            for x, y in batches:
                rows.append(noise(x, y))
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            return rows

        return accelerator, train

    _, train = parts()
    whole = train(data)
    accelerator, train = parts()
    begun = train(data[:6])
    accelerator.save_state(tmp_path / "saved")
    accelerator, train = parts()
    accelerator.load_state(tmp_path / "saved")
    assert begun + train(data[6:]) == whole
    assert [i for i, row in enumerate(whole) if row] == [0, 4, 8]


def test_rows_stand_in_the_tracker_of_the_loop(tmp_path):
    """Of TensorBoard, read back."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fastsmooth.adapters.accelerate import AcceleratedTracker

    accelerator = accelerator_of(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("noise")
    model = plainloop.network()
    model, optimizer, loader = accelerator.prepare(
        model, plainloop.optimizer_of(model), DataLoader(DATA, 8)
    )
    noise = AcceleratedTracker(accelerator, model, optimizer, samples=70, every=4)
    rows = [row for x, y in loader if (row := noise(x, y))]
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "noise"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("noise/c2_sampled")]
    assert [step for step, _ in found] == [0, 4, 8]
    for (_, value), row in zip(found, rows, strict=True):
        assert value == pytest.approx(row["c2_sampled"], rel=1e-6)


# Several processes


def in_a_process(folder, measured):
    """What debug_launcher of accelerate starts twice."""
    accelerator = accelerator_of(gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    model = plainloop.network()
    _, given, logged, _ = loop(accelerator, model, DataLoader(DATA, 8), every=2, measured=measured)
    left = [row for row in given if row], logged, dict(model.state_dict())
    torch.save(left, folder / f"{accelerator.process_index}.pt")


def of_two_processes(folder, measured=True) -> list:
    """(rows, what was logged, state of the network) of each of two processes."""
    from accelerate import debug_launcher

    folder.mkdir()
    debug_launcher(in_a_process, (folder, measured))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def shares(count: int) -> list[plainloop.Batch]:
    """The micro-batches of two processes, of which an update has `count` of each: update by update,
    the first process's first."""
    from accelerate.data_loader import BatchSamplerShard

    both = []
    for rank in range(2):  # batches in turn, and the first ones again where they run out
        own = BatchSamplerShard(DataLoader(DATA, 8).batch_sampler, 2, rank)
        both.append(plainloop.windows(list(DataLoader(DATA, batch_sampler=own)), count))
    return [part for update in zip(*both, strict=True) for window in update for part in window]


def test_two_processes_get_the_row_of_the_whole_batch(tmp_path):
    """Each sample about the mean gradient of its own process's micro-batch; that of all in ||g||.
    So a plain loop has it that takes the processes' shares as micro-batches."""
    left = of_two_processes(tmp_path / "two")
    assert left[0][0] == left[1][0] and left[1][1] == []  # the first process logs
    parts = shares(2)
    rows = plainloop.plain(plainloop.network(), parts, every=2, samples=70, micro_batches=4)
    plainloop.assert_same_rows(left[0][1], rows)
    found = left[0][0][0]
    c2, norm = plainloop.within(plainloop.network(), parts[:4], 70)
    assert found["c2_sampled"] == pytest.approx(c2, rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.full
def test_two_processes_train_in_the_same_bits(tmp_path):
    left = of_two_processes(tmp_path / "two")
    without = of_two_processes(tmp_path / "without", measured=False)
    for (_, _, measured), (_, _, plain) in zip(left, without, strict=True):
        assert_same_bits(measured, plain)


# Refusals


def test_what_cannot_be_measured_is_refused():
    from fastsmooth.adapters.accelerate import AcceleratedTracker

    accelerator, model = accelerator_of(), plainloop.network()
    optimizer = plainloop.optimizer_of(model)

    def tracker(**options):
        given = {"samples": 70, "every": 1} | options
        return AcceleratedTracker(accelerator, model, optimizer, **given)

    x, y = next(iter(DataLoader(DATA, 8)))
    with pytest.raises(NotCovered, match="a batch is a tuple of dict, Tensor, not two tensors"):
        tracker()({"x": x}, y)
    with pytest.raises(NotCovered, match="is not the mean over the samples"):
        tracker(loss=nn.CrossEntropyLoss(reduction="sum"))(x, y)
    with pytest.raises(ValueError, match="every '3 epochs'"):
        tracker(every="3 epochs")
    with pytest.raises(ValueError, match="estimator 'per-sampel'"):
        tracker(estimator="per-sampel")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("mixed_precision", "fp8", "mixed_precision fp8"),
        ("num_processes", 2, "2 processes share every batch, .* that accelerator.prepare returned"),
    ],
)
def test_what_has_no_single_gradient_is_refused(name, value, said, monkeypatch):
    from accelerate import Accelerator

    from fastsmooth.adapters.accelerate import AcceleratedTracker

    model, accelerator = plainloop.network(), accelerator_of()
    monkeypatch.setattr(Accelerator, name, property(lambda self: value))
    with pytest.raises(NotCovered, match=said):
        AcceleratedTracker(accelerator, model, plainloop.optimizer_of(model), samples=70, every=1)
