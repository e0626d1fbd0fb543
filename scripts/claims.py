"""Check the papers' claims at laptop scale: python scripts/claims.py --data-dir cifar100-12k
[--work runs/claims] [--only NAME ...]

cifar100-12k holds train/ and test/ with 100 and 20 images of each class of CIFAR-100; they are used
at 16x16 pixels, with resnet8 and seeds 0, 1, 2. Every claim is one sweep (taken up again where it
was interrupted) and a folder below records/claims: README.md with the claim, the rule for "holds",
the command and the numbers; result.json; runs.jsonl with a run's settings and last numbers a line;
config.json, what the runs share; metrics/, each run's rows of epochs and measurements.

The rules are those below, and were written before the runs. SE is the standard error of a mean over
the seeds, and of a difference of means the root of the sum of squares. A comparison holds or fails
where 2 SE decide it; else the claim is not resolved, so that a large error is never a pass.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastsmooth.cli.flags import ConfigError, Parser
from fastsmooth.messages import BAD_INPUT, DONE, end_with, say, tell
from fastsmooth.runfolder.numbers import exact
from fastsmooth.runfolder.read import SavedRun, find_runs, read_run
from fastsmooth.sweep import critical

ROOT = Path(__file__).resolve().parent.parent
# classes of claim c: all images of so few are learnt by heart in some tens of epochs, after which
# gradients fall
FEW = 10
COMMON = "--dataset folder --model resnet8 --image-size 16 --device cpu --log-every 1000000"
Found = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """`flags` of the sweep, or the name of the claim whose runs serve this one too; judge(runs)
    gives "verdict" and numbers."""

    name: str
    text: str
    rule: str
    judge: Callable[[list[SavedRun]], Found]
    flags: str = ""
    runs_of: str = ""


# The rules


DECIDED = (
    "Above and below are meant by more than 2 SE over the seeds; a part that is on the wrong side "
    "by more than 2 SE fails, and anything between is not resolved."
)
HOLDS, FAILS, UNDECIDED = "holds", "fails", "is not resolved"


def verdict(*parts: str) -> str:
    """Of a claim of several parts: one that fails decides, and one that is undecided leaves the
    whole so."""
    return FAILS if FAILS in parts else UNDECIDED if UNDECIDED in parts else HOLDS


def above(value: float, error: float, bound: float = 0.0) -> str:
    """Whether a value lies above a bound: by more than 2 SE it does, below by more than 2 SE it
    does not."""
    return HOLDS if value - 2 * error > bound else FAILS if value + 2 * error < bound else UNDECIDED


def below(value: float, error: float, bound: float = 0.0) -> str:
    return above(-value, error, -bound)


def schedules_beat_constant(runs: list[SavedRun]) -> Found:
    accuracy = by(runs, "method", final_accuracy)
    gains = {
        name: {
            "gain": mean(accuracy[name]) - mean(accuracy["constant"]),
            "se": se_of_difference(accuracy[name], accuracy["constant"]),
        }
        for name in ("lr", "batch", "hybrid")
    }
    return {
        "verdict": verdict(*(above(g["gain"], g["se"]) for g in gains.values())),
        "final_test_acc": {name: spread(values) for name, values in accuracy.items()},
        "over_constant": gains,
    }


def accuracy_is_unimodal_in_delta(runs: list[SavedRun]) -> Found:
    accuracy = {
        delta: values for delta, values in sorted(by(runs, delta_of, final_accuracy).items())
    }
    groups = list(accuracy.values())
    peak = max(range(len(groups)), key=lambda k: mean(groups[k]))
    drops = [
        above(mean(groups[peak]) - mean(groups[k]), se_of_difference(groups[peak], groups[k]))
        for k in {0, len(groups) - 1} - {peak}
    ]
    drop = min(mean(groups[peak]) - mean(groups[k]) for k in (0, -1))
    outward = [
        *((k, k - 1) for k in range(peak, 0, -1)),
        *((k, k + 1) for k in range(peak, len(groups) - 1)),
    ]
    rises = [second_rise(groups[a], groups[b], drop) for a, b in outward]
    inside = HOLDS if 0 < peak < len(groups) - 1 else UNDECIDED
    return {
        "verdict": verdict(inside, *drops, *rises),
        "peak_inside": inside,
        "both_ends_lower": verdict(*drops),
        "no_second_rise": verdict(*rises),
        "delta_in_units_of_C": {
            f"{delta:.5g}": spread(values) for delta, values in accuracy.items()
        },
    }


def second_rise(inner: list[float], outer: list[float], drop: float) -> str:
    """Whether there is none from one group outwards to the next: its error must be small beside the
    drop to the ends."""
    rise, error = mean(outer) - mean(inner), se_of_difference(outer, inner)
    return FAILS if rise - 2 * error > 0 else HOLDS if rise + 2 * error < drop else UNDECIDED


def critical_batch_exists(runs: list[SavedRun]) -> Found:
    curves = critical.analyse(runs)
    checks = [convex(curve) for curve in curves]
    best = [curve.best for curve in curves]  # by growing eps
    interior = [inside(curve) for curve in curves]
    return {
        "verdict": verdict(*checks, *interior, falling(best)),
        "convex": dict(zip([exact(c.eps) for c in curves], checks, strict=True)),
        "best_inside": dict(zip([exact(c.eps) for c in curves], interior, strict=True)),
        "best_falls_with_eps": falling(best),
        "curves": [curve.to_json() for curve in curves],
    }


def convex(curve: critical.Analysis) -> str:
    """The second differences of the mean N over equal steps of log b, which a batch without an N
    between others breaks."""
    reached = [b for b in curve.batches if b.sfo_mean is not None]
    whole = (
        [
            b
            for b in curve.batches
            if b.batch_size in range(reached[0].batch_size, reached[-1].batch_size + 1)
        ]
        if reached
        else []
    )
    if len(reached) < max(4, len(whole)) or any(b.n < 2 for b in reached):
        return UNDECIDED
    n, e = [b.sfo_mean for b in reached], [b.sfo_sd / math.sqrt(b.n) for b in reached]
    middle = range(1, len(n) - 1)
    seconds = [n[k - 1] - 2 * n[k] + n[k + 1] for k in middle]
    errors = [math.sqrt(e[k - 1] ** 2 + 4 * e[k] ** 2 + e[k + 1] ** 2) for k in middle]
    return verdict(*(above(s, error) for s, error in zip(seconds, errors, strict=True)))


def inside(curve: critical.Analysis) -> str:
    """b* is neither the smallest nor the largest batch with an N: N is larger there by more than 2
    SE."""
    reached = [b for b in curve.batches if b.sfo_mean is not None and b.n > 1]
    best = next((b for b in reached if b.batch_size == curve.best), None)
    if best is None or best in (reached[0], reached[-1]):
        return UNDECIDED
    ends = [
        (
            end.sfo_mean - best.sfo_mean,
            math.hypot(end.sfo_sd / math.sqrt(end.n), best.sfo_sd / math.sqrt(best.n)),
        )
        for end in (reached[0], reached[-1])
    ]
    return verdict(*(above(value, error) for value, error in ends))


def falling(best: list[int | None]) -> str:
    """Whether b* falls as eps grows; on a grid of powers of two two equal ones decide nothing."""
    if None in best or len(best) < 2:
        return UNDECIDED
    if any(later > earlier for earlier, later in pairwise(best)):
        return FAILS
    return HOLDS if best[-1] < best[0] else UNDECIDED


def noise_falls_as_root(runs: list[SavedRun]) -> Found:
    sgd = [run for run in runs if run.config["optimizer"] == "sgd"]
    slopes = [slope_of(seed_runs, noise_norm) for seed_runs in grouped(sgd, "seed").values()]
    value, error = mean(slopes), se(slopes)
    return {
        "verdict": verdict(above(value, error, -0.55), below(value, error, -0.45)),
        "slope": spread(slopes),
        "noise_norm": {str(b): spread(v) for b, v in by(sgd, "batch_size", noise_norm).items()},
    }


def heavy_ball_keeps_a_floor(runs: list[SavedRun]) -> Found:
    found: Found = {}
    parts = []
    for optimizer, members in grouped(runs, "optimizer").items():
        largest = sorted({run.config["batch_size"] for run in members})[-2:]
        ends = [run for run in members if run.config["batch_size"] in largest]
        slopes = [slope_of(seed_runs, noise_ratio) for seed_runs in grouped(ends, "seed").values()]
        part = (above if optimizer == "shb" else below)(
            mean(slopes), se(slopes), -0.1 if optimizer == "shb" else -0.25
        )
        parts.append(part)
        found[optimizer] = {
            "part": part,
            "slope_between_the_largest": spread(slopes),
            "noise_over_full_grad_norm": {
                str(b): spread(v) for b, v in by(members, "batch_size", noise_ratio).items()
            },
            "noise_norm": {
                str(b): spread(v) for b, v in by(members, "batch_size", noise_norm).items()
            },
        }
    return {"verdict": verdict(*parts)} | found


def smoother_is_less_sharp(runs: list[SavedRun]) -> Found:
    sharpness = {
        delta: values for delta, values in sorted(by(runs, delta_of, sharpness_of).items())
    }
    means = [mean(values) for values in sharpness.values()]
    rank = spearman(list(sharpness), means)
    first, *_, last = sharpness.values()
    falls = above(mean(first) - mean(last), se_of_difference(first, last))
    return {
        "verdict": verdict(HOLDS if rank <= -0.8 else FAILS if rank >= 0 else UNDECIDED, falls),
        "spearman": rank,
        "smallest_delta_sharper": falls,
        "adaptive_sharpness": {
            f"{delta:.5g}": spread(values) for delta, values in sharpness.items()
        },
    }


CLAIMS = (
    Claim(
        "schedules",
        "(a) lr, batch and hybrid end with a higher test accuracy than constant from the same "
        "start.",
        "The difference of the mean final test accuracy to that of constant is above 0 for each "
        "of the three.",
        schedules_beat_constant,
        f"{COMMON} --seeds 3 --method constant lr batch hybrid --lr 0.1 --batchsize 32 --epochs "
        "20 --decay-epoch 4",
    ),
    Claim(
        "noise-norm",
        "(d) The measured ||omega|| of SGD falls as b^-1/2.",
        "The least-squares slope of log ||omega|| against log b, fitted for each seed, has a mean "
        "above -0.55 and below -0.45.",
        noise_falls_as_root,
        f"{COMMON} --seeds 5 --mode sampling --steps 100 --draws 8 --augment none --lr 0.05 "
        "--optimizer sgd shb nshb --beta 0.9 --batchsize 8..512x4 --epochs 10",
    ),
    Claim(
        "momentum-floor",
        "(e) SHB's search-direction noise keeps a floor as b grows, SGD's and NSHB's do not.",
        "r is ||omega|| over the norm of the full gradient, both means over replayed histories "
        "(sgd: over mini-batches at one point). The slope of log r against log b between the two "
        "largest batches has a mean above -0.1 for shb, and below -0.25 for sgd and nshb.",
        heavy_ball_keeps_a_floor,
        runs_of="noise-norm",
    ),
    Claim(
        "delta-accuracy",
        "(b) Test accuracy against delta is unimodal over a grid of lr and batch.",
        "Runs of equal delta are pooled. The best mean accuracy lies inside the grid, the "
        "differences to both ends are above 0, and going outwards from the best no mean rises: a "
        "rise by more than 2 SE fails, and its upper end, 2 SE above, must be below the smaller "
        "difference to the ends.",
        accuracy_is_unimodal_in_delta,
        f"{COMMON} --seeds 3 --lr 0.05 0.2 0.8 --batchsize 8..512x4 --epochs 6",
    ),
    Claim(
        "delta-sharpness",
        "(f) A larger delta goes with a smaller adaptive sharpness.",
        "Runs of equal delta are pooled. Spearman's rank correlation of delta and mean sharpness "
        "(the published setting of python -m fastsmooth.sharpness) is at most -0.8, and fails from "
        "0 on; the difference of the smallest delta's sharpness to the largest delta's is above 0.",
        smoother_is_less_sharp,
        runs_of="delta-accuracy",
    ),
    Claim(
        "critical-batch",
        "(c) N(b) = b T(b) is convex in log b, with b* falling as eps grows.",
        "On the 1,000 training images of the first 10 classes, censored batches left out. For "
        "every eps at least four batch sizes have an N, every second difference of the mean N over "
        "log b is above 0, and N is larger at both ends than at b*. b* never grows with eps, and "
        "is smaller for the largest than for the smallest.",
        critical_batch_exists,
        f"{COMMON.replace(' --log-every 1000000', '')} --seeds 3 --mode critical --augment none "
        "--lr 0.1 --batchsize 32..512x2 --eps 0.7 0.9 --min-epochs 11 --epochs 500 --log-every 10 "
        "--checkpoint-every 2000",
    ),
)


# Numbers of runs


def final_accuracy(run: SavedRun) -> float:
    return run.summary["final_test_acc"]


def delta_of(run: SavedRun) -> float:
    return float(f"{run.of_kind('epoch')[-1]['delta']:.12g}")


def noise_norm(run: SavedRun) -> float:
    return run.noise["points"][-1]["noise_norm"]


def noise_ratio(run: SavedRun) -> float:
    """||omega|| over the norm of the full gradient, which another batch has brought elsewhere by
    then."""
    point = run.noise["points"][-1]
    return point["noise_norm"] / point["full_grad_norm"]


def sharpness_of(run: SavedRun) -> float:
    return run.sharpness["results"][-1]["value"]


def grouped(
    runs: list[SavedRun], key: str | Callable[[SavedRun], Any]
) -> dict[Any, list[SavedRun]]:
    found: dict[Any, list[SavedRun]] = {}
    for run in runs:
        found.setdefault(run.config[key] if isinstance(key, str) else key(run), []).append(run)
    return dict(sorted(found.items()))


def by(
    runs: list[SavedRun], key: str | Callable, value: Callable[[SavedRun], float]
) -> dict[Any, list[float]]:
    return {k: [value(run) for run in members] for k, members in grouped(runs, key).items()}


def slope_of(runs: list[SavedRun], value: Callable[[SavedRun], float]) -> float:
    """The least-squares slope of the logarithm of a value against log b."""
    x, y = (
        [math.log(v(run)) for run in runs] for v in (lambda run: run.config["batch_size"], value)
    )
    return statistics.linear_regression(x, y).slope


def spearman(x: list[float], y: list[float]) -> float:
    return statistics.correlation(*([sorted(values).index(v) for v in values] for values in (x, y)))


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def se(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def se_of_difference(a: list[float], b: list[float]) -> float:
    return math.hypot(se(a), se(b))


def spread(values: list[float]) -> Found:
    return {"mean": mean(values), "deviation": statistics.stdev(values), "n": len(values)}


# Doing it


def main() -> int:
    try:
        check(sys.argv[1:])
    except ConfigError as error:
        tell("error", error)
        return BAD_INPUT
    return DONE


def check(argv: list[str]) -> None:
    """Do the runs of a command line and write a record of each claim. Raises ConfigError."""
    p = Parser(prog="python scripts/claims.py", description=__doc__.splitlines()[0])
    p.add_argument("--data-dir", required=True, type=Path, help="cifar100-12k: train/ and test/")
    p.add_argument(
        "--work", default=Path("runs/claims"), type=Path, help="where the runs are (runs/claims)"
    )
    p.add_argument(
        "--records", default=ROOT / "records" / "claims", type=Path, help="where the records go"
    )
    p.add_argument("--only", nargs="+", choices=[c.name for c in CLAIMS], help="these claims alone")
    args = p.parse_args(argv)
    args.data_dir, args.work, args.records = (
        path.absolute() for path in (args.data_dir, args.work, args.records)
    )
    for split in ("train", "test"):
        if not (args.data_dir / split).is_dir():
            raise ConfigError(
                f"--data-dir {args.data_dir} has no {split}/: it must hold cifar100-12k"
            )
    for claim in CLAIMS:
        if args.only is None or claim.name in args.only:
            runs = do_runs(claim, args)
            found = claim.judge(runs)
            write_record(args.records / claim.name, claim, runs, found)
            say(f"{claim.name}: {found['verdict']}")


def do_runs(claim: Claim, args: argparse.Namespace) -> list[SavedRun]:
    source = next(c for c in CLAIMS if c.name == (claim.runs_of or claim.name))
    out = args.work / source.name
    images = (
        args.data_dir
        if source.name != "critical-batch"
        else first_classes(args.data_dir, args.work / "few")
    )
    flags = [*source.flags.split(), "--data-dir", str(images), "--out", str(out)]
    call("sweep", *flags)
    paths = [path for path in find_runs([out]) if "sampled" not in path.parts]
    if claim.judge is smoother_is_less_sharp:
        lacking = [str(path) for path in paths if not (path / "sharpness.json").exists()]
        if lacking:
            call("sharpness", *lacking)
    return [read_run(path) for path in paths]


def call(command: str, *flags: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"fastsmooth.{command}", *flags], cwd=ROOT, check=False
    )
    if done.returncode:
        raise ConfigError(
            f"fastsmooth.{command} ended with exit code {done.returncode}: the same command goes on"
        )


def first_classes(data_dir: Path, few: Path) -> Path:
    """A tree with the first FEW classes of the other one."""
    for split in ("train", "test"):
        (few / split).mkdir(parents=True, exist_ok=True)
        for folder in sorted((data_dir / split).iterdir())[:FEW]:
            if not (few / split / folder.name).exists():
                os.symlink(folder.absolute(), few / split / folder.name)
    return few


def write_record(target: Path, claim: Claim, runs: list[SavedRun], found: Found) -> None:
    shutil.rmtree(target, ignore_errors=True)
    (target / "metrics").mkdir(parents=True)
    shared = {k: v for k, v in runs[0].config.items() if all(run.config[k] == v for run in runs)}
    shared["data_dir"] = "cifar100-12k"
    varying = sorted(runs[0].config.keys() - shared.keys() - {"out"})
    dump(target / "config.json", {k: v for k, v in shared.items() if k not in ("out", "resume")})
    dump(
        target / "result.json", {"claim": claim.text, "rule": claim.rule, **found, **about(runs[0])}
    )
    lines = []
    for run in runs:
        settings = {name: run.config[name] for name in varying}
        last = {
            k: run.summary.get(k)
            for k in (
                "final_test_acc",
                "final_test_loss",
                "epochs",
                "updates",
                "samples",
                "seconds",
            )
        }
        extra = {"critical": run.critical.get("crossings")} if run.critical else {}
        extra |= {"sharpness": run.sharpness["results"]} if run.sharpness else {}
        lines.append(json.dumps(settings | last | extra))
        rows = [row for row in run.rows if row["kind"] in ("epoch", "measure")]
        text = "".join(json.dumps(row) + "\n" for row in thinned(rows))
        (target / "metrics" / f"{run.path.name}.jsonl").write_text(text)
    (target / "runs.jsonl").write_text("\n".join(lines) + "\n")
    (target / "README.md").write_text(readme(claim, found, len(runs)))


def thinned(rows: list[Found]) -> list[Found]:
    """Fifty rows at the most, the last one among them: runs of hundreds of epochs have as many."""
    step = -(-len(rows) // 50)
    return rows[::-1][::step][::-1]


def about(run: SavedRun) -> Found:
    env = json.loads((run.path / "env.json").read_text())
    return {key: env[key] for key in ("commit", "torch", "processor", "cpus", "threads")}


def dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def readme(claim: Claim, found: Found, count: int) -> str:
    source = next(c for c in CLAIMS if c.name == (claim.runs_of or claim.name))
    command = (
        shlex.join(["python", "-m", "fastsmooth.sweep", *source.flags.split()])
        + " --data-dir cifar100-12k --out DIR"
    )
    numbers = json.dumps({k: v for k, v in found.items() if k != "curves"}, indent=1)
    return (
        f"# {claim.text}\n\nVerdict at this scale: **{found['verdict']}** ({count} runs).\n\nRule, "
        f"written before the runs: {claim.rule} "
        f"{DECIDED}\n\n"
        f"    {command}\n\nor `python scripts/claims.py --data-dir cifar100-12k --only "
        f"{claim.name}`.\n\n```json\n{numbers}\n```\n"
    )


if __name__ == "__main__":
    end_with(main)
