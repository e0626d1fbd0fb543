"""NoiseTracker under what a training loop of one's own does: mixed precision, accumulation,
gradient checkpointing, compilers, DistributedDataParallel, frozen parts. Beside gradients of single
samples in float64, and training beside itself unmeasured, bit for bit."""

import copy
import itertools
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from forks import SERVER, free_port
from torch import nn
from torch.distributed.algorithms import Join
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastsmooth as fs
from fastsmooth.noise.online import GROUPS
from fastsmooth.noise.persample import NotCovered
from fastsmooth.ranks import Ranks

N = 200  # samples of the training set, of which batches are

Part = tuple[torch.Tensor, torch.Tensor]


class Net(nn.Module):
    """A small network whose middle is called by `around(function, x)`; with `shift` a parameter is
    used that no layer has, so that it is one a sample."""

    def __init__(self, around: Callable | None = None, shift: bool = False):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.middle = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Tanh())
        self.last = nn.Linear(12, 3)
        self.shift = nn.Parameter(0.1 * torch.randn(12)) if shift else None
        self.around, self.calls = around, 0

    def part(self, x):
        self.calls += 1
        return x + self.middle(x if self.shift is None else x + self.shift)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.part(x) if self.around is None else self.around(self.part, x))


def net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def samples(size: int, seed: int = 1) -> Part:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)


# By hand, in float64


def gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[B, parameters]: of every sample by itself, in float64, in the model's own mode."""
    model = copy.deepcopy(model).double()
    params = [p for p in model.parameters() if p.requires_grad]
    found = []
    for one, label in zip(x.double().split(1), y.split(1), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(one), label), params)
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


def within(model: nn.Module, parts: list[Part], n: int = N) -> float:
    """C2 from every sample's distance from the mean of its own micro-batch."""
    found = [gradients(model, *part) for part in parts]
    total = sum((g - g.mean(0)).square().sum().item() for g in found)
    return (n - 1) / n * total / (sum(map(len, found)) - len(found))


def between(model: nn.Module, parts: list[Part], n: int = N) -> float:
    """C2 from the distances of the micro-batches' means, in groups of neighbours."""
    found = [gradients(model, *part) for part in parts]
    count = min(GROUPS, len(found))
    ends = [len(found) * i // count for i in range(count + 1)]
    groups = [torch.cat(found[a:b]) for a, b in itertools.pairwise(ends)]
    mean = torch.cat(found).mean(0)
    total = sum(len(g) * (g.mean(0) - mean).square().sum().item() for g in groups)
    return (n - 1) / n * total / (count - 1)


def grad_norm(model: nn.Module, parts: list[Part]) -> float:
    return torch.cat([gradients(model, *part) for part in parts]).mean(0).norm().item()


# Training, with and without


class Host(NamedTuple):
    """What a loop does beside forward, backward and update."""

    prepared: Callable[[nn.Module], nn.Module] = lambda model: model
    options: Mapping = MappingProxyType({})  # of the network
    autocast: Callable[[], AbstractContextManager] = nullcontext
    scaled: bool = False  # the loss, by a GradScaler
    parts: int = 1  # micro-batches of 8 an update
    dtype: torch.dtype = torch.float32  # of the parameters
    close: float = 1e-5  # relative


def in_place(backend: str) -> Callable[[nn.Module], nn.Module]:
    def prepared(model: nn.Module) -> nn.Module:
        model.compile(backend=backend)
        return model

    return prepared


def in_segments(function: Callable, x: torch.Tensor) -> torch.Tensor:
    return checkpoint_sequential([function, nn.Identity()], 2, x, use_reentrant=False)


def call_compiled(model: Net) -> nn.Module:
    model.around = torch.compile(lambda function, x: function(x), backend="aot_eager")
    return model


def middle_compiled(model: Net) -> nn.Module:
    model.middle = torch.compile(model.middle, backend="aot_eager")
    return model


bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
again = {kind: partial(checkpoint, use_reentrant=kind) for kind in (False, True)}
HOSTS = {
    "plain": Host(),
    "accumulation": Host(parts=3),
    "autocast to bf16": Host(autocast=bf16, close=3e-2),
    "autocast to bf16, shifted": Host(autocast=bf16, close=3e-2, options={"shift": True}),
    "autocast to fp16, scaled": Host(
        autocast=partial(torch.autocast, "cpu", torch.float16), scaled=True
    ),
    "parameters in bf16": Host(dtype=torch.bfloat16, close=3e-2),
    "checkpoints": Host(options={"around": again[False]}),
    "checkpoints, reentrant": Host(options={"around": again[True]}),
    "checkpoints, a sequence": Host(options={"around": in_segments}),
    "checkpoints, shifted": Host(options={"around": again[False], "shift": True}),
    "checkpoints, reentrant, shifted": Host(options={"around": again[True], "shift": True}),
    "checkpoints, autocast, accumulation": Host(
        options={"around": again[False]}, autocast=bf16, close=3e-2, parts=2
    ),
    "compiled": Host(partial(torch.compile, backend="aot_eager")),
    "compiled in place": Host(in_place("aot_eager")),
    "a compiled part": Host(middle_compiled),
    "a compiled function": Host(call_compiled),
    "compiled, checkpoints": Host(
        partial(torch.compile, backend="aot_eager"), options={"around": again[False]}
    ),
}


def trained(host: Host, measure: bool, estimator: str = "auto") -> tuple[dict, list[dict]]:
    """The parameters after four updates, and the rows of measurements before each, which is made
    within the loop's own autocast, before its forward pass."""
    model = net(**host.options).to(host.dtype)
    used = host.prepared(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=host.scaled)
    noise = fs.NoiseTracker(used, optimizer, samples=N, every=1, estimator=estimator)
    rows = []
    for update in range(4):
        batch = [samples(8, 10 * update + j) for j in range(host.parts)]
        batch = [(x.to(host.dtype), y) for x, y in batch]
        for j, (x, y) in enumerate(batch):
            with host.autocast():
                if measure and j == 0:
                    xs, ys = zip(*batch, strict=True)
                    rows.append(noise(xs, ys) if host.parts > 1 else noise(x, y))
                loss = F.cross_entropy(used(x).float(), y) / host.parts
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return dict(model.state_dict()), rows


def graphs_of(made: Callable[[], Any]) -> tuple[Any, int]:
    """(what is made, the graphs that were compiled for it)."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return made(), torch._dynamo.utils.counters["stats"]["unique_graphs"]


# which take seconds each to compile
SLOW = ("compiled in place", "a compiled part", "a compiled function", "compiled, checkpoints")


# of Dynamo's own look at a tensor inside a graph
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "host", [pytest.param(h, marks=pytest.mark.full) if h in SLOW else h for h in HOSTS]
)
def test_what_is_measured_is_right_and_training_goes_on_in_the_same_bits(host):
    case = HOSTS[host]
    (plain, _), graphs = graphs_of(lambda: trained(case, measure=False))
    (measured, rows), graphs_too = graphs_of(lambda: trained(case, measure=True))
    assert graphs_too == graphs and (graphs > 0) == ("compiled" in host)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    parts = [samples(8, j) for j in range(case.parts)]
    model = net(**{**case.options, "around": None}).to(case.dtype)
    assert rows[0]["estimator"] == "per-sample"
    assert rows[0]["c2_sampled"] == pytest.approx(within(model, parts), rel=case.close)
    assert rows[0]["grad_norm"] == pytest.approx(grad_norm(model, parts), rel=case.close)
    assert rows[0]["delta_measured"] is not None


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_the_default_compiler_too():
    case = Host(torch.compile)
    (plain, _), graphs = graphs_of(lambda: trained(case, measure=False))
    (measured, rows), graphs_too = graphs_of(lambda: trained(case, measure=True))
    assert graphs_too == graphs > 0
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    assert rows[0]["c2_sampled"] == pytest.approx(within(net(), [samples(8, 0)]), rel=1e-5)


@pytest.mark.parametrize("host", ["autocast to fp16, scaled", "checkpoints, reentrant"])
def test_the_micro_batch_estimator_is_right_under(host):
    case = HOSTS[host]._replace(parts=3)
    plain, _ = trained(case, measure=False)
    measured, rows = trained(case, measure=True, estimator="micro-batch")
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    parts = [samples(8, j) for j in range(3)]
    assert rows[0]["c2_sampled"] == pytest.approx(between(net(), parts), rel=case.close)


# Gradient checkpointing


@pytest.mark.parametrize(
    ("estimator", "options", "calls"),
    [
        ("per-sample", {}, 2),
        ("per-sample", {"shift": True}, 1),  # within torch.vmap, which keeps all
        ("micro-batch", {}, 2 * GROUPS),
        ("micro-batch", {"shift": True}, 2 * GROUPS),
    ],
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_computed_again_where_that_can_be(estimator, options, calls, reentrant):
    model = net(around=again[reentrant], **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = fs.NoiseTracker(model, optimizer, samples=N, every=1, estimator=estimator)
    noise(*samples(8))  # the first one looks at a few samples too
    model.calls = 0
    noise(*samples(8))
    assert model.calls == calls


def test_a_checkpoint_within_a_checkpoint_and_dropout():
    class Deep(Net):
        def part(self, x):
            return checkpoint(super().part, F.dropout(x, 0.5, self.training), use_reentrant=False)

    torch.manual_seed(0)
    model, plain = Deep(again[False]), Deep(lambda function, x: function(x))
    plain.load_state_dict(model.state_dict())
    found = []
    for one in (model, plain):
        torch.manual_seed(3)
        found.append(fs.sample_norms(one, *samples(8)))
    assert torch.equal(found[0].noise, found[1].noise) and found[0].noise.min() > 0
    exact = gradients(plain.eval(), *samples(8))
    exact = (exact - exact.mean(0)).square().sum(1)
    torch.testing.assert_close(
        fs.sample_norms(model.eval(), *samples(8)).noise, exact, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("estimator", ["auto", "per-sample"])
def test_a_reentrant_checkpoint_of_the_input_itself_is_refused(estimator):
    """Such a part gets no gradient in training either."""

    class First(Net):
        def forward(self, x):
            return self.last(checkpoint(self.first, x, use_reentrant=True))

    model = First()
    model.middle.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = fs.NoiseTracker(model, optimizer, samples=N, every=1, estimator=estimator)
    with pytest.raises(NotCovered, match=r"first.weight takes no part .*give use_reentrant=False"):
        noise(*samples(8))


def test_a_checkpoint_of_another_kind_is_refused_or_measured_by_parts():
    from torch.distributed._composable import checkpoint as composable

    model = net()
    composable(model.middle)
    with pytest.raises(NotCovered, match=r"computes parts again .* micro-batch estimator"):
        fs.sample_norms(model, *samples(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = fs.NoiseTracker(model, optimizer, samples=N, every=1)
    x, y = samples(8)
    row = noise(x, y)
    assert row["estimator"] == "micro-batch" and noise.why.startswith("the model computes parts")
    parts = list(zip(x.split(2), y.split(2), strict=True))
    assert row["c2_sampled"] == pytest.approx(between(net(), parts), rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_checkpoints_of_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **{"img_size": 32} if "vit" in name else {})
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4) % 3
    plain = fs.sample_norms(model, x, y)
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(fs.sample_norms(model, x, y).noise, plain.noise, rtol=1e-6, atol=0)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_transformers(reentrant):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=64, image_size=16, patch_size=8)
    inside = transformers.ViTForImageClassification(config)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = inside

        def forward(self, x):
            return self.inside(pixel_values=x).logits

    model, x, y = Logits(), torch.randn(4, 3, 16, 16), torch.arange(4) % 2
    plain = fs.sample_norms(model, x, y)
    inside.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert inside.is_gradient_checkpointing
    torch.testing.assert_close(fs.sample_norms(model, x, y).noise, plain.noise, rtol=1e-6, atol=0)


# Precision


@pytest.mark.parametrize("estimator", ["auto", "micro-batch"])
def test_parameters_in_float16_are_refused(estimator):
    model = net().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = fs.NoiseTracker(model, optimizer, samples=N, every=1, estimator=estimator)
    x, y = samples(8)
    with pytest.raises(NotCovered, match=r"first\.weight is in float16, whose gradients vanish"):
        noise(x.half(), y)
    with pytest.raises(NotCovered, match="keep the parameters in float32"):
        fs.sample_norms(model, x.half(), y)


def test_autocast_keeps_no_cast_of_a_measurement():
    model, seen = net(), []
    model.around = lambda function, x: (
        seen.append(torch.is_autocast_cache_enabled()),
        function(x),
    )[1]
    with bf16():
        tracker(model)(*samples(8))
        assert seen and not any(seen) and torch.is_autocast_cache_enabled()


def test_under_autocast_to_float16_norms_are_those_of_float32():
    """Of a loss so small nothing would be left in float16."""

    def loss(output, y):
        return 1e-6 * F.cross_entropy(output, y, reduction="none")

    plain = fs.sample_norms(net(), *samples(8), loss=loss)
    with torch.autocast("cpu", torch.float16):
        found = fs.sample_norms(net(), *samples(8), loss=loss)
    assert torch.equal(found.noise, plain.noise) and found.noise.min() > 0


# Accumulation


def tracker(model: nn.Module, estimator: str = "auto", n: int = N, **options: Any):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"samples": n, "every": 1, "estimator": estimator} | options
    return fs.NoiseTracker(model, optimizer, **given)


@pytest.mark.parametrize("sizes", [[8], [4, 4], [5, 2, 3], [2, 3, 2, 4, 2], [2] * 16])
@pytest.mark.parametrize(("estimator", "exact"), [("per-sample", within), ("micro-batch", between)])
def test_micro_batches_beside_gradients_by_hand(sizes, estimator, exact):
    parts = [samples(size, j) for j, size in enumerate(sizes)]
    row = tracker(net(), estimator)(*zip(*parts, strict=True))
    if len(sizes) == 1 and estimator == "micro-batch":  # is cut in as many as are compared
        parts = list(zip(*(t.tensor_split(GROUPS) for t in parts[0]), strict=True))
    assert row["c2_sampled"] == pytest.approx(exact(net(), parts), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(grad_norm(net(), parts), rel=1e-5)
    compared = len(parts) if estimator == "micro-batch" else 3
    assert (row["c2_sampled_se"] is None) == (compared < 3)


@pytest.mark.parametrize(
    ("estimator", "n", "sizes"),
    [
        ("per-sample", 5, [2, 2]),
        ("per-sample", 5, [2, 3]),
        ("micro-batch", 5, [1, 3]),
        ("micro-batch", 5, [2, 1, 1]),
        ("micro-batch", 5, [1, 1, 1, 1, 1]),  # in four groups
    ],
)
def test_the_mean_over_all_ways_to_draw_a_batch_is_c2(estimator, n, sizes):
    model = nn.Linear(6, 3).double()
    x, y = samples(n)
    x = x.double()
    found = gradients(model, x, y)
    c2 = (found - found.mean(0)).square().sum(1).mean().item()
    noise, drawn = tracker(model, estimator, n), []
    for order in itertools.permutations(range(n), sum(sizes)):
        parts = torch.tensor(order).split(sizes)
        if all(part.tolist() == sorted(part) for part in parts):  # within a part order is nothing
            drawn.append(noise([x[i] for i in parts], [y[i] for i in parts])["c2_sampled"])
    assert sum(drawn) / len(drawn) == pytest.approx(c2, rel=1e-9)


def test_a_micro_batch_of_one_sample_leaves_a_measurement_to_the_next():
    noise = tracker(net(), "auto", every=2)
    one, more = samples(1), samples(4)
    assert noise([one[0]], [one[1]]) is None and noise.estimator == "auto"
    assert noise([more[0]], [more[1]])["estimator"] == "per-sample"
    assert noise([more[0], one[0]], [more[1], one[1]]) is None
    assert noise([more[0], more[0]], [more[1], more[1]]) is not None


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (
            "per-sample",
            r"need two samples in every micro-batch, .*\"micro-batch\" takes them of one sample\); "
            r"this batch has \[\[1\]\]",
        ),
        ("micro-batch", r"needs batches of 8 samples, or two micro-batches, .* has \[\[7\]\]"),
    ],
)
def test_batches_that_are_all_too_small_are_a_warning(estimator, words):
    noise = tracker(net(), estimator)
    batch = samples(1 if estimator == "per-sample" else 7)
    assert noise(*batch) is None
    with pytest.warns(UserWarning, match=words):
        assert noise(*batch) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert noise(*batch) is None  # said once


def test_micro_batches_that_weigh_alike_have_one_size():
    noise, (x, y) = tracker(net(), "auto"), samples(8)
    parts = [x[:5], x[5:]], [y[:5], y[5:]]
    assert noise(*parts, alike=True) is None
    with pytest.warns(UserWarning, match=r"several sizes weigh alike .* has \[\[5, 3\]\]"):
        assert noise(*parts, alike=True) is None
    assert noise([x[:4], x[4:]], [y[:4], y[4:]], alike=True) is not None
    assert noise(*parts) is not None  # by their samples


@pytest.mark.parametrize(
    ("every", "update", "epoch", "due"),
    [
        (4, 0, 0, [0, 4]),
        (4, 3, 0.5, [4]),
        (4, 4, 1, [4]),
        (4, 5, 1, []),
        ("2ep", 6, 2, [6]),
        ("2ep", 7, 2.3, []),
        ("2ep", 3, 1, [6]),
    ],
)
def test_a_tracker_that_goes_on_keeps_its_rhythm(every, update, epoch, due):
    """Updates up to the seventh that are measured, of three an epoch."""
    noise, found = tracker(net(), every=every), []
    noise.resume_at(update, epoch)
    for at in range(update, 8):
        if at % 3 == 0 and at > update:
            noise.end_epoch()
        if noise(*samples(4)):
            found.append(at)
    assert found == due


def test_a_clipped_gradient_has_no_delta_and_no_rule_of_plain_sgd():
    row = tracker(net(), clips=True)(*samples(8))
    assert row == tracker(net())(*samples(8)) | {"delta_measured": None}
    with pytest.raises(ValueError, match="cabs: its rule is that of SGD without clipping"):
        tracker(net(), clips=True, quantities=["cabs"])


# Frozen parts, groups of parameters, optimizers


def test_frozen_parts_and_modules_in_evaluation_mode_stay_so():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(12)

        def forward(self, x):
            return self.last(self.part(self.norm(self.first(x))))

    torch.manual_seed(0)
    model = Normed().train()
    model.norm.eval().requires_grad_(False)
    model.first.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    parts = [samples(8)]
    row = tracker(model)(*parts[0])
    assert row["estimator"] == "per-sample"
    assert row["c2_sampled"] == pytest.approx(within(model, parts), rel=1e-5)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_delta_is_that_of_one_lr_and_of_an_optimizer_with_a_bound():
    model = net()
    groups = [{"params": model.first.parameters()}, {"params": model.middle.parameters()}]
    others = [*groups, {"params": model.last.parameters(), "lr": 0.01}]
    found = []
    for optimizer in (
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.optim.SGD([*groups, {"params": model.last.parameters()}], lr=0.1),
        torch.optim.SGD(others, lr=0.1),
        torch.optim.AdamW(model.parameters(), lr=0.1),
    ):
        noise = fs.NoiseTracker(model, optimizer, samples=N, every=1)
        found.append(noise(*samples(8))["delta_measured"])
    c2 = within(net(), [samples(8)])
    assert found[0] == found[1] == pytest.approx(0.1 * (c2 / 8) ** 0.5, rel=1e-5)
    assert found[2:] == [None, None]


# Several processes


@pytest.mark.parametrize("name", ["DeepSpeedEngine", "FullyShardedDataParallel", "DataParallel"])
def test_models_that_are_nowhere_whole_are_refused(name):
    model = nn.DataParallel(net()) if name == "DataParallel" else type(name, (Net,), {})()
    with pytest.raises(NotCovered, match=f"^{name}: no process holds every parameter whole"):
        tracker(model)


def test_batch_statistics_of_several_processes_are_refused():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(WithNorm())
    with pytest.raises(NotCovered, match=r"^SyncBatchNorm: the samples of all processes mix"):
        tracker(model, ranks=Ranks(0, 2))
    tracker(model, ranks=Ranks(0, 2), bn="eval")
    row = tracker(model, bn="eval")(*samples(8))
    assert row["c2_sampled"] == pytest.approx(within(model.eval(), [samples(8)]), rel=1e-5)


class WithNorm(Net):
    """Whose batches are normalised by their own statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x):
        return self.last(self.part(self.norm(self.first(x))))


class Unused(Net):
    def forward(self, x):
        return self.last(self.first(x))


DDP = nn.parallel.DistributedDataParallel
# name -> (the network, how it is wrapped, micro-batches)
WRAPPED: dict[str, tuple[type[nn.Module], dict, int]] = {
    "as it is": (Net, {}, 1),
    "a static graph": (Net, {"static_graph": True}, 1),
    "find_unused_parameters": (Net, {"find_unused_parameters": True}, 1),
    "no_sync": (Net, {}, 3),
    "BatchNorm": (WithNorm, {"broadcast_buffers": True}, 1),
    "BatchNorm, no_sync": (WithNorm, {"broadcast_buffers": True}, 3),
}


def share(rank: int, update: int, parts: int) -> list[Part]:
    """What a process has of a batch: the second one has fewer samples."""
    return [samples(10 - rank, 100 * update + 10 * j + rank) for j in range(parts)]


def trained_by_ranks(rank: int, name: str, measure: bool) -> tuple[dict, list[dict]]:
    kind, how, parts = WRAPPED[name]
    torch.manual_seed(0)
    model = kind()
    wrapped = DDP(model, **how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    noise = fs.NoiseTracker(wrapped, optimizer, samples=N, every=2)
    rows = []
    for update in range(3):
        batch = share(rank, update, parts)
        xs, ys = zip(*batch, strict=True)
        if measure:
            rows.append(noise(xs, ys) if parts > 1 else noise(xs[0], ys[0]))
        for j, (x, y) in enumerate(batch):
            with nullcontext() if j == parts - 1 else wrapped.no_sync():
                (F.cross_entropy(wrapped(x), y) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict()), rows


def words_of(action: Callable[[], Any]) -> str:
    try:
        return f"no error, but {action()}"
    except NotCovered as error:
        return str(error)


def refusals(rank: int) -> dict[str, str]:
    """What a process says where it has another batch than the other."""
    found = {}
    unused = tracker(DDP(Unused(), find_unused_parameters=True))
    found["unused"] = words_of(lambda: unused(*samples(8)))
    loss = partial(F.cross_entropy, ignore_index=0)
    x, _ = samples(8)
    ignored = tracker(DDP(net()), "per-sample", loss=loss)
    y = torch.tensor([1, 1 - rank] * 4)
    found["ignored"] = words_of(lambda: ignored(x, y))
    return found


def small_batches(rank: int) -> list:
    """Rows of batches of which the second process has one sample, no more, and again eight."""
    noise = tracker(DDP(net()))
    rows = [noise(*samples(8 if rank == 0 else size)) for size in (1, 8)]
    return [row and row["c2_sampled"] for row in rows]


def sharded() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(net(), mesh=init_device_mesh("cpu", (2,)))
    return words_of(lambda: tracker(model))


def as_rank(rank: int, port: int, folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found: dict[str, Any] = {"small": small_batches(rank), "refused": refusals(rank)}
    found["sharded"] = sharded()
    part = DDP(net(), process_group=torch.distributed.new_group([0, 1]))
    found["a group of all"] = tracker(part)(*samples(8, rank))["c2_sampled"]
    alone = [torch.distributed.new_group([r]) for r in range(2)][rank]
    joined = DDP(net())
    noise = tracker(joined)
    with pytest.raises(NotCovered) as refused, Join([joined]):
        noise(*samples(8))
    found["join"] = str(refused.value)
    found["a part"] = words_of(lambda: tracker(DDP(net(), process_group=alone)))
    for name in WRAPPED:
        plain, _ = trained_by_ranks(rank, name, measure=False)
        measured, rows = trained_by_ranks(rank, name, measure=True)
        same = all(torch.equal(plain[key], measured[key]) for key in plain)
        found[name] = {"same": same, "rows": rows}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    """What two processes found, by rank."""
    folder, port = tmp_path_factory.mktemp("two"), free_port()
    processes = [SERVER.Process(target=as_rank, args=(rank, port, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0, process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", WRAPPED)
def test_both_processes_get_the_row_of_the_whole_batch_and_train_on_in_the_same_bits(two, name):
    first, second = (found[name] for found in two)
    assert first["same"] and second["same"] and first["rows"] == second["rows"]
    kind, _, parts = WRAPPED[name]
    torch.manual_seed(0)
    model, row = kind(), first["rows"][0]
    assert [row is None for row in first["rows"]] == [False, True, False]
    whole = [part for rank in range(2) for part in share(rank, 0, parts)]
    if kind is Net:
        assert row["estimator"] == "per-sample"
        assert row["c2_sampled"] == pytest.approx(within(model, whole), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(grad_norm(model, whole), rel=1e-5)
    else:
        c2, norm = normed_by_hand(model, parts)
        assert row["estimator"] == "micro-batch"
        assert row["c2_sampled"] == pytest.approx(c2, rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def normed_by_hand(model: nn.Module, parts: int) -> tuple[float, float]:
    """(C2, ||g||) from parts with batch statistics of their own: four of what each process has, or
    the micro-batches that it has."""
    model, grads, sizes = model.double(), [], []
    for rank in range(2):
        own = share(rank, 0, parts)
        if parts == 1:
            own = list(zip(*(t.tensor_split(GROUPS) for t in own[0]), strict=True))
        for x, y in own:
            loss = F.cross_entropy(model(x.double()), y)
            grad = torch.autograd.grad(loss, list(model.parameters()))
            grads.append(torch.cat([g.flatten() for g in grad]))
            sizes.append(len(y))
    weights = torch.tensor(sizes, dtype=torch.float64)
    means = torch.stack(grads)
    mean = (weights[:, None] * means).sum(0) / weights.sum()
    total = (weights * (means - mean).square().sum(1)).sum()
    return (N - 1) / N * total.item() / (len(sizes) - 1), mean.norm().item()


def test_a_batch_that_is_too_small_on_one_process_is_left_to_the_next_on_both(two):
    assert two[0]["small"] == two[1]["small"]
    assert two[0]["small"][0] is None
    expected = within(net(), [samples(8)] * 2)
    assert two[0]["small"][1] == pytest.approx(expected, rel=1e-5)


def test_what_one_process_refuses_both_refuse(two):
    assert two[0]["refused"] == two[1]["refused"]
    assert two[0]["refused"]["unused"].startswith("middle.0.weight takes no part")
    assert "ignore_index" in two[0]["refused"]["ignored"]


def test_models_that_are_sharded_or_wrapped_in_part_are_refused(two):
    for found in two:
        assert found["sharded"].startswith("a model whose parameters are DTensors: no process")
        assert found["a part"].startswith("DistributedDataParallel over a part of the 2 processes")
        assert isinstance(found["a group of all"], float)
        assert found["join"].startswith("inside torch.distributed's Join")
