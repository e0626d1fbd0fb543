"""The benchmark of the loaders: each variant serves every image, in the size asked for, and the
report adds up."""

import gc
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import transforms

from benchmarks import bench_loader, bench_train, forms, timing
from benchmarks.bench_loader import Change, Images, ResizeCase, Serve, ServeCase
from benchmarks.timing import Measured, Window
from fastsmooth.data.engines import dali
from tests.test_benchmarks import ROW

OURS = {"cifar": ("resident", "dali", "threads", "torch"), "imagenet": ("dali", "threads", "torch")}
FORMS = ("tar", "parquet", "arrow", "prepared")
PEERS = ("webdataset", "datasets")
BOTH = [(name, variant) for name, ours in OURS.items() for variant in ("originals", *ours)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """70 images of random pixels, and 16 JPEG files that are listed four times."""
    scratch, report = (
        tmp_path_factory.mktemp("pictures"),
        timing.Report("bench_loader", [], True, None),
    )
    pixels = bench_train.write_images(scratch, 70, None, report)
    files = bench_loader.find_files(scratch, None, True, report)
    return {"cifar": Images(pixels, str(scratch)), "imagenet": files}


@pytest.fixture
def opened(pictures):
    """Opens a variant, and closes it after the test."""
    sources = []

    def open_source(name, variant):
        if variant == "dali" and not dali.available():
            pytest.skip("NVIDIA DALI is not installed")
        sources.append(bench_loader.open_source(variant, pictures[name], name))
        return sources[-1]

    yield open_source
    while sources:
        sources.pop().close()
    gc.collect()  # here, and not in a process of the next variant's: a pipeline of DALI ends that


# The cases


def test_the_cases_are_those_that_are_documented():
    found = {
        case.name: [v.name for v in case.variants(OURS["cifar"], Images("", ""))]
        for case in bench_loader.CASES
        if case.set != "forms"
    }
    serving = {f"cifar/b{batch}": list(OURS["cifar"]) for batch in (32, 128, 1024)}
    serving["imagenet/b64"] = list(OURS["imagenet"])
    assert found == serving | {f"resize/{name}": list(ours) for name, ours in OURS.items()}
    for key in (*bench_loader.FASTER, *bench_loader.LESS_CPU):
        assert key[1] in found[key[0]]
    (case,) = (case for case in bench_loader.CASES if case.set == "forms")
    names = [v.name for v in case.variants({*FORMS, *PEERS, "threads"}, Images("", ""))]
    assert names == ["threads", *FORMS, *PEERS] and case.name == "forms/b64"
    for case in bench_loader.CASES:
        variants = case.variants({"originals"}, Images("path", "cache"))
        # as it travels to its process
        assert [v.name for v in pickle.loads(pickle.dumps(variants))] == ["originals"]


# What the variants serve


@pytest.mark.parametrize("name, variant", BOTH)
def test_every_variant_serves_each_image_once_an_epoch_and_takes_a_new_size_at_once(
    name, variant, opened, pictures
):
    source = opened(name, variant)
    count = 70 if name == "cifar" else 64
    source.resize(6)
    batches = [source() for _ in range(-(-count // 6))]
    assert [len(y) for _, y in batches] == [6] * (count // 6) + [count % 6]
    labels = torch.cat([y for _, y in batches])
    wanted = (
        bench_train.load_images(pictures[name].path).labels
        if name == "cifar"
        else np.arange(64) % 8
    )
    assert sorted(labels.tolist()) == sorted(wanted.tolist())
    for batch in (*batches[:1], source()):  # the second of the next epoch
        assert len(batch[1]) == 6
        bench_loader.check(batch, name)
    source.end_epoch()
    source.resize(9)
    assert len(source()[1]) == 9


@pytest.fixture(scope="module")
def written(pictures):
    """The JPEG files in other forms, as often as they are listed."""
    if not forms.available():
        pytest.skip("pyarrow, datasets and webdataset are not installed")
    images = pictures["imagenet"]
    sizes = forms.write(Path(images.path), Path(images.cache, "forms"), images.copies)
    assert sizes.keys() == set(FORMS) and sizes["prepared"] <= sizes["tar"]
    return pictures | {"forms": images}


@pytest.mark.parametrize("variant", [*FORMS, *PEERS])
def test_every_form_serves_each_image_once_an_epoch(variant, written):
    source = bench_loader.open_source(variant, written["forms"], "forms")
    source.resize(16)
    batches = [source() for _ in range(5)]
    for batch in batches:
        bench_loader.check(batch, "forms")
    labels = torch.cat([y for _, y in batches[:4]]).tolist()
    if variant != "webdataset":  # whose workers have shards of their own
        assert sorted(labels) == sorted(k % 8 for k in range(64))
    if variant in FORMS:
        source.resize(9)
        assert len(source()[1]) == 9
    source.close()


def test_a_step_counts_its_images_across_epochs(opened):
    step = Serve(ServeCase("cifar", 32, images=40, lead=1), opened("cifar", "resident"))
    served = []
    for _ in range(4):
        step()
        served.append(step.laps["images"])
    # in batches of 32, 32 and 6, at least 40 a step since the beginning
    assert served == [64, 102, 134, 172]
    step.check()
    assert step.laps["cpu"] > 0


def test_a_change_of_size_leaves_no_partial_batch_in_its_way(opened, monkeypatch):
    monkeypatch.setattr(timing, "wait_until_idle", lambda: None)
    step = Change(ResizeCase("cifar", 5), opened("cifar", "resident"))
    for _ in range(6):  # 45 images each, of 70
        step()
    step.check()
    assert min(step.laps.values()) > 0


class Late:
    """Serves a batch of the old size after a change."""

    size = 4

    def __call__(self):
        batch = torch.randn(self.size, 3, 32, 32), torch.zeros(self.size, dtype=torch.int64)
        self.size = self.wanted
        return batch

    def has(self, images):
        return True

    def end_epoch(self):
        pass

    def resize(self, batch_size):
        self.wanted = batch_size


def test_a_size_that_comes_a_batch_late_is_no_result(monkeypatch):
    monkeypatch.setattr(timing, "wait_until_idle", lambda: None)
    with pytest.raises(ValueError, match="a batch of 4 images where 8 were asked for"):
        Change(ResizeCase("cifar", 4), Late())()


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 3, 32, 32),
        torch.full((2, 3, 32, 32), float("nan")),
        torch.randn(2, 32, 32, 3),
        torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8),
        torch.randn(2, 3, 32, 32, dtype=torch.float64),
    ],
)
def test_what_no_trainer_could_take_is_no_result(x):
    with pytest.raises(ValueError):
        bench_loader.check((x, torch.zeros(2, dtype=torch.int64)), "cifar")


def test_the_originals_transform_as_the_published_code_does(pictures):
    cifar, imagenet = (
        bench_loader.cifar(pictures["cifar"]),
        bench_loader.imagenet(pictures["imagenet"]),
    )
    names = [
        [type(t).__name__ for t in dataset.transform.transforms] for dataset in (cifar, imagenet)
    ]
    assert names[0] == [
        "RandomCrop",
        "RandomHorizontalFlip",
        "RandomRotation",
        "ToTensor",
        "Normalize",
    ]
    assert names[1] == ["RandomResizedCrop", "RandomHorizontalFlip", "ToTensor", "Normalize"]
    crop = imagenet.transform.transforms[0]
    assert crop.size == (224, 224) and crop.interpolation == transforms.InterpolationMode.BILINEAR
    assert (
        len(cifar) == 70
        and len(imagenet) == 64
        and imagenet.samples[:16] == imagenet.samples[16:32]
    )


# The report


def measured(seconds, laps, helpers_cpu=0.0, peak=0):
    return Measured(1.0, [Window(s, laps, helpers_cpu, 0.0, peak) for s in seconds])


def test_rows_count_the_images_that_were_served_and_the_cpu_of_workers():
    case = ServeCase("cifar", 32, images=100, lead=1)
    found = {
        "originals": measured([1.0, 1.0], {"images": 100, "cpu": 0.5}, 1.5, peak=400_000_000),
        "resident": measured([0.06, 0.06], {"images": 120, "cpu": 0.12}, 0.0, peak=425_000_000),
    }
    about = {}
    _, (base, ours), lines = bench_loader.served(case, found, about)
    assert list(ours) == [*ROW, "cpu_s_per_1000", "over_originals_mb"]
    assert (base["per_s"], ours["per_s"], ours["ratio"]) == (100, 2000, 0.05)
    assert (base["median_s"], ours["median_s"]) == (0.32, 0.016)  # a batch
    assert (base["cpu_s_per_1000"], ours["cpu_s_per_1000"], ours["over_originals_mb"]) == (
        20,
        1,
        25,
    )
    assert about["variants"]["resident"]["peak_mb"] == 425
    assert lines[1] == (
        "  resident: 20 times the originals' images a second (target: 20), CPU 1 s per 1,000 "
        "images, 1/20 of theirs (target: 1/15), peak memory +25 MB (target: under +250)"
    )


def test_where_the_system_does_not_say_cpu_and_memory_are_null():
    found = {
        name: measured([1.0], {"images": 100, "cpu": 0.5}, None, None)
        for name in ("originals", "resident")
    }
    _, result, _ = bench_loader.served(ServeCase("cifar", 32, images=100, lead=1), found, {})
    for row in result:
        assert row["cpu_s_per_1000"] is row["over_originals_mb"] is row["mem_ratio"] is None


def test_a_change_costs_what_its_first_batch_takes_beyond_the_next():
    found = {
        "originals": measured([9.0], {"first": 0.2, "next": 0.01}),
        "resident": measured([9.0], {"first": 0.002, "next": 0.0018}),
    }
    _, (base, ours), lines = bench_loader.changed(ResizeCase("cifar", 128), found, {})
    assert list(ours) == [*ROW, "next_s", "extra_s"]
    assert (base["median_s"], base["extra_s"]) == (0.2, 0.19)
    assert (ours["median_s"], ours["extra_s"], ours["ratio"]) == (0.002, 0.0002, 0.01)
    assert ours["per_s"] == 256 / 0.002
    assert (
        lines[-1]
        == "  resident: 0.2 ms more than the next ones (target: under 0.5), which take 1.8 ms"
    )


def test_without_dali_its_variant_is_left_out_and_said(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(dali, "available", lambda: False)
    monkeypatch.setattr(
        bench_loader, "bench", lambda case, images, names, report: asked.append(names)
    )
    monkeypatch.setattr(bench_loader, "QUICK", bench_loader.QUICK[:1])
    assert bench_loader.main(["--quick"]) == 0
    theirs = {*FORMS, *PEERS} if forms.available() else set()
    assert asked == [{"originals", "resident", "threads", "torch"} | theirs]
    assert "not measured: dali: NVIDIA DALI is not installed" in capsys.readouterr().out


def test_a_folder_that_is_no_data_set_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_loader, "QUICK", bench_loader.QUICK[1:2])
    assert bench_loader.main(["--quick", "--imagenet-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("bench_loader: ") and len(said.splitlines()) == 1


@pytest.mark.full
def test_the_quick_run_writes_well_formed_json(tmp_path, capfd, monkeypatch):
    # each process takes seconds to start
    monkeypatch.setattr(bench_loader, "QUICK", bench_loader.QUICK[:1])
    out = tmp_path / "quick.jsonl"
    assert (
        bench_loader.main(["--quick", "--variants", "resident", "--json", "--out", str(out)]) == 0
    )
    printed = capfd.readouterr()
    result = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["variant"] for row in result] == ["originals", "resident"]
    header, *kept = map(json.loads, out.read_text().splitlines())
    assert kept == result and "random pixels" in header["about"]["images"]
    assert list(header["about"]["cifar/b32"]["variants"]) == ["originals", "resident"]
    for row in result:
        assert list(row) == [*ROW, "cpu_s_per_1000", "over_originals_mb"]
        assert (row["bench"], row["case"], row["ratio_to"]) == (
            "bench_loader",
            "cifar/b32",
            "originals",
        )
        assert row["rounds"] == 2 and row["per_s"] == pytest.approx(32 / row["median_s"], rel=1e-2)
    assert "times the originals' images a second" in printed.err


@pytest.mark.full
def test_a_large_set_is_listed_at_the_first_start_and_known_at_the_next(monkeypatch, capsys):
    from benchmarks import bench_index

    monkeypatch.setattr(bench_index, "SHARDS", 4)
    assert bench_index.main(["--quick", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["case"], row["start"], row["images"]) for row in rows] == [
        (f"index/{case}", start, 8) for case in bench_index.CASES for start in ("first", "later")
    ]
