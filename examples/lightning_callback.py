"""Gradient noise in Lightning: a callback, whose numbers stand in the trainer's own log."""

import csv
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastsmooth as fs
from fastsmooth.adapters.lightning import NoiseCallback


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = fs.build_model("resnet8", 10, norm="group")

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


pl.seed_everything(0)
digits = fs.open_data("digits", device="cpu").train.batches([torch.arange(1437)])
with tempfile.TemporaryDirectory() as folder:
    logger = CSVLogger(folder)
    noise = NoiseCallback(every=15, loss=F.cross_entropy, model="net")
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=logger, callbacks=[noise], **quiet)
    trainer.fit(Digits(), DataLoader(TensorDataset(*next(digits)), batch_size=32, shuffle=True))
    for row in csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()):
        c2, delta = (float(row[f"noise/{name}"]) for name in ("c2_sampled", "delta_measured"))
        print(f"update {row['step']}: C2 {c2:.3g}, delta {delta:.3g}")
