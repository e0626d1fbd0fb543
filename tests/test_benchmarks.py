"""The benchmarks' harness, and that the benchmarks run; no test looks at how long anything
takes."""

import copy
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import bench_kernels, bench_train, timing
from benchmarks.bench_kernels import HostCase, NoiseCase, NoiseStep, UpdateCase, UpdateStep
from benchmarks.bench_train import Case, ConvShape
from benchmarks.originals import Originals
from benchmarks.timing import Measured, Variant, Window
from fastsmooth import models
from fastsmooth.forms import FORMS
from fastsmooth.kernels import update
from fastsmooth.optim import NoisySGD
from fastsmooth.training.step import Step

ROOT = Path(__file__).resolve().parent.parent
ROW = [
    "bench",
    "case",
    "variant",
    "median_s",
    "per_s",
    "ratio",
    "ratio_to",
    "mem_ratio",
    "rounds",
    "quiet",
]
LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system does not say what a process uses"
)


def measured(*seconds, foreign=0.0, peak=None):
    loads = foreign if isinstance(foreign, list) else [foreign] * len(seconds)
    windows = [Window(s, {}, 0.0, load, peak) for s, load in zip(seconds, loads, strict=True)]
    return Measured(1.0, windows)


# Medians, quiet windows, ratios


def test_a_variants_time_is_the_median_of_its_windows():
    assert measured(5.0, 1.0, 2.0).seconds() == 2.0
    assert measured(5.0, 1.0, 2.0, 3.0).seconds() == 2.5


@pytest.mark.parametrize("seconds", [[3.0], [2.0, 1.0], [5.0, 1.0, 2.0, 4.0, 3.5, 9.0, 0.5]])
def test_percentiles_are_interpolated_as_numpy_does_it(seconds):
    for q in (0, 20, 50, 80, 100):
        assert measured(*seconds).percentile(q) == pytest.approx(np.percentile(seconds, q))


def test_windows_with_foreign_load_are_left_out_of_the_median():
    m = measured(1.0, 9.0, 1.2, 8.0, 1.1, foreign=[0.0, 0.5, 0.01, 0.06, timing.FOREIGN_LIMIT])
    assert m.seconds() == m.percentile(50) == 1.1 and m.percentile(100) == 1.2
    assert len(m.quiet) == 3 and len(m.windows) == 5
    (row,) = timing.rows("b", "c", {"a": m}, "a", 1)
    assert (row["rounds"], row["quiet"]) == (5, 3)
    assert any(
        line.startswith("  2 windows") and "left out" in line
        for line in timing.load_notes({"a": m})
    )


def test_without_a_quiet_window_all_count_and_the_report_says_so():
    m = measured(3.0, 1.0, 2.0, foreign=0.9)
    assert m.seconds() == 2.0
    (row,) = timing.rows("b", "c", {"a": m}, "a", 1)
    assert (row["rounds"], row["quiet"]) == (3, 0)
    assert "NO quiet window" in " ".join(timing.load_notes({"a": m}))


def test_where_load_cannot_be_seen_every_window_counts_and_quiet_is_null():
    m = measured(3.0, 1.0, 2.0, foreign=None)
    assert m.seconds() == 2.0
    assert timing.rows("b", "c", {"a": m}, "a", 1)[0]["quiet"] is None
    assert "cannot be seen" in " ".join(timing.load_notes({"a": m}))


def test_a_ratio_below_one_is_faster_or_smaller():
    found = {
        "base": measured(2.0, 2.0, peak=400),
        "half": measured(1.0, 1.0, peak=100),
        "slow": measured(3.0, 3.0, peak=800),
    }
    by_name = {row["variant"]: row for row in timing.rows("b", "c", found, "base", units=10)}
    assert [by_name[n]["ratio"] for n in found] == [1.0, 0.5, 1.5]
    assert [by_name[n]["mem_ratio"] for n in found] == [1.0, 0.25, 2.0]
    assert [by_name[n]["per_s"] for n in found] == [5.0, 10.0, 3.333]
    assert all(list(row) == ROW and row["ratio_to"] == "base" for row in by_name.values())


def test_memory_that_was_not_measured_is_null_and_said():
    result = timing.rows("b", "c", {"a": measured(1.0, peak=None)}, "a", 1)
    assert result[0]["mem_ratio"] is None
    assert "memory was not measured" in timing.memory_notes(result)[0]


def test_rounds_go_on_until_enough_windows_are_quiet_or_the_budget_is_spent():
    quiet, noisy = measured(1, 1, 1), measured(1, 1, 1, foreign=[0.0, 0.9, 0.0])
    assert timing.enough({"a": quiet}, rounds=3, done=3, spent=30, budget=1000)
    assert not timing.enough({"a": quiet}, rounds=4, done=3, spent=30, budget=1000)
    assert not timing.enough({"a": quiet, "b": noisy}, rounds=3, done=3, spent=30, budget=1000)
    assert timing.enough({"a": quiet, "b": noisy}, rounds=3, done=3, spent=30, budget=39)
    assert not timing.enough({"a": measured(1)}, rounds=3, done=1, spent=30, budget=1), (
        "one window has no median"
    )


# What the system says


def test_foreign_share_is_what_others_used_of_all_cores():
    assert timing.foreign_share(machine=3.0, own=2.0, wall=2.0, count=2) == 0.25
    # the counters tick at different times
    assert timing.foreign_share(machine=1.9, own=2.0, wall=2.0, count=2) == 0.0


@LINUX
def test_the_cpu_time_of_child_processes_counts_while_they_live_and_when_they_have_ended():
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    before = timing.process_cpu(os.getpid())[1]
    with subprocess.Popen(
        [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        alive = timing.process_cpu(os.getpid())[1] - before
        child.stdin.close()
    ended = timing.process_cpu(os.getpid())[1] - before
    assert 0.4 < alive < 5 and alive - 0.05 <= ended < 5


# Variants in their processes

TOYS = """
class Counting:
    '''Fails if a step of another name was ever made in its process.'''
    seen = ()

    def __init__(self, name, megabytes=0):
        Counting.seen += (name,)
        assert Counting.seen == (name,), f"{Counting.seen} share a process"
        self.megabytes, self.laps = megabytes, {"call": 0.0}

    def __call__(self):
        self.block = b"x" * (self.megabytes << 20)
        self.laps["call"] += 1.0
        print("no part of a report")


class Wrong(Counting):
    def check(self):
        raise FloatingPointError("not finite")


def broken():
    raise ValueError("no compiler")
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """A module that imports nothing, so that its variants' processes start at once."""
    (tmp_path / "toy_variants.py").write_text(TOYS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_variants", raising=False)
    yield importlib.import_module("toy_variants")
    sys.modules.pop("toy_variants")


def test_variants_live_apart_and_each_is_called_for_every_step_of_every_round(toys, capfd):
    variants = [Variant("a", toys.Counting, ("a",)), Variant("b", toys.Counting, ("b",), steps=1)]
    found = timing.measure(variants, steps=3, rounds=2, budget=0.0)
    assert list(found) == ["a", "b"]
    for m in found.values():
        assert (
            len(m.windows) == 2 and m.lap("call") == 1.0 and all(w.seconds > 0 for w in m.windows)
        )
    assert capfd.readouterr().out == ""


@LINUX
def test_peak_memory_is_that_of_the_variants_own_process(toys):
    variants = [
        Variant("small", toys.Counting, ("small",)),
        Variant("large", toys.Counting, ("large", 300)),
    ]
    found = timing.measure(variants, steps=1, rounds=1, budget=0.0)
    assert 250e6 < found["large"].peak_bytes() - found["small"].peak_bytes() < 700e6


def test_memory_on_a_gpu_is_what_the_tensors_take_there(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert timing.take_window(lambda: asked.append("step"), lead=0, steps=1).peak_bytes == 123
    assert asked == ["reset", "step"]


def test_a_variant_that_cannot_be_made_is_said_and_the_others_go_on(toys, capfd):
    said = []
    variants = [Variant("a", toys.Counting, ("a",)), Variant("broken", toys.broken)]
    found = timing.measure(variants, steps=1, rounds=1, budget=0.0, say=said.append)
    assert list(found) == ["a"] and said == ["not measured: broken: no compiler"]


def test_a_variant_whose_result_is_wrong_ends_the_benchmark(toys, capfd):
    with pytest.raises(timing.VariantError, match="wrong: not finite"):
        timing.measure([Variant("wrong", toys.Wrong, ("wrong",))], steps=1, rounds=1)


# The report


def test_a_results_file_begins_with_machine_versions_commit_and_command(tmp_path, capsys):
    out = tmp_path / "new" / "results.jsonl"
    report = timing.Report("bench_train", ["--json", "--out", "results.jsonl"], True, out)
    result = timing.rows("bench_train", "c", {"a": measured(1.0)}, "a", 1)
    report.say("words")
    report.add("c", result, {"gflop": 1.0})
    first, *rest = map(json.loads, out.read_text().splitlines())
    assert first["command"] == "python -m benchmarks.bench_train --json --out results.jsonl"
    assert {"commit", "machine", "versions"} <= set(first) and first["versions"][
        "torch"
    ] == torch.__version__
    assert str(ROOT) not in out.read_text() and sys.executable not in out.read_text()
    assert rest == result and first["about"]["c"] == {"gflop": 1.0}
    printed = capsys.readouterr()
    assert [
        json.loads(line) for line in printed.out.splitlines()
    ] == result and "words" in printed.err


def test_nothing_is_reported_while_the_tests_are_red(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_red.py").write_text("def test_it():\n    assert 1 == 2\n")
    (tmp_path / "tests" / "test_green.py").write_text("def test_it():\n    pass\n")
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    said = []
    timing.require_green(["test_green.py", "test_absent.py"], said.append)
    assert said[0] == "tests that are not there: test_absent.py" and said[1].startswith(
        "tests that are green: test_green.py"
    )
    with pytest.raises(timing.RedTests, match="assert 1 == 2"):
        timing.require_green(["test_green.py", "test_red.py"], said.append)


# Bench_train


@pytest.mark.parametrize(
    "case", [*bench_train.CASES, *bench_train.QUICK], ids=lambda case: case.name
)
def test_the_flop_of_the_convolutions_and_the_head_are_those_that_torch_counts(case):
    features = models.build(case.model, bench_train.CLASSES).head.in_features
    # gradients: one of the weights, one of the input
    head = 2 * 2 * case.batch_size * features * bench_train.CLASSES
    head += 2 * case.batch_size * features * bench_train.CLASSES
    layers = bench_train.convolutions(case.model)
    assert sum(
        shape.flop(case.batch_size) * n for shape, n in layers.items()
    ) + head == bench_train.step_flop(case)


def test_a_networks_convolutions_are_found_with_what_they_are_called_with():
    layers = bench_train.convolutions("resnet8")
    assert layers[ConvShape(3, 16, 3, 1, 32, False)] == 1
    assert layers[ConvShape(16, 16, 3, 1, 32, True)] == 2
    assert layers[ConvShape(16, 32, 1, 2, 32, True)] == 1
    assert sum(layers.values()) == 9


def test_both_loops_make_the_same_updates():
    torch.manual_seed(0)
    # in float32 the rounding of two memory orders may flip a ReLU
    theirs = models.build("resnet8", 100).double()
    ours = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    batches = [
        (torch.randn(16, 3, 32, 32).double(), torch.randint(0, 100, (16,))) for _ in range(2)
    ]
    loop = Originals(theirs, np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.int64), 16, lr=0.1)
    loop.loader = batches
    step = Step(ours, NoisySGD(ours.parameters(), "sgd", 0.1), torch.device("cpu"), "fp32", False)
    losses = []
    for x, y in batches:
        loop()
        losses.append(step.gradient(x, y)[0].item())
        step.update()
    assert loop.train_loss == pytest.approx(sum(losses), rel=1e-6)
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-6)  # logits are float32 in the loss


def test_the_originals_augment_real_images_as_their_description_says():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    loop = Originals(models.build("resnet8", 100), pixels, np.arange(6), 4, lr=0.1)
    names = [type(t).__name__ for t in loop.loader.dataset.transform.transforms]
    assert names == [
        "RandomCrop",
        "RandomHorizontalFlip",
        "RandomRotation",
        "ToTensor",
        "Normalize",
    ]
    x, y = loop.loader.dataset[5]
    assert x.shape == (3, 32, 32) and y == 5 and loop.loader.num_workers == 2


def test_the_images_of_a_folder_are_repeated_in_turn(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 1)):
        for label in range(100):
            (tmp_path / split / f"class{label:02}").mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(tmp_path / split / f"class{label:02}" / f"{i}.png")
    report = timing.Report("bench_train", [], False, None)
    split = bench_train.load_images(bench_train.write_images(tmp_path, 500, str(tmp_path), report))
    assert split.pixels.shape == (500, 32, 32, 3) and (np.bincount(split.labels[:200]) == 2).all()
    assert (split.pixels[200:400] == split.pixels[:200]).all() and (
        split.labels[400:] == split.labels[:100]
    ).all()
    assert report.header["about"]["images"] == "500 training images: the 200 of --data-dir in turn"


@pytest.mark.full
def test_the_quick_run_reports_every_variant_in_well_formed_json(tmp_path):
    out = tmp_path / "quick.jsonl"
    command = [
        "-m",
        "benchmarks.bench_train",
        "--quick",
        "--variants",
        "ours",
        "--json",
        "--out",
        str(out),
    ]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["variant"] for row in result] == ["originals", "ours"]
    for row in result:
        assert list(row) == ROW
        assert (row["bench"], row["case"], row["ratio_to"]) == (
            "bench_train",
            "train/resnet8/b8",
            "originals",
        )
        assert row["rounds"] >= 2 and row["median_s"] > 0
        assert row["per_s"] == pytest.approx(8 / row["median_s"], rel=1e-2)
    assert result[0]["ratio"] == 1.0
    header, *kept = map(json.loads, out.read_text().splitlines())
    assert kept == result
    about = header["about"]["train/resnet8/b8"]
    assert about["gflop_a_step"] == pytest.approx(
        bench_train.step_flop(Case("resnet8", 8, 1, 1, 1, 1.0)) / 1e9, rel=1e-3
    )
    for variant in about["variants"].values():
        assert sum(variant["shares"].values()) == pytest.approx(1, abs=2e-3)
    assert "convolutions alone" in done.stderr


def test_a_folder_that_is_no_data_set_is_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_train",
        "--quick",
        "--data-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("bench_train: ") and "Traceback" not in done.stderr


# Bench_kernels

TINY_UPDATES = [UpdateCase("resnet8", form) for form, row in FORMS.items() if row.bounds]
TINY_NOISE = NoiseCase(5, 1000, steps=1)


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiled variants run as they are written: that torch.compile keeps their meaning is checked
    in each benchmark."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def made(case, device="cpu"):
    return {v.name: v.make(*v.args) for v in case.variants(device)}


def test_the_cases_are_those_that_are_documented():
    updates = [f"update/resnet18/{form}" for form in ("sgd", "shb", "nshb", "qhm")]
    assert [case.name for case in bench_kernels.CASES] == ["host/resnet18", *updates] + [
        f"persample_noise/B{n}" for n in (2, 8, 32, 128)
    ]
    everything = ["ours", "loop", "foreach", "fused", "compiled", "compiled_norms"]
    for case in bench_kernels.CASES:
        names = [variant.name for variant in case.variants("cpu")]
        if isinstance(case, HostCase):
            assert names == ["ours", "ours_unlaunched", "fused", "foreach"]
            assert case.ratio_to == "fused" and len(bench_kernels.shapes_of(case.model)) == 62
        elif isinstance(case, NoiseCase):
            assert (
                names == ["ours", "eager", "eager_float32", "compiled"] and case.ratio_to == "eager"
            )
            assert case.parameters % 16 == 0 and 4 * case.rows * case.parameters < 1.5e9
        elif case.form in ("sgd", "shb"):
            assert names == everything and case.ratio_to == "foreach" and len(case.shapes) == 62
        else:
            assert (
                names == [n for n in everything if n not in ("foreach", "fused")]
                and case.ratio_to == "loop"
            )
        # as it travels to its process
        assert pickle.loads(pickle.dumps(case.variants("cpu")))[0].args[0] == case


def test_the_host_takes_every_step_but_for_the_one_whose_launch_is_left_out(monkeypatch):
    for name in update.IMPLEMENTATIONS:  # the variant writes there, in a process of its own
        monkeypatch.setitem(update.IMPLEMENTATIONS, name, update.IMPLEMENTATIONS[name])
    threads = torch.get_num_threads()
    try:
        variants = HostCase("resnet8").variants("cpu")
        for variant in (*variants[:1], *variants[2:], variants[1]):
            step = variant.make(*variant.args)
            for _ in range(5):
                step()
            step.check()
            assert step.launched == (variant.name != "ours_unlaunched")
            assert all((p != 1).all() == step.launched for p in step.params)
            step.steps += 1
            if step.launched:
                with pytest.raises(FloatingPointError, match="after 6 steps of shb"):
                    step.check()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", [*TINY_UPDATES, TINY_NOISE], ids=lambda case: case.name)
def test_the_least_bytes_are_those_of_the_tensors_that_are_read_and_written(case):
    if isinstance(case, NoiseCase):
        s = NoiseStep(case, "eager", "cpu")
        read, changed = [s.G], [s.p, s.m]
    else:
        s = UpdateStep(case, "loop", "cpu")
        read, changed = s.grads, [*s.params, *s.buffers]
    moved = sum(t.nbytes for t in read) + 2 * sum(t.nbytes for t in changed)
    assert case.parameters * case.bytes_a_parameter == moved


@pytest.mark.parametrize("case", TINY_UPDATES, ids=lambda case: case.name)
def test_every_variant_of_an_update_computes_the_same(case, uncompiled):
    steps = made(case)
    for name, step in steps.items():
        before = [p.clone() for p in step.params]
        for _ in range(7):
            step()
        step.check()
        assert (step.found is not None) == (name in ("ours", "compiled_norms")), (
            "both norms, and no others"
        )
        for p, start, expected in zip(step.params, before, steps["ours"].params, strict=True):
            assert not torch.equal(p, start)
            torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-5)


def test_every_variant_of_the_noise_computes_the_same(uncompiled):
    steps = made(TINY_NOISE)
    for step in steps.values():
        for _ in range(7):
            step()
        step.check()
        for found, expected in zip(step.found, steps["ours"].found, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(step.p, steps["ours"].p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [*TINY_UPDATES, TINY_NOISE], ids=lambda case: case.name)
def test_a_variant_that_computes_something_else_is_no_result(case, uncompiled, monkeypatch):
    step = made(case)["ours"]
    step()
    step.check()
    p = step.p if case is TINY_NOISE else step.params[3]
    p.view(-1)[-1] += 1e-4
    with pytest.raises(FloatingPointError, match=f"after 1 steps of {case.form}"):
        step.check()
    p.view(-1)[-1] = float("nan")
    with pytest.raises(FloatingPointError):
        step.check()


@pytest.mark.parametrize(
    "case, number", [(TINY_UPDATES[3], 1), (TINY_NOISE, 0), (TINY_NOISE, 1), (TINY_NOISE, 2)]
)
def test_a_variant_with_a_wrong_norm_is_no_result(case, number):
    step = made(case)["ours"]
    step()
    step.check()
    values = step.found if case is not TINY_NOISE else step.found[number]
    values[-1] *= 1.001
    with pytest.raises(FloatingPointError, match=r"relative error of 0\.001"):
        step.check()


@pytest.mark.full
def test_the_quick_run_of_the_kernels_reports_bytes_and_bandwidth_in_well_formed_json(
    tmp_path, capfd
):
    out = tmp_path / "quick.jsonl"
    flags = ["--quick", "--device", "cpu", "--variants", "ours", "--json", "--out", str(out)]
    assert bench_kernels.main(flags) == 0
    printed = capfd.readouterr()
    result = [json.loads(line) for line in printed.out.splitlines()]
    update, noise = "update/resnet8/shb", "persample_noise/B4"
    assert [(row["case"], row["variant"], row["ratio_to"]) for row in result] == [
        (update, "ours", "foreach"),
        (update, "foreach", "foreach"),
        (noise, "ours", "eager"),
        (noise, "eager", "eager"),
    ]
    header, *kept = map(json.loads, out.read_text().splitlines())
    assert kept == result and header["about"]["device"] == "cpu"
    size = {
        update: 20 * sum(p.numel() for p in models.build("resnet8", 100).parameters()),
        noise: (4 * 4 + 16) * 10_000,
    }
    for row in result:
        assert (
            list(row) == [*ROW, "p20_s", "p50_s", "p80_s", "gb_s"]
            and row["bench"] == "bench_kernels"
        )
        assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"] and row["p50_s"] == row["median_s"]
        about = header["about"][row["case"]]
        assert (
            about["bytes"] == size[row["case"]] == about["bytes_a_parameter"] * about["parameters"]
        )
        assert row["gb_s"] == pytest.approx(about["bytes"] / row["median_s"] / 1e9, rel=1e-2)
        assert row["per_s"] == pytest.approx(about["parameters"] / row["median_s"], rel=1e-2)
        for part in ("copy", "in_place"):
            share = about["variants"][row["variant"]][f"of_{part}"]
            assert share == pytest.approx(row["gb_s"] / about[f"{part}_gb_s"], rel=1e-2)
    assert "of copy bandwidth" in printed.err and "20 a parameter" in printed.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_kernels.main(["--device", "cuda"])
    assert "no GPU that PyTorch can use" in capsys.readouterr().err


# The scripts for GPUs


def gpu_script(name, folder, nvidia_smi, *flags, **environment):
    """Run the script with an nvidia-smi of ours; its results would go to folder/out."""
    (folder / "bin").mkdir()
    (folder / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    (folder / "bin" / "nvidia-smi").chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment |= {"PATH": path, "OUT": str(folder / "out")}
    command = ["bash", f"benchmarks/{name}", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def python_that(folder, does):
    """An interpreter that has everything, says what it is given, and does so."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n[ $1 = -c ] && exit\necho ran $*\n{does}\n")
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize("name", ["gpu_check.sh", "gpu_runs.sh"])
def test_the_gpu_check_without_a_gpu_says_so_and_runs_nothing(name, tmp_path):
    done = gpu_script(name, tmp_path, "echo No devices were found; exit 6")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_gpu_scripts_run_the_cells_that_are_named_and_end_as_they_do(code, tmp_path):
    python = python_that(tmp_path, f"exit {code}")
    for name, runs in (("gpu_check.sh", ""), ("gpu_runs.sh", "--runs ")):
        folder = tmp_path / name
        folder.mkdir()
        done = gpu_script(name, folder, "echo GPU 0: none", "a", "b", PYTHON=python, DATA="i mages")
        assert done.returncode == code
        out = folder / "out"
        ran = f"ran -m benchmarks.gpu_cells {runs}a b --out {out} --data {ROOT}/i mages"
        assert done.stdout.splitlines() == [ran]


def test_a_file_of_the_gpus_tests_that_fails_stops_no_other(tmp_path):
    python = python_that(tmp_path, "case $* in *test_kernels*) exit 3 ;; esac")
    done = gpu_script("gpu_check.sh", tmp_path, "echo GPU 0: none", "--tests", PYTHON=python)
    assert done.returncode == 1 and "tests_kernels: failed with code 3" in done.stdout
    assert "gpu_cells" not in done.stdout
    (log,) = (tmp_path / "out").glob("*_gpu_tests.log")
    for file in (
        "test_kernels.py",
        "test_kernels_augment.py",
        "test_aot.py",
        "test_optim.py",
        "test_gpu.py",
    ):
        assert file in log.read_text()
    assert log.read_text().count(": passed") == 3


def test_the_gpus_tests_come_after_the_cells_that_are_named(tmp_path):
    python = python_that(tmp_path, "case $* in *gpu_cells*) exit 1 ;; esac")
    flags = ["step", "--tests"]
    done = gpu_script("gpu_check.sh", tmp_path, "echo GPU 0: none", *flags, PYTHON=python)
    assert done.returncode == 1 and "ran -m benchmarks.gpu_cells step --out" in done.stdout
    assert done.stdout.count(": passed") == 4
