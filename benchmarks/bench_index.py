"""How long it takes until a large set in tars is known, and in how much memory: python -m
benchmarks.bench_index [--quick]

Names and headers are made: a member of 512 bytes an image, which is no image, since listing reads
no images. A case does it twice, each in a process of its own: once as at the first start, then as
at every later one, when the cache has the list.

    tar          one tar of 1,281,167 members, as ImageNet's training images are many
    webdataset   1,282 tars of 1,000 samples, KEY.jpg and KEY.cls, read as --dataset webdataset is

seconds are those of the wall, cpu_s the processor's, peak_mb the largest memory of the process
beyond what it takes to import fastsmooth.data. The headers of the images are not read: that is
another pass, and the same for every form.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import timing

IMAGES, SHARDS, CLASSES = 1_281_167, 1_282, 1_000
BLOCK = 512
TESTS = ("test_tars.py", "test_layouts_shards.py")


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def make_tar(folder: Path, images: int) -> Path:
    """One tar of members like n01440764/n01440764_10026.JPEG."""
    path = folder / "train.tar"
    with path.open("wb", buffering=1 << 24) as file:
        for k in range(images):
            wnid = f"n{1440764 + k // 1300:08}"
            file.write(header(f"{wnid}/{wnid}_{k}.JPEG", BLOCK) + bytes(BLOCK))
        file.write(bytes(2 * BLOCK))
    return path


def make_shards(folder: Path, images: int) -> Path:
    """SHARDS tars, and one to test on."""
    each = -(-images // SHARDS)
    for number in range(SHARDS + 1):
        name = f"train-{number:06}.tar" if number < SHARDS else "val-000000.tar"
        with (folder / name).open("wb", buffering=1 << 22) as file:
            for k in range(number * each, (number + 1) * each):
                label = str(k % CLASSES).encode()
                file.write(header(f"{k:08}.jpg", BLOCK) + bytes(BLOCK))
                file.write(header(f"{k:08}.cls", len(label)) + label.ljust(BLOCK, b"\0"))
            file.write(bytes(2 * BLOCK))
    return folder


def list_tar(path: Path) -> int:
    from fastsmooth.data import tars

    (listing,) = tars.listed([str(path)])
    return len(listing.start)


def read_shards(folder: Path) -> int:
    from fastsmooth.cli.config import resolve
    from fastsmooth.data import read_set

    images = read_set(resolve({"dataset": "webdataset", "data_dir": str(folder)}))
    return len(images.train)


Make, Read = Callable[[Path, int], Path], Callable[[Path], int]
CASES: dict[str, tuple[Make, Read]] = {
    "tar": (make_tar, list_tar),
    "webdataset": (make_shards, read_shards),
}


def look(case: str, path: str) -> None:
    """What one start takes, as a line of JSON: the work of a process of its own."""
    import fastsmooth.data  # noqa: F401  # what is imported is no part of it

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
    count = CASES[case][1](Path(path))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    found = {"seconds": seconds, "cpu_s": cpu, "peak_mb": peak}
    rounded = {name: timing.rounded(value) for name, value in found.items()}
    print(json.dumps({"images": count} | rounded))


def measure(case: str, images: int, report: timing.Report) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "set")
        folder.mkdir()
        path = CASES[case][0](folder, images)
        rows = []
        for start in ("first", "later"):
            command = [sys.executable, "-m", "benchmarks.bench_index", "--look", case, str(path)]
            environment = os.environ | {"XDG_CACHE_HOME": scratch}
            done = subprocess.run(
                command, env=environment, cwd=timing.ROOT, capture_output=True, text=True
            )
            if done.returncode:
                raise timing.VariantError(done.stderr.strip().splitlines()[-1])
            found = json.loads(done.stdout)
            rows.append({"bench": "bench_index", "case": f"index/{case}", "start": start, **found})
            report.say(
                f"  {start} start: {found['images']:,} images, {found['seconds']:.3g} s, CPU "
                f"{found['cpu_s']:.3g} s, peak +{found['peak_mb']:.0f} MB"
            )
    report.add(f"index/{case}", rows, {})


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--look"]:
        look(*argv[1:])
        return 0
    p = timing.arguments("Seconds and memory until a large set in tars is known.")
    args = p.parse_args(argv)
    report = timing.Report("bench_index", argv, args.json, args.out)
    images = 2 * SHARDS if args.quick else IMAGES

    def bench(case: str) -> None:
        report.say(f"index/{case}")
        measure(case, images, report)

    return timing.run_cases(report, args.quick, TESTS, CASES, bench)


if __name__ == "__main__":
    sys.exit(main())
