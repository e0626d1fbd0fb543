"""The device that --device names, on machines that are made up."""

from types import SimpleNamespace

import pytest
import torch

from fastsmooth.cli.config import resolve
from fastsmooth.cli.device import compute_float32, pick_device
from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import parse
from fastsmooth.training.device import choose_graphs, choose_precision, set_numerics
from fastsmooth.training.plan import make_plan


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


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "device", "capability", "precision", "graphs"),
    [
        ("", CPU, None, "fp32", "off"),
        ("", CUDA, (9, 0), "tf32", "on"),
        ("", CUDA, (8, 0), "tf32", "on"),
        ("", CUDA, (7, 5), "fp32", "on"),  # which has no TF32
        ("--mode sampling --steps 1", CUDA, (9, 0), "tf32", "on"),
        ("--deterministic", CUDA, (9, 0), "tf32", "off"),
        ("--precision bf16 --graphs off", CUDA, (9, 0), "bf16", "off"),
        ("--precision fp32 --graphs on --deterministic", CUDA, (9, 0), "fp32", "on"),
    ],
)
def test_auto_is_what_the_device_is_best_at(
    flags, device, capability, precision, graphs, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    c = resolve(parse(flags.split()).given)
    assert choose_precision(c, device) == precision
    assert choose_graphs(c, device, "triton" if device is CUDA else "native", 1) == graphs


def test_several_processes_capture_only_where_they_are_asked_to():
    asked = {g: resolve(parse(["--graphs", g]).given) for g in ("auto", "on")}
    assert choose_graphs(asked["auto"], CUDA, "triton", 2) == "off"
    assert choose_graphs(asked["on"], CUDA, "triton", 2) == "on"
    # whose plain PyTorch reads numbers on the host
    assert choose_graphs(asked["auto"], CUDA, "reference", 1) == "off"
    with pytest.raises(ConfigError, match="--graphs on needs --kernels triton, not reference"):
        choose_graphs(asked["on"], CUDA, "reference", 1)
    with pytest.raises(ConfigError, match="--graphs on needs an NVIDIA GPU, not --device cpu"):
        choose_graphs(asked["on"], CPU, "native", 1)


@pytest.mark.parametrize("precision, how", [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "tf32")])
def test_float32_products_are_rounded_where_the_precision_allows_it(precision, how):
    c = resolve({})
    try:
        set_numerics(c, precision, make_plan(c, 1437).schedule)
        assert torch.backends.cudnn.conv.fp32_precision == how
        assert torch.backends.cuda.matmul.fp32_precision == how
    finally:
        compute_float32(torch, "ieee")
        torch.backends.cudnn.benchmark = False
