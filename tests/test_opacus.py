"""Opacus' own tests of its samplers, with sample_norms in their place.

Each of them draws a layer and a batch by hypothesis and calls run_test, which compares Opacus'
gradients of the samples with a backward pass a sample of the same layer under an L1 loss. Here
run_test compares the norms and deviations of sample_norms with those passes, in float64.

A layer that takes its batch in the second dimension is wrapped into one that takes it in the first;
bags of unequal lengths are rows of one length, filled up with a token of no gradient.
"""

import importlib
import unittest
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fastsmooth.noise.persample import NotCovered, sample_norms

hypothesis = pytest.importorskip("hypothesis")
pytest.importorskip("opacus")

# of opacus.tests.grad_samples, without the tests that do not call run_test
TESTS = {
    "conv1d": "Conv1d_test.test_conv1d",
    "conv2d": "Conv2d_test.test_conv2d",
    "conv3d": "Conv3d_test.test_conv3d",
    "dp_multihead_attention": "MultiHeadAttention_test.test_multihead_attention",
    "dp_rnn": "RNN_test.test_rnn",
    "embedding": "Embedding_test.test_input_across_dims",
    "embedding_bag": "Embedding_bag_test.test_input_across_dims",
    "group_norm": "GroupNorm_test.test_3d_input_groups",
    "instance_norm1d": "InstanceNorm1d_test.test_3d_input",
    "instance_norm2d": "InstanceNorm2d_test.test_4d_input",
    "instance_norm3d": "InstanceNorm3d_test.test_5d_input",
    "layer_norm": "LayerNorm_test.test_input_norm",
    "linear": "Linear_test.test_input_bias",
    "rms_norm": "RMSNorm_test.test_input_norm",
    "sequence_bias": "SequenceBias_test.test_batch_second",
}
FEW, MANY = 20, 100  # examples a test; hypothesis has 100 by default
TOLERANCE = 1e-10
# how it went where norms were found, and the words of a refusal
BY_RULE = "by rule"
REFUSALS = OF_ONE, EMPTY, PACKED = "fewer than two samples", "has no values", "not a tensor"


class BatchSecond(nn.Module):
    """Takes and gives [B, T, ...], around a layer that takes and gives [T, B, ...]."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def bags(layer: nn.EmbeddingBag, x: tuple[Tensor, Tensor]) -> tuple[nn.Module, Tensor]:
    """(the layer with one token more, that fills up, [B, longest] tokens)."""
    tokens, offsets = x
    ends = [*offsets.tolist()[1:], len(tokens)]
    parts = [tokens[a:b] for a, b in zip(offsets.tolist(), ends, strict=True)]
    words, width = layer.weight.shape
    filled = nn.EmbeddingBag(words + 1, width, mode=layer.mode, padding_idx=words)
    with torch.no_grad():
        filled.weight[:words] = layer.weight
    rows = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=words)
    return filled.to(layer.weight.dtype), rows


def one_backward_pass_a_sample(layer: nn.Module, samples: list) -> Tensor:
    """[B, P], each from the layer's own batch of one."""
    params = list(layer.parameters())
    rows = []
    for sample in samples:
        output = layer(*sample) if isinstance(sample, tuple) else layer(sample)
        rows.append(torch.autograd.grad(F.l1_loss(output, torch.zeros_like(output)), params))
    return torch.stack([torch.cat([g.flatten() for g in one]) for one in rows])


def compared(x, layer: nn.Module, batch_first: bool, chunk_method) -> str:
    """How it went, or why sample_norms refused; raises AssertionError where it is wrong."""
    layer = layer.double()
    loss = nn.L1Loss()
    if isinstance(x, PackedSequence):
        x = x.double()
        with pytest.raises(NotCovered, match=PACKED):
            sample_norms(layer, x, torch.zeros(3), loss=loss)
        return PACKED
    if isinstance(x, tuple):
        samples = list(chunk_method(x))
        model, x = bags(layer, x)
    else:
        x = x.double() if x.is_floating_point() else x
        batch = 0 if batch_first else 1
        samples = list(x.split(1, batch))
        model = layer if batch_first else BatchSecond(layer)
        x = x.movedim(batch, 0)
    if len(x) < 2 or not x.numel():
        why = OF_ONE if len(x) < 2 else EMPTY
        with pytest.raises(NotCovered, match=why):
            sample_norms(model, x, torch.zeros(len(x)), loss=loss)
        return why
    with torch.no_grad():
        y = torch.zeros_like(model(x))
    found = sample_norms(model, x, y, loss=loss)
    rows = one_backward_pass_a_sample(layer, samples)
    away = rows - rows.mean(0)
    size = TOLERANCE * rows.square().sum(1).max().item()
    for value, exact in (
        (found.squares, rows.square().sum(1)),
        (found.noise, away.square().sum(1)),
        (found.grad_square, rows.mean(0).square().sum()),
    ):
        torch.testing.assert_close(value, exact, rtol=TOLERANCE, atol=size)
    return found.how or BY_RULE


@pytest.fixture(scope="module")
def examples(request) -> int:
    """How many hypothesis draws a test, always the same ones; set before Opacus' tests are read."""
    full = request.config.getoption("--full")
    count = MANY if full else FEW
    hypothesis.settings.register_profile(
        "counted", derandomize=True, max_examples=count, database=None, deadline=None
    )
    hypothesis.settings.load_profile("counted")
    return count


@pytest.mark.filterwarnings("ignore")  # of Opacus, about itself
@pytest.mark.parametrize("layer", TESTS)
def test_the_tests_of_a_layer_pass(layer, examples, monkeypatch, capsys):
    common = importlib.import_module("opacus.tests.grad_samples.common")
    module = importlib.import_module(f"opacus.tests.grad_samples.{layer}_test")
    counts: Counter[str] = Counter()

    def run_test(self, x, layer, batch_first=True, *, chunk_method=iter, **tolerances) -> None:
        counts[compared(x, layer, batch_first, chunk_method)] += 1

    monkeypatch.setattr(common.GradSampleHooks_test, "run_test", run_test)
    (case,) = unittest.defaultTestLoader.loadTestsFromName(TESTS[layer], module)
    result = unittest.TestResult()
    case.run(result)
    assert result.testsRun == 1
    for _, trace in result.errors + result.failures:
        pytest.fail(trace, pytrace=False)
    with capsys.disabled():
        print(layer, dict(counts))
    assert counts.keys() <= {BY_RULE, *REFUSALS} and counts[BY_RULE]
