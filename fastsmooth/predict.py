"""What a trained model says of images: python -m fastsmooth.predict RUN FILES... [flags]

A line a file, as they come: however many there are, few are held.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from argparse import SUPPRESS
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsmooth.cli import flags as flag_types
from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import (
    BAD_INPUT,
    DONE,
    command,
    csv_line,
    end_with,
    exit_code,
    printable,
    printable_path,
    show,
    tell,
)
from fastsmooth.runfolder.read import RunError

if TYPE_CHECKING:
    from fastsmooth.data import DataError
    from fastsmooth.trained import Prediction

STDIN = "-"  # in the place of a file: the names are lines of standard input


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    run: Path
    files: tuple[str, ...]
    top: int
    weights: str | None
    device: str
    trust_code: bool
    csv: bool
    json: bool


def parser() -> flag_types.Parser:
    p = flag_types.Parser(
        prog=command("predict"),
        usage="%(prog)s RUN FILES... [flags]",
        description="The class of each image, by the model that a run trained, and its "
        "probability: a line a file.",
        add_help=False,
    )
    # fmt: off
    add = p.add_argument
    add("files", nargs="*", metavar="RUN FILES", help="a run folder that fastsmooth.train wrote; images, folders of images, or - for a list of them, a line each, on standard input")
    add("--top", default=1, type=flag_types.whole(1), metavar="K", help="the K likeliest classes (1)")
    flag_types.add_model_flags(add)
    add("--csv", action="store_true", help="with a header and quotes: path, class, probability, class_2, probability_2 and so on")
    add("--json", action="store_true", help="one JSON object a line")
    add("-h", "--help", action="store_true", default=SUPPRESS, help="this page")
    # fmt: on
    return p


def parse(argv: list[str]) -> Request | None:
    """The request of a command line; None where it asks for help. Raises ConfigError."""
    at = argv.index("--") if "--" in argv else len(argv)
    p, words = parser(), [flag_types.plain(word) for word in argv[:at]]
    values, rest = p.parse_known_args(words)
    # argparse leaves what follows a flag that has a value
    if any(word.startswith("-") and word != STDIN for word in rest):
        p.parse_args(words)  # which says what is wrong with it
    given = vars(values)
    if given.pop("help", False):
        return None
    named = [*given.pop("files"), *rest, *argv[at + 1 :]]
    run, files = named[:1], tuple(named[1:])
    if not run:
        raise ConfigError(
            f"no run is named: {command('predict')} RUN FILES, a folder that fastsmooth.train "
            "wrote and images"
        )
    if not files:
        raise ConfigError(
            f"no image is named: {command('predict')} {printable_path(run[0])} FILES, images or "
            "folders of them, or - for a list on standard input"
        )
    if given["csv"] and given["json"]:
        raise ConfigError("--csv and --json do not go together: give one of them")
    return Request(Path(run[0]), files, **given)


def main(argv: list[str] | None = None) -> int:
    """Say what the images of a command line are; the exit code. One that cannot be read is a line
    on stderr."""
    return exit_code(
        lambda: carry_out(sys.argv[1:] if argv is None else argv), (ConfigError, RunError)
    )


def carry_out(argv: list[str]) -> int:
    request = parse(argv)
    if request is None:
        show(*parser().format_help().splitlines())
        return DONE
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in fastsmooth.train, which says why
    from fastsmooth import inference  # with torch, after the flags are right: it takes seconds
    from fastsmooth.models import ModelError

    try:
        run = inference.opened_run(request.run, request.weights, request.device, request.trust_code)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    named = Named(request.files)
    width = min(request.top, len(run.classes))
    found = inference.predictions(run, named, width, named.unread)
    heard = True
    if request.csv:
        heard = show(csv_line(header(width)), whole=True)
    while heard and (some := list(itertools.islice(found, inference.BATCH))):
        heard = show(*(written(prediction, request) for prediction in some), whole=True)
    if heard and not named.count:
        raise ConfigError("no image is named on standard input: give a path a line")
    if named.failed and named.count > 1:
        tell("error", f"{named.failed:,} of {named.count:,} images could not be read")
    return BAD_INPUT if named.failed else DONE


class Named:
    """The images that words of a command line name, each found when it is asked for; counts them,
    and those that could not be read."""

    def __init__(self, words: tuple[str, ...]):
        self.words = words
        self.count = self.failed = 0

    def __iter__(self) -> Iterator[str]:
        for word in self.words:
            for path in self.below(word):
                self.count += 1
                yield path

    def below(self, word: str) -> Iterator[str]:
        from fastsmooth.data import DataError
        from fastsmooth.data.layouts.common import SUFFIXES
        from fastsmooth.data.layouts.trees import images_below

        if word == STDIN:
            yield from self.lines()
        elif os.path.isdir(word):
            try:
                paths = images_below(Path(word))
            except OSError as error:
                return self.fail(word, error.strerror or str(error))
            except DataError as error:
                return self.fail(word, str(error).removeprefix(f"{word} "))
            if not paths:
                self.fail(word, f"no images are below it: looked for {SUFFIXES}")
            yield from paths
        else:
            yield word

    def lines(self) -> Iterator[str]:
        if sys.stdin is None:
            raise ConfigError("-: standard input is closed: name the images")
        for line in sys.stdin.buffer:
            if path := os.fsdecode(line.rstrip(b"\r\n")):
                yield path

    def fail(self, path: str, reason: str) -> None:
        """One that was asked for is none."""
        self.count += 1
        self.unread_because(path, reason)

    def unread(self, path: Any, error: DataError) -> None:
        self.unread_because(str(path), error.reason or str(error))

    def unread_because(self, path: str, reason: str) -> None:
        self.failed += 1
        tell("error", f"{printable_path(path)}: {reason}")


# How a prediction is written


def written(prediction: Prediction, request: Request) -> str:
    if request.csv:
        return csv_line(row(prediction))
    if request.json:
        return in_json(prediction)
    likely = (f"{printable(each.name)} {each.probability:.4f}" for each in prediction.likely)
    return "  ".join([printable_path(prediction.path), *likely])


def header(width: int) -> list[str]:
    """The columns of `width` classes."""
    numbers = ["", *(f"_{k}" for k in range(2, width + 1))]
    return ["path", *(f"{name}{k}" for k in numbers for name in ("class", "probability"))]


def row(prediction: Prediction) -> list[str]:
    pairs = ((each.name, f"{each.probability:.6g}") for each in prediction.likely)
    return [prediction.path, *itertools.chain.from_iterable(pairs)]


def in_json(prediction: Prediction) -> str:
    likely = [
        {"class": each.name, "id": each.id, "probability": each.probability}
        for each in prediction.likely
    ]
    return json.dumps({"path": prediction.path} | likely[0] | {"likely": likely})


if __name__ == "__main__":
    end_with(main)
