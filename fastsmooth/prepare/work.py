"""From a data set to its smaller images: what is refused, what is stored, what is said."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from pathlib import Path

import numpy as np

from fastsmooth import data
from fastsmooth.cli.config import Config
from fastsmooth.cli.flags import ConfigError, flag
from fastsmooth.cli.progress import span
from fastsmooth.data.files import Paths, Ranges
from fastsmooth.data.index import read_index
from fastsmooth.data.prepared import FILE, PART, VERSION, Record, Request, labels_of, read
from fastsmooth.messages import command, note, say, show, warn
from fastsmooth.prepare.names import class_folders
from fastsmooth.prepare.shrink import encoder
from fastsmooth.prepare.stores import STORES, Part
from fastsmooth.processors import processors
from fastsmooth.runfolder.files import aside_of, replace, writing
from fastsmooth.runfolder.write import RunFolderError, lock, refusing


def prepare(config: Config, out: Path, short: int, quality: int, stored: str) -> None:
    """Store the images of `config`'s data set with a shorter side of at most `short` pixels below
    `out`. Raises DataError, ConfigError, RunFolderError and CannotWrite; what was stored until then
    is taken up by the next call."""
    started = time.monotonic()
    images = data.read_set(config)
    for line in images.remarks:
        warn(line)
    if images.train.files is None or images.test.files is None:
        raise ConfigError(
            f"--data-dir {config.data_dir} is {images.layout}, which is stored as pixels, not as "
            "image files: there is nothing to prepare, train on it as it is"
        )
    request = Request(
        version=VERSION,
        layout=images.layout,
        fingerprint=images.fingerprint(),
        stored=stored,
        short_side=short,
        quality=quality,
        encoder=encoder(),
        classes=list(images.names or images.classes),
    )
    if images.about:
        say(images.about)
    with refusing(out):
        finished = begun(out, request)
    advice = f"train with {command('train')} --data-dir {out}"
    if finished:
        (out / PART).unlink(missing_ok=True)
        say(f"{out} is finished, nothing to do: {advice}")
        return
    threads = config.workers or processors()
    parts = [
        Part(name, split, read_index(split.files, note, kept), short, quality, threads)
        for name, split, kept in (("train", images.train, "train"), ("val", images.test, "test"))
        if split.files is not None
    ]
    total = sum(len(part.split) for part in parts)
    refuse_bad([line for part in parts for line in part.index.bad.values()], total)
    with refusing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock_out(out)
    replace(out / PART, request.to_json())
    folders, contents, after, bad = class_folders(images.classes), hashlib.sha256(), 0, 0
    progress = Progress(total)
    for part in parts:
        digests = np.zeros((len(part.split), hashlib.sha256().digest_size), np.uint8)
        for image in STORES[stored](out, folders, part):
            if image.wrong:
                show(image.wrong)
                bad += 1
            else:
                digests[image.place] = np.frombuffer(image.digest, np.uint8)
                after += image.length
            progress.step()
        contents.update(digests.data)
    refuse_bad([], total, bad)
    before = sum(map(bytes_of, parts))
    record = Record(
        **dataclasses.asdict(request),
        train=len(images.train),
        test=len(images.test),
        labels=labels_of(images),
        contents=contents.hexdigest(),
        bytes_before=before,
        bytes_after=after,
    )
    os.sync()  # all images, before anybody is told that they are there
    replace(out / FILE, record.to_json())
    with writing(out / PART):
        (out / PART).unlink()
    was = f"{amount(before)} before, " if before else ""
    say(
        f"{out}: {record.train:,} training and {record.test:,} test images, {was}{amount(after)} "
        f"now, {span(time.monotonic() - started)}: {advice}"
    )


def begun(out: Path, request: Request) -> bool:
    """Whether all is done in `out`. Raises ConfigError where something else is, or has begun."""
    done = read(out / FILE, Record)
    before = done or read(out / PART, Request)
    if before is None:
        if out.exists() and any(not ours(name) for name in os.listdir(out)):
            raise ConfigError(f"--out {out} holds other files: choose a new folder")
        return False
    was, now = (dataclasses.asdict(form) for form in (before, request))
    other = next((name for name in now if was[name] != now[name]), None)
    if other is None:
        return done is not None
    if other in ("stored", "short_side", "quality"):
        name = "--format" if other == "stored" else flag(other)
        how = f"with {name} {was[other]}, not {now[other]}"
    elif other == "encoder":
        how = f"by {was[other]}, not {now[other]}, and images would be encoded otherwise"
    else:
        how = f"of other images ({was['layout']} {was['fingerprint'][:12]})"
    raise ConfigError(f"--out {out} was begun {how}: give the same, or choose another folder")


def ours(name: str) -> bool:
    """Whether a file is what this command leaves if it is killed before it has begun."""
    return name == ".lock" or aside_of(name) == PART


def lock_out(out: Path) -> None:
    """Keep others from writing there as long as this process lives."""
    try:
        lock(out)
    except RunFolderError:
        raise ConfigError(
            f"--out {out}: another process is writing there: wait for it or stop it"
        ) from None


def refuse_bad(lines: list[str], total: int, said: int = 0) -> None:
    """List these bad images; raises ConfigError where there are some, or some were said before."""
    for line in lines:
        show(line)
    if bad := len(lines) + said:
        raise ConfigError(
            f"{bad:,} of {total:,} images {'is' if bad == 1 else 'are'} bad: replace them and give "
            "the same command again, or remove them and prepare into another folder"
        )


def bytes_of(part: Part) -> int:
    """All images of the source; 0 where only their archives' sizes are known."""
    alone = isinstance(part.split.files, Paths | Ranges)
    return int(part.index.size.sum()) if alone else 0


def amount(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


class Progress:
    """A line on stderr now and then once the work has taken 2 seconds."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.started = time.monotonic()
        self.due = self.started + 2

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now > self.due:
            left = (self.total - self.done) * (now - self.started) / self.done
            note(f"preparing: {self.done:,} of {self.total:,} images, {span(left)} left")
            self.due = now + 10
