"""Parsers of what flags and files say: numbers, times, names, TOML; argparse that raises, and
guesses what was meant."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import textwrap
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from fastsmooth import course
from fastsmooth.messages import show
from fastsmooth.names import about_flag, about_value, hint
from fastsmooth.runfolder.files import read_file
from fastsmooth.runfolder.numbers import LARGEST, SMALLEST
from fastsmooth.terminal import columns

LARGEST_TOML = 1 << 16  # bytes
MOST_MAGNITUDE = 30  # of an operation of RandAugment
MOST_DOTS = 3000  # in a line of it: the time that a key takes grows with the square of its dots


class ConfigError(ValueError):
    """A flag, a file or a combination that cannot be run; the message says what and what to do."""


def real(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Callable[[str], float]:
    """A parser of finite numbers from `low` to `high`, without the ends that are open."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if abs(value) > LARGEST or 0 < abs(value) < SMALLEST:
            bound = f"at most {LARGEST:g}" if abs(value) > 1 else f"0 or at least {SMALLEST:g}"
            raise argparse.ArgumentTypeError(
                f"{text} cannot be computed with: its size must be {bound}"
            )
        at_open_end = (open_low and value == low) or (open_high and value == high)
        if value < low or value > high or at_open_end:
            bounds = [f"{'above' if open_low else 'at least'} {low:g}"] if low > -math.inf else []
            bounds += [f"{'below' if open_high else 'at most'} {high:g}"] if high < math.inf else []
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: it must be {' and '.join(bounds)}"
            )
        return value

    return parse


def whole(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """A parser of whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            most = "" if high == 2**63 - 1 else f" and at most {high}"
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: it must be at least {low}{most}"
            )
        return value

    return parse


def duration(text: str) -> float:
    """Seconds from "90", "45s", "30m" or "1.5h"."""
    # with an exponent: config.json may hold 1e-05
    time = re.fullmatch(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)([smh]?)", text)
    seconds = float(time[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[time[2]] if time else 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: write 90, 45s, 30m or 1.5h")
    return seconds


def text(value: str) -> str:
    if value.splitlines() != [value] or "\0" in value:  # every message that quotes it is one line
        raise argparse.ArgumentTypeError(
            "it holds a line break or a NUL character" if value else "it is empty"
        )
    try:
        value.encode()  # nor could a page, a tracker or a terminal be told of it
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not UTF-8: give another name") from None
    return value


def like(pattern: str, what: str) -> Callable[[str], str]:
    """A parser of text of a pattern; `what` it is that other text is not."""

    def parse(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise argparse.ArgumentTypeError(f"{value!r} is {what}")
        return value

    return parse


device = like(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", "not auto, cpu, cuda, cuda:N or mps")
every = like(r"every=[1-9]\d{0,8}(ep)?", "not every=N (updates) or every=Nep (epochs)")
budget = like(r"(epochs|updates|samples)=[1-9]\d{0,17}", "not epochs=N, updates=N or samples=N")
warmup = like(r"[1-9]\d{0,8}(ep)?", "not N (updates) or Nep (epochs)")
milestone = like(r"[1-9]\d{0,6}|[1-9]\d?%", "no epoch such as 60, nor a share such as 30%")


def written(value: str) -> str:
    """A schedule, in the one way in which it is written out again."""
    try:
        return str(course.read(text(value)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def micro_batch(value: str) -> int | str:
    return value if value == "auto" else whole(1)(value)


def randaugment(value: str) -> str:
    """So many operations of a magnitude."""
    numbers = re.fullmatch(r"([1-9]),(\d{1,2})", value)
    if not numbers or int(numbers[2]) > MOST_MAGNITUDE:
        raise argparse.ArgumentTypeError(
            f"{value!r} is not N,M, as in 2,9: N operations (1 to 9) of magnitude M (0 to "
            f"{MOST_MAGNITUDE})"
        )
    return value


def sam(value: str) -> str:
    """The radius of SAM and, of GSAM, its weight."""
    names = [part.partition("=")[0].strip() for part in value.split(",")]
    if names not in (["rho"], ["rho", "alpha"]):
        raise argparse.ArgumentTypeError(
            f"{value!r} is not rho=X (SAM) or rho=X,alpha=X (GSAM), as in rho=0.05"
        )
    for part in value.split(","):
        try:
            positive(part.partition("=")[2])
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{value!r}: {error}") from None
    return value


OWN_CODE = re.compile(r".+\.py:[^\W\d]\w*")


def is_code(value: str) -> bool:
    """Whether it is FILE.py:NAME, a name in a file of the user's."""
    return OWN_CODE.fullmatch(value) is not None


def code(value: str) -> str:
    """FILE.py:NAME, or a name that a list has."""
    text(value)
    if re.search(r"\.py(:|$)", value) and not is_code(value):
        raise argparse.ArgumentTypeError(f"{value!r} is not FILE.py:NAME, as in nets.py:small")
    return value


def folder(value: str) -> str:
    """A path that is the same wherever it is read."""
    return os.path.abspath(text(value))


def weights(value: str) -> str:
    """The path of a file or a run, or `pretrained`."""
    return value if value == "pretrained" else folder(value)


def argument(value: str) -> str:
    """NAME=VALUE, for a constructor."""
    text(value)
    if not re.fullmatch(r"[^\W\d]\w*=.+", value):
        raise argparse.ArgumentTypeError(
            f"{value!r} is not NAME=VALUE, as in betas=0.9,0.95 or amsgrad=true"
        )
    return value


class OrCode(tuple[str, ...]):
    """The names that a flag takes beside FILE.py:NAME."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in tuple(self) or is_code(name))


def option(
    default: Any,
    group: str,
    help: str,
    parse: Callable[[str], Any] | None = None,
    *,
    names: Iterable[str] = (),
    choices: Iterable[str] | None = None,
    metavar: str | None = None,
    many: bool = False,
    only: tuple[str, set[str]] | None = None,
) -> Any:
    """A field of Config with what its flag needs. `only` names the field and values without which
    it has no effect."""
    metadata = {
        "group": group,
        "help": help,
        "parse": parse,
        "names": tuple(names),
        # a tuple may know more than what it lists
        "choices": choices if isinstance(choices, tuple) else choices and tuple(choices),
        "metavar": metavar,
        "many": many,
        "only": only,
    }
    return field(default=default, metadata=metadata)


def add_model_flags(add: Callable[..., object], devices: bool = True) -> None:
    """The flags of a command that takes the model of a run: which of its weights and, where there
    are `devices` to choose from, where it computes."""
    names = "best, last, best-ema, last-ema or epoch-N (the best that there are, else the last)"
    add("--weights", type=text, metavar="NAME", help=names)
    if devices:
        places = "auto, cpu, cuda, cuda:N or mps (auto)"
        add("--device", default="auto", type=device, metavar="DEV", help=places)
    add("--trust-code", action="store_true", help="run the Python file that the network came from")


positive = real(0, open_low=True)
momentum = real(0, 1, open_high=True)
WIDEST = 118  # columns of a page of help


class Page(argparse.HelpFormatter):
    """Help as wide as the terminal, in which no word is broken."""

    def __init__(self, prog: str):
        width = min(columns(sys.stdout) or WIDEST, WIDEST)
        super().__init__(prog, max_help_position=min(30, width // 3), width=width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        words = " ".join(text.split())
        return textwrap.wrap(words, width, break_long_words=False, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """All names of a flag, then what it takes, once."""
        if action.nargs == 0 or not action.option_strings:
            return super()._format_action_invocation(action)
        takes = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {takes}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs != "+":
            return super()._format_args(action, default_metavar)
        (one,) = self._metavar_formatter(action, default_metavar)(1)
        return f"{one} ..."

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in self._split_lines(text, width - len(indent)))


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting and says what was meant."""

    several = ""  # what to say of several values where a flag takes one
    # by the `dest` of flags: what the short page of help says of them, and which may be left out
    # there where it says nothing
    short: Mapping[str, str] = MappingProxyType({})
    hideable: Collection[str] = ()

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=Page, **options)

    def parse_args(  # type: ignore[override]  # the words are always given: sys.argv is read once
        self, args: list[str], namespace: Any = None
    ) -> argparse.Namespace:
        for word in args:
            # argparse would give the flag an empty list
            if re.fullmatch(r"(--[^=]+=|-[^-]=?)--", word):
                self.error(f"{word}: -- is no value")
        values, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self.about(rest[0], args))
        return values

    def about(self, word: str, args: list[str]) -> str:
        """What to say about a word that belongs to no flag."""
        known = [name for action in self._actions for name in action.option_strings]
        name = word.partition("=")[0]
        if re.match(r"-[^\d.]", name):
            return about_flag(name, known)
        before = self.flag_before(word, args)
        if before is not None:
            takes = f"no value: {before.help}" if before.nargs == 0 else f"one value{self.several}"
            return f"unexpected {word!r}: {before.option_strings[0]} takes {takes}"
        if "--data-dir" in known and os.path.isdir(word):
            return f"unexpected {word!r}: a folder of images is given as --data-dir {word}"
        return f"unexpected {word!r}: {hint(name, known) or '--help lists the flags'}"

    def flag_before(self, word: str, args: list[str]) -> argparse.Action | None:
        """The flag after whose values the word stands; None where no flag is before it."""
        action, room = None, 0.0  # how many more values it takes
        takes: dict[Any, float] = {None: 1, 0: 0}
        for arg in args:
            name, equals, _ = arg.partition("=")
            if name in self._option_string_actions:
                action = self._option_string_actions[name]
                room = 0 if equals else takes.get(action.nargs, math.inf)
            elif room:
                room -= 1
            elif arg == word:
                break
        return action

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices: Any = action.choices
        if choices is not None and value not in choices:
            name = action.option_strings[0]
            raise argparse.ArgumentError(
                None, f"{name} {value}: {about_value(name, value, choices)}"
            )

    def help_in(self, group: argparse._ArgumentGroup) -> None:
        """--help and --help all, which `page` answers."""
        group.add_argument(
            "--help",
            "-h",
            nargs="?",
            const=True,
            choices=("all",),
            metavar="all",
            help="the flags that most runs need; all: this page",
        )

    def page(self, asked: object) -> str:
        """The page of help that --help asks for: of `all` flags, or the short one. The parser can
        parse nothing afterwards."""
        if asked == "all":
            return self.format_help()
        hidden = 0
        for action in self._actions:
            name, *others = action.option_strings
            action.option_strings = [name, *(word for word in others if word[1] != "-")]
            if action.dest in self.short:
                action.help = self.short[action.dest].replace("%", "%%")
                if action.choices:
                    action.metavar, action.choices = action.metavar or "NAME", None
            elif action.dest in self.hideable:
                action.help, hidden = argparse.SUPPRESS, hidden + 1
        self.epilog = f"--help all has every flag: {hidden} more, and more about these."
        return self.format_help()

    def print_help(self, file: Any = None) -> None:
        show(*self.format_help().splitlines())

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+?)(?:/\S+)*: ", r"\1: ", message)
        required = r"^the following arguments are required: (.*)"
        message = re.sub(required, r"\1 is missing: --help says how", message)
        message = re.sub(r"\S{200,}", lambda word: word[0][:100] + "…", message)
        raise ConfigError(message.replace("\n", " "))


def plain(word: str) -> str:
    """--decay_epoch=3 as --decay-epoch=3."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def text_of(path: str, source: str) -> str:
    """The text of a file of flags. Raises ConfigError, before it reads a file that is too large to
    be one."""
    try:
        return read_file(Path(path), LARGEST_TOML).decode()
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}: give a TOML file of flags") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: not a text file: give a TOML file of flags") from None


def json_table(path: str, source: str) -> dict[str, Any]:
    """What a JSON file of flags holds, less its nulls. Raises ConfigError."""
    try:
        table = json.loads(text_of(path, source))
        return {key: value for key, value in table.items() if value is not None}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{source}: not JSON of flags: {error}: give the config.json of a run"
        ) from None


def toml_table(path: str, source: str) -> dict[str, Any]:
    """What a TOML file of flags holds. Raises ConfigError."""
    content = text_of(path, source)
    try:
        if any(line.count(".") > MOST_DOTS for line in content.splitlines()):
            raise RecursionError
        table = tomllib.loads(content)
        # raises ValueError for more digits than Python writes: of a hexadecimal number it
        # reads them
        str(table)
        return table
    except RecursionError:
        raise ConfigError(
            f"{source}: not TOML of flags: it is nested too deep: write plain lines such as lr = "
            "0.1"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{source}: not TOML: {error}") from None


def flag(name: str) -> str:
    """The flag a person would type for a field: --batchsize, --lr."""
    return "--batchsize" if name == "batch_size" else "--" + name.replace("_", "-")
