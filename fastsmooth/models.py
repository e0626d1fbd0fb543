"""Image classifiers by name: the CIFAR networks of the papers, small ones for quick studies,
torchvision and timm.

Parameter counts of the papers' networks with 100 classes: ResNet-18 11,220,132; WideResNet-28-10
36,536,884; MobileNetV2 2,369,380 (tests/test_models.py holds them).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from fastsmooth import owncode
from fastsmooth.names import about_value, hint


class ModelError(ValueError):
    """The model asked for cannot be built; the message says why and what to do."""


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016), 1x1 where the shape changes.

    [B, inputs, H, W] -> [B, width, H / stride, W / stride], rounded up.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.shortcut = projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (He et al. 2016); the stride is on the 3x3.

    [B, inputs, H, W] -> [B, 4 width, H / stride, W / stride], rounded up.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.norm1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return F.relu(y + self.shortcut(x))


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


Block = type[BasicBlock] | type[Bottleneck]


class CifarResNet(nn.Module):
    """ResNet for small images: 3x3 stem, no max-pooling, one stage a width, every stage after the
    first at stride 2 (He et al. 2016).

    float32 images [B, channels, S, S] -> logits [B, classes].
    """

    def __init__(
        self, block: Block, depths: list[int], widths: list[int], classes: int, channels: int = 3
    ):
        super().__init__()
        self.stem, self.norm = conv(channels, widths[0], 3), nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        inputs = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for i in range(depth):
                blocks.append(block(inputs, width, 2 if stage > 0 and i == 0 else 1))
                inputs = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.norm(self.stem(x))))  # [B, C, H', W']
        return self.head(x.mean(dim=(2, 3)))


class PreactBlock(nn.Module):
    """norm, ReLU, conv, norm, ReLU, conv (Zagoruyko and Komodakis 2016); a projection sees the
    activated input.

    [B, inputs, H, W] -> [B, width, H / stride, W / stride], rounded up.
    """

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)
        same = stride == 1 and inputs == width
        self.shortcut = None if same else conv(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        return self.conv2(F.relu(self.norm2(y))) + shortcut


class WideResNet(nn.Module):
    """WideResNet-(6n+4)-k without dropout (Zagoruyko and Komodakis 2016); kaiming-normal (fan out)
    convolutions and a zero head bias.

    float32 images [B, channels, S, S] -> logits [B, classes].
    """

    def __init__(self, depth: int, factor: int, classes: int, channels: int = 3):
        super().__init__()
        blocks, inputs = [], 16
        for stage, width in enumerate([16 * factor, 32 * factor, 64 * factor]):
            for i in range((depth - 4) // 6):
                blocks.append(PreactBlock(inputs, width, 2 if stage > 0 and i == 0 else 1))
                inputs = width
        self.stem = conv(channels, 16, 3)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection, ReLU6, all with bias; a shortcut where the
    shape is kept (Sandler et al. 2018).

    [B, inputs, H, W] -> [B, outputs, H / stride, W / stride], rounded up.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.keeps_shape = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.keeps_shape else y


class MobileNetV2(nn.Module):
    """The papers' MobileNetV2 (Sandler et al. 2018) for small images: a 1x1 stem with padding 1 (32
    -> 34 pixels), every conv with bias.

    float32 images [B, channels, S, S] -> logits [B, classes].
    """

    # expansion, outputs, blocks, stride of the first block
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 1),
        (6, 320, 1, 1),
    )

    def __init__(self, classes: int, channels: int = 3):
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(channels, 32, 1, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU6(inplace=True),
        ]
        inputs = 32
        for expansion, outputs, blocks, stride in self.STAGES:
            for i in range(blocks):
                layers.append(InvertedResidual(inputs, outputs, stride if i == 0 else 1, expansion))
                inputs = outputs
        layers += [nn.Conv2d(inputs, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv2d(1280, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean(dim=(2, 3), keepdim=True)
        return self.head(x).flatten(1)


def small_resnet(depth: int, classes: int, channels: int = 3) -> nn.Module:
    """ResNet-(6n+2) with widths 16, 32, 64 (He et al. 2016, section 4.2)."""
    return CifarResNet(BasicBlock, [(depth - 2) // 6] * 3, [16, 32, 64], classes, channels)


def wide_resnet(block: Block, depths: list[int], classes: int, channels: int = 3) -> nn.Module:
    return CifarResNet(block, depths, [64, 128, 256, 512], classes, channels)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": partial(small_resnet, 8),
    "resnet20": partial(small_resnet, 20),
    "resnet18": partial(wide_resnet, BasicBlock, [2, 2, 2, 2]),
    "resnet34": partial(wide_resnet, BasicBlock, [3, 4, 6, 3]),
    "resnet50": partial(wide_resnet, Bottleneck, [3, 4, 6, 3]),
    "wrn-28-10": partial(WideResNet, 28, 10),
    "mobilenetv2": MobileNetV2,
}


NORMS = ("batch", "group")


def build(name: str, classes: int, norm: str = "batch", channels: int = 3) -> nn.Module:
    """The network `name`, randomly initialised: float32 [B, channels, S, S] in, logits [B, classes]
    out.

    `name` is a key of BUILDERS (resnet8, resnet20, resnet18, resnet34, resnet50, wrn-28-10 or
    mobilenetv2), "torchvision/NAME", "timm/NAME" or "FILE.py:NAME" (from_file). norm is batch, or
    group, with which every BatchNorm2d becomes a GroupNorm. Raises ModelError, a ValueError, where
    the name is unknown, with what may have been meant, timm is missing, own code cannot be used,
    norm is neither, nothing was left to replace, or the network takes no images of so many
    channels: those of torchvision take 3, the others any.
    """
    if norm not in NORMS:
        raise ModelError(f"--norm {norm}: {about_value('--norm', str(norm), NORMS)}")
    if name in BUILDERS:
        model = BUILDERS[name](classes=classes, channels=channels)
    elif ".py:" in name:
        model = from_file(name, classes, channels)
    elif name.startswith("torchvision/"):
        if channels != 3:
            raise ModelError(
                f"--model {name} takes images of 3 channels, these have {channels}: repeat the "
                "channel, or use another --model"
            )
        model = from_torchvision(name.removeprefix("torchvision/"), classes)
    elif name.startswith("timm/"):
        model = from_timm(name.removeprefix("timm/"), classes, channels)
    else:
        from torchvision import models

        near = hint(name, BUILDERS) or hint(name, models.list_models(module=models), "torchvision/")
        every = ", ".join((*BUILDERS, "torchvision/NAME", "timm/NAME", "FILE.py:NAME"))
        raise ModelError(f"--model {name}: {f'{near} There are' if near else 'not one of'} {every}")
    if norm == "group" and replace_batchnorm(model) == 0:
        raise ModelError(f"--norm group: {name} has no BatchNorm2d to replace: leave --norm out")
    return model


# what torchvision is told of GoogLeNet and Inception, which return a tuple in training unless their
# auxiliary heads are off (and warn about the default of init_weights)
QUIRKS = {key: {"aux_logits": False, "init_weights": True} for key in ("googlenet", "inception_v3")}


def from_file(name: str, classes: int, channels: int) -> nn.Module:
    """The network that FILE.py:NAME makes: a class or function that is called with the number of
    classes, as num_classes= where it has such a parameter, else as the first; and with channels= or
    in_chans= where it has that. Raises ModelError."""
    path = owncode.split(name)[0]
    try:
        make = owncode.load(name)
    except owncode.CodeError as error:
        raise ModelError(f"--model {name}: {error}") from None
    if isinstance(make, nn.Module) or not callable(make):
        raise ModelError(
            f"--model {name}: it is of type {type(make).__name__}, no class or function that makes "
            "a network of so many classes"
        )
    inputs = {key: channels for key in ("channels", "in_chans") if owncode.takes(make, key)}
    if owncode.takes(make, "num_classes"):
        positional: tuple[int, ...] = ()
        inputs["num_classes"] = classes
    else:
        positional = (classes,)
    try:
        inspect.signature(make).bind(*positional, **inputs)
    except (TypeError, ValueError) as error:  # ValueError: it has no signature
        raise ModelError(
            f"--model {name}: it is called with the number of classes, which it does not take "
            f"({error})"
        ) from None
    try:
        model = make(*positional, **inputs)
    except Exception as error:
        raise ModelError(f"--model {name}: {owncode.fault(error, path)}") from None
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"--model {name}: it makes a value of type {type(model).__name__}, no torch.nn.Module"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"--model {name}: it has no parameters to train")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ModelError(
            f"--model {name}: it has layers whose size the first batch decides (Lazy...): give "
            "their sizes"
        )
    return model


def from_torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ModelError(
            f"--model torchvision/{name}: torchvision has no such classifier: "
            f"{hint(name, known, 'torchvision/')} "
            'list them with python -c "from torchvision import models; '
            'print(*models.list_models(module=models))"'
        )
    return models.get_model(name, weights=None, num_classes=classes, **QUIRKS.get(name, {}))


def from_timm(name: str, classes: int, channels: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ModelError(
            f"--model timm/{name} needs timm: pip install 'fastsmooth[timm]'"
        ) from None
    if not timm.is_model(name):
        raise ModelError(
            f"--model timm/{name}: timm {timm.__version__} has no such model: "
            f"{hint(name, timm.list_models(), 'timm/')} "
            'list them with python -c "import timm; print(*timm.list_models())"'
        )
    inputs = {} if channels == 3 else {"in_chans": channels}
    try:
        return timm.create_model(name, pretrained=False, num_classes=classes, **inputs)
    except RuntimeError as error:  # the tag after the dot is unknown
        raise ModelError(f"--model timm/{name}: {error} Leave out what follows the dot") from None
    except (TypeError, ValueError, AssertionError) as error:
        if not inputs:
            raise
        words = " ".join(str(error).split())[:200]
        raise ModelError(
            f"--model timm/{name}: it cannot be built for images of {channels} channel"
            f"{'s' * (channels > 1)} ({words}): use another --model"
        ) from None


def own_size(name: str, model: nn.Module) -> int | None:
    """The pixels a side that a network of torchvision or timm was made for; None where it takes
    any, or does not say."""
    if name.startswith("timm/"):
        return (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (None,))[-1]
    if not name.startswith("torchvision/"):
        return None
    size = getattr(model, "image_size", None)  # its published weights may be for a larger one
    if size is not None:
        return size
    from torchvision import models

    return models.get_model_weights(
        name.removeprefix("torchvision/")
    ).DEFAULT.transforms.keywords.get("crop_size")


def replace_batchnorm(model: nn.Module) -> int:
    """Replace every BatchNorm2d by a GroupNorm of 16 channels a group (Wu and He 2018, table 3);
    how many it found.

    Where 16 does not divide the channels, the group is their greatest common divisor with 16.
    """
    found = 0
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                channels = child.num_features
                groups = channels // math.gcd(channels, 16)
                norm = nn.GroupNorm(groups, channels, eps=child.eps)
                # timm's BatchNormAct2d is a BatchNorm2d that goes on through its children, dropout
                # and activation
                rest = list(child.children())
                setattr(parent, key, nn.Sequential(norm, *rest) if rest else norm)
                found += 1
    return found


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
