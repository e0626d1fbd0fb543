"""Networks and losses of the user's own, by FILE.py:NAME: what they become, and what is wrong."""

import hashlib
import json
import shutil

import pytest
import torch
from exact import EXACT
from rows import read_rows
from said import refused, said

from fastsmooth import owncode, sharpness
from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import parser, read_flags
from fastsmooth.runfolder.checkpoint import Checkpoints
from fastsmooth.train import main

CODE = """
import torch
from torch import nn
from torch.nn import functional as F

from fastsmooth import models


class Net(nn.Module):
    def __init__(self, classes, in_chans=1):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_chans, 8, 3), nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def resnet(num_classes, channels):
    return models.build("resnet8", num_classes, channels=channels)


def mean(logits, target):
    return F.cross_entropy(logits, target)


def values(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, logits, target):
        return self.factor * values(logits, target)


half = Halved()
"""

WRONG = """
import torch
from torch import nn
from torch.nn import functional as F

class Wide(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(3 * 64, classes + 1)
    def forward(self, x):
        return self.head(x.flatten(1))

class Tuple(Wide):
    def forward(self, x):
        return super().forward(x), 1

class Key(Wide):
    def forward(self, x):
        return {}["absent"]

def nothing():
    return None

def number(classes):
    return 3

def breaks(classes):
    return [][classes]

class Lazy(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.LazyLinear(classes)

def fixed(classes):
    return nn.Identity()

value = 7

def one_number(logits, target):
    return F.cross_entropy(logits, target)

def total(logits, target):
    return F.cross_entropy(logits, target, reduction="sum")

def detached(logits, target):
    return F.cross_entropy(logits, target).detach()

def item(logits, target):
    return F.cross_entropy(logits, target).item()

def matrix(logits, target):
    return logits.softmax(1)

def labels_alone(logits, target):
    return logits[torch.arange(len(target)), target].neg()

class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

class Closure(torch.optim.SGD):
    def step(self, closure):
        closure()

class NoRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

def odd(params, lr):
    return 4

class Counts(torch.optim.SGD):
    count = 0
    def step(self, closure=None):
        self.count += 1
        return super().step()

class Keeps(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["module"] = F
        return super().step()

class Fails(torch.optim.SGD):
    def step(self, closure=None):
        raise KeyError("absent")
"""

QUICK = [*EXACT, "--epochs", "1", "--batchsize", "160", "--log-every", "3"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With code.py and wrong.py, and this process in it."""
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "syntax.py").write_text("x = 1\ndef f(:\n    pass\n")
    (tmp_path / "imports.py").write_text("import os\n\nimport no_such_module_here\n")
    (tmp_path / "exits.py").write_text("import sys\n\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(out):
    return Checkpoints(out / "checkpoints", print).load()


def done(out, *flags):
    found = said(main, [*QUICK, *flags, "--out", str(out)])
    assert found.code == 0, found
    return found.out


def alike(one, other):
    one, other = state(one)["model"], state(other)["model"]
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def last_epoch(out):
    return [row for row in read_rows(out) if row["kind"] == "epoch"][-1]


# What they become


def test_a_network_and_a_loss_of_own_code_have_the_bits_of_the_same_from_here(folder):
    done(folder / "ours")
    told = done(folder / "own", "--model", "code.py:resnet", "--loss", "code.py:mean")
    assert alike(folder / "ours", folder / "own")
    assert "the loss, of training and of testing, is code.py:mean" in told
    assert last_epoch(folder / "own")["test_loss"] == last_epoch(folder / "ours")["test_loss"]


def test_a_loss_with_a_value_a_sample_is_its_mean(folder):
    net = ["--model", "code.py:Net", "--track-noise", "every=3"]
    for name in ("values", "Halved", "half"):
        done(folder / name, *net, "--loss", f"code.py:{name}")
    done(folder / "usual", *net)
    torch.testing.assert_close(state(folder / "values")["model"], state(folder / "usual")["model"])
    assert alike(folder / "Halved", folder / "half")
    usual, own, half = (last_epoch(folder / name) for name in ("usual", "values", "half"))
    assert own["test_loss"] == pytest.approx(usual["test_loss"], rel=1e-5)
    assert half["train_loss"] < 0.6 * usual["train_loss"]
    noise = [
        next(row for row in read_rows(folder / name) if row["kind"] == "measure")
        for name in ("usual", "values", "half")
    ]
    assert noise[1]["c2_sampled"] == pytest.approx(noise[0]["c2_sampled"], rel=1e-5)
    assert noise[2]["c2_sampled"] == pytest.approx(noise[0]["c2_sampled"] / 4, rel=1e-5)


def test_the_noise_of_a_direction_is_that_of_the_own_loss(folder):
    sampling = ["--mode", "sampling", "--steps", "0", "--draws", "3", "--model", "code.py:Net"]
    points = []
    for name in ("code.py:half", "code.py:values"):
        done(folder / name[8:], *sampling, "--loss", name)
        points += json.loads((folder / name[8:] / "noise.json").read_text())["points"]
    assert points[0]["noise_norm"] == pytest.approx(points[1]["noise_norm"] / 2, rel=1e-5)
    assert points[0]["function"].startswith("mean code.py:half over the 1,437 training images")


def test_a_loss_without_reduction_that_is_a_mean_may_be_cut(folder):
    flags = ["--micro-batch", "40", "--loss", "code.py:mean"]
    done(folder / "cut", *flags, "--model", "code.py:Net")


def test_modules_beside_the_file_belong_to_it(folder):
    (folder / "parts_of_it.py").write_text("WIDTH = 4\n")
    (folder / "code.py").write_text(CODE + "\nfrom parts_of_it import WIDTH\n")
    done(folder / "run", "--model", "code.py:Net")
    kept = {p.name: p.read_bytes() for p in (folder / "run" / "code").iterdir()}
    assert kept.keys() == {"code.py", "parts_of_it.py"}
    made_with = state(folder / "run")["made_with"]
    for name, content in kept.items():
        assert content == (folder / name).read_bytes()
        assert made_with[name] == f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"


def test_dataclasses_and_a_guarded_main_work_in_own_code(folder):
    (folder / "more.py").write_text(
        "import dataclasses, sys\n@dataclasses.dataclass\nclass A:\n    b: 'int' = 3\n"
        "if __name__ == '__main__':\n    sys.exit(1)\n"
    )
    assert owncode.load("more.py:A")().b == 3
    assert owncode.load("more.py:A") is owncode.load(str(folder / "more.py") + ":A")


# Going on


def interrupted(folder, *flags):
    argv = [*QUICK, "--model", "code.py:Net", "--loss", "code.py:values", *flags]
    assert said(main, [*argv, "--out", "run", "--max-time", "1e-3"]).code == 75


def test_a_run_goes_on_from_any_directory_and_with_its_copy(folder, monkeypatch):
    done(folder / "whole", "--model", "code.py:Net", "--loss", "code.py:values")
    interrupted(folder)
    shutil.copytree("run", "other")
    away = folder / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    go_on = ["--resume", "--max-time", "1h", "--out"]
    found = said(main, [*go_on, str(folder / "run")])
    assert found.code == 0 and not found.err
    assert alike(folder / "run", folder / "whole")
    (folder / "code.py").unlink()  # its copy is in the run folder
    found = said(main, [*go_on, str(folder / "other")])
    assert found.code == 0 and not found.err
    assert alike(folder / "other", folder / "whole")
    flags = ["--samples", "8", "--batch", "4", "--n-iters", "1"]
    refused = said(sharpness.main, [str(folder / "other"), *flags])
    assert refused.code == 2 and "code.py: No such file or directory" in refused.err
    assert said(sharpness.main, [str(folder / "other"), *flags, "--trust-code"]).code == 0


def test_changed_code_is_said_and_the_earlier_stays(folder):
    interrupted(folder)
    changed = CODE.replace("relu()", "tanh()")
    (folder / "code.py").write_text(changed)
    argv = ["--resume", "--out", "run", "--max-time", "1h", "--model", "code.py:Net"]
    found = said(main, argv)
    sums = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (changed, CODE)]
    assert found.code == 0
    assert f"going on with code.py sha256 {sums[0]} instead of sha256 {sums[1]}" in found.err
    kept = {p.name: p.read_text() for p in (folder / "run" / "code").iterdir()}
    assert kept == {"code.py": changed, f"code-{sums[1]}.py": CODE}


def test_another_name_is_no_way_to_go_on(folder):
    interrupted(folder)
    argv = ["--resume", "--out", "run", "--model", "code.py:resnet"]
    assert "has --model" in refused(main, argv)


def test_the_config_of_a_run_names_the_code_where_it_lies(folder, monkeypatch):
    done(folder / "run", "--model", "code.py:Net")
    assert json.loads((folder / "run" / "config.json").read_text())["model"] == "code.py:Net"
    monkeypatch.chdir("/")
    given = read_flags(parser(), str(folder / "run" / "config.json"))
    assert given["model"] == f"{folder / 'code.py'}:Net"


# What is wrong with them

BAD = [
    ("--model absent.py:f", "absent.py: No such file or directory"),
    ("--model code.py", "'code.py' is not FILE.py:NAME"),
    ("--model syntax.py:f", "syntax.py line 2: SyntaxError: invalid syntax"),
    ("--model imports.py:f", "imports.py line 3: ModuleNotFoundError: No module named 'no_such"),
    ("--model exits.py:f", "exits.py line 3: it ends the process (SystemExit: 3)"),
    ("--model code.py:Ned", "code.py has no Ned: did you mean Net?"),
    ("--model wrong.py:value", "it is of type int, no class or function"),
    ("--model wrong.py:nothing", "it is called with the number of classes, which it does not take"),
    ("--model wrong.py:number", "it makes a value of type int, no torch.nn.Module"),
    ("--model wrong.py:breaks", "wrong.py line 28: IndexError: list index out of range"),
    ("--model wrong.py:Lazy", "whose size the first batch decides"),
    ("--model wrong.py:fixed", "it has no parameters to train"),
    ("--model wrong.py:Wide", "images [1, 3, 8, 8]: wrong.py: ValueError: its output is [1, 11]"),
    ("--model wrong.py:Tuple", "its output is of type tuple, no tensor"),
    ("--model wrong.py:Key", "wrong.py line 19: KeyError: 'absent'"),
    ("--loss focal", "--loss focal: choose from cross-entropy, bce, FILE.py:NAME"),
    ("--loss wrong.py:value", "it is of type int, no function of (logits, target)"),
    ("--loss wrong.py:detached", "what it gives has no gradient"),
    ("--loss wrong.py:item", "it gives a value of type float, no tensor"),
    ("--loss wrong.py:matrix", "it gives [4, 10] for 4 samples"),
    ("--loss wrong.py:labels_alone --mixup 0.2", "shares of the classes [4, 10]: wrong.py line"),
    ("--loss wrong.py:Learned", "it has parameters, which no optimizer would train"),
    ("--loss wrong.py:one_number --track-noise every=3", "has no reduction: give it an argument"),
    ("--loss wrong.py:total --micro-batch 8", "which --micro-batch needs"),
    ("--loss wrong.py:total --mode sampling --steps 2", "which --mode sampling needs"),
    ("--loss code.py:mean --label-smoothing 0.1", "smooth the targets there"),
    ("--optimizer wrong.py:Closure", "its step evaluates the loss again and again (a closure)"),
    ("--optimizer wrong.py:NoRate", "its constructor takes no lr"),
    ("--optimizer wrong.py:odd", "it makes a value of type int, no torch.optim.Optimizer"),
    ("--optimizer wrong.py:Counts", "it counts count outside its state"),
    ("--optimizer wrong.py:Keeps", "its state holds what no checkpoint can"),
    ("--optimizer wrong.py:Fails", "its step: wrong.py line 89: KeyError: 'absent'"),
    ("--optimizer wrong.py:absent", "wrong.py has no absent"),
    ("--optimizer torch/LBFGS", "its step evaluates the loss again and again (a closure)"),
    ("--optimizer torch/SparseAdam", "it takes sparse gradients only"),
    ("--optimizer torch/adamw", "did you mean torch/AdamW?"),
    ("--optimizer timm/adahessian", "it wants second derivatives"),
    ("--optimizer torch/Rprop --weight-decay 0.1", "torch/Rprop takes none: leave it out"),
    ("--optimizer torch/AdamW --optimizer-args beta=0.9", "did you mean betas?"),
    ("--optimizer torch/AdamW --optimizer-args eps=-1", "epsilon value: -1: it takes betas="),
    ("--optimizer torch/AdamW --optimizer-args eps", "'eps' is not NAME=VALUE"),
    ("--optimizer torch/AdamW --optimizer-args eps=1 eps=2", "gives eps more than once"),
    ("--optimizer torch/AdamW --optimizer-args lr=1", "what it is says --lr"),
    ("--optimizer torch/AdamW --beta 0.9", "is said by --optimizer-args, as in momentum=0.9"),
    ("--optimizer torch/AdamW --c2 3", "--c2 has no effect with --optimizer torch/AdamW"),
    ("--optimizer torch/AdamW --method lr-batch", "is solved for delta, which is not known of"),
    ("--optimizer torch/AdamW --graphs on", "captures the updates of our forms"),
    ("--optimizer torch/AdamW --mode sampling --bn eval", "use --bn train"),
    ("--optimizer-args eps=1", "--optimizer-args has no effect with --optimizer sgd"),
    ("--optimizer nesterov --method beta", "is solved for delta, which is not known of nesterov"),
    ("--optimizer qhm --nu 0.9@0,0.5@20up", "it changes between epochs alone"),
    ("--optimizer qhm --nu 0.9@0,0.5@7", "0.5 @7 begins at epoch 7, but the run ends after 1"),
    ("--optimizer qhm --nu 0.9@0,1.5@50%", "1.5 is out of range"),
    ("--optimizer qhm --nu 0.9@0,0.5@50% --mode critical --epochs 2", "give --nu one value"),
]  # fmt: skip


@pytest.mark.parametrize("flags, words", BAD, ids=[flags for flags, _ in BAD])
def test_what_is_wrong_is_one_line_before_anything_is_written(flags, words, folder):
    there = set(folder.iterdir())
    argv = ["--epochs", "1", *flags.split(), "--out", "run"]
    message = refused(main, argv)
    assert words in message, message
    assert len(message) < 700 and set(folder.iterdir()) == there


def test_two_files_of_one_name_are_refused(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "code.py").write_text(CODE + "\n")
    argv = ["--model", "code.py:Net", "--loss", "sub/code.py:mean", "--out", "run"]
    assert "two files of own code are called code.py" in refused(main, argv)


def test_the_errors_of_own_code_are_one_kind(folder):
    with pytest.raises(owncode.CodeError, match="it is larger than"):
        (folder / "large.py").write_bytes(b"#" * (owncode.LARGEST + 1))
        owncode.load("large.py:x")
    assert not issubclass(owncode.CodeError, ConfigError)
