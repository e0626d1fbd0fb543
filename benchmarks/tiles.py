"""How persample_noise may cut G into tiles, timed on a GPU: python -m benchmarks.tiles [--seconds
90]

One line a cut: median of triton.testing.do_bench, which waits for the GPU and clears its L2 cache
in between; GB/s counts the least possible bytes (G, p and m read, p and m written, float32
parameters, form shb). "now" is the cut that the kernel takes. The first lines are the ceiling: a
copy, and a change in place, of a gigabyte.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from unittest import mock

import torch

from fastsmooth.kernels import backend
from fastsmooth.kernels import persample_noise as noise
from fastsmooth.kernels.persample_noise import Tile
from fastsmooth.kernels.update import Rule

RESNET18 = 11_220_144
# rows, columns, dtype: about the parameters of ResNet-18, fewer where its rows would not fit
CASES = (
    (2, RESNET18, torch.float32),
    (8, RESNET18, torch.float32),
    (32, RESNET18, torch.float32),
    (128, RESNET18 // 64 * 16, torch.float32),
    (256, RESNET18 // 64 * 16, torch.float32),
    (1024, RESNET18 // 256 * 16, torch.float32),
    (8, RESNET18, torch.bfloat16),
    (32, RESNET18, torch.bfloat16),
    (256, RESNET18 // 64 * 16, torch.bfloat16),
)


def others(now: Tile) -> list[Tile]:
    """Cuts beside the present one: half or twice the columns, half or twice the warps, more or
    fewer programs."""
    found = [now._replace(programs=n) for n in (264, 528, 1056, 2048)]
    found += [
        now._replace(COLUMNS=now.COLUMNS // 2),
        now._replace(COLUMNS=2 * now.COLUMNS, warps=2 * now.warps),
    ]
    if now.warps > 1:
        found += [
            now._replace(COLUMNS=now.COLUMNS // 2, warps=now.warps // 2, programs=2 * now.programs)
        ]
    found += [now._replace(warps=2 * now.warps)]
    if not now.whole:
        found += [
            now._replace(ROWS=2 * now.ROWS),
            now._replace(ROWS=now.ROWS // 2, warps=now.warps // 2),
        ]
    return [cut for cut in dict.fromkeys(found) if cut != now]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description="Times of persample_noise's tiles on a GPU.", allow_abbrev=False
    )
    p.add_argument("--seconds", type=float, default=90.0, help="start no further cut after so long")
    args = p.parse_args(argv)
    if not torch.cuda.is_available() or not backend.HAS_TRITON:
        p.error("this needs a GPU that PyTorch can use, and Triton")
    import triton
    from triton.testing import do_bench

    began, device = time.monotonic(), torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    x, y = torch.randn(2, 1 << 28, device=device)
    for name, run in (("copy", partial(y.copy_, x)), ("in place", partial(y.mul_, 1.0))):
        print(f"{name} {2 * x.nbytes / do_bench(run, return_mode='median') / 1e6:.0f} GB/s")
    del x, y, run
    # heavy ball
    rule = Rule(*(backend.scalar(value, device) for value in (0.1, 0.9, 1.0, 0.0, 1.0, 0.0)))
    for rows, columns, dtype in CASES:
        G = torch.randn(rows, columns, device=device).to(dtype)
        w, m = torch.randn(columns, device=device), torch.zeros(columns, device=device)
        least = columns * (rows * G.element_size() + 16)
        now = noise.tile(rows, dtype, aligned=True)
        for cut in (now, *others(now)):
            if time.monotonic() - began > args.seconds:
                return 0
            with mock.patch.object(noise, "tile", lambda *given, cut=cut, **named: cut):
                run = partial(noise._persample_noise_triton, G, w, m, rule, False)
                ms = do_bench(run, warmup=5, rep=40, return_mode="median")
            name = (
                f"B={rows} {str(dtype).removeprefix('torch.')} P={columns} "
                f"{'now' if cut == now else 'other'}"
            )
            print(f"{name} {cut}: {ms * 1e3:.0f} us {least / ms / 1e6:.0f} GB/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
