"""What runs on a GPU beside the same on a CPU or in float64: per-sample norms, estimators, tails,
full gradients, whole runs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from exact import EXACT
from rows import read_rows
from test_persample import MODELS, model_and_batch, rows_of, rows_of_batch, set_statistics
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastsmooth import models
from fastsmooth.kernels.affine_grads import affine_grads
from fastsmooth.kernels.conv_noise import conv_noise, conv_noise_ref, conv_spread
from fastsmooth.noise import estimators, gradients
from fastsmooth.noise.persample import sample_norms
from fastsmooth.noise.tails import BLOCK, NoiseStatistics
from fastsmooth.runfolder.write import TIMES
from fastsmooth.train import main
from fastsmooth.training import loop, measuring, step

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use"
)
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def as_a_process_of_its_own() -> Iterator[None]:
    """Float32 that is float32, as the trainer has it; what runs set for the whole process is taken
    back."""
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.compiler.reset()  # no function is compiled more than eight times in a process
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def on_the_gpu(model: nn.Module, *tensors: Tensor, layout=torch.channels_last) -> list:
    """The model and its images, in the order of memory that the trainer uses, and whatever else."""
    model = model.to(DEVICE, memory_format=layout)
    return [
        model,
        *(t.to(DEVICE, memory_format=layout) if t.ndim == 4 else t.to(DEVICE) for t in tensors),
    ]


def close(found: Tensor, exact: Tensor, rtol: float) -> None:
    torch.testing.assert_close(found.cpu().double(), exact.cpu().double(), rtol=rtol, atol=1e-13)


# Per-sample gradients


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_one_backward_pass_a_sample(name, layout):
    model, x, y = on_the_gpu(*model_and_batch(name, torch.float64), layout=layout)
    found, rows = sample_norms(model, x, y), rows_of(model, x, y)
    mean = rows.mean(dim=0)
    close(torch.cat([g.flatten() for g in found.grads]), mean, 1e-8)
    close(found.squares, rows.square().sum(1), 1e-8)
    close(found.noise, (rows - mean).square().sum(1), 1e-8)
    close(found.grad_square, mean.square().sum(), 1e-8)
    close(sample_norms(model, x, y, noise=False).squares, found.squares, 1e-8)


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2"])
def test_frozen_statistics_are_constants_in_one_backward_pass_a_sample(name):
    model, x, y = on_the_gpu(*model_and_batch(name, torch.float64))
    found = sample_norms(model.train(), x, y, bn="frozen")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(set_statistics)
    rows = rows_of_batch(model.eval(), x, y)
    close(found.squares, rows.square().sum(1), 1e-8)
    close(found.noise, (rows - rows.mean(0)).square().sum(1), 1e-8)


@pytest.mark.parametrize("bn", ["batch", "frozen"])
@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2"])
def test_batch_statistics_give_the_norms_of_a_cpu(name, bn):
    model, x, y = model_and_batch(name, torch.float64)
    exact = sample_norms(model.train(), x, y, bn=bn)
    found = sample_norms(*on_the_gpu(model, x, y), bn=bn)
    for part in ("loss", "squares", "noise", "grad_square"):
        close(getattr(found, part), getattr(exact, part), 1e-8)


@pytest.mark.parametrize("name", ["resnet8, GroupNorm", "layers", "mobilenetv2"])
def test_float32_keeps_the_digits_of_norms_and_deviations(name):
    exact = sample_norms(*model_and_batch(name, torch.float64))
    model, x, y = model_and_batch(name, torch.float64)  # the same numbers, rounded
    found = sample_norms(*on_the_gpu(model.float(), x.float(), y))
    close(found.squares, exact.squares, 1e-4)
    close(found.noise, exact.noise, 1e-4)


def test_a_compiled_model_gives_the_same_norms():
    for layout in (torch.channels_last, torch.contiguous_format):
        model, x, y = on_the_gpu(*model_and_batch("bottleneck", torch.float32), layout=layout)
        exact = sample_norms(model, x, y)
        compiled = torch.compile(model, fullgraph=True)
        for _ in range(2):  # the second time as compiled the first
            found = sample_norms(compiled, x, y)
            close(found.squares, exact.squares, 1e-4)
            close(found.noise, exact.noise, 1e-4)


# Shares of samples


def operands(dtype: torch.dtype, pixels: int) -> tuple[Tensor, Tensor, tuple[list[int], ...]]:
    """(x, dy, kernel, stride, padding, dilation) of a convolution of 64 channels."""
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 9, 64, pixels, pixels, generator=generator)
    on = {"device": DEVICE, "dtype": dtype, "memory_format": torch.channels_last}
    return x.to(**on), dy.to(**on), ([3, 3], [1, 1], [1, 1], [1, 1])


@pytest.mark.parametrize("pixels", [4, 16, 32])  # two samples a trip, tiles, stored rows
@pytest.mark.parametrize(
    "dtype, precision, rtol",
    [
        (torch.float32, "ieee", 1e-5),
        (torch.float32, "tf32x3", 1e-5),
        (torch.float32, "tf32", 5e-3),
        (torch.bfloat16, "ieee", 1e-5),
    ],
)
def test_shares_are_as_exact_as_their_operands(dtype, precision, rtol, pixels):
    x, dy, rule = operands(dtype, pixels)
    exact = conv_noise_ref(x.double(), dy.double(), *rule, 1, True)
    norms, found = (conv_noise(x, dy, *rule, 1, noise, precision) for noise in (False, True))
    dw, spread = conv_spread(x, dy, *rule, 1, precision)
    for some in (norms.dw, found.dw, dw):
        assert some.dtype == torch.float32
        assert (some - exact.dw).norm() <= rtol * exact.dw.norm()
    for squares in (norms.squares, found.squares):
        close(squares, exact.squares, rtol)
    close(spread, exact.noise.sum(), rtol)
    close(found.noise.sum(), exact.noise.sum(), rtol)
    # the mean that deviations begin from is rounded to bfloat16
    close(found.noise, exact.noise, max(rtol, 1e-3 if dtype == torch.bfloat16 else 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_shares_have_the_bits_of_eager_ones(dtype):
    torch.use_deterministic_algorithms(True)  # cuDNN's weight gradient is what deviations begin at
    for pixels in (4, 16, 32):
        x, dy, rule = operands(dtype, pixels)
        mean, rstd = torch.rand(2, 9, 8, device=DEVICE)

        def step(given=(x, dy, *rule), norm=(x, dy, mean, rstd)) -> list[Tensor]:
            found = [conv_noise(*given, 1, noise, "tf32") for noise in (False, True)]
            return tree_leaves([found, conv_spread(*given, 1, "tf32"), affine_grads(*norm)])

        eager = step()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        for _ in range(2):
            for tensor in captured:
                tensor.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


# Estimators, statistics, full gradients


def test_estimators_agree_with_a_cpu():
    generator = torch.Generator().manual_seed(0)
    parts = [
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((40, 7), (9,), ())]
        for _ in range(5)
    ]
    sizes, noise = [9, 8, 8, 8, 8], torch.rand(41, generator=generator, dtype=torch.float64)
    found = []
    for device in (DEVICE, torch.device("cpu")):
        grads = [[t.to(device) for t in part] for part in parts]
        mean = estimators.weighted_mean(grads, sizes)
        found.append(
            (
                estimators.per_sample(noise.to(device), 90),
                estimators.micro_batch(grads, mean, sizes, 90),
            )
        )
    for ours, exact in zip(*found, strict=True):
        assert (ours.value, ours.error) == pytest.approx((exact.value, exact.error), rel=1e-12)


def test_statistics_of_noise_agree_with_a_cpu():
    generator = torch.Generator().manual_seed(0)
    sizes = [BLOCK["cuda"] - 5, 1001]  # a block of the GPU and a piece of the next
    summaries = []
    draws = [
        [
            torch.randn(n, generator=generator).exp_() * torch.randn(n, generator=generator)
            for n in sizes
        ]
        for _ in range(3)
    ]
    for device in (DEVICE, torch.device("cpu")):
        statistics = NoiseStatistics(sum(sizes), device)
        for draw in draws:
            statistics.observe([t.to(device) for t in draw])
        summaries.append(statistics.summary())
    found, exact = summaries
    assert found["histogram"] == exact["histogram"] and found["zeros"] == exact["zeros"]
    assert tree_leaves(found) == pytest.approx(tree_leaves(exact), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("bn", ["eval", "train"])
def test_the_full_gradient_is_that_of_a_cpu(bn, norm):
    torch.manual_seed(0)
    model = models.build("resnet8", 10, norm).double()
    x, y = torch.randn(60, 3, 8, 8, dtype=torch.float64), torch.randint(10, (60,))

    def full(model, x, y):
        with gradients.undisturbed(model, bn):
            return gradients.full_gradient(model, zip(x.split(25), y.split(25), strict=True))

    exact = full(model, x, y)
    for g, e in zip(full(*on_the_gpu(model, x, y)), exact, strict=True):
        torch.testing.assert_close(g.cpu(), e, rtol=1e-8, atol=1e-12)


# Whole runs

EAGER = [*EXACT, "--compile", "off"]
RUNS = {
    "per-sample": ["--norm", "group", "--track-noise", "every=20", "--epochs", "2"],
    "per-sample, frozen": ["--bn", "frozen", "--track-noise", "every=20", "--epochs", "1"],
    "micro-batch": [
        "--track-noise",
        "every=20",
        "--epochs",
        "2",
        "--method",
        "hybrid",
        "--decay-epoch",
        "1",
    ],
    "sampling": ["--mode", "sampling", "--steps", "0", "30", "--draws", "3", "--bn", "eval"],
    "sampling, histories": ["--mode", "sampling", "--steps", "30", "--optimizer", "nshb"],
    "sampling, batch statistics": [
        "--mode",
        "sampling",
        "--steps",
        "0",
        "30",
        "--draws",
        "3",
        "--save-omega",
    ],
    "critical": [
        "--mode",
        "critical",
        "--eps",
        "1.6",
        "1.2",
        "1e-6",
        "--epochs",
        "2",
        "--min-epochs",
        "0",
    ],
    "critical, full gradients": [
        "--mode",
        "critical",
        "--criterion",
        "full-grad",
        "--eps",
        "0.5",
        "--epochs",
        "2",
    ],
}


def run(out: Path, *flags: str, device: str = DEVICE.type, code: int = 0) -> Path:
    assert main([*flags, "--device", device, "--out", str(out)]) == code
    return out


def without_times(out: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in TIMES} for row in read_rows(out)
    ]


def written(out: Path, name: str) -> dict | None:
    return json.loads((out / name).read_text()) if (out / name).exists() else None


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_as_one_that_was_not(name, tmp_path):
    whole = run(tmp_path / "whole", *EAGER, *RUNS[name])
    parted = run(tmp_path / "parted", *EAGER, *RUNS[name], "--max-time", "0.001", code=75)
    assert main(["--resume", "--out", str(parted), "--max-time", "1h"]) == 0
    assert without_times(parted) == without_times(whole)
    for file in ("noise.json", "critical.json"):
        assert written(parted, file) == written(whole, file)


@pytest.mark.parametrize("name", ["per-sample", "per-sample, frozen", "micro-batch", "sampling"])
def test_the_first_measurement_is_that_of_a_cpu(name, tmp_path):
    """Before training, which amplifies rounding."""
    outs = [
        run(tmp_path / out, *EAGER, *RUNS[name], device=d)
        for out, d in (("gpu", DEVICE.type), ("cpu", "cpu"))
    ]
    found, exact = (next(row for row in read_rows(out) if row["kind"] == "measure") for out in outs)
    keys = (
        ["c2_sampled", "noise_norm", "full_grad_norm"]
        if name == "sampling"
        else ["c2_sampled", "c2_sampled_se", "grad_norm"]
    )
    assert found["step"] == 0
    assert [found[key] for key in keys] == pytest.approx([exact[key] for key in keys], rel=1e-3)


@pytest.mark.parametrize("name", ["per-sample", "micro-batch"])
def test_training_with_measurements_is_training_without(name, tmp_path):
    plain = [f for f in RUNS[name] if f not in ("--track-noise", "every=20")]
    rows = []
    for out, flags in (("plain", plain), ("tracked", RUNS[name])):
        found = read_rows(run(tmp_path / out, *EAGER, *flags))
        rows.append([(r["train_loss"], r["test_loss"]) for r in found if r["kind"] == "epoch"])
    assert rows[0] == rows[1]


def test_a_growing_batch_compiles_once(tmp_path):
    """Training step and evaluation: two graphs, whatever lr and batch do."""
    flags = [
        "--method",
        "hybrid",
        "--epochs",
        "5",
        "--decay-epoch",
        "1",
        "--optimizer",
        "shb",
        "--lr",
        "0.02",
    ]
    out = run(tmp_path / "run", *flags, "--compile", "on")
    assert written(out, "summary.json")["compiled_graphs"] == 2
    assert written(out, "summary.json")["final_test_acc"] > 0.95


@pytest.mark.parametrize("bn, graphs", [("train", 1), ("eval", 2)])
def test_compiled_measurements_agree_with_eager_ones_and_compile_nothing_again(
    bn, graphs, tmp_path
):
    flags = [
        "--mode",
        "sampling",
        "--steps",
        "0",
        "2",
        "--draws",
        "3",
        "--batchsize",
        "100",
        "--bn",
        bn,
    ]
    points = []
    for compile in ("on", "off"):
        out = run(tmp_path / compile, *flags, "--compile", compile)
        points.append(written(out, "noise.json")["points"][0])
        assert written(out, "summary.json")["compiled_graphs"] == (graphs if compile == "on" else 0)
    for key in ("full_grad_norm", "c2_sampled", "noise_norm"):
        assert points[0][key] == pytest.approx(points[1][key], rel=1e-3), key


# Captured updates

GRAPHS = {
    "hybrid": ["--method", "hybrid", "--decay-epoch", "1", "--optimizer", "shb", "--lr", "0.02"],
    "augmented, group norm": [
        "--augment",
        "crop-flip-rotate",
        "--norm",
        "group",
        "--method",
        "exp",
    ],
    "streamed": ["--loader", "threads", "--augment", "crop-flip", "--method", "exp"],
    "micro-batches": ["--micro-batch", "16", "--track-noise", "every=20"],
    "bf16": ["--precision", "bf16", "--optimizer", "nshb"],
    "dropout": ["--model", "torchvision/mobilenet_v3_small", "--lr", "0.01"],
    "critical": RUNS["critical"],
    "sampling, histories": RUNS["sampling, histories"],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_captured_updates_end_in_the_bits_of_eager_ones(name, tmp_path):
    flags = [*EAGER, "--batchsize", "64", *GRAPHS[name]]
    flags += [] if "--epochs" in flags else ["--epochs", "3"]
    outs = [run(tmp_path / how, *flags, "--graphs", how) for how in ("off", "on")]
    assert written(outs[1], "summary.json")["captured_graphs"] > 0
    assert without_times(outs[1]) == without_times(outs[0])
    for file in ("noise.json", "critical.json"):
        assert written(outs[1], file) == written(outs[0], file)


def test_a_compiled_and_captured_run_is_resumed_in_the_same_bits(tmp_path):
    flags = ["--epochs", "3", "--compile", "on", "--graphs", "on", "--deterministic"]
    whole = run(tmp_path / "whole", *flags)
    parted = run(tmp_path / "parted", *flags, "--max-time", "0.001", code=75)
    assert main(["--resume", "--out", str(parted), "--max-time", "1h"]) == 0
    assert without_times(parted) == without_times(whole)
    assert written(whole, "summary.json")["compiled_graphs"] == 2


def test_what_cannot_be_captured_is_done_as_it_is(tmp_path, monkeypatch, capsys):
    forward = step.Step._plain_forward

    def reads(self, x, y, autocast):
        loss, correct = forward(self, x, y, autocast)
        return loss * (correct.item() >= 0), correct

    monkeypatch.setattr(step.Step, "_plain_forward", reads)
    monkeypatch.setattr(loop, "LEAST", 3)
    out = run(tmp_path / "auto", "--epochs", "1", "--compile", "off", "--graphs", "auto")
    assert written(out, "summary.json")["captured_graphs"] == 0
    assert "no more updates are captured as CUDA graphs: at 32 samples, " in capsys.readouterr().err
    run(tmp_path / "on", "--epochs", "1", "--compile", "off", "--graphs", "on", code=2)
    assert "--graphs on: an update of 32 samples cannot be captured" in capsys.readouterr().err


# Chunks that do not fit in memory

SAMPLING = [*EAGER, "--mode", "sampling", "--draws", "2", "--bn", "eval", "--model", "resnet20"]


def points_of(out: Path) -> list[dict]:
    return written(out, "noise.json")["points"]


def test_chunks_are_halved_until_they_fit(tmp_path, monkeypatch):
    whole = points_of(run(tmp_path / "whole", *SAMPLING, "--steps", "0", "1"))
    gradient, limit = gradients.batch_gradient, 100

    def small(model, x, y, *rest):
        if len(y) > limit:
            raise torch.OutOfMemoryError
        return gradient(model, x, y, *rest)

    monkeypatch.setattr(gradients, "batch_gradient", small)
    halved = points_of(run(tmp_path / "halved", *SAMPLING, "--steps", "0", "1"))
    chunk = loop.EVAL_CHUNK[DEVICE.type]
    while chunk > limit:
        chunk //= 2
    assert [p["chunk"] for p in whole] == [loop.EVAL_CHUNK[DEVICE.type]] * 2
    assert [p["chunk"] for p in halved] == [chunk] * 2
    assert halved[0]["full_grad_norm"] == pytest.approx(whole[0]["full_grad_norm"], rel=1e-5)


def with_memory(spare: int, full: Callable) -> Callable:
    """measuring.full_gradient with `spare` bytes beyond what the process holds by then."""

    def limited(live: loop.Run, point) -> list[Tensor]:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
        try:
            return full(live, point)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    return limited


def test_chunks_are_halved_where_the_memory_ends(tmp_path, monkeypatch):
    """After a few updates, by which time what libraries keep for themselves is there."""
    whole = points_of(run(tmp_path / "whole", *SAMPLING, "--steps", "3"))
    monkeypatch.setattr(measuring, "full_gradient", with_memory(64 << 20, measuring.full_gradient))
    halved = points_of(run(tmp_path / "halved", *SAMPLING, "--steps", "3"))
    assert 1 <= halved[0]["chunk"] < whole[0]["chunk"] == loop.EVAL_CHUNK["cuda"]
    assert halved[0]["full_grad_norm"] == pytest.approx(whole[0]["full_grad_norm"], rel=1e-4)
