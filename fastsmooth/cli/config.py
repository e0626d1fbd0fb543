"""Every choice of a run as one frozen Config; flags, TOML files and config.json are all made from
its fields.

Nothing here imports torch, so that --help, --plan and every refusal answer at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

from fastsmooth import course
from fastsmooth.cli import stages
from fastsmooth.cli.facts import (
    ARRAY_SETS,
    FILE_SETS,
    LARGEST_IMAGE,
    NETWORKS,
    PUBLISHED,
    PUBLISHED_FLAGS,
    PUBLISHED_WITH,
    RECIPES,
    SETS,
    SMALL,
    SMALLEST_IMAGE,
    STEP,
    UNSPLIT_SETS,
    USUAL,
    DataSets,
    defaults_of,
    is_among,
    row_of,
)
from fastsmooth.cli.flags import (
    ConfigError,
    OrCode,
    argument,
    budget,
    code,
    device,
    duration,
    every,
    flag,
    folder,
    is_code,
    micro_batch,
    milestone,
    momentum,
    option,
    positive,
    randaugment,
    real,
    sam,
    text,
    warmup,
    weights,
    whole,
    written,
)
from fastsmooth.cli.stages import ByEpoch, Moment, Stage, Stages
from fastsmooth.course import Written
from fastsmooth.forms import FORMS, Form, is_foreign, noise_of
from fastsmooth.runfolder.trackers import TRACKERS
from fastsmooth.schedule import METHODS, SMOOTH, SOLVED, Method

MOST_EPOCHS = 1_000_000  # every epoch is planned before the first
BETA_METHODS = {name for name, method in METHODS.items() if method.changes_momentum}
WITH_BUFFER = {name for name, form in FORMS.items() if form.has_buffer}
WITH_BOUND = {name for name, form in FORMS.items() if form.bounds}
WITH_NU = {name for name, form in FORMS.items() if form.uses_nu}
WITH_K2 = {
    name for name, form in FORMS.items() if any(bound.uses_k2 for bound in form.bounds.values())
}
MODES = ("normal", "critical", "sampling")
FILLED = dataclasses.MISSING  # no default of its own: resolve() takes it from the data set
AUGMENTS = ("none", "crop-flip", "crop-flip-rotate", "resized-crop-flip")
CHUNKED, DALI = {"auto", "dali", "threads", "torch"}, {"auto", "dali"}
# the rows of fastsmooth.noise.quantities.QUANTITIES
QUANTITIES = ("layers", "norm-test", "inner-product", "orthogonality", "cabs", "snr")
WITH_DATA_DIR = SETS.keys() - {"digits"}
# the methods whose rows follow other code than that of --compat original
UNPUBLISHED = {"beta-step", "batch-poly", "exp-batch", "seesaw", "growth"}
# the fields that --schedule may say the values of, by what it calls them
NAMED = {"lr": "lr", "batch": "batch_size", "momentum": "beta", "nu": "nu"}
# the fields that may name own code
WITH_CODE = ("model", "optimizer", "loss")


class ForeignNames(set[str]):
    """The optimizers that are no forms, by how they are named."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and is_foreign(name)


FOREIGN = ForeignNames({"torch/NAME", "timm/NAME", "FILE.py:NAME"})


class Optimizers(tuple[str, ...]):
    """The names that --optimizer takes."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in FORMS or name in FOREIGN)


def using(name: str) -> set[str]:
    """The methods that take this number."""
    return {method for method, row in METHODS.items() if row.takes(name)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, as resolve() makes it.

    What is left to the images is empty until fitted() has seen them (model "", augment "",
    image_size 0), and decay_epoch is 0 until they tell how many epochs --budget takes. None says
    that something is not there, or that the run itself sets it: workers, chunk, out.
    """

    # fmt: off
    dataset: str = option("digits", "data", "what to train on (with --data-dir: auto)", choices=DataSets(SETS), metavar="NAME")
    data_dir: str = option("data", "data", "where the images are, or are downloaded to", text, metavar="DIR", only=("dataset", WITH_DATA_DIR))
    image_size: int | str = option(FILLED, "data", "pixels a side, or stages: '128 @0, 192 @50%' (of a folder: what the images call for)", stages.image_size(SMALLEST_IMAGE, LARGEST_IMAGE), metavar="N", only=("dataset", FILE_SETS | ARRAY_SETS))
    val_share: float | None = option(None, "data", "share of the images held out as test set, where there is no split", real(0, 1, open_low=True, open_high=True), metavar="X", only=("dataset", UNSPLIT_SETS))
    labels: str | None = option(None, "data", "table: the csv or json of names and labels, where there are several; parquet, arrow: the column of labels", text, metavar="FILE", only=("dataset", {"auto", "table", "parquet", "arrow"}))
    augment: str = option(FILLED, "data", "of the training images", choices=AUGMENTS, metavar="NAME")
    loader: str = option("auto", "data", "resident: all images on the device; dali, threads: decode ahead; torch: DataLoader", choices=("auto", "resident", "dali", "threads", "torch"))
    workers: int | None = option(None, "data", "threads or processes that load (one a processor)", whole(0, 256), metavar="N", only=("loader", CHUNKED))
    chunk: int | None = option(None, "data", "samples decoded together (512, on CUDA 2048; files 64, on CUDA 128)", whole(1, 1 << 16), metavar="N", only=("loader", CHUNKED))
    on_bad_image: str = option("raise", "data", "raise: stop; zeros: serve it black and count it", choices=("raise", "zeros"), only=("dataset", FILE_SETS))
    decode: str = option("full", "data", "of JPEGs; reduced: at 1/2, 1/4 or 1/8 of their size where no more is wanted, for large photographs", choices=("full", "reduced"), only=("loader", {"auto", "resident", "threads", "torch"}))
    hw_decoder_load: float = option(0.65, "data", "dali on CUDA: share of the hardware decoder", real(0, 1), metavar="X", only=("loader", DALI))
    decoder_device_memory: int = option(16, "data", "dali on CUDA: MB that a decoder's buffers begin with", whole(0, 65536), metavar="MB", only=("loader", DALI))
    decoder_host_memory: int = option(8, "data", "the same in host memory", whole(0, 65536), metavar="MB", only=("loader", DALI))
    drop_last: bool = option(False, "data", "drop the last partial batch of an epoch")

    model: str = option(FILLED, "model", "resnet8 resnet20 resnet18 resnet34 resnet50 wrn-28-10 mobilenetv2 torchvision/NAME timm/NAME FILE.py:NAME", code, metavar="NAME")
    norm: str = option("batch", "model", "normalisation layers", choices=("batch", "group"))
    sync_bn: bool = option(False, "model", "several processes: BatchNorm over the batch of all of them", only=("norm", {"batch"}))
    micro_batch: int | str | None = option(None, "model", "at most so many samples through the model together, to save memory; auto: as many as fit", micro_batch, metavar="N")
    init: str | None = option(None, "model", "weights to begin with: a file, a run folder, or pretrained (torchvision/ and timm/ networks)", weights, metavar="FILE|RUN")
    freeze: tuple[str, ...] | None = option(None, "model", "parameters that stay as they are, by name: stem, '*.bias'", text, metavar="PATTERN", many=True)

    method: str = option("constant", "schedule", "how lr, batch and momentum change", choices=(*METHODS, "sampling"), metavar="METHOD")
    schedule: str | None = option(None, "schedule", "in place of --method: 'lr: 0.1 @0, 0.05 @40ep; batch: 32 @0, 64 @50%'; -> ->cos ->exp: ramps", written, metavar="TEXT")
    epochs: int = option(FILLED, "schedule", "passes over the data", whole(1, MOST_EPOCHS), metavar="N")
    budget: str | None = option(None, "schedule", "in place of --epochs: epochs=N, updates=N or samples=N", budget, metavar="WHAT=N")
    lr: float = option(FILLED, "schedule", "learning rate at the start", positive, metavar="X")
    batch_size: int = option(FILLED, "schedule", "batch size at the start", whole(1), names=("-b", "--batchsize"), metavar="N")
    decay_epoch: int = option(FILLED, "schedule", "epochs between steps (a fifth of --epochs)", whole(1), metavar="N", only=("method", using("decay_epoch")))
    power: float = option(0.9, "schedule", "exponent of poly and of the momentum schedules", positive, metavar="P", only=("method", using("power")))
    gamma: float = option(0.9, "schedule", "factor an epoch of exp", real(0, 1, open_low=True), metavar="G", only=("method", using("gamma")))
    milestones: tuple[str, ...] | None = option(None, "schedule", "epochs of the steps, in the place of --decay-epoch: 60 120 160, or 30% 60%", milestone, metavar="WHEN", many=True, only=("method", using("milestones")))
    factor: float = option(FILLED, "schedule", "at every step, of lr (step 0.1, lr 0.707, seesaw 0.5 of its cut), batch (2, hybrid 1.5) or momentum (0.9)", positive, metavar="X", only=("method", using("factor")))
    lr_factor: float = option(1.4, "schedule", "of lr at every step of growth", positive, metavar="X", only=("method", using("lr_factor")))
    lr_min: float = option(0.0, "schedule", "where cosine and poly end", real(0), metavar="X", only=("method", using("lr_min")))
    per: str = option("epoch", "schedule", "how often smooth methods change: with every epoch or every update", choices=("epoch", "update"), only=("method", SMOOTH))
    warmup: str | None = option(None, "schedule", "lr rises from near 0 over so many updates (500) or epochs (5ep)", warmup, metavar="N|Nep")
    patience: int | None = option(None, "schedule", "end the run after so many epochs without a better test accuracy", whole(1, MOST_EPOCHS), metavar="N")
    c2: float | None = option(None, "schedule", "gradient variance C^2 behind delta", positive, metavar="X", only=("optimizer", WITH_BOUND))
    k2: float | None = option(None, "schedule", "squared gradient norm K^2 behind delta", real(0), metavar="X", only=("optimizer", WITH_K2))
    nshb_delta: str = option("v3", "schedule", "published form of the NSHB delta", choices=sorted(FORMS["nshb"].bounds), only=("optimizer", {"nshb"}))
    compat: str = option("none", "schedule", "original: the published code's shifted indices", choices=("none", "original"))

    optimizer: str = option("sgd", "optimizer", "update rule", code, choices=Optimizers((*FORMS, *sorted(FOREIGN, reverse=True))), metavar="NAME")
    beta: float = option(0.9, "optimizer", "momentum", momentum, names=("--beta1", "--momentum"), metavar="X", only=("optimizer", WITH_BUFFER))
    nu: float | str = option(0.5, "optimizer", "mixing factor of qhm, or stages: '0.9 @0, 0.5 @50%'", stages.number(real(0, 1)), metavar="X", only=("optimizer", WITH_NU))
    weight_decay: float = option(0.0, "optimizer", "L2 penalty added to the gradient; of torch/, timm/ and own optimizers what they make of it", real(0), metavar="X")
    decay_weights_only: bool = option(False, "optimizer", "no weight decay on norms and biases")
    clip_norm: float | None = option(None, "optimizer", "largest norm of the gradient: a longer one is scaled down to it", positive, metavar="X")
    optimizer_args: tuple[str, ...] | None = option(None, "optimizer", "of torch/, timm/ and own optimizers: betas=0.9,0.95 eps=1e-6", argument, metavar="NAME=VALUE", many=True, only=("optimizer", FOREIGN))
    sam: str | None = option(None, "optimizer", "sharpness-aware minimisation: rho=0.05; GSAM: rho=0.05,alpha=0.2", sam, metavar="rho=X")

    recipe: str | None = option(None, "recipe", "flags of a public reference, which others given override", choices=tuple(RECIPES), metavar="NAME")
    loss: str = option("cross-entropy", "recipe", "what is minimised; bce: binary cross-entropy, a class each", code, choices=OrCode(("cross-entropy", "bce", "FILE.py:NAME")), metavar="NAME")
    label_smoothing: float = option(0.0, "recipe", "share of the target spread over all classes", real(0, 1, open_high=True), metavar="X")
    mixup: float = option(0.0, "recipe", "mix pairs of images by a share from Beta(X, X)", real(0), metavar="X")
    cutmix: float = option(0.0, "recipe", "paste a box of another image, its share from Beta(X, X)", real(0), metavar="X")
    randaugment: str | None = option(None, "recipe", "N random operations of magnitude M (0 to 30) on each image: 2,9", randaugment, metavar="N,M")
    random_erasing: float = option(0.0, "recipe", "erase a random box of an image, with this probability", real(0, 1), metavar="P")
    ema: float | None = option(None, "recipe", "average of the weights with this decay an update, evaluated beside them: 0.999", real(0, 1, open_low=True, open_high=True), metavar="X")
    top5: bool = option(False, "recipe", "test accuracy within the five likeliest classes as well")

    mode: str = option("normal", "measure", "train, find first crossings, or sample noise", choices=MODES)
    eps: tuple[float, ...] = option((0.5,), "measure", "critical: thresholds", positive, metavar="X", many=True, only=("mode", {"critical"}))
    criterion: str = option("mean-norm", "measure", "critical: what must fall below eps", choices=("mean-norm", "rms-norm", "full-grad"), only=("mode", {"critical"}))
    min_epochs: int = option(FILLED, "measure", "critical: no crossing counts before", whole(0), metavar="N", only=("mode", {"critical"}))
    full_grad_every: int | None = option(None, "measure", "critical, full-grad: updates between looks (an epoch)", whole(1), metavar="N", only=("criterion", {"full-grad"}))
    steps: tuple[int, ...] = option(FILLED, "measure", "sampling: updates before each measurement", whole(0), metavar="N", many=True, only=("mode", {"sampling"}))
    draws: int = option(FILLED, "measure", "sampling: directions drawn at each point (16; with momentum 8, each after a history of its own)", whole(2, 65535), metavar="N", only=("mode", {"sampling"}))
    track_noise: str | None = option(None, "measure", "C2, noise scale and delta of training batches: every=50 updates, every=2ep", every, metavar="WHEN")
    estimator: str = option("auto", "measure", "of --track-noise; auto: per-sample where BatchNorm allows it", choices=("auto", "per-sample", "micro-batch"))
    quantities: tuple[str, ...] | None = option(None, "measure", "what else per-sample gradients say, in the rows of --track-noise", choices=QUANTITIES, metavar="NAME", many=True)
    measure: str = option("auto", "measure", "per-sample: apart from the update, or as its step; auto: as the step on a GPU", choices=("auto", "apart", "step"))
    bn: str = option("train", "measure", "BatchNorm while measuring; per-sample: batch, frozen or eval", choices=("train", "eval", "batch", "frozen"))
    measure_augment: bool = option(False, "measure", "measure on augmented images")
    save_omega: bool = option(False, "measure", "sampling: keep the noise vectors, omega-<step>.npy", only=("mode", {"sampling"}))

    seed: int = option(0, "run", "of weights, order and augmentation", whole(0), metavar="N")
    device: str = option("auto", "run", "auto, cpu, cuda, cuda:N or mps", device, metavar="DEV")
    compile: str = option("auto", "run", "torch.compile; auto: on CUDA only", choices=("auto", "on", "off"))
    kernels: str = option("auto", "run", "native: C++, on CPUs; triton: on NVIDIA GPUs; reference: plain PyTorch", choices=("auto", "native", "triton", "reference"))
    graphs: str = option("auto", "run", "the update as one CUDA graph; auto: of small batches that last, on one GPU", choices=("auto", "on", "off"))
    precision: str = option("auto", "run", "of the forward and backward pass; auto: tf32 on a GPU that has it, else fp32", choices=("auto", "fp32", "tf32", "bf16"))
    deterministic: bool = option(False, "run", "same bits on every run of a GPU, slower")
    out: str | None = option(None, "run", "run folder (runs/<time>-<dataset>-<method>)", text, metavar="DIR")
    resume: bool = option(False, "run", "go on with the run in --out")
    extend: str | None = option(None, "run", "a finished run to go on from, for --epochs more, in a folder of its own", folder, metavar="RUN")
    keep: str = option("best", "run", "weights that stay: of the best epoch and the last, the last alone, or of every epoch", choices=("best", "last", "all"))
    checkpoint_every: int | None = option(None, "run", "updates between checkpoints (an epoch)", whole(1), metavar="N")
    log_every: int = option(50, "run", "updates between step rows", whole(1), metavar="N")
    max_time: float | None = option(None, "run", "save and stop after: 90, 45s, 30m, 1.5h", duration, metavar="T")
    tracker: tuple[str, ...] | None = option(None, "run", "where rows go besides the run folder", choices=(*TRACKERS, "none"), metavar="NAME", many=True)
    wandb_mode: str | None = option(None, "run", "of wandb; auto: online with a key, else offline", choices=("off", "auto", "offline", "online"))
    wandb_project: str = option("fastsmooth", "run", "project, of wandb and trackio", text, names=("--tracker-project",), metavar="NAME")
    wandb_entity: str | None = option(None, "run", "wandb entity", text, metavar="NAME")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)

    @property
    def momentum(self) -> float:
        """The optimizer's momentum at the start: beta, or 0 for plain SGD; 0 where the momentum is
        a foreign optimizer's own affair."""
        return self.beta if self.form.has_buffer else 0.0

    @property
    def form(self) -> Form:
        """What is known of the optimizer's direction."""
        return noise_of(self.optimizer)

    @property
    def foreign(self) -> bool:
        """Whether the optimizer is none of the forms."""
        return is_foreign(self.optimizer)

    @property
    def keeps_history(self) -> bool:
        """Whether a direction may depend on the updates before it."""
        return self.momentum > 0 or self.foreign or max(self.values("momentum"), default=0) > 0

    @cached_property
    def written(self) -> Written | None:
        """What --schedule says."""
        return None if self.schedule is None else course.read(self.schedule)

    def values(self, name: str) -> tuple[float, ...]:
        """Of what --schedule says of lr, batch, momentum or nu; none where it says nothing."""
        named = self.written.by_name if self.written else {}
        return named[name].values if name in named else ()

    @property
    def followed(self) -> str:
        """The method, or what takes its place, in a word."""
        return self.method if self.schedule is None else "schedule"

    @property
    def own_code(self) -> dict[str, str]:
        """What is named as FILE.py:NAME, by its field."""
        named = {name: getattr(self, name) for name in WITH_CODE}
        return {name: value for name, value in named.items() if is_code(value)}

    @property
    def nu_stages(self) -> Stages[float]:
        """The nu of qhm, and when each begins."""
        if isinstance(self.nu, str):
            return stages.numbers(self.nu)
        return (Stage(self.nu, Moment(Decimal(0), "epochs")),)

    @property
    def nus(self) -> ByEpoch[float]:
        """The same by epoch. Raises ConfigError for one that no epoch would have."""
        return stages.by_epoch(self.nu_stages, self.epochs, flag("nu"))

    @property
    def changes(self) -> str:
        """In words what training images are that test images are not, as far as it is settled;
        mixed ones are made of these."""
        names = [self.augment] if self.augment not in ("", "none") else []
        names += [f"randaugment {self.randaugment}"] if self.randaugment else []
        names += [f"random erasing {self.random_erasing:g}"] if self.random_erasing else []
        return ", ".join(names)

    @property
    def samples_at_once(self) -> int | None:
        """What --micro-batch says, once `auto` is resolved; None: as many as a batch has."""
        return self.micro_batch if isinstance(self.micro_batch, int) else None

    @property
    def plain_update(self) -> bool:
        """Whether the update follows the mini-batch gradients of one loss, which delta is of: not
        where their length, their place or their images are changed. Elsewhere delta is None."""
        return not (self.sam or self.clip_norm or self.mixup or self.cutmix)

    @property
    def loss_in_words(self) -> str:
        """What training minimises and measurements differentiate, of one sample."""
        names = {"bce": "binary cross-entropy of each class"}
        smoothed = f" with label smoothing {self.label_smoothing:g}" * bool(self.label_smoothing)
        return names.get(self.loss, self.loss) + smoothed

    @property
    def bound_version(self) -> str | None:
        """Of the noise bound behind delta, where --nshb-delta names one."""
        return self.nshb_delta if self.optimizer == "nshb" else None

    @property
    def images(self) -> int | None:
        """Training images, where that is known before the data set is opened."""
        return SETS[row_of(self.dataset)].train

    @property
    def image_stages(self) -> Stages[int]:
        """The sizes of the images, in pixels a side, and when each begins."""
        if isinstance(self.image_size, str):
            return stages.sizes(self.image_size)
        return (Stage(self.image_size, Moment(Decimal(0), "epochs")),)

    @property
    def sizes(self) -> ByEpoch[int]:
        """The same by epoch, of so many as the run has now. The last of them is that of all images
        that are not trained on. Raises ConfigError for a size that no epoch would have."""
        return stages.by_epoch(self.image_stages, self.epochs, flag("image_size"))

    @property
    def limit(self) -> tuple[str, int] | None:
        """What --budget says: epochs, updates or samples, and how many."""
        unit, _, amount = (self.budget or "").partition("=")
        return (unit, int(amount)) if unit else None

    @property
    def smallest_batch(self) -> int:
        """Of all updates, but for what epochs leave over."""
        return int(min(self.values("batch"), default=self.batch_size))

    @property
    def largest_batch(self) -> int:
        """That is asked for by name: a method may come to a larger one."""
        return int(max(self.values("batch"), default=self.batch_size))

    @property
    def warmup_length(self) -> tuple[int, str]:
        """What --warmup says: how many, and of what: updates or epochs."""
        said = self.warmup or "0"
        return int(said.removesuffix("ep")), "epochs" if said.endswith("ep") else "updates"

    @property
    def assumed(self) -> tuple[str, ...]:
        """The constants of delta taken as 1: neither given nor published for this setting."""
        if not self.form.bounds:
            return ()  # there is no delta
        missing = {"c2": self.c2 is None, "k2": self.k2 is None and uses_k2(self)}
        return tuple(name for name, is_missing in missing.items() if is_missing)

    @property
    def delta_unit(self) -> str:
        """What follows a delta: nothing where its constants are known."""
        return {(): "", ("c2",): " C"}.get(self.assumed, f" ({' = '.join([*self.assumed, '1'])})")

    @property
    def trackers(self) -> tuple[str, ...]:
        """Where rows go besides the run folder. --wandb-mode alone says wandb, as it did before
        there was --tracker; `off` takes wandb out."""
        named = self.tracker or ()
        if self.tracker is None and self.wandb_mode is not None:
            named = ("wandb",)
        left = {"none", "wandb"} if self.wandb_mode == "off" else {"none"}
        return tuple(name for name in named if name not in left)

    def to_json(self) -> dict[str, Any]:
        """The fields as config.json holds them."""
        values = dataclasses.asdict(self).items()
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values}


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
# what says how a method goes, and the method
OF_METHOD = {"method"} | {
    name for name, f in FIELDS.items() if (f.metadata["only"] or ("",))[0] == "method"
}
# Whose `auto` is resolved once: what it chose is in the checkpoints, and a run that goes on uses it
# again.
RESOLVED_ONCE = (
    "device", "loader", "compile", "precision", "kernels", "estimator", "measure", "micro_batch",
)  # fmt: skip
# Where a run's files and rows go, and when it stops.
WHEREABOUTS = {"out", "resume", "max_time"}
WHEREABOUTS |= {"tracker", "wandb_mode", "wandb_project", "wandb_entity"}
# What may differ between the two halves of an interrupted run: nothing that changes a bit of its
# result.
FREE_ON_RESUME = WHEREABOUTS | {"data_dir", "workers", "graphs"}


def check(c: Config) -> None:
    """Refuse contradictions that no default can resolve."""
    if c.images is not None:
        check_largest_batch(c, c.images)
    if c.method in SOLVED and c.optimizer not in WITH_BOUND:
        fitting = WITH_BOUND & WITH_BUFFER if c.method in BETA_METHODS else WITH_BOUND
        raise ConfigError(
            f"--method {c.method} is solved for delta, which is not known of {c.optimizer}: choose "
            f"--optimizer {listed(fitting)}, or a method that is not solved"
        )
    check_arguments(c)
    if len(c.nu_stages) > 1:
        if c.mode == "critical":
            raise ConfigError("--mode critical holds the noise fixed: give --nu one value")
        if c.budget is None:  # else only the images tell how many epochs there are
            _ = c.nus
    if is_code(c.loss) and c.label_smoothing:
        raise ConfigError(
            f"--label-smoothing is of the losses that come along, not of {c.loss}: leave it out, "
            "and smooth the targets there"
        )
    if c.method in BETA_METHODS and c.optimizer not in WITH_BUFFER:
        raise ConfigError(
            f"--method {c.method} changes the momentum: choose --optimizer "
            f"{listed(WITH_BUFFER & WITH_BOUND)}"
        )
    if c.method in BETA_METHODS and c.beta == 0:
        raise ConfigError(
            f"--method {c.method} lowers the momentum, which --beta 0 leaves no room for: raise "
            "--beta"
        )
    if c.compat == "original" and c.method in UNPUBLISHED:
        raise ConfigError(
            f"--compat original has the curves of published code, and --method {c.method} is none "
            "of them: leave --compat out"
        )
    if c.mode == "critical" and c.method != "constant":
        raise ConfigError(
            f"--mode critical holds the noise fixed: use --method constant, not {c.method}"
        )
    check_schedule(c)
    if c.mode == "sampling" and c.budget is not None:
        raise ConfigError(
            "--budget has no meaning with --mode sampling, which ends at the last of --steps: use "
            "--epochs"
        )
    check_step(c)
    if c.init is not None or c.extend is not None:
        check_beginning(c)
    if len(c.image_stages) > 1:
        check_stages(c)
    if "none" in (c.tracker or ()) and len(c.tracker or ()) > 1:
        raise ConfigError("--tracker none goes with no other: leave it or the others out")
    things = {"steps": "update", "eps": "threshold", "quantities": "quantity", "tracker": "tracker"}
    for name, thing in things.items():
        values = getattr(c, name) or ()
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"--{name} names {twice} more than once: give every {thing} once")
    for name in ("estimator", "measure"):
        if getattr(c, name) != "auto" and c.track_noise is None:
            raise ConfigError(f"--{name} has no effect without --track-noise every=N")
    if c.quantities and (c.track_noise is None or c.estimator == "micro-batch"):
        raise ConfigError(
            "--quantities are of per-sample gradients: they need --track-noise every=N, and not "
            "--estimator micro-batch"
        )
    if "cabs" in (c.quantities or ()) and (c.momentum or c.foreign):
        raise ConfigError(
            "--quantities cabs is a rule of SGD without momentum: leave cabs out, or use "
            "--optimizer sgd"
        )
    if c.bn in ("batch", "frozen"):
        if c.track_noise is None or c.estimator == "micro-batch":
            raise ConfigError(
                f"--bn {c.bn} is a choice of per-sample gradients: it needs --track-noise every=N"
            )
        if c.mode == "sampling" or c.criterion == "full-grad":
            raise ConfigError(
                f"--bn {c.bn} has no meaning for a full gradient: use --bn train or eval"
            )
    if c.mode == "sampling" and c.bn == "eval" and c.keeps_history:
        raise ConfigError(
            f"--bn eval with {c.optimizer}: its direction is made of gradients in training mode, "
            "which the gradient in evaluation mode is not the mean of: use --bn train, or "
            "--optimizer sgd"
        )
    if c.sync_bn and c.micro_batch is not None:
        raise ConfigError(
            "--sync-bn wants the whole batch at once, --micro-batch cuts it: leave one of them out"
        )
    if c.foreign and c.graphs == "on":
        raise ConfigError(
            f"--graphs on captures the updates of our forms, not of {c.optimizer}: leave --graphs "
            "out"
        )
    if c.sync_bn and c.compile == "on":
        raise ConfigError(
            "--sync-bn exchanges numbers within the forward pass, which --compile on cannot: leave "
            "one out"
        )
    if c.sync_bn and c.track_noise is not None:
        raise ConfigError(
            "--track-noise measures parts of a batch, which --sync-bn mixes: leave --sync-bn out"
        )
    if c.loader == "resident" and c.augment == "resized-crop-flip":
        raise ConfigError("--augment resized-crop-flip decodes whole images: use --loader torch")
    for name in ("mixup", "cutmix"):
        if getattr(c, name):
            check_mixed(c, name)
    for name, value in (("augment", "resized-crop-flip"), ("decode", "reduced")):
        if not is_among(c.dataset, FILE_SETS) and getattr(c, name) == value:
            raise ConfigError(f"{flag(name)} {value} needs image files: {c.dataset} has none")


def check_largest_batch(c: Config, images: int) -> None:
    """Refuse a batch of more than there are."""
    if c.batch_size > images:
        raise ConfigError(
            f"--batchsize {c.batch_size} exceeds the {images} training images of {c.dataset}: lower "
            "--batchsize"
        )
    if c.largest_batch > images:
        raise ConfigError(
            f"--schedule: batch {c.largest_batch} exceeds the {images} training images of "
            f"{c.dataset}: lower it"
        )


def check_mixed(c: Config, name: str) -> None:
    """Refuse what has no meaning for a batch of mixed images: its samples are not independent, so
    its variance is not that of one of them by the number of them."""
    for other, value in (("mode", c.mode), ("track_noise", c.track_noise)):
        if value not in (None, "normal"):
            raise ConfigError(
                f"{flag(other)} {value} measures the noise of independent samples, and those of a "
                f"batch that {flag(name)} mixes are not: leave one of them out"
            )
    if c.smallest_batch == 1:
        where = "--batchsize 1" if c.batch_size == 1 else "--schedule with batch 1"
        raise ConfigError(
            f"{flag(name)} mixes the images of a batch, and {where} has but one: raise "
            f"{where.removesuffix(' 1')}"
        )


def check_step(c: Config) -> None:
    """Refuse measurements of a plain step of one that is not, and a choice of nothing."""
    if c.sam and c.mode != "normal":
        raise ConfigError(
            f"--mode {c.mode} is of the plain step along a mini-batch gradient, which --sam "
            "replaces: leave one of them out"
        )
    if c.sam and c.measure == "step":
        raise ConfigError(
            "--measure step: the update of --sam is along another gradient than the batch's: use "
            "--measure apart"
        )
    if c.clip_norm and c.mode != "normal":
        raise ConfigError(
            f"--mode {c.mode} is of updates along mini-batch gradients as they are, which "
            "--clip-norm shortens: leave one of them out"
        )
    if "cabs" in (c.quantities or ()) and (c.sam or c.clip_norm):
        name = "sam" if c.sam else "clip_norm"
        raise ConfigError(
            f"--quantities cabs is a rule of plain SGD, which {flag(name)} changes: leave one of "
            "them out"
        )
    if c.decay_weights_only and not c.weight_decay:
        raise ConfigError("--decay-weights-only has no effect without --weight-decay X")


def check_schedule(c: Config) -> None:
    """Refuse steps, a warm-up and a patience that the run cannot have."""
    if c.written is not None:
        check_written(c, c.written)
    if c.mode == "critical" and c.warmup is not None:
        raise ConfigError(
            f"--mode critical holds the noise fixed, which --warmup {c.warmup} changes: leave "
            "--warmup out"
        )
    if c.patience is not None and c.mode != "normal":
        raise ConfigError(
            f"--patience ends a run by its test accuracy, --mode {c.mode} by what it measures: "
            "leave --patience out"
        )
    row = METHODS[c.method]
    if row.takes("factor") and not row.takes_factor(c.factor):
        raise ConfigError(
            f"--factor {c.factor:g} is out of range: of --method {c.method} it is {row.factors}"
        )
    if row.takes("lr_min") and c.lr_min > c.lr:
        raise ConfigError(
            f"--lr-min {c.lr_min:g} is above --lr {c.lr:g}, from which --method {c.method} falls to "
            "it: lower it"
        )
    if c.per == "update" and c.compat == "original":
        raise ConfigError("--compat original changes with every epoch: leave it or --per out")
    if row.uses == "milestones" and not c.milestones:
        raise ConfigError(
            f"--method {c.method} needs the epochs of its steps: give --milestones, such as 30% "
            "60% 80%"
        )
    if c.budget is None:  # else only the images tell how many epochs there are
        check_length(c)


def check_written(c: Config, written: Written) -> None:
    """Refuse a --schedule of what the optimizer or the mode has no use for."""
    for name, having in (("momentum", WITH_BUFFER), ("nu", WITH_NU)):
        if name in written.by_name and c.optimizer not in having:
            one = FORMS[c.optimizer].name if c.optimizer in FORMS else c.optimizer
            raise ConfigError(
                f"--schedule says what {name} is, and {one} has none: leave it out, or use "
                f"--optimizer {listed(having) if len(having) > 1 else next(iter(having))}"
            )
    if c.mode == "critical" and written.changes:
        raise ConfigError(
            f"--mode critical holds the noise fixed, which --schedule {c.schedule!r} changes: leave "
            "--schedule out"
        )
    if c.compat == "original":
        raise ConfigError(
            "--compat original is of the published methods: leave it or --schedule out"
        )


def check_length(c: Config) -> None:
    """Refuse steps and a warm-up that the epochs of the run, which are known, do not hold."""
    if c.written is not None:
        refuse(c.written.check_epochs, c.epochs)
    if c.milestones and c.method in using("milestones"):
        stages.increasing_epochs(c.milestones, c.epochs, flag("milestones"))
    amount, unit = c.warmup_length
    if unit == "epochs" and amount > c.epochs:
        raise ConfigError(
            f"--warmup {c.warmup} is longer than the run of {c.epochs} epochs: lower it, or train "
            "for more epochs"
        )


def refuse(check: Callable[..., None], *given: Any) -> None:
    """Raises ConfigError where a check of --schedule raises ValueError."""
    try:
        check(*given)
    except ValueError as error:
        raise ConfigError(f"--schedule: {error}") from None


def check_beginning(c: Config) -> None:
    """Refuse weights that are not to be had, and a run to go on from with what it cannot have."""
    if c.init == "pretrained" and c.model and not c.model.startswith(("torchvision/", "timm/")):
        raise ConfigError(
            f"--init pretrained: no pretrained weights are published for {c.model}: use a network "
            "of torchvision/ or timm/, give a file as --init FILE, or leave --init out"
        )
    if c.extend is not None and c.init is not None:
        raise ConfigError(
            "--extend goes on with the weights of its run, and --init has others: give one of them"
        )
    if c.extend is not None and c.mode != "normal":
        raise ConfigError(
            f"--extend trains a run on, and --mode {c.mode} measures one from its beginning: leave "
            "one of them out"
        )


def check_arguments(c: Config) -> None:
    """Refuse --optimizer-args that say something twice, or what another flag says."""
    names = [text.partition("=")[0] for text in c.optimizer_args or ()]
    for name, other in (("lr", "lr"), ("weight_decay", "weight_decay"), ("params", "freeze")):
        if name in names:
            raise ConfigError(f"--optimizer-args {name}: what it is says {flag(other)}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--optimizer-args gives {twice} more than once: give it once")


def check_stages(c: Config) -> None:
    """Refuse images of several sizes where one is needed, and sizes that no epoch would have."""
    one = f"give --image-size one size, such as {c.image_stages[-1].value}"
    if c.mode != "normal":
        raise ConfigError(
            f"--mode {c.mode} measures one function of the parameters, which is another one for "
            f"each of --image-size {c.image_size}: {one}"
        )
    if row_of(c.dataset) in ARRAY_SETS and not is_among(c.dataset, FILE_SETS):
        raise ConfigError(
            f"--image-size {c.image_size} decodes image files at each size, and {c.dataset} is an "
            f"array of pixels: {one}"
        )
    if c.graphs == "on":
        raise ConfigError(
            f"--graphs on plays again updates of one image size, and --image-size {c.image_size} "
            f"has several: leave --graphs out, or {one}"
        )
    if c.budget is None:  # else only the images tell how many epochs there are
        _ = c.sizes


def resolve(given: dict[str, Any]) -> Config:
    """Fill what was not given: first from the data set, then from the published constants."""
    given, effective = fill(given)
    refuse_idle(given, effective)
    return with_constants(effective)


def without_idle(given: dict[str, Any]) -> dict[str, Any]:
    """What was given, less the flags that have no effect with the others."""
    given, effective = fill(given)
    return {name: value for name, value in given.items() if name not in idle(given, effective)}


def fill(given: dict[str, Any]) -> tuple[dict[str, Any], Config]:
    """What was given in its plainest form, and its Config with the data set's defaults."""
    given = dict(given)
    if given.get("method") == "sampling":
        if given.setdefault("mode", "sampling") != "sampling":
            raise ConfigError(
                f"--method sampling means --mode sampling, but --mode is {given['mode']}"
            )
        given["method"] = "constant"
    if "data_dir" in given:
        given.setdefault("dataset", "auto")
    recipe = recipe_of(given)
    values = defaults_of(given.get("dataset", "digits")) | recipe | given
    if values.get("schedule") is not None:
        values = by_schedule(given, values)
    if values["image_size"]:
        values = suited(values)
    # without momentum all draws share one full gradient; with it each draw is the end of a history
    # of its own and needs one more
    optimizer = values.get("optimizer", "sgd")
    momentum = values.get("beta", 0.9) if optimizer in WITH_BUFFER else 0.0
    values.setdefault("draws", 8 if momentum else 16)
    if "budget" in given and "epochs" in given:
        raise ConfigError("--epochs and --budget both say how long to train: give one of them")
    # a budget's epochs are not known yet
    values.setdefault("factor", METHODS.get(values.get("method", "constant"), Method()).factor)
    if "decay_epoch" in given and given.get("milestones") is not None:
        raise ConfigError(
            "--decay-epoch and --milestones both say when steps are: give one of them"
        )
    values.setdefault("decay_epoch", 0 if "budget" in given else max(1, values["epochs"] // 5))
    try:
        return given, follow_augmentation(Config(**values))
    except ConfigError as error:
        if any(re.search(rf"{flag(name)}\b(?!-)", str(error)) for name in recipe):
            raise ConfigError(f"--recipe {given['recipe']}: {error}") from None
        raise


def by_schedule(given: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values with what --schedule begins with. Raises ConfigError where something else that is
    given says it too."""
    if given.get("method", "constant") != "constant":
        raise ConfigError(
            f"--schedule and --method {given['method']} both say how lr and batch go: give one of "
            "them"
        )
    words = course.read(values["schedule"])
    firsts = {NAMED[name]: words.first(name) for name in words.by_name}
    for name, value in firsts.items():
        if name in given and given[name] != value:
            raise ConfigError(
                f"{flag(name)} {given[name]} is not what --schedule begins with ({value:g}): leave "
                f"{flag(name)} out"
            )
    return values | firsts


def recipe_of(given: dict[str, Any]) -> dict[str, Any]:
    """What --recipe adds to the flags that were given: of its own those that they leave an
    effect."""
    recipe = RECIPES.get(given.get("recipe", ""), {})
    by_hand = given.get("schedule") is not None
    if by_hand or given.get("method", recipe.get("method")) != recipe.get("method"):
        recipe = {name: value for name, value in recipe.items() if name not in OF_METHOD}
    values = recipe | given
    limits = {name: FIELDS[name].metadata["only"] for name in recipe.keys() - given.keys()}
    others = {name: only for name, only in limits.items() if only is not None}
    without = {
        name
        for name, (other, needed) in others.items()
        if not is_among(str(values.get(other, FIELDS[other].default)), needed)
    }
    return {name: recipe[name] for name in recipe if name in limits.keys() - without}


def suited(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the network and the augmentation that images of their size, the largest if
    it changes, call for, where none was given."""
    size = values["image_size"]
    if isinstance(size, str):
        size = max(stage.value for stage in stages.sizes(size))
    network = next(name for largest, name in NETWORKS.items() if size <= largest)
    augment = "crop-flip" if size <= SMALL else "resized-crop-flip"
    if values.get("dataset") == "auto" and size > SMALL:
        augment = ""  # arrays have no more pixels to crop, and whether they are some is not known
    return values | {"model": values["model"] or network, "augment": values["augment"] or augment}


def fitted(c: Config, side: int) -> Config:
    """`c` with what was left to the images, whose shorter side has `side` pixels, of --image-size,
    --model and --augment.

    Images up to SMALL pixels are taken as they are, larger ones at a multiple of STEP. A network
    for small images (all but torchvision's, timm's and own ones) is given SMALL pixels at the most.
    """
    any_size = c.model.startswith(("torchvision/", "timm/")) or is_code(c.model)
    small = side <= SMALL or (c.model != "" and not any_size)
    size = min(max(side, SMALLEST_IMAGE), SMALL) if small else min(side // STEP * STEP, USUAL)
    asked = c.augment or defaults_of(c.dataset)["augment"]
    values = suited({"image_size": c.image_size or size, "model": c.model, "augment": asked})
    return follow_augmentation(dataclasses.replace(c, **values))


def follow_augmentation(c: Config) -> Config:
    """`c` whose direction is measured on augmented images where what it keeps of the
    updates before is made of gradients of augmented ones."""
    follows = c.mode == "sampling" and c.keeps_history and c.changes != ""
    return dataclasses.replace(c, measure_augment=True) if follows else c


def with_constants(c: Config) -> Config:
    """`c` with the published C^2 and K^2 where none were given; a schedule that is solved from them
    refuses to guess."""
    as_published = all(getattr(c, name) == value for name, value in PUBLISHED_WITH.items())
    c2, k2 = PUBLISHED.get(setting(c), (None, None)) if as_published else (None, None)
    if c.c2 is not None and not uses_k2(c):
        k2 = None  # a C^2 of one's own, and nothing that the published K^2 enters
    c = dataclasses.replace(c, c2=c2 if c.c2 is None else c.c2, k2=k2 if c.k2 is None else c.k2)
    if c.method in SOLVED and uses_k2(c) and c.assumed:
        raise ConfigError(
            f"--method {c.method} with {c.optimizer} is solved from the noise constants, and none "
            f"are published for {setting_of(c)}: give --c2 and --k2 (measure them with --mode "
            "sampling)"
        )
    return c


def setting(c: Config) -> tuple[str, str, str, float, float]:
    """What the constants are published by."""
    return c.dataset, c.optimizer, c.model, c.lr, c.momentum


def setting_of(c: Config) -> str:
    """The same in words, with what keeps published constants from it."""
    # of a folder's images before they are looked at
    network = f" with {c.model}" if c.model else ""
    beta = f", beta {c.beta:g}" if c.momentum else ""
    words = f"{c.optimizer}{network} on {c.dataset} at lr {c.lr:g}{beta}"
    if setting(c) not in PUBLISHED:
        return words
    others = [name for name, value in PUBLISHED_WITH.items() if getattr(c, name) != value]
    return " ".join([words, *(f"{flag(name)} {shown(getattr(c, name))}" for name in others)])


def uses_k2(c: Config) -> bool:
    return bool(c.form.bounds) and c.form.bound(c.bound_version).uses_k2


def listed(names: Iterable[str]) -> str:
    """In words, in the order of their table: shb, nshb or qhm."""
    *most, last = [name for name in FORMS if name in names]
    return f"{', '.join(most)} or {last}" if most else last


def idle(given: dict[str, Any], c: Config) -> list[str]:
    """The names of what was given without effect."""
    limits = {name: FIELDS[name].metadata["only"] for name in given}
    limited = [(name, *only) for name, only in limits.items() if only is not None]
    without = [n for n, other, values in limited if not is_among(str(getattr(c, other)), values)]
    for name, users in OF_TRACKERS.items():
        if name in given and given[name] != FIELDS[name].default and not users & {*c.trackers}:
            without += [name] * (given[name] != "off")  # which says that there is none
    # of a run that was resumed with --wandb-mode off
    without += ["tracker"] * (c.wandb_mode == "off" and "wandb" in (given.get("tracker") or ()))
    return without


# Flags that say more of trackers, and of which.
OF_TRACKERS = {
    "wandb_mode": {"wandb"},
    "wandb_entity": {"wandb"},
    "wandb_project": {"wandb", "trackio"},
}
HINTS = {  # where a flag has no effect with this value of the flag that it hangs on
    ("power", "exp"): "; the factor of exp is --gamma",
    ("gamma", "poly"): "; the exponent of poly is --power",
    ("beta", "sgd"): "; PyTorch's SGD with momentum is --optimizer shb",
}
OF_ARGUMENTS = "; what a constructor takes is said by --optimizer-args, as in momentum=0.9"


def refuse_idle(given: dict[str, Any], c: Config) -> None:
    """A flag that would change nothing is a misunderstanding: say so instead of ignoring it.

    The published command lines have theirs always, so under --compat original those pass; not the
    --power of exp, which was its factor there.
    """
    if c.wandb_mode == "off" and "wandb" in (c.tracker or ()):
        raise ConfigError(
            f"--tracker {shown(c.tracker)} names wandb, which --wandb-mode off leaves out: leave "
            "one of them out"
        )
    for name in idle(given, c):
        if name in OF_TRACKERS:
            users = " or ".join(sorted(OF_TRACKERS[name], reverse=True))
            trackers = shown(c.tracker) if c.tracker else "none"
            raise ConfigError(
                f"{flag(name)} {given[name]} has no effect with --tracker {trackers}: name {users} "
                f"there too, or leave {flag(name)} out"
            )
        published = name in PUBLISHED_FLAGS and (name, c.method) != ("power", "exp")
        if c.compat == "original" and published:
            continue
        only = FIELDS[name].metadata["only"]
        values = " or ".join(sorted(only[1], key=str))
        hint = HINTS.get((name, getattr(c, only[0])), "")
        if name in ("beta", "nu") and c.foreign:
            hint = OF_ARGUMENTS
        raise ConfigError(
            f"{flag(name)} has no effect with {flag(only[0])} {getattr(c, only[0])}: it needs "
            f"{flag(only[0])} {values}{hint}"
        )


def shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
