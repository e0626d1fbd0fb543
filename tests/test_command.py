"""One command for all: what it lists, that it does what the modules do, and that help comes at
once."""

import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from said import refused, said

from fastsmooth import __main__ as every
from fastsmooth import __version__, evaluate, predict, sharpness, train
from fastsmooth.export import __main__ as export
from fastsmooth.messages import command
from fastsmooth.prepare import __main__ as prepare
from fastsmooth.report import __main__ as report
from fastsmooth.smooth import __main__ as smooth
from fastsmooth.sweep import __main__ as sweep

ROOT = Path(__file__).parent.parent
CALLED = {  # sys.argv[0] as Python sets it: how a command is called then
    "/usr/bin/fastsmooth": "fastsmooth NAME",
    str(ROOT / "fastsmooth" / "__main__.py"): "python -m fastsmooth NAME",
    str(ROOT / "fastsmooth" / "train.py"): "python -m fastsmooth.NAME",
    str(ROOT / "fastsmooth" / "report" / "__main__.py"): "python -m fastsmooth.NAME",
}


def test_every_command_is_listed_at_once():
    code = (
        "import sys, fastsmooth.__main__ as m; assert m.main({}) == 0; assert not {{'torch', "
        "'numpy'}} & set(sys.modules)"
    )
    for argv in (
        [],
        ["--help"],
        ["-h"],
        ["train", "--help"],
        ["sweep", "--help"],
        ["train", "--plan"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argv)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        if argv in ([], ["--help"], ["-h"]):
            assert all(f"\n  {name} " in done.stdout for name in every.COMMANDS)


def test_a_module_is_one_of_its_commands():
    done = subprocess.run(
        [sys.executable, "-m", "fastsmooth"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith(
        "usage: python -m fastsmooth COMMAND [flags]\n"
    )
    wrong = subprocess.run(
        [sys.executable, "-m", "fastsmooth", "train", "--lr", "0"], cwd=ROOT, capture_output=True
    )
    assert wrong.returncode == 2 and wrong.stderr.startswith(
        b"fastsmooth: error: --lr: 0 is out of range"
    )


@pytest.mark.parametrize("name", every.COMMANDS)
def test_a_command_does_what_its_module_does(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = {
        m.__spec__.name.removeprefix("fastsmooth.").split(".")[0]: m.main
        for m in (train, evaluate, predict, prepare, sweep, sharpness, export, report, smooth)
    }[name]
    for argv in (["--help"], ["--no-such-flag"]):
        assert said(every.main, [name, *argv]) == said(main, argv)


def test_the_version_is_said():
    assert said(every.main, ["--version"]) == (0, f"fastsmooth {__version__}\n", "")


def test_what_is_no_command_is_one_line():
    assert refused(every.main, ["trian"]) == "unknown command 'trian': did you mean train?"
    assert refused(every.main, ["x\ny"]) == "unknown command 'x\\ny': --help lists them"
    assert "fastsmooth.train --method" in refused(every.main, ["--method", "exp"])


@pytest.mark.parametrize("program", CALLED)
def test_usage_and_messages_are_right_for_every_way_of_calling(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    for name in every.COMMANDS:
        called = CALLED[program].replace("NAME", name)
        assert command(name) == called
        assert said(every.main, [name, "--help"]).out.startswith(f"usage: {called} ")
    assert refused(train.main, ["--method", "lr", "batch"]).endswith(
        f"{CALLED[program].replace('NAME', 'sweep')} does a run for each of several"
    )
    assert f"no run is named: {CALLED[program].replace('NAME', 'sharpness')} RUN" in refused(
        sharpness.main, []
    )


def test_installing_makes_the_command(monkeypatch):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts.pop("fastsmooth").partition(":")
    assert (module, scripts) == ("fastsmooth.__main__", {})
    with pytest.raises(SystemExit) as end:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/fastsmooth", "--version"])
        with restored():
            getattr(sys.modules[module], function)()
    assert end.value.code == 0


class restored:
    """The hooks that the process of a command sets are those of this process again."""

    def __enter__(self):
        import logging
        import threading
        import warnings

        places = (
            (sys, "excepthook"),
            (threading, "excepthook"),
            (warnings, "showwarning"),
            (logging, "lastResort"),
        )
        self.before = [(module, name, getattr(module, name)) for module, name in places]

    def __exit__(self, *_):
        for module, name, value in self.before:
            setattr(module, name, value)


def test_a_record_names_the_command_however_it_was_called(tmp_path):
    record = runpy.run_path(str(ROOT / "scripts" / "make_record.py"), run_name="make_record")[
        "command"
    ]
    for program in (
        ["/x/python", "/x/fastsmooth/train.py"],
        ["/x/python", "/usr/bin/fastsmooth", "train"],
    ):
        words = [*program, "--lr", "0.1", "--out", "somewhere", "--seed", "3"]
        (tmp_path / "env.json").write_text(str({"command": words}).replace("'", '"'))
        assert record(tmp_path) == "python -m fastsmooth.train --lr 0.1"


def test_the_scripts_are_refused_in_one_line_too():
    for script, argv, words in (
        ("claims.py", ["--only", "lemma"], "choose from"),
        ("claims.py", [], "--data-dir is missing"),
        ("make_record.py", ["target", "nowhere"], "nowhere/config.json"),
    ):
        command_ = [sys.executable, str(ROOT / "scripts" / script), *argv]
        done = subprocess.run(
            command_, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert (
            done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr
        ), done
