"""Networks against published counts, torchvision and forward passes written out in functions."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastsmooth.models import (
    BUILDERS,
    ModelError,
    WideResNet,
    build,
    count_parameters,
    replace_batchnorm,
)

# With 100 classes: parameters, tensors, BatchNorm layers and the inputs of the head.
COUNTS = {
    "resnet18": (11_220_132, 62, 20, 512),
    "wrn-28-10": (36_536_884, 80, 25, 640),
    "mobilenetv2": (2_369_380, 214, 53, 1280),
    "resnet34": (21_328_292, 110, 36, 512),
    "resnet50": (23_705_252, 161, 53, 2048),
    "resnet20": (278_324, 65, 21, 64),
    "resnet8": (83_892, 29, 9, 64),
}
# Those that are quick to initialise and run.
SMALL = ["resnet8", "resnet20", "resnet18", "mobilenetv2"]


def has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.fixture(autouse=True)
def fixed_seed_one_thread_and_no_graph():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    # images this small gain nothing from a second one, and lose much on a busy machine
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def settle_norms(model):
    """Give every BatchNorm statistics and an affine map that a forward pass cannot ignore."""
    for norm in norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            nn.init.normal_(tensor, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_tensors_and_norms_are_as_published(name):
    parameters, tensors, batch_norms, width = COUNTS[name]
    with torch.device("meta"):
        for classes in (100, 10):
            model = build(name, classes)
            assert count_parameters(model) == parameters - (100 - classes) * (width + 1)
            assert len(list(model.parameters())) == tensors
            assert len(norms(model)) == batch_norms


def test_ten_class_counts_are_those_of_the_literature():
    with torch.device("meta"):
        assert count_parameters(build("resnet18", 10)) == 11_173_962
        assert count_parameters(build("resnet20", 10)) == 272_474  # He et al. 2016 with projections
        assert count_parameters(build("torchvision/resnet34", 1000)) == 21_797_672


def test_every_network_has_its_counts_here():
    assert set(COUNTS) == set(BUILDERS)


def test_frozen_parameters_are_not_counted():
    model = build("resnet8", 10)
    model.head.requires_grad_(False)
    assert count_parameters(model) == 78_042 - 650


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("name", SMALL)
def test_every_sample_gets_one_finite_output_a_class(name, size):
    model = build(name, 7)
    for training in (True, False):
        model.train(training)
        y = model(torch.randn(3, 3, size, size))
        assert y.shape == (3, 7) and torch.isfinite(y).all()
    assert len(y.unique(dim=0)) == 3  # three images, three answers


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "wrn-28-10"])
def test_large_networks_have_their_output_shapes_at_8_and_32_pixels(name):
    with torch.device("meta"):
        model = build(name, 100)
        for size in (8, 32):
            assert model(torch.empty(2, 3, size, size)).shape == (2, 100)


def test_mobilenet_pads_its_stem_to_34_pixels_and_ends_at_5():
    with torch.device("meta"):
        layers = build("mobilenetv2", 100).features
        x, sizes = torch.empty(2, 3, 32, 32), []
        for layer in layers:
            x = layer(x)
            sizes.append(x.shape[-1])
    assert list(dict.fromkeys(sizes)) == [34, 17, 9, 5]
    assert x.shape == (2, 1280, 5, 5)


# Forward passes equal to independent ones


@pytest.mark.parametrize("name, size", [("resnet18", 16), ("resnet34", 8), ("resnet50", 8)])
def test_resnets_compute_what_torchvision_computes_with_a_small_stem(name, size):
    from torchvision import models

    theirs = models.get_model(name, weights=None, num_classes=100).double()
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False).double()
    theirs.maxpool = nn.Identity()
    ours = build(name, 100).double()
    settle_norms(ours)
    state, source = theirs.state_dict(), ours.state_dict()
    assert [t.shape for t in state.values()] == [t.shape for t in source.values()]
    theirs.load_state_dict(dict(zip(state, source.values(), strict=True)))
    x = torch.randn(3, 3, size, size, dtype=torch.float64)
    for training in (False, True):
        torch.testing.assert_close(
            ours.train(training)(x), theirs.train(training)(x), rtol=1e-10, atol=1e-10
        )
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def normalise(x, state):
    """BatchNorm in evaluation mode, written out; takes its five tensors from `state`."""
    weight, bias, mean, var, _ = (next(state) for _ in range(5))
    x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-5)
    return x * weight[:, None, None] + bias[:, None, None]


def test_wide_resnet_computes_the_published_pre_activation_blocks():
    model = WideResNet(16, 2, 10).double().eval()
    settle_norms(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    state, first, y = iter(model.state_dict().values()), None, x
    y = F.conv2d(y, next(state), padding=1)
    for stage, block in itertools.product(range(3), range(2)):
        stride = 2 if stage > 0 and block == 0 else 1
        activated = normalise(y, state).relu()
        first = F.conv2d(activated, next(state), stride=stride, padding=1)
        second = F.conv2d(normalise(first, state).relu(), next(state), padding=1)
        # 16 -> 32 -> 64 -> 128 widths
        shortcut = F.conv2d(activated, next(state), stride=stride) if block == 0 else y
        y = second + shortcut
    y = normalise(y, state).relu().mean(dim=(2, 3))
    expected = F.linear(y, next(state), next(state))
    assert next(state, None) is None
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_wide_resnet_28_10_has_four_blocks_of_each_width():
    with torch.device("meta"):
        model = build("wrn-28-10", 100)
    assert [b.conv2.out_channels for b in model.blocks] == [160] * 4 + [320] * 4 + [640] * 4
    assert [b.conv1.stride[0] for b in model.blocks] == [1] * 4 + [2, 1, 1, 1] * 2


def test_wide_resnet_starts_kaiming_normal_by_fan_out_with_a_zero_head_bias():
    model = WideResNet(10, 4, 10)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        n, std = conv.weight.numel(), math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
        assert conv.bias is None
        # five standard errors
        assert conv.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
        assert abs(conv.weight.mean().item()) < 5 * std / math.sqrt(n)
        assert conv.weight.abs().max() > 2.5 * std  # normal, not uniform, which ends at 1.73
    assert not model.head.bias.any()


def test_mobilenet_computes_the_published_stages():
    stages = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 1),
        (6, 320, 1, 1),
    ]
    model = build("mobilenetv2", 10).double().eval()
    settle_norms(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    state, y, channels, shortcuts = iter(model.state_dict().values()), x, 32, 0

    def conv(x, **options):
        weight, bias = next(state), next(state)
        return F.conv2d(x, weight, bias, **options)

    y = normalise(conv(y, padding=1), state).clamp(0, 6)
    for expansion, outputs, blocks, first_stride in stages:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            z = normalise(conv(y), state).clamp(0, 6)
            z = normalise(
                conv(z, stride=stride, padding=1, groups=channels * expansion), state
            ).clamp(0, 6)
            z = normalise(conv(z), state)
            if stride == 1 and channels == outputs:
                z, shortcuts = z + y, shortcuts + 1
            y, channels = z, outputs
    y = normalise(conv(y), state).clamp(0, 6).mean(dim=(2, 3), keepdim=True)
    expected = conv(y).flatten(1)
    assert next(state, None) is None and shortcuts == 10
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


# Group normalisation


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("name", SMALL)
def test_group_norm_leaves_no_batch_norm_and_stays_finite(name, size):
    model = build(name, 10, norm="group")
    assert not has_batchnorm(model)
    assert has_batchnorm(build(name, 10))
    x = torch.randn(4, 3, size, size)
    together = model(x)
    assert torch.isfinite(together).all()
    # no sample sees another, even in training
    alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COUNTS)
def test_group_norm_keeps_every_parameter_and_sixteen_channels_a_group(name):
    with torch.device("meta"):
        model = build(name, 100, norm="group")
        groups = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
        assert len(groups) == COUNTS[name][2]
        assert count_parameters(model) == COUNTS[name][0]
    for norm in groups:
        width = norm.num_channels // norm.num_groups
        assert (
            width == math.gcd(norm.num_channels, 16)
            and norm.num_groups * width == norm.num_channels
        )
    assert any(norm.num_groups * 16 == norm.num_channels for norm in groups)


def test_group_norm_takes_widths_that_sixteen_does_not_divide():
    model = nn.Sequential(
        nn.Conv2d(3, 24, 1), nn.BatchNorm2d(24, eps=1e-3), nn.BatchNorm2d(24), nn.Conv2d(24, 7, 1)
    )
    model.append(nn.BatchNorm2d(7))
    assert replace_batchnorm(model) == 3
    assert [(m.num_groups, m.eps) for m in model if isinstance(m, nn.GroupNorm)] == [
        (3, 1e-3),
        (3, 1e-5),
        (7, 1e-5),
    ]
    assert torch.isfinite(model(torch.randn(2, 3, 4, 4))).all()


def test_group_norm_is_refused_where_there_is_nothing_to_replace():
    with torch.device("meta"), pytest.raises(ModelError, match="--norm") as refused:
        build("torchvision/squeezenet1_0", 10, norm="group")
    assert "\n" not in str(refused.value)


# Other collections


def test_torchvision_networks_build_with_the_classes_asked_for():
    for name, size in [("resnet18", 32), ("shufflenet_v2_x0_5", 64), ("squeezenet1_1", 64)]:
        assert build(f"torchvision/{name}", 7)(torch.randn(2, 3, size, size)).shape == (2, 7)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_torchvision_networks_with_auxiliary_heads_return_one_tensor_in_training():
    for name, size in [("googlenet", 64), ("inception_v3", 96)]:
        with torch.device("meta"):
            y = build(f"torchvision/{name}", 7).train()(torch.empty(2, 3, size, size))
        assert isinstance(y, torch.Tensor) and y.shape == (2, 7), name


def test_torchvision_and_ours_agree_on_group_norm():
    model = build("torchvision/resnet18", 7, norm="group")
    assert not has_batchnorm(model)
    assert torch.isfinite(model(torch.randn(1, 3, 64, 64))).all()


def test_timm_networks_build_with_the_classes_asked_for():
    pytest.importorskip("timm")
    assert build("timm/resnet10t", 7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_group_norm_keeps_the_activations_inside_timm_norms():
    timm = pytest.importorskip("timm")

    def activations(model):
        return sum(isinstance(m, nn.SiLU) for m in model.modules())

    with torch.device("meta"):
        theirs = timm.create_model("efficientnet_lite0", act_layer=nn.SiLU)
        assert activations(theirs) > 20
        before = sum(isinstance(m, nn.BatchNorm2d) for m in theirs.modules())
        expected = activations(theirs)
        assert replace_batchnorm(theirs) == before
        assert activations(theirs) == expected
    model = build("timm/efficientnet_b0", 7, norm="group")
    assert not has_batchnorm(model)
    assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()


def test_timm_missing_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ModelError, match=r"pip install 'fastsmooth\[timm\]'") as refused:
        build("timm/resnet10t", 7)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["resnet19", "", "ResNet18", "torchvision/", "torchvision/resnet19",
    "torchvision/maskrcnn_resnet50_fpn",
     "timm/", "timm/resnet19x", "timm/resnet18.no_such_tag", "other/resnet18"],
)  # fmt: skip
def test_unknown_names_are_refused_in_one_line(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with pytest.raises(ModelError) as refused:
        build(name, 10)
    message = str(refused.value)
    assert message.startswith("--model ") and name in message and "\n" not in message


def test_an_unknown_name_is_answered_with_every_name_there_is():
    with pytest.raises(ModelError) as refused:
        build("resnet19", 10)
    assert all(
        known in str(refused.value) for known in [*BUILDERS, "torchvision/NAME", "timm/NAME"]
    )
