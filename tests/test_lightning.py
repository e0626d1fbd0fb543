"""The noise of a fit of Lightning: that of a plain loop on the same batches, and no trace of it in
the training. Against the real library, on the CPU."""

import csv
import importlib.util
import logging
from unittest import mock

import plainloop
import pytest
import torch
from forks import assert_same_bits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import fastsmooth as fs
from fastsmooth.noise.losses import NotCovered

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs lightning"),
    # what Trainer.fit says of a small data set, of few workers and of PyTorch's next version
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
DATA = plainloop.images()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """One thread, as the processes have; what Lightning says of the machine is not of interest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    yield
    torch.set_num_threads(before)


def module_of(net: nn.Module, library="lightning.pytorch", **methods):
    """A LightningModule around a network, with methods in the place of its own."""
    pl = importlib.import_module(library)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x), y)

        def configure_optimizers(self):
            return plainloop.optimizer_of(self)

    return type("Module", (Module,), methods)()


def memory():
    """A logger that keeps what it gets of the noise."""
    from lightning.pytorch.loggers.logger import DummyLogger

    class Memory(DummyLogger):
        def __init__(self):
            super().__init__()
            self.noise = []

        def log_metrics(self, metrics, step):
            if any(name.startswith("noise/") for name in metrics):
                self.noise.append((step, metrics))

    return Memory()


def trainer_of(folder, callbacks=(), library="lightning.pytorch", **options):
    plain = ("progress_bar", "model_summary", "checkpointing")
    given = {f"enable_{name}": False for name in plain} | {"logger": False, "max_epochs": 1}
    return importlib.import_module(library).Trainer(
        accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, **(given | options)
    )


def fit(folder, module, data, *, ckpt_path=None, every=3, noise=None, **options):
    """(what was logged of the noise, the trainer) of a fit."""
    from fastsmooth.adapters.lightning import NoiseCallback

    logger = memory()
    callback = NoiseCallback(every=every, **(noise or {}))
    trainer = trainer_of(folder, [callback], logger=logger, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    assert callback.watch.noise.update == trainer.global_step
    return logger.noise, trainer


# The numbers


HALF = {"convert": torch.Tensor.bfloat16}
AUTOCAST = {"context": lambda: torch.autocast("cpu", torch.bfloat16)}


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 4}, {"micro_batches": 4}),
        ({"precision": "bf16-mixed"}, AUTOCAST),
        ({"precision": "bf16-true"}, HALF),
        ({"gradient_clip_val": 0.5}, {"clip": 0.5}),
    ],
    ids=["plain", "accumulated", "bf16-mixed", "bf16-true", "clipped"],
)
def test_the_noise_is_that_of_a_plain_loop(options, host, tmp_path):
    module, twin = module_of(plainloop.network()), plainloop.network()
    if host is HALF:
        twin = twin.bfloat16()
    # nine batches, the last of six; of four micro-batches an update the last has but one
    rows = plainloop.plain(twin, plainloop.batches(DATA, 8), every=2, samples=70, epochs=2, **host)
    found, _ = fit(tmp_path, module, DataLoader(DATA, 8), every=2, max_epochs=2, **options)
    if "clip" in host:  # of what is left of a gradient the bound says nothing
        for (_, numbers), (_, row) in zip(found, rows, strict=True):
            numbers.setdefault("noise/delta_measured", row["delta_measured"])
    plainloop.assert_same_rows(found, rows)
    assert_same_bits(dict(module.net.state_dict()), dict(twin.state_dict()))


def test_delta_is_not_logged_where_the_gradient_is_clipped(tmp_path):
    def clipped(self, optimizer, **given):
        self.clip_gradients(optimizer, 0.5, "value")

    for options, methods in (
        ({"gradient_clip_val": 0.5}, {}),
        ({}, {"configure_gradient_clipping": clipped}),
    ):
        module = module_of(plainloop.network(), **methods)
        ((_, numbers),) = fit(tmp_path, module, DataLoader(DATA, 70), **options)[0]
        assert "noise/c2_sampled" in numbers and "noise/delta_measured" not in numbers


def test_a_named_submodule_and_other_batches(tmp_path):
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 70

        def __getitem__(self, i):
            return {"image": DATA[i][0], "label": DATA[i][1]}

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["image"]), batch["label"])

    # as many have it: no forward()
    module = module_of(plainloop.network(), training_step=training_step)
    del type(module).mro()[1].forward
    given = {"model": "net", "batch": lambda batch: (batch["image"], batch["label"])}
    found, _ = fit(tmp_path, module, DataLoader(Pairs(), 8), noise=given)
    twin = plainloop.network()
    rows = plainloop.plain(twin, plainloop.batches(DATA, 8), every=3, samples=70)
    plainloop.assert_same_rows(found, rows)


def test_fp16_is_measured_in_float32(tmp_path):
    """Gradients that vanish in float16, where Lightning scales the loss."""
    from lightning.pytorch.plugins import MixedPrecision

    def weak():
        net = plainloop.network()
        with torch.no_grad():
            net[-1].weight.mul_(1e-7)
        return net

    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    found, _ = fit(tmp_path, module_of(weak()), DataLoader(DATA, 35), every=9, plugins=[scaled])
    rows = plainloop.plain(weak(), plainloop.batches(DATA, 35), every=9, samples=70)
    plainloop.assert_same_rows(found, rows)


@pytest.mark.full
@pytest.mark.parametrize("of", ["module", "network"])
def test_a_compiled_model_is_compiled_no_more_than_without(of, tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def trained(callbacks, logger):
        torch.compiler.reset()
        net = plainloop.network()
        if of == "network":
            net = torch.compile(net, backend=backend)
        module = module_of(net)
        if of == "module":
            module = torch.compile(module, backend=backend)
        trainer_of(tmp_path, callbacks, logger=logger).fit(module, DataLoader(DATA, 10))
        return net

    from fastsmooth.adapters.lightning import NoiseCallback

    logger = memory()
    measured, count = trained([NoiseCallback(every=3)], logger), len(graphs)
    assert count
    without = trained([], False)
    assert len(graphs) == 2 * count
    assert_same_bits(dict(measured.state_dict()), dict(without.state_dict()))
    rows = plainloop.plain(plainloop.network(), plainloop.batches(DATA, 10), every=3, samples=70)
    plainloop.assert_same_rows(logger.noise, rows)


def test_rows_stand_in_the_loggers_own_file(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    from fastsmooth.adapters.lightning import NoiseCallback

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    module = module_of(plainloop.network(), training_step=training_step)
    logger = CSVLogger(tmp_path, "fit", version=0)
    callback = NoiseCallback(every=3)
    trainer_of(tmp_path, [callback], logger=logger, log_every_n_steps=1).fit(
        module, DataLoader(DATA, 8)
    )
    with open(tmp_path / "fit" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    twin = plainloop.plain(plainloop.network(), plainloop.batches(DATA, 8), every=3, samples=70)
    noisy = [row for row in rows if row["noise/c2_sampled"]]
    losses = [row for row in rows if row["loss"]]
    assert [int(row["step"]) for row in losses] == list(range(9))  # as Lightning counts them
    for row, (update, wanted) in zip(noisy, twin, strict=True):
        assert int(row["step"]) == update
        assert float(row["noise/c2_sampled"]) == pytest.approx(wanted["c2_sampled"], rel=1e-6)


# The training


def bits_of(trainer, module) -> dict:
    return {
        "model": dict(module.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.full),
        {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "gradient_clip_val": 0.5},
    ],
    ids=["plain", "all at once"],
)
def test_training_keeps_its_bits(options, tmp_path):
    """With dropout and BatchNorm, batches in a random order, and tests before and between."""

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def run(callbacks):
        torch.manual_seed(3)
        module = module_of(plainloop.network(mixing=True), validation_step=validation_step)
        trainer = trainer_of(
            tmp_path,
            callbacks,
            max_epochs=2,
            val_check_interval=3,
            num_sanity_val_steps=1,
            **options,
        )
        trainer.fit(module, DataLoader(DATA, 8, shuffle=True), DataLoader(DATA, 35))
        return bits_of(trainer, module)

    from fastsmooth.adapters.lightning import NoiseCallback

    callback = NoiseCallback(every=1)
    assert_same_bits(run([callback]), run([]))
    assert callback.watch.noise.count >= 8


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


@pytest.mark.parametrize(
    ("every", "options", "updates"),
    [
        (4, {}, [0, 4, 8, 12, 16]),  # nine updates an epoch
        ("2ep", {"max_epochs": 4}, [0, 18]),
        (4, {"limit_train_batches": 5}, [0, 4, 8]),
        (4, {"fast_dev_run": True}, []),  # whose one update has no logger
        (2, {"accumulate_grad_batches": 4}, [0, 2, 4]),  # three updates an epoch
    ],
)
def test_which_updates_are_measured(every, options, updates, tmp_path):
    module = module_of(plainloop.network())
    found, _ = fit(
        tmp_path, module, DataLoader(DATA, 8), every=every, **({"max_epochs": 2} | options)
    )
    assert [update for update, _ in found] == updates


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_without_a_loss_and_batches_that_are_skipped(tmp_path):
    """What is measured is what the gradient was made of: at the update of the batches 2 and 3 that
    of 3 alone, and never one of an update that was not made."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (0, 1, 2) else F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 0 and batch_idx == 5 else None

    methods = {"training_step": training_step, "on_train_batch_start": on_train_batch_start}
    data = plainloop.batches(DATA, 8)
    seen = []
    with mock.patch("fastsmooth.noise.online.NoiseTracker.estimate", autospec=True) as estimate:
        estimate.side_effect = lambda self, xs, ys, size: (
            seen.append(
                [next(i for i, (x, _) in enumerate(data) if x.equal(given)) for given in xs]
            )
            or (fs.Estimate(1.0, 0.1, 8, ""), 1.0, None)
        )
        module = module_of(plainloop.network(), **methods)
        fit(tmp_path, module, DataLoader(DATA, 8), every=1, max_epochs=2, accumulate_grad_batches=2)
    # the first epoch ends with 4 waiting; the second has 4 and 5
    assert seen == [[3], [3], [4, 5], [6, 7], [8]]


def test_an_optimizer_that_has_its_gradient_made_several_times(tmp_path):
    module = module_of(
        plainloop.network(),
        configure_optimizers=lambda self: torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3),
    )
    found, trainer = fit(tmp_path, module, DataLoader(DATA, 35), every=1)
    assert [update for update, _ in found] == [0, 1] and trainer.global_step == 2
    rows = plainloop.plain(plainloop.network(), plainloop.batches(DATA, 35), every=9, samples=70)
    assert found[0][1]["noise/c2_sampled"] == pytest.approx(rows[0][1]["c2_sampled"], rel=1e-6)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("at", ["the end of an epoch", "a step"])
def test_a_resumed_fit_measures_as_one_that_went_on(at, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from fastsmooth.adapters.lightning import NoiseCallback

    def rows(max_epochs, ckpt_path=None, save=()):
        logger = memory()
        trainer = trainer_of(
            tmp_path,
            [NoiseCallback(every=4), *save],
            logger=logger,
            max_epochs=max_epochs,
            enable_checkpointing=bool(save),
        )
        # seen in order, so that one that is resumed sees them again
        trainer.fit(module_of(plainloop.network()), DataLoader(DATA, 8), ckpt_path=ckpt_path)
        return logger.noise

    whole = rows(2)
    assert [update for update, _ in whole] == [0, 4, 8, 12, 16]
    when = {"every_n_epochs": 1} if at == "the end of an epoch" else {"every_n_train_steps": 6}
    save = ModelCheckpoint(tmp_path, "saved", save_top_k=1, **when)
    begun = rows(1, save=[save])
    again = rows(2, tmp_path / "saved.ckpt")
    if at == "a step":  # Lightning begins the batches anew there, but counts on
        assert [update for update, _ in again] == [8, 12, 16]
        assert again[0][1]["noise/grad_norm_max"] >= begun[1][1]["noise/grad_norm_max"]
    else:
        assert begun + again == whole


def test_a_fit_that_goes_on_and_a_fit_anew(tmp_path):
    from fastsmooth.adapters.lightning import NoiseCallback

    callback, logger = NoiseCallback(every="2ep"), memory()
    trainer, module = (
        trainer_of(tmp_path, [callback], logger=logger),
        module_of(plainloop.network()),
    )
    trainer.fit(module, DataLoader(DATA, 8))
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, DataLoader(DATA, 8))
    assert [update for update, _ in logger.noise] == [0, 18] and callback.watch.noise.count == 2
    trainer_of(tmp_path, [callback]).fit(module_of(plainloop.network()), DataLoader(DATA, 8))
    assert callback.watch.noise.count == 1


def test_a_test_of_a_checkpoint_leaves_the_tracker(tmp_path):
    from fastsmooth.adapters.lightning import NoiseCallback

    def test_step(self, batch, batch_idx):
        self.net(batch[0])

    callback, data = NoiseCallback(every=3), DataLoader(DATA, 35)
    trainer = trainer_of(tmp_path, [callback])
    module = module_of(plainloop.network(), test_step=test_step)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    trainer.test(module, data, ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    assert callback.watch.noise.count == 1


def test_micro_batches_of_several_sizes_are_left_to_the_next(tmp_path):
    """Which Lightning weighs alike: of 8, 8 | 8, 8 | 8, 6 the last, which is due, is left out."""
    data = DataLoader(torch.utils.data.Subset(DATA, range(46)), 8)
    how = {"every": 2, "max_epochs": 2, "accumulate_grad_batches": 2, "noise": {"samples": 70}}
    found, _ = fit(tmp_path, module_of(plainloop.network()), data, **how)
    assert [update for update, _ in found] == [0, 3, 4]
    last = DataLoader(torch.utils.data.Subset(DATA, range(14)), 8)
    with pytest.warns(UserWarning, match=r"several sizes weigh alike.* has \[\[8, 6\]\]"):
        assert fit(tmp_path, module_of(plainloop.network()), last, **how)[0] == []


def test_a_checkpoint_of_a_fit_without_the_callback_keeps_the_rhythm(tmp_path):
    from fastsmooth.adapters.lightning import NoiseCallback

    trainer = trainer_of(tmp_path)
    trainer.fit(module_of(plainloop.network()), DataLoader(DATA, 8))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    logger = memory()
    trainer = trainer_of(tmp_path, [NoiseCallback(every=4)], logger=logger, max_epochs=2)
    module = module_of(plainloop.network())
    trainer.fit(module, DataLoader(DATA, 8), ckpt_path=tmp_path / "saved.ckpt")
    assert [update for update, _ in logger.noise] == [12, 16]  # and not 9, where it began


@pytest.mark.filterwarnings("ignore:Deprecated call to")
def test_under_its_other_name(tmp_path):
    from fastsmooth.adapters.lightning import NoiseCallback

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    library = "pytorch_lightning"
    callback = NoiseCallback(every=9)
    trainer = trainer_of(tmp_path, [callback], library)
    trainer.fit(module_of(plainloop.network(), library), DataLoader(DATA, 8))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = NoiseCallback(every=9)
    trainer = trainer_of(tmp_path, [again], library, max_epochs=2)
    module = module_of(plainloop.network(), library)
    trainer.fit(module, DataLoader(DATA, 8), ckpt_path=tmp_path / "saved.ckpt")
    assert (callback.watch.noise.count, again.watch.noise.count) == (1, 2)


# Several processes

alone = pytest.mark.skipif(torch.cuda.is_available(), reason="Lightning forks no user of CUDA")


def of_two_processes(folder, measured=True, **options) -> list:
    """What each of two processes was left with, (rows, state of the network), that Lightning forks
    from this one."""
    import lightning.pytorch as pl

    from fastsmooth.adapters.lightning import NoiseCallback

    class Leave(pl.Callback):
        def on_train_end(self, trainer, module):
            left = trainer.logger.noise, dict(module.net.state_dict())
            torch.save(left, folder / f"{trainer.global_rank}.pt")

    folder.mkdir()
    callbacks = [NoiseCallback(every=2), Leave()] if measured else [Leave()]
    trainer = trainer_of(
        folder, callbacks, logger=memory(), strategy="ddp_fork", devices=2, **options
    )
    trainer.fit(module_of(plainloop.network()), DataLoader(DATA, 8))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def shares(count: int) -> list[plainloop.Batch]:
    """The micro-batches of two processes, of which an update has `count` of each: update by update,
    the first process's first."""
    both = []
    for rank in range(2):  # as Lightning deals them out, in a random order
        own = DistributedSampler(DATA, 2, rank, shuffle=True, seed=0)
        both.append(plainloop.windows(list(DataLoader(DATA, 8, sampler=own)), count))
    return [part for update in zip(*both, strict=True) for window in update for part in window]


@alone
def test_two_processes_get_the_row_of_the_whole_batch(tmp_path):
    """Each sample about the mean gradient of its own process's micro-batch; that of all in ||g||.
    So a plain loop has it that takes the processes' shares as micro-batches."""
    left = of_two_processes(tmp_path / "two", accumulate_grad_batches=2)
    assert left[0][0] == left[1][0]
    parts = shares(2)
    twin = plainloop.network()
    rows = plainloop.plain(twin, parts, every=2, samples=70, micro_batches=4)
    plainloop.assert_same_rows(left[0][0], rows)
    first = left[0][0][0][1]
    c2, norm = plainloop.within(plainloop.network(), parts[:4], 70)
    assert first["noise/c2_sampled"] == pytest.approx(c2, rel=1e-5)
    assert first["noise/grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.full
@alone
def test_two_processes_train_in_the_same_bits(tmp_path):
    left = of_two_processes(tmp_path / "two", accumulate_grad_batches=2)
    without = of_two_processes(tmp_path / "without", accumulate_grad_batches=2, measured=False)
    for (_, measured), (_, plain) in zip(left, without, strict=True):
        assert_same_bits(measured, plain)


# Refusals


def manual(self, batch, batch_idx):
    self.optimizers().step()


def by_iterator(self, dataloader_iter):
    return self.net(next(dataloader_iter)[0][0]).mean()


@pytest.mark.parametrize(
    ("methods", "noise", "said"),
    [
        ({"training_step": manual, "automatic_optimization": False}, {}, "manual optimization"),
        ({"training_step": by_iterator}, {}, "takes dataloader_iter"),
        ({"configure_optimizers": lambda self: None}, {}, "no optimizer"),
        ({}, {"model": "nett"}, "model 'nett': .* has no attribute `nett`"),
        ({}, {"batch": lambda batch: {"x": 1}}, "a batch is a dict, not two tensors"),
        ({}, {"batch": lambda batch: (batch[0], [1])}, "a batch is a tuple of Tensor, list, not"),
        ({}, {"loss": nn.CrossEntropyLoss(reduction="sum")}, "is not the mean over the samples"),
    ],
)
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument in the `training_step`")
def test_what_cannot_be_measured_is_refused(methods, noise, said, tmp_path):
    module = module_of(plainloop.network())
    for name, value in methods.items():
        setattr(type(module), name, value)
    with pytest.raises(NotCovered, match=said):
        fit(tmp_path, module, DataLoader(DATA, 8), noise=noise)


def test_half_precision_and_shares_of_another_kind_are_refused(tmp_path, monkeypatch):
    from fastsmooth.adapters.lightning import NoiseCallback

    data = DataLoader(DATA, 8)
    with pytest.raises(NotCovered, match=r"precision '16-true'.*32-true, bf16-true"):
        fit(tmp_path, module_of(plainloop.network()), data, precision="16-true")
    trainer, module = trainer_of(tmp_path), module_of(plainloop.network())
    trainer.fit(module, data)
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(NotCovered, match="SingleDeviceStrategy: 2 processes share every batch"):
        NoiseCallback().on_train_start(trainer, module)


def test_a_module_without_forward_is_refused(tmp_path):
    module = module_of(plainloop.network())
    del type(module).mro()[1].forward
    with pytest.raises(NotCovered, match=r"Module has no forward.*model='net'"):
        fit(tmp_path, module, DataLoader(DATA, 8))


def test_data_without_a_length_needs_samples(tmp_path):
    data = DataLoader(Stream(), 8)
    with pytest.raises(NotCovered, match="give samples="):
        fit(tmp_path, module_of(plainloop.network()), data)
    found, _ = fit(tmp_path, module_of(plainloop.network()), data, noise={"samples": 70})
    rows = plainloop.plain(plainloop.network(), plainloop.batches(DATA, 8), every=3, samples=70)
    plainloop.assert_same_rows(found, rows)


def test_a_wrong_argument_is_refused_where_it_is_written():
    from fastsmooth.adapters.lightning import NoiseCallback

    with pytest.raises(ValueError, match="every '3 epochs'"):
        NoiseCallback(every="3 epochs")
    with pytest.raises(TypeError, match="'samplse'"):
        NoiseCallback(samplse=70)
