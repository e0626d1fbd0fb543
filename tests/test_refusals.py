"""Bad input of every kind: one line on stderr that says what was wrong, exit code 2, and nothing
left behind.

Each case prepares an empty working directory, which is then compared before and after.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from images import encoded, noise, tree
from PIL import Image

from fastsmooth.train import main

CIFAR100 = "cifar-100-python"


def refused(capsys, argv: list[str]) -> str:
    """The message of a refusal, without its prefix."""
    code = main(argv)
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.err.startswith("fastsmooth: error: ")
    assert printed.err.endswith("\n") and len(printed.err.splitlines()) == 1
    return printed.err.removeprefix("fastsmooth: error: ")


def listing(directory: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None
        for p in directory.rglob("*")
    }


def both(root: Path, files: dict) -> Path:
    """A tree of images with two good classes a split, and `files` over it."""
    good = {
        f"{split}/{name}/0.png": noise() for split in ("train", "val") for name in ("ant", "bee")
    }
    return tree(root, good | files)


# Command lines

FLAGS = [
    ("--methd lr", "did you mean --method?"),
    ("--method hybird", "did you mean hybrid?"),
    ("--dataset mnist", "fastsmooth calls it torchvision/MNIST"),
    ("--dataset cifar", "did you mean cifar10 or cifar100?"),
    ("--optimizer adam", "fastsmooth calls it --optimizer torch/Adam"),
    ("--track-noise 50", "not every=N (updates) or every=Nep (epochs)"),
    ("--track-noise every=0", "not every=N (updates) or every=Nep (epochs)"),
    ("--track-noise every=50 --batchsize 7", "batches of 8 or more, not --batchsize 7"),
    (
        "--track-noise every=50 --norm group --batchsize 1",
        "batches of 2 or more, not --batchsize 1",
    ),
    (
        "--track-noise every=50 --estimator per-sample",
        "norm.weight: BatchNorm with batch statistics",
    ),
    ("--track-noise every=50 --bn frozen --model mobilenetv3", "mobilenetv3"),
    (
        "--track-noise every=50 --bn frozen --estimator micro-batch",
        "--bn frozen is a choice of per-sample gradients",
    ),
    (
        "--track-noise every=50 --bn batch --mode sampling --steps 3",
        "--bn batch has no meaning for a full gradient",
    ),
    ("--bn frozen", "needs --track-noise"),
    ("--estimator per-sample", "--estimator has no effect without --track-noise"),
    ("--quantities snr", "they need --track-noise every=N"),
    (
        "--track-noise every=50 --quantities snr --estimator micro-batch",
        "--quantities are of per-sample gradients",
    ),
    ("--track-noise every=50 --quantities snr cbas", "did you mean cabs?"),
    ("--track-noise every=50 --quantities snr snr", "--quantities names snr more than once"),
    (
        "--track-noise every=50 --quantities cabs --optimizer shb",
        "--quantities cabs is a rule of SGD without momentum",
    ),
    (
        "--track-noise every=50 --quantities snr",
        "--estimator micro-batch measures any model, without --quantities",
    ),
    ("--mode train", "fastsmooth calls it normal"),
    ("train", "unexpected 'train'"),
    ("--lr", "expected one argument"),
    ("--lr fast", "'fast' is not a number"),
    ("--lr 0", "above 0"),
    ("--lr -0.1", "above 0"),
    ("--lr nan", "not a finite number"),
    ("--lr inf", "not a finite number"),
    ("--lr 1e999", "not a finite number"),
    ("--epochs 0", "at least 1"),
    ("--epochs 1.5", "not a whole number"),
    ("--epochs 1e30", "not a whole number"),
    ("--batchsize 0", "at least 1"),
    ("--batchsize -32", "at least 1"),
    ("--batchsize 1438", "exceeds the 1437 training images"),
    ("--batchsize 99999999999999999999", "out of range"),
    ("--beta 1 --optimizer shb", "below 1"),
    ("--beta 0.5", "--optimizer"),
    ("--nu 0.5 --optimizer shb", "--optimizer qhm"),
    ("--nu 1.01 --optimizer qhm", "at most 1"),
    ("--gamma 0.5 --method poly", "--power"),
    ("--power 2 --method exp", "--gamma"),
    ("--decay-epoch 3 --method cosine", "has no effect"),
    ("--gamma 0 --method exp", "above 0"),
    ("--c2 0", "above 0"),
    ("--method beta", "choose --optimizer shb, nshb or qhm"),
    ("--method beta --optimizer nshb --beta 0", "raise --beta"),
    ("--method beta --optimizer shb", "--c2 and --k2"),
    ("--mode critical --method exp", "use --method constant"),
    ("--mode critical --eps 0", "above 0"),
    ("--mode critical --eps", "at least one argument"),
    ("--eps 0.5", "--mode critical"),
    ("--mode sampling --draws 1", "at least 2"),
    ("--mode sampling --steps 100000", "lies past the run's 675 updates"),
    ("--mode sampling --steps 5 100000 7", "--steps 100000 lies past the run's 675 updates"),
    ("--mode sampling --steps 5 7 5", "--steps names 5 more than once"),
    ("--mode sampling --steps 5 seven", "'seven' is not a whole number"),
    ("--mode sampling --steps", "at least one argument"),
    ("--steps 5 7", "--mode sampling"),
    ("--mode sampling --batchsize 1437 --epochs 999", "has no noise"),
    ("--method sampling --mode critical", "--method sampling means"),
    ("--save-omega", "--mode sampling"),
    ("--image-size 32", "has no effect"),
    ("--augment resized-crop-flip", "digits has none"),
    ("--dataset cifar10 --augment resized-crop-flip", "cifar10 has none"),
    ("--loader resident --chunk 64", "no effect"),
    ("--model resnet9", "resnet9"),
    ("--model torchvision/nothing", "nothing"),
    ("--model timm/nothing", "nothing"),
    ("--model torchvision/inception_v3", "8x8 images"),
    ("--model ../secret", "secret"),
    ("--device gpu", "is not auto, cpu, cuda"),
    ("--device cuda:99", "CUDA devices"),
    ("--precision tf32 --device cpu", "NVIDIA GPUs"),
    ("--graphs on --device cpu", "--graphs on needs an NVIDIA GPU, not --device cpu"),
    ("--precision fp16", "bf16 is its half precision: choose from auto, fp32, tf32, bf16"),
    ("--seed -1", "at least 0"),
    ("--max-time soon", "is not a time"),
    ("--max-time 0s", "is not a time"),
    ("--workers -1", "at least 0"),
    ("--json", "--plan"),
    ("--plan --dataset cifar100 --batchsize 50001", "50000"),
    ("--resume", "--resume needs --out"),
    ("--resume --out nowhere", "is this a run folder?"),
    ("--config nowhere.toml", "No such file"),
    ("--dataset imagenet", "--data-dir data: no such directory"),
    ("--dataset folder --data-dir nowhere", "no such directory"),
]


@pytest.mark.parametrize(("line", "part"), FLAGS, ids=[line for line, _ in FLAGS])
def test_a_command_line_is_refused(line, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, line.split())
    assert listing(tmp_path) == {}


def test_several_processes_that_cannot_meet_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for size in ("2", "many"):
        monkeypatch.setenv("WORLD_SIZE", size)
        error = refused(capsys, [])
        assert "torchrun" in error and "MASTER_ADDR" in error
    assert listing(tmp_path) == {}


def test_a_missing_torch_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in refused(capsys, [])
    assert listing(tmp_path) == {}


# Files and directories


def with_config(content: bytes) -> Callable[[Path], list[str]]:
    def prepare(here: Path) -> list[str]:
        (here / "run.toml").write_bytes(content)
        return ["--config", "run.toml"]

    return prepare


def with_out(make: Callable[[Path], object], out: str = "out") -> Callable[[Path], list[str]]:
    def prepare(here: Path) -> list[str]:
        make(here / "out")
        return ["--out", out]

    return prepare


def with_folder(make: Callable[[Path], object], *flags: str) -> Callable[[Path], list[str]]:
    def prepare(here: Path) -> list[str]:
        make(here / "images")
        return ["--dataset", "folder", "--data-dir", "images", *flags]

    return prepare


def with_cifar(make: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    def prepare(here: Path) -> list[str]:
        make(here)
        return ["--dataset", "cifar100", "--data-dir", "."]

    return prepare


def full(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("the only copy")


def bomb(path: Path) -> None:
    both(path, {"train/ant/bomb.png": encoded(Image.new("1", (20_000, 20_000)), "png")})


def looping(path: Path) -> None:
    both(path, {})
    (path / "train/ant/loop.png").symlink_to("loop.png")


def empty_cifar_files(here: Path) -> None:
    (here / CIFAR100).mkdir()
    for name in ("train", "test", "meta"):
        (here / CIFAR100 / name).write_bytes(b"")


FILES = {
    "config: not TOML": (with_config(b"lr: 0.1\n"), "not TOML"),
    "config: a table": (with_config(b"[lr]\nx = 1\n"), "is a table"),
    "config: an unknown key": (with_config(b"learning_rate = 1\n"), "unknown flag --learning-rate"),
    "config: nan": (with_config(b"lr = nan\n"), "not a finite number"),
    "config: not text": (with_config(b"\xff\xfe\x00lr"), "not a text file"),
    "config: a wrong kind": (with_config(b'epochs = "ten"\n'), "not a whole number"),
    "config: a contradiction": (with_config(b'method = "beta"\n'), "choose --optimizer"),
    "config: a directory": (lambda here: ["--config", str(here)], "directory"),
    "out: not empty": (with_out(full), "choose another folder"),
    "out: a file": (with_out(lambda path: path.write_text("a letter")), "choose another folder"),
    "out: below a file": (
        with_out(lambda path: path.write_text("a letter"), "out/run"),
        "Not a directory",
    ),
    "out: too long a name": (with_out(lambda path: None, "x" * 300), "File name too long"),
    "out: where nobody can write": (with_out(lambda path: None, "/proc/run"), "/proc/run"),
    "folder: empty": (with_folder(Path.mkdir), "has no train/"),
    "folder: a file": (with_folder(lambda path: path.write_text("x")), "no such directory"),
    "folder: no test split": (
        with_folder(
            lambda path: tree(path, {"train/ant/0.png": noise(), "train/bee/0.png": noise()})
        ),
        "has no val/ or test/",
    ),
    "folder: one class": (
        with_folder(
            lambda path: tree(path, {"train/ant/0.png": noise(), "val/ant/0.png": noise()})
        ),
        "at least two are needed",
    ),
    "folder: no images": (
        with_folder(
            lambda path: both(path, {"test": None}) and [p.unlink() for p in path.glob("train/*/*")]
        ),
        "has no images",
    ),
    "folder: a class only in val": (
        with_folder(lambda path: both(path, {"val/cat/0.png": noise()})),
        "a class folder 'cat' that train/ has not",
    ),
    "folder: a text as image": (
        with_folder(lambda path: both(path, {"train/ant/1.jpg": b"hello"})),
        "1.jpg",
    ),
    "folder: an empty image": (
        with_folder(lambda path: both(path, {"val/bee/1.png": b""})),
        "bee/1.png",
    ),
    "folder: half an image": (
        with_folder(
            lambda path: both(path, {"train/ant/1.png": encoded(noise((64, 64)), "png")[:500]})
        ),
        "ant/1.png",
    ),
    "folder: a decompression bomb": (with_folder(bomb), "too large to decode safely"),
    "folder: a link to itself": (with_folder(looping), "loop.png"),
    "folder: a batch that exceeds it": (
        with_folder(lambda path: both(path, {}), "--batchsize", "3"),
        "exceeds the 2 training images",
    ),
    "cifar: the data directory is a file": (
        lambda here: (here / "data").write_text("x") and ["--dataset", "cifar100"],
        "--data-dir",
    ),
    "cifar: empty folder": (with_cifar(lambda here: (here / CIFAR100).mkdir()), "No such file"),
    "cifar: empty files": (with_cifar(empty_cifar_files), "MD5 sum"),
    "cifar: a damaged archive": (
        with_cifar(lambda here: (here / "cifar-100-python.tar.gz").write_bytes(b"\x1f\x8b half")),
        "MD5 sum is not the official",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_or_directory_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare, part = FILES[name]
    argv = prepare(tmp_path)
    before = listing(tmp_path)
    assert part in refused(capsys, argv)
    assert listing(tmp_path) == before


# Run folders


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that --max-time stopped in its first updates."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert (
        main(["--out", str(out), "--max-time", "1e-3", "--epochs", "2", "--log-every", "1"]) == 75
    )
    return out


def edit_json(name: str, **changes) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        path = run / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def overwrite(pattern: str, content: bytes) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        found = list(run.glob(pattern))
        assert found
        for path in found:
            path.write_bytes(content)

    return edit


def other_state(run: Path) -> None:
    """A checkpoint whose sum is right and whose content is of another program."""
    import hashlib
    import io

    import torch

    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(2)}}, buffer)
    (path,) = run.glob("checkpoints/*.pt")
    path.write_bytes(buffer.getvalue())
    edit_json(
        f"checkpoints/{path.stem}.json", sha256=hashlib.sha256(buffer.getvalue()).hexdigest()
    )(run)


def no_edit(run: Path) -> None:
    pass


RUNS = {
    "another lr": (no_edit, ["--lr", "0.2"], "--lr 0.1, not 0.2"),
    "another seed": (no_edit, ["--seed", "1"], "--seed 0, not 1"),
    "another data set": (no_edit, ["--dataset", "cifar10"], "--dataset digits, not cifar10"),
    "no config": (lambda run: (run / "config.json").unlink(), [], "is this a run folder?"),
    "half a config": (overwrite("config.json", b'{"dataset": "dig'), [], "is damaged"),
    "a config that is a list": (overwrite("config.json", b"[]"), [], "is damaged"),
    "a config of another program": (edit_json("config.json", learning_rate=1), [], "unknown flag"),
    "a config with a wrong value": (edit_json("config.json", lr=-1), [], "out of range"),
    "a config without its values": (overwrite("config.json", b"{}"), [], "config.json"),
    "empty checkpoints": (overwrite("checkpoints/*.pt", b""), [], "is valid: start a new run"),
    "damaged manifests": (
        overwrite("checkpoints/*.json", b"\xff{"),
        [],
        "is valid: start a new run",
    ),
    "a checkpoint of another program": (other_state, [], "checkpoint"),
    "a shorter metrics file": (overwrite("metrics.jsonl", b""), [], "it was changed"),
    "another network": (edit_json("config.json", model="resnet20"), [], "checkpoint"),
    "a folder of metrics": (
        lambda run: (run / "metrics.jsonl").unlink() or (run / "metrics.jsonl").mkdir(),
        [],
        "metrics.jsonl",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_folder_is_refused_and_not_changed(name, stopped, tmp_path, monkeypatch, capsys):
    """A warning about each damaged file may come first; config, rows and checkpoints stay as they
    were."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stopped, tmp_path / "run")
    edit, flags, part = RUNS[name]
    edit(tmp_path / "run")
    before = listing(tmp_path)
    assert main(["--resume", "--out", "run", *flags]) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert all(line.startswith("fastsmooth: warning: ") and "damaged" in line for line in warnings)
    assert error.startswith("fastsmooth: error: ") and part in error
    assert listing(tmp_path) == before


def test_a_run_is_not_gone_on_with_on_other_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    both(tmp_path / "images", {})
    flags = ["--dataset", "folder", "--data-dir", "images", "--out", "run"]
    assert main([*flags, "--epochs", "1", "--batchsize", "2", "--max-time", "1e-3"]) == 75
    capsys.readouterr()
    both(tmp_path / "others", {"train/ant/1.png": noise()})
    before = listing(tmp_path)
    message = refused(capsys, ["--resume", "--out", "run", "--data-dir", "others"])
    assert "are not those the run was started with" in message
    assert listing(tmp_path) == before


def test_there_are_at_least_sixty_bad_inputs():
    assert len(FLAGS) + len(FILES) + len(RUNS) >= 60


def test_a_good_run_is_not_refused(tmp_path, monkeypatch):
    """The trees above are refused for what each case adds, not for what they share."""
    monkeypatch.chdir(tmp_path)
    both(tmp_path / "images", {})
    assert np.asarray(noise()).shape == (32, 32, 3)
    assert (
        main(["--dataset", "folder", "--data-dir", "images", "--epochs", "1", "--batchsize", "2"])
        == 0
    )
