"""fastsmooth.export: what it writes is opened by the libraries it is for, with the logits of the
run; the model card says what the run's files say."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from said import refused, said
from timm.data import create_transform, resolve_model_data_config

import fastsmooth as fs
from fastsmooth import models
from fastsmooth.cli.flags import ConfigError
from fastsmooth.export import graphs, loading, work
from fastsmooth.export.__main__ import main
from fastsmooth.export.hub import crop_share, files_of, order_hash
from fastsmooth.runfolder import files
from fastsmooth.runfolder.read import RunError, find_runs
from fastsmooth.sharpness import main as sharpness
from fastsmooth.train import main as train
from fastsmooth.trained import TrainedRun

SMALL = ["--budget", "updates=3", "--batchsize", "8", "--lr", "0.02"]


def images(folder: Path, channels: int) -> list[str]:
    """Flags for an array of random images of 36 x 36 pixels in four classes."""
    draw = np.random.default_rng(channels)
    shape = (36, 36) if channels == 1 else (36, 36, channels)
    arrays = {}
    for split, count in (("train", 40), ("test", 8)):
        arrays[f"{split}_images"] = draw.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 4
    folder.mkdir(parents=True)
    np.savez(folder / "images.npz", **arrays)
    return ["--dataset", "npz", "--data-dir", str(folder), "--image-size", "32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A network of ours with GroupNorm, noise tracked; one of timm on grey images; one of
    torchvision on colour images; and one of ours on grey images."""
    home = tmp_path_factory.mktemp("runs")
    track = ["--norm", "group", "--method", "exp", "--epochs", "2", "--track-noise", "every=10"]
    grey, colour = images(home / "data" / "grey", 1), images(home / "data" / "colour", 3)
    flags = {
        "ours": [*track, "--batchsize", "64", "--seed", "7"],
        "timm": [*grey, "--model", "timm/test_resnet", *SMALL],
        "torchvision": [*colour, "--model", "torchvision/shufflenet_v2_x0_5", *SMALL],
        "grey": [*grey, "--model", "resnet8", *SMALL],
    }
    for name, words in flags.items():
        assert train([*words, "--out", str(home / name)]) == 0
    return {name: home / name for name in flags}


def shown(run: TrainedRun, count: int = 3) -> torch.Tensor:
    """Random images [count, C, S, S]."""
    side = run.facts.image_size
    return torch.randn(count, run.facts.channels, side, side)


def exported(run: Path, form: str, out: Path, *flags: str) -> str:
    """What the command says; what it writes is at `out`."""
    found = said(main, [str(run), "--to", form, "--out", str(out), *flags])
    assert found.code == 0 and not found.err, found
    return found.out


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


# safetensors


def native(name: str, path: Path) -> torch.nn.Module:
    """The network built by its own library, with the weights of the file."""
    if name == "timm":
        return timm.create_model("test_resnet", num_classes=4, in_chans=1, checkpoint_path=path)
    if name == "torchvision":
        model = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=4)
    else:
        norm, channels = ("group", 3) if name == "ours" else ("batch", 1)
        model = fs.build_model("resnet8", 10 if name == "ours" else 4, norm, channels)
    model.load_state_dict(load_file(path))
    return model


@pytest.mark.parametrize("name", ["ours", "timm", "torchvision", "grey"])
def test_safetensors_have_the_same_logits_in_the_network_s_own_library(name, runs, tmp_path):
    path = tmp_path / "x.safetensors"
    lines = exported(runs[name], "safetensors", path, "--weights", "last").splitlines()
    run = fs.load_run(runs[name], "last")
    x = shown(run)
    with torch.no_grad():
        assert close(native(name, path).eval()(x), run.model(x))
    # as the last line says
    names: dict = {}
    exec(lines[-1].removeprefix("load it: "), names)
    assert close(names["model"](x), run.model(x))
    with safe_open(path, "pt") as file:
        words = file.metadata()
    assert (words["format"], words["network"]) == ("pt", run.facts.network)
    assert json.loads(words["classes"]) == list(run.facts.classes)
    assert [json.loads(words[key]) for key in ("image_size", "mean", "std")] == [
        run.facts.image_size, list(run.facts.mean), list(run.facts.std),
    ]  # fmt: skip
    assert json.loads(words["fastsmooth"])["update"] == run.about_weights["update"]


def test_what_torchvision_is_told_of_googlenet_is_in_the_line(runs):
    facts = dataclasses.replace(fs.load_run(runs["torchvision"]).facts)
    facts = dataclasses.replace(facts, network="torchvision/googlenet")
    options = {"num_classes": 4} | models.QUIRKS["googlenet"]
    assert loading.arguments(facts) == options
    said = "; ".join(loading.of_weights(facts, '"f"'))
    assert 'get_model("googlenet", num_classes=4, aux_logits=False, init_weights=True)' in said


# Graphs


def slow(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", ["ours", *slow("grey", "timm", "torchvision")])
def test_onnx_has_the_same_logits_for_any_number_of_images(name, runs, tmp_path):
    path = tmp_path / "x.onnx"
    printed = exported(runs[name], "onnx", path)
    run = fs.load_run(runs[name])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 2, 7):
        x = shown(run, count)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        assert close(torch.from_numpy(logits), run.model(x))
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    side, channels = run.facts.image_size, run.facts.channels
    assert (taken.shape, taken.type) == (["batch", channels, side, side], "tensor(float)")
    assert given.shape == ["batch", len(run.classes)]
    words = session.get_modelmeta().custom_metadata_map
    assert json.loads(words["class_names"]) == list(run.classes)
    assert json.loads(words["image_size"]) == side and json.loads(words["mean"])
    differ = re.search(r"onnxruntime: logits of 1 and 5 .* by at most (\S+) \(the larg", printed)
    assert differ and 0 <= float(differ[1]) < 1e-4


@pytest.mark.parametrize("name", ["grey", *slow("ours", "timm", "torchvision")])
def test_a_program_of_torch_export_has_the_same_logits(name, runs, tmp_path):
    path = tmp_path / "x.pt2"
    assert "differ from the network's by at most" in exported(runs[name], "torch-export", path)
    run, told = fs.load_run(runs[name]), {"model.json": ""}
    program = torch.export.load(path, extra_files=told).module()
    for count in (1, 2, 7):
        x = shown(run, count)
        assert close(program(x), run.model(x))
    assert json.loads(told["model.json"]) == json.loads((runs[name] / "model.json").read_text())


def test_a_graph_with_other_logits_is_refused(runs):
    run = fs.load_run(runs["ours"])
    graphs.compared(lambda x: run.model(x) * (1 + 1e-6), run.model, run.facts, "a twin")
    with pytest.raises(ConfigError, match=r"gives logits \[1\] of 1 images, not \[1, 10\]"):
        graphs.compared(lambda x: run.model(x)[:, 0], run.model, run.facts, "a twin")
    for wrong in (lambda x: run.model(x) * 1.01, lambda x: run.model(x) * torch.nan):
        with pytest.raises(ConfigError, match=r"are (0.0|nan).*: nothing was written"):
            graphs.compared(wrong, run.model, run.facts, "a twin")


class Branching(torch.nn.Module):
    """Looks at the values of its input, which no graph does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :4] if x.sum() > 0 else -x.flatten(1)[:, :4]


def test_what_cannot_be_a_graph_is_refused_in_one_line(runs):
    facts = fs.load_run(runs["grey"]).facts
    for to in (graphs.to_torch_export, graphs.to_onnx):
        with pytest.raises(ConfigError, match="PyTorch cannot make a graph of resnet8") as error:
            to(Branching(), facts)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_without_onnxruntime_the_line_says_that_logits_were_not_compared(runs, monkeypatch):
    facts = fs.load_run(runs["grey"]).facts
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 4)).eval()
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    _, line = graphs.to_onnx(model, facts)
    assert "logits were not compared, which needs onnxruntime" in line


# The Hub


def hub(run: Path, out: Path, *flags: str) -> tuple[Path, str]:
    exported(run, "hub", out, *flags)
    assert sorted(os.listdir(out)) == [
        "README.md", "config.json", "model.json", "model.safetensors",
    ]  # fmt: skip
    return out, (out / "README.md").read_text(encoding="utf-8")


def test_timm_opens_the_folder_with_the_images_as_they_were_trained_on(runs, tmp_path):
    folder, _ = hub(runs["timm"], tmp_path / "net")
    run = fs.load_run(runs["timm"])
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = shown(run)
    assert close(model(x), run.model(x))
    assert tuple(model.pretrained_cfg["label_names"]) == run.facts.classes
    view = create_transform(**resolve_model_data_config(model))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 61), np.uint8))
    assert torch.allclose(view(image), run.transform(image), atol=1e-6)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "test_resnet" and config["num_classes"] == 4
    seen = config["pretrained_cfg"]
    assert seen["classifier"] == "fc" and not {"tag", "license", "url", "hf_hub_id"} & seen.keys()


def test_timm_brings_the_shorter_side_to_the_pixels_of_the_run():
    for size in range(8, 400, 7):
        for resize in range(size, size + 60):
            assert int(size / crop_share(size, resize)) == resize


@pytest.mark.parametrize("name", ["ours", "timm", "torchvision", "grey"])
def test_the_python_of_the_card_loads_the_model(name, runs, tmp_path, monkeypatch, capsys):
    folder, text = hub(runs[name], tmp_path / "net")
    run = fs.load_run(runs[name])
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 61, 3), np.uint8)).save(
        folder / "image.png"
    )
    monkeypatch.chdir(folder)
    load, predict = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(load, names)
    x = shown(run)
    assert close(names["model"](x), run.model(x))
    exec(predict, names)
    (wanted,) = run.predict("image.png", top=1)
    assert names["run"].predict("image.png")[0].likely[0] == wanted.likely[0]
    assert names["run"].about_weights == run.about_weights


def front_matter(text: str) -> dict:
    head = re.fullmatch(r"---\n(.*?)\n---\n.*", text, re.DOTALL)
    return yaml.safe_load(head[1])


def cells(text: str) -> list[list[str]]:
    """The rows of the card's tables."""
    rows = [line.strip("| ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.replace("\\", "") for cell in re.split(r" (?<!\\)\| ", row)] for row in rows]


def two_digits(error: float) -> str:
    return f"{float(f'{error:.2g}'):g}"


def row_of(text: str, beginning: str) -> list[str]:
    (row,) = [row for row in cells(text) if row[0].startswith(beginning)]
    return row


def test_the_card_says_what_the_files_say(runs, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs["ours"], out)
    words = ["--samples", "64", "--batch", "32", "--n-iters", "2", "--rho", "0.001"]
    assert sharpness([str(out), *words]) == 0
    _, text = hub(out, tmp_path / "net", "--weights", "best")
    run = fs.load_run(out, "best")
    about, epochs = run.about_weights, run.of_kind("epoch")
    # the head, as the Hub reads it
    head = front_matter(text)
    assert (head["library_name"], head["metrics"]) == ("fastsmooth", ["accuracy"])
    assert "license" not in head and "datasets" not in head
    (result,) = huggingface_hub.ModelCard(text).data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", about["test_acc"])
    # the results
    what, value = row_of(text, "test accuracy of these weights")
    assert what.endswith("over 360 test images") and value == f"{about['test_acc']:.2%}"
    assert row_of(text, "test accuracy after the last")[1] == f"{epochs[-1]['test_acc']:.2%}"
    assert "(best) were chosen on the test images" in text
    # how it was trained
    assert row_of(text, "learning rate")[1] == (
        f"{epochs[0]['lr']:.4g} in the first epoch, {epochs[1]['lr']:.4g} in the last"
    )
    assert row_of(text, "seed")[1] == "7" and row_of(text, "batch size")[1] == "64"
    assert row_of(text, "delta of the")[1] == (
        f"{epochs[0]['delta']:.4g} C in the first epoch, {epochs[1]['delta']:.4g} C in the last"
    )
    order = np.argsort(keys_of(7, 1437), kind="stable").astype("<i8")
    what, value = row_of(text, "order of the samples")
    assert "1,437 indices of epoch 0" in what and value == hashlib.sha256(order).hexdigest()
    env = json.loads((out / "env.json").read_text())
    assert row_of(text, "fingerprint")[1] == env["fingerprint"]
    assert f"fastsmooth {fs.__version__}" in row_of(text, "versions")[1]
    command = re.search(r"```sh\n(.*)\n```", text)[1]
    assert command == (
        "python -m fastsmooth.train --norm group --method exp --epochs 2 --batchsize 64 "
        "--track-noise every=10 --seed 7"
    )
    # what was measured, with its error and what that is over
    tracked = [row for row in run.rows if "noise_scale" in row and row["step"] <= about["update"]]
    last = tracked[-1]
    row = row_of(text, "C2, variance")
    assert row[1:] == [
        f"{last['c2_sampled']:.4g}", two_digits(last["c2_sampled_se"]),
        last["se_over"], f"{last['step']}",
    ]  # fmt: skip
    row = row_of(text, "noise scale")
    assert row[1:3] == [f"{last['noise_scale']:.4g}", "not measured"]
    row = row_of(text, "delta, with")
    # for sgd delta goes as the root of C2
    relative = last["c2_sampled_se"] / last["c2_sampled"] / 2
    assert float(row[1]) == pytest.approx(last["delta_measured"], rel=1e-3)
    assert float(row[2]) == pytest.approx(last["delta_measured"] * relative, rel=0.15)
    (entry,) = run.sharpness["results"]
    row = row_of(text, "sharpness, adaptive m_apgd_linf, rho 0.001")
    assert row[1:] == [
        f"{entry['value']:.4g}", two_digits(entry["error"]),
        "batches of 32 of 64 images (train)", "46",
    ]  # fmt: skip


def keys_of(seed: int, count: int) -> np.ndarray:
    """The keys that sort epoch 0, by Philox4x32-10 (Salmon et al. 2011) in whole numbers."""
    mask = 0xFFFFFFFF
    keys = []
    for i in range(count):
        a, b, c, d = i, 0, 0, 0
        k0, k1 = seed, 0
        for _ in range(10):
            x, y = a * 0xD2511F53, c * 0xCD9E8D57
            a, b, c, d = (y >> 32) ^ b ^ k0, y & mask, (x >> 32) ^ d ^ k1, x & mask
            k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
        keys.append((a << 30) ^ b)
    return np.array(keys)


def test_a_sampling_run_and_a_critical_run_have_their_numbers_on_the_card(tmp_path):
    grey = [*images(tmp_path / "grey", 1), "--model", "resnet8", "--batchsize", "8"]
    short = ["--steps", "2", "--draws", "2", "--epochs", "1"]
    assert train(["--mode", "sampling", *grey, *short, "--out", str(tmp_path / "s")]) == 0
    _, text = hub(tmp_path / "s", tmp_path / "net")
    (point,) = fs.load_run(tmp_path / "s").noise["points"]
    for what, key in (("C2, from drawn", "c2_sampled"), ("norm of the noise", "noise_norm")):
        row = row_of(text, what)
        assert row[0].endswith("batch 8") and row[3:] == [point["se_over"], "2"]
        assert row[1] == f"{point[key]:.4g}"
        assert float(row[2]) == pytest.approx(point[f"{key}_se"], rel=0.06)
    assert point["function"] in text
    # what was not measured is not there
    assert not {"test accuracy", "noise scale", "sharpness", "chosen"} & set(text.split())
    assert "model-index" not in front_matter(text) and "## Results" not in text

    levels = ["4", "2.3", "2.2", "2.1", "2", "0.001"]
    critical = ["--mode", "critical", "--eps", *levels, "--epochs", "2"]
    assert train([*critical, "--out", str(tmp_path / "c")]) == 0
    _, text = hub(tmp_path / "c", tmp_path / "net-c")
    found = fs.load_run(tmp_path / "c").critical["crossings"].items()
    crossed = {eps: at for eps, at in found if at and not at["censored"]}
    assert 0 < len(crossed) < len(levels)
    for eps in levels:
        rows = [row for row in cells(text) if row[0].endswith(f"the gradient is at most {eps}")]
        at = crossed.get(eps)
        wanted = [(f"{at['samples']:,} samples", f"{at['step']}")] if at else []
        assert [(row[1], row[4]) for row in rows] == wanted


def test_a_card_without_measurements_has_none(runs, tmp_path):
    _, text = hub(runs["torchvision"], tmp_path / "net", "--weights", "last")
    assert "## Measured" not in text and "chosen on" not in text
    head = front_matter(text)
    assert head["library_name"] == "torchvision" and head["tags"][-1] == "fastsmooth"
    assert row_of(text, "data")[1] == "colour (npz), 40 training and 8 test images"
    # nothing of where it lay on this machine
    for name in ("README.md", "config.json", "model.json"):
        assert str(runs["torchvision"].parent) not in (tmp_path / "net" / name).read_text()
    assert "--data-dir DIR" in text


def test_of_a_network_of_own_code_the_card_says_that_it_is_not_there(runs, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs["grey"], out)
    config = json.loads((out / "config.json").read_text()) | {
        "model": "/home/me/my nets/net.py:Net"
    }
    (out / "config.json").write_text(json.dumps(config))
    model = fs.load_run(out, "last").model
    run = fs.load_run(out, "last")
    facts = dataclasses.replace(run.facts, network=config["model"])
    vars(run)["facts"] = facts
    folder = files_of(model, run, None)
    text = folder["README.md"].decode()
    assert "made by code that is not in this folder, net.py:Net: without it" in text
    assert 'fs.load_run(".", "model", trust_code=True)' in text and "--model net.py:Net" in text
    assert json.loads(folder["model.json"])["network"] == "net.py:Net"
    assert not any(b"/home/me" in data for name, data in folder.items() if "model.s" not in name)
    (*_, last) = loading.of_export(facts, "safetensors", "x.safetensors")
    assert last.endswith("# model: what Net of /home/me/my nets/net.py makes")


def test_what_others_wrote_in_a_run_is_no_markup(runs, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs["grey"], out)
    facts = json.loads((out / "model.json").read_text())
    facts["class_names"] = ["a|b", "<script>", "`c`\n# d", "e\u202e*f*"]
    (out / "model.json").write_text(json.dumps(facts))
    _, text = hub(out, tmp_path / "net")
    assert r"a\|b, \<script\>, \`c\` \# d, e" in text and "\u202e" not in text
    assert "\n# d" not in text


def test_the_hash_of_an_order_needs_a_number_of_images():
    assert order_hash(0, None) is order_hash(0, 0) is order_hash(0, "5") is order_hash(0, 1e3)
    assert order_hash(0, 10**15) is None and order_hash(0, True) is None
    assert order_hash(0, 5) != order_hash(1, 5)


# Pushing


class Api:
    """huggingface_hub.HfApi, as far as it is used."""

    calls: ClassVar[list] = []
    fails: ClassVar[Exception | None] = None

    def __init__(self, **about):
        pass

    def create_repo(self, repository, exist_ok=False):
        self.calls.append(("create", repository, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message):
        if self.fails:
            raise self.fails
        self.calls.append(("upload", repo_id, sorted(os.listdir(folder_path))))


def test_a_push_uploads_the_folder(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    out = str(tmp_path / "net")
    argv = [str(runs["timm"]), "--to", "hub", "--out", out, "--push", "me/net"]
    found = said(main, argv)
    assert found.code == 0
    assert found.out.splitlines()[-1] == "pushed to https://huggingface.co/me/net"
    assert Api.calls[0] == ("create", "me/net", True)
    assert Api.calls[1] == ("upload", "me/net", sorted(os.listdir(out)))
    assert (
        'timm.create_model("hf-hub:me/net", pretrained=True)' in Path(out, "README.md").read_text()
    )
    monkeypatch.setattr(Api, "fails", OSError("401 Client Error:\nInvalid token"))
    found = said(main, [*argv, "--overwrite"])
    assert found.code == 2 and len(found.err.splitlines()) == 1
    assert "--push me/net: 401 Client Error: Invalid token: the folder" in found.err
    assert sorted(os.listdir(tmp_path)) == ["net"] and len(os.listdir(out)) == 4


# Where it goes


def test_it_goes_into_the_run_folder_unless_it_is_said(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["grey"], run)
    for form, name in (("safetensors", "last.safetensors"), ("hub", "best-hub")):
        weights = name.partition(".")[0].removesuffix("-hub")
        assert main([str(run), "--to", form, "--weights", weights]) == 0
        assert (run / "export" / name).exists()
    assert find_runs([tmp_path]) == [run]  # the folder for the Hub is none
    assert refused(main, [str(run), "--to", "hub"]).endswith(
        "best-hub exists and is not empty: --overwrite replaces it, --out names another place"
    )
    (run / "export" / "best-hub" / "README.md").write_text("mine")
    assert main([str(run), "--to", "hub", "--overwrite"]) == 0
    assert "resnet8" in (run / "export" / "best-hub" / "README.md").read_text()
    before = (run / "export" / "last.safetensors").stat().st_mtime_ns
    argv = [str(run), "--to", "safetensors", "--weights", "last"]
    assert "last.safetensors exists: --overwrite" in refused(main, argv)
    assert (run / "export" / "last.safetensors").stat().st_mtime_ns == before
    assert main([*argv, "--overwrite"]) == 0
    assert sorted(os.listdir(run / "export")) == ["best-hub", "last.safetensors"]


def test_a_folder_is_whole_or_as_it_was(runs, tmp_path, monkeypatch):
    out = tmp_path / "net"
    hub(runs["grey"], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    written = []

    def failing(path, data, mode=0o666):
        written.append(path)
        if len(written) == 3:
            raise files.CannotWrite(28, "No space left on device", str(path))
        files.replace(path, data, mode)

    monkeypatch.setattr(work, "replace", failing)
    argv = [str(runs["grey"]), "--to", "hub", "--weights", "last", "--out", str(out)]
    found = said(main, [*argv, "--overwrite"])
    assert found.code == 74 and "No space left" in found.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["net"]


# Bad input


def damaged(folder: Path, name: str, change) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


BAD = {  # flags after RUN, what is done to the run before, words of the refusal
    "no form": ("", None, "--to is missing: give one of safetensors, onnx, torch-export, hub"),
    "a wrong form": ("--to tensorrt", None, "--to tensorrt"),
    "weights that are not there": (
        "--to onnx --weights epoch-9", None, "no weights 'epoch-9': it has best, last",
    ),
    "an ending": ("--to torch-export --out x.pt", None, "let it end in .pt2"),
    "no name": ("--to hub --out .", None, "--out .: name the file or folder"),
    "a push of a file": ("--to onnx --push a/b", None, "--push uploads the folder of --to hub"),
    "no repository": ("--to hub --push model", None, "named OWNER/NAME"),
    "a repository with a space": ("--to hub --push a/../b", None, "named OWNER/NAME"),
    "among the run's files": (
        "--to safetensors --out RUN/best.safetensors --overwrite", None, "the run's own files",
    ),
    "the run itself": ("--to hub --out RUN --overwrite", None, "is no export of fastsmooth"),
    "a folder of others": ("--to hub --out OTHER --overwrite", None, "it holds mine.txt"),
    "a model of others": ("--to hub --out MODEL --overwrite", None, "it has no model.json"),
    "a folder for a file": ("--to onnx --out OTHER/x.onnx", None, "is a folder or no file"),
    "a file for a folder": ("--to hub --out OTHER/mine.txt", None, "is a file: --to hub"),
    "below a file": ("--to hub --out OTHER/mine.txt/x", None, "choose another folder"),
    "no weights": (
        "--to hub", lambda f: [p.unlink() for p in f.glob("*.safetensors")], "it has none yet",
    ),
    "no model.json": ("--to hub", lambda f: (f / "model.json").unlink(), "the run has none"),
    "weights cut": (
        "--to onnx", lambda f: damaged(f, "best.safetensors", lambda b: b[:-9]), "or damaged",
    ),
    "weights of another network": (
        "--to safetensors",
        lambda f: damaged(f, "model.json", lambda b: b.replace(b"resnet8", b"resnet20")),
        "has not the weights of resnet20",
    ),
    "no such network": (
        "--to safetensors",
        lambda f: damaged(f, "model.json", lambda b: b.replace(b"resnet8", b"resnet8x")),
        "--model resnet8x",
    ),
    "a config that is damaged": (
        "--to hub", lambda f: (f / "config.json").write_text("{}"), "config.json is damaged",
    ),
    "no config": ("--to hub", lambda f: (f / "config.json").unlink(), "is not a run folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, spoil, words = BAD[case]
    shutil.copytree(runs["grey"], "RUN")
    Path("OTHER/x.onnx").mkdir(parents=True)
    Path("OTHER/mine.txt").write_text("mine")
    Path("MODEL").mkdir()
    for name in ("config.json", "README.md", "model.safetensors"):
        Path("MODEL", name).write_text("mine")
    if spoil:
        spoil(Path("RUN"))
    before = sorted(Path().rglob("*"))
    assert words in refused(main, ["RUN", *flags.split()])
    assert sorted(Path().rglob("*")) == before
    assert Path("MODEL/config.json").read_text() == "mine"


def test_no_run_and_no_flag_are_one_line(tmp_path):
    assert "no run is named" in refused(main, [])
    assert "not a run folder" in refused(main, [str(tmp_path), "--to", "hub"])
    assert "unexpected 'b'" in refused(main, ["a", "b", "--to", "hub"])
    assert "unknown flag --form" in refused(main, ["a", "--form", "onnx"])
    with pytest.raises(RunError):
        fs.load_run(tmp_path)


@pytest.mark.parametrize(
    "lacking, flags, words",
    [
        ("onnx", "--to onnx", "needs onnx: pip install 'fastsmooth[onnx]'"),
        ("onnxscript", "--to onnx", "needs onnxscript: pip install 'fastsmooth[onnx]'"),
        ("huggingface_hub", "--to hub --push a/b", "pip install 'fastsmooth[hub]'"),
    ],
)
def test_a_package_that_is_missing_is_named(lacking, flags, words, runs, monkeypatch):
    found = importlib.util.find_spec
    without = {lacking: lambda name: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: without.get(name, found)(name))
    assert refused(main, [str(runs["grey"]), *flags.split()]).endswith(words)


def test_weights_that_are_not_finite_make_no_graph(runs):
    run = fs.load_run(runs["grey"])
    run.model.head.weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match="not finite with these weights"):
        graphs.compared(run.model, run.model, run.facts, "itself")
