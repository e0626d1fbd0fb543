"""Images whose labels are in a file beside them: csv, tsv, json or json lines.

A row is an image: its name, its label, and perhaps whether it is for training. Names are matched
with the image files below --data-dir, by the first of these rules that finds all of them: the path
from the table's folder, from --data-dir, from a folder in it (first one of the table's part of the
split), the file's name; then the same without its ending.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fastsmooth.data.files import Paths
from fastsmooth.data.images import DataConfig, DataError, ImageSet, Split
from fastsmooth.data.layouts.common import (
    EXTENSIONS,
    TABLES,
    existing_folder,
    is_folder,
    is_image,
    kept_whole,
    listed,
    more,
    needs_share,
    put_together,
    refuse_share,
    shared_out,
    sorted_by_class,
)
from fastsmooth.data.layouts.trees import images_below
from fastsmooth.runfolder.files import read_file

WANTS = "images and a csv or json of their names and labels"
# what people call the columns, in small letters; the first that a table has
NAME_COLUMNS = (
    "file_name", "filename", "file", "image_path", "path", "filepath", "file_path", "image_name",
    "image_file", "image", "img", "img_path", "img_name", "image_id", "imageid", "id_code", "name",
    "uuid", "id",
)  # fmt: skip
LABEL_COLUMNS = (
    "label", "labels", "class", "class_name", "classname", "class_id", "label_name", "category",
    "target", "species", "breed", "diagnosis", "y",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "subset", "set", "partition", "fold_name", "data_set")
PARTS = {  # how a split calls its parts, in small letters
    "train": "train", "training": "train", "tr": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# tables that have no labels, or that other forms bring along
NO_LABELS = {"sample_submission.csv", "samplesubmission.csv", "submission.csv"}
OTHERS = {"state.json", "dataset_info.json", "dataset_dict.json", "prepared.json"}
LONGEST = 4096  # letters of a name or a label
FEW = 8  # folders in --data-dir from which names are tried


class Row(NamedTuple):
    """An image as a table has it."""

    line: int  # counted from 1, of a json the place in its list
    name: str
    label: str
    part: str  # "train", "val" or "test"; "" where the table does not say


class Table(NamedTuple):
    """The rows of a file, and the part of the split that its own name says, or ""."""

    path: Path
    part: str
    rows: list[Row]


def sign(root: Path) -> str:
    """What tells that a folder is one of images with a table."""
    if not root.is_dir():
        return ""
    found = candidates(root)
    if not found or not has_images(root, 3):
        return ""
    return f"labels in {found[0].name}{more([path.name for path in found])}"


def read(config: DataConfig) -> ImageSet:
    """The images below --data-dir with the labels of its table, or of --labels."""
    root = existing_folder(config, "images")
    tables, unlabelled = chosen(config, root)
    images = images_below(root)
    if not images:
        raise DataError(f"--data-dir {root} has no images for the rows of {tables[0].path.name}")
    by_part: dict[str, list[tuple[str, str]]] = {}  # part: path and label of each image
    rows_of: dict[str, tuple[Path, int]] = {}
    for table in tables:
        for row, path in zip(table.rows, matched(table, root, images), strict=True):
            if path in rows_of:
                where, line = rows_of[path]
                raise DataError(
                    f"{table.path}, line {row.line}: {row.name!r} is the image of line {line}"
                    f"{'' if where == table.path else f' of {where.name}'}: name each once"
                )
            rows_of[path] = table.path, row.line
            by_part.setdefault(row.part or table.part, []).append((path, row.label))
    remarks = [f"{path}: no column of labels: it is left out" for path in unlabelled]
    if unnamed := len(images) - len(rows_of):
        remarks.append(f"{root}: images that no row names are left out: {unnamed:,}")
    source = f"labels from {' and '.join(table.path.name for table in tables)}"
    return split_up(config, root, by_part, source, remarks)


def split_up(
    config: DataConfig,
    root: Path,
    by_part: dict[str, list[tuple[str, str]]],
    source: str,
    remarks: list[str],
) -> ImageSet:
    """The set of the images by part of the split, "" for those of which nothing is said."""
    if kept_whole(config) and len(by_part) == 1:  # of one part alone
        by_part = {"": next(iter(by_part.values()))}
    whole = by_part.pop("", [])
    if whole and by_part:
        raise DataError(
            f"--data-dir {root}: {len(whole):,} rows say nothing of the split, and others do: fill "
            "them in"
        )
    if whole:
        classes = named(label for _, label in whole)
        needs_share(config, f"{root}: {source}")
        everything = split_of(root, whole, classes)
        keys = relative(everything, root)
        train, test = shared_out(config, everything, keys)
        return put_together(config, classes, train, test, source, remarks)
    refuse_share(config, f"{root}: {source} says which images are for testing")
    held = next((part for part in ("val", "test") if part in by_part), None)
    if held is None or "train" not in by_part:
        lacking = "training" if "train" not in by_part else "test"
        raise DataError(f"--data-dir {root}: {source}: no row is for {lacking}: add some")
    if held == "val" and "test" in by_part:
        count = len(by_part["test"])
        remarks.append(f"{root}: tested on the val images; left out are those of test: {count:,}")
    classes = named(label for _, label in by_part["train"])
    for path, label in by_part[held]:
        if label not in classes:
            raise DataError(
                f"{path} is of class {label!r}, which no training image has: leave it out, or add "
                "training images"
            )
    train, test = (split_of(root, by_part[part], classes) for part in ("train", held))
    return put_together(config, classes, train, test, source, remarks)


def split_of(root: Path, images: list[tuple[str, str]], classes: Sequence[str]) -> Split:
    numbers = {name: k for k, name in enumerate(classes)}
    labels = np.array([numbers[label] for _, label in images], np.int64)
    paths = [path for path, _ in images]
    return sorted_by_class(Paths(paths), labels, [os.path.relpath(path, root) for path in paths])


def relative(split: Split, root: Path) -> list[str]:
    names = split.files.names if split.files else ()
    return [os.path.relpath(path, root) for path in names]


def named(labels: Iterable[str]) -> tuple[str, ...]:
    """The classes in order: numbers by their size, names by their letters."""
    found = set(labels)
    numbers = all(map(is_number, found))
    return tuple(sorted(found, key=lambda label: (int(label) if numbers else 0, label)))


def is_number(label: str) -> bool:
    return label.removeprefix("-").isascii() and label.removeprefix("-").isdigit()


# Which tables


def candidates(root: Path) -> list[Path]:
    """The tables of a folder: in it, or a metadata file in a folder of images."""
    found = []
    for entry in sorted(listed(root), key=lambda entry: entry.name):
        if is_folder(entry):
            inside = (Path(entry.path, "metadata" + ending) for ending in TABLES)
            found += [path for path in inside if path.is_file()]
        elif entry.name.lower().endswith(TABLES):
            found.append(Path(entry.path))
    return [path for path in found if path.name.lower() not in NO_LABELS | OTHERS]


def chosen(config: DataConfig, root: Path) -> tuple[list[Table], list[Path]]:
    """The tables that are read, and those that have no labels, as a contest's test.csv."""
    if config.labels is not None:
        name, columns = asked_for(config.labels)
        path = next((p for p in (root / name, Path(name)) if p.is_file()), None)
        if path is None:
            raise DataError(f"--labels {name}: no such file in {root}: give its name there")
        return [Table(path, "", rows_of(path, columns))], []
    paths = candidates(root)
    if not paths:
        raise DataError(
            f"--data-dir {root} has no csv or json of names and labels: put it there, or give "
            "--labels FILE"
        )
    if len(paths) == 1:
        return [Table(paths[0], "", rows_of(paths[0]))], []
    parts = {path: part_of(path) for path in paths}
    if "" in parts.values() or max(Counter(parts.values()).values()) > 1:
        several = ", ".join(str(path.relative_to(root)) for path in paths[:5])
        raise DataError(
            f"--data-dir {root} has several tables ({several}): say which with --labels FILE"
        )
    tables, unlabelled = [], []
    for path, part in parts.items():
        if part == "test" and not has_labels(path):
            unlabelled.append(path)
        else:
            tables.append(Table(path, part, rows_of(path)))
    if len(tables) == 1:
        tables = [tables[0]._replace(part="")]
    return tables, unlabelled


def asked_for(labels: str) -> tuple[str, tuple[str, str] | None]:
    """The file and the two columns of --labels FILE:NAME,LABEL."""
    path, colon, columns = labels.rpartition(":")
    name, comma, label = columns.partition(",")
    if not colon:
        return labels, None
    if not comma:
        raise DataError(f"--labels {labels}: name both columns, FILE:NAME,LABEL")
    return path, (name, label)


def part_of(path: Path) -> str:
    """The part of the split that a table's name says, or its folder's of a metadata file."""
    return part_in(path.parent.name if path.stem.lower() == "metadata" else path.stem)


def part_in(word: str) -> str:
    """The part of the split that a name says; "" where it says none."""
    words = [word, *word.replace("-", "_").split("_")]
    return next((PARTS[w] for w in map(str.lower, words) if w in PARTS), "")


def has_images(folder: Path, depth: int) -> bool:
    """Whether images lie in a folder, or so deep below it."""
    entries = listed(folder)
    if any(map(is_image, entries)):
        return True
    below = (Path(entry.path) for entry in entries if is_folder(entry))
    return depth > 1 and any(has_images(path, depth - 1) for path in below)


# What a table says


def records_of(path: Path) -> tuple[list[str], list[tuple[int, list[Any]]]]:
    """(columns, line and values of each row) of a table. Raises DataError."""
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: it is not UTF-8: save it as that") from None
    ending = path.suffix.lower()
    try:
        if ending in (".csv", ".tsv"):
            return columns_of(path, text)
        if ending == ".jsonl":
            lines = enumerate(text.split("\n"), 1)  # splitlines would cut strings
            return of_objects(path, [(n, json.loads(line)) for n, line in lines if line.strip()])
        return of_json(path, json.loads(text))
    except (ValueError, RecursionError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not {ending[1:]} that can be read ({error}): mend it") from None


def columns_of(path: Path, text: str) -> tuple[list[str], list[tuple[int, list[Any]]]]:
    """Of comma, semicolon or tab separated values; without a header where its first line is one of
    an image."""
    first = text.partition("\n")[0]
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    if not rows:
        raise DataError(f"{path}: it is empty: fill it in")
    header = [cell.strip() for cell in rows[0][1]]
    if any(os.path.splitext(cell)[1].lower() in EXTENSIONS for cell in header):
        header = ["file", "label", *(f"column {k + 3}" for k in range(len(header) - 2))]
    else:
        rows = rows[1:]
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {line}: it has {len(row)} columns, the first line {len(header)}: "
                "mend it"
            )
    return header, [(line, [cell.strip() for cell in row]) for line, row in rows]


def of_json(path: Path, value: Any) -> tuple[list[str], list[tuple[int, list[Any]]]]:
    """Of {name: label}, [[name, label], ...] or [{"file_name": name, "label": label}, ...]."""
    if isinstance(value, dict):
        value = list(value.items())
    rows = list(enumerate(value, 1)) if isinstance(value, list) else []
    if rows and all(isinstance(row, dict) for _, row in rows):
        return of_objects(path, rows)
    pairs = [(n, list(row)) for n, row in rows if isinstance(row, list | tuple) and len(row) == 2]
    if not rows or len(pairs) != len(rows):
        raise DataError(
            f'{path}: not {{"NAME": LABEL, ...}}, [["NAME", LABEL], ...] or [{{"file_name": NAME, '
            '"label": LABEL}, ...]: bring it to one of these forms'
        )
    return ["file", "label"], pairs


def of_objects(
    path: Path, rows: Sequence[tuple[int, Any]]
) -> tuple[list[str], list[tuple[int, list[Any]]]]:
    for line, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {line}: it is no object with names and values: mend it")
    if not rows:
        raise DataError(f"{path}: it is empty: fill it in")
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    return columns, [(line, [row.get(key) for key in columns]) for line, row in rows]


def has_labels(path: Path) -> bool:
    """Whether a table has a column of labels."""
    columns, records = records_of(path)
    return label_column(columns, records, name_column(columns)) is not None


def name_column(columns: list[str]) -> int | None:
    return column_called(columns, NAME_COLUMNS, 0 if len(columns) == 2 else None)


def label_column(
    columns: list[str], records: list[tuple[int, list[Any]]], name: int | None
) -> int | Callable[[list[Any]], str] | None:
    """The column of the labels; of one column a class, with a single 1 in every row, what gives a
    row's class; None where there is neither."""
    other = 1 - name if name is not None and len(columns) == 2 else None
    if other is not None and other == column_called(columns, SPLIT_COLUMNS, None):
        other = None
    found = column_called(columns, LABEL_COLUMNS, other)
    if found is not None or name is None:
        return found
    split = column_called(columns, SPLIT_COLUMNS, None)
    classes = [k for k in range(len(columns)) if k not in (name, split)]
    if len(classes) < 2 or not all(one_hot(row, classes) for _, row in records):
        return None
    return lambda row: columns[next(k for k in classes if truth(row[k]) == 1)]


def one_hot(row: list[Any], classes: list[int]) -> bool:
    values = [truth(row[k]) for k in classes]
    return None not in values and sum(value or 0 for value in values) == 1


def truth(cell: Any) -> int | None:
    """0 or 1; None for what is neither."""
    return {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1}.get(str(cell))


def column_called(columns: list[str], names: Sequence[str], default: int | None) -> int | None:
    """The column with the first of these names that there is."""
    lower = [str(column).lower() for column in columns]
    return next((lower.index(name) for name in names if name in lower), default)


def rows_of(path: Path, asked: tuple[str, str] | None = None) -> list[Row]:
    """The rows of a table, by the columns asked for or those whose names tell. Raises DataError."""
    columns, records = records_of(path)
    shown = ", ".join(map(str, columns[:12]))
    for column in asked or ():
        if column not in columns:
            raise DataError(f"--labels: {path} has no column {column!r}: choose from {shown}")
    name = columns.index(asked[0]) if asked else name_column(columns)
    label = columns.index(asked[1]) if asked else label_column(columns, records, name)
    if name is None or label is None:
        what = "the names" if name is None else "the labels"
        raise DataError(
            f"{path}: which column has {what}? Say so with --labels {path.name}:NAME,LABEL (it has "
            f"{shown})"
        )
    if not records:
        raise DataError(f"{path}: it has no rows: fill it in")
    split = column_called(columns, SPLIT_COLUMNS, None)
    rows = []
    for line, record in records:
        value = record[label] if isinstance(label, int) else label(record)
        said = None if split is None or split == label else record[split]
        part = "" if said is None else str(said).strip().lower()
        if part and part not in PARTS:
            raise DataError(
                f"{path}, line {line}: {part!r} is no part of a split: write train, val or test"
            )
        where = f"{path}, line {line}"
        rows.append(
            Row(
                line,
                text_in(record[name], "name", where),
                label_in(value, where),
                PARTS.get(part, ""),
            )
        )
    distinct = len({row.label for row in rows})
    if distinct == len(rows) > 2:
        raise DataError(
            f"{path}: all of its {distinct:,} labels differ: which column has the classes? Say so "
            f"with --labels {path.name}:NAME,LABEL (it has {shown})"
        )
    return rows


def text_in(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
        raise DataError(f"{where}: no {what}: fill it in")
    if len(str(value)) > LONGEST:
        raise DataError(f"{where}: its {what} has over {LONGEST:,} letters: mend it")
    return str(value).strip()


def label_in(value: Any, where: str) -> str:
    """The class that a value names: 3, "3" and 3.0 are the same one."""
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, float):
        value = str(value)
    if isinstance(value, list | dict):
        raise DataError(f"{where}: several labels of one image: leave one")
    # as pandas writes a value that is not there
    label = text_in("" if value == "nan" else value, "label", where)
    whole, point, rest = label.partition(".")
    if point and is_number(whole) and rest.isdigit():
        if rest.strip("0"):
            raise DataError(f"{where}: the label {label} is a number but no class: give classes")
        return whole
    return label


# Which file a row means


def matched(table: Table, root: Path, images: Sequence[str]) -> list[str]:
    """The path of each row's image. Raises DataError for a row without a file, or with several."""
    best: tuple[int, list[list[str]]] | None = None
    for alike in rules(table, root):
        whole: list[list[str]] = []  # what rules that say as much as each other find
        for rule in alike:
            by_key: dict[str, list[str]] = {}
            for path in images:
                by_key.setdefault(rule.of_path(path), []).append(path)
            found = [rule.kept(row.name, by_key) for row in table.rows]
            hits = sum(map(bool, found))
            if hits == len(found) and all(len(paths) == 1 for paths in found):
                whole.append([paths[0] for paths in found])
            if best is None or hits > best[0]:
                best = hits, found
        if len(whole) > 1:
            refuse_either(table, table.rows[0], whole[0][0], whole[1][0])
        if whole:
            return whole[0]
    rows = best[1] if best else []
    lost = [row for row, paths in zip(table.rows, rows, strict=True) if not paths]
    if lost:
        raise DataError(
            f"{table.path}, line {lost[0].line}: there is no image {lost[0].name!r} in {root}"
            f"{more([row.name for row in lost])}: add it, or take the row out"
        )
    row, paths = next((row, p) for row, p in zip(table.rows, rows, strict=True) if len(p) > 1)
    refuse_either(table, row, paths[0], paths[1])


def refuse_either(table: Table, row: Row, one: str, other: str) -> NoReturn:
    raise DataError(
        f"{table.path}, line {row.line}: {row.name!r} could be {one} or {other}: write more of the "
        "path"
    )


class Rule(NamedTuple):
    """What of an image's path must be what a row says."""

    folder: Path | None  # the path from here; None: the file's name alone
    ending: bool  # with its ending

    def of_path(self, path: str) -> str:
        kept = os.path.basename(path) if self.folder is None else os.path.relpath(path, self.folder)
        return kept if self.ending else os.path.splitext(kept)[0]

    def of_row(self, name: str) -> str:
        name = os.path.normpath(name.replace("\\", "/"))
        return os.path.basename(name) if self.folder is None else name

    def kept(self, name: str, by_key: dict[str, list[str]]) -> list[str]:
        """The files that a row of this name may mean. A name alone means none whose folder is of
        another part of the split than the row's folder."""
        paths = by_key.get(self.of_row(name), [])
        said = part_in(os.path.basename(os.path.dirname(name.replace("\\", "/"))))
        if self.folder is not None or not said:
            return paths
        parts = [part_in(os.path.basename(os.path.dirname(path))) for path in paths]
        return [path for path, part in zip(paths, parts, strict=True) if part in ("", said)]


def rules(table: Table, root: Path) -> Iterator[list[Rule]]:
    """What is tried in turn: rules that stand together say as much as each other."""
    inside = sorted(Path(entry.path) for entry in listed(root) if is_folder(entry))
    inside = inside if len(inside) <= FEW else []
    part = part_of(table.path)
    own = [folder for folder in inside if part and part_in(folder.name) == part]
    for ending in (True, False):
        for bases in ([table.path.parent], [root], own, inside):
            yield [Rule(base, ending) for base in bases]
        yield [Rule(None, ending)]
