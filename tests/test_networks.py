"""Per-sample norms of networks as timm has them, beside one backward pass a sample in float64.

Their parameters are used in every way that is common: class and position tokens, layer scales,
tables of relative positions, standardised weights, temperatures, squeeze and excitation, windows,
tensors kept from call to call. All must go by rule, none with its gradients written out.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsmooth.noise.persample import sample_norms

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:timm", "ignore::FutureWarning:timm")

CLASSES = 10
SIDE = 64  # pixels, for networks that are not built for one size alone
# A power of two: where a model computes in float32 inside, the slopes of the mean loss, which are
# those of a sample's loss over BATCH, then round as these do.
BATCH = 4
TOLERANCE = 1e-12

# name: what makes it small, kept in the tests that always run
SMALL = {
    "vit_tiny_patch16_224": {"depth": 2},
    "convnext_atto": {"depths": (1, 1, 2, 1)},
    "swin_tiny_patch4_window7_224": {"depths": (2, 1), "num_heads": (3, 6), "window_size": 4},
    "nfnet_f0": {"depths": (1, 1, 1, 1), "channels": (64, 64, 96, 96), "group_size": 32},
    "mobilenetv3_small_050": {},
    "xcit_nano_12_p16_224": {"depth": 2},
}
WHOLE = [
    "resnet18", "resnet50", "vit_tiny_patch16_224", "deit3_small_patch16_224", "convnext_atto",
    "efficientnet_b0", "mobilenetv3_small_050", "regnetx_002", "swin_tiny_patch4_window7_224",
    "mixer_s32_224", "nfnet_f0", "densenet121", "inception_v3", "resmlp_12_224", "convnextv2_atto",
    "efficientvit_b0", "repvgg_a0", "mobilenetv4_conv_small_035", "vit_wee_patch16_reg1_gap_256",
    "xcit_nano_12_p16_224", "coatnet_nano_rw_224", "edgenext_xx_small", "fastvit_t8", "levit_128s",
]  # fmt: skip


def built(name: str, **given) -> tuple[nn.Module, int]:
    """(a network in evaluation mode, the side of its images): of SIDE pixels where it is so told or
    where it takes any."""
    for more in ({"img_size": SIDE}, {}):
        try:
            model = timm.create_model(name, num_classes=CLASSES, **given, **more)
            break
        except TypeError:  # it has no such argument
            continue
    model = model.double().eval()
    native = model.pretrained_cfg["input_size"][-1]
    for side in (SIDE, 96, native):
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, side, side, dtype=torch.float64))
            # LeViT keeps tensors from one call in evaluation mode to the next, and drops them here
            return model.train().eval(), side
        except (AssertionError, RuntimeError):  # too small, or built for another size
            continue
    raise AssertionError(f"{name} takes no images of {native} pixels")


def one_backward_pass_a_sample(model: nn.Module, x: Tensor, y: Tensor) -> list[list[Tensor]]:
    """The gradients of each sample, out of one forward pass of them all: PyTorch's backward pass of
    BatchNorm in evaluation mode can be wrong for a batch of one on a CPU (LOG.md)."""
    model.train().eval()  # LeViT
    losses = F.cross_entropy(model(x), y, reduction="none")
    params = list(model.parameters())
    return [list(torch.autograd.grad(loss, params, retain_graph=True)) for loss in losses]


def apart(found: Tensor, exact: Tensor) -> float:
    """The largest error of [B], relative."""
    return ((found - exact).abs() / exact).max().item()


def norms(rows: list[list[Tensor]]) -> Tensor:
    """[parameters, B]: the squared norms."""
    return torch.stack([torch.stack([g.square().sum() for g in one]) for one in rows]).T


def check(name: str, **given) -> tuple[str, float, float, float]:
    """(found.how, and the relative errors of norms, deviations and mean gradient)."""
    torch.manual_seed(0)
    model, side = built(name, **given)
    with torch.no_grad():
        for p in model.parameters():  # else layer scales are 1e-6 and tokens 0
            p.add_(0.02 * torch.randn_like(p))
    x = torch.randn(BATCH, 3, side, side, dtype=torch.float64)
    y = torch.randint(CLASSES, (BATCH,))
    found = sample_norms(model, x, y)
    rows = one_backward_pass_a_sample(model, x, y)
    mean = [torch.stack(one).mean(0) for one in zip(*rows, strict=True)]
    squares = norms(rows)
    for one in rows:
        torch._foreach_sub_(one, mean)
    away = norms(rows)
    layers = dict.fromkeys(found.layers, 0)
    for (parameter, _), share in zip(
        model.named_parameters(), torch.stack([squares, away], 1), strict=True
    ):
        layers[parameter.rpartition(".")[0]] += share
    for layer, share in layers.items():
        size = TOLERANCE * squares.sum(0).max().item()
        torch.testing.assert_close(found.layers[layer], share, rtol=1e-9, atol=size, msg=layer)
    off = torch.stack([(a - b).norm() for a, b in zip(found.grads, mean, strict=True)]).norm()
    return (
        found.how,
        apart(found.squares, squares.sum(0)),
        apart(found.noise, away.sum(0)),
        (off / torch.stack([g.norm() for g in mean]).norm()).item(),
    )


@pytest.mark.parametrize("name", SMALL)
def test_a_small_network_goes_by_rule_and_has_the_norms_of_one_backward_pass_a_sample(name):
    how, *errors = check(name, **SMALL[name])
    assert how == "" and max(errors) < TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize("name", WHOLE)
def test_a_network_goes_by_rule_and_has_the_norms_of_one_backward_pass_a_sample(name):
    how, *errors = check(name)
    print(name, how, *(f"{error:.1e}" for error in errors))
    assert how == "" and max(errors) < TOLERANCE
