"""Tables of images, Parquet and what Hugging Face's library saves: the samples of class folders
from any loader, and one line for whatever is wrong with them."""

import json
import os
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from images import LOADERS, encoded, every_batch, noise, one_line, solid
from repacked import (
    Images,
    assert_same,
    assert_same_streams,
    class_folders,
    classes_of,
    opened,
    own_cache,
    shuffled,
    taken,
)

from fastsmooth.cli.config import resolve
from fastsmooth.data import DataError, files, read_set, sets
from fastsmooth.data.layouts import columns

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

every_loader = pytest.mark.parametrize(("loader", "workers"), LOADERS)
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PNG = encoded(solid(), "PNG")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    return own_cache(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="module")
def images(cifar_folder) -> Images:
    return taken(cifar_folder, 3, {"train": 8, "test": 4})


def library():
    """Hugging Face's datasets."""
    return pytest.importorskip("datasets")


def rows(images: Images, part: str) -> dict[str, list]:
    classes = classes_of(images)
    return {
        "image": [{"bytes": data, "path": file} for _, file, data in shuffled(images, part)],
        "label": [classes.index(name) for name, _, _ in shuffled(images, part)],
    }


def dataset(images: Images, part: str):
    datasets = library()
    label = datasets.ClassLabel(names=classes_of(images))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    return datasets.Dataset.from_dict(rows(images, part), features=features)


def as_parquet(root: Path, images: Images, parts=(("train", 3), ("test", 2))) -> Path:
    """Files PART-K-of-N.parquet in data/, four rows a row group."""
    (root / "data").mkdir(parents=True)
    for part, count in parts:
        table = pa.table(
            {
                "image": pa.array(rows(images, part)["image"], STRUCT),
                "label": rows(images, part)["label"],
            }
        )
        names = [
            {
                "image": {"_type": "Image"},
                "label": {"_type": "ClassLabel", "names": classes_of(images)},
            }
        ]
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": names[0]}})}
        )
        size = -(-len(table) // count)
        for k in range(count):
            path = root / "data" / f"{part}-{k:05}-of-{count:05}.parquet"
            pq.write_table(table.slice(k * size, size), path, row_group_size=4)
    return root


def as_arrow(root: Path, images: Images, **given) -> Path:
    parts = {"train": dataset(images, "train"), "validation": dataset(images, "test")}
    library().DatasetDict(parts).save_to_disk(str(root), num_shards={"train": 3, "validation": 1})
    return root


FORMS = {"parquet": as_parquet, "arrow": as_arrow}
every_form = pytest.mark.parametrize("form", FORMS)


def read(root: Path, form: str = "parquet", **given):
    return read_set(resolve({"dataset": form, "data_dir": str(root)} | given))


def refusal(root: Path, form: str = "parquet", **given) -> str:
    with pytest.raises(DataError) as error:
        read(root, form, **given)
    return one_line(error)


# The same samples


@every_form
@every_loader
def test_tables_give_the_samples_of_class_folders(tmp_path, images, form, loader, workers):
    given = {"loader": loader, "workers": workers, "augment": "crop-flip"}
    data = opened(FORMS[form](tmp_path / "set", images), form, **given)
    reference = opened(class_folders(tmp_path / "tree", images), "folder", **given)
    assert_same(data, reference)
    assert data.class_names == tuple(classes_of(images)) and not data.bad.reasons


@every_form
@pytest.mark.parametrize("loader", sorted({name for name, _ in LOADERS} - {"resident"}))
def test_photographs_in_tables_are_those_of_class_folders(tmp_path, imagenet_folder, form, loader):
    taken_images = taken(imagenet_folder, 4, {"train": 1, "val": 1})
    images = {name.replace("val/", "test/"): data for name, data in taken_images.items()}
    given = {"loader": loader, "image_size": 64, "augment": "resized-crop-flip"}
    data = opened(FORMS[form](tmp_path / "set", images), "auto", **given)
    assert_same(data, opened(class_folders(tmp_path / "tree", images), "folder", **given))
    assert data.about.startswith(f"--dataset {form}: ")


@every_form
def test_streams_of_tables_are_those_of_class_folders(tmp_path, images, form):
    data = opened(FORMS[form](tmp_path / "set", images), form, augment="crop-flip", seed=5)
    reference = opened(
        class_folders(tmp_path / "tree", images), "folder", augment="crop-flip", seed=5
    )
    assert_same_streams(data, reference, 5)


@every_form
def test_a_share_is_held_out_as_of_class_folders(tmp_path, images, form):
    one_part = {name: data for name, data in images.items() if name.startswith("train")}
    if form == "arrow":
        dataset(images, "train").save_to_disk(str(tmp_path / "set"))
    else:
        as_parquet(tmp_path / "set", images, (("train", 2),))
    files_ = {name.removeprefix("train/"): data for name, data in one_part.items()}
    given = {"val_share": 0.4, "augment": "none"}
    data = opened(tmp_path / "set", form, **given)
    assert_same(data, opened(class_folders(tmp_path / "tree", files_), "folder", **given))


def test_parquet_of_the_library_that_wrote_it(tmp_path, images):
    dataset(images, "train").to_parquet(str(tmp_path / "train.parquet"), batch_size=5)
    dataset(images, "test").to_parquet(str(tmp_path / "test.parquet"))
    found = read(tmp_path)
    assert found.about == (
        "Parquet files: 1 to train on, 1 named test; "
        "images from column 'image', labels from 'label'"
    )
    names = classes_of(images)
    assert found.classes == tuple(names)
    theirs = sorted(
        (row["label"], row["image"]["path"], row["image"]["bytes"])
        for row in dataset(images, "train").cast_column("image", library().Image(decode=False))
    )
    held = found.train.files
    assert theirs == [
        (label, os.path.basename(held.names[i]), held.read(i).tobytes())
        for i, label in enumerate(found.train.labels.tolist())
    ]


def test_a_selection_of_rows_is_saved_and_read_as_the_library_selects(tmp_path, images):
    whole = dataset(images, "train")
    chosen = whole.shuffle(seed=1).select(range(5, 20))
    chosen.save_to_disk(str(tmp_path / "set"))
    found = read(tmp_path / "set", "arrow", val_share=0.3)
    contents = sorted(
        split.files.read(i).tobytes()
        for split in (found.train, found.test)
        for i in range(len(split))
    )
    raw = chosen.cast_column("image", library().Image(decode=False))
    assert contents == sorted(row["image"]["bytes"] for row in raw)


# Columns


def table(**given):
    """Four images of two classes, with other columns in place of these or beside them."""
    contents = [encoded(noise((8, 8)), "PNG") for _ in range(4)]
    return pa.table({"image": pa.array(contents), "label": [0, 1, 0, 1]} | given)


def written(root: Path, train, test=None, **options) -> Path:
    root.mkdir(exist_ok=True)
    pq.write_table(train, root / "train.parquet", **options)
    pq.write_table(table() if test is None else test, root / "test.parquet")
    return root


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (pa.array([1, 0, 1, 0], pa.uint8()), ("0", "1")),
        (pa.array(["cat", "dog", "cat", "dog"]), ("cat", "dog")),
        (pa.array(["cat", "dog"] * 2, pa.large_string()), ("cat", "dog")),
        (pa.array(["dog", "cat"] * 2).dictionary_encode(), ("cat", "dog")),
        (pa.array(["0", "1"] * 2), ("0", "1")),
    ],
)
def test_labels_are_whole_numbers_or_names(tmp_path, labels, classes):
    for column in (labels, labels):
        found = read(written(tmp_path, table(label=column), table(label=column)))
    assert found.classes == classes and found.train.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), STRUCT])
@every_form
def test_images_are_bytes_or_bytes_with_a_path(tmp_path, kind, form):
    contents = [encoded(noise((8, 8)), "PNG") for _ in range(4)]
    values = [{"bytes": c, "path": None} for c in contents] if kind == STRUCT else contents
    given = table(image=pa.array(values, kind))
    both(tmp_path, given, form)
    found = read(tmp_path, form)
    held = {
        split.files.read(i).tobytes()
        for split in (found.train, found.test)
        for i in range(len(split))
    }
    assert held == set(contents)


def both(root: Path, given, form: str) -> None:
    """The table to train and to test on."""
    if form == "arrow":
        saved(root / "train", given)
        saved(root / "test", given)
    else:
        written(root, given, given)


def saved(root: Path, *tables, **options) -> Path:
    """As save_to_disk writes, of a table a file."""
    root.mkdir(parents=True, exist_ok=True)
    names = [f"data-{k:05}-of-{len(tables):05}.arrow" for k in range(len(tables))]
    for name, given in zip(names, tables, strict=True):
        with pa.ipc.new_stream(str(root / name), given.schema, **options) as writer:
            writer.write_table(given, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names]}
    (root / "state.json").write_text(json.dumps(state))
    return root


def test_the_column_of_labels_may_be_named(tmp_path):
    """As of CIFAR-100, which has two."""
    two = table(fine_label=[0, 1, 2, 3]).rename_columns(["image", "coarse_label", "fine_label"])
    written(tmp_path, two, two)
    message = refusal(tmp_path)
    assert message == (
        f"{tmp_path}/train.parquet: the labels could be in 'coarse_label' and 'fine_label': say "
        "which with --labels NAME"
    )
    assert len(read(tmp_path, labels="fine_label").classes) == 4
    assert len(read(tmp_path, labels="coarse_label").classes) == 2
    assert "has no column 'x' (it has image: binary" in refusal(tmp_path, labels="x")


def test_what_the_library_says_of_columns_decides(tmp_path):
    features = {"b": {"_type": "Image"}, "y": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    png = pa.array([PNG] * 4)
    given = pa.table({"a": png, "b": png, "label": [9] * 4, "y": [0, 1, 0, 1]})
    given = given.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    found = read(written(tmp_path, given, given))
    assert found.classes == ("cat", "dog") and found.about.endswith("column 'b', labels from 'y'")
    for damage in (b"[", b"{}", b'{"info": 1}', b'{"info": {"features": [1]}}', b"[" * 99_999):
        given = table().replace_schema_metadata({"huggingface": damage})
        assert read(written(tmp_path, given, given)).classes == ("0", "1")


def test_folders_say_what_files_are_for(tmp_path):
    for part, name in (("train", "0000"), ("test", "0000"), ("train", "0001")):
        (tmp_path / "default" / part).mkdir(parents=True, exist_ok=True)
        pq.write_table(table(), tmp_path / "default" / part / f"{name}.parquet")
    found = read(tmp_path)
    assert (len(found.train), len(found.test)) == (8, 4)
    assert sets.recognised(tmp_path) == ("parquet", "3 Parquet files")


def test_a_table_without_images_is_no_data_set(tmp_path):
    pq.write_table(pa.table({"label": [1]}), tmp_path / "metadata.parquet")
    assert columns.sign_of_parquet(tmp_path) == ""
    assert columns.sign_of_arrow(tmp_path) == columns.sign_of_parquet(tmp_path / "no") == ""
    assert columns.sign_of_arrow(tmp_path / "no") == ""


# Row groups


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[int, int]]:
    """(process, row group) of each that is decoded from now on."""
    done, decode = [], files.RowGroups._decoded

    def spy(self, held, group):
        done.append((os.getpid(), group))
        return decode(self, held, group)

    monkeypatch.setattr(files.RowGroups, "_decoded", spy)
    return done


def test_row_groups_are_decoded_once_as_long_as_they_fit(tmp_path, images, decoded, monkeypatch):
    held = read(as_parquet(tmp_path, images)).train.files
    contents = [held.read(i).tobytes() for i in range(24)]
    assert sorted(decoded) == [(os.getpid(), group) for group in range(6)]
    assert contents == [held.open(i).read() for i in range(24)] and len(decoded) == 6
    size = max(held.groups.held.bytes.values())
    monkeypatch.setattr(files, "HELD", 2 * size)
    monkeypatch.setattr(columns, "HELD_SHARE", 0)
    again = read(tmp_path).train.files
    order = again.by_place(np.arange(24))
    assert [again.read(i).tobytes() for i in order] == [contents[i] for i in order]
    assert len(decoded) == 12 and sum(again.groups.held.bytes.values()) <= 2 * size
    again.read(int(order[-1])), again.read(int(order[-5]))
    assert len(decoded) == 12  # the two last
    again.read(int(order[0]))
    assert len(decoded) == 13
    again.read(int(order[-1])), again.read(int(order[0])), again.read(int(order[-5]))
    assert len(decoded) == 15
    again.read(int(order[0]))
    assert len(decoded) == 15  # of two the one used last stayed
    monkeypatch.setattr(files, "HELD", 1)  # one is held whatever its size
    again.read(int(order[5])), again.read(int(order[6]))
    assert len(decoded) == 16 and len(again.groups.held.bytes) == 1
    data = again.read(int(order[5]))
    data[:] = 0  # one's own
    assert again.read(int(order[5])).tobytes() == contents[order[5]]


def test_a_row_group_that_is_shorter_than_was_said_is_no_end_of_the_process(tmp_path):
    archive = files.Archive.at(str(written(tmp_path, table()) / "train.parquet"))
    one = np.ones(1, np.int64)
    groups = files.RowGroups([archive], "image", 0 * one, 0 * one, 9 * one)
    with pytest.raises(OSError, match="fewer rows than it says"):
        groups.value(7)


def test_threads_decode_a_row_group_once(tmp_path, images, decoded):
    held = read(as_parquet(tmp_path, images)).train.files
    contents, wrong = [held.read(i).tobytes() for i in range(24)], []
    decoded.clear()
    other = pickle.loads(pickle.dumps(held))

    def work(k: int) -> None:
        for i in np.random.default_rng(k).permutation(24).tolist():
            if other.read(i).tobytes() != contents[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong and sorted(group for _, group in decoded) == list(range(6))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_row_groups_of_its_own(tmp_path, images):
    held = read(as_parquet(tmp_path, images)).train.files
    expected = [held.read(i).tobytes() for i in range(24)]
    held.groups.held.lock.acquire()  # as by a thread that the other process has not
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        right = [held.read(i).tobytes() for i in range(24)] == expected
        os.write(writing, b"right" if right else b"wrong")
        os._exit(0)
    held.groups.held.lock.release()
    os.close(writing)
    assert os.read(reading, 9) == b"right"
    os.waitpid(child, 0)
    os.close(reading)


def test_large_row_groups_are_remarked_on(tmp_path, images, monkeypatch):
    as_parquet(tmp_path, images)
    assert read(tmp_path).remarks == ()
    monkeypatch.setattr(columns, "HELD", 1)
    assert read(tmp_path).remarks == ()  # there is room for them
    monkeypatch.setattr(columns, "HELD_SHARE", 0)
    assert read(tmp_path).remarks == ()  # few images each
    monkeypatch.setattr(columns, "MANY", 3)
    (remark,) = read(tmp_path).remarks
    assert "decodes 3 (0 MB), the row group of a Parquet file that it is in" in remark
    assert remark.endswith("fastsmooth prepare --format tar makes random reads cheap")


def test_headers_are_read_row_group_by_row_group_and_once(tmp_path, images, decoded, monkeypatch):
    monkeypatch.setattr(files, "HELD", 1)
    monkeypatch.setattr(columns, "HELD_SHARE", 0)
    opened(as_parquet(tmp_path, images), "parquet", augment="none")
    assert len(decoded) == 6 + 4
    decoded.clear()
    opened(tmp_path, "parquet", augment="none")
    assert not decoded


def test_saved_images_are_read_without_pyarrow(tmp_path, images, monkeypatch):
    held = read(as_arrow(tmp_path, images), "arrow").train.files
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    contents = [pickle.loads(pickle.dumps(held)).read(i).tobytes() for i in range(24)]
    assert sorted(contents) == sorted(data for _, _, data in shuffled(images, "train"))


@every_form
def test_a_file_that_changes_after_it_was_listed_is_not_read(tmp_path, images, form):
    data = opened(FORMS[form](tmp_path, images), form, augment="none")
    for path in tmp_path.rglob("*.*"):
        os.utime(path, ns=(5, 5))
    if form == "parquet":
        held = data.train.engine.source.files
        held.groups.held = files.Held()
    with pytest.raises(DataError) as error:
        every_batch(data.train)
    assert "it has changed since its images were listed: start again" in one_line(error)


# What is wrong


def struct(**last) -> dict:
    """Four images, the last of which is another."""
    values = [{"bytes": PNG, "path": f"{k}.png"} for k in range(3)]
    return {"image": pa.array([*values, {"bytes": PNG, "path": "3.png"} | last], STRUCT)}


TABLES = {
    "no image column": (
        {"image": ["a.png"] * 4},
        "has no column of images (it has image: string, label: int64): it must have one, of bytes",
    ),
    "two image columns": (
        {"mask": [PNG] * 4}, "the images could be in 'image' and 'mask': keep one of them",
    ),
    "lists of images": ({"image": [[PNG]] * 4}, "has no column of images (it has image: list<"),
    "a null image": ({"image": [PNG, PNG, None, PNG]}, "parquet/2: it has no image: remove"),
    "a null struct": (
        {"image": pa.array([{"bytes": PNG}, None] * 2, STRUCT)}, "parquet/1: it has no image",
    ),
    "an image elsewhere": (
        struct(bytes=None),
        "parquet/3: its image is a file of its own, '3.png', and not in the table: save the data",
    ),
    "no label column": (
        {"label": [[1]] * 4, "x": [0.5] * 4}, "column 'label' is of list<",
    ),
    "no column at all": ({"label": pa.nulls(4)}, "column 'label' is of null: labels are whole"),
    "float labels": ({"label": [0.0, 1.0] * 2}, "column 'label' is of double: labels are whole"),
    "bool labels": ({"label": [True, False] * 2}, "column 'label' is of bool: labels are whole"),
    "a null label": ({"label": [0, None, 1, 0]}, "parquet/1: it has no label in column 'label'"),
    "an unknown label": (
        {"label": [0, 1, -1, 1]}, "parquet/2: its label is -1, which stands for an unknown one",
    ),
    "a negative label": ({"label": [0, 1, -7, 1]}, "parquet/2: its label is -7, none of 0 to"),
    "a label beyond": ({"label": [0, 1, 10**6, 1]}, "its label is 1000000, none of 0 to 999,999"),
    "a huge label": (
        {"label": pa.array([0, 1, 2**64 - 1, 1], pa.uint64())}, "cannot be read (Integer value",
    ),
    "numbers and names": ({"label": ["1", "cat"] * 2}, "some labels are numbers and others names"),
    "a gap": ({"label": [0, 1, 4, 1]}, "no training images of class '2' (nor 1 more)"),
    "one class": ({"label": [0] * 4}, "has images of 1 classes: at least two are needed"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TABLES)
def test_a_table_that_is_wrong_is_refused(tmp_path, fault):
    given, words = TABLES[fault]
    message = refusal(written(tmp_path, table(**given), table(**given)))
    assert words in message and len(message) < 400, message


def test_a_label_beyond_the_names_of_the_classes_is_refused(tmp_path, images):
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    given = table(label=[0, 1, 2, 1]).replace_schema_metadata(metadata)
    assert "parquet/2: its label is 2, none of the 2 classes of the column" in refusal(
        written(tmp_path, given, given)
    )


def test_files_whose_columns_differ_are_refused(tmp_path):
    message = refusal(written(tmp_path, table(), table(label=["a", "b"] * 2)))
    words = f"column 'label' is not there as it is in {tmp_path}/train.parquet: keep the files"
    assert message == f"{tmp_path}/test.parquet: {words} of one data set in a folder"


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


PARQUETS = {
    "cut short": (lambda path: cut(path, -20), "is cut short: fetch it again"),
    "empty": (lambda path: path.write_bytes(b""), "not a Parquet file: fetch it again"),
    "foreign": (lambda path: path.write_bytes(b"<html>" * 99), "not a Parquet file"),
    "encrypted": (lambda path: path.write_bytes(b"PARE" + bytes(99) + b"PARE"), "is encrypted"),
    "a pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid 0"),
        "only says where Git LFS has the file: fetch it with git lfs pull",
    ),
    "a damaged footer": (
        lambda path: path.write_bytes(
            path.read_bytes()[:-60] + b"\xff" * 52 + path.read_bytes()[-8:]
        ),
        "cannot be read (",
    ),
    "a lying footer": (
        lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\xff\xff\xff\x7fPAR1"),
        "cannot be read (",
    ),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "it is a pipe, a socket or a device"),
    "a link to nothing": (
        lambda path: (path.unlink(), path.symlink_to("nowhere")), "No such file or directory (",
    ),
    "no training files": (
        lambda path: path.unlink(), "has Parquet files named test and none named train",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PARQUETS)
def test_parquet_files_that_cannot_be_used_are_named(tmp_path, fault):
    written(tmp_path, table())
    spoil, words = PARQUETS[fault]
    spoil(tmp_path / "train.parquet")
    assert words in refusal(tmp_path)


def test_damaged_pages_are_the_fault_of_their_images(tmp_path):
    written(tmp_path, table(), row_group_size=2)
    path = tmp_path / "train.parquet"
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56  # the first page of images
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        opened(tmp_path, "parquet")
    assert one_line(error).startswith(f"{tmp_path}/train.parquet/")
    data = opened(tmp_path, "parquet", on_bad_image="zeros")
    assert len(data.bad.reasons) == 2 and len(every_batch(data.train)) == 1


def test_a_bomb_of_a_row_group_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "LARGEST_GROUP", 100)
    assert "a row group holds 0.0 GB of images: write it with smaller ones" in refusal(
        written(tmp_path, table())
    )


def test_without_pyarrow_the_line_that_installs_it_is_said(tmp_path, monkeypatch):
    written(tmp_path, table())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for form in ("parquet", "arrow"):
        assert refusal(tmp_path, form).endswith("with pyarrow: pip install 'fastsmooth[hf]'")
    assert sets.recognised(tmp_path) == ("parquet", "2 Parquet files")


def compressed(root: Path) -> None:
    saved(root, table(), options=pa.ipc.IpcWriteOptions(compression="zstd"))


def a_file_and_no_stream(root: Path) -> None:
    with pa.ipc.new_file(str(root / "data-00000-of-00001.arrow"), table().schema) as writer:
        writer.write_table(table())


def state(root: Path, **given) -> None:
    (root / "state.json").write_text(json.dumps(given))


ARROWS = {
    "cut short": (lambda root: cut(next(root.glob("*.arrow")), 900), "is cut short: fetch it"),
    "cut at a batch": (
        lambda root: cut(next(root.glob("*.arrow")), -8), "is cut short: fetch it again",
    ),
    "empty": (lambda root: cut(next(root.glob("*.arrow")), 0), "cannot be read ("),
    "compressed": (compressed, "is compressed: save it without compression"),
    "no stream": (a_file_and_no_stream, "is no stream, as save_to_disk writes"),
    "a null image": (
        lambda root: saved(root, table(image=[PNG, None] * 2)), "arrow/1: it has no image",
    ),
    "an image elsewhere": (
        lambda root: saved(root, table(**struct(bytes=None))),
        "arrow/3: its image is a file of its own, '3.png'",
    ),
    "a null label": (
        lambda root: saved(root, table(label=[0, 1, 0, None])), "arrow/3: it has no label in",
    ),
    "a broken state.json": (
        lambda root: (root / "state.json").write_text("{"), "names no data files: fetch",
    ),
    "an empty state.json": (lambda root: state(root), "names no data files: fetch"),
    "odd data files": (lambda root: state(root, _data_files=[7, {}]), "names '', which is no file"),
    "a selection": (
        lambda root: state(
            root, _data_files=[{"filename": "x"}], _indices_files=[{"filename": "i.arrow"}]
        ),
        "is a selection of rows: write all of its images",
    ),
    "a file elsewhere": (
        lambda root: state(root, _data_files=[{"filename": "../../etc/passwd"}]),
        "names '../../etc/passwd', which is no file beside it",
    ),
    "a file that is missing": (
        lambda root: next(root.glob("*.arrow")).unlink(), "No such file or directory (",
    ),
    "no state.json": (lambda root: (root / "state.json").unlink(), "has no state.json, nor have"),
    "a broken dict": (
        lambda root: (root / "dataset_dict.json").write_text('{"splits": ["../x"]}'),
        "does not name the folders beside it",
    ),
    "a pointer": (
        lambda root: next(root.glob("*.arrow")).write_bytes(b"version https://git-lfs.github.com"),
        "only says where Git LFS has the file",
    ),
    "other columns": (
        lambda root: saved(root, table(), table(label=["a", "b"] * 2)), "is not there as it is in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", ARROWS)
def test_saved_sets_that_cannot_be_used_are_named(tmp_path, fault):
    spoil, words = ARROWS[fault]
    spoil(saved(tmp_path, table()))
    assert words in refusal(tmp_path, "arrow", val_share=0.3)


@pytest.mark.parametrize("wrong", [-5, 2**31 - 1])
def test_offsets_that_lead_out_of_the_file_are_refused(tmp_path, wrong):
    contents = [b"x" * 1001, b"y" * 2002, b"z" * 3003, b"w"]
    both(tmp_path, table(image=contents), "arrow")
    path = next((tmp_path / "train").glob("*.arrow"))
    data = path.read_bytes()
    at = data.index(np.array([0, 1001, 3003], np.int32).tobytes())
    path.write_bytes(data[: at + 4] + np.int32(wrong).tobytes() + data[at + 8 :])
    assert f"{path}: its images do not lie in it: fetch it again" == refusal(tmp_path, "arrow")


@pytest.mark.parametrize("path", ["../../x.png", "/etc/passwd", "a\nb", "\x1b[31m", "n\0ul"])
@every_form
def test_hostile_paths_are_shown_and_lead_nowhere(tmp_path, path, form):
    given = table(**struct(bytes=b"no image", path=path))
    root = tmp_path / "set"
    both(root, given, form)
    before = sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts)
    with pytest.raises(DataError) as error:
        opened(root, form, loader="resident")
    message = one_line(error)
    assert "not an image that can be read" in message and message.startswith(f"{root}/")
    assert before == sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts)
