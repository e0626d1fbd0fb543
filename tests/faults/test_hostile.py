"""Input that means harm: nothing of it runs, nothing is written elsewhere, nothing hangs, and one
line says what is wrong."""

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import tar_of
from images import HAS_DALI, noise, tree
from said import refused, said
from torchvision import datasets

from fastsmooth import sharpness, train
from fastsmooth.data import cifar
from fastsmooth.figures import pdf
from fastsmooth.report import __main__ as report
from fastsmooth.sweep import __main__ as sweep

LOADERS = ["resident", "threads", "torch", *(["dali"] if HAS_DALI else [])]
SECONDS = 20  # that no case may take


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty working directory in a folder of its own, and an alarm for whatever waits for
    ever."""
    place = tmp_path / "a" / "here"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pdf, "available", lambda: False)

    def late(*_) -> None:
        for path in tmp_path.rglob("*"):
            if path.is_fifo():  # threads that wait for it would be waited for
                os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        pytest.fail(f"over {SECONDS} seconds")  # which no handler of errors takes for one

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield place
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outside(here: Path) -> list[str]:
    """What lies beside the working directory, where nothing may be written."""
    root = here.parent.parent
    found = [
        p
        for p in root.rglob("*")
        if here not in p.parents and "cache" not in p.relative_to(root).parts
    ]
    return sorted(str(p.relative_to(root)) for p in found)


# Pickles


class Call:
    """Pickled, a call that is made when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def deep_pickle() -> bytes:
    return b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."


def attacks(canary: Path) -> dict[str, bytes]:
    """Pickles that would make the canary where nothing restricts them, and others that would
    exhaust the reader."""
    touch, write = Call(os.system, f"touch {canary}"), Call(eval, f"open({str(canary)!r}, 'w')")
    fields = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
    return {
        "os.system": pickle.dumps(touch),
        "os.system in a batch": pickle.dumps(fields | {"labels": [0, touch]}, 2),
        "eval": pickle.dumps(write, 2),
        "eval as a key": pickle.dumps({("a", write): 1}, 4),
        "exec": pickle.dumps(Call(exec, f"open({str(canary)!r}, 'w')")),
        "a shell": f"cos\nsystem\n(S'touch {canary}'\ntR.".encode(),
        "a file object": pickle.dumps(Call(open, str(canary), "w")),
        "an array that is saved": pickle.dumps(Call(np.save, f"{canary}.npy", [1])),
        "a function of an allowed module": b"\x80\x04\x8c\x05numpy\x8c\x04save\x93\x8c\x01x\x85R.",
        "a method of an allowed class": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "a codec that opens files": b"\x80\x04\x8c\x07_codecs\x8c\x06lookup\x93\x8c\x05bz2_c\x85R.",
        "nested 100,000 deep": deep_pickle(),
        "an array of a terabyte": pickle.dumps(Call(np.ndarray, (1 << 40,), "u1"), 2),
        "a string of an exabyte": b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.",
        "a set that is none": pickle.dumps({1, 2}),
    }


RUN = [name for name in attacks(Path("canary")) if name[0:2] in ("os", "ev", "ex",
    "a ") and name not in (
    "a function of an allowed module", "a method of an allowed class", "a codec that opens files",
    "a string of an exabyte",
    "a set that is none",
)]  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_the_pickles_do_harm_where_nothing_restricts_them(name, here, cases):
    cases("hostile pickles that are real", 1, 1)
    canary = here / "canary"
    pickle.loads(attacks(canary)[name], encoding="latin1")
    assert canary.exists() or canary.with_suffix(".npy").exists()


def official(monkeypatch, files: dict[str, bytes], archive: bytes = b"") -> str:
    """Let files and an archive pass for the official ones of CIFAR-10; the folder that they belong
    in."""
    base = datasets.CIFAR10

    def md5(data: bytes) -> str:
        return hashlib.md5(data).hexdigest()

    facts = {
        "train_list": [["data_batch_1", md5(files.get("data_batch_1", b""))]],
        "test_list": [["test_batch", md5(files.get("test_batch", b""))]],
        "meta": base.meta | {"md5": md5(files.get("batches.meta", b""))},
        "tgz_md5": md5(archive),
    }
    monkeypatch.setitem(cifar.OFFICIAL, "cifar10", type("Official", (base,), facts))
    return base.base_folder


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
@pytest.mark.parametrize("name", attacks(Path("canary")))
def test_a_hostile_pickle_as_a_cifar_file_does_nothing(name, file, here, monkeypatch, cases):
    """Even under the official sum."""
    if cases("hostile pickles as CIFAR files", 1, int(file == "data_batch_1")) == 0:
        pytest.skip("with --full")
    good = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
    files = {"data_batch_1": good, "test_batch": good, "batches.meta": {"label_names": ["a", "b"]}}
    files = {key: pickle.dumps(value, 2) for key, value in files.items()}
    canary = here / "canary"
    files[file] = attacks(canary)[name]
    folder = official(monkeypatch, files)
    tree(here, {f"data/{folder}/{key}": content for key, content in files.items()})
    before = sorted(here.rglob("*"))
    message = refused(train.main, ["--dataset", "cifar10", "--out", "run"])
    assert file in message and "fetch it again" in message and len(message) < 2000
    assert sorted(here.rglob("*")) == before


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run with a checkpoint, that --max-time stopped."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert said(train.main, ["--out", str(out), "--max-time", "1e-3", "--epochs", "2"]).code == 75
    return out


def with_checkpoint(stopped: Path, content: bytes) -> None:
    """The run, its checkpoint replaced under a right manifest."""
    shutil.copytree(stopped, "run")
    (path,) = Path("run/checkpoints").glob("*.pt")
    path.write_bytes(content)
    manifest = json.loads(path.with_suffix(".json").read_text())
    manifest |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    path.with_suffix(".json").write_text(json.dumps(manifest))


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["bare", "in torch's file"])
@pytest.mark.parametrize("name", attacks(Path("canary")))
def test_a_hostile_pickle_as_a_checkpoint_does_nothing(name, form, here, stopped, cases):
    if cases("hostile pickles as checkpoints", 1, int(form == "in torch's file")) == 0:
        pytest.skip("with --full")
    canary = here / "canary"
    content = attacks(canary)[name]
    if form == "in torch's file":  # the pickle inside the archive that torch.save makes
        content = with_pickle(saved({"model": {}}), content)
    with_checkpoint(stopped, content)
    before = sorted(here.rglob("*"))
    for main, argv in (
        (train.main, ["--resume", "--out", "run"]),
        (sharpness.main, ["run", "--json"]),
    ):
        found = said(main, argv)
        *warnings, error = found.err.splitlines()
        assert (
            found.code == 2
            and error.startswith("fastsmooth: error: ")
            and "start a new run" in error
        ), found
        assert (
            all(line.startswith("fastsmooth: warning: ") for line in warnings)
            and len(found.err) < 3000
        )
    assert sorted(here.rglob("*")) == before


def with_pickle(archive: bytes, content: bytes) -> bytes:
    """A file of torch.save with another pickle in it."""
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


ODD_STATES = {
    "nothing": lambda state: {},
    "a list": lambda state: [1, 2],
    "a number": lambda state: 3,
    "a size that is a word": lambda state: state | {"metrics_bytes": "x"},
    "a size below zero": lambda state: state | {"metrics_bytes": -1},
    "an update that is a word": lambda state: state | {"update": "x"},
    "an epoch that is a list": lambda state: state | {"epoch": [1]},
    "samples that are none": lambda state: state | {"samples": None},
    "a last epoch that is a word": lambda state: state | {"last_epoch": "x"},
    "a best accuracy that is a word": lambda state: state | {"best_test_acc": "x"},
    "a model of another shape": lambda state: state | {"model": {"head.weight": torch.zeros(1)}},
    "a cursor that is a word": lambda state: state | {"data": state["data"] | {"cursor": "x"}},
    "a cursor beyond the images": lambda state: state | {"data": state["data"] | {"cursor": 10**9}},
    "random numbers of another kind": lambda state: state | {"rng": [(torch.zeros(3), None)]},
}


@pytest.mark.parametrize("name", ODD_STATES)
def test_a_checkpoint_with_odd_values_is_refused(name, here, stopped, cases):
    cases("odd checkpoints under right sums", 1, 1)
    (path,) = stopped.glob("checkpoints/*.pt")
    with_checkpoint(stopped, saved(ODD_STATES[name](torch.load(path, weights_only=True))))
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    found = said(train.main, ["--resume", "--out", "run"])
    *warnings, message = found.err.splitlines()
    assert (
        found.code == 2
        and message.startswith("fastsmooth: error: ")
        and message.endswith(": start a new run")
    )
    if name in ("a list", "a number"):  # passed over, as there may be one before
        assert "is damaged (it holds no state of a run)" in warnings[0] and len(warnings) == 1
    else:
        assert "checkpoint is not of this run" in message and not warnings
    after = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    assert after == before


# Archives


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def archives(target: Path) -> dict[str, bytes]:
    """Archives that would write into `target`, which lies two folders above the data."""
    base = datasets.CIFAR10.base_folder
    out, up = f"{base}/out", f"../../{target.name}"
    written = member(f"{out}/x", tarfile.REGTYPE)
    cut = tar_of({f"{base}/data_batch_1": os.urandom(50_000)})
    return {
        "dots": tar_of({f"{up}/x": b"x"}),
        "dots inside": tar_of({f"{base}/../{up}/x": b"x"}),
        "an absolute name": tar_of({f"{target}/x": b"x"}),
        "a link outside": tar_of({}, member(out, tarfile.SYMTYPE, str(target)), written),
        "a relative link outside": tar_of({}, member(out, tarfile.SYMTYPE, f"../{up}"), written),
        "a link to a link": tar_of(
            {}, member(f"{base}/b", tarfile.SYMTYPE, ".."),
            member(out, tarfile.SYMTYPE, f"b/{up}"), written
        ),
        "a link to itself": tar_of({}, member(base, tarfile.SYMTYPE, base)),
        "a hard link outside": tar_of(
            {}, member(out, tarfile.LNKTYPE, f"{up}/kept"), member(out, tarfile.REGTYPE)
        ),
        "a device": tar_of({}, member(f"{base}/data_batch_1", tarfile.CHRTYPE)),
        "a block device": tar_of({}, member(f"{base}/data_batch_1", tarfile.BLKTYPE)),
        "a pipe": tar_of({}, member(f"{base}/data_batch_1", tarfile.FIFOTYPE)),
        "a name with a NUL": tar_of({f"{base}/a\0b": b"x"}),
        "a name of 5,000 letters": tar_of({f"{base}/{'n' * 5000}": b"x"}),
        "a file for the folder": tar_of({base: b"x"}),
        "nothing": tar_of({}),
        "half": cut[: len(cut) // 2],
        "damaged": cut[:20_000] + b"\xff" * 64 + cut[20_064:],
        "no archive": b"x" * 2000,
    }  # fmt: skip


@pytest.mark.parametrize("name", archives(Path("/x")))
def test_a_hostile_archive_writes_nothing_elsewhere(name, here, monkeypatch, cases):
    """Its MD5 sum passes for the official one: the extraction itself is safe."""
    cases("hostile archives", 1, 1)
    target = here.parent / "target"
    tree(target, {"kept": b"kept"})
    archive = archives(target)[name]
    official(monkeypatch, {}, archive)
    tree(here, {"data/cifar-10-python.tar.gz": archive})
    before = outside(here)
    message = refused(train.main, ["--dataset", "cifar10", "--out", "run"])
    assert "data" in message and ("fetch it again" in message or "repair" in message)
    assert outside(here) == before and (target / "kept").read_bytes() == b"kept"
    assert not Path("run").exists()
    for path in Path("data").rglob("*"):
        real = Path(os.path.realpath(path))
        inside = Path("data").resolve() in (real, *real.parents)
        assert inside and (path.is_dir() or path.is_file() or path.is_symlink()), path


# Text that is too large or too deep


@pytest.mark.parametrize("holes", [True, False])
def test_a_config_of_100_megabytes_is_refused_before_it_is_read(holes, here, monkeypatch, cases):
    cases("large and deep files", 1, 1)
    with open("large.toml", "wb") as file:
        if holes:
            file.truncate(100 << 20)
        else:
            for _ in range(100):
                file.write(b"# comment\n" * 104_858)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    for main, argv in ((train.main, ["--config"]), (sweep.main, ["--out", "s", "--grid"])):
        message = refused(main, [*argv, "large.toml"])
        assert (
            "large.toml: it is larger than 64 kB" in message
            and "give a TOML file of flags" in message
        )


DEEP_TOML = {
    "lists": "lr = " + "[" * 30_000 + "]" * 30_000,
    "inline tables": "lr = " + "{a = " * 10_000 + "1" + "}" * 10_000,
    "dotted keys": ".".join(["a"] * 30_000) + " = 1",
    "dots within the limit": ".".join(["a"] * 2900) + " = 1",
    "dots in an inline table": "lr = {" + ".".join(["a"] * 30_000) + " = 1}",
    "a table of many names": "[" + ".".join(["a"] * 30_000) + "]",
}


@pytest.mark.parametrize("name", DEEP_TOML)
def test_deep_toml_is_refused(name, here, cases):
    cases("large and deep files", 1, 1)
    Path("deep.toml").write_text(DEEP_TOML[name])
    for main, argv in ((train.main, ["--config"]), (sweep.main, ["--out", "s", "--grid"])):
        message = refused(main, [*argv, "deep.toml"])
        assert (
            "deep.toml" in message
            and "write plain lines such as lr = 0.1" in message
            and len(message) < 500
        )


def deep_json(kind: str, depth: int) -> bytes:
    opened, closed = {"lists": (b"[", b"]"), "objects": (b'{"a":', b"}")}[kind]
    return opened * depth + b"1" + closed * depth


DEPTHS = [300, 480, 700, 990, 100_000]  # around what Python's stack holds, by whichever code
FILES = [
    "status.json",
    "summary.json",
    "critical.json",
    "noise.json",
    "sharpness.json",
    "layers.json",
    "metrics.jsonl",
    "config.json",
]


def shown_run(name: str, **config) -> Path:
    """A folder as a finished run of two epochs leaves it."""
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    settings = {
        "dataset": "digits",
        "model": "resnet8",
        "method": "constant",
        "optimizer": "sgd",
        "lr": 0.1,
        "batch_size": 32,
    }
    (folder / "config.json").write_text(
        json.dumps(settings | {"seed": 0, "mode": "normal"} | config)
    )
    (folder / "status.json").write_text('{"state": "done", "reason": "", "step": 90}')
    rows = [
        {"kind": "epoch", "epoch": k, "step": 45 * (k + 1), "samples": 1437 * (k + 1), "lr": 0.1,
        "batch_size": 32, "momentum": 0.0}
        | {"delta": 0.1, "train_loss": 1.0 - k / 3, "test_acc": 0.5 + k / 5, "train_seconds": 1.0}
        for k in range(2)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_deep_json_in_a_run_is_named_or_shown_and_the_rest_is_shown(file, depth, here, cases):
    """Below what the stack holds a deep value is one like others; above, the file is named, or its
    row counted."""
    if cases("deep JSON in run folders", 1, int(depth in (480, 100_000))) == 0:
        pytest.skip("with --full")
    for kind in ("lists", "objects"):
        shutil.rmtree("runs", ignore_errors=True)
        shown_run("good")
        folder = shown_run("deep")
        value = deep_json(kind, depth)
        if file == "metrics.jsonl":
            (folder / file).write_bytes(
                (folder / file).read_bytes()
                + value
                + b'\n{"kind": "epoch", "epoch": '
                + value
                + b"}\n"
            )
        else:
            (folder / file).write_bytes(b'{"seed": 1, "state": "done", "a": ' + value + b"}")
        found = said(report.main, ["runs", "--out", "page"])
        if file == "config.json" and "left out" in found.err:
            assert found.code == 0 and "deep" in found.err
            assert "left out: its config.json is damaged" in found.err
            continue
        assert found.code == 0, found
        page = Path("page/report.html").read_text()
        if depth == 100_000:
            wanted = (
                "2 torn lines of metrics.jsonl"
                if file == "metrics.jsonl"
                else f"{file} cannot be read"
            )
            assert wanted in page
        assert "good" in page and "deep" in page


@pytest.mark.parametrize("file", ["status.json", "config.json", "sharpness.json", "sweep.json"])
def test_deep_json_is_one_line_of_every_other_command(file, here, stopped, cases):
    cases("deep JSON in run folders", 1, 1)
    shutil.copytree(stopped, "runs/run")
    entry = {"name": "run", "flags": ["--epochs=2"], "differs": {}}
    Path("runs/sweep.json").write_text(json.dumps({"runs": [entry]}))
    next(
        iter(
            p
            for p in (Path("runs", file), Path("runs/run", file))
            if file != "sweep.json" or p.parent.name == "runs"
        )
    )
    place = Path("runs", file) if file == "sweep.json" else Path("runs/run", file)
    for depth in (480, 990, 100_000):
        place.write_bytes(b'{"state": ' + deep_json("lists", depth) + b"}")
        mains = {
            "status.json": [(train.main, ["--resume", "--out", "runs/run", "--lr", "0.3"])],
            "config.json": [
                (train.main, ["--resume", "--out", "runs/run"]),
                (sharpness.main, ["runs/run", "--json"]),
            ],
            "sharpness.json": [
                (sharpness.main, ["runs/run", "--json", "--samples", "2", "--batch", "2"])
            ],
            "sweep.json": [
                (sweep.main, ["--out", "runs"]),
                (sweep.main, ["--out", "runs", "--run", "0"]),
            ],
        }[file]
        for main, argv in mains:
            message = refused(main, argv)
            assert file in message or (file == "status.json" and "--lr 0.1, not 0.3" in message), (
                message
            )


@pytest.mark.parametrize("ends", [b"\n", b""])
def test_enormous_lines_of_metrics_are_counted_and_cost_little_memory(ends, here, cases):
    import resource

    if cases("large and deep files", 1, int(ends == b"\n")) == 0:
        pytest.skip("with --full")
    shown_run("good")
    folder = shown_run("long")
    rows = (folder / "metrics.jsonl").read_bytes()
    with (folder / "metrics.jsonl").open("wb") as file:
        file.write(b'{"kind": "step", "a": "' + b"x" * (40 << 20) + b'"}\n' + rows)
        file.seek(1 << 29, os.SEEK_CUR)  # a line of NULs
        file.write(b"}" + ends)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = said(report.main, ["runs", "--out", "page"])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert found.code == 0 and grown < 300_000, (found, grown)  # kB
    page = Path("page/report.html").read_text()
    assert "2 torn lines of metrics.jsonl left out" in page and "70.00" in page


# Markup

MARKUP = [
    "<script>alert(1)</script>",
    "</title><script src=//x></script>",
    "<img src=x onerror=alert(1)>",
    "\" onload=\"alert(1)\" x=\"",
    "' onclick='alert(1)' x='",
    "]]></style><svg onload=alert(1)>",
    "--><iframe src=javascript:alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<a href=javascript:alert(1)>x</a>",
    "\u202e<b onmouseover=alert(1)>",
    "<scr\0ipt>alert(1)</scr\0ipt>",
    "<style>@import url(//x)</style>",
]  # fmt: skip


class Page(HTMLParser):
    """Every tag, attribute and address of a page."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: set[str] = set()
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses |= {
            value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "action")
        }

    def handle_data(self, data):
        self.words += data


def assert_harmless(text: str) -> Page:
    page = Page(text)
    bad = {"script", "iframe", "object", "embed", "img", "link", "base", "form"}
    assert not page.tags & bad, page.tags & bad
    assert not [name for name in page.attributes if name.startswith("on")], page.attributes
    # in the page itself, and the pictures that the report has drawn
    inside = ("#", "data:image/png;base64,")
    assert all(address.startswith(inside) for address in page.addresses), page.addresses
    return page


def test_markup_in_names_and_values_is_text_on_the_page(here, cases):
    count = cases("markup in run folders", len(MARKUP), len(MARKUP))
    for k, words in enumerate(MARKUP[:count]):
        name = f"{k} {words.replace('/', '-')}".replace("\0", "")
        config = dict.fromkeys(
            ("model", "dataset", "norm", "method", "optimizer", "augment", "wandb_project"), words
        )
        for seed in range(2):
            folder = shown_run(
                f"{name}/{seed}", **config, **{words: words}, seed=seed, batch_size=8 * (k + 1)
            )
            (folder / "status.json").write_text(
                json.dumps({"state": words if seed else "done", "reason": words})
            )
            (folder / "summary.json").write_text(
                json.dumps({"final_test_acc": words, words: words})
            )
            entry = {
                "algorithm": words,
                "split": words,
                "rho": 0.1,
                "value": 1.0 + k,
                "adaptive": words,
            }
            (folder / "sharpness.json").write_text(json.dumps({"results": [entry]}))
            (folder / "layers.json").write_text(json.dumps({"layers": [{"name": words}]}))
            with (folder / "metrics.jsonl").open("a") as file:
                row = {"kind": "measure", "step": 1, "layer_c2": [1.0], words: words}
                file.write(json.dumps(row) + "\n")
        noise = {
            "step": 1,
            "batch_size": 8 * (k + 1),
            "noise_norm": 1.0,
            "noise_norm_se": words,
            "c2_sampled": 1.0,
        }
        noise["statistics"] = {
            "variance": {"value": 1.0},
            "hill": [{"share": words, "value": words}],
            words: words,
        }
        folder = shown_run(f"{name}/noise", **config | {"mode": "sampling"})
        (folder / "noise.json").write_text(json.dumps({"points": [noise], "optimizer": words}))
        crossings = {"0.5": {"step": 5 + k, "samples": 50, words: words}, "1.0": None}
        found = {
            "crossings": crossings,
            "batch_size": 8 * (k + 1),
            "seed": 0,
            "momentum": 0.0,
            words: words,
        }
        folder = shown_run(f"{name}/critical", **config | {"mode": "critical", "optimizer": "sgd"})
        (folder / "critical.json").write_text(json.dumps(found))
    found = said(report.main, ["runs", "--out", "page"])
    assert found.code == 0, found
    page = assert_harmless(Path("page/report.html").read_text())
    for words in MARKUP[:count]:
        assert (
            words.split("alert")[0].replace("\u202e", "\ufffd").replace("\0", "\ufffd")[:12]
            in page.words
        ), words
    for figure in Path("page/figures").glob("*.svg"):
        assert_harmless(figure.read_text())
    each = cases("markup in run folders, alone", len(MARKUP), 2)
    for k in range(each):  # alone, a value is the page's title
        shutil.rmtree("runs")
        shown_run("one", model=MARKUP[k], dataset=MARKUP[k])
        assert said(report.main, ["runs", "--out", "page"]).code == 0
        assert_harmless(Path("page/report.html").read_text())


# Links, pipes and devices


def images(here: Path) -> Path:
    names = [
        f"{split}/{c}/{k}.png" for split in ("train", "val") for c in ("ant", "bee") for k in (0, 1)
    ]
    return tree(here / "images", {name: noise() for name in names})


# where the link is, where it leads, and how many images there are to train on, 0 where it is
# refused
LOOPS = {
    "a class in itself": ("train/ant/loop", "../ant", 0),
    "the tree in itself": ("train/ant/loop", "../..", 0),
    "a folder of a link": ("train/ant/x/y", "../x", 0),
    "a class that is the tree": ("train/loop", "..", 0),
    "a class that is itself": ("train/loop", "loop", 0),
    "a folder that is linked, not a loop": ("train/ant/more", "../bee", 6),
    "an image that is itself": ("train/ant/2.jpg", "2.jpg", 0),
    "two images that are each other": ("train/ant/2.jpg", "3.jpg", 0),
    "a split that is itself": ("test", "test", 4),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_links_in_a_tree_ends(name, loader, here, cases):
    cases("loops of links", 1, 1)
    where, target, count = LOOPS[name]
    root = images(here)
    link = root / where
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    if "two" in name:
        (root / "train/ant/3.jpg").symlink_to("2.jpg")
    argv = [
        "--dataset",
        "folder",
        "--data-dir",
        "images",
        "--loader",
        loader,
        "--batchsize",
        "2",
        "--epochs",
        "1",
    ]
    argv += [
        "--model",
        "resnet8",
        "--out",
        "run",
        *(["--workers", "0" if loader == "torch" else "1"] if loader != "resident" else []),
    ]
    found = said(train.main, [*argv, "--max-time", "1e-3"])
    if count:
        assert found.code == 75 and f"{count} training and 4 test images" in found.out, found
    else:
        assert found.code == 2 and len(found.err.splitlines()) == 1 and not Path("run").exists(), (
            found
        )
        assert where in found.err and ("remove" in found.err or "repair" in found.err)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["a pipe", "a link to a pipe", "a device", "a device without end"])
def test_a_pipe_or_a_device_among_images_is_named_and_nobody_waits(kind, loader, here, cases):
    cases("pipes and devices among images", 1, 1)
    path = images(here) / "train" / "ant" / "2.jpg"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to a pipe":
        os.mkfifo(here / "pipe")
        path.symlink_to(here / "pipe")
    else:
        path.symlink_to("/dev/null" if kind == "a device" else "/dev/zero")
    argv = [
        "--dataset",
        "folder",
        "--data-dir",
        "images",
        "--loader",
        loader,
        "--batchsize",
        "2",
        "--model",
        "resnet8",
    ]
    argv += [] if loader == "resident" else ["--workers", "0" if loader == "torch" else "1"]
    message = refused(train.main, [*argv, "--out", "run"])
    assert (
        "images/train/ant/2.jpg: it is a pipe, a socket or a device, not a file: remove" in message
    )
    assert not Path("run").exists()
    found = said(
        train.main, [*argv, "--out", "run", "--on-bad-image", "zeros", "--max-time", "1e-3"]
    )
    assert found.code == 75 and "2.jpg" in found.err and "it is served black" in found.err, found


def test_a_pipe_or_a_device_for_a_file_of_flags_is_refused(here, cases):
    os.mkfifo("pipe")
    for path in ("pipe", "/dev/zero", "/dev/stdin"):
        cases("pipes and devices for files", 1, 1)
        for main, argv in ((train.main, ["--config"]), (sweep.main, ["--out", "s", "--grid"])):
            if path == "/dev/stdin" and os.path.isfile(os.path.realpath(path)):
                continue
            message = refused(main, [*argv, path])
            assert (
                f"{argv[-1]} {path}: it is a pipe, a socket or a device" in message
                and "give a TOML file" in message
            )


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["a pipe", "a device"]
)
@pytest.mark.parametrize("file", FILES)
def test_a_pipe_or_a_device_in_a_run_folder_is_named_and_the_rest_is_shown(file, make, here, cases):
    cases("pipes and devices for files", 1, 1)
    shown_run("good")
    path = shown_run("odd") / file
    path.unlink(missing_ok=True)
    make(path)
    found = said(report.main, ["runs", "--out", "page"])
    if file == "config.json":
        assert found.code == 0 and "left out: its config.json is damaged" in found.err
        assert "odd" in found.err and "good" in Path("page/report.html").read_text()
        return
    assert found.code == 0, found
    page = Path("page/report.html").read_text()
    assert f"{file} cannot be read" in page and "good" in page


# The folder of a sweep


@pytest.mark.parametrize(
    "name", ["../../target", "..", ".", "", "/", "a/../../../target", "~", "$HOME", "x\0y", "-rf"]
)
@pytest.mark.parametrize("argv", [["--run", "0"], []])
def test_a_sweep_removes_and_runs_nothing_outside_its_folder(name, argv, here, monkeypatch, cases):
    cases("hostile sweep folders", 1, 1)
    target = here.parent / "target"
    tree(target, {"kept": b"kept"})
    Path("s").mkdir()
    entry = {"name": name, "flags": ["--epochs=1", "--max-time=1e-3"], "differs": {}}
    Path("s/sweep.json").write_text(json.dumps({"runs": [entry]}))
    started: list = []
    monkeypatch.setattr(os, "execv", lambda *given: started.append(given))
    # "/" is one of the names
    monkeypatch.setattr(shutil, "rmtree", lambda *given: started.append(given))
    monkeypatch.setattr(sweep, "on_this_machine", lambda *given: started.append(given))
    before = outside(here)
    found = said(sweep.main, ["--out", "s", *argv])
    if name == "-rf":  # odd, and within the folder
        assert started
    else:
        assert not started and found.code == 2 and "s/sweep.json is damaged" in found.err, found
    assert outside(here) == before and (target / "kept").exists() and Path("s/sweep.json").exists()
