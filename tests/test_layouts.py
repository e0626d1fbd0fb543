"""Folders without a split, and how a folder tells what it is."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encoded, noise, one_line, opened, solid, tree
from rows import read_rows
from said import refused, said

from fastsmooth import data
from fastsmooth.cli.config import resolve
from fastsmooth.data import DataError, sets
from fastsmooth.data.layouts.common import held_out
from fastsmooth.train import main


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(root: Path | str = "images", **given):
    return data.read_set(resolve({"data_dir": str(root)} | given))


def names(split, root: Path | str = "images") -> list[str]:
    return [os.path.relpath(path, root) for path in split.files.names]


def classes(count: int = 40, where: str = "", kinds: str = "abc") -> dict:
    return {f"{where}{c}/{k:02}.png": solid((k, 9, 9)) for c in kinds for k in range(count)}


# A share held out


def test_a_share_of_class_folders_is_held_out_and_the_rest_is_trained_on():
    tree(Path("images"), classes())
    whole = sorted(classes())
    found = read(val_share=0.3)
    train, test = names(found.train), names(found.test)
    assert sorted(train + test) == whole and 20 < len(test) < 52
    # by class, then by name
    assert train == sorted(train) and test == sorted(test)
    assert found.train.labels.tolist() == ["abc".index(name[0]) for name in train]
    assert found.layout == "folder"
    words = f"{len(test)} of 120 images held out (--val-share 0.3)"
    assert found.about == f"--dataset folder: 3 folders of images; {words}"


def test_added_and_removed_images_leave_the_others_where_they_are():
    tree(Path("images"), classes())
    before = set(names(read(val_share=0.3).test))
    tree(Path("images"), classes(60))
    more = set(names(read(val_share=0.3).test))
    assert before < more and {n for n in more if int(n[2:4]) < 40} == before
    for name in sorted(before)[:5]:
        Path("images", name).unlink()
    assert set(names(read(val_share=0.3).test)) == more - set(sorted(before)[:5])


def test_a_larger_share_holds_out_all_that_a_smaller_one_does():
    tree(Path("images"), classes())
    shares = [set(names(read(val_share=share).test)) for share in (0.1, 0.3, 0.9)]
    assert shares[0] < shares[1] < shares[2]


def test_the_share_is_what_it_says_and_does_not_follow_the_names():
    # 5 deviations of 20,000 draws
    for prefix in ("", "n0144/", "é/"):
        share = held_out([f"{prefix}{k}.png" for k in range(20_000)], 0.1).mean()
        assert abs(share - 0.1) < 5 * (0.09 / 20_000) ** 0.5


def test_train_without_a_test_folder_may_be_shared_out_and_one_with_it_not():
    tree(Path("images"), classes(where="train/"))
    assert len(read(val_share=0.3, dataset="folder").train) > 60
    with pytest.raises(DataError, match=r"has no val/ or test/.*--val-share 0.1 holds out"):
        read(dataset="folder")
    tree(Path("images"), {"val/a/0.png": solid()})
    with pytest.raises(DataError, match="has val/ to test on already: leave --val-share out"):
        read(val_share=0.3, dataset="folder")


def test_a_share_goes_on_where_it_was(here):
    tree(Path("images"), {f"{c}/{k}.png": noise((8, 8)) for c in "ab" for k in range(30)})
    run = ["--data-dir", "images", "--val-share", "0.3", "--model", "resnet8", "--epochs", "2"]
    run += ["--batchsize", "8", "--device", "cpu", "--image-size", "8", "--loader", "threads"]
    assert said(main, [*run, "--out", "whole"]).code == 0
    assert said(main, [*run, "--out", "parts", "--max-time", "1e-9"]).code == 75
    assert said(main, ["--resume", "--out", "parts", "--max-time", "1h", *run]).code == 0
    whole, parts = (
        [(r["train_loss"], r["test_loss"]) for r in read_rows(Path(out)) if r["kind"] == "epoch"]
        for out in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 2
    again = said(main, ["--resume", "--out", "parts", "--val-share", "0.5"])
    assert again.code == 2 and "has --val-share 0.3, not 0.5" in again.err


# Recognised


def test_class_folders_are_recognised_with_and_without_a_split_and_said():
    tree(Path("images"), classes(3, "train/") | classes(1, "val/"))
    assert read().about == "--dataset folder: train/ of class folders"
    tree(Path("whole"), classes(9))
    assert read("whole", val_share=0.5).about.startswith("--dataset folder: 3 folders of images")
    with pytest.raises(DataError, match="has no train/"):
        read("whole")


def test_the_run_says_what_it_took_the_folder_for_and_keeps_that(here):
    tree(Path("images"), classes(4, "train/") | classes(1, "val/"))
    flags = ["--data-dir", "images", "--max-time", "1e-9", "--out", "run", "--device", "cpu"]
    flags += ["--batchsize", "4", "--model", "resnet8", "--image-size", "8"]
    found = said(main, flags)
    assert found.code == 75 and "--dataset folder: train/ of class folders\n" in found.out
    assert '"dataset": "folder"' in Path("run/config.json").read_text()
    # the same flags again, then those of another data set
    assert said(main, [*flags, "--resume"]).code in (0, 75)
    assert said(main, [*flags, "--resume", "--dataset", "auto"]).code in (0, 75)
    assert "has --dataset folder, not imagenet" in refused(
        main, ["--out", "run", "--resume", "--dataset", "imagenet"]
    )


NONE = {
    "an empty folder": {},
    "one class": {"a/0.png": solid()},
    "loose images": {"0.png": solid(), "1.png": solid()},
    "other files": {"README.md": b"# here", "code/train.py": b"print()"},
    "hidden class folders": {".a/0.png": solid(), ".b/0.png": solid()},
}


@pytest.mark.parametrize("name", NONE)
def test_a_folder_of_no_known_form_is_refused_with_the_forms(name):
    tree(Path("images"), NONE[name]).mkdir(exist_ok=True)
    message = refused(main, ["--data-dir", "images"])
    assert "images is none of the forms that are known (" in message
    assert all(f"{row}: {sign.wants}" in message for row, sign in sets.SIGNS.items())


def test_a_folder_that_fits_two_forms_is_refused_with_both():
    tree(Path("images"), classes(2, "train/") | classes(1, "val/"))
    Path("images/labels.csv").write_text("file,label\ntrain/a/00.png,a\n")
    message = refused(main, ["--data-dir", "images"])
    assert "could be folder (train/ of class folders) and table (labels in labels.csv)" in message
    assert message.endswith("say which with --dataset")
    assert len(read(dataset="folder").train) == 6


def test_every_form_says_in_words_what_it_wants_and_has_a_reader():
    for name, sign in sets.SIGNS.items():
        assert sign.wants and name in sets.READERS and sign.over <= sets.SIGNS.keys()


def test_a_folder_that_is_not_there_or_is_a_file_is_refused(here):
    assert "--data-dir nowhere: no such directory" in refused(main, ["--data-dir", "nowhere"])
    Path("file").write_text("x")
    assert "--data-dir file is none of the forms" in refused(main, ["--data-dir", "file"])


# Small things that the forms share


def test_names_of_many_images_are_kept_joined():
    from fastsmooth.data.files import Names

    words = [b"a/1.jpg", b"", b"\xff\xfe.png", "é.jpg".encode(), b"b"]
    found = Names.of("root", words)
    expected = [os.path.join("root", os.fsdecode(word)) for word in words]
    assert list(found) == expected and found[1:3] == expected[1:3] and found[-1] == expected[-1]
    assert list(found.take(np.array([4, 0, 4]))) == [expected[4], expected[0], expected[4]]
    with pytest.raises(IndexError):
        found[5]


def test_a_split_is_taken_apart_with_its_labels():
    tree(Path("images"), classes(3, "train/") | classes(1, "val/"))
    found = read().train
    part = found.take(np.array([8, 0]))
    assert part.labels.tolist() == [2, 0]
    assert names(part) == ["train/c/02.png", "train/a/00.png"]
    pixels = sets.digits(None).train
    assert np.array_equal(pixels.take(np.array([3, 1])).pixels, pixels.pixels[[3, 1]])


def test_open_data_recognises_too():
    import fastsmooth as fs

    tree(Path("images"), {f"{c}/{k}.png": encoded(noise((8, 8)), "PNG") for c in "ab"
                          for k in range(30)})  # fmt: skip
    found = fs.open_data(data_dir="images", val_share=0.4, device="cpu")
    assert found.classes == 2 and found.class_names == ("a", "b") and found.size == 8
    x, y = next(found.train.batches([torch.arange(5)]))
    assert x.shape == (5, 3, 8, 8) and y.tolist() == [0] * 5
    assert opened("resident", dataset="digits").about == ""
    with pytest.raises(DataError) as error:
        fs.open_data(data_dir="images", device="cpu")
    assert "has no train/" in one_line(error)
