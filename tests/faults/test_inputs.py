"""Bad input to every command: one line that names the thing and a remedy, exit code 2, nothing
written, no traceback.

First tables of inputs that people give, then random command lines and damaged files. Everything
runs in this process, but for a few real ones at the end.
"""

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from images import noise, tree
from said import Main, one_line, refused, said

from fastsmooth import sharpness, train
from fastsmooth.cli import config as configs
from fastsmooth.cli import parse as parsing
from fastsmooth.figures import pdf
from fastsmooth.report import __main__ as report
from fastsmooth.smooth import __main__ as smooth
from fastsmooth.smooth import study
from fastsmooth.sweep import __main__ as sweep
from fastsmooth.sweep import grid

COMMANDS: dict[str, Main] = {
    "train": train.main,
    "sweep": sweep.main,
    "sharpness": sharpness.main,
    "report": report.main,
    "smooth": smooth.main,
}


def listing(directory: Path) -> dict[str, bytes | None]:
    """Every file and folder; of links and special files the names alone."""
    return {
        str(p.relative_to(directory)): p.read_bytes()
        if p.is_file() and not p.is_symlink()
        else None
        for p in directory.rglob("*")
    }


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, in which no command is one of several processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))
    monkeypatch.setattr(pdf, "available", lambda: False)  # which would take most of a report's time
    return tmp_path


def assert_refused(command: str, argv: list[str], words: list[str], here: Path) -> None:
    before = listing(here)
    message = refused(COMMANDS[command], argv)
    for word in words:
        assert word in message, message
    assert listing(here) == before


def table(command: str, *rows: str) -> list[tuple[str, list[str], list[str]]]:
    """(command, argv, words of the answer) of lines like "--lr 0 => above 0 | --lr": ~ stands for a
    space, "" for nothing."""
    found = []
    for row in rows:
        line, _, answer = row.partition(" => ")
        argv = ["" if word == '""' else word.replace("~", " ") for word in line.split(" ")]
        found.append((command, argv, answer.split(" | ")))
    return found


# Command lines

FLAGS = [
    *table(
        "train",
        "--epoch 3 => unknown flag --epoch | did you mean --epochs?",
        "-x => unknown flag -x | --help lists the flags",
        "--LR 0.1 => unknown flag --LR | did you mean --lr?",
        "lr=0.1 => unexpected 'lr=0.1' | did you mean --lr?",
        "--lr=-- => --lr=-- | is no value",
        "--lr 0.1 0.2 => unexpected '0.2' | --lr takes one value | python -m fastsmooth.sweep "
        "does a run for each",
        '--lr "" => --lr | not a number',
        "--lr ~ => --lr | not a number",
        "--lr 0,1 => --lr | '0,1' is not a number",
        "--lr 1e-320 => --lr | at least 1e-100",
        "--lr 1e300 => --lr | at most 1e+100",
        "--lr=-inf => --lr | not a finite number",
        "--c2 1e-200 => --c2 | at least 1e-100",
        "--weight-decay -0.1 => --weight-decay | at least 0",
        "--power 0 --method poly => --power | above 0",
        "--power 1e101 --method poly => --power | at most 1e+100",
        "--gamma 1.5 --method exp => --gamma | at most 1",
        "--nu -1 --optimizer qhm => --nu | at least 0",
        "--beta -0.1 --optimizer shb => --beta | at least 0",
        "--beta1 2 --optimizer shb => --beta | below 1",
        "--epochs 1000001 => --epochs | at most 1000000",
        "--epochs ten => --epochs | 'ten' is not a whole number",
        "--epochs 0x10 => --epochs | not a whole number",
        "--epochs=-5 => --epochs | at least 1",
        "-b 0 => --batchsize | at least 1",
        "-b 32.0 => --batchsize | not a whole number",
        "--batch-size 9223372036854775808 => --batchsize | out of range",
        "--seed 1.5 => --seed | not a whole number",
        "--seed 18446744073709551616 => --seed | out of range",
        "--log-every 0 => --log-every | at least 1",
        "--checkpoint-every 0 => --checkpoint-every | at least 1",
        "--micro-batch 0 => --micro-batch | at least 1",
        "--workers 257 --loader threads => --workers | at most 256",
        "--chunk 0 --loader threads => --chunk | at least 1",
        "--chunk 65537 --loader threads => --chunk | at most 65536",
        "--image-size 7 --dataset folder => --image-size | at least 8",
        "--image-size 1025 --dataset folder => --image-size | at most 1024",
        "--hw-decoder-load 1.1 --loader dali => --hw-decoder-load | at most 1",
        "--draws 0 --mode sampling => --draws | at least 2",
        "--full-grad-every 0 => --full-grad-every | at least 1",
        "--min-epochs -1 --mode critical => --min-epochs | at least 0",
        "--track-noise every=1.5 => --track-noise | every=N",
        "--track-noise every=5epochs => --track-noise | every=Nep",
        "--budget updates=1e6 => --budget | updates=N",
        "--budget hours=3 => --budget | samples=N",
        "--eps 0.5 1 5e-1 --mode critical => --eps | 0.5 more than once",
        "--kernels fast => --kernels fast | choose from auto, native, triton, reference",
        "--kernels triton --device cpu => --kernels triton | an NVIDIA GPU | give --kernels",
        "--plan --mode sampling --steps 675 => --steps 675 | 675 updates | lower --steps",
        "--config . --plan => --config . | Is a directory | give a TOML file",
        "--budget updates=1 --epochs 1 => --epochs and --budget | give one of them",
        "--budget epochs=1000001 => --budget | over 1,000,000 epochs | lower it",
        "--plan --budget updates=999999999999999999 => --budget | over 1,000,000 epochs | lower it",
        "--plan --budget samples=1437000001 => --budget | over 1,000,000 epochs | lower it",
        "--max-time 5d => --max-time | write 90, 45s, 30m or 1.5h",
        "--max-time -5 => --max-time | write 90, 45s, 30m or 1.5h",
        "--max-time 1e999 => --max-time | is not a time",
        "--device cuda:x => --device | is not auto, cpu, cuda, cuda:N or mps",
        "--device cuda:99999999999999999999 => --device | is not auto",
        "--device cuda:٣ => --device | is not auto",
        "--device CPU => --device | is not auto, cpu",
        "--device cuda:98 => --device cuda:98 | --device cpu",
        "--device mps => --device mps | --device cpu",
        "--model resnet18.a1 => --model resnet18.a1 | torchvision/NAME",
        "--model torchvision/../x => torchvision/../x | list them with",
        "--model timm/resnet18.nothing => timm/resnet18.nothing | Leave out",
        '--out "" => --out | it is empty',
        "--out a\udcffb => --out | not UTF-8 | give another name",
        "--data-dir a\0b --dataset folder => --data-dir | NUL character",
        "--wandb-project é\vb => --wandb-project | line break",
        "--compile maybe => --compile maybe | choose from auto, on, off",
        "--bn group => --bn group | choose from",
        "--norm layer => --norm layer | choose from batch, group",
        "--loader dataloader => --loader dataloader | fastsmooth calls it torch",
        "--precision float16 => --precision float16 | choose from",
        "--augment it's => --augment | choose from",
        "--sync-bn --micro-batch 4 => --sync-bn | --micro-batch | leave one of them out",
        "--loader resident --augment resized-crop-flip --dataset imagenet => --augment | use "
        "--loader torch",
        "--plan --plan=yes => --plan | ignored explicit argument",
        "--plan --json --check => unknown flag --check | did you mean --checkpoint-every or "
        "--check-data?",
        "--config => --config | expected one argument",
        "--config /dev/zero => --config /dev/zero | a device, not a file | give a TOML file",
        "--config . => --config . | directory | give a TOML file",
    ),
    *table(
        "sweep",
        "--lr 0.1 0.2 => --out DIR is missing",
        "--out s => sweep.json | give the flags of the runs",
        "--out s --lr 0.1 x => --lr | 'x' is not a number",
        "--out s --lr 1..1e308x1e300 => 1..1e308x1e300 is not a range | FIRST..LASTxFACTOR",
        "--out s --batchsize 8..64x1 => 8..64x1 is not a range | as in 8..1024x2",
        "--out s --batchsize 8..64+0 => 8..64+0 is not a range | FIRST..LAST+STEP",
        "--out s --lr 0..9x2 => 0..9x2 is not a range | write",
        "--out s --seeds 0 => --seeds | at least 1",
        "--out s --seeds 10001 => --seeds | at most 10000",
        "--out s --lr 1 --jobs 1025 => --jobs | at most 1024",
        "--out s --lr 1 --run -1 => --run | at least 0",
        "--out s --run 3 => sweep.json | give the flags",
        "--out s --methd lr => --methd | did you mean --method?",
        "--out s --method lr exq => exq | did you mean exp?",
        "--out s --config x.toml => unknown flag --config",
        "--out s --resume => unknown flag --resume",
        "--out s --doctor => unknown flag --doctor",
        "--out s --grid nowhere.toml => --grid nowhere.toml | No such file | give a TOML file",
        "--out s --grid /dev/zero => --grid /dev/zero | a device, not a file | give a TOML file",
        "--out s --gamma 0.5 0.6 => --gamma has no effect | leave it out",
        "--out s --critical --method exp => --mode critical | use --method constant",
        "--out s\udcff --lr 1 => --out | not UTF-8",
        "--out s --batchsize 64 99999 => --batchsize 99999 exceeds | lower --batchsize",
        "--out /dev/null --lr 1 => /dev/null | choose another folder",
        "--out /dev/null/s --lr 1 => /dev/null/s | choose another folder",
    ),
    *table(
        "sharpness",
        "run --rho 1e-200 => --rho | at least 1e-100",
        "run --rho x => --rho | 'x' is not a number",
        "run --algorithm sam => --algorithm sam | choose from",
        "run --batch 0 => --batch | at least 1",
        "run --samples -5 => --samples | at least 1",
        "run --samples 100 --batch 64 => --samples 100 | give --samples 64",
        "run --seed 4294967296 => --seed | at most 4294967295",
        "run --device cuda:97 => --device cuda:97 | --device cpu",
        "run --device cuda:99999999999999999999 => --device | is not auto",
        "run --step-size-mult 0 => --step-size-mult | above 0",
        "run --adaptive=yes => --adaptive | ignored explicit argument",
        "run --restarts 3 => --restarts 3 | add --random-start",
        "run --datadir x => unknown flag --datadir | did you mean --data-dir?",
        '"" => RUN | it is empty',
        "nowhere --json => nowhere/config.json | is this a run folder?",
        "/dev/null --json => /dev/null/config.json | is this a run folder?",
    ),
    *table(
        "report",
        "--out o => RUNS is missing | --help says how",
        "nowhere => nowhere: no such folder | name run folders",
        "/dev/null => /dev/null: no such folder | name run folders",
        "nowhere --oot o => unknown flag --oot | did you mean --out?",
        "nowhere --out => --out | expected one argument",
        "nowhere --out=-- => --out=-- | is no value",
        "nowhere --out a\udcff => --out | not UTF-8",
        "a\0b => no such folder | name run folders",
    ),
    *table(
        "smooth",
        "--out /dev/null => /dev/null | choose another folder",
        "--out /dev/null/x => /dev/null | choose another folder",
        '--out "" => --out | it is empty',
        "--parts all => --parts | choose from smoothing, graduated",
        "--noise cauchi => cauchi | did you mean cauchy?",
        "--noise => --noise | at least one argument",
        "--points 1 => --points | at least 2",
        "--dim 0 => --dim | at least 1",
        "--samples 99999999 --dim 2 => --samples | at most 1000000",
        "--seeds 10001 => --seeds | at most 10000",
        "--delta 101 => --delta | at most 100",
        "--delta-first 0 => --delta-first | above 0",
        "--delta-first 0.001 => --delta-last 0.01 | delta falls",
        "--schedules nice nice => --schedules | give every value once",
        "--seed 2147483649 => --seed | at most 2147483648",
        "figures => unexpected 'figures' | --help",
    ),
]


def name_of(value) -> str:
    """Of a case, in letters that every terminal has."""
    return ascii(" ".join(value) if isinstance(value, list) else value)[1:-1][:60]


@pytest.mark.parametrize(("command", "argv", "words"), FLAGS, ids=name_of)
def test_a_bad_flag_is_one_line(command, argv, words, here, cases):
    cases("bad flags", 1, 1)
    assert_refused(command, argv, words, here)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "word", ["x" * 100_000, "." * 100_000, "--" + "y" * 100_000, "é" * 50_000 + "=", "1" * 10_000]
)
def test_a_very_long_word_is_named_by_its_beginning(command, word, here, cases):
    cases("very long words", 1, 1)
    before = listing(here)
    argv = ["--plan"] * (command in ("train", "sweep")) + ["--out", "o"] * (command == "sweep")
    argv += [word, *["nowhere"] * (command == "report")]
    found = said(COMMANDS[command], argv)
    assert found.code == 2 and word[:5] in one_line(found.err) and listing(here) == before
    if command in ("train", "sweep", "smooth"):
        assert len(found.err) < 500


PLANS = [
    "--method hybrid --decay-epoch 1 --epochs 4000",  # 1.5^3999 is no float
    # 2^3999 is none that a loader takes
    "--method batch --decay-epoch 1 --epochs 4000 --dataset folder",
    # its target falls to 0, which nothing can be divided by
    "--method batch --decay-epoch 1 --epochs 4000",
    "--method beta-batch --optimizer nshb --power 1e6",
    "--method lr-batch --c2 1e-100 --power 5000",
    "--method lr-batch --c2 1e100 --lr 1e-100 --optimizer qhm --nu 1",
    "--method poly --power 1e100 --lr 1e100",
    "--method exp --gamma 1e-100",
    "--method beta --optimizer shb --beta 0.9999999999999999 --c2 1e100 --k2 1e100 --lr 1e100",
    "--budget updates=1000 --method hybrid --compat original",
    # int(1.5) stays 1
    "--method hybrid --decay-epoch 1 --epochs 4000 --compat original --batchsize 1",
    "--method beta-batch --optimizer nshb --power 1e100 --compat original",
    "--method lr-batch --compat original --epochs 1 --decay-epoch 3 --eps 2 --steps 4",
    "--mode sampling --steps 0 674 3",
]


@pytest.mark.parametrize("line", PLANS)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_an_extreme_schedule_is_planned(line, form, cases):
    cases("extreme schedules", 1, 1)
    found = said(train.main, ["--plan", *form, *line.split()])
    assert found.code == 0 and not found.err and ("lr" in found.out)
    assert "-inf" not in found.out


# TOML files

TOML = {
    "no TOML": ("lr 0.1", ["not TOML", "line 1"]),
    "half a line": ("lr = ", ["not TOML"]),
    "twice the same": ("lr = 1\nlr = 2", ["not TOML", "overwrite"]),
    "a NUL in a name": ('out = "a\\u0000b"', ["--out", "NUL character"]),
    "a line break in a name": ('out = "a\\nb"', ["--out", "line break"]),
    "an unknown key": ("learning_rate = 0.1", ["unknown flag --learning-rate"]),
    "a key that is close": ("epoch = 3", ["did you mean --epochs?"]),
    "an empty key": ('"" = true', ["'' is no flag", "--help"]),
    "a key with a value": ('"lr=0.5" = 3', ["'lr=0.5' is no flag", "--help"]),
    "a key with a space": ('"l r" = 3', ["'l r' is no flag", "--help"]),
    "a key of letters of elsewhere": ('"lr٣" = 3', ["is no flag", "--help"]),
    "a table": ("[optimizer]\nlr = 0.1", ["[optimizer] is a table", "plain lines such as"]),
    "a dotted key": ("optimizer.lr = 0.1", ["[optimizer] is a table", "plain lines such as"]),
    "a list of tables": ("[[lr]]\nx = 1", ["--lr", "not a number"]),
    "a list in a list": ("lr = [[0.1]]", ["--lr", "not a number"]),
    "two values": ("lr = [0.1, 0.2]", ["unexpected '0.2'"]),
    "no values": ("lr = []", ["--lr", "expected one argument"]),
    "a date": ("lr = 2026-01-01", ["--lr", "'2026-01-01' is not a number"]),
    "a date that is none": ("lr = 2026-13-01", ["not TOML"]),
    "a word for a number": ('lr = "fast"', ["--lr", "'fast' is not a number"]),
    "a number for a word": ("method = 3", ["--method 3", "choose from"]),
    "a switch with a word": ('drop_last = "yes"', ["--drop-last", "ignored explicit argument"]),
    "true for a value": ("lr = true", ["--lr", "expected one argument"]),
    "false for a value": ("lr = false", ["--lr", "expected one argument"]),
    "not a number": ("lr = nan", ["--lr", "not a finite number"]),
    "infinity": ("lr = -inf", ["--lr", "not a finite number"]),
    "a number of 5,000 digits": ("lr = 1" + "0" * 5000, ["not TOML", "digits"]),
    "a hexadecimal number of 10,000 digits": ("epochs = 0x" + "f" * 10_000, ["not TOML", "digits"]),
    "a float for a whole number": ("epochs = 3.0", ["--epochs", "not a whole number"]),
    "a negative number": ("batch_size = -1", ["--batchsize", "at least 1"]),
    "a contradiction": ('method = "beta"', ["choose --optimizer"]),
    "a flag without effect": ("gamma = 0.5", ["--gamma has no effect"]),
    "a word that is cut": ('model = "resnet', ["not TOML"]),
    "a bad escape": ('model = "\\ud800"', ["not TOML"]),
    "nested 5,000 deep": ("lr = " + "[" * 5000, ["nested too deep", "lr = 0.1"]),
    "over 64 kilobytes": ("#" * (1 << 16) + "\nlr = 1", ["larger than 64 kB", "give a TOML file"]),
    "control characters": ("lr = 1\x00", ["not TOML"]),
}
OF_TRAIN = {
    "a config in a config": ('config = "x.toml"', ["config belongs on the command line"]),
    "a plan": ("plan = true", ["plan belongs on the command line"]),
    "a plan that is none": ("plan = false", ["plan belongs on the command line"]),
    "resume": ("resume = true", ["resume belongs on the command line"]),
}
OF_SWEEP = {
    "no list of tables": ("grid = 3", ["[[grid]]"]),
    "a list of numbers": ("grid = [1]", ["[[grid]]"]),
    "jobs": ("jobs = 3", ["jobs belongs on the command line"]),
    "out": ('out = "x"', ["out belongs on the command line"]),
    "a range that does not grow": ('lr = "9..1x2"', ["9..1x2 is not a range"]),
    "a table in a table": ("[[grid]]\n[grid.lr]\nx = 1", ["[lr] is a table"]),
    "an unknown key in a table": ("[[grid]]\nlr = 1\ncolour = 3", ["unknown flag --colour"]),
}
OF_ALL_FLAGS = {"a contradiction", "a flag without effect"}  # which may come from the command line
# a sweep takes several values
ONLY_TRAIN = {"two values", "a switch with a word", "infinity"}


@pytest.mark.parametrize("name", [*TOML, *OF_TRAIN])
def test_a_bad_config_file_is_one_line(name, here, cases):
    cases("bad TOML files", 1, 1)
    text, words = (TOML | OF_TRAIN)[name]
    Path("run.toml").write_text(text, encoding="utf-8")
    named = [] if name in OF_ALL_FLAGS else ["--config run.toml"]
    assert_refused("train", ["--config", "run.toml"], [*named, *words], here)


@pytest.mark.parametrize("name", [*sorted(set(TOML) - ONLY_TRAIN), *OF_SWEEP])
def test_a_bad_grid_file_is_one_line(name, here, cases):
    cases("bad TOML files", 1, 1)
    text, words = (TOML | OF_SWEEP)[name]
    Path("grid.toml").write_text(text, encoding="utf-8")
    named = [] if name in OF_ALL_FLAGS else ["--grid grid.toml"]
    words = [
        word.replace("expected one argument", "expected at least one argument") for word in words
    ]
    assert_refused("sweep", ["--out", "s", "--grid", "grid.toml"], [*named, *words], here)


# Data


def both(root: Path, files: dict | None = None) -> Path:
    """A tree of images with two good classes a split, and `files` over it."""
    good = {
        f"{split}/{name}/0.png": noise() for split in ("train", "val") for name in ("ant", "bee")
    }
    return tree(root, good | (files or {}))


def without(*gone: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        both(root)
        for name in gone:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


def with_link(name: str, target: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        both(root)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)

    return make


def with_files(files: dict) -> Callable[[Path], None]:
    return lambda root: both(root, files) and None


def with_socket(root: Path) -> None:
    both(root)
    here = os.getcwd()
    os.chdir(root / "train" / "ant")  # the name of a socket is at most 107 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("1.png")
    os.chdir(here)


TREES = {
    "nothing": (lambda root: None, ["no such directory", "it must hold train/"]),
    "a file": (lambda root: root.write_text("x"), ["no such directory", "it must hold train/"]),
    "a link to nothing": (
        lambda root: root.symlink_to("nowhere"),
        ["no such directory", "it must hold train/"],
    ),
    "a link to itself": (
        lambda root: root.symlink_to(root.name),
        ["no such directory", "it must hold train/"],
    ),
    "a pipe": (lambda root: os.mkfifo(root), ["no such directory", "it must hold train/"]),
    "an empty folder": (lambda root: root.mkdir(), ["has no train/", "wants train/CLASS/IMAGE"]),
    "no train": (without("train"), ["has no train/", "wants train/CLASS/IMAGE"]),
    "no val": (without("val"), ["has no val/ or test/", "wants train/CLASS/IMAGE"]),
    "a file train": (
        lambda root: tree(root, {"train": b"x", "val/a/0.png": noise()}),
        ["has no train/", "wants"],
    ),
    "a link train to itself": (with_link("more/x", "y"), []),
    "no classes": (
        without("train/ant", "train/bee"),
        ["train has 0 class folders", "at least two are needed"],
    ),
    "one class": (
        without("train/bee", "val/bee"),
        ["train has 1 class folders", "at least two are needed"],
    ),
    "a class in val alone": (without("train/bee"), ["at least two are needed"]),
    "no images to train on": (
        without("train/ant/0.png", "train/bee/0.png"),
        ["train has no images", "looked for .bmp"],
    ),
    "no images to test on": (
        without("val/ant/0.png", "val/bee/0.png"),
        ["val has no images", "looked for .bmp"],
    ),
    "images in no class": (
        lambda root: tree(
            root, {"train/0.png": noise(), "train/1.png": noise(), "val/0.png": noise()}
        ),
        [
            "train has 0 class folders",
            "at least two are needed",
            "sort them into images/train/CLASS/",
        ],
    ),
    "an extra class in val": (
        with_files({"val/cat/0.png": noise()}),
        ["class folder 'cat'", "remove it or add it"],
    ),
    "a class that is a link to itself": (
        with_link("train/loop", "loop"),
        ["train/loop", "symbolic links", "repair"],
    ),
    "an image that is a link to itself": (
        with_link("train/ant/1.png", "1.png"),
        ["ant/1.png", "remove or replace it"],
    ),
    "an image that is a link to nothing": (
        with_link("val/bee/1.jpg", "gone"),
        ["bee/1.jpg", "No such file", "remove"],
    ),
    "an image that is a link to a folder": (with_link("train/ant/1.png", "../bee"), []),
    "a folder that is a link to what it is in": (
        with_link("train/ant/x", ".."),
        ["train/ant/x", "without end", "remove"],
    ),
    "an empty class": (
        with_files({"train/cow": None}),
        ["train/cow has no images", "put some there or remove"],
    ),
    "a class of hidden files": (
        with_files({"train/cow/._1.png": noise()}),
        ["train/cow has no images"],
    ),
    "a val without class folders": (
        lambda root: tree(
            root, {"train/a/0.png": noise(), "train/b/0.png": noise(), "val/0.png": noise()}
        ),
        ["val has no images", "lie there without them", "sort them into images/val/CLASS/"],
    ),
    "a class that val spells otherwise": (
        with_files({"val/Ant/0.png": noise()}),
        ["'Ant'", "it has 'ant'"],
    ),
    "an image that is a device": (
        with_link("train/ant/1.png", "/dev/zero"),
        ["ant/1.png", "a device", "remove"],
    ),
    "an image that is a socket": (with_socket, ["ant/1.png", "a socket", "remove"]),
    "an image that is empty": (
        with_files({"train/ant/1.png": b""}),
        ["ant/1.png", "not an image", "remove it"],
    ),
    "an image that is a page": (
        with_files({"val/ant/1.jpg": b"<html>404</html>"}),
        ["ant/1.jpg", "remove it"],
    ),
    "an image of one row": (
        with_files({"train/ant/1.png": noise((4001, 1))}),
        ["4001 x 1", "remove or replace it"],
    ),
    "an image of one column": (
        with_files({"train/ant/1.png": noise((1, 4001))}),
        ["1 x 4001", "remove or replace it"],
    ),
}
FINE = {name for name, (_, words) in TREES.items() if not words}


@pytest.mark.parametrize("loader", ["resident", "threads"])
@pytest.mark.parametrize("name", sorted(set(TREES) - FINE))
def test_bad_data_is_one_line(name, loader, here, cases):
    cases("bad trees of images", 1, 1)
    make, words = TREES[name]
    make(Path("images"))
    argv = ["--dataset", "folder", "--data-dir", "images", "--loader", loader, "--batchsize", "2"]
    assert_refused("train", argv, ["images", *words], here)


CIFAR = "cifar-10-batches-py"
CIFARS = {
    "a file for the folder": (
        lambda: Path("data").write_text("x"),
        ["--data-dir data", "File exists", "repair"],
    ),
    "an empty folder": (
        lambda: Path("data", CIFAR).mkdir(parents=True),
        [f"{CIFAR}/data_batch_1", "fetch it again"],
    ),
    "a folder for a batch": (
        lambda: Path("data", CIFAR, "data_batch_1").mkdir(parents=True),
        ["data_batch_1", "Is a directory", "fetch it again"],
    ),
    "an archive of nothing": (
        lambda: tree(Path("data"), {"cifar-10-python.tar.gz": b""}),
        ["cifar-10-python.tar.gz", "MD5", "fetch it again"],
    ),
    "a batch of nothing": (
        lambda: tree(Path("data"), {f"{CIFAR}/data_batch_1": b""}),
        ["MD5", "fetch it again"],
    ),
}


@pytest.mark.parametrize("name", CIFARS)
def test_bad_cifar_files_are_one_line(name, here, cases):
    cases("bad CIFAR files", 1, 1)
    make, words = CIFARS[name]
    make()
    assert_refused("train", ["--dataset", "cifar10"], words, here)


def test_a_download_that_fails_is_one_line_and_keeps_what_it_has(here, monkeypatch, cases):
    from fastsmooth.data import cifar

    cases("bad CIFAR files", 1, 1)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setattr(cifar.OFFICIAL["cifar10"], "url", f"http://127.0.0.1:{port}/x")
    monkeypatch.setattr(cifar.time, "sleep", lambda seconds: None)
    tree(Path("data"), {"cifar-10-python.tar.gz.part": b"the first half"})
    words = ["cannot download cifar-10-python.tar.gz", "refused", "the part is kept"]
    assert_refused("train", ["--dataset", "cifar10"], words, here)


# Run folders


@pytest.fixture(scope="session")
def stopped(tmp_path_factory) -> Path:
    """A run that --max-time stopped in its first updates."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert (
        said(
            train.main,
            ["--out", str(out), "--max-time", "1e-3", "--epochs", "2", "--log-every", "1"],
        ).code
        == 75
    )
    return out


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def edit(name: str, **changes) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | changes))

    return damage


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else where a file was."""

    def damage(run: Path) -> None:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
        make(run / name)

    return damage


DAMAGED, NOT_ONE = "is damaged", "is this a run folder?"
RUNS = {
    "no config": (instead("config.json", lambda path: None), ["config.json", NOT_ONE]),
    "a folder for the config": (
        instead("config.json", Path.mkdir),
        ["config.json", "directory", NOT_ONE],
    ),
    "a pipe for the config": (
        instead("config.json", os.mkfifo),
        ["config.json", "a pipe", NOT_ONE],
    ),
    "a device for the config": (
        instead("config.json", lambda path: path.symlink_to("/dev/zero")),
        ["device", NOT_ONE],
    ),
    "a config that links to itself": (
        instead("config.json", lambda p: p.symlink_to(p.name)),
        ["config.json", NOT_ONE],
    ),
    "an empty config": (put("config.json", ""), ["config.json", DAMAGED]),
    "half a config": (put("config.json", '{"dataset": "digi'), ["config.json", DAMAGED]),
    "a config of bytes": (put("config.json", b"\xff\xfe"), ["config.json", DAMAGED]),
    "a config that is a list": (put("config.json", "[1, 2]"), ["config.json", DAMAGED]),
    "a config that is null": (put("config.json", "null"), ["config.json", DAMAGED]),
    "a config that is empty": (put("config.json", "{}"), ["config.json", DAMAGED, "it lacks"]),
    "a deep config": (put("config.json", "[" * 100_000), ["config.json", DAMAGED]),
    "a config with a deep value": (
        put("config.json", '{"lr": ' + "[" * 900 + "]" * 900 + "}"),
        ["config.json", DAMAGED, "it lacks"],
    ),
    "a config with a huge number": (
        put("config.json", '{"lr": 1' + "0" * 9000 + "}"),
        ["config.json", DAMAGED],
    ),
    "a config with a large number": (
        edit("config.json", epochs=10**400),
        ["config.json", "--epochs", "out of range"],
    ),
    "a config that asks for help": (
        edit("config.json", help=True),
        ["config.json", DAMAGED, "help"],
    ),
    "a config that asks for a plan": (
        edit("config.json", plan=True),
        ["config.json", DAMAGED, "plan"],
    ),
    "a config with a config": (edit("config.json", config="x"), ["config.json", DAMAGED, "config"]),
    "a config with an unknown key": (
        edit("config.json", colour=1),
        ["config.json", "unknown flag --colour"],
    ),
    "a config with an empty key": (edit("config.json", **{"": 1}), ["config.json", "is no flag"]),
    "a word for lr": (edit("config.json", lr="fast"), ["config.json", "--lr", "not a number"]),
    "a list for lr": (edit("config.json", lr=[0.1, 0.2]), ["config.json", "unexpected '0.2'"]),
    "a table for lr": (edit("config.json", lr={"a": 1}), ["config.json", "[lr] is a table"]),
    "a switch for lr": (
        edit("config.json", lr=True),
        ["config.json", "--lr", "expected one argument"],
    ),
    "a number for the method": (
        edit("config.json", method=3),
        ["config.json", "--method 3", "choose from"],
    ),
    "a surrogate for the model": (
        edit("config.json", model="\ud800"),
        ["config.json", "--model", "not UTF-8"],
    ),
    "a line break in the project": (
        edit("config.json", wandb_project="a\nb"),
        ["config.json", "line break"],
    ),
    "another model": (
        edit("config.json", model="resnet20"),
        ["checkpoint is not of this run", "start a new run"],
    ),
    "a model that is none": (
        edit("config.json", model="resnet9"),
        ["--model resnet9", "torchvision/NAME"],
    ),
    "a data set that is not here": (
        edit("config.json", dataset="imagenet"),
        ["--data-dir data", "no such directory: give the folder of ImageNet"],
    ),
    "a folder of metrics": (
        instead("metrics.jsonl", Path.mkdir),
        ["metrics.jsonl", "choose another folder"],
    ),
    "a pipe of metrics": (
        instead("metrics.jsonl", os.mkfifo),
        ["metrics.jsonl", "a pipe", "choose another folder"],
    ),
    "shorter metrics": (put("metrics.jsonl", ""), ["metrics.jsonl", "shorter", "it was changed"]),
    "a folder for the lock": (instead(".lock", Path.mkdir), [".lock", "choose another folder"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_bad_run_folder_is_one_line(name, stopped, here, cases):
    cases("bad run folders", 1, 1)
    damage, words = RUNS[name]
    shutil.copytree(stopped, "run")
    damage(Path("run"))
    assert_refused("train", ["--resume", "--out", "run"], words, here)


OF_CONFIG = [name for name in RUNS if "config" in name and name != "a config that links to itself"]


@pytest.mark.parametrize(
    "name", [*OF_CONFIG, "a word for lr", "a list for lr", "a surrogate for the model"]
)
def test_sharpness_of_a_bad_run_folder_is_one_line(name, stopped, here, cases):
    cases("bad run folders", 1, 1)
    damage, words = RUNS[name]
    shutil.copytree(stopped, "run")
    damage(Path("run"))
    before = listing(here)
    found = said(sharpness.main, ["run", "--samples", "2", "--batch", "2", "--json"])
    assert found.code == 2 and all(word in one_line(found.err) for word in words), found
    assert listing(here) == before


CHANGES = {
    "lr": "0.5", "epochs": "3", "batchsize": "8", "seed": "1", "method": "exp", "optimizer": "shb",
    "model": "resnet20",
    "norm": "group", "weight-decay": "0.1", "log-every": "7", "checkpoint-every": "9",
    "dataset": "cifar10", "augment": "crop-flip",
    "budget": "updates=9", "mode": "critical", "compat": "original",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_flag_is_refused_with_both_values(name, stopped, here, cases):
    cases("changed flags", 1, 1)
    shutil.copytree(stopped, "run")
    saved = json.loads(Path("run", "config.json").read_text())
    before = configs.shown(saved[name.replace("-", "_").replace("batchsize", "batch_size")])
    argv = ["--resume", "--out", "run", f"--{name}", CHANGES[name]]
    words = (
        f"without --{name}: " if before == "None" else f"--{name} {before}, not {CHANGES[name]}: "
    )
    assert_refused("train", argv, ["--resume", words, "leave the flag out"], here)


def test_a_checkpoint_that_cannot_be_read_is_named(stopped, here, cases):
    """Each damaged file is a warning; then one line that refuses."""
    damages = {
        "empty": lambda path: path.write_bytes(b""),
        "a folder": lambda path: path.unlink() or path.mkdir(),
        "a pipe": lambda path: path.unlink() or os.mkfifo(path),
        "deep": lambda path: path.write_text("[" * 100_000),
        "a list": lambda path: path.write_text("[]"),
        "a link to itself": lambda path: path.unlink() or path.symlink_to(path.name),
        "of another step": lambda path: path.write_text(
            path.read_text().replace('"step": ', '"step": 9')
        ),
    }
    for what in damages:
        for end in ("json", "pt"):
            if end == "pt" and what == "of another step":
                continue
            cases("bad checkpoints", 1, 1)
            shutil.rmtree("run", ignore_errors=True)
            shutil.copytree(stopped, "run")
            (file,) = Path("run/checkpoints").glob(f"*.{end}")
            damages[what](file)
            for argv, main in (
                [["--resume", "--out", "run"], train.main],
                [["run", "--json"], sharpness.main],
            ):
                found = said(main, argv)
                *warnings, error = found.err.splitlines()
                assert (
                    found.code == 2
                    and error.startswith("fastsmooth: error: ")
                    and "start a new run" in error
                ), found
                assert warnings and all(
                    w.startswith("fastsmooth: warning: ") and "damaged" in w for w in warnings
                )


# Sweeps and reports

ENTRY = {"name": "lr=0.1", "flags": ["--lr=0.1"], "differs": {"lr": 0.1}}
SWEEPS = {
    "empty": "",
    "half": '{"runs": [',
    "a list": "[]",
    "a number": "3",
    "no runs": "{}",
    "runs that are words": '{"runs": "abc"}',
    "runs that are numbers": '{"runs": [1]}',
    "deep": "[" * 100_000,
    "without a name": json.dumps({"runs": [{"flags": [], "differs": {}}]}),
    "a name that is a list": json.dumps({"runs": [ENTRY | {"name": []}]}),
    "no name": json.dumps({"runs": [ENTRY | {"name": ""}]}),
    "the folder itself": json.dumps({"runs": [ENTRY | {"name": "."}]}),
    "the folder above": json.dumps({"runs": [ENTRY | {"name": ".."}]}),
    "a path": json.dumps({"runs": [ENTRY | {"name": "../mine"}]}),
    "an absolute path": json.dumps({"runs": [ENTRY | {"name": "/mine"}]}),
    "a line break": json.dumps({"runs": [ENTRY | {"name": "a\nb"}]}),
    "a surrogate": json.dumps({"runs": [ENTRY | {"name": "\ud800"}]}),
    "a long name": json.dumps({"runs": [ENTRY | {"name": "x" * 300}]}),
    "flags that are a word": json.dumps({"runs": [ENTRY | {"flags": "--lr=1"}]}),
    "flags that are numbers": json.dumps({"runs": [ENTRY | {"flags": [1]}]}),
    "flags with a NUL": json.dumps({"runs": [ENTRY | {"flags": ["a\0b"]}]}),
    "flags with a surrogate": json.dumps({"runs": [ENTRY | {"flags": ["\ud800"]}]}),
    "differs that is a list": json.dumps({"runs": [ENTRY | {"differs": []}]}),
    "differs in no flag": json.dumps({"runs": [ENTRY | {"differs": {"<b>": 1}}]}),
}


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("argv", [[], ["--plan"], ["--run", "0"], ["--lr", "0.1"]], ids=" ".join)
def test_a_bad_sweep_folder_is_one_line_and_nothing_is_removed(
    name, argv, here, monkeypatch, cases
):
    """--run clears away the folder of a run that never began, wherever the name leads."""
    cases("bad sweep folders", 1, 1)
    for module, function in ((os, "execv"), (shutil, "rmtree")):  # what would follow
        monkeypatch.setattr(module, function, lambda *given: pytest.fail(f"called with {given}"))
    tree(here, {"s/kept.txt": b"kept", "mine/kept.txt": b"kept"})
    Path("s/sweep.json").write_text(SWEEPS[name])
    before = listing(here)
    found = said(sweep.main, ["--out", "s", *argv])
    assert (
        found.code == 2 and "s/sweep.json" in one_line(found.err) and "give the flags" in found.err
    )
    after = listing(here)
    after.pop("s/.lock", None)
    assert after == before


REPORTS = {
    "an empty folder": (
        lambda: Path("r").mkdir(),
        ["r"],
        ["r holds no run folder", "name a folder"],
    ),
    "a file": (lambda: Path("r").write_text("x"), ["r"], ["r: no such folder", "name run folders"]),
    "half a config": (
        lambda: tree(Path("r"), {"config.json": b"{"}),
        ["r"],
        ["its config.json is damaged", "name"],
    ),
    "a list": (
        lambda: tree(Path("r"), {"config.json": b"[]"}),
        ["r"],
        ["its config.json is damaged", "name"],
    ),
    "a deep config": (
        lambda: tree(Path("r"), {"config.json": b"[" * 99_999}),
        ["r"],
        ["config.json is damaged", "name"],
    ),
    "a config with a deep value": (
        lambda: tree(Path("r"), {"config.json": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"}),
        ["r"],
        ["its config.json is damaged", "name a folder"],
    ),
    "a pipe for a config": (
        lambda: Path("r").mkdir() or os.mkfifo("r/config.json"),
        ["r"],
        ["its config.json is damaged", "name a folder"],
    ),
    "a device for a config": (
        lambda: Path("r").mkdir() or Path("r/config.json").symlink_to("/dev/zero"),
        ["r"],
        ["its config.json is damaged", "name a folder"],
    ),
    "a file for the page's folder": (
        lambda: tree(Path("."), {"r/config.json": b"{}", "o": b"x"}),
        ["r", "--out", "o"],
        ["--out o", "choose another folder"],
    ),
    "a folder for the page": (
        lambda: tree(Path("."), {"r/config.json": b"{}", "o/report.html": None}),
        ["r", "--out", "o"],
        ["--out o", "report.html", "choose another folder"],
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_bad_report_is_one_line(name, here, cases):
    cases("bad reports", 1, 1)
    make, argv, words = REPORTS[name]
    make()
    found = said(report.main, argv)
    errors = [line for line in found.err.splitlines() if "without matplotlib" not in line]
    assert found.code == 2 and len(errors) == 1 and errors[0].startswith("fastsmooth: error: "), (
        found
    )
    assert all(word in errors[0] for word in words), errors


# The machine


@pytest.fixture
def as_nobody(monkeypatch) -> Iterator[Path]:
    """A working directory that belongs to a user without rights, who this process is for as
    long."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        monkeypatch.chdir(place)
        if os.geteuid() != 0:
            yield place
            return
        os.chown(place, 65534, 65534)
        os.seteuid(65534)
        try:
            yield place
        finally:
            os.seteuid(0)


def closed(path: str) -> None:
    Path(path).chmod(0)


FORBIDDEN = {
    "an out in a closed folder": (
        ["--out", "shut/run"],
        ["--out shut/run", "Permission denied", "choose another"],
    ),
    "an out that is closed": (
        ["--out", "shut"],
        ["--out shut", "Permission denied", "choose another folder"],
    ),
    "a config": (
        ["--config", "shut.toml"],
        ["--config shut.toml", "Permission denied", "give a TOML file"],
    ),
    "a data folder": (
        ["--dataset", "folder", "--data-dir", "shut"],
        ["--data-dir shut", "Permission denied"],
    ),
    "a class folder": (
        ["--dataset", "folder", "--data-dir", "images"],
        ["--data-dir images", "Permission denied", "images/train/ant", "repair that"],
    ),
    "an image": (
        ["--dataset", "folder", "--data-dir", "pictures", "--batchsize", "2"],
        ["pictures/train/ant/0.png", "Permission denied", "remove or replace it"],
    ),
    "a run": (["--resume", "--out", "shut"], ["shut/config.json", "Permission denied", NOT_ONE]),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_may_not_be_read_or_written_is_one_line(name, as_nobody, cases):
    cases("missing permissions", 1, 1)
    argv, words = FORBIDDEN[name]
    Path("shut").mkdir()
    Path("shut.toml").write_text("lr = 1")
    both(Path("images"))
    both(Path("pictures"))
    for path in ("shut", "shut.toml", "images/train/ant", "pictures/train/ant/0.png"):
        closed(path)
    before = sorted(os.listdir("."))
    try:
        message = refused(train.main, argv)
    finally:
        Path("shut").chmod(0o755)
        Path("images/train/ant").chmod(0o755)
    assert all(word in message for word in words), message
    assert sorted(os.listdir(".")) == before and not list(Path("shut").iterdir())


@pytest.mark.parametrize("command", ["sweep", "report", "smooth"])
def test_an_out_that_may_not_be_written_is_one_line(command, as_nobody, cases):
    cases("missing permissions", 1, 1)
    tree(Path("r"), {"config.json": b"{}"})
    Path("shut").mkdir()
    closed("shut")
    argv = {"sweep": ["--lr", "1"], "report": ["r"], "smooth": []}[command]
    message = refused(COMMANDS[command], [*argv, "--out", "shut/o"])
    assert (
        "shut/o" in message
        and "Permission denied" in message
        and "choose another folder" in message
    )


@pytest.mark.parametrize(
    "out", ["file", "file/run", "link", "/proc/run", "/dev/null", "x" * 300, "pipe"]
)
@pytest.mark.parametrize("command", ["train", "sweep", "smooth"])
def test_an_out_that_cannot_be_a_folder_is_one_line(command, out, here, cases):
    cases("places that are no folders", 1, 1)
    Path("file").write_text("kept")
    Path("link").symlink_to("link")
    os.mkfifo("pipe")
    argv = ["--lr", "0.1"] if command == "sweep" else []
    assert_refused(command, [*argv, "--out", out], [out[:100], "choose another folder"], here)


# Random command lines

JUNK = [
    "", " ", "-", "--", "---", "-1", "-0", "0", "-0.5", "nan", "inf", "-inf", "1e999", "1e-999",
    "9" * 5000, "x" * 20_000,
    "é素😀", "\udcff", "\u202eabc", "\u200b", "\x1b[31m", "a\nb", "\r", "\u2028", "\0", "\\0",
    "\\x00", "%00", "%s%n%(x)s", "{}", "{0}", "'",
    '"', "it's", "[1]", "true", "None", "=", "--lr", "-0x1", "1_000", "٣", "1e-320", "1e308",
    "5e-324", "1" * 19, "--=5", "-b", "-b=",
    "-b--", "1..5x1", "1..1e308x1e300", "1..9x2", "0..1+0.5", "." * 2000, "@file", "--no-such",
    "-lr", "--lr=", "--LR", "--method=",
    "--plan=1", "9223372036854775807", "1e5", "--out", "*", "~", "$HOME", "`id`", "; ls", "| cat",
    "<(ls)", "nowhere", "(1", "\\", "\t",
]  # fmt: skip
VALUES = [
    "1",
    "2",
    "3",
    "0.5",
    "32",
    "0.9",
    "100",
    "epochs=3",
    "updates=50",
    "samples=99",
    "every=5",
    "cpu",
    "5s",
    "o",
    "resnet8",
]


def fits(action, value: str) -> bool:
    """Whether a flag takes the value, as far as it tells by itself."""
    try:
        return (action.type or str)(value) is not None and value in (action.choices or [value])
    except (argparse.ArgumentTypeError, ValueError):
        return False


def random_line(rng: random.Random, parser, good: dict) -> list[str]:
    """Flags of the parser with values that fit, of which some are exchanged for junk; most lines
    have one mistake or none."""
    words, mistakes = [], rng.choice([0, 1, 1, 1, 2, 5])
    for _ in range(rng.randint(1, 5)):
        action = rng.choice(list(good))
        name, value = rng.choice(action.option_strings), rng.choice(good[action] or ["1"])
        if mistakes and rng.random() < 0.7:
            mistakes -= 1
            kind = rng.randrange(6)
            if kind == 0:
                words.append(rng.choice(JUNK))
            elif kind == 1:
                name = rng.choice(
                    [name.replace("-", "_"), name[: rng.randint(1, len(name))], name.upper()]
                )
            else:
                value = rng.choice(JUNK)
        if action.nargs == 0:
            words += [name] if rng.random() < 0.9 else [f"{name}={value}"]
        elif rng.random() < 0.6:
            words.append(f"{name}={value}")
        else:
            words += [name, *([value] * rng.choice([0, 1, 1, 1, 1, 1, 2]))]
    return words


RANDOM = {  # the first words, with which nothing is trained or computed, and how many of all lines
    "train": (["--plan"], parsing.parser, 0.35),
    "sweep": (["--plan", "--out", "o"], grid.parser, 0.35),
    "sharpness": ([], sharpness.parser, 0.1),
    "report": ([], report.parser, 0.1),
    "smooth": ([], smooth.parser, 0.1),
}


@pytest.mark.parametrize("command", RANDOM)
def test_random_command_lines_end_with_0_or_one_line(command, here, monkeypatch, cases):
    first, parser, share = RANDOM[command]
    monkeypatch.setattr(study, "run", lambda *_: None)
    rng, parser, ended = random.Random(command), parser(), Counter()
    values = [
        *VALUES,
        *(value for f in configs.FIELDS.values() for value in f.metadata["choices"] or ()),
    ]
    actions = [a for a in parser._actions if a.option_strings]
    good = {a: [v for v in [*(a.choices or ()), *values] if fits(a, v)][:20] for a in actions}
    count = cases("random command lines", round(5000 * share), round(600 * share))
    for number in range(count):
        argv = [*first, *random_line(rng, parser, good)]
        found = said(COMMANDS[command], argv)
        ended[found.code] += 1
        lines = found.err.splitlines()
        where = (number, [word[:80] for word in argv], found.code, found.err[:500])
        assert found.code in (0, 2), where
        # sharpness has a line for each of its runs
        assert (len(lines) == 1 or command == "sharpness") if found.code else not lines, where
        assert all(line.startswith("fastsmooth: error: ") and len(line) > 25 for line in lines), (
            where
        )
    # lines that are right are among them, and lines that are wrong
    assert command not in ("train", "sweep") or min(ended[0], ended[2]) > count / 20, ended
    # smooth makes its folder before it computes
    assert command == "smooth" or not list(here.iterdir())


# Damaged files

SCALARS = [
    None,
    True,
    -1,
    0,
    1,
    1e308,
    -1e308,
    5e-324,
    10**400,
    "x",
    "",
    "\ud800",
    "a\nb",
    [],
    {},
    [1],
    {"a": 1},
    "<b>",
]
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\",
    b"\0",
    b"\xff",
    b"\n",
    b"1e999",
    b"NaN",
    b"-",
    b"null",
    b"[" * 2000,
    b"9" * 5000,
]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """With bits flipped, cut off, something put in, or a value of another kind."""
    way = rng.randrange(5)
    if way == 0:
        data = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if way == 1:
        return content[: rng.randrange(len(content))]
    if way == 2:
        at = rng.randrange(len(content))
        return content[:at] + rng.choice(PIECES) + content[at:]
    rows = content.splitlines() if b"\n{" in content else [content]
    at = rng.randrange(len(rows))
    try:
        value = json.loads(rows[at])
        for _ in range(rng.randint(1, 3)):
            change(value, rng)
        rows[at] = json.dumps(value).encode()
    except ValueError:  # TOML
        rows[at] = rows[at].replace(b"= ", b"= " + rng.choice(PIECES), 1)
    return b"\n".join(rows)


def change(value, rng: random.Random) -> None:
    """Put a scalar somewhere into a JSON object, in place."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        if not keys:
            return
        key = rng.choice(list(keys))
        if not isinstance(value[key], dict | list) or not value[key] or rng.random() < 0.15:
            value[key] = rng.choice(SCALARS)
            return
        value = value[key]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A small sweep of each mode, as trained, with a measured sharpness."""
    root = tmp_path_factory.mktemp("runs")
    common = ["--epochs", "1", "--batchsize", "256", "--log-every", "2"]
    modes = {
        "normal": [],
        "critical": ["--mode", "critical", "--eps", "5", "4", "--min-epochs", "0"],
        "sampling": ["--mode", "sampling", "--steps", "1", "2", "--draws", "2"],
    }
    entries = []
    for name, flags in modes.items():
        assert said(train.main, [*common, *flags, "--out", str(root / name)]).code == 0
        entries.append({"name": name, "flags": [*common, *flags], "differs": {"mode": name}})
    argv = [str(root / "normal"), "--samples", "4", "--batch", "2", "--n-iters", "2"]
    assert said(sharpness.main, argv).code == 0
    (root / "sweep.json").write_text(json.dumps({"runs": entries}))
    return root


def reported(name: str) -> tuple[Main, list[str]]:
    return report.main, [f"runs/{name}", "--out", "page"]


def swept(name: str) -> tuple[Main, list[str]]:
    return sweep.main, ["--out", "runs"]


def resumed(name: str) -> tuple[Main, list[str]]:
    return train.main, ["--resume", "--out", f"runs/{name}", "--max-time", "1e-3"]


def measured(name: str) -> tuple[Main, list[str]]:
    return sharpness.main, [f"runs/{name}", "--samples", "2", "--batch", "2", "--n-iters", "1"]


def repeated(name: str) -> tuple[Main, list[str]]:
    return train.main, ["--plan", "--config", f"runs/{name}/config.json"]


READ = [  # file, and the commands that read it
    ("normal/config.json", [reported, swept, resumed, measured, repeated]),
    ("normal/status.json", [reported, swept, resumed]),
    ("normal/summary.json", [reported, swept]),
    ("normal/metrics.jsonl", [reported, swept, measured]),
    ("normal/sharpness.json", [reported, measured]),
    ("normal/checkpoints/*.json", [resumed, measured]),
    ("critical/critical.json", [reported, swept]),
    ("critical/config.json", [reported, swept, repeated]),
    ("normal/env.json", [resumed, measured, repeated]),
    ("sampling/noise.json", [reported, swept]),
    ("sampling/config.json", [reported, resumed]),
    ("sweep.json", [swept]),
]


@pytest.mark.parametrize(("pattern", "readers"), READ, ids=[pattern for pattern, _ in READ])
def test_damaged_files_are_no_traceback(pattern, readers, runs, here, monkeypatch, cases):
    monkeypatch.setattr(sweep, "on_this_machine", lambda *_: None)  # what is not done stays so
    shutil.copytree(runs, "runs")
    rng, name = random.Random(pattern), pattern.split("/")[0]
    if resumed in readers:  # as a run that is to go on
        put("status.json", '{"state": "preempted"}')(Path("runs", name))
    originals = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    targets = sorted(path for path in originals if path.match(f"runs/{pattern}"))
    for number in range(cases("damaged files", 42, 2)):
        target = rng.choice(targets)
        target.write_bytes(damaged(originals[target], rng))
        content = target.read_bytes()
        main, argv = rng.choice(readers)(name)
        found = said(main, argv)
        where = (number, argv, content[:2000], found)
        assert found.code in (0, 1, 2, 3, 75), where
        assert "Traceback" not in found.err and all(
            line.strip() for line in found.err.splitlines()
        ), where
        if found.code == 2:
            assert found.err.splitlines()[-1].startswith("fastsmooth: error: "), where
        for path in Path("runs").rglob("*"):  # as before, for the next
            if path.is_file() and path not in originals:
                path.unlink()
        for path, data in originals.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_damaged_toml_files_are_no_traceback(command, here, cases):
    rng = random.Random(command)
    text = (
        b'lr = 0.1\nmethod = "hybrid"\nepochs = 20\neps = [0.5, 0.7]\n'
        b'mode = "critical"\ndrop_last = true\nseed = 3\n'
    )
    argv = {
        "train": ["--plan", "--config", "f.toml"],
        "sweep": ["--plan", "--out", "s", "--grid", "f.toml"],
    }[command]
    for number in range(cases("damaged files", 40, 20)):
        content = damaged(text, rng)
        Path("f.toml").write_bytes(content)
        found = said(COMMANDS[command], argv)
        assert found.code in (0, 2), (number, content, found)
        assert found.code == 0 or one_line(found.err), (number, content, found)


# Real processes

REAL = [
    ["fastsmooth.train", "--lr", "0"],
    ["fastsmooth.sweep", "--out", "s", "--lr", "1..1e308x1e300"],
    ["fastsmooth.report", "nowhere"],
    ["fastsmooth.train", "--plan", "--out", b"\xff"],
]


@pytest.mark.parametrize("line", REAL, ids=str)
def test_a_real_process_says_one_line_and_exits_with_2(line, here, cases):
    cases("real processes", 1, 1)
    root = Path(configs.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}"}
    done = subprocess.run(
        [sys.executable, "-m", *line],
        capture_output=True,
        env=environment,
        timeout=60,
        check=False,
        cwd=here,
    )
    assert done.returncode == 2 and not done.stdout and one_line(done.stderr.decode())
    assert listing(here) == {}


def test_there_are_at_least_150_bad_inputs():
    tables = (
        FLAGS,
        TOML,
        OF_TRAIN,
        OF_SWEEP,
        set(TREES) - FINE,
        CIFARS,
        RUNS,
        CHANGES,
        SWEEPS,
        REPORTS,
        FORBIDDEN,
    )
    assert sum(map(len, tables)) >= 150
