"""`import fastsmooth as fs`: what it costs, what it has, and that the README's ten lines work."""

import json
import random
import re
import subprocess
import sys

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastsmooth as fs
from fastsmooth.train import main

WITHOUT_TORCH = {"Schedule", "Point", "Smoothing", "load_run", "load_runs"}


def python(code: str) -> str:
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_brings_no_torch_and_little_else():
    code = "import sys\nbefore = set(sys.modules)\nimport fastsmooth\n"
    brought = python(code + "print(*set(sys.modules) - before)").split()
    assert "fastsmooth" in brought
    assert not {"torch", "numpy", "fastsmooth.schedule"} & set(brought)
    assert len(brought) < 60  # a hundredth of what torch brings


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_schedules_and_saved_runs_do_without_torch(name):
    python(f"import sys, fastsmooth as fs\nfs.{name}\nassert 'torch' not in sys.modules")


def test_every_name_is_there_and_listed():
    assert set(fs.__all__) <= set(dir(fs))
    for name in fs.__all__:
        value = getattr(fs, name)
        assert value is getattr(fs, name)  # the second time too
        assert value.__doc__ or name == "__version__"
    everything: dict = {}
    exec("from fastsmooth import *", everything)
    assert set(fs.__all__) <= everything.keys()
    with pytest.raises(AttributeError, match="has no attribute 'Scheduler'"):
        fs.Scheduler  # noqa: B018


def test_sharpness_is_never_the_function_whatever_was_imported_before():
    code = """
{before}
from fastsmooth import sharpness
import fastsmooth.sharpness as module
assert sharpness is module is fs.sharpness and module.main
from fastsmooth.noise import sharpness as measured
assert fs.loss_sharpness is measured.loss_sharpness
"""
    none = (
        "try:\n    fs.sharpness\nexcept AttributeError as error:\n"
        "    assert 'loss_sharpness' in str(error)\nelse:\n    raise SystemExit('no error')"
    )
    befores = ("", "fs.loss_sharpness", "import fastsmooth.sharpness")
    cases = [none, *(code.format(before=before) for before in befores)]
    python(f"""
import os, sys, torch
for case in {cases!r}:  # each in a process of its own, which has torch already
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            sys.exit(case)
    else:
        import fastsmooth as fs
        exec(case)
        sys.exit()
""")


@pytest.mark.parametrize("optimizer_of", ["NoisySGD", "torch.optim.SGD"])
def test_the_ten_lines(optimizer_of):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )
    train = [(torch.randn(3, 8, 8), i % 5) for i in range(60)]
    images, labels = torch.stack([x for x, _ in train]), torch.tensor([y for _, y in train])

    def loader(batch_size):
        for index in torch.randperm(len(train)).split(batch_size):
            yield images[index], labels[index]

    rows, points = [], []
    schedule = fs.Schedule(
        "hybrid", epochs=3, lr=0.1, batch_size=8, decay_epoch=1, optimizer="shb", momentum=0.9
    )
    if optimizer_of == "NoisySGD":
        optimizer = fs.NoisySGD(model.parameters(), form="shb", lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    noise = fs.NoiseTracker(model, optimizer, samples=len(train), every=5, loss=F.cross_entropy)
    for epoch in range(3):
        point = schedule(epoch)
        if optimizer_of == "NoisySGD":
            optimizer.set_point(point)
        for x, y in loader(point.batch_size):
            row = noise(x, y, point)
            rows.append(row)
            points.append((point, y.clone()))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert sorted({point.batch_size for point, _ in points}) == [8, 12, 18]
    assert [i for i, row in enumerate(rows) if row] == list(range(0, len(rows), 5))
    for (point, y), row in ((points[i], rows[i]) for i in range(0, len(rows), 5)):
        assert row["estimator"] == "per-sample" and row["c2_sampled"] > row["c2_sampled_se"] > 0
        smoothing = fs.Smoothing("shb", c2=row["c2_sampled"], k2=row["k2"])
        delta = smoothing.degree(point.lr, point.batch_size, 0.9)
        assert row["delta_measured"] == pytest.approx(delta, rel=1e-12)
        full = row["grad_norm"] ** 2 - row["c2_sampled"] / len(y) * (60 - len(y)) / 59
        assert row is not rows[0] or row["full_grad_square"] == pytest.approx(full, rel=1e-9)
    assert rows[-1] is None or rows[-1]["k2"] >= rows[0]["grad_norm"] ** 2


def test_the_tracker_changes_nothing_of_the_training():
    def trained(tracked: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 5)
        )
        optimizer = fs.NoisySGD(model.parameters(), "nshb", 0.1, 0.9)
        noise = fs.NoiseTracker(model, optimizer, samples=64, every=2)
        for _ in range(5):
            x, y = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))
            if tracked:
                noise(x, y, fs.Point(0.1, 16, 0.9))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert noise.count == (3 if tracked else 0) and model.training
        return [*model.parameters(), *model.buffers(), torch.rand(3)]

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_hooks_and_the_other_random_numbers_do_not_notice_either():
    class Noisy(nn.Linear):
        def forward(self, x):
            random.random(), numpy.random.rand()  # as one that drops paths by them
            return super().forward(x)

    model, seen = Noisy(12, 3), []
    model.weight.register_hook(lambda grad: seen.append(grad) or grad.clamp(-1e-3, 1e-3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    random.seed(1)
    numpy.random.seed(1)
    x, y = torch.randn(16, 12), torch.arange(16) % 3
    for estimator in ("per-sample", "micro-batch"):
        noise = fs.NoiseTracker(model, optimizer, samples=64, every=1, estimator=estimator)
        assert noise(x, y)["grad_norm"] > 0.1 and not seen
    drawn = random.random(), numpy.random.rand()
    random.seed(1)
    numpy.random.seed(1)
    assert drawn == (random.random(), numpy.random.rand())
    F.cross_entropy(model(x), y).backward()
    assert len(seen) == 1 and model.weight.grad.abs().max() <= 1e-3


def test_a_network_that_is_not_finite_is_said_and_found_out_later():
    model = nn.Linear(12, 3)
    noise = fs.NoiseTracker(model, torch.optim.SGD(model.parameters(), 0.1), samples=64, every=1)
    x, y = torch.randn(16, 12), torch.arange(16) % 3
    with pytest.raises(FloatingPointError, match="not finite"):
        noise(x * float("nan"), y)
    assert noise(x, y)["estimator"] == "per-sample"


def test_a_data_set_is_opened_by_plain_arguments():
    data = fs.open_data("digits", device="cpu", augment="crop-flip", seed=3)
    assert (len(data.train), len(data.test), data.classes, data.size) == (1437, 360, 10, 8)
    index = [torch.arange(5), torch.arange(5, 9)]
    (x, y), (last, _) = data.train.batches(index, epoch=0)
    assert x.shape == (5, 3, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert len(last) == 4
    plain = next(data.train.batches(index))[0]
    other = fs.open_data("digits", device="cpu", augment="crop-flip", seed=4)
    assert not torch.equal(x, plain)
    assert torch.equal(next(other.train.batches(index))[0], plain)
    assert not torch.equal(next(other.train.batches(index, epoch=0))[0], x)


def test_a_folder_says_what_size_its_images_are(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for k, name in enumerate(("cats", "dogs")):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 24), (90 * k, 0, 0)).save(tmp_path / split / name / "0.png")
    data = fs.open_data("folder", tmp_path, device="cpu", loader="threads", workers=1)
    assert data.size == 20 and data.classes == 2
    assert fs.open_data("folder", str(tmp_path), device="cpu", image_size=16).size == 16


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"dataset": "cifar-100"}, "did you mean cifar100?"),
        ({"augment": "flipcrop"}, "crop-flip"),
        ({"loader": "dataloader"}, "fastsmooth calls it torch"),
        ({"dataset": "digits", "data_dir": "x"}, "--data-dir has no effect with --dataset digits"),
        ({"data_dir": "x"}, "--data-dir x: no such directory"),
        ({"worker": 3}, "did you mean workers?"),
        ({"plan": True}, "open_data: plan: choose from dataset, data_dir"),
        ({"resume": True}, "open_data: resume: choose from"),
        ({"device": "gpu"}, "'gpu' is not auto, cpu, cuda"),
    ],
    ids=str,
)
def test_what_no_data_set_is_opened_with_is_refused_in_words(wrong, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        fs.open_data(**({"device": "cpu"} | wrong))


def test_a_run_folder_is_read_back(tmp_path):
    out = tmp_path / "run"
    assert main(["--epochs", "1", "--seed", "5", "--out", str(out)]) == 0
    saved = fs.load_run(str(out))
    assert saved.state == "done" and saved.config["seed"] == 5
    (row,) = saved.of_kind("epoch")
    assert saved.summary["final_test_acc"] == row["test_acc"]
    assert json.loads((out / "config.json").read_text()) == fs.load_run(out).config
    with pytest.raises(ValueError, match="is not a run folder"):
        fs.load_run(tmp_path)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: fs.build_model("resnet-18", 10), "did you mean resnet18?"),
        (lambda: fs.build_model("resnet18", 10, norm="groupnorm"), "fastsmooth calls it group"),
        (lambda: fs.Smoothing("qmh"), "did you mean qhm?"),
        (lambda: fs.NoisySGD([torch.zeros(1)], form="heavy-ball", lr=0.1), "calls it shb"),
        (lambda: fs.loss_sharpness(nn.Linear(2, 2), [], [1.0], algorithm="avg-l2"), "avg_l2?"),
    ],
)
def test_unknown_names_are_refused_with_what_may_have_been_meant(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_sharpness_of_a_quadratic_bowl():
    class Bowl(nn.Module):
        """Cross-entropy of logits (0, w): log(1 + e^w) for class 0."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return torch.stack([torch.zeros(len(x)), self.w.expand(len(x))], dim=1)

    x, y = torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)
    (found,) = fs.loss_sharpness(Bowl(), [(x, y)], [0.5], adaptive=False)
    expected = F.softplus(torch.tensor(1.5)) - F.softplus(torch.tensor(1.0))
    assert found.value == pytest.approx(expected.item(), rel=1e-5)
