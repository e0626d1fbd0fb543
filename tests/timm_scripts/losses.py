"""As tasks.py, in the shape that train.py had before there were tasks: the loss is an argument."""

import contextlib
import logging

import timm.utils
import torch
from tasks import LOSSES, loader_of, network, parse
from timm.optim import create_optimizer_v2

_logger = logging.getLogger("train")


def train_one_epoch(
    epoch, model, loader, optimizer, loss_fn, args, amp_autocast=contextlib.suppress
):
    model.train()
    optimizer.zero_grad()
    for input, target in loader:
        with amp_autocast():
            loss = loss_fn(model(input), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": loss.item()}


def main():
    logging.basicConfig(level=logging.INFO)
    args = parse()
    timm.utils.random_seed(0)
    model = network(args)
    optimizer = create_optimizer_v2(model, opt="momentum", lr=0.02)
    metrics = [train_one_epoch(0, model, loader_of(args), optimizer, LOSSES[args.loss](), args)]
    state = [model.state_dict(), optimizer.state_dict(), torch.get_rng_state()]
    torch.save({"state": state, "metrics": metrics}, args.out)


if __name__ == "__main__":
    main()
