"""Memory that runs out is one line that says what to do, and doing it helps."""

import functools

import pytest
import torch
from forks import codes, logs, start, start_ranks

from fastsmooth.runfolder.read import read_status


def limit_forward(samples: int) -> None:
    """A forward pass of more samples asks for more memory than any machine has."""
    from fastsmooth.training import step

    forward = step.Step._plain_forward

    def limited(self, x, y, autocast, testing=False):
        if len(y) > samples and self.model.training:
            torch.empty(1 << 60, dtype=torch.uint8)
        return forward(self, x, y, autocast, testing)

    step.Step._plain_forward = limited


@pytest.mark.parametrize("world", [1, 2])
def test_out_of_memory_names_the_batch_and_the_flag_that_helps(world, tmp_path):
    argv, prepare = (
        ["--batchsize", "400", "--epochs", "1", "--norm", "group"],
        functools.partial(limit_forward, 100),
    )

    def run(out, *more):
        line = [*argv, *more]
        return [start(line, out, prepare)] if world == 1 else start_ranks(line, out, world, prepare)

    assert codes(run(tmp_path / "whole")) == [2] * world, logs(tmp_path / "whole")
    (line,) = [
        line for line in logs(tmp_path / "whole").splitlines() if line.startswith("fastsmooth: ")
    ]
    assert "out of memory in main memory at batch 400" in line and "--micro-batch" in line
    status = read_status(tmp_path / "whole")
    assert (status["state"], status["reason"], status["step"]) == ("failed", "out of memory", 0)
    assert codes(run(tmp_path / "cut", "--micro-batch", "100")) == [0] * world, logs(
        tmp_path / "cut"
    )
