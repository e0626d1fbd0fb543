"""A trained model judged by labelled images: python -m fastsmooth.evaluate RUN [--data-dir DIR]

Without --data-dir by the run's own test images, as the run itself tests.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import SUPPRESS
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsmooth.cli import flags as flag_types
from fastsmooth.cli.config import FIELDS
from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import DONE, command, end_with, exit_code, printable, show, warn
from fastsmooth.runfolder.files import finite
from fastsmooth.runfolder.read import RunError
from fastsmooth.terminal import cells, columns

if TYPE_CHECKING:
    from fastsmooth.evaluation import Evaluation, Tally
    from fastsmooth.trained import TrainedRun

SPLITS = ("test", "train", "all")
MOST_CLASSES = 20  # of a confusion table; of more the most frequent confusions are shown
MOST_ROWS, MOST_PAIRS = 20, 10  # classes, and confusions, that are shown
WIDEST, SHORT = 24, 3  # columns of a class's name; of one that heads a column


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    run: Path
    images: dict[str, Any]  # the fields of evaluation.Asked
    weights: str | None
    device: str
    trust_code: bool
    json: bool


def parser() -> flag_types.Parser:
    p = flag_types.Parser(
        prog=command("evaluate"),
        usage="%(prog)s RUN [--data-dir DIR] [flags]",
        description="Judge the model that a run trained by labelled images: accuracy, loss, and "
        "what it takes for what. Without --data-dir: by the run's own test images.",
        add_help=False,
    )
    of = {name: FIELDS[name].metadata for name in ("dataset", "labels", "on_bad_image")}
    # fmt: off
    add = p.add_argument
    add("run", nargs="*", metavar="RUN", type=flag_types.text, help="a run folder that fastsmooth.train wrote")
    add = p.add_argument_group("the images").add_argument
    add("--data-dir", type=flag_types.text, metavar="DIR", help="where they are (the run's own)")
    add("--dataset", choices=of["dataset"]["choices"], metavar="NAME", help="what they are (as they are recognised)")
    add("--labels", type=flag_types.text, metavar="FILE", help=of["labels"]["help"])
    add("--split", choices=SPLITS, help="which of them (test; of images without a split: all)")
    add("--on-bad-image", default="raise", choices=of["on_bad_image"]["choices"], help="raise: stop; zeros: show it black and count it (raise)")
    add("--ignore-unknown", action="store_true", help="leave out images of classes that the run has not")
    add = p.add_argument_group("the model").add_argument
    flag_types.add_model_flags(add)
    add("--batch-size", "--batchsize", "-b", type=flag_types.whole(1), metavar="N", help="images through it together (as the run tests)")
    add = p.add_argument_group("other").add_argument
    add("--json", action="store_true", help="one JSON object with all numbers, the whole confusion matrix among them")
    add("-h", "--help", action="store_true", default=SUPPRESS, help="this page")
    # fmt: on
    return p


def parse(argv: list[str]) -> Request | None:
    """The request of a command line; None where it asks for help. Raises ConfigError."""
    given = vars(parser().parse_args([flag_types.plain(word) for word in argv]))
    if given.pop("help", False):
        return None
    runs = given.pop("run")
    if len(runs) != 1:
        what = "no run is named" if not runs else f"{len(runs)} runs are named"
        raise ConfigError(
            f"{what}: {command('evaluate')} RUN, a folder that fastsmooth.train wrote; --data-dir "
            "DIR names images"
        )
    if given["labels"] is not None and given["data_dir"] is None:
        raise ConfigError("--labels is of what lies in --data-dir: give that too")
    model = {name: given.pop(name) for name in ("weights", "device", "trust_code", "json")}
    return Request(Path(runs[0]), given, **model)


def main(argv: list[str] | None = None) -> int:
    """Judge the run of a command line; the exit code."""
    return exit_code(
        lambda: carry_out(sys.argv[1:] if argv is None else argv), (ConfigError, RunError)
    )


def carry_out(argv: list[str]) -> int:
    request = parse(argv)
    if request is None:
        show(*parser().format_help().splitlines())
        return DONE
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in fastsmooth.train, which says why
    from fastsmooth import evaluation  # with torch, after the flags are right: it takes seconds
    from fastsmooth.data import DataError
    from fastsmooth.inference import opened_run
    from fastsmooth.models import ModelError

    try:
        run = opened_run(request.run, request.weights, request.device, request.trust_code)
        found = evaluation.evaluate(run, evaluation.Asked(**request.images), warn)
    except (DataError, ModelError) as error:
        raise ConfigError(str(error)) from None
    if request.json:
        show(json.dumps(finite(as_json(run, request, found))[0]), whole=True)
    else:
        for line in lines(run, request, found, columns(sys.stdout)):
            show(line)
    return DONE


def as_json(run: TrainedRun, request: Request, found: Evaluation) -> dict[str, Any]:
    """Every number, by name. Shares are from 0 to 1."""
    from fastsmooth.evaluation import by_class

    tally, facts = found.tally, run.facts
    return {
        "run": str(run.path),
        "weights": run.weights_path.name,
        "weights_about": run.about_weights,
        "network": facts.network,
        "data_dir": run.config.get("data_dir") if found.own else request.images["data_dir"],
        "own_images": found.own,
        "split": found.part,
        "about_images": found.images,
        "view": {"resize": facts.resize, "image_size": facts.image_size},
        "precision": found.precision,
        "images": tally.images,
        "left_out": found.left_out,
        "bad_images": found.bad,
        "correct": tally.correct,
        "accuracy": tally.accuracy,
        "accuracy_interval": list(tally.interval),
        "top5": tally.top5,
        "loss": tally.loss,
        "classes": by_class(tally, facts),
        "confusion": tally.confusion.tolist(),
    }


# What a person sees


def lines(run: TrainedRun, request: Request, found: Evaluation, room: int | None) -> Iterator[str]:
    """The report, on a terminal with `room` columns."""
    from fastsmooth.evaluation import by_class

    tally, facts = found.tally, run.facts
    rows = by_class(tally, facts)
    yield about_model(run)
    yield about_images(run, request, found)
    if noted := as_noted(run, found):
        yield noted
    low, high = tally.interval
    yield ""
    yield (
        f"accuracy  {tally.accuracy:.2%}: {tally.correct:,} of {tally.images:,}, 95 % interval "
        f"{low:.2%} to {high:.2%}"
    )
    if tally.top5 is not None:
        yield f"top-5     {tally.top5:.2%}"
    yield f"loss      {tally.loss:.6g}, mean cross-entropy"
    yield ""
    yield from confusion_lines(tally, rows, room)
    yield ""
    yield from class_lines(rows)


def about_model(run: TrainedRun) -> str:
    about = run.about_weights
    epoch, facts = about.get("epoch"), run.facts
    when = f" of epoch {epoch + 1}" if isinstance(epoch, int) else ""
    return (
        f"{printable(str(run.path))}: {run.weights_path.name}{when}, {facts.network}, "
        f"{len(facts.classes):,} classes"
    )


def about_images(run: TrainedRun, request: Request, found: Evaluation) -> str:
    own, rows = found.own, found.tally.confusion.sum(axis=1)
    where = run.config.get("dataset") if own else request.images["data_dir"]
    part = "" if found.part == "all" else f" {found.part}"
    words = [f"{found.tally.images:,}{part} images of {where}" + " (the run's own)" * own]
    with_images = int((rows > 0).sum())
    if with_images < len(rows):
        words.append(f"of {with_images:,} of the {len(rows):,} classes")
    words.append(f"{found.view}, in {found.precision}")
    if found.left_out:
        words.append(f"{found.left_out:,} images of unknown classes left out")
    if found.bad:
        words.append(f"{found.bad:,} that could not be read, shown black")
    return ", ".join(words)


def as_noted(run: TrainedRun, found: Evaluation) -> str:
    """What there is to say of the accuracy on the run's own test images."""
    noted = run.about_weights.get("test_acc")
    if not found.own or found.part != "test" or not isinstance(noted, float):
        return ""
    name = run.weights_path.stem
    same = f"{noted:.2%}" == f"{found.tally.accuracy:.2%}"
    words = [] if same else [f"the run itself noted {noted:.2%}: other images, or another machine"]
    if name.startswith("best"):
        words.append(
            f"{name} was chosen by its accuracy on these images, which is optimistic for it"
        )
    return "; ".join(words)


def confusion_lines(tally: Tally, rows: list[dict[str, Any]], room: int | None) -> Iterator[str]:
    """The confusion table, or of many classes, or on a narrow terminal, what is confused most."""
    if len(rows) <= MOST_CLASSES:
        table = list(table_lines(tally, rows))
        if room is None or max(map(cells, table)) <= room:
            yield "confusion: a row for the images of a class, a column for what they are taken for"
            yield from table
            return
    worst = confusions(tally)
    if not worst:
        yield "no image is taken for one of another class"
        return
    yield "confusions, the most frequent first"
    shown, rest = worst[:MOST_PAIRS], worst[MOST_PAIRS:]
    width = max(cells(short(rows[place]["name"])) for _, *pair in shown for place in pair)
    for count, k, other in shown:
        name, taken = (padded(rows[place]["name"], width) for place in (k, other))
        yield f"  {name} taken for {taken} {count:>6,} of {rows[k]['images']:,}"
    if rest:
        yield f"  and {len(rest):,} more pairs of classes: --json has all"


def table_lines(tally: Tally, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Columns are headed by the classes' names where these are short, else by numbers."""
    values, names = tally.confusion.tolist(), [short(row["name"]) for row in rows]
    widest = max(map(cells, names))
    heads, numbered = names, widest > SHORT
    if numbered:
        heads = [str(k + 1) for k in range(len(rows))]
    width = max(*map(cells, heads), *(len(str(max(row))) for row in values)) + 1
    yield " " * (widest + 5 * numbered + 2) + "".join(padded(head, width, True) for head in heads)
    for k, row in enumerate(rows):
        if not row["images"] and not numbered:  # else the row says what its column is
            continue
        number = f"{k + 1:>4} " if numbered else ""
        counts = "".join(f"{count or '.':>{width}}" for count in values[k])
        yield f"  {number}{padded(names[k], widest)}{counts if row['images'] else ''}".rstrip()


def confusions(tally: Tally) -> list[tuple[int, int, int]]:
    """(images, class, other class that they are taken for), the most images first."""
    k, other = tally.confusion.nonzero()
    counts = tally.confusion[k, other]
    found = zip(counts.tolist(), k.tolist(), other.tolist(), strict=True)
    return sorted((row for row in found if row[1] != row[2]), key=lambda row: (-row[0], row[1:]))


def class_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Accuracy a class, the worst first."""
    tested = [row for row in rows if row["images"]]
    tested.sort(key=lambda row: (row["accuracy"], -row["images"]))
    shown, rest = tested[:MOST_ROWS], tested[MOST_ROWS:]
    width = max(cells(short(row["name"])) for row in shown)
    yield "accuracy of each class, the worst first"
    for row in shown:
        share = f"{row['accuracy']:.2%}"
        yield f"  {padded(row['name'], width)} {share:>8}  {row['correct']:,} of {row['images']:,}"
    if rest:
        least = rest[0]["accuracy"]
        yield f"  and {len(rest):,} more of at least {least:.2%}: --json has all"


def short(name: str) -> str:
    """A class's name, in no more than WIDEST columns."""
    name = printable(name)
    while cells(name) > WIDEST:
        name = name[:-2] + "…"
    return name


def padded(name: str, width: int, right: bool = False) -> str:
    """The name in `width` columns, at the left of them or at the right."""
    name = short(name)
    space = " " * (width - cells(name))
    return space + name if right else name + space


if __name__ == "__main__":
    end_with(main)
