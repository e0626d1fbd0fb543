"""A training script in the shape of timm's train.py: the same train_one_epoch(), with a task, over
timm's own loader, model, task, optimizer and scaler; less of everything else."""

import argparse
import contextlib
import functools
import logging
import os
from collections import OrderedDict

import timm.utils
import torch
from PIL import Image
from timm import create_model
from timm.data import Mixup, create_loader
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import NativeScaler

import fastsmooth as fs

_logger = logging.getLogger("train")


def parse():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--model", default="test_vit")
    p.add_argument("--images", type=int, default=32)
    p.add_argument("--epochs", type=int, default=1)
    p.add_argument("--start-epoch", type=int, default=0)
    p.add_argument("--grad-accum-steps", type=int, default=1)
    p.add_argument("--loss", choices=LOSSES, default="smoothing")
    p.add_argument("--mixup", action="store_true")
    p.add_argument("--mixup-off-epoch", type=int, default=0)
    p.add_argument("--amp-dtype")
    p.add_argument("--scaler", action="store_true")
    p.add_argument("--clip-grad", type=float)
    p.add_argument("--torchcompile")
    p.add_argument("--model-ema", action="store_true")
    p.add_argument("--distill", action="store_true")
    return p.parse_args()


LOSSES = {
    "smoothing": LabelSmoothingCrossEntropy,
    "soft": SoftTargetCrossEntropy,
    "bce": functools.partial(BinaryCrossEntropy, sum_classes=True),
    "plain": torch.nn.CrossEntropyLoss,
}


class Digits(torch.utils.data.Dataset):
    """Of those that ship, as images for timm's transforms."""

    def __init__(self, count):
        train = fs.open_data("digits", device="cpu").train
        x, self.labels = next(train.batches(torch.arange(count).split(count)))
        x = (x - x.amin()) / (x.amax() - x.amin()) * 255
        self.images = [Image.fromarray(i.byte().permute(1, 2, 0).numpy()) for i in x]
        self.transform = None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), int(self.labels[index])


def loader_of(args):
    return create_loader(
        Digits(args.images),
        input_size=(3, 32, 32),
        batch_size=16,
        is_training=True,
        use_prefetcher=False,
        no_aug=True,
        num_workers=0,
        distributed=torch.distributed.is_initialized(),
    )


def network(args):
    size = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}
    size = size if "vit" in args.model else {}
    return create_model(args.model, num_classes=10, **size)


def train_one_epoch(
    epoch,
    model,
    loader,
    optimizer,
    args,
    task=None,
    amp_autocast=contextlib.suppress,
    loss_scaler=None,
    mixup_fn=None,
):
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch and mixup_fn is not None:
        mixup_fn.mixup_enabled = False
    task.get_trainable_module().train()
    accum_steps = args.grad_accum_steps
    last_accum_steps = len(loader) % accum_steps
    last = len(loader) - 1
    optimizer.zero_grad()
    losses = []
    for batch_idx, (input, target) in enumerate(loader):
        need_update = batch_idx == last or (batch_idx + 1) % accum_steps == 0
        if batch_idx >= len(loader) - last_accum_steps:
            accum_steps = last_accum_steps
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
        with amp_autocast():
            loss = task(input, target)["loss"]
        if accum_steps > 1:
            loss /= accum_steps
        if loss_scaler is not None:
            loss_scaler(
                loss,
                optimizer,
                clip_grad=args.clip_grad,
                parameters=model.parameters(),
                need_update=need_update,
            )
        else:
            loss.backward()
            if need_update:
                if args.clip_grad is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                optimizer.step()
        losses.append(loss.item())
        if need_update:
            optimizer.zero_grad()
            task.update_ema()
    return OrderedDict([("loss", sum(losses) / len(losses))])


def main():
    logging.basicConfig(level=logging.INFO)
    args = parse()
    args.rank = int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    timm.utils.random_seed(0)
    made = {"device": torch.device("cpu"), "verbose": False}
    criterion = LOSSES[args.loss]()
    if args.distill:
        task = LogitDistillationTask(network(args), network(args), criterion=criterion, **made)
    else:
        task = ClassificationTask(network(args), criterion, **made)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="momentum", lr=0.02)
    if args.model_ema:
        task.setup_ema(decay=0.9)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    if "RANK" in os.environ:
        task.prepare_distributed()
    autocast = contextlib.suppress
    if args.amp_dtype:
        dtype = getattr(torch, args.amp_dtype)
        autocast = functools.partial(torch.autocast, device_type="cpu", dtype=dtype)
    scaler = None
    if args.scaler:  # the first update overflows, and the next does not
        scaler = NativeScaler(device="cpu")
        scaler._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    metrics = [
        train_one_epoch(
            epoch,
            task.get_trainable_module(),
            loader_of(args),
            optimizer,
            args,
            task=task,
            amp_autocast=autocast,
            loss_scaler=scaler,
            mixup_fn=Mixup(0.2, num_classes=10) if args.mixup else None,
        )
        for epoch in range(args.start_epoch, args.epochs)
    ]
    state = [task.state_dict(), optimizer.state_dict(), torch.get_rng_state()]
    saved = {"state": state, "metrics": metrics, "batch": next(iter(loader_of(args)))}
    torch.save(saved, args.out + (f".{args.rank}" if args.rank else ""))
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
