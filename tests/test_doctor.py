"""--doctor and --check-data: what is missing or bad is said, with the remedy, and nothing else is
touched.

The doctor is shown made-up installations: folders of small packages, in a Python that sees no
others.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
import types
from pathlib import Path

import pytest
import torch
import torchvision
from images import encoded, noise, solid, tree

from fastsmooth.data import images, index
from fastsmooth.data.cifar import OFFICIAL
from fastsmooth.sweep import grid
from fastsmooth.train import main

ROOT = Path(__file__).parent.parent
TORCH = b"""
__version__ = "2.99.0"
class Tensor: pass
class version: cuda = hip = None
def get_num_threads(): return 3
"""
NUMPY = b"__version__ = '2.0.0'\nclass ndarray: pass"
PILLOW = {"PIL/__init__.py": b"", "PIL/Image.py": b"__version__ = '12.0.0'\nopen = open"}
SAFETENSORS = {"safetensors/__init__.py": b"__version__ = '0.9.0'\nsafe_open = open"}
# all but torchvision
HERE = {"torch/__init__.py": TORCH, "numpy/__init__.py": NUMPY, **PILLOW, **SAFETENSORS}
RAISES = b"print('noise')\nraise "


def names(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def doctor(
    folder: Path, packages: dict[str, bytes], *flags: str, **env: str
) -> tuple[int, dict[str, str], str]:
    """(exit code, rows by name, stderr) in a Python that has these packages alone."""
    place = tree(folder / "packages", packages | {"nothing": None})
    cwd = tree(folder / "cwd", {"nothing": None})
    search = os.pathsep.join([str(place), str(ROOT)])
    command = [sys.executable, "-S", "-B", "-m", "fastsmooth.train", "--doctor", *flags]
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": search} | env
    before = names(folder)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert names(folder) == before
    assert "Traceback" not in done.stdout + done.stderr
    assert (done.returncode, len(done.stderr.splitlines())) in ((0, 0), (2, 1)), done
    return done.returncode, table(done.stdout), done.stderr


def table(page: str) -> dict[str, str]:
    """ "state text" by the name of the row; every text begins in the same column."""
    found = {}
    for line in page.removesuffix("a run can be done\n").splitlines():
        match = re.fullmatch(r"(ok|note|BAD) {1,5}(\S+(?: \S+)?) +(\S.*)", line)
        assert (
            match
            and line[6 : 6 + len(match[2])] == match[2]
            and line[18] == " "
            and line[19] != " "
        ), line
        found[match[2]] = f"{match[1]} {match[3]}"
    return found


# --doctor


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return doctor(tmp_path_factory.mktemp("bare"), {})


def test_a_python_without_packages_is_told_what_to_install(bare):
    code, rows, error = bare
    assert code == 2 and "pip install " in error and error.startswith("fastsmooth: error: ")
    for name in ("torch", "torchvision"):
        assert rows[name] == "BAD missing: pip install torch torchvision"
    for name in ("numpy", "pillow"):
        assert rows[name] == f"BAD missing: pip install {name}"
    for name, extra in {
        "dali": "dali",
        "timm": "timm",
        "wandb": "wandb",
        "trackio": "trackio",
        "tensorboard": "tensorboard",
        "rich": "progress",
        "ray": "ray",
    }.items():
        assert rows[name].startswith("note missing, for ") and rows[name].endswith(
            f": pip install 'fastsmooth[{extra}]'"
        )
    assert {
        "python",
        "matplotlib",
        "triton",
        "processors",
        "memory",
        "--out",
        "cache",
    } <= rows.keys()


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_pip_line_names_an_extra(bare):
    extras = PROJECT["optional-dependencies"].keys()
    asked = re.findall(r"fastsmooth\[(\w+)\]", " ".join(bare[1].values()))
    assert len(asked) == 8 and set(asked) <= extras


@pytest.mark.parametrize("name", ["torch", "torchvision", "numpy"])
def test_a_version_older_than_the_oldest_that_is_claimed_is_refused(tmp_path, name):
    oldest = re.search(rf"\b{name}>=(\d+)\.(\d+)", " ".join(PROJECT["dependencies"]))
    old = f"{oldest[1]}.{int(oldest[2]) - 1}.7"
    packages = HERE | {"torchvision/__init__.py": b"__version__ = '0.99'\nclass ops: pass"}
    packages[f"{name}/__init__.py"] += f"\n__version__ = '{old}'".encode()
    code, rows, error = doctor(tmp_path, packages)
    assert code == 2 and rows[name].startswith(f"BAD {old} ")
    assert f"{oldest[1]}.{oldest[2]}" in error and "pip install --upgrade" in error


@pytest.mark.parametrize(
    "raised",
    ["OSError('libcudart')", "SystemExit('libcudart')", "BaseException('two\\nlibcudart')"],
)
def test_a_torch_that_cannot_be_imported_is_said_whatever_it_raises(tmp_path, raised):
    code, rows, error = doctor(tmp_path, HERE | {"torch/__init__.py": RAISES + raised.encode()})
    assert (
        code == 2
        and "torch cannot be imported" in error
        and "libcudart" in error
        and "pip install" in error
    )
    assert rows["numpy"] == "ok 2.0.0" and "libcudart" in rows["torch"]


def test_a_torchvision_of_another_torch_is_refused(tmp_path):
    broken = RAISES + b"RuntimeError('operator torchvision::nms does not exist')"
    code, rows, error = doctor(tmp_path, HERE | {"torchvision/__init__.py": broken})
    assert code == 2 and "nms does not exist" in rows["torchvision"] and "pip install" in error


def test_a_file_that_hides_torch_is_named(tmp_path):
    code, _, error = doctor(tmp_path, HERE | {"torch/__init__.py": b"__version__ = '2.99.0'"})
    assert code == 2 and str(tmp_path / "packages" / "torch") in error and "rename" in error


BROKEN = {
    "rich/__init__.py": RAISES + b"SystemExit('oh')",
    "matplotlib/__init__.py": b"1/0",
    "timm.py": RAISES + b"OSError('oh')",
}


def test_a_broken_optional_package_is_a_note_unless_the_run_asks_for_it(tmp_path):
    packages = HERE | BROKEN | {"nvidia/__init__.py": b"1/0"}
    _, rows, _ = doctor(tmp_path, packages)
    bad = {name for name, row in rows.items() if row.startswith("BAD ")}
    # which is not there, and a made-up torch has no devices
    assert bad == {"torchvision", "device"}
    for name, why in {
        "rich": "oh",
        "matplotlib": "division",
        "timm": "oh",
        "dali": "division",
    }.items():
        assert rows[name].startswith("note ") and why in rows[name] and "pip install" in rows[name]
    _, rows, error = doctor(tmp_path, packages, "--model", "timm/vit", "--loader", "dali")
    assert {name for name, row in rows.items() if row.startswith("BAD ")} == bad | {"timm", "dali"}
    assert "3 more above" in error


def test_heavy_packages_are_not_imported_for_their_version(tmp_path):
    packages = HERE | BROKEN
    for name in ("timm", "wandb", "trackio", "tensorboard", "ray"):
        packages[f"{name}.py"] = b"open('imported', 'w')"
        packages[f"{name}-9.8.7.dist-info/METADATA"] = (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.8.7\n".encode()
        )
    _, rows, _ = doctor(tmp_path, packages)
    for name in ("timm", "wandb", "trackio", "tensorboard", "ray"):
        assert rows[name].startswith("ok 9.8.7, not tried")


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Runs the doctor in this process: (exit code, rows, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str):
        code = main(["--doctor", *flags])
        page, error = capsys.readouterr()
        assert list(tmp_path.iterdir()) == []
        return code, table(page), error

    return run


def test_this_machine_is_described(here):
    code, rows, error = here("--device", "cpu")
    assert (code, error) == (0, "")
    assert rows["torch"].startswith(f"ok {torch.__version__}, ")
    assert rows["torchvision"].startswith(f"ok {torchvision.__version__}, ")
    assert rows["numpy"] == f"ok {importlib.metadata.version('numpy')}"
    assert f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} " in rows["processors"]
    assert f"{torch.get_num_threads()} threads" in rows["processors"]
    assert rows["device"] == "ok --device cpu is cpu"
    free = float(re.search(r"runs, ([\d,.]+) GB free", rows["--out"])[1].replace(",", ""))
    assert free == pytest.approx(shutil.disk_usage(".").free / 1e9, rel=0.05, abs=0.3)
    assert all(re.search(r"[\d.]+ GB free", rows[name]) for name in ("memory", "cache"))


def test_torchvision_is_tried_and_not_only_imported(here, monkeypatch):
    def nms(*given):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(torchvision.ops, "nms", nms)
    code, rows, error = here()
    assert (
        code == 2
        and "no kernel" in rows["torchvision"]
        and "pip install --upgrade torch torchvision" in error
    )


@pytest.mark.parametrize(
    ("wants", "state"),
    [
        ("torch==2.3.1", "note"),
        ("torch (>=99.0)", "note"),
        ("torch (>=2.9)", "ok"),
        ("numpy", "ok"),
    ],
)
def test_torchvision_says_which_torch_it_was_made_for(here, monkeypatch, wants, state):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [wants])
    code, rows, _ = here()
    assert code == 0 and rows["torchvision"].split()[0] == state


def test_a_gpu_is_shown_with_its_memory(here, monkeypatch):
    facts = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "mem_get_info": lambda device: (50 * 10**9, 80 * 10**9) if device == 0 else 1 / 0,
        "get_device_name": lambda device: "A Card",
        "get_device_capability": lambda device: (9, 0),
    }
    for name, fact in facts.items():
        monkeypatch.setattr(torch.cuda, name, fact)
    code, rows, _ = here("--device", "cpu")
    assert code == 0
    assert all(word in rows["cuda:0"] for word in ("A Card", "50.0 GB free of 80.0 GB", "9.0"))
    assert rows["cuda:1"].startswith("note ") and "division" in rows["cuda:1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_a_run_would_refuse_is_bad(here):
    code, rows, error = here("--device", "cuda:1")
    assert code == 2 and rows["device"].startswith("BAD ") and "--device cpu" in error


def test_the_environment_of_a_launcher_is_shown(here, monkeypatch):
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "a\x1bb"}.items():
        monkeypatch.setenv(name, value)
    code, rows, _ = here()
    assert code == 0 and rows["launch"] == r"ok WORLD_SIZE=1, RANK=0, MASTER_ADDR=a\x1bb"
    monkeypatch.setenv("WORLD_SIZE", "many")
    code, _, error = here()
    assert code == 2 and "WORLD_SIZE" in error


def test_without_a_compiler_the_kernels_are_plain_pytorch(here, monkeypatch):
    from fastsmooth.kernels import native

    native.library.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    try:
        code, rows, _ = here("--device", "cpu")
    finally:
        native.library.cache_clear()
    assert (
        code == 0
        and rows["cpu kernels"].startswith("note reference: ")
        and "C++ compiler" in rows["cpu kernels"]
    )


def test_without_a_home_directory_a_run_can_be_done(here, monkeypatch, quick_compiler):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    code, rows, _ = here("--device", "cpu")
    assert (
        code == 0 and "XDG_CACHE_HOME" in rows["cache"] and "XDG_CACHE_HOME" in rows["cpu kernels"]
    )
    assert rows["cpu kernels"].startswith("ok native: C++")


def test_a_cache_in_which_others_may_write_is_said(here, monkeypatch, quick_compiler):
    monkeypatch.setenv("XDG_CACHE_HOME", str(quick_compiler))
    (quick_compiler / "fastsmooth").mkdir()
    (quick_compiler / "fastsmooth").chmod(0o777)
    code, rows, _ = here("--device", "cpu")
    assert (
        code == 0
        and rows["cache"].startswith("note ")
        and "other users may write there" in rows["cache"]
    )
    assert "may be written by other users" in rows["cpu kernels"]


def test_an_out_that_cannot_be_written_is_bad(here, tmp_path_factory, monkeypatch):
    file = tmp_path_factory.mktemp("other") / "file"
    file.touch()
    code, rows, error = here("--out", str(file / "run"))
    assert (
        code == 2
        and rows["--out"].startswith("BAD ")
        and "is not a folder: choose another --out" in error
    )
    usage = types.SimpleNamespace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, error = here()
    assert code == 2 and "make room" in error


# --check-data


@pytest.fixture
def check(capsys):
    """(exit code, lines of stdout, stderr)."""

    def run(*flags: str):
        code = main(["--check-data", *flags])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return run


def good(root: Path) -> Path:
    images = {
        f"train/{name}/{i}.png": noise((20 + i, 30))
        for name, n in (("ant", 2), ("bee", 5))
        for i in range(n)
    }
    images["train/bee/large.jpg"] = solid((1, 2, 3), (64, 48))
    return tree(
        root, images | {"val/ant/0.png": solid((9, 9, 9), (7, 9)), "val/bee/0.png": noise((20, 30))}
    )


def folder(root: Path) -> tuple[str, ...]:
    return "--dataset", "folder", "--data-dir", str(root)


def test_good_images_are_counted(tmp_path, check):
    good(tmp_path / "images")
    before = names(tmp_path)
    code, lines, error = check(*folder(tmp_path / "images"))
    assert (code, error, len(lines)) == (0, "", 1)
    for words in (
        "8 train and 2 test images",
        "2 classes",
        "0 bad",
        "7x9 to 64x48",
        "train 2 to 6, test 1",
    ):
        assert words in lines[0]
    assert re.search(r"[\d.]+ s$", lines[0]) and names(tmp_path) == before


def test_every_bad_image_is_listed_with_its_reason(tmp_path, check):
    good(tmp_path)
    bad = {
        "train/ant/cut.png": (encoded(noise((64, 64)), "PNG")[:4000], "truncated"),
        "train/ant/cut.jpg": (encoded(noise((64, 64)), "JPEG")[:2000], "truncated"),
        "train/bee/text.jpg": (b"hello", "not an image"),
        "val/bee/empty.png": (b"", "not an image"),
    }
    tree(tmp_path, {name: content for name, (content, _) in bad.items()})
    (tmp_path / "val/ant/link.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "val/ant/pipe.png")
    reasons = {name: reason for name, (_, reason) in bad.items()}
    reasons |= {"val/ant/link.png": "No such file", "val/ant/pipe.png": "pipe"}
    code, lines, error = check(*folder(tmp_path))
    assert code == 2 and len(lines) == len(reasons) + 1
    found = dict(line.removeprefix(f"{tmp_path}/").split(": ", 1) for line in lines[:-1])
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in found[name] and name not in found[name]
    assert "11 train and 5 test images" in lines[-1] and "6 bad" in lines[-1]
    assert (
        len(error.splitlines()) == 1
        and "6 of 16 images are bad" in error
        and "--on-bad-image zeros" in error
    )


@pytest.mark.parametrize(
    "name",
    [b"caf\xe9.png", b"two\nlines\r.png", b"\x1b[31m it's \\n.png", b"\xe2\x80\xaemirror.png"],
)
def test_an_odd_name_comes_on_one_line_that_bash_reads_back(tmp_path, check, name):
    good(tmp_path)
    path = os.fsencode(tmp_path) + b"/train/ant/" + name
    Path(os.fsdecode(path)).write_bytes(b"bad")
    code, lines, _ = check(*folder(tmp_path))
    assert code == 2 and len(lines) == 2 and lines[0].isprintable()
    word = lines[0].removesuffix(": not an image that can be read")
    assert subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True).stdout == path


def test_all_threads_decode_and_each_image_is_decoded_once(tmp_path, check, monkeypatch):
    tree(
        tmp_path,
        {
            f"{split}/{name}/{i}.png": solid()
            for split in ("train", "val")
            for name in "ab"
            for i in range(20)
        },
    )
    meeting, seen, real = threading.Barrier(3), [], images.open_image

    def open_image(files, i):
        seen.append(files.names[i])
        if len(seen) <= 3:
            meeting.wait(timeout=10)
        return real(files, i)

    monkeypatch.setattr(images, "open_image", open_image)
    assert check(*folder(tmp_path), "--workers", "3")[0] == 0
    assert sorted(seen) == sorted(str(path) for path in tmp_path.rglob("*.png"))


def test_ctrl_c_ends_it_without_a_word(tmp_path, check, monkeypatch):
    tree(
        tmp_path,
        {
            f"{split}/{name}/{i}.png": b""
            for split in ("train", "val")
            for name in "ab"
            for i in range(200)
        },
    )
    seen = []

    def open_image(files, i):
        seen.append(i)
        time.sleep(0.001)
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "open_image", open_image)
    assert check(*folder(tmp_path), "--workers", "2") == (130, [], "")
    assert len(seen) < 20


def test_whoever_looks_no_further_does_not_wait_for_all_files():
    seen = []

    def work(path):
        seen.append(path)
        time.sleep(0.001)

    found = index.in_threads(work, list(map(str, range(1000))), "", None, threads=2, chunk=1)
    next(found)
    found.close()
    assert len(seen) < 500


def test_a_long_check_says_how_far_it_is(tmp_path, check, monkeypatch):
    tree(
        tmp_path,
        {
            f"{split}/{name}/{i}.png": solid()
            for split in ("train", "val")
            for name in "ab"
            for i in range(20)
        },
    )
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(index, "time", types.SimpleNamespace(monotonic=lambda: next(hours)))
    _, lines, error = check(*folder(tmp_path))
    assert len(lines) == 1 and "decoding train: 40 %" in error and "decoding test: 100 %" in error


def test_digits_and_a_tree_that_cannot_be_read(tmp_path, check):
    code, lines, _ = check()
    assert (
        code == 0
        and "1,437 train and 360 test images, 10 classes, 0 bad" in lines[0]
        and "8x8" in lines[0]
    )
    code, lines, error = check(*folder(tmp_path / "nowhere"))
    assert (code, lines, len(error.splitlines())) == (2, [], 1) and "no such directory" in error


def test_the_md5_sums_of_cifar_are_verified(tmp_path, check):
    name, _ = OFFICIAL["cifar10"].train_list[0]
    tree(tmp_path, {f"{OFFICIAL['cifar10'].base_folder}/{name}": b"not this"})
    code, lines, error = check("--dataset", "cifar10", "--data-dir", str(tmp_path))
    assert (code, lines) == (2, []) and "MD5" in error and name in error


def test_without_torch_the_check_names_the_doctor(tmp_path):
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-B", "-m", "fastsmooth.train", "--check-data"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--doctor" in done.stderr


# Flags


@pytest.mark.parametrize(
    "pair", ["--doctor --plan", "--check-data --plan", "--doctor --check_data", "--doctor --json"]
)
def test_one_question_at_a_time(capsys, pair):
    assert main(pair.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert all(word.replace("_", "-") in printed.err for word in pair.split()[-1:])


@pytest.mark.parametrize("line", ["doctor = true", "check-data = true", "check_data = true"])
def test_neither_is_asked_for_in_a_file(tmp_path, capsys, line):
    (tmp_path / "c.toml").write_text(line)
    assert main(["--config", str(tmp_path / "c.toml")]) == 2
    assert "belongs on the command line" in capsys.readouterr().err


def test_a_sweep_takes_neither():
    known = {name for action in grid.parser()._actions for name in action.option_strings}
    assert "--lr" in known and not known & {"--doctor", "--check-data"}
