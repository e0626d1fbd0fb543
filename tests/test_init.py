"""Weights that a run begins with, and parameters that it leaves as they are: --init, --freeze."""

import argparse
import json
import os
import pickle
import re
import socket

import pytest
import torch
import torchvision
from exact import EXACT
from forks import assert_same_bits, final_state, finish
from safetensors.torch import save_file
from said import refused, said
from torch import nn

from fastsmooth import models
from fastsmooth.cli import parse as parsing
from fastsmooth.cli.config import resolve
from fastsmooth.cli.flags import ConfigError
from fastsmooth.freezing import FrozenNorm, freeze
from fastsmooth.models import ModelError
from fastsmooth.noise.gradients import undisturbed
from fastsmooth.train import main
from fastsmooth.training import beginning
from fastsmooth.training.syncnorm import SyncBatchNorm, convert

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def resnet18(seed=7, classes=1000):
    torch.manual_seed(seed)
    return torchvision.models.resnet18(weights=None, num_classes=classes).eval()


def taken(path, name="torchvision/resnet18", classes=1000, channels=3):
    """The network after --init path, and the line that says what was taken."""
    torch.manual_seed(0)
    model = models.build(name, classes, channels=channels)
    state = torch.get_rng_state()
    line = beginning.begin_with(resolve({"model": name, "init": str(path)}), model, classes)
    assert torch.equal(torch.get_rng_state(), state)
    return model.eval(), line


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_the_weights_of_torchvision_give_the_logits_of_torchvision(kind, tmp_path):
    path, theirs = tmp_path / f"resnet18.{kind}", resnet18()
    if kind == "pth":
        torch.save(theirs.state_dict(), path)
    else:
        save_file(theirs.state_dict(), path)
    model, line = taken(path)
    assert torch.equal(model(X), theirs(X))
    assert line == f"weights of {path}: 122 of 122 tensors"


def test_the_weights_of_timm_give_the_logits_of_timm(tmp_path):
    import timm

    torch.manual_seed(7)
    theirs = timm.create_model("resnet10t", num_classes=10).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    model, line = taken(tmp_path / "w.safetensors", "timm/resnet10t", 10)
    assert torch.equal(model(X), theirs(X)) and re.search(r": (\d+) of \1 tensors$", line)


def test_a_network_of_timm_takes_gray_images_as_timm_does(tmp_path):
    import timm
    from timm.models import load_pretrained

    torch.manual_seed(7)
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "w.safetensors")
    theirs = timm.create_model("resnet10t", in_chans=1)
    cfg = {"file": str(tmp_path / "w.safetensors"), "first_conv": "conv1.0", "num_classes": 1000}
    load_pretrained(theirs, cfg | {"classifier": "fc", "input_size": (3, 176, 176)}, in_chans=1)
    model, _ = taken(tmp_path / "w.safetensors", "timm/resnet10t", channels=1)
    assert torch.equal(model(X[:, :1]), theirs.eval()(X[:, :1]))


def test_a_head_of_another_size_is_left_as_it_was_drawn_and_named(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "w.pth")
    model, line = taken(tmp_path / "w.pth", classes=10)
    torch.manual_seed(0)
    drawn = models.build("torchvision/resnet18", 10).state_dict()
    theirs = resnet18().state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, (drawn if key.startswith("fc.") else theirs)[key]), key
    assert line.endswith(": 120 of 122 tensors; head fc (1,000 classes) left as it was drawn")


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", "model_state_dict"])
def test_what_trainers_put_around_the_weights_is_taken_off(key, tmp_path):
    theirs = models.build("resnet8", 10).eval()
    renamed = {f"module._orig_mod.{name}": v for name, v in theirs.state_dict().items()}
    other = {"optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(other | {key: renamed}, tmp_path / "w.pth")
    model, _ = taken(tmp_path / "w.pth", "resnet8", 10)
    assert torch.equal(model(X), theirs(X))


def test_what_is_missing_and_what_is_not_used_is_listed(tmp_path):
    theirs = resnet18(classes=10).state_dict()
    del theirs["layer4.1.conv2.weight"]
    theirs |= {f"neck.{i}.weight": torch.zeros(3) for i in range(5)}
    # as in files of before PyTorch 0.4.1: nobody misses it
    theirs = {k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")}
    save_file(theirs, tmp_path / "w.safetensors")
    _, line = taken(tmp_path / "w.safetensors", classes=10)
    assert line.endswith(
        ": 101 of 102 tensors; not there, and left as drawn: layer4.1.conv2.weight; there, and not "
        "in torchvision/resnet18: neck.0.weight, neck.1.weight, neck.2.weight and 2 more"
    )


def cannot(path, name="resnet20", classes=10):
    with pytest.raises(ConfigError) as refusal:
        taken(path, name, classes)
    return str(refusal.value).removeprefix(f"--init {path}: ")


def test_another_shape_is_refused_with_both(tmp_path):
    save_file(torchvision.models.resnet50(num_classes=10).state_dict(), tmp_path / "w.safetensors")
    assert cannot(tmp_path / "w.safetensors", "torchvision/resnet18") == (
        "layer1.0.conv1.weight is [64, 64, 1, 1], and in torchvision/resnet18 [64, 64, 3, 3]: "
        "these look like weights of torchvision/resnet50: give --model torchvision/resnet50, or "
        "weights of torchvision/resnet18"
    )
    gray = models.build("resnet20", 10, channels=1)
    torch.save(gray.state_dict(), tmp_path / "gray.pth")
    assert cannot(tmp_path / "gray.pth").startswith(
        "stem.weight is [16, 1, 3, 3], and in resnet20 [16, 3, 3, 3]: "
    )


def test_a_width_that_is_the_number_of_classes_is_no_head(tmp_path, monkeypatch):
    monkeypatch.setattr(beginning, "FAMILIES", ())
    narrow = models.CifarResNet(models.BasicBlock, [3, 3, 3], [8, 32, 64], 16).state_dict()
    torch.save(narrow, tmp_path / "w.pth")
    assert "is [8, 8, 3, 3], and in resnet20 [16, 16, 3, 3]" in cannot(
        tmp_path / "w.pth", classes=16
    )


def test_weights_of_another_network_are_refused_with_its_name(tmp_path, monkeypatch):
    torch.save(resnet18().state_dict(), tmp_path / "w.pth")
    assert cannot(tmp_path / "w.pth") == (
        "it has 0 of the 107 tensors of resnet20 (there are conv1.weight, bn1.weight, bn1.bias and "
        "119 more, not stem.weight, norm.weight, norm.bias and 104 more): these look like weights "
        "of torchvision/resnet18: give --model torchvision/resnet18, or weights of resnet20"
    )
    torch.save(models.build("resnet8", 3).state_dict(), tmp_path / "own.pth")
    assert "these look like weights of resnet8: " in cannot(
        tmp_path / "own.pth", "torchvision/resnet18"
    )
    torch.save({"a": torch.zeros(2)}, tmp_path / "few.pth")
    monkeypatch.setattr(beginning, "FAMILIES", ())
    assert cannot(tmp_path / "few.pth").endswith(": give weights of resnet20")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/fastsmooth-was-run",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("w.txt", b"lr = 0.1\n", "torch.load reads no weights in it"),
        ("w.pth", b"", "it is empty"),
        ("w.pth", pickle.dumps(Evil(), 2), "it holds code (posix.system)"),
        ("w.pth", pickle.dumps(Evil()), "torch.load reads no weights in it (Unsupported operand"),
        ("w.pth", b"PK\x03\x04" + bytes(100), "torch.load reads no weights in it"),
        ("w.safetensors", b"lr = 0.1\n", "no safetensors file"),
        ("w.bin", (1 << 40).to_bytes(8, "little") + b"{", "no safetensors file"),
    ],
)
def test_a_file_without_weights_is_one_line(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    line = refused(main, ["--init", str(tmp_path / name), "--out", str(tmp_path / "run")])
    assert line.startswith(f"--init {tmp_path / name}: ") and words in line
    assert not (tmp_path / "run").exists()


def test_what_is_no_file_of_weights_is_one_line(tmp_path):
    save_file(resnet18(classes=10).state_dict(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "it is damaged" in cannot(tmp_path / "cut.safetensors")
    os.mkfifo(tmp_path / "pipe")
    assert "it is a pipe" in cannot(tmp_path / "pipe")
    assert cannot(tmp_path).startswith("it is a folder without config.json, so no run")
    assert "No such file" in cannot(tmp_path / "none.pth")
    (tmp_path / "config.json").write_text("{}")
    assert cannot(tmp_path).startswith("the run has no weights yet")
    torch.save({"state_dict": {"lr": 0.1}}, tmp_path / "numbers.pth")
    assert cannot(tmp_path / "numbers.pth").startswith("it holds no tensors by name")
    torch.save(resnet18(), tmp_path / "model.pth")
    assert "torchvision.models.resnet.ResNet" in cannot(tmp_path / "model.pth")
    for value, words in (
        (torch.full((10,), float("nan")), "not finite"),
        (torch.zeros(10, dtype=torch.int8), "not quantised"),
        (torch.zeros(10).to_sparse(), "not quantised"),
    ):
        state = models.build("resnet20", 10).state_dict() | {"head.bias": value}
        torch.save(state, tmp_path / "odd.pth")
        assert "head.bias" in cannot(tmp_path / "odd.pth")
        assert words in cannot(tmp_path / "odd.pth")


def test_published_weights_are_refused_in_words_where_there_are_none(monkeypatch):
    assert refused(main, ["--init", "pretrained", "--model", "resnet20"]).startswith(
        "--init pretrained: no pretrained weights are published for resnet20: "
    )

    def offline(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    for name in ("torchvision/resnet18", "timm/resnet10t"):
        line = refused(main, ["--init", "pretrained", "--model", name])
        assert f"the weights of {name} cannot be downloaded (" in line
    assert "no pretrained weights are published for timm/resnetblur18" in refused(
        main, ["--init", "pretrained", "--model", "timm/resnetblur18"]
    )


def test_published_weights_are_those_that_the_library_loads(monkeypatch, tmp_path):
    theirs = resnet18()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda url, path, *rest, **more: torch.save(theirs.state_dict(), path),
    )
    model, line = taken("pretrained")
    assert torch.equal(model(X), theirs(X))
    assert line == "weights of torchvision/resnet18 (IMAGENET1K_V1): 122 of 122 tensors"


def test_a_run_begins_with_the_weights_of_another(tmp_path):
    """With its best ones, or those of its newest checkpoint, and the same random numbers as
    without."""
    one, two, plain = (tmp_path / name for name in ("one", "two", "plain"))
    assert main([*EXACT, "--epochs", "1", "--seed", "5", "--out", str(one)]) == 0
    short = [*EXACT, "--epochs", "1", "--lr", "1e-12", "--batchsize", "1437"]
    found = said(main, [*short, "--init", str(one), "--out", str(two)])
    assert found.code == 0
    line = f"weights of {one / 'best.safetensors'}: 56 of 56 tensors"
    assert f"{line}\n" in found.out
    assert json.loads((two / "env.json").read_text())["weights"] == [line]
    before, after = final_state(one)["model"], final_state(two)["model"]
    for name, value in after.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    assert main([*short, "--out", str(plain)]) == 0
    assert torch.equal(final_state(plain)["rng"][0][0], final_state(two)["rng"][0][0])
    for name in ("best", "last"):
        (one / f"{name}.safetensors").unlink()
    assert taken(one, "resnet8", 10)[1] == f"weights of {one} at update 45: 56 of 56 tensors"


def test_a_run_that_goes_on_needs_no_file_of_weights(tmp_path):
    torch.save(models.build("resnet8", 10).state_dict(), tmp_path / "w.pth")
    argv = [*EXACT, "--epochs", "2", "--batchsize", "240", "--freeze", "stem"]
    argv += ["--init", str(tmp_path / "w.pth")]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    assert main([*argv, "--out", str(tmp_path / "cut"), "--max-time", "0.01s"]) == 75
    os.unlink(tmp_path / "w.pth")
    assert main(["--resume", "--out", str(tmp_path / "cut"), "--max-time", "1h"]) == 0
    assert_same_bits(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


@pytest.mark.full
def test_two_processes_begin_with_the_same_weights(tmp_path):
    torch.save(models.build("resnet8", 10).state_dict(), tmp_path / "w.pth")
    argv = [*EXACT, "--epochs", "1", "--init", str(tmp_path / "w.pth"), "--freeze", "stem", "norm"]
    finish([*argv, "--batchsize", "30"], tmp_path / "run", 2)
    begun, after = torch.load(tmp_path / "w.pth"), final_state(tmp_path / "run")["model"]
    assert not torch.equal(begun["head.weight"], after["head.weight"])
    for name in begun:
        if name.startswith(("stem.", "norm.")):  # sums of shares would round the statistics
            assert torch.equal(begun[name], after[name]), name


# --freeze


def frozen_names(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "tensors", "norms"),
    [(["stem"], 1, 0), (["stem.*", "norm"], 3, 1), (["stages.0"], 6, 2), (["*.norm1"], 6, 3),
     (["*.bias"], 10, 0), (["stages.?.0.conv1"], 3, 0), (["[!h]*"], 27, 9)],
)  # fmt: skip
def test_patterns_name_parameters_and_modules(patterns, tensors, norms):
    model = models.build("resnet8", 10)
    frozen = freeze(model, patterns)
    assert (frozen.tensors, frozen.norms) == (tensors, norms)
    assert len(frozen_names(model)) == tensors
    assert frozen.parameters == sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_patterns_that_cannot_be_meant_are_refused():
    for patterns, words in (
        (["stem", "stages.7"], "--freeze stages.7 names no parameter: "),
        (["heads"], "did you mean head?"),
        (["xyz"], "they begin with stem, norm, stages, head"),
        (["*"], "--freeze * leaves no parameter to train"),
    ):
        with pytest.raises(ModelError, match=re.escape(words)):
            freeze(models.build("resnet8", 10), patterns)
    assert refused(main, ["--freeze", "steem"]).startswith("--freeze steem names no parameter")


def test_frozen_batchnorm_does_what_timm_makes_of_it():
    import timm
    from timm.layers import freeze_batch_norm_2d

    for build, patterns in (
        (resnet18, ["bn1", "*.bn1", "layer2", "fc"]),
        (lambda: timm.create_model("resnet10t", num_classes=10), ["conv1.1", "*.bn2", "layer1"]),
    ):
        torch.manual_seed(2)
        ours, theirs = build().double(), build().double()
        theirs.load_state_dict(ours.state_dict())
        for model in (ours, theirs):
            for m in model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.running_mean.fill_(0.1)
        keys = list(ours.state_dict())
        assert 4 < freeze(ours, patterns).norms < 20
        for name, module in list(theirs.named_modules()):
            if isinstance(ours.get_submodule(name), FrozenNorm):
                parent, _, last = name.rpartition(".")
                setattr(theirs.get_submodule(parent), last, freeze_batch_norm_2d(module))
        buffers = {n: b.clone() for n, b in ours.named_buffers()}
        x = X.double()
        torch.testing.assert_close(ours.train()(x), theirs.train()(x))
        with undisturbed(ours, "train"):
            ours(x)
        for name, module in ours.named_modules():
            if isinstance(module, FrozenNorm):
                assert not module.training
                assert torch.equal(module.running_mean, buffers[f"{name}.running_mean"])
        assert list(ours.state_dict()) == keys


def test_frozen_layers_stay_frozen_where_batchnorm_is_joined():
    model = models.build("resnet8", 10)
    freeze(model, ["norm", "stages.0.0.norm1.weight"])
    convert(model)
    assert frozen_names(model) == {"norm.weight", "norm.bias", "stages.0.0.norm1.weight"}
    assert isinstance(model.norm, FrozenNorm) and not isinstance(model.norm, SyncBatchNorm)
    assert isinstance(model.stages[0][0].norm1, SyncBatchNorm)


@pytest.mark.parametrize("form", ["sgd", "shb", "nshb", "qhm"])
def test_frozen_parameters_stay_and_the_others_are_those_of_plain_autograd(form, tmp_path):
    """One update with everything that moves parameters, beside one by hand."""
    torch.save(models.build("resnet8", 10).state_dict(), tmp_path / "w.pth")
    argv = [*EXACT, "--epochs", "1", "--batchsize", "1437", "--lr", "0.5", "--optimizer", form]
    argv += ["--freeze", "stem", "norm", "stages.0", "--weight-decay", "0.1"]
    assert main([*argv, "--init", str(tmp_path / "w.pth"), "--out", str(tmp_path / "run")]) == 0
    begun, after = torch.load(tmp_path / "w.pth"), final_state(tmp_path / "run")
    moved = {name for name in begun if not torch.equal(begun[name], after["model"][name])}
    assert all(not name.startswith(("stem", "norm.", "stages.0")) for name in moved)
    assert {n for n in begun if n.startswith(("stages.1", "stages.2", "head"))} == moved
    buffers = after["optimizer"]["state"]
    names = [name for name, _ in models.build("resnet8", 10).named_parameters()]
    trained = [n for n in names if not n.startswith(("stem", "norm.", "stages.0"))]
    assert [names[number] for number in buffers] == ([] if form == "sgd" else trained)


def test_measurements_are_of_the_trainable_parameters(tmp_path):
    argv = [*EXACT, "--epochs", "1", "--freeze", "stem", "norm", "stages", "--norm", "group"]
    argv += ["--mode", "sampling", "--steps", "1", "--draws", "2", "--save-omega"]
    found = said(main, [*argv, "--out", str(tmp_path / "run")])
    assert found.code == 0 and "650 trainable parameters" in found.out
    assert "whatever is measured is of the trainable parameters" in found.out
    noise = json.loads((tmp_path / "run" / "noise.json").read_text())
    assert noise["points"][0]["function"].startswith(
        "mean cross-entropy as a function of the trainable parameters over the 1,437 "
    )
    import numpy as np

    assert np.load(tmp_path / "run" / "omega-1.npy").shape == (2, 650)


@pytest.mark.parametrize(
    "estimator", ["per-sample", pytest.param("micro-batch", marks=pytest.mark.full)]
)
def test_tracked_noise_is_that_of_the_trainable_parameters(estimator, tmp_path):
    """grad_norm of a measurement beside autograd over what is trained."""
    argv = [*EXACT, "--epochs", "1", "--batchsize", "1436", "--lr", "1e-12", "--drop-last"]
    argv += ["--freeze", "stem", "norm", "stages", "--track-noise", "every=1"]
    argv += ["--estimator", estimator, "--seed", "3"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    measured = next(row for row in rows if row["kind"] == "measure")
    torch.manual_seed(3)
    model = models.build("resnet8", 10).train()
    freeze(model, ["stem", "norm", "stages"])
    from fastsmooth import data
    from fastsmooth.data.order import permutation

    c = resolve({"seed": 3})
    images = data.open_data(c, torch.device("cpu"))
    x, y = next(iter(images.train.batches([permutation(3, 0, 1437)[:1436]])))
    nn.functional.cross_entropy(model(x), y).backward()
    norm = sum(p.grad.square().sum() for p in model.head.parameters()).sqrt().item()
    assert all(p.grad is None for p in model.stages.parameters())
    assert measured["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_published_constants_are_not_those_of_frozen_networks():
    given = {"dataset": "cifar100", "data_dir": "d", "model": "resnet18", "lr": 0.1}
    assert resolve(given).c2 == 1280
    assert resolve(given | {"freeze": ("stem",)}).c2 is None
    assert resolve(given | {"init": "/w.pth"}).c2 is None


def test_a_path_of_weights_means_the_same_everywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parsing.parse(["--init", "w.pth"]).given["init"] == str(tmp_path / "w.pth")
    assert parsing.parse(["--init", "pretrained"]).given["init"] == "pretrained"
