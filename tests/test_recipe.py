"""Every flag of a recipe at once: the same bits through every loader, in two processes, and after an
interruption; each of them by itself changes the run that it is given to."""

from pathlib import Path

import pytest
import torch
from exact import EXACT
from forks import assert_same_bits, assert_same_run, final_state, finish
from repacked import own_cache

from fastsmooth.train import main

# but for those that no run has together with the others
RECIPE = {
    "--label-smoothing": ["0.1"],
    "--mixup": ["0.2"],
    "--cutmix": ["1"],
    "--randaugment": ["2,9"],
    "--random-erasing": ["0.5"],
    "--ema": ["0.9"],
    "--clip-norm": ["1"],
    "--weight-decay": ["1e-2"],
    "--decay-weights-only": [],
    "--sam": ["rho=0.05,alpha=0.2"],
    "--warmup": ["3"],
    "--freeze": ["stem"],
}
TOLD = ["--top5", "--patience", "3", "--keep", "all"]  # which change no weight
"""E
true
