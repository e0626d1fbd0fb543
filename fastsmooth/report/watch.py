"""The page served to browsers on this machine, and made anew whenever the runs' files change.

Nothing is written. The server listens on the loopback address alone, and answers only requests that
name it by that: a page of another site, whose name was made to lead here, reads nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import DONE, failure, one_line, say, tell, warn
from fastsmooth.report import groups, page
from fastsmooth.runfolder.read import FILES, RunError, SavedRun, find_runs, read_run

HOST = "127.0.0.1"
LOCAL = {HOST, "localhost", "[::1]"}  # as a tunnel's near end may be called too
MOST_RUNNING = 20  # runs that are named at the top of the page
LOST = "fastsmooth report --watch has ended or cannot be reached: this is its last page."

Stamp = tuple[tuple[int, int, int] | None, ...]  # of each file of a run: time, size, inode


def watch(paths: Sequence[Path], ports: Sequence[int], every: float) -> int:
    """Serve the page of the runs in `paths`, at the first of `ports` that is free, until Ctrl-C:
    that is how this ends, and it is done then. `every`: seconds between looks at the files.

    Raises RunError for a path that is no folder, ConfigError where no port is free.
    """
    for path in paths:
        if not os.path.isdir(path):
            find_runs([path])  # which says so
    watched = Watched(paths, every)
    with listening(ports, watched) as server:
        try:
            watched.look()
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://{HOST}:{server.server_address[1]}"
            say(f"{address} shows {watched.counts}, renewed while runs go on: Ctrl-C ends it")
            while True:
                began = time.monotonic()
                watched.look()
                time.sleep(max(every, time.monotonic() - began))  # half of one core at most
        except KeyboardInterrupt:
            return DONE


class Watched:
    """Runs whose files change, and the page of them as it is now."""

    def __init__(self, paths: Sequence[Path], every: float):
        self.paths, self.every = paths, every
        self.seen: tuple[dict[Path, Stamp], list[str]] | None = None  # by the last look
        self.runs: dict[Path, tuple[Stamp, SavedRun]] = {}  # with their files as they were read
        self.problems: list[str] = []
        self.failed = ""  # the error of the last page that could not be made
        self.title, self.body, self.counts = "fastsmooth report", "", ""
        self.page, self.version = b"", ""

    def look(self) -> None:
        """Look at the files; where one has changed, or a run came or went, make the page anew."""
        stamps: dict[Path, Stamp] = {}
        missing: list[str] = []
        for path in self.paths:
            try:
                stamps |= {run: stamp(run) for run in find_runs([path])}
            except RunError:
                there = os.path.isdir(path)
                missing.append(f"{path} holds no run yet" if there else f"{path} is gone")
        if (stamps, missing) == self.seen:
            return
        self.seen = stamps, missing
        runs, problems = {}, list(missing)
        for path, now in stamps.items():
            known = self.runs.get(path)
            try:
                runs[path] = known if known and known[0] == now else (now, read_run(path))
            except RunError:  # or its folder went in between
                problems.append(f"{path} is left out: its config.json cannot be read")
        for problem in problems:
            if problem not in self.problems:
                warn(problem)
        self.runs, self.problems = runs, problems
        self.make([run for _, run in runs.values()])

    def make(self, runs: list[SavedRun]) -> None:
        """The page of the runs; where that fails, the one before, and what failed."""
        try:
            grouped = groups.group(runs)
            self.counts = page.counts(runs, grouped)
            if runs:
                self.title, self.body = page.title(grouped), page.body(runs, page.sections(runs))
            failed = ""
        except Exception as error:
            failed = f"{type(error).__name__}: {one_line(error)}"
            if failed != self.failed:
                tell("error", failure(error)[1])
        finally:
            groups.epochs.cache_clear()  # else it keeps every run that was ever read
        self.failed = failed
        top = self.top(runs)
        self.version = hashlib.sha256((top + self.body).encode()).hexdigest()[:16]
        live = page.Live(self.version, self.every)
        self.page = page.document(self.title, top + self.body, live).encode()

    def top(self, runs: list[SavedRun]) -> str:
        """When the page was made, which runs go on, and what is wrong."""
        going = [run for run in runs if run.state == "running"]
        names = dict(zip(runs, page.short_paths([run.path for run in runs]), strict=True))
        said = [self.going(run, names[run]) for run in going[:MOST_RUNNING]]
        if len(going) > MOST_RUNNING:
            said.append(f"and {len(going) - MOST_RUNNING} more")
        words = f"Made {clock(time.time())}. Running: {', '.join(said) or 'none'}."
        wrong = [*self.problems, *([f"No new page: {self.failed}"] if self.failed else [])]
        items = "".join(f"<li>{page.text(line)}</li>" for line in wrong)
        listed = f'<ul class="warnings">{items}</ul>' if items else ""
        lost = f'<p id="lost" class="bad" hidden="">{LOST}</p>'
        return f'<aside>\n<p class="live">{page.text(words)}</p>\n{lost}{listed}\n</aside>\n'

    def going(self, run: SavedRun, name: str) -> str:
        """A run that goes on, how far it is, and when it said so."""
        rows = self.runs[run.path][0][FILES.index("metrics.jsonl")]
        updates = groups.reached(run, "updates")
        if not rows or updates is None:
            return name
        return f"{name} (update {updates:,.0f} at {clock(rows[0] / 1e9)})"


def stamp(folder: Path) -> Stamp:
    """What of the files of a run changes with their contents."""

    def of(name: str) -> tuple[int, int, int] | None:
        try:
            status = os.stat(folder / name)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    return tuple(map(of, FILES))


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))


# The server


class Server(ThreadingMixIn, TCPServer):
    """Threads, of which none keeps the process from ending."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    watched: Watched

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):  # a browser that went away
            tell("error", failure(error)[1])


def listening(ports: Sequence[int], watched: Watched) -> Server:
    """A server at the first port that is free."""
    why = ""
    for port in ports:
        try:
            server = Server((HOST, port), Answer)
        except OSError as error:
            why = error.strerror or one_line(error)
            continue
        server.watched = watched
        return server
    asked = f"--port {ports[0]}" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]}"
    raise ConfigError(f"{asked}: {why}: give another --port, or none for the first that is free")


class Answer(BaseHTTPRequestHandler):
    """The page at /, its version at /version, and nothing else."""

    server: Server
    server_version, sys_version = "fastsmooth", ""
    timeout = 10  # seconds that a client may say nothing

    def do_GET(self) -> None:
        watched = self.server.watched
        hosts = self.headers.get_all("Host") or [""]
        if {re.sub(r":\d+$", "", host).lower() for host in hosts} - LOCAL:
            port = self.server.server_address[1]
            self.send(403, "text/plain", f"only http://{HOST}:{port} is answered here\n".encode())
        elif self.path == "/":
            self.send(200, "text/html", watched.page)
        elif self.path == "/version":
            self.send(200, "text/plain", watched.version.encode())
        else:
            self.send(404, "text/plain", b"the page is at /\n")

    do_HEAD = do_GET

    def send(self, code: int, kind: str, data: bytes) -> None:
        self.send_response(code)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(data)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": "frame-ancestors 'none'",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads what browsers ask for."""
