"""The device that --device names, on machines that are made up."""

from types import SimpleNamespace

import pytest
import torch

from fastsmooth.cli.device import pick_device
from fastsmooth.cli.flags import ConfigError


def machine(gpus: int = 0, mps: bool = False) -> SimpleNamespace:
    """PyTorch on a machine with so many NVIDIA GPUs."""
    return SimpleNamespace(
        device=torch.device,
        cuda=SimpleNamespace(is_available=lambda: gpus > 0, device_count=lambda: gpus),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
    )


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "there", "picked"),
    [
        ("auto", {}, "cpu"),
        ("auto", {"mps": True}, "mps"),
        ("auto", {"gpus": 2, "mps": True}, "cuda:0"),
        ("cpu", {"gpus": 2}, "cpu"),
        ("cuda", {"gpus": 2}, "cuda:0"),
        ("cuda:1", {"gpus": 2}, "cuda:1"),
    ],
)
def test_a_device_that_is_there_is_picked(name, there, picked):
    assert pick_device(name, machine(**there)) == torch.device(picked)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto", machine(gpus=2)) == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="--device cuda gives each a GPU of its own"):
        pick_device("cuda:0", machine(gpus=2))
    with pytest.raises(ConfigError, match="--nproc-per-node 1, or --device cpu"):
        pick_device("cuda", machine(gpus=1))


@pytest.mark.parametrize(
    ("name", "there", "precision", "words"),
    [
        ("cuda", {}, "fp32", "has 0 CUDA devices"),
        ("cuda:2", {"gpus": 2}, "fp32", "has 2 CUDA devices"),
        ("mps", {}, "fp32", "has no Apple GPU"),
        ("cpu", {}, "tf32", "--precision tf32 is a mode of NVIDIA GPUs: with --device cpu"),
        ("auto", {"mps": True}, "tf32", "with --device mps"),
    ],
)
def test_what_is_not_there_is_refused(name, there, precision, words):
    with pytest.raises(ConfigError, match=words):
        pick_device(name, machine(**there), precision)


def test_tf32_is_for_nvidia_gpus():
    assert pick_device("auto", machine(gpus=1), "tf32") == torch.device("cuda:0")
