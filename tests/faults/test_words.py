"""Flags that people bring along from other trainers, and terminals of every width."""

import random
from pathlib import Path

import pytest
from said import refused, said, seen

from fastsmooth import __main__ as every
from fastsmooth import train
from fastsmooth.names import FLAGS
from fastsmooth.report import __main__ as report
from fastsmooth.schedule import METHODS
from fastsmooth.sweep import __main__ as sweep
from fastsmooth.terminal import cells


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_flags(name: str, value: str) -> list[str]:
    return [name, value]


def joined(name: str, value: str) -> list[str]:
    return [f"{name}={value}"] if name.startswith("--") else [name]


def with_underscores(name: str, value: str) -> list[str]:
    return (
        ["--" + name.removeprefix("--").replace("-", "_"), value]
        if name.startswith("--")
        else [name]
    )


def in_a_file(name: str, value: str) -> list[str]:
    Path("f.toml").write_text(f'{name.strip("-")} = "{value}"\n')
    return ["--config", "f.toml"] if name.startswith("--") else [name]


FORMS = [as_flags, joined, with_underscores, in_a_file]
OF_REPORT = ("--watch", "--every")  # of whose flags are answers with these


def test_flags_of_other_trainers_are_answered_without_a_guess(here, cases):
    rng = random.Random(0)
    lines = []
    for name, answer in FLAGS.items():
        of_report = any(flag in answer for flag in OF_REPORT)
        lines += [
            (report.main if of_report else train.main, ["."] * of_report, name, form)
            for form in (FORMS[:2] if of_report else FORMS)  # it has neither of the others
        ]
    count = cases("flags of other trainers", len(lines), 60)
    for main, before, name, form in rng.sample(lines, count):
        message = refused(main, [*before, *form(name, "1")])
        answered = (f"unknown flag {name}: fastsmooth calls it --", f"fastsmooth has no {name}: ")
        assert any(words in message for words in answered) and "did you mean" not in message, (
            message
        )


COMMANDS = [
    (train.main, ["--help"]),
    (sweep.main, ["--help"]),
    (every.main, []),
    (train.main, ["--method", "lr", "batch"]),
    (train.main, ["--ema"]),
    (sweep.main, ["--plan", "--out", "s", "--method", "lr", "hybrid", "--batchsize", "8..64x2",
        "--tracker", "wandb", "--wandb-project", "a b"]),
]  # fmt: skip


def test_a_terminal_of_any_width_breaks_no_word_and_loses_none(here, cases):
    rng = random.Random(1)
    for _ in range(cases("terminals of every width", 300, 12)):
        main, argv = rng.choice(COMMANDS)
        width = rng.randint(20, 140)
        found, whole = seen(main, argv, width), said(main, argv)
        words = (whole.out + whole.err).split()
        assert " ".join(found.lines).split() == words, (argv, width)
        longest = max(map(cells, words))
        # a help page sets what belongs to a flag some columns in
        assert found.widest <= max(width, longest + 32), (argv, width)
        assert found.widest <= width or width < longest + 32, (argv, width)


def test_a_run_on_a_terminal_of_any_width_keeps_what_matters_most(here, cases):
    rng = random.Random(2)
    for k in range(cases("runs on terminals of every width", 20, 1)):
        width = rng.randint(40, 140)
        method = rng.choice(list(METHODS)[:7])
        flags = ["--epochs", "2", "--batchsize", "512", "--method", method, "--out", f"run{k}"]
        found = seen(train.main, flags, width)
        assert found.code == 0 and found.widest <= width, (flags, width, found.lines)
        assert (
            len([line for line in found.lines if line.startswith("epoch ") and "test acc" in line])
            == 2
        )
