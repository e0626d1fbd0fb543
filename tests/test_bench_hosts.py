"""The benchmark of measuring in each host: what it times is the same training, and what is not
there is said."""

import pytest
import torch

from benchmarks import bench_hosts
from benchmarks.bench_hosts import Case, Training

HERE = [
    "plain",
    *(pytest.param(h, marks=pytest.mark.full) for h in bench_hosts.HOSTS if h != "plain"),
]


@pytest.mark.parametrize("host", HERE)
def test_a_training_that_is_measured_ends_as_one_that_is_not(host):
    if host != "plain":
        pytest.importorskip(host)
        pytest.importorskip(f"fastsmooth.adapters.{host}")
    case, ends = Case(host, "resnet8", batch_size=4, updates=2), []
    for every in (None, 1):
        training = Training(case, every)
        before = {name: t.clone() for name, t in training.model.state_dict().items()}
        training()
        ends.append(training.model.state_dict())
        assert not torch.equal(before["head.weight"], ends[-1]["head.weight"])
    assert all(torch.equal(t, ends[1][name]) for name, t in ends[0].items())


def test_a_host_that_is_not_there_is_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(bench_hosts, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_hosts, "QUICK", bench_hosts.QUICK[1:])
    assert bench_hosts.main(["--quick"]) == 0
    said = capsys.readouterr().out
    line = "  not measured: lightning and fastsmooth.adapters.lightning are not installed\n"
    assert line in said and said.count("not measured") == 4
