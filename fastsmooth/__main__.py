"""All commands by one name: fastsmooth COMMAND [flags], or python -m fastsmooth COMMAND [flags]

Nothing is imported before it is known which command is meant: the list of them comes at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import NoReturn

from fastsmooth import __version__
from fastsmooth.messages import BAD_INPUT, DONE, command, end_with, show, tell
from fastsmooth.names import hint

COMMANDS = {  # name: its module, what it does
    "train": ("fastsmooth.train", "train or measure one image classifier"),
    "evaluate": ("fastsmooth.evaluate", "judge what was trained by images with labels"),
    "predict": ("fastsmooth.predict", "the classes of images, by what was trained"),
    "prepare": ("fastsmooth.prepare.__main__", "smaller copies of images, made once, to train on"),
    "sweep": ("fastsmooth.sweep.__main__", "many runs: grids, seeds, Slurm, Ray"),
    "sharpness": ("fastsmooth.sharpness", "how sharp the minima of saved runs are"),
    "export": ("fastsmooth.export.__main__", "a trained model as safetensors, ONNX, for the Hub"),
    "report": ("fastsmooth.report.__main__", "tables, figures and one HTML page of any runs"),
    "smooth": ("fastsmooth.smooth.__main__", "explicit smoothing of known functions"),
}


def main(argv: list[str] | None = None) -> int:
    """Do the command that the first word names; the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    if name in ("-h", "--help"):
        show(*page())
        return DONE
    if name == "--version":
        show(f"fastsmooth {__version__}")
        return DONE
    if name.startswith("-"):
        first = f"name the command first: {command('train')} {name}"
        tell("error", f"{name}: {first}, or --help, which lists them")
    else:
        tell("error", f"unknown command {name!r}: {hint(name, COMMANDS) or '--help lists them'}")
    return BAD_INPUT


def page() -> Iterator[str]:
    """The lines that list the commands."""
    program, width = command("").rstrip(" ."), max(map(len, COMMANDS))
    yield f"usage: {program} COMMAND [flags]"
    yield ""
    yield from (f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    yield ""
    yield f"{program} COMMAND --help lists the flags of a command,"
    yield f"{program} --version prints the version."
    yield f"A first run, of seconds: {command('train')} --method exp"


def entry() -> NoReturn:
    """What the command `fastsmooth` calls."""
    end_with(main)


if __name__ == "__main__":
    entry()
