"""fastsmooth evaluate: a model judged by images, against scikit-learn and the run itself."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from said import refused, said, seen
from sklearn import metrics

import fastsmooth as fs
from fastsmooth import evaluation
from fastsmooth.cli import config as configs
from fastsmooth.data import read_set
from fastsmooth.evaluate import lines, main
from fastsmooth.evaluation import Asked, Evaluation, Tally, evaluate, wilson
from fastsmooth.runfolder.weights import ModelFacts
from fastsmooth.train import main as train


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs on the digits, which leave errors."""
    out = tmp_path_factory.mktemp("judged") / "run"
    flags = ["--epochs", "2", "--batchsize", "128", "--keep", "all", "--seed", "3"]
    assert train([*flags, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images of the digits as class folders of PNG files."""
    root, split = tmp_path_factory.mktemp("digits"), read_set(configs.resolve({})).test
    for i, label in enumerate(split.labels.tolist()):
        (root / str(label)).mkdir(exist_ok=True)
        split.image(i).save(root / str(label) / f"{i:03}.png")
    return root


def found(argv: list[str]) -> dict:
    """What --json says."""
    ended = said(main, [*argv, "--json", "--device", "cpu"])
    assert ended.code == 0 and len(ended.out.splitlines()) == 1, ended
    return json.loads(ended.out)


NUMBERS = ("images", "accuracy", "loss", "top5", "confusion", "classes")


def test_on_its_own_images_a_run_is_judged_as_it_judged_itself(digits):
    rows = fs.load_run(digits).of_kind("epoch")
    for weights in ("epoch-1", "epoch-2", "last", "best"):
        numbers = found([str(digits), "--weights", weights])
        about = numbers["weights_about"]
        assert numbers["weights"] == f"{weights}.safetensors" and numbers["own_images"]
        row = rows[about["epoch"]]
        assert (numbers["accuracy"], numbers["images"]) == (row["test_acc"], 360)
        assert numbers["loss"] == pytest.approx(row["test_loss"], rel=1e-6)
        assert numbers["precision"] == row["precision"]
    best = max(rows, key=lambda row: row["test_acc"])
    assert found([str(digits)])["accuracy"] == best["test_acc"]


def test_the_numbers_are_those_of_scikit_learn(digits, tested):
    run = fs.load_run(digits, "epoch-1")
    paths = sorted(tested.rglob("*.png"))
    logits = run.model(torch.stack([run.transform(path) for path in paths])).double().numpy()
    y = np.array([int(path.parent.name) for path in paths])
    numbers = found([str(digits), "--data-dir", str(tested), "--weights", "epoch-1"])
    confusion = metrics.confusion_matrix(y, logits.argmax(axis=1), labels=range(10))
    assert 30 < np.trace(confusion) < 360  # there are errors to count
    assert numbers["confusion"] == confusion.tolist()
    assert numbers["accuracy"] == metrics.accuracy_score(y, logits.argmax(axis=1))
    assert numbers["top5"] == metrics.top_k_accuracy_score(y, logits, k=5)
    probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    assert numbers["loss"] == pytest.approx(metrics.log_loss(y, probabilities), rel=1e-5)
    recall = metrics.recall_score(y, logits.argmax(axis=1), average=None)
    assert [row["accuracy"] for row in numbers["classes"]] == recall.tolist()
    assert [row["images"] for row in numbers["classes"]] == np.bincount(y).tolist()
    assert (numbers["split"], numbers["own_images"]) == ("all", False)
    # the same images as the run's own
    own = found([str(digits), "--weights", "epoch-1"])
    assert own["loss"] == pytest.approx(numbers["loss"], rel=1e-6)
    assert all(own[name] == numbers[name] for name in NUMBERS if name != "loss")


def test_the_batch_size_changes_no_count(digits, tested):
    one, other = (
        found([str(digits), "--data-dir", str(tested), "-b", size]) for size in ("7", "360")
    )
    assert one["confusion"] == other["confusion"] and one["top5"] == other["top5"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_classes_are_matched_by_name_and_may_be_fewer(digits, tested, tmp_path):
    """Of two classes, whose numbers in the folder are others than the model's."""
    for name in ("7", "3"):
        shutil.copytree(tested / name, tmp_path / name)
    (tmp_path / "5").mkdir()  # of which there is no image
    numbers = found([str(digits), "--data-dir", str(tmp_path)])
    whole = found([str(digits)])
    for k, row in enumerate(numbers["classes"]):
        assert row == whole["classes"][k] if k in (3, 7) else row["accuracy"] is None
        wanted = whole["confusion"][k] if k in (3, 7) else [0] * 10
        assert numbers["confusion"][k] == wanted
    text = said(main, [str(digits), "--data-dir", str(tmp_path), "--device", "cpu"]).out
    assert "of 2 of the 10 classes" in text
    # one class alone
    shutil.rmtree(tmp_path / "7")
    alone = found([str(digits), "--data-dir", str(tmp_path), "--dataset", "folder"])
    assert alone["classes"][3] == whole["classes"][3]
    assert alone["images"] == whole["classes"][3]["images"]


PEOPLE = ["zero", "one", "two", "three", "four", "five", "six", "seven", "twin", "twin"]


@pytest.fixture
def with_people(digits, tmp_path) -> Path:
    """The run, whose classes people call by words, two of them by the same one."""
    run = tmp_path / "run"
    shutil.copytree(digits, run, ignore=shutil.ignore_patterns("checkpoints"))
    facts = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(facts | {"class_names": PEOPLE}))
    return run


def test_classes_may_be_named_as_people_call_them(with_people, tested, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(tested / "7", images / "seven")
    shutil.copytree(tested / "8", images / "8")  # as the data set calls it
    numbers = found([str(with_people), "--data-dir", str(images)])
    own = found([str(with_people)])
    assert [numbers["classes"][k] for k in (7, 8)] == [own["classes"][k] for k in (7, 8)]
    assert numbers["classes"][7]["name"] == "seven" and numbers["classes"][7]["id"] == "7"
    # a name that two classes have says which of them it is not
    shutil.move(images / "8", images / "twin")
    assert "class 'twin' is none of the run's" in refused(
        main, [str(with_people), "--data-dir", str(images)]
    )


def test_a_class_that_the_run_has_not_is_refused_or_left_out(with_people, tested, tmp_path):
    images = tmp_path / "images"
    for name, there in (("7", "sevn"), ("1", "one"), ("3", "lobster")):
        shutil.copytree(tested / name, images / there)
    argv = [str(with_people), "--data-dir", str(images)]
    words = refused(main, argv)
    assert "class 'lobster' and 1 more are none of the run's: it has 'zero', 'one'" in words
    shutil.rmtree(images / "lobster")
    assert "class 'sevn' is none of the run's: did you mean seven?" in refused(main, argv)
    numbers = found([*argv, "--ignore-unknown"])
    count = len(list((images / "sevn").iterdir()))
    assert numbers["left_out"] == count and numbers["images"] == len(os.listdir(images / "one"))
    text = said(main, [*argv, "--ignore-unknown", "--device", "cpu"]).out
    assert f"{count} images of unknown classes left out" in text
    shutil.rmtree(images / "one")
    assert "has no images of the run's classes" in refused(
        main, [*argv, "--ignore-unknown", "--dataset", "folder"]
    )


def test_a_folder_with_a_split_is_tested_on_its_test_images(digits, tested, tmp_path):
    for name in ("0", "1"):
        for i, path in enumerate(sorted((tested / name).iterdir())):
            target = tmp_path / ("train" if i < 5 else "val") / name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    parts = {
        part: found([str(digits), "--data-dir", str(tmp_path), *flags])
        for part, flags in {
            "": [], "test": ["--split", "test"], "train": ["--split", "train"],
            "all": ["--split", "all"],
        }.items()
    }  # fmt: skip
    assert parts[""] | {"split": ""} == parts["test"] | {"split": ""}
    assert parts["train"]["images"] == 10
    assert parts["all"]["images"] == 10 + parts["test"]["images"]
    sums = np.array(parts["train"]["confusion"]) + np.array(parts["test"]["confusion"])
    assert parts["all"]["confusion"] == sums.tolist()


def test_the_runs_training_images_are_judged_too(digits):
    numbers = found([str(digits), "--split", "train"])
    both = found([str(digits), "--split", "all"])
    assert (numbers["images"], both["images"]) == (1437, 1797)


def as_table(root: Path, images: dict[str, tuple[Path, str]]) -> None:
    """A csv whose rows are all for validation."""
    for name, (path, _) in images.items():
        shutil.copy(path, root / name)
    with open(root / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "split"])
        rows.writerows([name, label, "val"] for name, (_, label) in images.items())


def as_shards(root: Path, images: dict[str, tuple[Path, str]]) -> None:
    import tarfile

    with tarfile.open(root / "val-0.tar", "w") as tar:
        for name, (path, label) in images.items():
            tar.add(path, name)
            info = tarfile.TarInfo(name.replace(".png", ".cls"))
            info.size = len(label)
            tar.addfile(info, io.BytesIO(label.encode()))


def as_arrays(root: Path, images: dict[str, tuple[Path, str]]) -> None:
    """Grey, where the run has seen three channels."""
    pixels = [np.asarray(Image.open(path).convert("L")) for path, _ in images.values()]
    labels = [int(label) for _, label in images.values()]
    np.savez(root / "a.npz", test_images=np.stack(pixels), test_labels=np.array(labels))


FORMS = {"table": as_table, "webdataset": as_shards, "npz": as_arrays}


@pytest.mark.parametrize("form", FORMS)
def test_images_to_test_alone_come_in_any_form(form, digits, tested, tmp_path):
    """Without any to train on, and of some classes."""
    paths = [path for name in ("1", "4", "6") for path in sorted((tested / name).iterdir())]
    FORMS[form](tmp_path, {path.name: (path, path.parent.name) for path in paths})
    numbers = found([str(digits), "--data-dir", str(tmp_path)])
    whole = found([str(digits)])
    assert [numbers["classes"][k] for k in (1, 4, 6)] == [whole["classes"][k] for k in (1, 4, 6)]
    assert numbers["images"] == len(paths) and form in numbers["about_images"]


def test_a_named_data_set_is_read(digits):
    numbers = found([str(digits), "--dataset", "digits", "--split", "test"])
    own = found([str(digits)])
    assert not numbers["own_images"]
    assert all(numbers[name] == own[name] for name in NUMBERS if name != "loss")


# Runs on files


WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331"]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """JPEG, PNG and CMYK files of many sizes, of six classes of ImageNet."""
    root, rng = tmp_path / "photographs", np.random.default_rng(5)
    for part, count in (("train", 8), ("val", 5)):
        for k, wnid in enumerate(WNIDS):
            folder = root / part / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = (int(side) for side in rng.integers(33, 90, 2))
                coarse = rng.integers(0, 200, (5, 4, 3)) + 10 * k
                image = Image.fromarray(coarse.astype(np.uint8)).resize((width, height))
                if i == 1:
                    image.convert("CMYK").save(folder / f"{i}.jpg")
                elif i == 2:
                    image.convert("L").save(folder / f"{i}.png")
                else:
                    image.save(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
    return root


CROPS = ["--augment", "resized-crop-flip", "--loader", "threads"]
RUNS = {
    "threads": CROPS,
    "resident": ["--augment", "crop-flip", "--norm", "group"],
    "published": [*CROPS, "--dataset", "imagenet", "--compat", "original"],
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_on_files_is_judged_as_it_judged_itself(kind, photographs, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    flags = ["--model", "resnet8", "--image-size", "32", "--epochs", "1", "--batchsize", "16"]
    flags += ["--data-dir", str(photographs), "--out", str(run), "--seed", "1"]
    assert train([*flags, *RUNS[kind]]) == 0
    row = fs.load_run(run).of_kind("epoch")[-1]
    own = found([str(run), "--weights", "last"])
    assert (own["accuracy"], own["images"]) == (row["test_acc"], 30)
    assert own["loss"] == pytest.approx(row["test_loss"], rel=1e-6)
    assert own["classes"][0]["name"].startswith("tench") and own["classes"][0]["id"] == WNIDS[0]
    there = found([str(run), "--weights", "last", "--data-dir", str(photographs)])
    assert there["own_images"] and there == own
    if kind == "published":  # whose test images are augmented
        return
    shutil.copytree(photographs, moved)
    numbers = found([str(run), "--weights", "last", "--data-dir", str(moved)])
    whole = found([str(run), "--weights", "last", "--data-dir", str(moved / "val")])
    assert all(whole[name] == numbers[name] for name in NUMBERS) and not numbers["own_images"]
    # from elsewhere they are decoded by Pillow, from which other decoders differ by a little
    near = 1e-6 if kind == "resident" else 1e-2
    assert numbers["loss"] == pytest.approx(row["test_loss"], rel=near)
    for images, given in ((photographs, []), (moved, ["--data-dir", str(moved)])):
        check_bad_images(run, images, given)


def check_bad_images(run: Path, images: Path, given: list[str]) -> None:
    """One that cannot be read is refused, or shown black and counted."""
    damaged = images / "val" / WNIDS[3] / "4.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    argv = [str(run), "--weights", "last", *given]
    assert str(damaged) in (words := refused(main, argv)) and "--on-bad-image zeros" in words
    numbers = found([*argv, "--on-bad-image", "zeros"])
    assert numbers["bad_images"] == 1 and numbers["images"] == 30
    ended = said(main, [*argv, "--on-bad-image", "zeros", "--device", "cpu"])
    assert str(damaged) in ended.err and "1 that could not be read, shown black" in ended.out
    loaded = fs.load_run(run, "last")
    paths = sorted((images / "val").rglob("*.*"))
    black = Image.new("RGB", (50, 40))
    x = torch.stack([loaded.transform(black if path == damaged else path) for path in paths])
    y = torch.tensor([WNIDS.index(path.parent.name) for path in paths])
    loss = torch.nn.functional.cross_entropy(loaded.model(x), y).item()
    assert numbers["loss"] == pytest.approx(loss, rel=1e-2)


def test_images_that_are_gone_are_said_to_be(photographs, tmp_path):
    run = tmp_path / "run"
    flags = ["--model", "resnet8", "--epochs", "1", "--batchsize", "16", "--image-size", "16"]
    assert train(["--data-dir", str(photographs), *flags, "--out", str(run)]) == 0
    photographs.rename(tmp_path / "moved")
    assert "no such directory" in refused(main, [str(run)])


def test_without_dali_what_it_decoded_is_decoded_otherwise_and_said(digits, monkeypatch):
    monkeypatch.setattr(evaluation, "chosen_loader", lambda run: "dali")
    monkeypatch.setattr(evaluation.dali, "available", lambda: False)
    remarks: list[str] = []
    result = evaluate(fs.load_run(digits), Asked(), remarks.append)
    assert "DALI, which is not installed here" in remarks[0] and result.tally.images == 360


# What is printed


def tally_of(confusion) -> Evaluation:
    tally = Tally(np.array(confusion), 0.5, None)
    return Evaluation(tally, False, "all", "folder", 0, 0, "8x8 pixels", "fp32")


class Named:
    """A run, as far as it is printed."""

    def __init__(self, names: list[str]):
        same = tuple(names)
        self.path, self.weights_path = Path("runs/x"), Path("best.safetensors")
        self.about_weights, self.config = {"epoch": 4}, {}
        std = (1.0,) * 3
        self.facts = ModelFacts("resnet8", "batch", 3, same, same, "RGB", 8, 8, std, std, 9)


def printed(names: list[str], confusion, room: int | None = None) -> str:
    from fastsmooth.evaluate import parse

    request = parse(["runs/x", "--data-dir", "there"])
    return "\n".join(lines(Named(names), request, tally_of(confusion), room))


def test_the_table_is_as_the_matrix_is():
    text = printed(["cat", "a longer name", "dog"], [[5, 1, 0], [0, 0, 0], [2, 3, 104]])
    rows = text.splitlines()
    assert rows[0] == "runs/x: best.safetensors of epoch 5, resnet8, 3 classes"
    assert rows[1].startswith("115 images of there, of 2 of the 3 classes, 8x8 pixels")
    low, high = (f"{share:.2%}" for share in wilson(109, 115))
    assert f"accuracy  94.78%: 109 of 115, 95 % interval {low} to {high}" in rows
    at = next(i for i, row in enumerate(rows) if row.startswith("confusion"))
    assert [row.split() for row in rows[at + 1 : at + 5]] == [
        ["1", "2", "3"], ["1", "cat", "5", "1", "."], ["2", "a", "longer", "name"],
        ["3", "dog", "2", "3", "104"],
    ]  # fmt: skip
    short = printed(["a", "b", "c"], [[5, 1, 0], [0, 0, 0], [2, 3, 104]]).splitlines()
    at = next(i for i, row in enumerate(short) if row.startswith("confusion"))
    assert [row.split() for row in short[at + 1 : at + 4]] == [
        ["a", "b", "c"], ["a", "5", "1", "."], ["c", "2", "3", "104"],
    ]  # fmt: skip
    assert [row.split()[:2] for row in rows[-2:]] == [["cat", "83.33%"], ["dog", "95.41%"]]


def test_many_classes_are_told_by_what_is_confused_most():
    names = [f"class {k}" for k in range(30)]
    confusion = np.diag(np.full(30, 50)).astype(int)
    confusion[7, 21], confusion[2, 3] = 40, 30
    confusion[11:25, 5] = 1
    text = printed(names, confusion)
    assert "confusion:" not in text
    first, second = text.split("the most frequent first\n")[1].splitlines()[:2]
    assert first.split() == ["class", "7", "taken", "for", "class", "21", "40", "of", "90"]
    assert second.split() == ["class", "2", "taken", "for", "class", "3", "30", "of", "80"]
    assert "and 6 more pairs of classes: --json has all" in text
    worst = text.split("the worst first\n")[1].splitlines()
    assert worst[0].split() == ["class", "7", "55.56%", "50", "of", "90"]
    assert worst[-1] == "  and 10 more of at least 100.00%: --json has all" and len(worst) == 21


def test_a_narrow_terminal_gets_what_fits():
    names = [f"a class of number {k}" for k in range(9)]
    confusion = np.diag(np.full(9, 5))
    confusion[2, 1] = 3
    assert "confusion: a row" in printed(names, confusion, 60)
    narrow = printed(names, confusion, 36)
    assert "confusion: a row" not in narrow and "taken for a class of number 1" in narrow


def test_names_are_shown_without_control_characters(digits):
    text = printed(["a\x1b[31mb", "猫" * 30], [[1, 0], [0, 1]])
    assert "\x1b" not in text and "a\\x1b[31mb" in text


def test_nothing_wrong_is_said_in_words():
    assert "no image is taken for one of another class" in printed(
        [f"{k} of many" for k in range(25)], np.diag(np.full(25, 5))
    )


def test_the_interval_is_wilsons():
    stats = pytest.importorskip("scipy.stats")
    for correct, count in ((0, 1), (1, 1), (7, 10), (359, 360), (0, 500), (123_456, 200_000)):
        expected = stats.binomtest(correct, count).proportion_ci(0.95, "wilson")
        assert wilson(correct, count) == pytest.approx(tuple(expected), abs=1e-12)


def test_weights_that_are_no_numbers_are_judged_as_they_are():
    """A loss that is none is null, and JSON that any program reads."""
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, float("nan"))
    x, y = torch.ones(4, 3), torch.tensor([0, 1, 1, 1])
    tally = evaluation.judged(model, iter([(x, y)]), 2, "fp32")
    assert tally.images == 4 and not np.isfinite(tally.loss)


def test_a_terminal_shows_it(digits, tested):
    ended = seen(main, [str(digits), "--data-dir", str(tested), "--device", "cpu"], 70)
    assert ended.code == 0 and ended.widest <= 70
    assert any(line.startswith("accuracy  ") for line in ended.lines)


def test_from_python_it_is_a_function(digits):
    remarks: list[str] = []
    result = evaluate(fs.load_run(digits), Asked(), remarks.append)
    assert result.tally.images == 360 and result.own and not remarks


# What is refused


def broken(run: Path, name: str, target: Path) -> Path:
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("checkpoints"))
    path = target / name
    path.write_bytes(path.read_bytes()[:50])
    return target


REFUSED = {
    "no run": (["nowhere"], "nowhere is not a run folder"),
    "no words": ([], "no run is named"),
    "two runs": (["a", "b"], "2 runs are named"),
    "labels of nothing": (["RUN", "--labels", "x.csv"], "--labels"),
    "no folder": (["RUN", "--data-dir", "nowhere"], "--data-dir nowhere: no such directory"),
    "an empty folder": (["RUN", "--data-dir", "EMPTY"], "is none of the forms"),
    "no images": (["RUN", "--data-dir", "EMPTY", "--dataset", "folder"], "no images"),
    "no such weights": (["RUN", "--weights", "epoch-9"], "has no weights 'epoch-9': it has best"),
    "a path as weights": (["RUN", "--weights", "../x"], "has no weights '../x'"),
    "no split": (["RUN", "--data-dir", "IMAGES", "--split", "test"], "have no split"),
    "no such split": (["RUN", "--split", "val"], "--split val"),
    "no device": (["RUN", "--device", "cuda:7"], "--device cuda:7: this machine has"),
    "a batch of none": (["RUN", "-b", "0"], "out of range"),
    "model.json cut": (["NOMODEL"], "model.json: it is damaged"),
    "config.json cut": (["NOCONFIG"], "its config.json is damaged"),
    "weights cut": (["NOWEIGHTS", "--weights", "best"], "best.safetensors is no safetensors file"),
    "unfinished": (["UNFINISHED"], "it has none yet"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_judged_is_one_line(fault, digits, tested, tmp_path, monkeypatch):
    argv, words = REFUSED[fault]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"RUN": digits, "IMAGES": tested, "EMPTY": tmp_path / "empty"}
    cut = {"NOMODEL": "model.json", "NOCONFIG": "config.json", "NOWEIGHTS": "best.safetensors"}
    for name in argv:
        if name in cut:
            places[name] = broken(digits, cut[name], tmp_path / "run")
    if "UNFINISHED" in argv:
        ignored = shutil.ignore_patterns("checkpoints", "*.safetensors")
        places["UNFINISHED"] = Path(shutil.copytree(digits, tmp_path / "run", ignore=ignored))
    line = refused(main, [str(places.get(word, word)) for word in argv])
    assert words in line
