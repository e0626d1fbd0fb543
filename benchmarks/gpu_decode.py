"""JPEG decoding on a GPU by DALI: which settings are fast, and which give the same pixels again.

    python -m benchmarks.gpu_decode DIR [--out FILE] [--seconds S]

DIR is a tree like ImageNet's (train/CLASS/IMAGE.JPEG); its training files are repeated until there
are 4,096. Each variant serves random resized crops of 224 pixels as batches of 256 on the GPU, in
windows that are interleaved over two rounds:

    full, sliced    decode whole images and crop them on the GPU, or decode the crop box alone
    hw              share of a chunk that the hardware decoder gets, where there is one
    chunk           samples decoded together
    threads         torchvision's decoders on the processors, resized there too

`again` says whether a pass that begins in the middle of an epoch gives the same bits as one from
its beginning, in the same chunks and in chunks of another size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks import timing
from fastsmooth.data.chunks import ChunkedLoader, Segment
from fastsmooth.data.engines.dali import DaliEngine, Decoder
from fastsmooth.data.engines.threads import ThreadsEngine
from fastsmooth.data.files import Paths
from fastsmooth.data.images import Split
from fastsmooth.data.index import Index, read_index
from fastsmooth.data.layouts.common import IMAGENET_MEAN, IMAGENET_STD
from fastsmooth.data.order import permutation
from fastsmooth.data.source import BadImages, Source
from fastsmooth.processors import processors

FILES, SIZE, BATCH, ROUNDS = 4096, 224, 256, 2
CUDA = torch.device("cuda", 0)
VARIANTS = {
    f"{how}/hw{hw:g}/chunk{chunk}": (Decoder(how == "sliced", hw), chunk)
    for how, hw, chunk in [
        *(("full", hw, 256) for hw in (0.0, 0.65, 0.9, 1.0)),
        *(("sliced", hw, 256) for hw in (0.0, 0.65, 1.0)),
        *(("full", 0.65, chunk) for chunk in (64, 128, 512)),
    ]
} | {"threads/chunk256": (None, 256)}


def source(directory: Path) -> Source:
    paths = sorted(str(p) for p in (directory / "train").rglob("*.JPEG"))
    repeats = -(-FILES // len(paths))
    index = read_index(Paths(paths))
    tiled = Index(
        *(
            np.tile(v, repeats)[:FILES]
            for v in (index.width, index.height, index.size, index.plain)
        ),
        {},
    )
    split = Split(np.zeros(FILES, dtype=np.int64), files=Paths((paths * repeats)[:FILES]))
    return Source(split, tiled, "resized-crop-flip", SIZE, 0, BadImages("raise", print))


def loader(files: Source, decoder: Decoder | None, chunk: int) -> ChunkedLoader:
    threads = processors()
    engine = (
        DaliEngine(files, chunk, threads, CUDA, decoder)
        if decoder
        else ThreadsEngine(files, threads, True)
    )
    return ChunkedLoader(engine, files.split.labels, SIZE, chunk, IMAGENET_MEAN, IMAGENET_STD, CUDA)


def window(variant: ChunkedLoader, seconds: float) -> float:
    """Images a second, after a first second that is not counted."""
    reader = variant.reader(
        Segment(permutation(0, epoch, FILES), epoch) for epoch in range(1_000_000)
    )
    try:
        served, began, taken = 0, None, 0
        start = time.perf_counter()
        while began is None or time.perf_counter() - began < seconds:
            if taken == FILES:
                reader.advance()
                taken = 0
            reader.take(BATCH)
            taken += BATCH
            torch.cuda.synchronize()
            if began is None and time.perf_counter() - start > 1:
                began = time.perf_counter()
            elif began is not None:
                served += BATCH
        return served / (time.perf_counter() - began)
    finally:
        reader.close()


def again(files: Source, decoder: Decoder, chunk: int) -> dict[str, bool]:
    """Whether the samples 700 to 1,000 of an epoch have the same bits from wherever the epoch is
    taken up."""
    order = permutation(0, 3, FILES)[:1000]

    def last(chunk: int, start: int) -> torch.Tensor:
        reader = loader(files, decoder, chunk).reader([Segment(order, 3, start)])
        try:
            if start == 0:
                reader.take(700)
            return reader.take(300)[0]
        finally:
            reader.close()

    whole = last(chunk, 0)
    return {
        "same_chunks": torch.equal(whole, last(chunk, 700)),
        "other_chunks": torch.equal(whole, last(96, 700)),
    }


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="JPEG decoding on a GPU by DALI.", allow_abbrev=False)
    p.add_argument("directory", type=Path, metavar="DIR")
    p.add_argument("--out", type=Path, metavar="FILE")
    p.add_argument("--seconds", type=float, default=1.5, metavar="S", help="of a window")
    argv = sys.argv[1:] if argv is None else argv
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_decode: PyTorch sees no CUDA device", file=sys.stderr)
        return 2
    files = source(args.directory)
    speeds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    lines = [json.dumps(timing.header("gpu_decode", argv))]

    def tell(row: dict) -> None:
        lines.append(json.dumps(row))
        print(lines[-1], flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    for hw in ("hw0", "hw0.65", "hw1"):
        decoder, chunk = VARIANTS[f"full/{hw}/chunk256"]
        tell({"bench": "gpu_decode", "hw": decoder.hw_load, **again(files, decoder, chunk)})
    for _ in range(ROUNDS):
        for name, (decoder, chunk) in VARIANTS.items():
            try:
                speeds[name].append(window(loader(files, decoder, chunk), args.seconds))
            except (RuntimeError, ValueError) as error:
                tell(
                    {
                        "bench": "gpu_decode",
                        "variant": name,
                        "failed": " ".join(str(error).split())[:300],
                    }
                )
    for name, found in speeds.items():
        if found:
            row = {"bench": "gpu_decode", "variant": name, "per_s": round(median(found))}
            tell(row | {"rounds": [round(v) for v in found]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
