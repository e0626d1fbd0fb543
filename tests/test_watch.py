"""report --watch: a server that shows runs while they go on, to this machine alone."""

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from said import one_line, refused
from test_report import CHROMIUM, CONFIG, Browser, epoch_rows, run_folder

from fastsmooth.report import page
from fastsmooth.report.__main__ import PORTS, main
from fastsmooth.report.watch import Watched, listening
from fastsmooth.runfolder.write import RunFolder


def a_run(path: Path, **settings) -> RunFolder:
    """A run that goes on: its folder as fastsmooth.train opens and writes it."""
    folder = RunFolder.create(path, CONFIG | settings, {})
    folder.status("running", "", 0)
    return folder


def get(address: str, path: str = "/", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def until(true: Callable[[], object], what: str) -> None:
    for _ in range(300):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError(f"never: {what}")


class Serving:
    """A server of the command line, in a process of its own."""

    def __init__(self, *argv: object):
        command = [sys.executable, "-m", "fastsmooth", "report", *map(str, argv), "--watch"]
        self.process = subprocess.Popen(
            [*command, "--every", "0.2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.first = self.process.stdout.readline()
        self.address = self.first.partition(" ")[0]

    def shows(self, words: str) -> None:
        until(lambda: words in get(self.address)[1], words)

    def interrupted(self) -> tuple[int, str, str]:
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def __enter__(self) -> "Serving":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def serve() -> Iterator[Callable[..., Serving]]:
    with contextlib.ExitStack() as stack:
        yield lambda *argv: stack.enter_context(Serving(*argv))


def test_the_page_follows_runs_that_go_on_begin_and_vanish(tmp_path, serve):
    runs = tmp_path / "runs"
    run = a_run(runs / "one", seed=0)
    server = serve(runs)
    assert re.fullmatch(
        r"http://127\.0\.0\.1:\d+ shows 1 run, 1 configuration, renewed while runs go on: "
        r"Ctrl-C ends it\n",
        server.first,
    )
    assert int(server.address.rpartition(":")[2]) in PORTS
    with urllib.request.urlopen(server.address) as answer:
        markup = answer.read().decode()
    assert "Running: one." in markup and "Made 20" in markup
    assert f'content="{get(server.address, "/version")[1]}"' in markup
    rows = epoch_rows(CONFIG, 3)
    run.row("epoch", rows[0])
    server.shows("Running: one (update 45 at 20")
    before = get(server.address, "/version")[1]
    with (runs / "one" / "metrics.jsonl").open("a") as torn:  # half of a row, as it is written
        torn.write(json.dumps(rows[1])[:40])
        torn.flush()
        server.shows("1 torn line")
        torn.write(json.dumps(rows[1])[40:] + "\n")
    server.shows("Running: one (update 90 at 20")
    assert "torn line" not in get(server.address)[1]
    assert get(server.address, "/version")[1] != before
    other = a_run(runs / "two", seed=1, method="hybrid")
    server.shows("two")
    assert "2<small>0 done" in get(server.address)[1]
    run.row("epoch", rows[2])
    run.write("summary.json", {"final_test_acc": 0.875, "epochs": 3})
    run.status("done", "", 135)
    server.shows("87.50")
    server.shows("Running: two.")
    other.close()
    shutil.rmtree(runs / "two")
    server.shows("Running: none.")
    shutil.rmtree(runs)
    server.shows("runs is gone")
    assert "87.50" in get(server.address)[1]  # the last page
    code, out, err = server.interrupted()
    assert (code, out) == (0, "")
    assert err == f"fastsmooth: warning: {runs} is gone\n"
    run.close()


def test_nothing_is_written_and_nothing_is_made_anew_without_a_change(tmp_path, serve):
    run_folder(tmp_path / "runs" / "done")
    run_folder(tmp_path / "runs" / "damaged", files={"config.json": "{"})
    before = {p: p.stat().st_mtime_ns for p in (tmp_path, *tmp_path.rglob("*"))}
    server = serve(tmp_path / "runs")
    versions = set()
    for _ in range(6):
        versions.add(get(server.address, "/version")[1])
        time.sleep(0.25)
    assert len(versions) == 1
    assert {p: p.stat().st_mtime_ns for p in (tmp_path, *tmp_path.rglob("*"))} == before
    assert "damaged is left out: its config.json cannot be read" in get(server.address)[1]
    code, _, err = server.interrupted()
    assert code == 0 and len(err.splitlines()) == 1 and "damaged is left out" in err


def test_a_folder_may_be_empty_at_first_and_a_second_server_takes_the_next_port(tmp_path, serve):
    (tmp_path / "runs").mkdir()
    first, second = serve(tmp_path / "runs"), serve(tmp_path / "runs")
    assert "shows 0 runs" in first.first and first.address != second.address
    assert "holds no run yet" in get(first.address)[1]
    a_run(tmp_path / "runs" / "one").close()
    first.shows("Running: one.")
    assert "holds no run yet" not in get(first.address)[1]
    port = first.address.rpartition(":")[2]
    assert refused(main, [str(tmp_path), "--watch", "--port", port]).startswith(
        f"--port {port}: Address already in use: give another --port"
    )
    assert first.interrupted()[0] == second.interrupted()[0] == 0


@pytest.mark.parametrize("path", ["nowhere", "file"])
def test_what_is_no_folder_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("x")
    assert "no such folder" in refused(main, [str(tmp_path / path), "--watch"])


# The server, in this process


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Watched, Path]]:
    """(address, what is served, the folder of its runs); it looks when the test says so."""
    run_folder(tmp_path / "runs" / "a", seed=0, epochs=3)
    run_folder(tmp_path / "runs" / "b", seed=1, epochs=3, state="running")
    watched = Watched([tmp_path / "runs"], 0.1)
    watched.look()
    with listening(PORTS, watched) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", watched, tmp_path / "runs"
        server.shutdown()


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1:{port}", 200), ("localhost:{port}", 200), ("LOCALHOST:9000", 200),
        ("localhost", 200), ("[::1]:9000", 200),  # of a tunnel's near end
        ("evil.example", 403), ("evil.example:{port}", 403), ("127.0.0.1.evil.example", 403),
        ("127.0.0.1:80:80", 403), ("localhost.", 403), ("", 403), ("127.0.0.1@evil.example", 403),
    ],
)  # fmt: skip
def test_only_requests_that_name_this_machine_are_answered(served, host, status):
    address, watched, _ = served
    for path in ("/", "/version"):
        found, text = get(address, path, Host=host.format(port=address.rpartition(":")[2]))
        assert found == status
        assert (watched.version in text) == (status == 200)


def test_anything_else_is_not_found_and_nothing_can_be_sent(served):
    address, watched, _ = served
    for path in ("/x", "/../etc/passwd", "/a/config.json", "/favicon.ico", "/version/", "/?"):
        assert get(address, path)[0] == 404
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    for method, status in (("POST", 501), ("PUT", 501), ("HEAD", 200)):
        connection.request(method, "/")
        answer = connection.getresponse()
        assert answer.status == status and (method != "HEAD" or not answer.read())
        answer.read()
        connection.close()
    port = int(address.rpartition(":")[2])
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"GET /\r\n\r\n", b"\x00\xff\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            raw.sendall(words)
            answer = b"".join(iter(lambda raw=raw: raw.recv(4096), b""))
        assert watched.version.encode() not in answer
    assert get(address)[0] == 200
    for listening_at in ("0.0.0.0", "::"):
        assert f"{listening_at}:{port}" not in listeners()


def listeners() -> str:
    """The addresses that processes listen at, as Linux has them."""
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        host, _, port = local.partition(":")
        if state == "0A":
            number = ".".join(str(b) for b in reversed(bytes.fromhex(host)))
            found.append(f"{number}:{int(port, 16)}")
    return " ".join(found)


def test_the_page_is_well_formed_and_renews_itself_without_a_script_too(served):
    _, markup = get(served[0])
    root = ET.fromstring(markup.removeprefix("<!DOCTYPE html>"))
    (script,) = root.iter("script")
    assert "src" not in script.attrib
    (refresh,) = [m for m in root.find("head/noscript") if m.attrib["http-equiv"] == "refresh"]
    assert refresh.attrib["content"] == "1"
    assert "Running: b (update 135 at 20" in markup and "lie beside this page" not in markup


def test_a_page_that_cannot_be_made_is_said_once_and_the_last_one_stays(
    served, monkeypatch, capsys, tmp_path
):
    address, watched, runs = served
    monkeypatch.setattr("fastsmooth.messages.tempfile.tempdir", str(tmp_path))

    def fail(_):
        raise ZeroDivisionError("a <fault>")

    with monkeypatch.context() as broken:
        broken.setattr(page, "sections", fail)
        for seed in (2, 3):
            run_folder(runs / f"more-{seed}", seed=seed)
            watched.look()
            _, markup = get(address)
            assert "No new page: ZeroDivisionError: a &lt;fault&gt;" in markup
            assert "final test accuracy" in markup
    assert "ZeroDivisionError: a <fault>" in one_line(capsys.readouterr().err)
    watched.look()
    assert "No new page" in get(address)[1]  # nothing changed
    run_folder(runs / "more-4", seed=4)
    watched.look()
    assert "No new page" not in get(address)[1] and "more-4" in get(address)[1]
    assert capsys.readouterr() == ("", "")


def test_only_runs_whose_files_changed_are_read_again(served, monkeypatch):
    _, watched, runs = served
    read = []
    original = watched.look.__globals__["read_run"]
    monkeypatch.setitem(
        watched.look.__globals__, "read_run", lambda path: read.append(path.name) or original(path)
    )
    for name in ("a", "b"):
        (runs / name / "unrelated").write_text("x")
    watched.look()
    assert read == []
    for name in ("metrics.jsonl", "status.json", "noise.json", "config.json"):
        with (runs / "b" / name).open("a") as file:
            file.write(" ")
        watched.look()
    assert read == ["b"] * 4
    page_before = watched.version
    shutil.rmtree(runs / "a")
    watched.look()
    assert read == ["b"] * 4 and watched.version != page_before


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("neither chromium nor google-chrome is in /usr/bin")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def test_a_browser_shows_the_newer_page_at_the_same_place(served, browser):
    address, watched, runs = served

    def value(expression: str) -> object:
        return browser.ask("Runtime.evaluate", expression=expression)["result"].get("value")

    browser.ask(
        "Emulation.setDeviceMetricsOverride", width=900, height=500, deviceScaleFactor=1,
        mobile=False,
    )  # fmt: skip
    browser.ask("Page.navigate", url=address)
    until(lambda: value("document.readyState") == "complete" and value("!!lost"), "the page")
    top = "document.querySelector('#runs h2').getBoundingClientRect().top"
    value("window.unloaded = 0; document.querySelector('#runs details').open = true")
    value("document.querySelector('#runs').scrollIntoView(); scrollBy(0, 7)")
    before, y = value(top), value("scrollY")
    assert y > 500 and value("document.querySelectorAll('#runs tbody tr').length") == 2
    for seed in range(2, 12):  # the page grows above and below
        run_folder(runs / f"more-{seed}", seed=seed, method="lr", lr=0.01 * seed)
    watched.look()
    until(lambda: value("document.querySelectorAll('#runs tbody tr').length") == 12, "new rows")
    assert abs(value(top) - before) <= 1 and value("scrollY") > y
    assert value("document.querySelector('#runs details').open")
    assert value("window.unloaded") == 0  # it was never loaded again
    assert value("lost.hidden") is True
    complaints = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    allowed = "favicon.ico"
    assert [
        e for e in browser.events if e.get("method") in complaints and allowed not in json.dumps(e)
    ] == []


def test_a_browser_says_that_the_server_has_ended(tmp_path, browser, serve):
    run_folder(tmp_path / "runs" / "a")
    server = serve(tmp_path / "runs")
    browser.ask("Page.navigate", url=server.address)

    def value(expression: str) -> object:
        return browser.ask("Runtime.evaluate", expression=expression)["result"].get("value")

    until(lambda: value("document.readyState") == "complete" and value("!!lost"), "the page")
    assert value("lost.checkVisibility()") is False
    server.interrupted()
    until(lambda: value("lost.checkVisibility()") is True, "what says so")
    assert "final test accuracy" in value("document.body.innerText")


def test_a_browser_without_scripts_loads_the_page_again(served, browser):
    address, watched, runs = served
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    browser.ask("Page.navigate", url=address)

    def shown() -> str:
        # in one question: the page may be another by the next
        return str(browser.ask("DOM.getDocument", depth=-1))

    until(lambda: "Running: b" in shown(), "the page")
    run_folder(runs / "another", state="running", seed=7)
    watched.look()
    until(lambda: "Running: another" in shown(), "the newer page")
    browser.ask("Emulation.setScriptExecutionDisabled", value=False)
