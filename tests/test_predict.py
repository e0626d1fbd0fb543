"""fastsmooth predict and load_run's model: what a trained network says of image files."""

import csv
import dataclasses
import io
import itertools
import json
import os
import pickle
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from said import ending, redirected, refused, said

import fastsmooth as fs
from fastsmooth import inference
from fastsmooth.predict import Named, main
from fastsmooth.runfolder.weights import write_weights
from fastsmooth.train import main as train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("predicting") / "run"
    flags = ["--epochs", "1", "--batchsize", "128", "--seed", "3"]
    assert train([*flags, "--out", str(out)]) == 0
    return out


rng = np.random.default_rng(1)


def image(size: tuple[int, int] = (12, 9)) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3)).astype(np.uint8))


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven images in two folders, one below the other."""
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for k in range(4):
        image().save(root / f"{k}.png")
    for k in range(3):
        image((30, 20)).save(root / "more" / f"{k}.jpg")
    (root / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return root


def expected(run: Path, paths: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and places of all classes, the likeliest first, an image at a time."""
    loaded = fs.load_run(run)
    logits = torch.cat([loaded.model(loaded.transform(path)[None]) for path in paths])
    return logits.double().softmax(dim=1).sort(dim=1, descending=True)


def test_a_line_a_file_says_what_it_is(run, images):
    paths = sorted(images.rglob("*.*g"))
    values, places = expected(run, paths)
    ended = said(main, [str(run), "images", "--device", "cpu"])
    assert ended.code == 0 and not ended.err
    lines = [line.split("  ") for line in ended.out.splitlines()]
    assert [line[0] for line in lines] == [str(path.relative_to(images.parent)) for path in paths]
    for (_, answer), p, k in zip(lines, values[:, 0].tolist(), places[:, 0].tolist(), strict=True):
        name, probability = answer.split()
        assert name == str(k) and float(probability) == pytest.approx(p, abs=6e-5)


@pytest.mark.parametrize("top", [1, 3, 99])
def test_the_forms_say_the_same(top, run, images):
    paths = [str(path) for path in sorted(images.rglob("*.*g"))]
    values, places = expected(run, [Path(path) for path in paths])
    argv = [str(run), *paths, "--top", str(top), "--device", "cpu"]
    rows = list(csv.reader(io.StringIO(said(main, [*argv, "--csv"]).out)))
    objects = [json.loads(line) for line in said(main, [*argv, "--json"]).out.splitlines()]
    width = min(top, 10)
    assert rows[0][:3] == ["path", "class", "probability"]
    assert rows[0][3:] == [
        f"{n}_{k}" for k in range(2, width + 1) for n in ("class", "probability")
    ]
    assert [row[0] for row in rows[1:]] == [each["path"] for each in objects] == paths
    for row, each, p, k in zip(rows[1:], objects, values.tolist(), places.tolist(), strict=True):
        assert row[1::2] == [str(place) for place in k[:width]]
        assert [float(x) for x in row[2::2]] == pytest.approx(p[:width], rel=1e-4, abs=1e-9)
        assert [pair["id"] for pair in each["likely"]] == row[1::2]
        found = [pair["probability"] for pair in each["likely"]]
        assert found == pytest.approx(p[:width], rel=1e-4, abs=1e-9)
        assert (each["class"], each["probability"]) == (row[1], found[0])
    text = said(main, argv).out.splitlines()
    assert [line.split("  ")[1:] for line in text] == [
        [f"{pair['class']} {pair['probability']:.4f}" for pair in each["likely"]]
        for each in objects
    ]


def test_files_and_flags_come_in_any_order(run, images):
    one = said(main, [str(run), "images/0.png", "images/more", "--top", "2", "--device", "cpu"])
    other = said(main, ["--device", "cpu", str(run), "images/0.png", "--top", "2", "images/more"])
    assert one == other and len(one.out.splitlines()) == 4


def listed(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def test_a_list_comes_from_standard_input(run, images, monkeypatch):
    listed(b"images/2.png\r\n\nimages/more/1.jpg", monkeypatch)
    ended = said(main, [str(run), "images/0.png", "-", "images/1.png", "--device", "cpu"])
    assert ended.code == 0
    names = [line.split("  ")[0] for line in ended.out.splitlines()]
    assert names == ["images/0.png", "images/2.png", "images/more/1.jpg", "images/1.png"]
    for nothing in (b"", b"\n\n"):
        listed(nothing, monkeypatch)
        assert "no image is named on standard input" in refused(main, [str(run), "-"])


def test_many_images_are_never_held(run, tmp_path, monkeypatch):
    """Of an endless list no more is read than a few batches before an answer."""
    image().save(tmp_path / "a.png")
    asked = 0

    def endless() -> Iterator[str]:
        nonlocal asked
        while True:
            asked += 1
            yield str(tmp_path / "a.png")

    answers = inference.predictions(fs.load_run(run), endless(), 1)
    for k in range(500):
        next(answers)
        assert asked <= k + 1 + 4 * inference.BATCH
    answers.close()


# Files that are no images, and names that are no names


def test_what_cannot_be_read_is_a_line_and_the_others_are_told(run, images):
    (images / "1.png").write_bytes(b"no image")
    (images / "more" / "0.jpg").write_bytes((images / "more" / "1.jpg").read_bytes()[:200])
    os.mkfifo(images / "pipe.png")
    ended = said(main, [str(run), "images", "images/gone.png", "--device", "cpu"])
    assert ended.code == 2 and len(ended.out.splitlines()) == 5
    lines = ended.err.splitlines()
    assert [line.split(": ")[2] for line in lines[:-1]] == [
        "images/1.png", "images/more/0.jpg", "images/pipe.png", "images/gone.png",
    ]  # fmt: skip
    assert lines[0].endswith("not an image that can be read")
    assert lines[2].endswith("it is a pipe, a socket or a device, not a file")
    assert lines[-1] == "fastsmooth: error: 4 of 9 images could not be read"


def test_a_batch_of_none_that_can_be_read_stops_nothing(run, images):
    """More unreadable files than a batch has, before one that is read."""
    for k in range(inference.BATCH + 5):
        (images / f"{k:03}.png").write_bytes(b"")
    ended = said(main, [str(run), "images", "--device", "cpu"])
    assert ended.code == 2 and len(ended.out.splitlines()) == 7


MODES = {
    "grey": ("L", "png"), "with alpha": ("RGBA", "png"), "grey with alpha": ("LA", "png"),
    "16 bits": ("I;16", "png"), "palette": ("P", "gif"), "CMYK": ("CMYK", "jpg"),
    "bilevel": ("1", "tif"), "float": ("F", "tif"),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_images_of_any_kind_are_predicted_from_files_and_from_memory(mode, run, tmp_path):
    kind, ending = MODES[mode]
    path = tmp_path / f"a.{ending}"
    if kind == "I;16":
        Image.fromarray(rng.integers(0, 65536, (9, 12)).astype(np.uint16)).save(path)
    elif kind == "F":
        Image.fromarray(rng.uniform(0, 300, (9, 12)).astype(np.float32)).save(path)
    else:
        image().convert(kind).save(path)
    loaded = fs.load_run(run)
    with Image.open(path) as stored:
        alone = loaded.predict(stored)[0].likely
        rgb = stored.convert("RGB")
        grey = dataclasses.replace(loaded.transform, mode="L")
        assert torch.equal(grey(stored), grey(path))
    assert loaded.predict(path)[0].likely == alone == loaded.predict(rgb)[0].likely
    ended = said(main, [str(run), str(path), "--top", "2", "--device", "cpu"])
    pairs = [f"{name} {probability:.4f}" for name, probability, _ in alone[:2]]
    assert ended.code == 0 and ended.out == "  ".join([str(path), *pairs]) + "\n"


def test_names_with_signs_are_quoted(run, tmp_path):
    names = ['a,b "c".png', "x\ny\x1b[31m.png", "caf\udce9.png", "é 猫.png", "-dash.png"]
    for name in names:
        image().save(tmp_path / name)
    argv = [str(run), "--device", "cpu"]
    ended = said(main, [*argv, "--csv", "--", *(str(tmp_path / name) for name in names)])
    assert ended.code == 0 and "\x1b" not in ended.out
    rows = list(csv.reader(io.StringIO(ended.out)))
    assert len(ended.out.splitlines()) == len(rows) == 6
    shown = ['a,b "c".png', "x\\x0ay\\x1b[31m.png", "caf\\xe9.png", "é 猫.png", "-dash.png"]
    assert [Path(row[0]).name for row in rows[1:]] == shown
    ended = said(main, [*argv, "--json", str(tmp_path)])
    assert {json.loads(line)["path"] for line in ended.out.splitlines()} == {
        str(tmp_path / name) for name in names
    }
    lines = said(main, [*argv, str(tmp_path)]).out.splitlines()
    assert len(lines) == 5 and any(line.startswith("$'") and "\\x0ay" in line for line in lines)


def test_a_class_with_a_comma_is_quoted(run, tmp_path):
    """As ImageNet has them."""
    copied, path = tmp_path / "run", tmp_path / "a.png"
    shutil.copytree(run, copied, ignore=shutil.ignore_patterns("checkpoints"))
    facts = json.loads((copied / "model.json").read_text())
    names = [f'class {k}, "of" digits' for k in range(10)]
    (copied / "model.json").write_text(json.dumps(facts | {"class_names": names}))
    image().save(path)
    assert fs.load_run(copied).classes == tuple(names)
    rows = list(csv.reader(io.StringIO(said(main, [str(copied), str(path), "--csv"]).out)))
    assert rows[1][1] in names
    (line,) = said(main, [str(copied), str(path), "--json"]).out.splitlines()
    likely = json.loads(line)["likely"][0]
    assert likely["class"] == rows[1][1] == names[int(likely["id"])]


REFUSED = {
    "nothing": ([], "no run is named"),
    "no files": (["RUN"], "no image is named"),
    "no run": (["nowhere", "a.png"], "nowhere is not a run folder"),
    "two forms": (["RUN", "a.png", "--csv", "--json"], "--csv and --json do not go together"),
    "no top": (["RUN", "a.png", "--top", "0"], "out of range"),
    "an unknown flag": (["RUN", "a.png", "--topk", "3"], "unknown flag --topk: did you mean --top"),
    "no such weights": (["RUN", "a.png", "--weights", "best-ema"], "has no weights 'best-ema'"),
    "no such device": (["RUN", "a.png", "--device", "cuda:9"], "--device cuda:9: this machine has"),
    "a file that is none": (["RUN", "gone.png"], "gone.png: No such file or directory"),
    "no image": (["RUN", "text.png"], "text.png: not an image that can be read"),
    "an empty image": (["RUN", "empty.png"], "empty.png: not an image"),
    "an empty folder": (["RUN", "folder"], "folder: no images are below it: looked for .bmp"),
    "a pipe": (["RUN", "pipe"], "pipe: it is a pipe"),
    "a link to itself": (["RUN", "link.png"], "link.png: Too many levels of symbolic links"),
    "a folder in a circle": (["RUN", "circle"], "leads back to a folder that it is in"),
    "a huge image": (["RUN", "huge.png"], "huge.png: the image is too large to decode safely"),
    "a thin image": (["RUN", "thin.png"], "one side over 4000 times the other"),
    "an unfinished run": (["UNFINISHED", "a.png"], "it has none yet"),
    "no model.json": (["NOMODEL", "a.png"], "model.json: the run has none"),
    "another network": (["OTHER", "a.png"], "has not the weights of resnet20"),
    "an unknown network": (["UNKNOWN", "a.png"], "did you mean resnet8?"),
}


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strange")
    image().save(folder / "a.png")
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "link.png").symlink_to("link.png")
    (folder / "circle").mkdir()
    (folder / "circle" / "again").symlink_to("..")
    Image.new("1", (10_000, 9_000)).save(folder / "huge.png", compress_level=1)
    Image.new("1", (9_000, 2)).save(folder / "thin.png")
    return folder


def spoiled(run: Path, kind: str, target: Path) -> Path:
    ignored = ["checkpoints", *["*.safetensors"] * (kind == "UNFINISHED")]
    shutil.copytree(run, target, ignore=shutil.ignore_patterns(*ignored))
    path = target / "model.json"
    networks = {"OTHER": "resnet20", "UNKNOWN": "resnet-8"}
    if kind == "NOMODEL":
        path.unlink()
    elif kind in networks:
        path.write_text(path.read_text().replace("resnet8", networks[kind]))
    return target


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_done_is_one_line(fault, run, strange, tmp_path, monkeypatch):
    monkeypatch.chdir(strange)
    argv, words = REFUSED[fault]
    kinds = ("UNFINISHED", "NOMODEL", "OTHER", "UNKNOWN")
    places = {kind: spoiled(run, kind, tmp_path / "run") for kind in kinds if kind in argv}
    assert words in refused(main, [str((places | {"RUN": run}).get(word, word)) for word in argv])


def test_a_reader_that_had_enough_ends_it(run, tmp_path, monkeypatch):
    """fastsmooth predict ... | head -1, of an endless list."""
    image().save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    monkeypatch.setattr(Named, "__iter__", lambda self: itertools.repeat(path))
    reader, writer = os.pipe()
    seen: list[bytes] = []

    def head() -> None:
        with open(reader, "rb") as stream:
            seen.append(stream.readline())

    thread = threading.Thread(target=head)
    thread.start()
    with open(writer, "w") as stream, redirected(stream, io.StringIO()):
        assert ending(main, [str(run), path, "--device", "cpu"]) == 0
    thread.join()
    assert seen[0].startswith(os.fsencode(path))


# From Python


def test_the_transform_is_that_of_a_torchvision_data_set(run, images):
    datasets = pytest.importorskip("torchvision.datasets")
    loaded = fs.load_run(run)
    assert pickle.loads(pickle.dumps(loaded.transform)) == loaded.transform
    (images / "0").mkdir()
    for path in images.glob("*.png"):
        path.rename(images / "0" / path.name)
    data = datasets.ImageFolder(images, transform=loaded.transform)
    batches = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2)
    x = torch.cat([x for x, _ in batches])
    assert torch.equal(x, torch.stack([loaded.transform(path) for path, _ in data.samples]))
    assert x.dtype == torch.float32 and x.shape == (7, 3, 8, 8)
    answers = loaded.predict(path for path, _ in data.samples)
    logits = loaded.model(x)
    assert [answer.name for answer in answers] == [str(k) for k in logits.argmax(dim=1).tolist()]


def test_many_images_are_predicted_in_their_order(run, tmp_path):
    loaded = fs.load_run(run)
    several = [image() for _ in range(2 * inference.BATCH + 7)]
    answers = loaded.predict(several, top=2)
    assert len(answers) == len(several) and loaded.predict([]) == []
    for k in (0, inference.BATCH - 1, inference.BATCH, len(several) - 1):
        alone = loaded.predict(several[k], top=2)[0]
        assert [each.name for each in alone.likely] == [each.name for each in answers[k].likely]
        assert alone.probability == pytest.approx(answers[k].probability, rel=1e-5)
    model = loaded.model
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_an_image_that_cannot_be_read_raises_from_python(run, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"a\.png: not an image that can be read: remove it"):
        fs.load_run(run).predict([image(), tmp_path / "a.png"])


@pytest.mark.parametrize("network", ["torchvision/mobilenet_v3_small", "timm/resnet10t"])
def test_others_load_the_weights_by_their_own_means(network, tmp_path):
    """As docs/use.md has it."""
    family, _, name = network.partition("/")
    library = pytest.importorskip({"torchvision": "torchvision.models"}.get(family, family))
    torch.manual_seed(0)
    model, path = fs.build_model(network, 7).eval(), tmp_path / "best.safetensors"
    write_weights(tmp_path, "best", model.state_dict(), {"epoch": 3})
    if family == "timm":
        other = library.create_model(name, num_classes=7, checkpoint_path=str(path))
    else:
        other = getattr(library, name)(num_classes=7)
        other.load_state_dict(load_file(path))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model(x))


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("gpu", "device: 'gpu' is not auto, cpu, cuda"),
        ("cuda:9", "device cuda:9: this machine has"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_words(device, words, run):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        _ = fs.load_run(run, device=device).model
    assert "--device cuda" not in str(error.value)


def test_no_class_cannot_be_asked_for(run):
    with pytest.raises(ValueError, match="top is 0"):
        fs.load_run(run).predict(image(), top=0)
