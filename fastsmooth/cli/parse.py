"""Command lines, files of flags and saved runs, read into the fields of a Config."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsmooth import course, owncode
from fastsmooth.cli.config import (
    FIELDS,
    FREE_ON_RESUME,
    NAMED,
    OF_METHOD,
    RESOLVED_ONCE,
    WITH_CODE,
    Config,
    resolve,
    shown,
    without_idle,
)
from fastsmooth.cli.facts import RECIPES, SETS
from fastsmooth.cli.flags import (
    ConfigError,
    Parser,
    flag,
    is_code,
    json_table,
    plain,
    text,
    text_of,
    toml_table,
)
from fastsmooth.cli.page import SHORT
from fastsmooth.messages import command
from fastsmooth.runfolder.files import read_file, read_object
from fastsmooth.runfolder.read import read_status
from fastsmooth.schedule import METHODS


def parser() -> Parser:
    p = Parser(
        prog=command("train"),
        usage="%(prog)s [flags]",
        description="Train or measure one image classifier; without flags, a small network on the "
        "digits that ship with it. Defaults come with --dataset; the run prints what it uses.",
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    p.short, p.hideable = SHORT, FIELDS.keys() | REQUESTS
    p.several = f"; {command('sweep')} does a run for each of several"
    groups: dict[str, Any] = {}
    for name, f in FIELDS.items():
        meta = f.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = p.add_argument_group(meta["group"])
        if isinstance(f.default, bool):
            kind: dict[str, Any] = {"action": "store_true"}
        else:
            kind = {"metavar": meta["metavar"], "choices": meta["choices"], "type": meta["parse"]}
            if meta["many"]:
                kind |= {"nargs": "+"}
        shown = meta["help"]
        named = isinstance(f.default, str | float | int) and not isinstance(f.default, bool)
        if named and f.default != "auto":
            shown += f" ({f.default})"
        if meta["choices"] and meta["metavar"]:  # too many to stand in braces
            shown += ": " + " ".join(meta["choices"])
        names = [*meta["names"], "--" + name.replace("_", "-")]
        names.sort(key=lambda word: (word != flag(name), len(word)))
        groups[meta["group"]].add_argument(*names, dest=name, help=shown.replace("%", "%%"), **kind)
    other = p.add_argument_group("other")
    other.add_argument(
        "--config",
        metavar="FILE",
        type=text,
        help="a TOML file of flags, or config.json of a run; the command line overrides it",
    )
    other.add_argument(
        "--plan", action="store_true", help="print the schedule and its cost, touch no data"
    )
    other.add_argument("--json", action="store_true", help="with --plan: one JSON object an epoch")
    other.add_argument(
        "--html", metavar="FILE", type=text, help="with --plan: draw it, in a page of its own"
    )
    other.add_argument(
        "--doctor",
        action="store_true",
        help="say what is installed and usable here, and what is missing",
    )
    other.add_argument(
        "--check-data", action="store_true", help="decode every image once and list the bad ones"
    )
    p.help_in(other)
    other.add_argument("--version", action="store_true", help="print the version")
    return p


@dataclass(frozen=True)
class Request:
    """What a command line asks for: the fields it gave, and what to do with them."""

    given: dict[str, Any]
    plan: bool = False
    doctor: bool = False
    check_data: bool = False
    json: bool = False
    html: str | None = None
    help: bool | str = False  # "all": the longer page
    version: bool = False


# flags that are no field of a Config
REQUESTS = {f.name for f in dataclasses.fields(Request)} - {"given"}


def parse(argv: list[str]) -> Request:
    """Flags (dashes or underscores) over the file that --config names. Raises ConfigError."""
    p = parser()
    values = vars(p.parse_args([plain(word) for word in argv]))
    extra = {key: values.pop(key, False) for key in REQUESTS - {"html"}}
    extra["html"] = values.pop("html", None)
    path = values.pop("config", None)
    asked = [flag(key) for key in ("plan", "doctor", "check_data") if extra[key]]
    if len(asked) > 1:
        raise ConfigError(f"{asked[0]} and {asked[1]} do not go together: give one of them")
    if extra["json"] and not extra["plan"]:
        raise ConfigError("--json goes with --plan")
    if extra["html"] is not None and (not extra["plan"] or extra["json"]):
        raise ConfigError("--html FILE goes with --plan, without --json")
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    if path is not None:
        given = over(read_flags(p, path), given)
    return Request(given, **extra)


def over(read: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What was read with what is given over it."""
    dropped: set[str] = set()
    for ways in ({"epochs", "budget"}, {"method", "schedule"}):  # two ways to say one thing
        dropped |= ways if ways & given.keys() else set()
    if "schedule" in given:
        names = course.read(given["schedule"]).by_name
        dropped |= {NAMED[name] for name in names}
    return {name: value for name, value in read.items() if name not in dropped} | given


def configured(given: dict[str, Any]) -> Config:
    """The Config of a new run. Raises ConfigError."""
    return resolve(over_finished(given))


# The flags of a finished run that --extend cannot give another value: its state would be of
# something else. The images are compared by their fingerprint.
SAME_TO_EXTEND = ("dataset", "model", "norm", "seed", "optimizer", "decay_weights_only")


def over_finished(given: dict[str, Any]) -> dict[str, Any]:
    """The flags of the run that --extend names, where it does, with what is given over them. Raises
    ConfigError for a run that is not finished, and for flags with which its state could not go
    on."""
    if "extend" not in given:
        return given
    folder = Path(given["extend"])
    try:
        saved = read_saved(folder)
    except ConfigError as error:
        raise ConfigError(f"--extend {error}") from None
    check_finished(folder)
    if saved.mode != "normal":
        raise ConfigError(
            f"--extend {folder}: a run of --mode {saved.mode} ends where it has measured, and is "
            "not trained on: give a run of --mode normal"
        )
    if given.get("dataset") == "auto":  # as what it was recognised
        given = {key: value for key, value in given.items() if key != "dataset"}
    # an average that there is can go on with another decay
    for name in (*SAME_TO_EXTEND, *["ema"] * (saved.ema is None)):
        before = getattr(saved, name)
        if given.get(name, before) != before:
            was = f"has {flag(name)} {shown(before)}, not {shown(given[name])}"
            if before is None or before is False:
                was = f"was trained without {flag(name)}"
            raise ConfigError(
                f"--extend {folder}: the run {was}: leave the flag out, or begin a run with --init "
                f"{folder}"
            )
    inherited = flags_of(saved)
    if given.get("method", saved.method) != saved.method:  # whose numbers are not the other's
        inherited = {name: value for name, value in inherited.items() if name not in OF_METHOD}
    for name in ("init", "extend", "warmup"):  # how that run began
        inherited.pop(name, None)
    if "tracker" in given and saved.wandb_mode == "off":  # of no tracker that was asked for then
        inherited.pop("wandb_mode")
    both = over(inherited, given)
    kept = without_idle(both)  # of what is inherited: another method may not use it
    return {name: value for name, value in both.items() if name in kept or name in given}


def check_finished(folder: Path) -> None:
    """Raises ConfigError where a run has not come to its end, or to a bad one."""
    state = read_status(folder).get("state")
    if state == "diverged":
        raise ConfigError(
            f"--extend {folder}: the run has diverged, and would go on from there: start a new run "
            "with a lower --lr"
        )
    if state != "done":
        raise ConfigError(
            f"--extend {folder}: the run is not finished (its status is "
            f"{state if isinstance(state, str) else 'unknown'}): finish it with --resume --out "
            f"{folder}"
        )


def read_flags(p: Parser, path: str) -> dict[str, Any]:
    """The flags in a TOML or JSON file; of a run's config.json those it was started with."""
    source = f"--config {path}"
    # with which no TOML begins
    if path.endswith(".json") or text_of(path, source).lstrip().startswith("{"):
        table = json_table(path, source)
        if "resume" in table:  # as every run's has, and no file of flags
            return flags_of(at_home(saved_config(table, source), Path(path).parent))
    else:
        table = toml_table(path, source)
    for key in table:
        if key.replace("-", "_") in {"config", "resume"} | REQUESTS:
            raise ConfigError(f"{source}: {key} belongs on the command line")
    return from_table(p, table, source)


def from_table(p: Parser, table: dict[str, Any], source: str) -> dict[str, Any]:
    """The fields in a table read from a file, put through the same checks as flags."""
    words: list[str] = []
    absent: list[str] = []
    for key, value in table.items():
        name = "--" + key.replace("_", "-")
        # argparse would split "lr=1", and take "" for the end of all flags
        if not re.fullmatch(r"[\w-]+", key, re.ASCII):
            raise ConfigError(f"{source}: {key[:100]!r} is no flag: --help lists them")
        if key == "schedule" and isinstance(value, dict):
            value = "; ".join(f"{of}: {knots}" for of, knots in value.items())
        if isinstance(value, dict):
            raise ConfigError(
                f"{source}: [{key[:100]}] is a table: write plain lines such as lr = 0.1"
            )
        if isinstance(value, bool):
            (words if value else absent).append(name)
        elif isinstance(value, list):
            words += [name, *map(str, value)]
        else:
            words.append(f"{name}={value}")
    try:
        # false leaves a flag out, but only a flag that exists and takes no value
        p.parse_args(absent)
        values = vars(p.parse_args(words))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def read_saved(folder: Path, with_code: bool = False) -> Config:
    """The Config that a run folder was started with. `with_code`: the code that lies in the folder
    may be run."""
    path = folder / "config.json"
    try:
        saved = json.loads(read_file(path).decode())
        given = {key: value for key, value in saved.items() if value is not None}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: is this a run folder?") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged, so the run cannot be identified: {error}") from None
    return at_home(saved_config(given, str(path)), folder, with_code)


def saved_config(given: dict[str, Any], source: str) -> Config:
    """The Config in the table of a run's config.json. Raises ConfigError."""
    filled = {*SETS["digits"].defaults, "decay_epoch", "draws"}  # by resolve(), for every data set
    lacking = sorted(filled - given.keys())
    if lacking:
        raise ConfigError(
            f"{source} is damaged, so the run cannot be identified: it lacks {', '.join(lacking)}"
        )
    method = given.get("method")
    if "per" not in given and method in METHODS and method != "step":
        given = given | {"factor": METHODS[method].factor}  # step alone had one then
    values = from_table(parser(), given, source)
    stranger = next((name for name in values if name not in FIELDS), None)
    if stranger:
        raise ConfigError(
            f"{source} is damaged, so the run cannot be identified: {stranger} is no setting of a "
            "run"
        )
    return Config(**values)


def at_home(c: Config, folder: Path, with_code: bool = False) -> Config:
    """`c` with its images and its own code where they lay when the run in `folder` was started,
    wherever this process was; `with_code`: of code that is gone, with the copy in the folder."""
    about = read_object(folder / "env.json") or {}
    home, code = about.get("data_dir"), about.get("code")
    for field, spec in c.own_code.items():
        path, name = owncode.split(spec)
        began = code.get(field) if isinstance(code, dict) else None
        places = [Path(began.rpartition(":")[0])] if isinstance(began, str) else []
        places = [place for place in places if place.name == path.name and str(place).isprintable()]
        copies = [(folder / "code" / path.name).absolute()] * with_code
        for place in (*places, *copies):
            if place.is_file():
                moved: dict[str, Any] = {field: f"{place}:{name}"}
                c = dataclasses.replace(c, **moved)
                break
    if isinstance(home, str) and home.isprintable() and os.path.isdir(home):
        return dataclasses.replace(c, data_dir=home)
    return c


def flags_of(c: Config) -> dict[str, Any]:
    """The fewest flags that make this Config, but for where it runs: what was given, as far as it
    can be told."""
    recipe = RECIPES.get(c.recipe or "", {})  # over which a default may have been given
    left = {
        name: getattr(c, name)
        for name, f in FIELDS.items()
        if getattr(c, name) != f.default or name in recipe
    }
    left = {name: value for name, value in left.items() if name not in ("out", "resume")}
    left["dataset"] = c.dataset  # else --data-dir would say to recognise it
    if c.milestones is not None:  # in the place of which it stands
        left.pop("decay_epoch", None)
    if c.budget is not None:  # the images said how many epochs that is
        steps = {"decay_epoch"} if c.decay_epoch == max(1, c.epochs // 5) else set()
        left = {name: value for name, value in left.items() if name not in {"epochs"} | steps}
    left = without_idle(left)
    whole = resolve(left)
    for name in list(left):
        rest = {other: value for other, value in left.items() if other != name}
        try:
            left = rest if resolve(rest) == whole else left
        except ConfigError:
            continue
    return left


def resumed(given: dict[str, Any]) -> Config:
    """The Config of the run in --out; flags that are given again must agree with what it was
    started with."""
    if "out" not in given:
        raise ConfigError("--resume needs --out DIR: the run folder to go on with")
    saved = read_saved(Path(given["out"]), with_code=True)
    if given.get("method") == "sampling":
        given = {key: value for key, value in given.items() if key != "method"}
        given["mode"] = "sampling"
    if given.get("dataset") == "auto":  # as what it was recognised
        given = {key: value for key, value in given.items() if key != "dataset"}
    if "tracker" in given and saved.wandb_mode == "off":  # of no tracker that was asked for then
        given = {"wandb_mode": None} | given
    # what auto chose may give way to what is asked for
    free = FREE_ON_RESUME | {name for name in RESOLVED_ONCE if getattr(saved, name) == "auto"}
    free |= {name for name in WITH_CODE if same_code(given.get(name), getattr(saved, name))}
    for name, value in given.items():
        before = getattr(saved, name)
        if name not in free and value != before:
            was = f"has {flag(name)} {shown(before)}, not {shown(value)}"
            if before is None or before is False:
                was = f"was started without {flag(name)}"
            raise ConfigError(
                f"--resume: the run in {given['out']} {was}: leave the flag out, or start a new run"
            )
    return dataclasses.replace(saved, **{key: v for key, v in given.items() if key in free})


def same_code(given: str | None, before: str) -> bool:
    """Whether both name the same in files of one name: where they lie may change, and what is in
    them is compared by its sum."""
    if given is None or not (is_code(given) and is_code(before)):
        return False
    (path, name), (earlier, its_name) = owncode.split(given), owncode.split(before)
    return (path.name, name) == (earlier.name, its_name)


def as_before(c: Config, chosen: dict[str, Any], source: str) -> Config:
    """`c` with what `auto` chose before, read from a checkpoint. Raises ConfigError where that is
    nothing it can choose."""
    names = [name for name in RESOLVED_ONCE if getattr(c, name) == "auto" and name in chosen]
    # a micro-batch that is none: whole batches fit
    none: dict[str, Any] = {
        name: None for name in names if chosen[name] is None and FIELDS[name].default is None
    }
    some = {name: str(chosen[name]) for name in names if name not in none}
    return dataclasses.replace(c, **none, **from_table(parser(), some, source))
