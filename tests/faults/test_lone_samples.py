"""One sample alone where BatchNorm would see 1 x 1 features: refused before the run, and only where
the run would meet it."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from forks import codes, logs, start_ranks
from images import noise, tree
from said import refused, said
from torch import nn

from fastsmooth import data, models, train
from fastsmooth.cli.config import resolve
from fastsmooth.cli.flags import ConfigError
from fastsmooth.data.images import Split
from fastsmooth.training import build, plan

WORDS = "BatchNorm cannot normalise a single value"


class Pooled(nn.Sequential):
    """A BatchNorm behind the pooling, whose features are 1 x 1 at any size."""

    def __init__(self, classes: int, channels: int):
        super().__init__(
            nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1),
            nn.BatchNorm2d(4), nn.Flatten(),
            nn.Linear(4, classes),
        )  # fmt: skip


def few_digits(images: int):
    """A reader of the first digits."""
    read = data.READERS["digits"]

    def reader(config):
        found = read(config)
        parts = {
            name: Split(part.labels[:count], part.pixels[:count])
            for name, part, count in (("train", found.train, images), ("test", found.test, 10))
        }
        return dataclasses.replace(found, **parts)

    return reader


@pytest.fixture
def pooled(tmp_path, monkeypatch):
    """Runs of Pooled on 41 digits, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.BUILDERS, "pooled", Pooled)
    monkeypatch.setitem(data.READERS, "digits", few_digits(41))


def random_flags(rng: random.Random) -> list[str]:
    mode = rng.choice(["normal", "sampling", "critical"])
    flags = ["--device", "cpu", "--model", "pooled", "--mode", mode, "--epochs", "2"]
    flags += ["--batchsize", str(rng.choice([1, 2, 3, 4, 5, 8, 10, 20, 39, 40, 41, 13, 6, 7]))]
    flags += ["--drop-last"] * rng.randrange(2)
    if rng.randrange(3) == 0:
        flags += ["--micro-batch", str(rng.choice([1, 2, 3, 4, 5]))]
    if mode == "critical":
        flags += [
            "--eps",
            "1e-9",
            *rng.choice([[], ["--criterion", "full-grad", "--full-grad-every", "1"]]),
        ]
    else:
        flags += [
            "--method",
            rng.choice(["constant", "batch", "hybrid"]),
            *rng.choice([[], ["--norm", "group"]]),
        ]
    if mode == "sampling":
        flags += ["--steps", *rng.choice([["0"], ["1"], ["1", "3"], ["2"]]), "--draws", "2"]
    elif rng.randrange(3) == 0:
        flags += ["--budget", rng.choice(["updates=2", "updates=3", "samples=40", "samples=30"])]
        flags.remove("--epochs"), flags.remove("2")
    if mode != "normal":
        flags += ["--bn", rng.choice(["train", "eval"])]
    elif rng.randrange(3) == 0:
        flags += ["--track-noise", "every=1", "--estimator", "micro-batch"]
    return flags


def test_a_run_is_refused_just_when_it_would_meet_one_sample_alone(pooled, monkeypatch, cases):
    """Random command lines: with the check, and without it to the end."""
    check, rng, seen = build.check_lone_samples, random.Random(1), {True: 0, False: 0}
    for k in range(cases("one sample alone, random command lines", 200, 24)):
        flags = [*random_flags(rng), "--out", f"run-{k}"]
        monkeypatch.setattr(build, "check_lone_samples", check)
        # the first update is enough to know that it was not refused
        found = said(train.main, [*flags, "--max-time", "1e-9"])
        refusal = WORDS in found.err
        assert refusal or found.code in (0, 75) or found.code == 2, found
        if found.code == 2 and not refusal:
            continue  # for another reason
        if refusal:
            assert (
                found.code == 2
                and len(found.err.splitlines()) == 1
                and not Path(f"run-{k}").exists()
            ), found
        monkeypatch.setattr(build, "check_lone_samples", lambda *_: None)
        try:
            met = said(train.main, [*flags, "--out", f"run-{k}-again"]).code != 0
        except ValueError as error:
            assert "Expected more than 1 value per channel" in str(error)
            met = True
        assert met == refusal, (flags, found)
        seen[refusal] += 1
    assert min(seen.values()) > 5


def pieces(order: list[int], processes: int, micro_batch: int | None) -> list[int]:
    """The sizes of what goes through the model of a batch, by the definitions in docs/train.md."""
    shares = [order[rank::processes] for rank in range(processes)]
    return [
        len(share[at : at + (micro_batch or 10**9)])
        for share in shares
        for at in range(0, len(share), micro_batch or 10**9)
    ]


@pytest.mark.parametrize("sync_bn", [False, True])
def test_every_share_of_every_process_is_counted(sync_bn, cases):
    number = cases("shares of processes and micro-batches of one sample", 4000, 400)
    rng = random.Random(2)
    for _ in range(number):
        n, processes = rng.randrange(8, 60), rng.choice([1, 2, 3, 4, 7])
        batch = rng.randrange(processes, n + 1) if processes <= n else n
        given = {
            "batch_size": batch,
            "epochs": 3,
            "method": rng.choice(["constant", "batch"]),
            "drop_last": rng.random() < 0.3,
        }
        given |= {"sync_bn": True} if sync_bn else {"micro_batch": rng.choice([None, 1, 2, 3, 5])}
        c = resolve(
            {key: value for key, value in given.items() if value is not None and value is not False}
        )
        made = plan.Plan(c, plan.make_schedule(c, n), n)
        sizes = []
        for point in made.schedule.points():
            for at in range(0, n, point.batch_size):
                order = list(range(at, min(at + point.batch_size, n)))
                if len(order) == point.batch_size or not c.drop_last:
                    joined = sync_bn and processes > 1
                    sizes += [len(order)] if joined else pieces(order, processes, c.micro_batch)
        try:
            build.check_lone_samples(made, processes)
            refusal = ""
        except ConfigError as error:
            refusal = str(error)
        assert (1 in sizes) == bool(refusal), (given, n, processes)
        assert not refusal or "another --batchsize" in refusal


def test_the_remedies_are_named_and_help(tmp_path, monkeypatch, cases):
    """81 images of 32 pixels in batches of 20, of which torchvision's ResNet-18 makes 1 x 1
    features."""
    cases("one sample alone, and its remedies", 4, 4)
    monkeypatch.chdir(tmp_path)
    files = {
        f"train/{c}/{k}.png": noise() for c, count in (("a", 41), ("b", 40)) for k in range(count)
    }
    tree(Path("images"), files | {f"val/{c}/0.png": noise() for c in "ab"})
    argv = [
        "--dataset",
        "folder",
        "--data-dir",
        "images",
        "--model",
        "torchvision/resnet18",
        "--batchsize",
        "20",
    ]
    argv += ["--epochs", "1", "--device", "cpu", "--out", "run"]
    assert refused(train.main, argv) == (
        "the last batch of an epoch has 1 sample, of which torchvision/resnet18 makes 1x1 "
        "features: BatchNorm cannot normalise a single value: use --drop-last, another --batchsize "
        "or --norm group"
    )
    assert not Path("run").exists()
    micro = refused(train.main, [*argv, "--drop-last", "--micro-batch", "19"])
    assert micro.startswith(
        "a batch has 20 samples, one of them alone with --micro-batch 19, of which"
    )
    for k, remedy in enumerate((["--drop-last"], ["--batchsize", "27"], ["--norm", "group"])):
        assert (
            said(train.main, [*argv, *remedy, "--out", f"run{k}", "--max-time", "1e-9"]).code == 75
        )
    # larger features have more than one value, and nothing is refused
    assert said(train.main, [*argv, "--image-size", "64", "--max-time", "1e-9"]).code == 75


def test_processes_refuse_a_share_of_one_before_the_run(tmp_path, cases):
    if cases("one sample alone, in processes", 2, 0) == 0:
        pytest.skip("with --full")
    # 1437 % 717 = 3
    for k, argv in enumerate((["--batchsize", "717"], ["--batchsize", "717", "--sync-bn"])):
        out = tmp_path / f"run{k}"
        processes = start_ranks(
            [*argv, "--model", "resnet18", "--epochs", "1", "--max-time", "1e-9"], out, 2
        )
        if k == 0:
            assert codes(processes, 100) == [2, 2]
            (line,) = logs(out).splitlines()
            assert (
                "has 3 samples, one of them alone in 2 processes" in line
                and "another number of processes" in line
            )
            assert not out.exists()
        else:
            assert codes(processes, 100) == [75, 75]


def test_trying_one_image_changes_neither_the_model_nor_the_random_state(pooled):
    torch.manual_seed(3)
    model = nn.Sequential(Pooled(10, 3), nn.Dropout(0.5))
    before, state = (
        {name: value.clone() for name, value in model.state_dict().items()},
        torch.get_rng_state(),
    )
    c = resolve({"model": "pooled"})
    images = data.open_data(c, torch.device("cpu"))
    assert build.try_model(c, model, images) is False
    assert build.try_model(c, models.build("resnet8", 10), images) is True
    torch.manual_seed(3)
    nn.Sequential(Pooled(10, 3), nn.Dropout(0.5))
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        and model.training
    )
