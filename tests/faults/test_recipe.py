"""The flags of a recipe: each of them changes the run that it is given to, and all at once give the
same bits through every loader, in two processes, and after an interruption."""

import functools
from pathlib import Path

import pytest
import saboteurs
import torch
from exact import EXACT
from forks import assert_same_bits, assert_same_run, codes, final_state, finish, logs, start_ranks
from repacked import own_cache

from fastsmooth.train import main

# what changes the weights that a run ends with
RECIPE = {
    "--label-smoothing": ["0.1"],
    "--loss": ["bce"],
    "--mixup": ["0.2"],
    "--cutmix": ["1"],
    "--randaugment": ["2,9"],
    "--random-erasing": ["0.5"],
    "--clip-norm": ["0.5"],
    "--decay-weights-only": [],
    "--sam": ["rho=0.05,alpha=0.2"],
    "--warmup": ["3"],
    "--freeze": ["stem"],
}
# what does not
TOLD = ["--ema", "0.9", "--top5", "--patience", "3", "--keep", "all"]
ALL = [word for name, values in RECIPE.items() for word in (name, *values)] + TOLD
BASE = [*EXACT, "--weight-decay", "1e-2", "--lr", "0.05", "--batchsize", "32", "--seed", "1"]


def images(cifar_folder: Path, *more: str) -> list[str]:
    return [
        *BASE, "--data-dir", str(cifar_folder), "--dataset", "folder", "--model", "resnet8",
        "--augment", "crop-flip", "--budget", "updates=6", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The end of six updates on the digits without a recipe."""
    out = tmp_path_factory.mktemp("recipe") / "plain"
    assert main([*BASE, "--budget", "updates=6", "--out", str(out)]) == 0
    return final_state(out)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", RECIPE)
def test_each_flag_changes_the_weights(name, plain, tmp_path):
    flags = [*BASE, "--budget", "updates=6", "--out", str(tmp_path / "run")]
    assert main([*flags, name, *RECIPE[name]]) == 0
    assert not same(final_state(tmp_path / "run")["model"], plain["model"])


def test_what_is_only_told_changes_none(plain, tmp_path):
    flags = [*BASE, "--budget", "updates=6", "--out", str(tmp_path / "run")]
    assert main([*flags, *TOLD]) == 0
    assert_same_bits(final_state(tmp_path / "run")["model"], plain["model"])


@pytest.mark.parametrize("loader", ["threads", "torch", "dali"])
def test_every_loader_gives_all_of_them_the_same_bits(loader, cifar_folder, tmp_path, monkeypatch):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    own_cache(tmp_path / "cache", monkeypatch)
    ends = []
    for name in ("resident", loader):
        out = tmp_path / name
        assert main([*images(cifar_folder, *ALL), "--loader", name, "--out", str(out)]) == 0
        ends.append(final_state(out))
    assert_same_bits(ends[0]["model"], ends[1]["model"])
    assert_same_bits(ends[0]["ema"], ends[1]["ema"])


def test_two_processes_end_in_the_same_bits_after_an_interruption(tmp_path):
    argv = [*BASE, *ALL, "--epochs", "2", "--checkpoint-every", "20", "--augment", "crop-flip"]
    finish(argv, tmp_path / "whole", 2)
    sabotage = functools.partial(saboteurs.stop_after, 33)
    found = codes(start_ranks(argv, tmp_path / "cut", 2, sabotage))
    assert found == [75, 75], logs(tmp_path / "cut")
    finish([*argv, "--resume"], tmp_path / "cut", 2)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
