"""Images with a csv or json of their names and labels."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from images import LOADERS, noise, one_line, opened, solid, tree
from said import refused

from fastsmooth import data
from fastsmooth.cli.config import resolve
from fastsmooth.data import DataError
from fastsmooth.data.layouts import table
from fastsmooth.train import main


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


ANIMALS = ("ant", "bee", "cat")


def animal(k: int) -> str:
    return ANIMALS[k % 3]


def images(where: str = "images/", count: int = 30) -> Path:
    return tree(Path("set"), {f"{where}{k:02}.png": solid((k, 9, 9)) for k in range(count)})


def write(name: str, content: str | bytes | list | dict) -> None:
    path = Path("set", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list | dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def rows(name=lambda k: f"{k:02}.png", label=animal, count: int = 30) -> list[tuple]:
    return [(name(k), label(k)) for k in range(count)]


def as_csv(pairs, header: str = "file,label\n") -> str:
    return header + "".join(f"{name},{label}\n" for name, label in pairs)


def read(**given):
    return data.read_set(resolve({"data_dir": "set"} | given))


def labelled(found) -> dict[str, str]:
    """The class of every image, by its number."""
    return {
        Path(path).stem: found.classes[label]
        for split in (found.train, found.test)
        for path, label in zip(split.files.names, split.labels.tolist(), strict=True)
    }


EXPECTED = {f"{k:02}": animal(k) for k in range(30)}
FORMS = {  # file: its content
    "comma": ("labels.csv", as_csv(rows())),
    "semicolon": ("labels.csv", as_csv(rows()).replace(",", ";")),
    "tab": ("labels.tsv", as_csv(rows()).replace(",", "\t")),
    "windows": ("labels.csv", "\ufeff" + as_csv(rows()).replace("\n", "\r\n")),
    "no header": ("labels.csv", as_csv(rows(), "")),
    "quoted": ("labels.csv", 'image,note,class\n' + "".join(
        f'{n},"two\nlines, and a comma",{c}\n' for n, c in rows())),
    "other columns": ("train.csv", "id,width,species\n" + "".join(
        f"{k:02},{k},{animal(k)}\n" for k in range(30))),
    "one hot": ("ground_truth.csv", "image,ant,bee,cat\n" + "".join(
        f"{k:02},{float(k % 3 == 0)},{float(k % 3 == 1)},{float(k % 3 == 2)}\n"
        for k in range(30))),
    "shuffled": ("labels.csv", as_csv(rows()[::-1])),
    "paths from the folder": ("labels.csv", as_csv(rows(lambda k: f"images/{k:02}.png"))),
    "paths from elsewhere": ("labels.csv", as_csv(rows(lambda k: f"/data/x/{k:02}.png"))),
    "paths of windows": ("labels.csv", as_csv(rows(lambda k: f"C:\\data\\{k:02}.png"))),
    "no endings": ("labels.csv", as_csv(rows(lambda k: f"{k:02}"))),
    "json by name": ("labels.json", dict(rows())),
    "json pairs": ("labels.json", [list(row) for row in rows()]),
    "json objects": ("labels.json", [{"file_name": n, "label": c} for n, c in rows()]),
    "json lines": ("images/metadata.jsonl", "".join(
        json.dumps({"file_name": n, "label": c}) + "\n" for n, c in rows())),
    "metadata": ("images/metadata.csv", as_csv(rows(), "file_name,label\n")),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_every_image_its_class(form):
    images()
    write(*FORMS[form])
    found = read(val_share=0.3)
    assert labelled(found) == EXPECTED and found.classes == ANIMALS
    assert found.layout == "table" and Path(FORMS[form][0]).name in found.about
    for split in (found.train, found.test):  # as class folders would list them
        keys = list(zip(split.labels.tolist(), split.files.names, strict=True))
        assert keys == sorted(keys) and len(keys) > 3


def test_numbers_are_classes_in_their_order():
    images()
    for label in (lambda k: k % 11, lambda k: f"{k % 11}.0", lambda k: f"0{k % 11}"[-2:]):
        write("labels.csv", as_csv(rows(label=label)))
        found = read(val_share=0.2)
        assert [int(name) for name in found.classes] == list(range(11))
        assert {int(c) for c in labelled(found).values()} == set(range(11))
    write("labels.json", [{"image": n, "target": int(n[:2]) % 11} for n, _ in rows()])
    Path("set/labels.csv").unlink()
    assert labelled(read(val_share=0.2)) == {f"{k:02}": str(k % 11) for k in range(30)}


def test_a_column_says_the_split(here):
    images()
    part = lambda k: ("Train", "validation", "test")[0 if k < 20 else 1 if k < 26 else 2]  # noqa: E731
    lines = [f"{k:02}.png,{animal(k)},{part(k)}\n" for k in range(30)]
    write("labels.csv", "file,label,split\n" + "".join(lines))
    found = read()
    assert len(found.train) == 20 and len(found.test) == 6
    assert [line for line in found.remarks if "left out are those of test: 4" in line]
    assert labelled(found) == {k: c for k, c in EXPECTED.items() if int(k) < 26}
    with pytest.raises(DataError, match="says which images are for testing already: leave"):
        read(val_share=0.1)


def test_a_file_a_part_of_the_split():
    images("train_images/", 24)
    tree(Path("set"), {f"val_images/{k:02}.png": solid() for k in range(24, 30)})
    write("train.csv", as_csv(rows()[:24]))
    write("val.csv", as_csv(rows()[24:]))
    found = read()
    assert labelled(found) == EXPECTED and (len(found.train), len(found.test)) == (24, 6)
    assert "labels from train.csv and val.csv" in found.about


def test_what_a_contest_ships_without_labels_is_left_out_and_said():
    images("train/", 24)
    tree(Path("set"), {f"test/{k:02}.png": solid() for k in range(24, 30)})
    write("train.csv", as_csv(rows()[:24], "id,breed\n"))
    write("test.csv", "id\n" + "".join(f"{k:02}\n" for k in range(24, 30)))
    write("sample_submission.csv", "id,breed\n24,ant\n")
    found = read(val_share=0.3)
    assert len(labelled(found)) == 24
    assert "set/test.csv: no column of labels: it is left out" in found.remarks
    assert "set: images that no row names are left out: 6" in found.remarks


def test_labels_names_the_file_and_its_columns():
    images()
    text = "a,b,c\n" + "".join(f"{k:02}.png,{k},{animal(k)}\n" for k in range(30))
    write("one.csv", text)
    write("two.csv", as_csv(rows()))
    with pytest.raises(DataError, match=r"several tables \(one.csv, two.csv\): say which"):
        read(val_share=0.3)
    assert labelled(read(val_share=0.3, labels="two.csv")) == EXPECTED
    assert labelled(read(val_share=0.3, labels="one.csv:a,c")) == EXPECTED
    assert labelled(read(val_share=0.3, labels="set/one.csv:a,c")) == EXPECTED
    with pytest.raises(DataError) as error:
        read(val_share=0.3, labels="one.csv")
    assert "which column has the names? Say so with --labels one.csv:NAME,LABEL" in one_line(error)


@pytest.mark.parametrize(("loader", "workers"), LOADERS)
def test_a_table_gives_what_class_folders_give(cifar_folder, loader, workers, here):
    """The same images, flat with shuffled rows, in the same order with the same pixels."""
    kinds = sorted(path.name for path in (cifar_folder / "train").iterdir())[:3]
    lines = []
    for part in ("train", "test"):
        for kind in kinds:
            for k, path in enumerate(sorted((cifar_folder / part / kind).iterdir())[:10]):
                for place in (f"folders/{part}/{kind}", f"set/{part}"):
                    target = Path(place, f"{kind}-{k}.png")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
                lines.append((f"{part}/{kind}-{k}.png", kind, part))
    order = np.random.default_rng(1).permutation(len(lines))
    with Path("set/all.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *(lines[i] for i in order)])
    given = {"augment": "crop-flip", "seed": 3, "image_size": 32}
    a = opened(loader, workers, dataset="folder", data_dir="folders", **given)
    b = opened(loader, workers, dataset="table", data_dir="set", **given)
    for one, other in ((a.train, b.train), (a.test, b.test)):
        for epoch in (None, 1):
            index = [part for part in np.split(np.arange(30), [7, 8, 20])]
            for (x, y), (u, v) in zip(
                one.batches(map(torch_of, index), epoch),
                other.batches(map(torch_of, index), epoch),
                strict=True,
            ):
                assert x.equal(u) and y.equal(v)


def torch_of(index: np.ndarray):
    import torch

    return torch.from_numpy(index)


GOOD = as_csv(rows())
FAULTS = {  # what lies there, flags: words of the refusal
    "no table": ({}, {"dataset": "table"}, "no csv or json of names and labels"),
    "no images": ({"labels.csv": GOOD, "images": None}, {"dataset": "table"}, "has no images"),
    "a row without a file": ({"labels.csv": GOOD + "99.png,ant\n"}, {},
        "labels.csv, line 32: there is no image '99.png' in set: add it"),
    "many rows without files": ({"labels.csv": as_csv(rows(count=40))}, {},
        "line 32: there is no image '30.png' in set (nor 9 more)"),
    "a name twice": ({"labels.csv": GOOD + "00.png,bee\n"}, {},
        "line 32: '00.png' is the image of line 2: name each once"),
    "an image in two files": ({"train.csv": GOOD, "val.csv": as_csv(rows()[:1])}, {},
        "val.csv, line 2: '00.png' is the image of line 2 of train.csv"),
    "a name for two images": ({"labels.csv": GOOD, "images": None,
        **{f"i/a/{k:02}.png": solid() for k in range(30)}, "i/b/00.png": solid()}, {},
        "'00.png' could be set/i/a/00.png or set/i/b/00.png"),
    "a missing label": ({"labels.csv": GOOD.replace("03.png,ant", "03.png,")}, {},
        "labels.csv, line 5: no label: fill it in"),
    "pandas' missing label": ({"labels.csv": GOOD.replace("03.png,ant", "03.png,nan")}, {},
        "labels.csv, line 5: no label: fill it in"),
    "a missing name": ({"labels.csv": GOOD + ",ant\n"}, {}, "line 32: no name: fill it in"),
    "a short row": ({"labels.csv": GOOD + "99.png\n"}, {},
        "line 32: it has 1 columns, the first line 2: mend it"),
    "one column": ({"labels.csv": "file\n00.png\n"}, {}, "which column has the labels?"),
    "unknown columns": ({"labels.csv": "a,b,c\n00.png,x,y\n"}, {},
        "which column has the names? Say so with --labels labels.csv:NAME,LABEL (it has a, b, c)"),
    "labels that all differ": ({"labels.csv": as_csv(rows(label=lambda k: f"c{k}"))}, {},
        "all of its 30 labels differ: which column has the classes?"),
    "real numbers": ({"labels.csv": as_csv(rows(label=lambda k: f"{k % 3}.25"))}, {},
        "the label 0.25 is a number but no class"),
    "one class": ({"labels.csv": as_csv(rows(label=lambda k: "ant"))}, {}, "1 classes"),
    "an empty table": ({"labels.csv": ""}, {}, "labels.csv: it is empty: fill it in"),
    "a header alone": ({"labels.csv": "file,label\n"}, {}, "has no rows"),
    "not text": ({"labels.csv": b"\xff\xfe\x00\x01"}, {}, "labels.csv: it is not UTF-8"),
    "NUL characters": ({"labels.csv": GOOD + "\0\0,ant\n"}, {}, "labels.csv"),
    "not json": ({"labels.json": "{'00.png': 1}"}, {}, "labels.json: not json that can be read"),
    "deep json": ({"labels.json": "[" * 100_000}, {}, "labels.json: not json that can be read"),
    "json of something else": ({"labels.json": {"images": [1, 2], "annotations": []}}, {},
        "labels.json"),
    "a json number": ({"labels.json": "3"}, {}, "bring it to one of these forms"),
    "several labels": ({"labels.json": [{"file_name": "00.png", "label": [1, 2]}]}, {},
        "line 1: several labels of one image"),
    "json lines that are no objects": ({"labels.jsonl": "[1]\n"}, {},
        "labels.jsonl, line 1: it is no object"),
    "half a split": ({"labels.csv": "file,label,split\n00.png,ant,train\n01.png,bee,\n"
        "02.png,cat,train\n03.png,ant,\n"}, {}, "2 rows say nothing of the split"),
    "an unknown part": ({"labels.csv": "file,label,split\n00.png,ant,extra\n"}, {},
        "line 2: 'extra' is no part of a split"),
    "no test rows": ({"labels.csv": "file,label,split\n" + "".join(
        f"{n},{c},train\n" for n, c in rows())}, {"val_share": None}, "no row is for test"),
    "a class that is only tested": ({"train.csv": as_csv(rows()[:20]),
        "val.csv": as_csv(rows(label=lambda k: "dog")[20:])}, {"val_share": None},
        "20.png is of class 'dog', which no training image has"),
    "no split and no share": ({"labels.csv": GOOD}, {"val_share": None},
        "no split into training and test images: hold some out with --val-share 0.1"),
    "a share that leaves nothing": ({"labels.csv": GOOD}, {"val_share": 1e-9},
        "leaves no test images"),
    "a file of labels that is not there": ({"labels.csv": GOOD}, {"labels": "other.csv"},
        "--labels other.csv: no such file in set"),
    "a column that is not there": ({"labels.csv": GOOD}, {"labels": "labels.csv:file,kind"},
        "has no column 'kind': choose from file, label"),
    "an image that is none": ({"labels.csv": GOOD, "images/00.png": b"no image"}, {},
        "images/00.png: not an image that can be read"),
    "a hostile name": ({"labels.csv": GOOD + "../../etc/passwd.png,ant\n"}, {},
        "there is no image '../../etc/passwd.png' in set"),
    "escape sequences": ({"labels.csv": GOOD + "\x1b[2J.png,ant\n"}, {},
        r"there is no image '\x1b[2J.png' in set"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_table_that_disagrees_is_refused_in_one_line(name):
    files, given, words = FAULTS[name]
    if "images" not in files:
        images()
    else:
        Path("set").mkdir()
    for path, content in files.items():
        if isinstance(content, str | bytes | list | dict):
            write(path, content)
        elif content is not None:
            tree(Path("set"), {path: content})
    flags = {"val_share": 0.3, "image_size": 32} | given
    with pytest.raises(DataError) as error:
        opened("resident", data_dir="set", **{k: v for k, v in flags.items() if v is not None})
    assert words in one_line(error)


def test_a_refusal_ends_the_command_with_2():
    images()
    write("labels.csv", GOOD + "99.png,ant\n")
    assert "line 32: there is no image '99.png'" in refused(
        main, ["--data-dir", "set", "--val-share", "0.2"]
    )
    assert refused(main, ["--dataset", "folder", "--labels", "x.csv"]).startswith(
        "--labels has no effect with --dataset folder"
    )


def test_images_in_folders_of_one_name_are_told_apart_by_their_paths():
    tree(Path("set"), {f"images/{c}/{k}.png": noise() for c in "ab" for k in range(10)})
    pairs = [(f"{c}/{k}.png", c.upper()) for c in "ab" for k in range(10)]
    write("labels.csv", as_csv(pairs))
    found = read(val_share=0.3)
    names = [*found.train.files.names, *found.test.files.names]
    assert len(set(names)) == 20 and found.classes == ("A", "B")
    for split in (found.train, found.test):
        for path, label in zip(split.files.names, split.labels.tolist(), strict=True):
            assert Path(path).parent.name == "ab"[label]


def test_what_counts_as_a_table_is_seen_without_reading_it(monkeypatch):
    images()
    write("labels.csv", GOOD)
    monkeypatch.setattr(table, "records_of", lambda path: pytest.fail("it was read"))
    assert table.sign(Path("set")) == "labels in labels.csv"


def test_a_table_means_the_folder_of_its_part_of_the_split(here):
    """A contest as it is downloaded: both folders have files of the same names."""
    images("train/", 12)
    images("test/", 12)
    write("train.csv", as_csv(rows(count=12), "id,label\n"))
    found = read(val_share=0.3)
    names = [*found.train.files.names, *found.test.files.names]
    assert {Path(name).parent.name for name in names} == {"train"} and len(names) == 12
    images("val/", 6)
    write("val.csv", as_csv(rows(count=6), "id,label\n"))
    found = read()
    assert {Path(name).parent.name for name in found.test.files.names} == {"val"}
    assert len(found.train) == 12 and len(found.test) == 6


def test_two_folders_that_would_do_are_refused(here):
    images("one/", 12)
    images("two/", 12)
    write("labels.csv", as_csv(rows(count=12)))
    with pytest.raises(DataError, match=r"'00.png' could be set/one/00.png or set/two/00.png"):
        read(val_share=0.3)


def test_a_name_alone_is_none_of_another_part_of_the_split(here):
    images("test/", 12)
    write("labels.csv", as_csv(rows(lambda k: f"train/{k:02}.png", count=12)))
    with pytest.raises(DataError, match=r"there is no image 'train/00.png' in set \(nor 11 more\)"):
        read(val_share=0.3)


def test_classes_have_one_order_whatever_the_hashes_of_their_names():
    labels = ["1", "01", "001", "2", "0", "00"]
    for order in (labels, labels[::-1]):
        assert table.named(order) == ("0", "00", "001", "01", "1", "2")
    assert table.named(["b", "a", "10", "9"]) == ("10", "9", "a", "b")


def test_labels_decide_what_a_folder_is(here):
    tree(Path("set"), {f"{c}/{k}.png": noise() for c in "ab" for k in range(10)})
    write("more/labels.csv", as_csv([(f"{c}/{k}.png", c + c) for c in "ab" for k in range(10)]))
    assert read(val_share=0.3, labels="more/labels.csv").classes == ("aa", "bb")
    with pytest.raises(DataError, match=r"--labels no\.csv: no such file"):
        read(val_share=0.3, labels="no.csv")
    with pytest.raises(DataError, match="name both columns, FILE:NAME,LABEL"):
        read(val_share=0.3, labels="labels.csv:photo")


def test_a_column_of_the_split_is_no_label(here):
    images()
    write("labels.csv", as_csv(rows(label=lambda k: "test" if k > 20 else "train"), "file,split\n"))
    with pytest.raises(DataError, match="which column has the labels"):
        read()


def test_json_lines_end_where_lines_end(here):
    images()
    lines = [{"file_name": n, "label": c, "note": "one\u2028two\x85"} for n, c in rows()]
    write("labels.jsonl", "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in lines))
    assert labelled(read(val_share=0.3)) == EXPECTED
