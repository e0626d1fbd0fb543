"""The command line of the report: python -m fastsmooth.report RUNS... [--out DIR], or in place of
--out --table, --csv or --watch"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from fastsmooth.cli import flags as flag_types
from fastsmooth.cli.flags import ConfigError
from fastsmooth.figures import NO_PDF, files_of, pdf
from fastsmooth.messages import DONE, command, end_with, exit_code, note, say, show, warn
from fastsmooth.report import page, table
from fastsmooth.runfolder.files import replace
from fastsmooth.runfolder.read import RunError, SavedRun, read_runs
from fastsmooth.runfolder.write import RunFolderError, refusing
from fastsmooth.terminal import columns

INSTEAD = ("table", "csv", "watch")  # of files: these write none
OF_WATCH = ("port", "every")
PORTS = range(8750, 8850)  # of which --watch takes the first that is free
EVERY = 2.0  # seconds


def parser() -> flag_types.Parser:
    p = flag_types.Parser(
        prog=command("report"),
        description="Tables, figures and one HTML page out of runs of fastsmooth.train.",
    )
    p.add_argument(
        "runs", nargs="+", metavar="RUNS", type=Path, help="run folders, or folders that hold them"
    )
    p.add_argument(
        "--out",
        metavar="DIR",
        type=flag_types.text,
        help="where report.html and figures/ (SVG, PDF) are written; by default here",
    )
    p.add_argument(
        "--table",
        action="store_true",
        help="print a table, a line a configuration, and write no files",
    )
    p.add_argument(
        "--csv", action="store_true", help="print a line a run with all that is known of it as csv"
    )
    p.add_argument(
        "--watch",
        action="store_true",
        help="serve the page to browsers on this machine, renewed while runs go on",
    )
    p.add_argument(
        "--port",
        metavar="N",
        type=flag_types.whole(1, 65535),
        help=f"of --watch; by default the first free one from {PORTS[0]}",
    )
    p.add_argument(
        "--every",
        metavar="SECONDS",
        type=flag_types.real(0.1, 3600),
        help=f"of --watch: between looks at the files; by default {EVERY:g}",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Run one command line; the exit code. A failure is a line on stderr, never a traceback."""
    refusals = (ConfigError, RunError, RunFolderError)
    return exit_code(lambda: report(sys.argv[1:] if argv is None else argv), refusals)


def report(argv: list[str]) -> int:
    asked = parser().parse_args(argv)
    check(asked)
    if asked.watch:
        from fastsmooth.report.watch import watch  # a server, which nothing else needs

        return watch(asked.runs, [asked.port] if asked.port else PORTS, asked.every or EVERY)
    runs, left_out = read_runs(asked.runs)
    for why in left_out:
        warn(why)
    if asked.table:
        show(*table.in_words(runs, columns(sys.stdout)))
    elif asked.csv:
        show(*table.in_csv(runs), whole=True)
    else:
        write_page(runs, Path(asked.out or "."))
    return DONE


def check(asked: Namespace) -> None:
    """Refuse flags that say nothing together."""
    given = [f"--{name}" for name in INSTEAD if getattr(asked, name)]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} do not go together: give one of them")
    if given and asked.out is not None:
        raise ConfigError(f"--out has no effect with {given[0]}, which writes no files: drop one")
    for name in OF_WATCH:
        if getattr(asked, name) is not None and not asked.watch:
            raise ConfigError(f"--{name} has no effect without --watch: add it, or drop --{name}")


def write_page(runs: list[SavedRun], out: Path) -> None:
    parts = page.sections(runs)
    with refusing(out):
        write(out, page.html(runs, parts), [f for part in parts for f in part.figures], len(runs))


def write(out: Path, html: str, figures: list, runs: int) -> None:
    """report.html last: where it is, the figures are whole."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        drawing = page.drawn(figure, legend=True)
        for suffix, data in files_of(drawing).items():
            replace(folder / f"{figure.name}{suffix}", data)
    replace(out / "report.html", html.encode())
    if not pdf.available():
        note(NO_PDF)
    kinds = "SVG and PDF" if pdf.available() else "SVG"
    say(
        f"{out / 'report.html'}: {page.count(runs, 'run')}, {page.count(len(figures), 'figure')} "
        f"({kinds} in {folder}), {len(html.encode()) // 1024} kB"
    )


if __name__ == "__main__":
    end_with(main)
