"""The command line of the report: python -m fastsmooth.report RUNS... [--out DIR]"""

from __future__ import annotations

import sys
from pathlib import Path

from fastsmooth.cli import flags as flag_types
from fastsmooth.figures import NO_PDF, files_of, pdf
from fastsmooth.messages import DONE, command, end_with, exit_code, note, say
from fastsmooth.report import page
from fastsmooth.runfolder.files import replace
from fastsmooth.runfolder.read import RunError, find_runs, read_run
from fastsmooth.runfolder.write import RunFolderError, refusing


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
        default=".",
        help="where report.html and figures/ (SVG, PDF) are written; by default here",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Run one command line; the exit code. A failure is a line on stderr, never a traceback."""
    refusals = (flag_types.ConfigError, RunError, RunFolderError)
    return exit_code(lambda: report(sys.argv[1:] if argv is None else argv), refusals)


def report(argv: list[str]) -> int:
    asked = parser().parse_args(argv)
    runs = [read_run(path) for path in find_runs(asked.runs)]
    parts, out = page.sections(runs), Path(asked.out)
    with refusing(out):
        write(out, page.html(runs, parts), [f for part in parts for f in part.figures], len(runs))
    return DONE


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
