"""The benchmark of gradient noise: its variants find the same norms, and its floor is what a hand
counts."""

import json
import pickle
import sys

import pytest
import torch
from torch.nn import functional as F

from benchmarks import bench_noise, bench_train, timing
from benchmarks.bench_noise import FullCase, NormCase, NormStep
from benchmarks.timing import Measured, Variant, Window

TINY = [NormCase("resnet8", norm, 3, steps=1, rounds=2, budget=0.0) for norm in ("group", "batch")]
PEERS = {"opacus": "opacus", "opacus_ghost": "opacus", "backpack": "backpack"}
# by the libraries themselves
NOT_COVERED = {("opacus", "batch"), ("opacus_ghost", "batch"), ("backpack", "group")}


@pytest.fixture(scope="module")
def exact():
    return {
        (c, dtype): bench_noise.one_by_one(c, dtype, 3)
        for c in TINY
        for dtype in (torch.float32, torch.float64)
    }


def made(case, variant, exact, dtype=torch.float64):
    if variant in PEERS:
        pytest.importorskip(PEERS[variant])
    return NormStep(case, variant, exact[case, dtype], dtype)


# The cases


def test_the_cases_are_those_that_are_documented(monkeypatch):
    monkeypatch.setattr(bench_noise, "one_by_one", lambda *given: None)
    everything = [
        "plain",
        "ours",
        "ours_inner",
        "opacus",
        "opacus_ghost",
        "backpack",
        "vmap",
        "loop",
    ]
    fulls = ["ours", "ours_compiled", "originals", "originals_eval"]
    assert {
        case.name: [v.name for v in case.variants({*everything, *fulls})]
        for case in bench_noise.CASES
    } == {
        "persample/resnet18/group/b32": everything,
        "persample/resnet18/batch/b32": everything,
        "persample/resnet20/group/b32": everything,
        "persample/resnet20/batch/b32": everything,
        "persample/resnet18/group/b128": ["plain", "ours", "ours_inner"],
        "persample/vit_tiny_patch16_224/timm/b32": [n for n in everything if n != "backpack"],
        "persample/convnext_atto/timm/b32": ["plain", "ours", "ours_inner", "vmap", "loop"],
        "fullgrad/resnet20": fulls,
    }
    for case in bench_noise.CASES:
        variants = case.variants({*everything, "originals"})
        assert case.ratio_to in [v.name for v in variants]
        # as it travels to its process
        assert pickle.loads(pickle.dumps(variants))[0].args[0] == case


# What the variants find


@pytest.mark.parametrize("variant", bench_noise.NORMS)
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.norm)
def test_every_variant_finds_the_norms_of_one_backward_pass_a_sample_and_makes_the_same_steps(
    case, variant, exact
):
    if (variant, case.norm) in NOT_COVERED:
        with pytest.raises(NotImplementedError):
            made(case, variant, exact)()
        return
    step, base = made(case, variant, exact), made(case, "plain", exact)
    for _ in range(3):
        step()
        base()
    step.check()
    expected = {"grad_square"} | {"plain": set(), "ours_inner": {"squares", "noise"}}.get(
        variant, {"squares"}
    )
    assert set(step.first) == expected and step.error() < 1e-10
    for p, q in zip(step.params, base.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


VIT = NormCase(
    "vit_tiny_patch16_224", "timm", 3, 1, size=32, options=(("img_size", 32), ("depth", 1))
)


@pytest.mark.parametrize("variant", bench_noise.TIMM)
def test_variants_find_the_norms_of_a_network_with_tokens_or_say_that_they_cannot(variant):
    pytest.importorskip("timm")
    if variant in PEERS:
        pytest.importorskip(PEERS[variant])
    step = NormStep(VIT, variant, bench_noise.one_by_one(VIT, torch.float64, 3), torch.float64)
    step()
    step.check()
    assert step.error() < 1e-10


def test_the_floor_of_a_linear_layer_over_tokens_is_what_a_hand_counts():
    pytest.importorskip("timm")
    layers = {layer["layer"]: layer for layer in bench_noise.floor(VIT)["layers"]}
    stem, mix = layers["patch_embed.proj"], layers["blocks.0.mlp.fc1"]
    assert stem["step_flop"] == 3 * 2 * 2 * (2 * 2 * 192 * 3 * 16 * 16)
    assert mix["step_flop"] == 3 * 3 * 2 * (5 * 192 * 768)  # four patches and the class token
    assert mix["values"] == 3 * (192 * 768 + 768)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.norm)
def test_the_network_treats_samples_apart_and_begins_normalised(case):
    model, x, _ = bench_noise.model_and_batch(case, torch.contiguous_format, torch.float32, 3)
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-5)
    found = []
    model.norm.register_forward_hook(lambda module, inputs, output: found.append(output.detach()))
    model(x)
    assert abs(found[0].mean()) < 1e-4 and found[0].std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("factor", [1 + 1e-7, float("nan")])
def test_a_variant_that_finds_something_else_is_no_result(factor, exact):
    step = made(TINY[0], "ours_inner", exact)
    step()
    step.check()
    for name in ("squares", "noise"):
        kept = step.first[name].clone()
        step.first[name][1] *= factor
        with pytest.raises(FloatingPointError, match="a relative error of"):
            step.check()
        step.first[name] = kept
    step.params[0].data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        step.check()


def test_a_variant_that_is_wrong_ends_the_benchmark_before_anything_is_measured(
    monkeypatch, capsys
):
    def wrong(s):
        gradient = bench_noise.loop(s)
        return lambda: {"squares": gradient()["squares"] * (1 + 1e-6)}

    monkeypatch.setitem(bench_noise.NORMS, "vmap", wrong)
    monkeypatch.setattr(
        bench_noise, "apart", lambda function, variants: [function(v) for v in variants]
    )
    monkeypatch.setattr(bench_noise, "QUICK", TINY[:1])
    assert bench_noise.main(["--quick", "--variants", "vmap"]) == 1
    assert (
        capsys.readouterr().err
        == "bench_noise: vmap is wrong: a relative error of 1e-06 in float64\n"
    )


# The full gradient


def test_our_full_gradient_is_that_of_the_mean_loss_over_all_images():
    case = FullCase("resnet8", images=130)  # more than a chunk
    ours = bench_noise.OursFullGradient(case, compile="off")
    try:
        ours()
        ours.check()
        split, model = bench_noise.random_images(130), ours.run.model.eval()
        mean, std = (
            torch.tensor(v).view(3, 1, 1)
            for v in (bench_train.CIFAR100_MEAN, bench_train.CIFAR100_STD)
        )
        x = (torch.from_numpy(split.pixels).permute(0, 3, 1, 2) / 255 - mean) / std
        loss = F.cross_entropy(model(x), torch.from_numpy(split.labels))
        for found, g in zip(
            ours.found, torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(found.float(), g, rtol=1e-3, atol=1e-5)
    finally:
        ours.close()


@pytest.mark.parametrize("training", [True, False])
def test_the_originals_have_the_same_images_and_network_mode(training):
    originals = bench_noise.Originals(FullCase("resnet8", images=40), training=training)
    assert len(originals.loader.dataset) == 40 and originals.loader.batch_size == 1000
    assert originals.net.training == training
    if sys.platform == "linux":
        assert originals.loader.multiprocessing_context.get_start_method() == "fork"


# On a GPU


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        bench_noise.main(["--device", "cuda"])
    assert "no GPU that PyTorch can use" in capsys.readouterr().err


def test_on_a_gpu_the_cases_persample_have_longer_windows_there(monkeypatch):
    measured = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "header", lambda *given: {"about": {}})
    monkeypatch.setattr(bench_noise, "bench", lambda case, names, report: measured.append(case))
    assert bench_noise.main(["--device", "cuda"]) == 0
    cases = [case for case in bench_noise.CASES if isinstance(case, NormCase)]
    assert [(c.name, c.steps) for c in measured] == [(c.name, 10 * c.steps) for c in cases]
    assert {c.device for c in measured} == {"cuda"} and {c.device for c in cases} == {"cpu"}


# What a step holds, and the least that it must compute


class Holding:
    """Holds 4 MB, and 8 MB more in the middle of a step; making it took 64 MB for a while."""

    def __init__(self):
        torch.ones(16 << 20)
        self.kept = torch.ones(1 << 20)

    def __call__(self):
        torch.ones(2 << 20).mul_(2)


def test_allocations_are_those_at_the_peak_of_a_step():
    between, peak = bench_noise.allocated_bytes(Variant("holding", Holding))
    assert between == pytest.approx(4 << 20, rel=1e-3) and peak == pytest.approx(12 << 20, rel=1e-3)


def test_the_floor_is_what_a_hand_counts():
    found = bench_noise.floor(NormCase("resnet8", "group", 32, steps=1))
    layers = {layer["layer"]: layer for layer in found["layers"]}
    stem, conv, head = layers["stem"], layers["stages.1.0.conv1"], layers["head"]
    # images need no gradient: forward pass and weight gradient alone
    assert (
        stem["step_flop"] == 32 * 2 * 2 * (32 * 32 * 16 * 3 * 3 * 3)
        and stem["values"] == 32 * 16 * 3 * 3 * 3
    )
    assert (
        conv["step_flop"] == 32 * 3 * 2 * (16 * 16 * 32 * 16 * 3 * 3)
        and conv["values"] == 32 * 32 * 16 * 3 * 3
    )
    assert head["step_flop"] == 32 * 3 * 2 * 64 * 100 and head["values"] == 32 * (64 * 100 + 100)
    step = found["all"]["step_flop"]
    assert step == bench_train.step_flop(bench_train.Case("resnet8", 32, 1, 1, 1, 1.0))
    assert conv["norms_percent"] == pytest.approx(100 * 2 * conv["values"] / step, rel=1e-3)
    assert conv["noise_percent"] == pytest.approx(100 * 5 * conv["values"] / step, rel=1e-3)
    for key in ("norms_percent", "noise_percent"):
        assert found["all"][key] == pytest.approx(
            sum(layer[key] for layer in found["layers"]), rel=1e-2
        )


# The report


def test_the_report_says_what_each_variant_holds_and_why_one_is_missing(monkeypatch, capsys):
    def measure(variants, steps, rounds, lead, budget, say):
        say("not measured: vmap: no reason")
        return {
            v.name: Measured(0.5, [Window(0.1 * (i + 1), foreign=0.0)] * 2)
            for i, v in enumerate(variants[:2])
        }

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(
        bench_noise,
        "apart",
        lambda function, variants: [
            0.0 if function is bench_noise.error_or_reason else (1e6, 5e6) for _ in variants
        ],
    )
    monkeypatch.setattr(bench_noise, "QUICK", TINY[:1])
    assert bench_noise.main(["--quick", "--variants", "ours", "vmap"]) == 0
    printed = capsys.readouterr().out
    assert "not measured: vmap: no reason" in printed and "plain 0, ours 0" in printed
    assert "images: plain 4 MB (1.00), ours 4 MB (1.00)" in printed
    assert "% more for the norms" in printed


@pytest.mark.full
def test_the_quick_run_writes_well_formed_json(tmp_path, capfd, monkeypatch):
    # the originals' workers take seconds
    monkeypatch.setattr(bench_noise, "QUICK", bench_noise.QUICK[:1])
    out = tmp_path / "quick.jsonl"
    assert bench_noise.main(["--quick", "--variants", "ours", "--json", "--out", str(out)]) == 0
    result = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    case = "persample/resnet8/group/b4"
    assert [(row["case"], row["variant"], row["ratio_to"]) for row in result] == [
        (case, "plain", "plain"),
        (case, "ours", "plain"),
    ]
    header, *kept = map(json.loads, out.read_text().splitlines())
    about = header["about"][case]
    assert (
        kept == result
        and about["not_measured"] == []
        and set(header["about"]["peers"]) == set(bench_noise.PEERS)
    )
    assert result[0]["ratio"] == result[0]["alloc_ratio"] == 1.0
    for row in result:
        variant = about["variants"][row["variant"]]
        assert row["rounds"] == 2 and row["median_s"] > 0 and variant["float64_error"] < 1e-8
        assert variant["alloc_mb"] == pytest.approx(
            row["alloc_ratio"] * about["variants"]["plain"]["alloc_mb"], rel=1e-2
        )
    assert about["floor"]["all"]["noise_percent"] > about["floor"]["all"]["norms_percent"] > 0
