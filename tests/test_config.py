"""Flags, TOML files and config.json: what they mean, what they refuse, and that a refusal is one
line."""

import dataclasses
import json
import random
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

from fastsmooth.cli.config import (
    FIELDS,
    FREE_ON_RESUME,
    RESOLVED_ONCE,
    Config,
    fitted,
    idle,
    resolve,
    shown,
)
from fastsmooth.cli.facts import SETS, TORCHVISION
from fastsmooth.cli.flags import ConfigError, flag
from fastsmooth.cli.parse import as_before, parse, parser, read_saved, resumed
from fastsmooth.runfolder.numbers import exact
from fastsmooth.schedule import METHODS

HINTS = typing.get_type_hints(Config)
ROOT = Path(__file__).parents[1]


def given(*argv):
    return parse([str(word) for word in argv]).given


def config(*argv):
    return resolve(given(*argv))


def refusal(call, *args):
    """The one line with which `call` refuses."""
    with pytest.raises(ConfigError) as refused:
        call(*args)
    message = str(refused.value)
    assert message and len(message.splitlines()) == 1, message
    return message


def kinds(name):
    """The types that a field can hold."""
    hint = HINTS[name]
    return set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}


REALS = [name for name in FIELDS if kinds(name) & {float, tuple[float, ...]}]
WHOLES = [name for name in FIELDS if kinds(name) & {int, tuple[int, ...]}]
TEXTS = [
    name
    for name in FIELDS
    if str in kinds(name) and not FIELDS[name].metadata["choices"] and name != "device"
]
SWITCHES = [name for name in FIELDS if bool in kinds(name)]


def other(name, now):
    """A value that the field takes and that is not the one it has now."""
    choices = FIELDS[name].metadata["choices"]
    for value in choices or (
        (True,)
        if bool in kinds(name)
        else ("cpu",)
        if name == "device"
        else ("9", "0.7", "x", "every=9", "updates=9", "2,9", "rho=9", "lr: 9 @0", ".")
    ):
        if value is True:
            return True
        try:
            found = parse([f"{flag(name)}={value}"]).given[name]
        except ConfigError:
            continue
        if found != now:
            return found
    raise AssertionError(f"no other value for {name}")


# Flags


def test_underscores_and_dashes_are_the_same():
    for name in FIELDS:
        if name in SWITCHES:
            assert given("--" + name) == given("--" + name.replace("_", "-")) == {name: True}
        else:
            value = other(name, None)
            word = str(value[0] if isinstance(value, tuple) else value)
            dashed = given("--" + name.replace("_", "-"), word)
            assert (
                dashed == given("--" + name, word) == given(f"--{name}={word}") == {name: value}
            ), name


def test_underscores_in_values_stay():
    assert given("--out=my_run-1", "--data_dir", "a_b") == {"out": "my_run-1", "data_dir": "a_b"}


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--decay_epoch", "7"], {"decay_epoch": 7}),
        (["--beta1", "0.5"], {"beta": 0.5}),
        (["--beta", "0.5"], {"beta": 0.5}),
        (["-b", "64"], {"batch_size": 64}),
        (["-b64"], {"batch_size": 64}),
        (["--batchsize", "64"], {"batch_size": 64}),
        (["--batch-size", "64"], {"batch_size": 64}),
        (["--batch_size=64"], {"batch_size": 64}),
        (["--eps", "0.5", "0.7", "1"], {"eps": (0.5, 0.7, 1.0)}),
        (["--steps", "100", "20"], {"steps": (100, 20)}),
        (["--lr", "1", "--lr", "2"], {"lr": 2.0}),
        ([], {}),
    ],
)
def test_a_flag_and_its_other_names_set_one_field(argv, expected):
    assert given(*argv) == expected


def test_no_flag_may_be_abbreviated():
    known = {name for action in parser()._actions for name in action.option_strings}
    tried = 0
    for name in sorted(word for word in known if word.startswith("--")):
        for end in range(3, len(name)):
            if name[:end] not in known:
                for word in (name[:end], name[:end] + "=1"):
                    message = refusal(parse, [word])
                    assert message.startswith(
                        (f"unknown flag {name[:end]}:", f"fastsmooth has no {name[:end]}:")
                    )
                tried += 1
    assert tried > 100


def test_every_flag_of_the_design_exists():
    known = {name for action in parser()._actions for name in action.option_strings}
    expected = """
        --dataset --data-dir --model --method --mode --optimizer --lr --batchsize -b --batch-size
        --beta --nu --weight-decay --epochs --decay-epoch --power --gamma --c2 --k2 --eps --steps
        --draws --bn --measure-augment --seed --device --loader --compile --graphs --precision
        --drop-last --deterministic --out --resume --checkpoint-every --log-every --max-time
        --config --plan --json --wandb-mode --wandb-entity --wandb-project --beta1 --help --version
    """
    assert known >= set(expected.split())


def test_help_names_every_flag_and_what_it_does():
    page = " ".join(parser().page("all").split())
    for name, f in FIELDS.items():
        assert re.search(rf"{flag(name)}[ ,]", page), name
        assert f.metadata["help"] and " ".join(f.metadata["help"].split()) in page, name
    for name in ("--config", "--plan", "--json", "--help", "--version", "--beta1", "-b"):
        assert name in page


def test_requests_are_told_apart_from_fields():
    request = parse(["--plan", "--json", "--lr", "0.5"])
    assert (request.given, request.plan, request.json, request.help, request.version) == (
        {"lr": 0.5},
        True,
        True,
        False,
        False,
    )
    assert parse(["-h"]).help is True and parse(["--help"]).help is True
    assert parse(["--help", "all"]).help == parse(["--help=all"]).help == "all"
    assert parse(["--version"]).version
    assert refusal(parse, ["--help", "lr"]) == "--help lr: choose from all"


def test_answers_come_before_torch_is_imported():
    code = (
        "import sys, fastsmooth.cli.config as c, fastsmooth.cli.parse as p, fastsmooth.schedule; "
        "c.resolve(p.parse(['--lr', '1']).given);"
        "p.parser().format_help(); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# Refusals of a single flag


@pytest.mark.parametrize("word", ["nan", "NaN", "inf", "-inf", "Infinity", "1e999"])
@pytest.mark.parametrize("name", REALS)
def test_nan_and_infinity_are_refused(name, word):
    assert refusal(parse, [f"{flag(name)}={word}"]).startswith(flag(name) + ": ")


def test_the_real_valued_flags_are_all_there():
    others = {
        "power",
        "gamma",
        "factor",
        "label_smoothing",
        "mixup",
        "cutmix",
        "random_erasing",
        "ema",
        "clip_norm",
        "c2",
        "k2",
        "beta",
        "nu",
        "weight_decay",
        "lr_factor",
        "lr_min",
        "eps",
        "max_time",
        "hw_decoder_load",
        "val_share",
    }
    assert set(REALS) == {"lr"} | others


@pytest.mark.parametrize("word", ["", "x", "1.5", "1e3", "nan", "0x10", str(2**63)])
@pytest.mark.parametrize("name", WHOLES)
def test_whole_numbers_are_whole(name, word):
    assert refusal(parse, [f"{flag(name)}={word}"]).startswith(flag(name) + ": ")


BOUNDS = {  # flag: (values outside, values at the edge that are allowed)
    "--lr": (["0", "-1"], ["1e-100", "1e100"]),
    "--power": (["0", "-1"], ["0.1", "8"]),
    "--gamma": (["0", "1.0001", "-0.5"], ["1", "1e-9"]),
    "--factor": (["0", "-0.5"], ["1", "1e-9", "9"]),  # by method: tests/test_growth.py
    "--lr-factor": (["0", "-0.5"], ["1", "1e-9", "9"]),
    "--lr-min": (["-0.5"], ["0", "1e-9"]),
    "--warmup": (["0", "-1", "0ep", "1.5", "5 ep", "ep", "5e", "9" * 10], ["1", "500", "5ep"]),
    "--milestones": (["0", "0%", "100%", "1.5", "60,120", "%"], ["1", "60", "99%"]),
    "--patience": (["0", "-1", "1000001"], ["1", "1000000"]),
    "--label-smoothing": (["1", "-0.1"], ["0", "0.9"]),
    "--ema": (["0", "1", "-0.1"], ["0.001", "0.9999"]),
    "--clip-norm": (["0", "-1"], ["1e-9"]),
    "--c2": (["0", "-1"], ["1e-9"]),
    "--k2": (["-1e-9"], ["0"]),
    "--beta": (["1", "-0.1", "1.5"], ["0", "0.9999"]),
    "--nu": (["-0.1", "1.1"], ["0", "1"]),
    "--weight-decay": (["-1e-9"], ["0"]),
    "--sam": (["rho=0", "rho=0.1,alpha=0", "0.1", "alpha=1"], ["rho=1e-9", "rho=0.1,alpha=0.2"]),
    "--eps": (["0", "-0.5"], ["1e-9"]),
    "--max-time": (
        ["0", "0s", "-5", "5d", "1h30m", " 5", "h", "9" * 400, "1e400h"],
        ["1", "45s", "30m", "1.5h", "0.00001"],
    ),
    "--epochs": (["0", "-1"], ["1"]),
    "--batchsize": (["0", "-1"], ["1"]),
    "--decay-epoch": (["0"], ["1"]),
    "--image-size": (["7", "1025"], ["8", "1024"]),
    "--val-share": (["0", "1", "-0.1"], ["0.1", "0.999"]),
    "--micro-batch": (["0", "-3"], ["1", "4096", "auto"]),
    "--workers": (["-1", "257"], ["0", "256"]),
    "--chunk": (["0", "65537"], ["1", "65536"]),
    "--hw-decoder-load": (["-0.1", "1.1"], ["0", "1"]),
    "--decoder-device-memory": (["-1", "65537"], ["0", "65536"]),
    "--decoder-host-memory": (["-1", "65537"], ["0", "65536"]),
    "--draws": (["1"], ["2"]),
    "--steps": (["-1"], ["0"]),
    "--min-epochs": (["-1"], ["0"]),
    "--seed": (["-1"], ["0", str(2**63 - 1)]),
    "--checkpoint-every": (["0"], ["1"]),
    "--log-every": (["0"], ["1"]),
    "--full-grad-every": (["0"], ["1"]),
    "--mixup": (["-0.1", "1e101"], ["0", "0.2", "1e100"]),
    "--cutmix": (["-0.1", "1e101"], ["0", "1", "1e100"]),
    "--random-erasing": (["-0.1", "1.1"], ["0", "0.25", "1"]),
    "--randaugment": (
        ["0,9", "10,9", "-1,9", "2,31", "2,-1", "2,9.5", "2", "2,", ",9", "2,9,1", "2;9", " ", ""],
        ["1,0", "9,30", "2,9"],
    ),
    "--device": (["gpu", "cuda:", "cuda:x", "CPU", ""], ["auto", "cpu", "mps", "cuda", "cuda:12"]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_values_out_of_range_are_refused_and_edges_are_not(name):
    outside, inside = BOUNDS[name]
    for word in outside:
        message = refusal(parse, [f"{name}={word}"])
        assert message.startswith(name + ": ") and (word.strip()[:99] in message or not word), (
            message
        )
    for word in inside:
        assert len(given(f"{name}={word}")) == 1


def test_every_number_has_its_range_tested():
    assert {flag(name) for name in REALS + WHOLES} <= set(BOUNDS)


@pytest.mark.parametrize(
    "word, seconds", [("90", 90), ("45s", 45), ("30m", 1800), ("1.5h", 5400), ("0.5m", 30)]
)
def test_times_are_read_in_seconds(word, seconds):
    assert given("--max-time", word) == {"max_time": seconds}


@pytest.mark.parametrize("value", ["", "a\nb", "a\n", "a\rb", "a\u2028b", "a\0b"])
@pytest.mark.parametrize("name", [*TEXTS, "config"])
def test_names_and_paths_that_would_break_a_line_are_refused(name, value):
    assert refusal(parse, [f"{flag(name)}={value}"]).startswith(flag(name) + ": ")


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["--methd", "lr"], "did you mean --method?"),
        (["--lerning_rate", "1"], "unknown flag --lerning-rate"),
        (["--epoch=3"], "did you mean --epochs?"),
        (["--batch", "3"], "did you mean --batchsize?"),
        (["--qqqqqqqq"], "--help lists the flags"),
        (["--method", "batchs"], "did you mean batch?"),
        (["--method", "zzzz"], "choose from constant, lr, batch"),
        (["--optimizer", "adam"], "fastsmooth calls it --optimizer torch/Adam"),
        (["--dataset", "cifar-10"], "did you mean cifar10?"),
        (["cifar10"], "unexpected 'cifar10'"),
        (["--lr"], "expected one argument"),
        (["--eps"], "expected at least one argument"),
        (["--drop-last=yes"], "--drop-last"),
        (["--bog\nus"], "unknown flag --bog"),
        (["x\ny"], "unexpected"),
        ([""], "unexpected ''"),
        (["\nx"], "unexpected '\\nx'"),
        (["--method", "a\nb"], "choose from"),
        (["--lr", "a\nb"], "is not a number"),
        (["--json"], "--json goes with --plan"),
        (["--config", "/no/such/file.toml"], "No such file"),
        (["--config", "/"], "directory"),
    ],
)
def test_a_mistyped_command_line_is_answered_with_what_was_meant(argv, hint):
    assert hint in refusal(parse, argv)


# Refusals of combinations


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--batchsize", 1438], ["--batchsize 1438", "1437", "digits"]),
        (["--dataset", "cifar100", "-b", 50_001], ["--batchsize 50001", "50000", "cifar100"]),
        (["--method", "beta"], ["--method beta", "--optimizer"]),
        (
            ["--method", "lr-beta", "--optimizer", "shb", "--beta", 0],
            ["--method lr-beta", "--beta"],
        ),
        (
            ["--mode", "critical", "--method", "lr"],
            ["--mode critical", "--method constant", "not lr"],
        ),
        (
            ["--method", "sampling", "--mode", "critical"],
            ["--method sampling", "--mode is critical"],
        ),
        (["--dataset", "imagenet", "--loader", "resident"], ["--loader"]),
        (["--augment", "resized-crop-flip"], ["--augment", "digits"]),
        (["--method", "beta", "--optimizer", "shb"], ["--c2 and --k2", "resnet8"]),
        (["--method", "lr-batch", "--optimizer", "shb", "--c2", 1], ["--c2 and --k2"]),
        (
            ["--method", "beta", "--optimizer", "nshb", "--nshb-delta", "v1", "--k2", 1],
            ["--c2 and --k2"],
        ),
        (["--method", "exp", "--power", 2], ["--power", "--method exp", "--gamma"]),
        (["--method", "poly", "--gamma", 0.5], ["--gamma", "--method poly", "--power"]),
        (["--beta", 0.5], ["--beta", "--optimizer sgd", "nshb or qhm or shb"]),
    ],
)
def test_contradictions_are_refused_in_words(argv, parts):
    message = refusal(config, *argv)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", [name for name, f in FIELDS.items() if f.metadata["only"]])
def test_a_flag_without_effect_is_refused_and_one_with_effect_is_not(name):
    needs, values = FIELDS[name].metadata["only"]
    value = other(name, None)
    choices = FIELDS[needs].metadata["choices"]
    others = (
        {}
        # with --data-dir alone the data set is recognised
        if FIELDS[needs].default not in values and name != "data_dir"
        else {needs: next(c for c in choices if c not in values)}
    )
    message = refusal(resolve, others | {name: value})
    assert message.startswith(f"{flag(name)} has no effect with {flag(needs)} ")
    assert all(str(v) in message for v in values)
    assert values <= set(choices)
    for chosen in values:
        context = {
            "method": {"optimizer": "shb", "c2": 1.0, "k2": 1.0},
            "criterion": {"mode": "critical"},
        }
        if needs == "method" and METHODS[chosen].uses == "milestones":
            context["method"] |= {"milestones": ("50%",)}
        if name == "factor":
            value = METHODS[chosen].factor
        if name == "lr_min":
            value = 0.05
        enough = context.get(needs, {}) | {needs: chosen, name: value}
        assert getattr(resolve(enough), name) == value


# What is filled in


# data set: model, epochs, lr, batch, augmentation, pixels, steps, min_epochs, decay_epoch
DEFAULTS = {
    "digits": ("resnet8", 15, 0.1, 32, "none", 8, (200,), 1, 3),
    "cifar10": ("resnet18", 200, 0.1, 32, "crop-flip", 32, (10_000,), 11, 40),
    "cifar100": ("resnet18", 200, 0.1, 32, "crop-flip-rotate", 32, (10_000,), 11, 40),
    "imagenet": ("torchvision/resnet34", 200, 0.1, 256, "resized-crop-flip", 224, (1000,), 11, 40),
    "tiny-imagenet": ("resnet18", 20, 0.1, 32, "crop-flip", 64, (200,), 1, 4),
    # what is empty their images say
    **dict.fromkeys(
        ("auto", "folder", "table", "webdataset", "parquet", "arrow"),
        ("", 20, 0.1, 32, "", 0, (200,), 1, 4),
    ),
    **dict.fromkeys(("npz", TORCHVISION), ("", 20, 0.1, 32, "crop-flip", 0, (200,), 1, 4)),
}


@pytest.mark.parametrize("dataset", SETS)
def test_each_data_set_brings_its_defaults(dataset):
    c = config("--dataset", dataset)
    found = (
        c.model,
        c.epochs,
        c.lr,
        c.batch_size,
        c.augment,
        c.image_size,
        c.steps,
        c.min_epochs,
        c.decay_epoch,
    )
    assert found == DEFAULTS[dataset]
    assert (c.method, c.optimizer, c.mode, c.beta, c.power, c.gamma) == (
        "constant",
        "sgd",
        "normal",
        0.9,
        0.9,
        0.9,
    )
    known = {"digits": 1437, "imagenet": 1_281_167, "tiny-imagenet": 100_000}
    known |= dict.fromkeys(("cifar10", "cifar100"), 50_000)
    assert c.images == known.get(dataset)


def test_no_flags_mean_digits():
    assert config() == config("--dataset", "digits")


def test_flags_override_the_defaults_of_the_data_set():
    c = config(
        "--dataset",
        "cifar100",
        "--model",
        "mobilenetv2",
        "--epochs",
        3,
        "--lr",
        2,
        "-b",
        7,
        "--augment",
        "none",
    )
    assert (c.model, c.epochs, c.lr, c.batch_size, c.augment) == ("mobilenetv2", 3, 2.0, 7, "none")


def test_large_images_in_a_folder_get_a_network_and_an_augmentation_for_them():
    large = config("--dataset", "folder", "--image-size", 128)
    assert (large.model, large.augment) == ("torchvision/resnet34", "resized-crop-flip")
    named = config(
        "--dataset", "folder", "--image-size", 128, "--model", "resnet8", "--augment", "crop-flip"
    )
    assert (named.model, named.augment) == ("resnet8", "crop-flip")
    small = config("--dataset", "folder", "--image-size", 64)
    assert (small.model, small.augment) == ("resnet18", "crop-flip")


@pytest.mark.parametrize(
    ("side", "size", "network"),
    [
        (3, 8, "resnet20"),
        (16, 16, "resnet20"),
        (28, 28, "resnet18"),
        (64, 64, "resnet18"),
        (70, 64, "resnet18"),
        (96, 96, "torchvision/resnet34"),
        (100, 96, "torchvision/resnet34"),
        (224, 224, "torchvision/resnet34"),
        (4000, 224, "torchvision/resnet34"),
    ],
)
def test_the_images_of_a_folder_say_what_no_flag_says(side, size, network):
    found = fitted(config("--dataset", "folder"), side)
    augment = "crop-flip" if size <= 64 else "resized-crop-flip"
    assert (found.image_size, found.model, found.augment) == (size, network, augment)
    model = fitted(config("--dataset", "folder", "--model", "torchvision/vgg11"), side)
    assert (model.image_size, model.model, model.augment) == (size, "torchvision/vgg11", augment)
    none = fitted(config("--dataset", "folder", "--augment", "none"), side)
    assert (none.image_size, none.model, none.augment) == (size, network, "none")
    # a network for small images gets no large ones unasked
    resnet8 = fitted(config("--dataset", "folder", "--model", "resnet8"), side)
    assert (resnet8.image_size, resnet8.augment) == (min(side, 64) if side > 8 else 8, "crop-flip")


def test_steps_of_the_schedule_are_a_fifth_of_the_epochs():
    for epochs, expected in [(200, 40), (100, 20), (5, 1), (1, 1)]:
        assert config("--epochs", epochs).decay_epoch == expected
    assert config("--method", "lr", "--epochs", 200, "--decay-epoch", 7).decay_epoch == 7


def test_sampling_is_a_mode_with_the_constant_method():
    c = config("--method", "sampling")
    assert (c.method, c.mode) == ("constant", "sampling")
    assert c == config("--mode", "sampling") == config("--method", "sampling", "--mode", "sampling")
    assert config("--method", "sampling", "--steps", 7).steps == (7,)


def test_an_update_is_measured_once():
    assert config("--mode", "sampling", "--steps", 9, 0, 5).steps == (9, 0, 5)
    assert "--steps names 5 more than once" in refusal(
        config, "--mode", "sampling", "--steps", 9, 5, 5
    )
    assert "--eps names 0.5 more than once" in refusal(
        config, "--mode", "critical", "--eps", 0.5, 1, "5e-1"
    )


def test_numbers_are_written_in_as_few_digits_as_tell_them_apart():
    rng = random.Random(0)
    assert [exact(v) for v in (0.5, 1.0, 0.1, 1e-6, 2e22, 0.5000001)] == [
        "0.5",
        "1",
        "0.1",
        "1e-06",
        "2e+22",
        "0.5000001",
    ]
    for _ in range(1000):
        value = 10 ** rng.uniform(-100, 100)
        assert float(exact(value)) == value and float(exact(float(f"{value:.4g}"))) == float(
            f"{value:.4g}"
        )


def test_momentum_is_beta_except_for_plain_sgd():
    assert config().momentum == 0
    assert [config("--optimizer", o, "--beta", 0.7).momentum for o in ("shb", "nshb", "qhm")] == [
        0.7
    ] * 3


# SPEC of the papers: measured on CIFAR-100 at lr 0.1, with beta 0.9
AS_PUBLISHED = [
    ("sgd", "resnet18", 1280.0, None),
    ("shb", "resnet18", 25.318, 1.77**2),
    ("nshb", "resnet18", 128.0, 4.5**2),
    ("sgd", "wrn-28-10", 10.0, None),
    ("shb", "wrn-28-10", 0.79, 1.66**2),
    ("nshb", "wrn-28-10", 1.0, 4.262**2),
]


@pytest.mark.parametrize("optimizer, model, c2, k2", AS_PUBLISHED)
def test_published_constants_are_those_of_their_own_setting(optimizer, model, c2, k2):
    here = ["--dataset", "cifar100", "--optimizer", optimizer, "--model", model]
    for more in (
        [],
        ["--method", "hybrid"],
        ["--batchsize", 512],
        ["--epochs", 3],
        ["--seed", 9],
        ["--lr", "1e-1"],
    ):
        c = config(*here, *more)
        assert (c.c2, c.k2, c.assumed, c.delta_unit) == (c2, k2, (), "")
    elsewhere = [
        ["--dataset", "cifar10"],
        ["--dataset", "folder"],
        ["--dataset", "imagenet"],
        ["--model", "resnet20"],
        ["--lr", 0.05],
        ["--weight-decay", 5e-4],
        ["--augment", "crop-flip"],
        ["--norm", "group"],
    ]
    if optimizer != "sgd":
        elsewhere += [["--beta", 0.99]]
    for more in elsewhere:
        c = config(*here, *more)
        assumed = ("c2", "k2") if optimizer == "shb" else ("c2",)
        assert (c.c2, c.k2, c.assumed) == (None, None, assumed), more
        assert c.delta_unit == (" (c2 = k2 = 1)" if optimizer == "shb" else " C")


def test_qhm_has_no_published_constants():
    assert config("--dataset", "cifar100", "--optimizer", "qhm").assumed == ("c2",)


def test_a_solved_method_refuses_constants_of_another_setting():
    line = ["--dataset", "cifar100", "--optimizer", "shb", "--method", "beta"]
    assert config(*line).c2 == 25.318
    message = refusal(config, *line, "--lr", 0.05)
    assert (
        "shb with resnet18 on cifar100 at lr 0.05, beta 0.9" in message
        and "--c2 and --k2" in message
    )
    assert "--weight-decay 0.1" in refusal(config, *line, "--weight-decay", 0.1)


def test_constants_that_are_given_stay():
    c = config("--dataset", "cifar100", "--optimizer", "shb", "--c2", 7, "--k2", 3)
    assert (c.c2, c.k2, c.assumed) == (7.0, 3.0, ())
    assert config("--optimizer", "shb", "--c2", 7).assumed == ("k2",)
    assert config("--optimizer", "nshb", "--c2", 7).assumed == ()  # whose default form has no K^2


PUBLISHED_LINES = [
    ["--decay-epoch", 30],
    ["--power", 0.5],
    ["--beta1", 0.9],
    ["--nu", 0.7],
    ["--eps", 0.5],
    ["--steps", 9],
]


@pytest.mark.parametrize("method", ["constant", "lr", "batch", "hybrid", "poly", "cosine", "exp"])
def test_flags_of_the_published_code_pass_under_compat_original(method):
    for flags in PUBLISHED_LINES:
        line = ["--method", method, "--epochs", 60, *flags]
        # there it was the factor, which is --gamma here
        if flags[0] == "--power" and method == "exp":
            assert "--gamma" in refusal(config, *line, "--compat", "original")
            continue
        c = config(*line, "--compat", "original")
        without = config("--method", method, "--epochs", 60, "--compat", "original")
        name = "beta" if flags[0] == "--beta1" else flags[0].strip("-").replace("-", "_")
        assert c == dataclasses.replace(without, **{name: getattr(c, name)})
        if idle(given(*line), c):
            assert "has no effect" in refusal(config, *line)
    assert "has no effect" in refusal(config, "--method", method, "--compat", "original", "--k2", 9)


def test_solved_methods_run_with_given_constants():
    c = config("--method", "beta", "--optimizer", "shb", "--c2", 1, "--k2", 2)
    assert (c.method, c.c2, c.k2) == ("beta", 1.0, 2.0)
    # without K^2 the schedule does not depend on C^2
    assert config("--method", "lr-batch").c2 is None


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().lr = 1.0


# TOML


def toml(folder, content):
    path = folder / "flags.toml"
    path.write_text(content, encoding="utf-8")
    return path


def test_a_file_is_merged_under_the_flags(tmp_path):
    path = toml(
        tmp_path,
        'dataset = "cifar10"\nlr = 0.5\nbatch-size = 64\ndecay_epoch = 3\nmethod = '
        '"lr"\ndrop_last = true\n',
    )
    alone = {
        "dataset": "cifar10", "lr": 0.5, "batch_size": 64, "decay_epoch": 3, "method": "lr",
        "drop_last": True,
    }  # fmt: skip
    assert given("--config", path) == alone
    assert given("--lr", 0.25, "--config", path, "--epochs", 9) == alone | {"lr": 0.25, "epochs": 9}
    assert given("--config", path, "-b", 8)["batch_size"] == 8
    assert config("--config", path).lr == 0.5


def test_a_file_holds_lists_switches_and_aliases(tmp_path):
    path = toml(
        tmp_path,
        'eps = [0.5, 1]\nmode = "critical"\ndeterministic = false\nbatchsize = 5\nmax_time = '
        '"1.5h"\n',
    )
    assert given("--config", path) == {
        "eps": (0.5, 1.0),
        "mode": "critical",
        "batch_size": 5,
        "max_time": 5400.0,
    }
    assert given("--config", toml(tmp_path, "beta1 = 0.5\noptimizer = 'shb'")) == {
        "beta": 0.5,
        "optimizer": "shb",
    }
    assert given("--config", toml(tmp_path, "")) == {}


@pytest.mark.parametrize(
    "content, part",
    [
        ("lr = nan", "not a finite number"),
        ("lr = inf", "not a finite number"),
        ("lr = -1", "out of range"),
        ("lr = [0.1, 0.2]", "0.2"),
        ("lr = true", "--lr"),
        ("lr = false", "--lr"),
        ("learning_rate = 0.1", "unknown flag --learning-rate"),
        ("determinstic = false", "did you mean --deterministic?"),
        ("determinstic = true", "did you mean --deterministic?"),
        ('drop_last = "yes"', "--drop-last"),
        ("epochs = 1.5", "not a whole number"),
        ("eps = []", "--eps"),
        ("[method]\nlr = 0.1", "[method] is a table"),
        ("method = 'batchs'", "did you mean batch?"),
        ("resume = true", "belongs on the command line"),
        ("plan = true", "belongs on the command line"),
        ('config = "other.toml"', "belongs on the command line"),
        ('out = "a\\nb"', "line break"),
        ("lr = ", "not TOML"),
        ("lr = 1\nlr = 2", "not TOML"),
    ],
)
def test_a_file_is_refused_with_its_name_and_the_reason(tmp_path, content, part):
    path = toml(tmp_path, content)
    message = refusal(parse, ["--config", str(path)])
    assert message.startswith(f"--config {path}: ") and part in message


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "flags.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refusal(parse, ["--config", str(path)])


def json_file(folder, content, name="flags.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["flags.json", "flags"])  # known by its name or by what it holds
def test_a_file_may_be_json(name, tmp_path):
    content = {
        "lr": 0.5,
        "eps": [0.5, 1],
        "mode": "critical",
        "drop_last": True,
        "deterministic": False,
        "k2": None,
    }
    path = json_file(tmp_path, content, name)
    assert given("--config", path) == {
        "lr": 0.5,
        "eps": (0.5, 1.0),
        "mode": "critical",
        "drop_last": True,
    }
    assert given("--config", path, "--lr", 2)["lr"] == 2


STARTED = [
    [],
    ["--method", "hybrid", "--decay-epoch", 4, "--seed", 9],
    ["--dataset", "cifar100", "--optimizer", "shb", "--method", "beta", "--beta", 0.9],
    ["--dataset", "cifar100", "--lr", 0.2, "--c2", 7],
    ["--mode", "critical", "--eps", 0.5, 1 / 3, "--out", "runs/x", "--max-time", "3h"],
    ["--dataset", "folder", "--data-dir", "flowers", "--image-size", 96, "--sync-bn"],
    ["--budget", "updates=100", "--batchsize", 64],
    ["--compat", "original", "--decay-epoch", 7],
    ["--method", "step", "--milestones", 3, "50%", "--factor", 0.2, "--warmup", "2ep"],
    ["--recipe", "weiaicunzai", "--dataset", "cifar100"],
    ["--recipe", "pytorch-cifar", "--weight-decay", "0.0", "--seed", 3],
    ["--recipe", "weiaicunzai", "--method", "lr", "--epochs", 30],
    ["--micro-batch", "auto", "--patience", 3],
]


@pytest.mark.parametrize("line", STARTED, ids=lambda line: " ".join(map(str, line)) or "nothing")
def test_the_config_of_a_run_is_a_file_of_the_flags_it_was_started_with(line, tmp_path):
    started = config(*line)
    if started.budget:  # as a run writes it, once its images are known
        started = dataclasses.replace(started, epochs=3, decay_epoch=1)
    path = save(tmp_path, started) / "config.json"
    again = config("--config", path)
    assert given("--config", path).keys() <= given(*line).keys() - {"out"}
    expected = dataclasses.replace(config(*line), out=None)
    if "--compat" in line:  # where it has no effect it is not taken along
        expected = dataclasses.replace(expected, decay_epoch=again.decay_epoch)
    assert again == expected


def test_what_was_filled_in_for_a_run_is_filled_in_anew(tmp_path):
    path = save(tmp_path, config("--dataset", "cifar100")) / "config.json"
    assert config("--config", path).c2 == 1280
    elsewhere = config("--config", path, "--lr", 0.2, "--epochs", 50)
    # published for lr 0.1 alone; a fifth of the epochs
    assert (elsewhere.c2, elsewhere.decay_epoch) == (None, 10)
    assert config("--config", path, "--budget", "epochs=9").budget == "epochs=9"


@pytest.mark.parametrize(
    "content, part",
    [
        ("{", "not JSON"),
        ('{"lr": 1', "not JSON"),
        ("[1]", "not JSON of flags"),
        ('{"lr": NaN}', "not a finite number"),
        ('{"lr": -1}', "out of range"),
        ('{"lr": {"a": 1}}', "[lr] is a table"),
        ('{"colour": 1}', "unknown flag --colour"),
        ('{"plan": true}', "belongs on the command line"),
        ('{"resume": false, "lr": 0.1}', "is damaged"),
        ("[" * 100_000, "not JSON"),
        ('{"lr": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_a_json_file_is_refused_with_its_name_and_the_reason(tmp_path, content, part):
    path = json_file(tmp_path, content)
    message = refusal(parse, ["--config", str(path)])
    assert message.startswith(f"--config {path}") and part in message


def test_a_run_finds_its_images_from_any_directory(tmp_path, monkeypatch):
    """Where they lay, should that still be; else where the flag says, from here."""
    (tmp_path / "home" / "images").mkdir(parents=True)
    (tmp_path / "away" / "images").mkdir(parents=True)
    run = save(
        tmp_path / "home" / "run",
        config("--dataset", "folder", "--data-dir", "images", "--image-size", 32),
    )
    (run / "env.json").write_text(json.dumps({"data_dir": str(tmp_path / "home" / "images")}))
    monkeypatch.chdir(tmp_path / "away")
    assert (
        read_saved(run).data_dir
        == config("--config", run / "config.json").data_dir
        == str(tmp_path / "home" / "images")
    )
    assert resumed({"resume": True, "out": str(run)}).data_dir == str(tmp_path / "home" / "images")
    assert resumed({"resume": True, "out": str(run), "data_dir": "images"}).data_dir == "images"
    for content in (
        "{}",
        "[",
        '{"data_dir": 3}',
        '{"data_dir": "/nowhere"}',
        '{"data_dir": "a\\u0000b"}',
    ):
        (run / "env.json").write_text(content)
        assert read_saved(run).data_dir == "images"


# Config.json and --resume


def save(folder, c):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(c.to_json(), indent=2, allow_nan=False), encoding="utf-8"
    )
    return folder


ODD = {  # values whose text form is easily mangled
    "digits": ["--lr", 0.1 + 0.2, "--max-time", "0.00001", "--seed", 2**63 - 1],
    "cifar10": [
        "--mode",
        "critical",
        "--eps",
        0.5,
        1 / 3,
        1e-17,
        "--drop-last",
        "--weight-decay",
        1e-100,
    ],
    "cifar100": [
        "--optimizer",
        "shb",
        "--method",
        "beta",
        "--data-dir=--odd dir=1",
        "--max-time",
        "9999999999999999999h",
    ],
    "imagenet": [
        "--method",
        "sampling",
        "--steps",
        0,
        2**63 - 1,
        "--measure-augment",
        "--save-omega",
        "--out",
        "runs/a b\u00e9",
    ],
    "folder": [
        "--optimizer",
        "qhm",
        "--nu",
        0,
        "--tracker",
        "wandb",
        "--wandb-entity",
        "[x]",
        "--lr",
        1e22,
    ],
}


@pytest.mark.parametrize("flags", [False, True])
@pytest.mark.parametrize("dataset", SETS)
def test_config_json_reads_back_as_the_same_config(dataset, flags, tmp_path):
    c = config("--dataset", dataset, *(ODD.get(dataset, ODD["folder"]) if flags else []))
    c = c if c.image_size else fitted(c, 40)  # as a run does before it saves
    assert read_saved(save(tmp_path, c)) == c
    assert set(json.loads((tmp_path / "config.json").read_text())) == set(FIELDS)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", '{"lr": NaN}', '{"lr": -1}', '{"lr": {}}', '{"lr": false}',
    '{"bogus": 1}',
     '{"bogus": false}', '{"dataset": "digits", "batch_size": 5000}', "\xff"],
)  # fmt: skip
def test_a_damaged_config_json_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    refusal(read_saved, tmp_path)


def test_a_folder_without_config_json_is_refused(tmp_path):
    assert str(tmp_path / "config.json") in refusal(read_saved, tmp_path)


RUN = [
    "--dataset",
    "cifar100",
    "--optimizer",
    "shb",
    "--method",
    "lr-beta",
    "--epochs",
    3,
    "--max-time",
    60,
]


def test_resume_goes_on_with_what_the_run_was_started_with(tmp_path):
    started = config(*RUN, "--out", tmp_path)
    save(tmp_path, started)
    again = resumed(given("--resume", "--out", tmp_path))
    assert again == dataclasses.replace(started, resume=True)
    assert resumed(given("--resume", "--out", tmp_path, *RUN)) == again


def test_resume_takes_a_moved_folder(tmp_path):
    started = config(*RUN, "--out", "elsewhere")
    assert resumed(given("--resume", "--out", save(tmp_path, started))).out == str(tmp_path)


@pytest.mark.parametrize("name", sorted(set(FIELDS) - FREE_ON_RESUME - set(RESOLVED_ONCE)))
def test_resume_refuses_a_changed_flag_with_both_values(name, tmp_path):
    started = config(*RUN, "--out", tmp_path)
    save(tmp_path, started)
    before = getattr(started, name)
    after = other(name, before)
    message = refusal(resumed, {"resume": True, "out": str(tmp_path), name: after})
    absent = before is None or before is False  # which nobody can give
    words = (
        f"was started without {flag(name)}: "
        if absent
        else f"has {flag(name)} {shown(before)}, not {shown(after)}: "
    )
    assert words in message and str(tmp_path) in message
    if before is not None:
        resumed({"resume": True, "out": str(tmp_path), name: before})


@pytest.mark.parametrize("name", RESOLVED_ONCE)
def test_resume_lets_what_auto_chose_be_named_and_nothing_else(name, tmp_path):
    asked = ["--micro-batch", "auto"] if name == "micro_batch" else []
    started = config(*RUN, *asked, "--track-noise", "every=9", "--out", tmp_path)
    assert getattr(started, name) == "auto"
    save(tmp_path, started)
    named = other(name, "auto")
    again = resumed({"resume": True, "out": str(tmp_path), name: named})
    assert again == dataclasses.replace(started, resume=True, **{name: named})
    save(tmp_path, again)
    message = refusal(resumed, {"resume": True, "out": str(tmp_path), name: "auto"})
    assert f"{flag(name)} {named}, not auto" in message


def test_what_auto_chose_before_is_chosen_again(tmp_path):
    before = {
        "device": "cuda",
        "loader": "dali",
        "compile": "on",
        "kernels": "triton",
        "estimator": "micro-batch",
        "measure": "apart",
    }
    c = config("--track-noise", "every=9", "--loader", "threads")
    again = as_before(c, before | {"torch": "2.10"}, "checkpoints")
    assert again == dataclasses.replace(c, **before | {"loader": "threads"})
    assert as_before(c, {}, "checkpoints") == c
    for name, value in (
        ("kernels", "fast"),
        ("device", "abacus"),
        ("compile", 3),
        ("estimator", None),
    ):
        assert refusal(as_before, c, {name: value}, "checkpoints").startswith(
            f"checkpoints: {flag(name)}"
        )


def test_only_places_times_and_trackers_are_free_on_resume():
    trackers = {"tracker", "wandb_mode", "wandb_project", "wandb_entity"}
    places = {"out", "resume", "max_time", "data_dir", "workers", "graphs"}
    assert places | trackers == FREE_ON_RESUME


@pytest.mark.parametrize("name", sorted(FREE_ON_RESUME - {"out", "resume"}))
def test_resume_lets_what_cannot_change_the_result_change(name, tmp_path):
    started = config(*RUN, "--out", tmp_path)
    save(tmp_path, started)
    after = other(name, getattr(started, name))
    again = resumed({"resume": True, "out": str(tmp_path), name: after})
    assert again == dataclasses.replace(started, resume=True, **{name: after})


def test_resume_shows_lists_as_they_are_typed(tmp_path):
    save(tmp_path, config("--mode", "critical", "--eps", 0.5, 0.7))
    message = refusal(resumed, given("--resume", "--out", tmp_path, "--eps", 0.5, 1))
    assert "--eps 0.5 0.7, not 0.5 1.0" in message


def test_resume_knows_sampling_by_either_name(tmp_path):
    save(tmp_path, config("--method", "sampling"))
    assert resumed(given("--resume", "--out", tmp_path, "--method", "sampling")).mode == "sampling"
    save(tmp_path, config())
    assert "--mode normal, not sampling" in refusal(
        resumed, given("--resume", "--out", tmp_path, "--method", "sampling")
    )


def test_resume_needs_a_run_folder(tmp_path):
    assert "--out" in refusal(resumed, given("--resume"))
    assert "run folder" in refusal(resumed, given("--resume", "--out", tmp_path / "nothing"))
