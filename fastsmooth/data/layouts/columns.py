"""Tables with a column of images and one of labels, as Hugging Face's data sets are stored: Parquet
files, and what `save_to_disk` of its library writes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastsmooth.data.files import HELD, POINTER, Archive, Files, Names, Ranges, RowGroups, Rows
from fastsmooth.data.images import DataConfig, DataError, ImageSet
from fastsmooth.data.layouts import splits
from fastsmooth.data.layouts.common import existing, existing_folder, is_folder, listed
from fastsmooth.data.layouts.splits import MOST_CLASSES, Found
from fastsmooth.data.memory import free_memory
from fastsmooth.messages import one_line
from fastsmooth.runfolder.files import read_object

WANTS_PARQUET = "*.parquet with a column of images and one of labels"
WANTS_ARROW = "what save_to_disk of Hugging Face's datasets wrote (state.json, data-*.arrow)"
LABELS = ("label", "labels", "fine_label", "coarse_label", "class", "class_id", "cls", "target")
MANY = 10  # images that are decoded to read one of them: more are remarked on
HELD_SHARE = 0.2  # of the free memory, for row groups of training images, and again for test images
LARGEST_GROUP = 1 << 31  # bytes of images in a row group
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


class Choice(NamedTuple):
    """Which columns of a table are read."""

    image: str
    nested: bool  # a struct of bytes, and perhaps path, not bytes alone
    paths: bool  # whether path is there
    label: str
    names: tuple[str, ...]  # of the classes, where the table has them

    @property
    def bytes(self) -> str:
        """Where the images' bytes are, as Parquet calls it."""
        return f"{self.image}.bytes" if self.nested else self.image


class Table(NamedTuple):
    """The n rows of a part of a data set."""

    files: Files
    labels: np.ndarray | list[str]  # n: int64, or names
    paths: list[str]  # n, what the images' files were called before; "" where nobody says
    where: list[str]  # n, file and row


def sign_of_parquet(root: Path) -> str:
    names = splits.names_below(root, (".parquet",)) if root.is_dir() else []
    if not names:
        return ""
    with suppress(Exception):  # reading it finds the words
        from pyarrow import parquet

        schema = parquet.read_schema(root / names[0])
        if not any(holds_images(field.type) for field in schema):
            return ""
    return f"{len(names):,} Parquet files"


def sign_of_arrow(root: Path) -> str:
    if not root.is_dir():
        return ""
    for name in ("dataset_dict.json", "state.json"):
        if (root / name).is_file():
            return f"{name} of Hugging Face's save_to_disk"
    return ""


# Parquet


def read_parquet(config: DataConfig) -> ImageSet:
    """Parquet files in a folder, its data/, its train/ and test/, or named so:
    train-00000-of-00002.parquet."""
    root = existing_folder(config, "Parquet files")
    need_pyarrow(config)
    names = splits.names_below(root, (".parquet",))
    if not names:
        raise DataError(
            f"--data-dir {root} holds no *.parquet, nor do its data/, train/ and test/: give their "
            "folder"
        )
    parts = splits.parts_of(config, names, "Parquet files")
    opened = [ParquetTable(root, name) for name in (*parts.train, *parts.test)]
    choice = chosen(config, [(str(root / t.name), t.schema) for t in opened], {})
    remarks = parts.remarks("Parquet files")
    remarks += slow(opened, choice)
    count = len(parts.train)
    train = parquet_rows(root, opened[:count], choice)
    test = parquet_rows(root, opened[count:], choice) if parts.test else None
    return assembled(config, choice, train, test, parts.about("Parquet files"), remarks)


class ParquetTable:
    """What the footer of a Parquet file says. Raises DataError."""

    def __init__(self, root: Path, name: str):
        from pyarrow import parquet

        self.name, self.archive = name, Archive.at(str(root / name))
        check_ends(self.archive.path)
        with (
            foreign(self.archive.path),
            parquet.ParquetFile(self.archive.path, memory_map=True) as file,
        ):
            self.metadata, self.schema = file.metadata, file.schema_arrow

    def groups(self, column: str) -> list[Any]:
        """What it says of a column in each row group."""
        with foreign(self.archive.path):
            groups = [self.metadata.row_group(g) for g in range(self.metadata.num_row_groups)]
            paths = [groups[0].column(c).path_in_schema for c in range(groups[0].num_columns)]
            return [group.column(paths.index(column)) for group in groups]

    def read(self, columns: list[str]) -> Any:
        """A pyarrow.Table of these columns."""
        from pyarrow import parquet

        with (
            foreign(self.archive.path),
            parquet.ParquetFile(self.archive.path, memory_map=True) as file,
        ):
            table = file.read(columns, use_threads=False)
            table.validate(full=True)
            return table


def check_ends(path: str) -> None:
    """Raises DataError where a file does not begin and end as a Parquet file does."""
    with open(path, "rb") as file:
        first = file.read(len(POINTER))
        file.seek(max(os.path.getsize(path) - 4, 0))
        last = file.read(4)
    if first == POINTER:
        raise DataError(f"{path} only says where Git LFS has the file: fetch it with git lfs pull")
    if b"PARE" in (first[:4], last):
        raise DataError(f"{path} is encrypted: write it without encryption")
    if first[:4] != b"PAR1":
        raise DataError(f"{path}: not a Parquet file: fetch it again")
    if last != b"PAR1":
        raise DataError(f"{path} is cut short: fetch it again")


def parquet_rows(root: Path, tables: Sequence[ParquetTable], choice: Choice) -> Table:
    """The rows of these files: labels and paths are read, images are not."""
    extra = [f"{choice.image}.path"] * choice.paths
    shape: list[tuple[int, int, int]] = []  # archive, number in it and rows of each group
    labels, paths, where, told = [], [], [], []
    for place, table in enumerate(tables):
        if not table.metadata.num_rows:
            continue
        read = table.read([choice.label, *extra])
        groups = table.groups(choice.bytes)
        for number, group in enumerate(groups):
            if group.total_uncompressed_size > LARGEST_GROUP:
                size = group.total_uncompressed_size / 1e9
                raise DataError(
                    f"{table.archive.path}: a row group holds {size:.1f} GB of images: write it "
                    "with smaller ones (row_group_size=100)"
                )
            shape.append((place, number, table.metadata.row_group(number).num_rows))
        told += groups
        labels.append(label_values(table.archive.path, read[choice.label], choice))
        paths += path_values(read[choice.image]) if extra else [""] * len(read)
        where += [f"{table.name}/{row}" for row in range(len(read))]
    archives = [table.archive for table in tables]
    place_of, number_of, rows_of = np.array(shape, np.int64).reshape(-1, 3).T
    groups_read = RowGroups(archives, choice.bytes, place_of, number_of, rows_of, room())
    for g, group in enumerate(told):
        known = group.statistics
        # where the footer does not count them, reading an image finds it
        if known is not None and known.has_null_count and known.null_count:
            empty = groups_read.values(g).is_null().to_numpy()
            row = int(groups_read.ends[g]) - len(empty) + int(np.flatnonzero(empty)[0])
            refuse_empty(str(root / where[row]), paths[row])
    files = Rows(str(root), groups_read, np.arange(len(where)), named(root, where, paths))
    return Table(files, joined(labels), paths, where)


def room() -> int:
    """Bytes of decoded row groups that a run may keep."""
    free = free_memory(torch.device("cpu"))
    return int(min(HELD_SHARE * free, 1 << 40)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def slow(tables: Sequence[ParquetTable], choice: Choice) -> list[str]:
    """A remark where reading an image means to decode many."""
    groups = [g for t in tables if t.metadata.num_rows for g in t.groups(choice.bytes)]
    size, rows = (
        sum(getattr(g, f) for g in groups) for f in ("total_uncompressed_size", "num_values")
    )
    if size <= max(HELD, room()) or rows <= MANY * len(groups):
        return []
    return [
        f"each image that is read decodes {rows // len(groups):,} "
        f"({size / len(groups) / 1e6:,.0f} MB), the row group of a Parquet file that it is in: "
        "fastsmooth prepare --format tar makes random reads cheap"
    ]


# What save_to_disk writes


def read_arrow(config: DataConfig) -> ImageSet:
    """A Dataset or a DatasetDict of Hugging Face's library, saved to disk: the images are read in
    place, without pyarrow once they are found."""
    root = existing(config)
    need_pyarrow(config)
    splits_there = [
        entry.name
        for entry in (listed(root) if root.is_dir() else ())
        if is_folder(entry) and (Path(entry.path) / "state.json").is_file()
    ]
    if (root / "dataset_dict.json").is_file():
        named_there = (read_object(root / "dataset_dict.json") or {}).get("splits")
        if not isinstance(named_there, list) or any(n not in splits_there for n in named_there):
            raise DataError(
                f"{root / 'dataset_dict.json'} does not name the folders beside it: fetch the data "
                "set again"
            )
    names = [""] if (root / "state.json").is_file() else sorted(splits_there)
    if not names:
        raise DataError(
            f"--data-dir {root} has no state.json, nor have its train/ and test/: give the folder "
            "that save_to_disk wrote"
        )
    parts = splits.parts_of(config, names, "splits", "one data set")
    files = {name: arrow_files(root / name) for name in (*parts.train, *parts.test)}
    schemas = [(path, schema_of(path)) for paths in files.values() for path in paths]
    choice = chosen(config, schemas, features_of(root / parts.train[0]))
    train = arrow_rows(root, [p for name in parts.train for p in files[name]], choice)
    test = [path for name in parts.test for path in files[name]]
    held = arrow_rows(root, test, choice) if parts.test else None
    about = parts.about("splits of save_to_disk") if parts.test else "save_to_disk's files"
    return assembled(config, choice, train, held, about, parts.remarks("splits"))


def arrow_files(folder: Path) -> list[str]:
    """The files that state.json names. Raises DataError."""
    state = read_object(folder / "state.json")
    given = state.get("_data_files") if state else None
    entries = given if isinstance(given, list) else []
    names = [str(entry.get("filename", "")) for entry in entries if isinstance(entry, dict)]
    if not names:
        raise DataError(f"{folder / 'state.json'} names no data files: fetch the data set again")
    if state and (state.get("_indices_data_files") or state.get("_indices_files")):
        raise DataError(
            f"{folder} is a selection of rows: write all of its images with Hugging Face's "
            "datasets: flatten_indices(), then save_to_disk"
        )
    for name in names:
        if os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name:
            raise DataError(
                f"{folder / 'state.json'} names {name!r}, which is no file beside it: fetch the "
                "data set again"
            )
    return [str(folder / name) for name in names]


@contextmanager
def stream(path: str) -> Iterator[tuple[Any, Any]]:
    """(the file's bytes, a reader of the record batches in them), as pyarrow has them: the bytes
    are mapped, not read. Raises DataError."""
    import pyarrow

    Archive.at(path)
    with foreign(path):
        source = pyarrow.memory_map(path).read_buffer()
        first, last = (bytes(source[part]) for part in (slice(0, len(POINTER)), slice(-8, None)))
        if first == POINTER:
            raise DataError(f"{path} only says where Git LFS has the file: git lfs pull")
        if first.startswith(b"ARROW1"):
            raise DataError(f"{path} is no stream, as save_to_disk writes: save it with that")
        reader = pyarrow.ipc.open_stream(source)
        # whatever was cut off, a last batch in one piece would not tell
        if last != STREAM_END:
            raise DataError(f"{path} is cut short: fetch it again")
        yield source, reader


def schema_of(path: str) -> Any:
    with stream(path) as (_, reader):
        return reader.schema


def features_of(folder: Path) -> dict[str, Any]:
    """What dataset_info.json says of the columns."""
    features = (read_object(folder / "dataset_info.json") or {}).get("features")
    named = features.items() if isinstance(features, dict) else ()
    return {name: told for name, told in named if isinstance(told, dict)}


def arrow_rows(root: Path, paths_of_files: Sequence[str], choice: Choice) -> Table:
    """The rows of these files, the images as ranges of their bytes."""
    archives = [Archive.at(path) for path in paths_of_files]
    labels, paths, where = [], [], []
    place, starts, lengths = [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number, archive in enumerate(archives):
        name, row = os.path.relpath(archive.path, root), 0
        with stream(archive.path) as (source, reader):
            for batch in reader:
                batch.validate()
                images = batch.column(choice.image)
                start, length, empty = ranges(images, choice, source, archive.path)
                called = path_values(images) if choice.paths else [""] * len(images)
                if empty.any():
                    at = int(np.flatnonzero(empty)[0])
                    refuse_empty(f"{archive.path}/{row + at}", called[at])
                starts.append(start)
                lengths.append(length)
                paths += called
                column = batch.column(choice.label)
                column.validate(full=True)
                labels.append(label_values(archive.path, column, choice, row))
                where += [f"{name}/{row + k}" for k in range(len(images))]
                row += len(images)
        place += [number] * row
    files = Ranges(
        str(root),
        archives,
        np.array(place, np.int32),
        np.concatenate(starts),
        np.concatenate(lengths),
        named(root, where, paths),
    )
    return Table(files, joined(labels), paths, where)


def ranges(
    images: Any, choice: Choice, source: Any, path: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the n images of a batch start in the file and how long they are, int64 [n] in bytes,
    and which are missing, bool [n]. Raises DataError for buffers that do not lie in it."""
    from pyarrow import types

    count = len(images)
    values = images.field("bytes") if choice.nested else images
    empty = images.is_null().to_numpy(False) | values.is_null().to_numpy(False)
    _, offsets, data = values.buffers()
    if data is None or not count:
        return np.zeros(count, np.int64), np.zeros(count, np.int64), empty
    begin = data.address - source.address
    if not 0 <= begin <= source.size - data.size:
        raise DataError(
            f"{path} is compressed: save it without compression, so that images are read in place"
        )
    wide = types.is_large_binary(values.type)
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[: count + 1]
    ends = ends.astype(np.int64)
    if len(ends) != count + 1 or (np.diff(ends) < 0).any() or ends[0] < 0 or ends[-1] > data.size:
        raise DataError(f"{path}: its images do not lie in it: fetch it again")
    return begin + ends[:-1], np.diff(ends), empty


# Columns


def chosen(
    config: DataConfig, schemas: Sequence[tuple[str, Any]], features: dict[str, Any]
) -> Choice:
    """The columns of the first of (file, schema), which the others must have too. `features`: what
    is known of them where the schema says nothing. Raises DataError."""
    from pyarrow import types

    path, schema = schemas[0]
    features = declared(schema) or features
    image = one_of(image_columns(schema, features), path, schema, "image", "keep one of them")
    label = label_column(config, path, schema, features)
    if twice := next((name for name in (image, label) if schema.names.count(name) != 1), None):
        raise DataError(f"{path} has several columns {twice!r}: rename all but one")
    kinds = [schema.field(name).type for name in (image, label)]
    if not is_label(kinds[1]):
        raise DataError(
            f"{path}: column {label!r} is of {kinds[1]}: labels are whole numbers or names"
        )
    for other, its in schemas[1:]:
        for name, kind in zip((image, label), kinds, strict=True):
            if name not in its.names or its.field(name).type != kind:
                raise DataError(
                    f"{other}: column {name!r} is not there as it is in {path}: keep the files of "
                    "one data set in a folder"
                )
    names = features.get(label, {}).get("names")
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    nested = types.is_struct(kinds[0])
    paths = nested and any(f.name == "path" and is_text(f.type) for f in kinds[0])
    return Choice(image, nested, paths, label, tuple(names) if known else ())


def declared(schema: Any) -> dict[str, Any]:
    """What Hugging Face's library wrote of the columns beside them; nothing where it did not."""
    with suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: of for name, of in features.items() if isinstance(of, dict)}
    return {}


def image_columns(schema: Any, features: dict[str, Any]) -> list[str]:
    possible = [field.name for field in schema if holds_images(field.type)]
    return [n for n in possible if features.get(n, {}).get("_type") == "Image"] or possible


def label_column(config: DataConfig, path: str, schema: Any, features: dict[str, Any]) -> str:
    if config.labels:
        if config.labels not in schema.names:
            raise DataError(
                f"{path} has no column {config.labels!r} (it has {shown(schema)}): give another "
                "--labels"
            )
        return config.labels
    of_classes = [n for n in schema.names if features.get(n, {}).get("_type") == "ClassLabel"]
    known = [name for name in schema.names if name.lower() in LABELS]
    others = [field.name for field in schema if is_label(field.type)]
    remedy = "say which with --labels NAME"
    return one_of(of_classes or known or others, path, schema, "label", remedy)


def one_of(names: list[str], path: str, schema: Any, what: str, remedy: str) -> str:
    if len(names) == 1:
        return names[0]
    if names:
        several = " and ".join(map(repr, names))
        raise DataError(f"{path}: the {what}s could be in {several}: {remedy}")
    raise DataError(
        f"{path} has no column of {what}s (it has {shown(schema)}): it must have one, "
        + ("of bytes or of bytes and path" if what == "image" else "of whole numbers or names")
    )


def shown(schema: Any) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)[:300] or "none"


def holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
    return is_bytes(kind)


def is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)


def is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind)


def is_label(kind: Any) -> bool:
    from pyarrow import types

    return types.is_integer(kind) or is_text(kind)


# Rows


def label_values(path: str, column: Any, choice: Choice, first: int = 0) -> np.ndarray | list[str]:
    """The labels of n rows of a file, the first of which is row `first`: int64 [n], or names.
    Raises DataError for one that is none."""
    import pyarrow
    from pyarrow import types

    def refuse(wrong: np.ndarray, words: str) -> DataError:
        return DataError(f"{path}/{first + int(np.flatnonzero(wrong)[0])}: {words}")

    if column.null_count:
        missing = np.array(column.is_null().to_pylist())
        raise refuse(missing, f"it has no label in column {choice.label!r}: add one, or remove it")
    with foreign(path):
        if not types.is_integer(column.type):
            return column.cast(pyarrow.string()).to_pylist()
        labels = column.cast(pyarrow.int64()).to_numpy()
    most = len(choice.names) or MOST_CLASSES
    wrong = (labels < 0) | (labels >= most)
    if wrong.any():
        label = int(labels[wrong][0])
        of = f"the {most} classes of the column" if choice.names else f"0 to {most - 1:,}"
        unknown = ", which stands for an unknown one" if label == -1 else ""
        raise refuse(wrong, f"its label is {label}{unknown}, none of {of}: correct or remove it")
    return labels


def path_values(images: Any) -> list[str]:
    """What the images' files were called, of a struct column; "" where nobody says."""
    from pyarrow import compute

    images.validate(full=True)
    return [path or "" for path in compute.struct_field(images, "path").to_pylist()]


def refuse_empty(where: str, path: str) -> None:
    if path:
        raise DataError(
            f"{where}: its image is a file of its own, {path!r}, and not in the table: save the "
            "data set with Hugging Face's datasets where those files are, which puts them in"
        )
    raise DataError(f"{where}: it has no image: remove the row")


def named(root: Path, where: Sequence[str], paths: Sequence[str]) -> Names:
    """The names of rows: file, row, and what the image's file was called."""
    names = (f"{row}/{path}" if path else row for row, path in zip(where, paths, strict=True))
    return Names.of(str(root), [os.fsencode(name).replace(b"\0", b"?") for name in names])


def joined(labels: list[np.ndarray | list[str]]) -> np.ndarray | list[str]:
    if all(isinstance(some, np.ndarray) for some in labels):
        return np.concatenate([np.zeros(0, np.int64), *labels])
    return [label for some in labels for label in some]


def assembled(
    config: DataConfig,
    choice: Choice,
    train: Table,
    test: Table | None,
    about: str,
    remarks: Sequence[str],
) -> ImageSet:
    where = f"--data-dir {config.data_dir}, column {choice.label!r}"
    tables = [train] if test is None else [train, test]
    if isinstance(train.labels, np.ndarray):
        most = max(int(np.max(table.labels, initial=-1)) for table in tables)
        classes = list(choice.names) or [str(k) for k in range(most + 1)]
        numbers = [np.asarray(table.labels) for table in tables]
    else:
        texts = {str(text) for table in tables for text in table.labels}
        classes, known = splits.numbered(texts, where)
        numbers = [np.array([known[str(t)] for t in table.labels], np.int64) for table in tables]
    found = [ordered(table, labels, classes) for table, labels in zip(tables, numbers, strict=True)]
    about = f"{about}; images from column {choice.image!r}, labels from {choice.label!r}"
    held = found[1] if test is not None else None
    return splits.put_in_order(config, classes, found[0], held, about, remarks)


def ordered(table: Table, labels: np.ndarray, classes: Sequence[str]) -> Found:
    """By what the images' files were called, as class folders are, and then by row."""
    keys = [f"{path}\0{row:012}" for row, path in enumerate(table.paths)]
    of_class = zip(labels.tolist(), table.paths, strict=True)
    held_by = [f"{classes[label]}/{path}" for label, path in of_class]
    return Found(table.files, labels, keys, splits.distinct(held_by, table.where))


def need_pyarrow(config: DataConfig) -> None:
    """Raises DataError, with the line that installs it, where pyarrow is missing."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise DataError(
            f"--data-dir {config.data_dir} is read with pyarrow: pip install 'fastsmooth[hf]'"
        ) from None


@contextmanager
def foreign(path: str) -> Iterator[None]:
    """Inside, what pyarrow raises about a file is DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of many kinds
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{path} cannot be read ({one_line(error)[:200]}): fetch it again"
        ) from None
