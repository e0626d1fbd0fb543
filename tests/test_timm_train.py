"""Gradient noise in training scripts of timm's shape, and in its own train.py where TIMM_TRAIN
names one, against a plain loop over the same batches."""

import contextlib
import csv
import functools
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from forks import assert_same_bits, free_port
from PIL import Image
from said import refused, said
from torch.nn import functional as F

import fastsmooth as fs

pytest.importorskip("timm")
SCRIPTS = Path(__file__).parent / "timm_scripts"
pytestmark = [
    # of timm and PyTorch, about each other
    pytest.mark.filterwarnings("ignore:Importing from timm.models:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is (deprecated|not supported):"),
]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a script changes in this process is changed back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
    for name in ("tasks", "losses"):
        sys.modules.pop(name, None)


def main(argv):
    from fastsmooth.adapters import timm

    return timm.main(argv)


def host(script, argv):
    """A script by itself: what it saved in the end."""
    from fastsmooth.adapters.timm import loaded

    module = loaded(SCRIPTS / script)
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "argv", sys.argv)
        sys.argv = [script, *argv]
        module.main()
    return torch.load(argv[0], weights_only=False)


def measured(script, argv, *flags, every=1):
    """The same with measurements: (what it saved, the EpochWatch)."""
    flags = ["--track-noise", f"every={every}", *flags]
    assert main([*flags, "--", str(SCRIPTS / script), *argv]) == 0
    return torch.load(argv[0], weights_only=False), sys.modules[Path(script).stem].train_one_epoch


def bce(output, target):
    """BinaryCrossEntropy of timm with its smoothing of 0.1, a value a sample."""
    wanted = torch.full_like(output, 0.01).scatter_(1, target[:, None], 0.91)
    return F.binary_cross_entropy_with_logits(output, wanted, reduction="none").sum(1)


LOSSES = {
    "smoothing": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "soft": F.cross_entropy,
    "bce": bce,
    "plain": F.cross_entropy,
}


def in_a_plain_loop(
    model="test_vit", loss="smoothing", images=32, accum=1, mixup=False, dtype=None
):
    """The rows of a NoiseTracker that is called in a loop of our own."""
    import timm.utils
    from timm.data import Mixup

    sys.path.insert(0, str(SCRIPTS))
    import tasks

    args = Namespace(model=model, images=images)
    timm.utils.random_seed(0)
    net = tasks.network(args)
    loader = tasks.loader_of(args)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    mix = Mixup(0.2, num_classes=10) if mixup else lambda x, y: (x, y)
    mix.mixup_enabled = False  # class probabilities alone are left
    noise = fs.NoiseTracker(net.train(), optimizer, samples=images, every=1, loss=LOSSES[loss])
    autocast = torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()
    rows, parts = [], []
    for i, (x, y) in enumerate(loader):
        parts.append(mix(x, y))
        if len(parts) < accum and i + 1 < len(loader):
            continue
        with autocast:
            row = noise(*map(list, zip(*parts, strict=True)))
        rows += [row] if row else []
        for x, y in parts:
            with autocast:
                value = LOSSES[loss](net(x), y).mean()
            (value / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
        parts = []
    return rows


def same(rows, expected):
    assert len(rows) == len(expected) == 2
    for row, want in zip(rows, expected, strict=True):
        for name in ("c2_sampled", "grad_norm", "noise_scale", "delta_measured"):
            assert row[f"noise/{name}"] == pytest.approx(want[name], rel=1e-6), name


CASES = {
    "a task": ("tasks.py", "", {}),
    "a loss": ("losses.py", "", {}),
    "class probabilities": (
        "tasks.py",
        "--loss soft --mixup --mixup-off-epoch 1 --start-epoch 1 --epochs 2",
        {"loss": "soft", "mixup": True},
    ),
    "binary cross-entropy": ("losses.py", "--loss bce", {"loss": "bce"}),
    "micro-batches and BatchNorm": (
        "tasks.py",
        "--grad-accum-steps 2 --images 48 --model test_resnet --loss plain",
        {"accum": 2, "images": 48, "model": "test_resnet", "loss": "plain"},
    ),
    "bfloat16": (
        "tasks.py",
        "--amp-dtype bfloat16 --loss plain",
        {"dtype": torch.bfloat16, "loss": "plain"},
    ),
    "float16": (
        "tasks.py",
        "--amp-dtype float16 --loss plain",
        {"dtype": torch.float16, "loss": "plain"},
    ),
    "a compiler and an average": ("tasks.py", "--torchcompile eager --model-ema", {}),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.full] if "compiler" in case else []) for case in CASES],
)
def test_c2_is_that_of_a_plain_loop_and_training_keeps_its_bits(case, tmp_path):
    script, line, facts = CASES[case]
    argv = [str(tmp_path / "a.pt"), *line.split()]
    alone = host(script, argv)
    found, watch = measured(script, argv)
    assert_same_bits(found["state"], alone["state"])
    assert_same_bits([m["loss"] for m in found["metrics"]], [m["loss"] for m in alone["metrics"]])
    if "--model" not in argv:
        assert watch.watch.noise.estimator == "per-sample"
    same(watch.rows, in_a_plain_loop(**facts))


def test_an_update_that_the_scaler_leaves_out_is_not_measured(tmp_path):
    """The first overflows, so that the second is made of the parameters that the first had."""
    argv = [str(tmp_path / "a.pt"), "--amp-dtype", "float16", "--scaler", "--loss", "plain"]
    alone = host("tasks.py", argv)
    found, watch = measured("tasks.py", argv)
    assert_same_bits(found["state"], alone["state"])
    (row,) = watch.rows
    import tasks
    import timm.utils

    timm.utils.random_seed(0)
    args = Namespace(model="test_vit", images=32)
    net, loader = tasks.network(args), tasks.loader_of(args)
    _, (x, y) = loader
    noise = fs.NoiseTracker(net, torch.optim.SGD(net.parameters(), 0.1), samples=32, every=1)
    assert row["noise/c2_sampled"] == pytest.approx(noise(x, y)["c2_sampled"], rel=1e-6)
    assert watch.watch.noise.update == 2


def test_numbers_of_an_epoch_have_the_same_names_where_none_was_measured(tmp_path, caplog):
    argv = [str(tmp_path / "a.pt"), "--epochs", "3", "--model", "test_resnet"]
    with caplog.at_level("INFO"):
        found, watch = measured("tasks.py", argv, every=3)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Noise")]
    assert [line[:15] for line in lines] == ["Noise: 0 [   0]", "Noise: 1 [   3]"]
    assert "C2: " in lines[0] and "+-" in lines[0] and "Delta: " in lines[0]
    names = ["noise_c2", "noise_delta", "noise_scale"]
    assert [list(m) for m in found["metrics"]] == [["loss", *names]] * 3
    first, second, third = found["metrics"]
    assert f"C2: {first['noise_c2']:.4g} +-" in lines[0]
    assert f"Delta: {second['noise_delta']:.4g}" in lines[1]
    assert [third[name] for name in names] == [None] * 3
    # a training that is taken up with the last epoch measures where it would have
    measured("tasks.py", [*argv, "--start-epoch", "2"], every=3)
    watch = sys.modules["tasks"].train_one_epoch.watch
    assert (watch.noise.update, watch.noise.epoch, watch.noise.count) == (6, 3, 0)


def test_a_clipped_update_has_no_delta(tmp_path):
    argv = [str(tmp_path / "a.pt"), "--clip-grad", "0.5"]
    alone = host("tasks.py", argv)
    found, _ = measured("tasks.py", argv)
    assert_same_bits(found["state"], alone["state"])
    assert found["metrics"][0]["noise_delta"] is None and found["metrics"][0]["noise_c2"] > 0


def test_what_cannot_be_measured_is_one_line(tmp_path):
    script, out = str(SCRIPTS / "tasks.py"), str(tmp_path / "a.pt")

    def line(*flags, script=script, args=()):
        return refused(main, [*flags, "--", script, out, *args])

    every = ("--track-noise", "every=2")
    assert "trains on a loss of" in line(*every, args=["--distill"])
    assert "its rule is that of SGD without momentum" in line(*every, "--quantities", "cabs")
    assert line() == "--track-noise: say when to measure, as in --track-noise every=50"
    assert "every 'often'" in line("--track-noise", "often")
    assert "did you mean --estimator" in line(*every, "--estimater", "auto")
    assert line(*every, script="nowhere.py") == (
        "nowhere.py: there is no such script: give the path of timm's train.py"
    )
    (tmp_path / "other.py").write_text("def main():\n    pass\n")
    assert "has no train_one_epoch() and main()" in line(*every, script=str(tmp_path / "other.py"))
    (tmp_path / "third.py").write_text("def train_one_epoch(model):\n    pass\nmain = print\n")
    assert "train_one_epoch() takes model, and not" in line(
        *every, script=str(tmp_path / "third.py")
    )
    assert "no script: give timm's train.py" in refused(main, [*every])
    assert "--track-noise WHEN" in said(main, ["--help"]).out


@pytest.mark.parametrize(
    "given, words",
    [
        ({"naflex_mode": True}, "--naflex-loader"),
        (
            {"scheduled_batch_mode": True, "variable_batch_loss_scale": "linear"},
            "--train-img-sizes",
        ),
        ({"scheduled_batch_mode": True, "grad_accum_steps": 2}, "--train-img-sizes"),
        ({"scheduled_batch_mode": True}, ""),
        ({"aug_repeats": 3.0}, "--aug-repeats: a batch has the same sample"),
        ({"aug_splits": 3}, "--aug-splits: a batch has the same sample"),
        ({"mixup": 0.8}, "--mixup, --cutmix: the samples of a batch are mixed"),
        ({"cutmix": 1.0, "mixup_off_epoch": 3}, "--mixup, --cutmix"),
        ({"cutmix_minmax": [0.2, 0.8]}, "--mixup, --cutmix"),
        ({"mixup": 0.8, "mixup_off_epoch": 2}, ""),
        ({"mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": None, "aug_repeats": 0.0}, ""),
        ({}, ""),
    ],
)
def test_batches_that_weigh_otherwise_are_refused(given, words):
    from fastsmooth.adapters.timm import NotCovered, check_batches

    modes = {name: given.pop(name) for name in [*given] if name.endswith("_mode")}
    facts = {"variable_batch_loss_scale": "none", "grad_accum_steps": 1} | given
    with pytest.raises(NotCovered, match=words) if words else contextlib.nullcontext():
        check_batches({"args": Namespace(**facts), "epoch": 2, **modes})


def test_a_loss_that_compares_samples_is_refused():
    from timm.loss import JsdCrossEntropy, SoftTargetCrossEntropy

    from fastsmooth.adapters.common import OfEach
    from fastsmooth.noise.losses import NotCovered, mean_loss

    output, target = torch.randn(6, 4), torch.randint(4, (6,))
    with pytest.raises(NotCovered, match="JsdCrossEntropy fails for a sample alone"):
        mean_loss(OfEach(JsdCrossEntropy(num_splits=3)), output, target)
    soft = F.one_hot(target, 4).float()
    value = mean_loss(OfEach(SoftTargetCrossEntropy()), output, soft)
    assert value.item() == pytest.approx(F.cross_entropy(output, target).item())

    def centred(output, target):
        return F.mse_loss(output - output.mean(), target)

    with pytest.raises(NotCovered, match="the loss centred gives"):
        mean_loss(OfEach(centred), output, soft)


def test_memory_that_runs_out_is_no_matter_of_the_loss():
    from fastsmooth.adapters.common import OfEach

    def full(output, target):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        OfEach(full)(torch.randn(2, 4), torch.zeros(2), reduction="none")


def test_the_scripts_own_errors_and_exit_codes_are_its_own(tmp_path):
    script = tmp_path / "script.py"
    head = "def train_one_epoch(epoch, model, loader, optimizer, args, task):\n    pass\n"
    script.write_text(head + "def main():\n    raise KeyError('of its own')\n")
    with pytest.raises(KeyError, match="of its own"):
        main(["--track-noise", "every=2", "--", str(script)])
    script.write_text(head + "import sys\ndef main():\n    sys.exit(sys.argv[1:].index('b'))\n")
    with pytest.raises(SystemExit) as ending:
        main(["--track-noise", "every=2", "--", str(script), "a", "b"])
    assert ending.value.code == 1


def train_py():
    """timm's own script. Its path is in TIMM_TRAIN: it is part of timm's repository, not of its
    package."""
    path = os.environ.get("TIMM_TRAIN")
    if not path:
        pytest.skip("TIMM_TRAIN does not name timm's train.py")
    return path


@pytest.fixture
def folder(tmp_path):
    """48 digits to train on and ten to test on, PNG files in folders of their classes."""
    train = fs.open_data("digits", device="cpu").train
    x, y = next(train.batches(torch.arange(400).split(400)))
    x = ((x - x.amin()) / (x.amax() - x.amin()) * 255).byte().permute(0, 2, 3, 1)
    for digit in range(10):
        few = x[y == digit][:6]
        for i, pixels in enumerate(few):
            part = "validation" if i == 5 else "train"
            if digit in (8, 9) and i in (3, 4):
                continue
            to = tmp_path / "images" / part / str(digit)
            to.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(to / f"{i}.png")
    return tmp_path


LINE = (
    "--model test_vit --img-size 32 --num-classes 10 --device cpu --workers 0 -b 8 --epochs 2 "
    "--warmup-epochs 0 --opt momentum --lr 0.02 --model-kwargs depth=1 embed_dim=32 num_heads=2 "
    "--experiment run --output"
)


def arguments(folder, out, more=""):
    return [str(folder / "images"), *LINE.split(), str(folder / out), *more.split()]


def last(folder, out):
    """(weights and optimizer, the rows of summary.csv) of a run of train.py."""
    saved = torch.load(folder / out / "run" / "last.pth.tar", weights_only=False)
    with open(folder / out / "run" / "summary.csv") as file:
        return (saved["state_dict"], saved["optimizer"]), list(csv.DictReader(file))


@pytest.mark.parametrize(
    "more",
    [
        "--smoothing 0.1 --log-interval 1",
        "--smoothing 0.1 --bce-loss --grad-accum-steps 2 --model-ema --amp --amp-dtype bfloat16",
        pytest.param("--torchcompile eager --smoothing 0", marks=pytest.mark.full),
    ],
)
def test_train_py_keeps_its_bits_and_writes_the_numbers(more, folder, caplog):
    script = train_py()
    from fastsmooth.adapters.timm import loaded

    module = loaded(Path(script))
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "argv", sys.argv)
        sys.argv = [script, *arguments(folder, "alone", more)]
        module.main()
    with caplog.at_level("INFO"):
        command = ["--track-noise", "every=3", "--", script, *arguments(folder, "watched", more)]
        assert main(command) == 0
    state, rows = last(folder, "watched")
    alone, plain = last(folder, "alone")
    assert_same_bits(state, alone)
    watch = sys.modules["train"].train_one_epoch
    for row, before in zip(rows, plain, strict=True):
        assert {k: v for k, v in row.items() if k not in NUMBERS} == before
        assert float(row["train_noise_c2"]) > 0
    assert float(rows[-1]["train_noise_scale"] or "nan") != 0
    measured = [row["noise/c2_sampled"] for row in watch.rows]
    assert float(rows[-1]["train_noise_c2"]) == pytest.approx(sum(measured) / len(measured))
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Noise: ")]
    assert len(lines) == watch.watch.noise.count >= 2


NUMBERS = ("train_noise_c2", "train_noise_delta", "train_noise_scale")


# train.py gives DistributedDataParallel its device, which may be no CPU
ON_CPUS = """
import runpy, sys
from timm.task import ClassificationTask
plain = ClassificationTask.prepare_distributed
ClassificationTask.prepare_distributed = lambda task, device_ids, **kw: plain(task, **kw)
sys.argv = sys.argv[1:]
if sys.argv[0] == "fastsmooth.adapters.timm":
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def in_two_processes(*command):
    """What they say, started by torchrun, on stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS.parent.parent)}
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    line = [sys.executable, *start, str(free_port()), *map(str, command)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.full
def test_two_processes_measure_the_whole_batch(tmp_path):
    """Each has half of every batch: the row is that of both, and training keeps its bits."""
    in_two_processes(SCRIPTS / "tasks.py", tmp_path / "alone.pt")
    log = in_two_processes(
        "-m",
        "fastsmooth.adapters.timm",
        *("--track-noise", "every=1", "--", SCRIPTS / "tasks.py", tmp_path / "watched.pt"),
    )
    alone, found, other = (
        torch.load(tmp_path / name, weights_only=False)
        for name in ("alone.pt", "watched.pt", "watched.pt.1")
    )
    assert_same_bits(found["state"], alone["state"])
    assert log.count("Noise: 0 [") == 1
    import timm.utils

    sys.path.insert(0, str(SCRIPTS))
    import tasks

    timm.utils.random_seed(0)
    net = tasks.network(Namespace(model="test_vit"))
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
    noise = fs.NoiseTracker(net, optimizer, samples=32, every=1, loss=LOSSES["smoothing"])
    row = noise(*map(list, zip(found["batch"], other["batch"], strict=True)))
    assert found["metrics"][0]["noise_c2"] == pytest.approx(row["c2_sampled"], rel=1e-6)
    assert found["metrics"][0]["noise_delta"] == pytest.approx(row["delta_measured"], rel=1e-6)


@pytest.mark.full
def test_two_processes_of_train_py_keep_their_bits(folder):
    script = train_py()
    shim = folder / "on_cpus.py"
    shim.write_text(ON_CPUS)
    in_two_processes(shim, script, *arguments(folder, "alone"))
    command = ("fastsmooth.adapters.timm", "--track-noise", "every=2", "--", script)
    log = in_two_processes(shim, *command, *arguments(folder, "watched"))
    state, rows = last(folder, "watched")
    alone, _ = last(folder, "alone")
    assert_same_bits(state, alone)
    assert log.count("Noise: 0 [") == 1 and float(rows[0]["train_noise_c2"]) > 0
