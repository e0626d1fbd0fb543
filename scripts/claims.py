"""Check the papers' claims at laptop scale: python scripts/claims.py --data-dir cifar100-12k [--work runs/claims] [--only NAME ...]

cifar100-12k holds train/ and test/ with 100 and 20 images of each class of CIFAR-100; they are used at 16x16 pixels, with
resnet8 and seeds 0, 1, 2. Every claim is one sweep (taken up again where it was interrupted) and a folder below
records/claims: README.md with the claim, the rule for "holds", the command and the numbers; result.json; runs.jsonl with
a run's settings and last numbers a line; config.json, what the runs share; metrics/, each run's rows of epochs and measurements.

The rules are those below, and were written before the runs. SE is the standard error of a mean over the seeds, and of a
difference of means the root of the sum of squares.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastsmooth import critical
from fastsmooth.config import exact
from fastsmooth.runs import SavedRun, find_runs, read_run

ROOT = Path(__file__).resolve().parent.parent
FEW = 10  # classes of claim c: all images of so few are learnt by heart in some tens of epochs, after which gradients fall
COMMON = "--dataset folder --model resnet8 --image-size 16 --device cpu --seeds 3 --log-every 1000000"
Found = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """`flags` of the sweep, or the name of the claim whose runs serve this one too; judge(runs) gives "holds" and numbers."""

    name: str
    text: str
    rule: str
    judge: Callable[[list[SavedRun]], Found]
    flags: str = ""
    runs_of: str = ""


# The rules ------------------------------------------------------------------------------------------------------------


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
        "holds": all(g["gain"] > 2 * g["se"] for g in gains.values()),
        "final_test_acc": {name: spread(values) for name, values in accuracy.items()},
        "over_constant": gains,
    }


def accuracy_is_unimodal_in_delta(runs: list[SavedRun]) -> Found:
    accuracy = {delta: values for delta, values in sorted(by(runs, delta_of, final_accuracy).items())}
    means, errors = [mean(v) for v in accuracy.values()], [se(v) for v in accuracy.values()]
    peak = means.index(max(means))
    inside = 0 < peak < len(means) - 1
    ends = [means[peak] - means[k] - 2 * math.hypot(errors[peak], errors[k]) for k in (0, -1)]
    outward = [*((k, k - 1) for k in range(peak, 0, -1)), *((k, k + 1) for k in range(peak, len(means) - 1))]
    rises = [means[b] - means[a] - 2 * math.hypot(errors[a], errors[b]) for a, b in outward]
    return {
        "holds": inside and min(ends) > 0 and max(rises, default=0.0) <= 0,
        "peak_inside": inside,
        "both_ends_lower": min(ends) > 0,
        "no_second_rise": max(rises, default=0.0) <= 0,
        "delta_in_units_of_C": {f"{delta:.5g}": spread(values) for delta, values in accuracy.items()},
    }


def critical_batch_exists(runs: list[SavedRun]) -> Found:
    curves = critical.analyse(runs)
    checks = [convex(curve) for curve in curves]
    best = [curve.best for curve in curves]  # by growing eps
    falls = None not in best and best == sorted(best, reverse=True) and best[-1] < best[0]
    interior = [c.best is not None and c.batches[0].batch_size < c.best < c.batches[-1].batch_size for c in curves]
    return {
        "holds": all(checks) and any(interior) and falls,
        "convex": dict(zip([exact(c.eps) for c in curves], checks, strict=True)),
        "best_inside": dict(zip([exact(c.eps) for c in curves], interior, strict=True)),
        "best_falls_with_eps": falls,
        "curves": [curve.to_json() for curve in curves],
    }


def convex(curve: critical.Analysis) -> bool:
    """Every second difference of N over equal steps of log b is at least -2 SE."""
    reached = [b for b in curve.batches if b.sfo_mean is not None]
    n, e = [b.sfo_mean for b in reached], [(b.sfo_sd or 0.0) / math.sqrt(b.n) for b in reached]
    seconds = [n[k - 1] - 2 * n[k] + n[k + 1] for k in range(1, len(n) - 1)]
    errors = [math.sqrt(e[k - 1] ** 2 + 4 * e[k] ** 2 + e[k + 1] ** 2) for k in range(1, len(n) - 1)]
    return len(n) >= 4 and all(s >= -2 * error for s, error in zip(seconds, errors, strict=True))


def noise_falls_as_root(runs: list[SavedRun]) -> Found:
    sgd = [run for run in runs if run.config["optimizer"] == "sgd"]
    slopes = [slope_of(seed_runs) for seed_runs in grouped(sgd, "seed").values()]
    return {
        "holds": abs(mean(slopes) + 0.5) <= 0.05,
        "slope": spread(slopes),
        "noise_norm": {str(b): spread(v) for b, v in by(sgd, "batch_size", noise_norm).items()},
    }


def heavy_ball_keeps_a_floor(runs: list[SavedRun]) -> Found:
    found: Found = {}
    for optimizer, members in grouped(runs, "optimizer").items():
        largest = sorted({run.config["batch_size"] for run in members})[-2:]
        ends = [run for run in members if run.config["batch_size"] in largest]
        slopes = [slope_of(seed_runs) for seed_runs in grouped(ends, "seed").values()]
        norms = {str(b): spread(v) for b, v in by(members, "batch_size", noise_norm).items()}
        found[optimizer] = {"slope_between_the_largest": spread(slopes), "noise_norm": norms}
    last = {name: f["slope_between_the_largest"]["mean"] for name, f in found.items()}
    return {"holds": last["shb"] > -0.1 and last["sgd"] < -0.3 and last["nshb"] < -0.3} | found


def smoother_is_less_sharp(runs: list[SavedRun]) -> Found:
    sharpness = {delta: values for delta, values in sorted(by(runs, delta_of, sharpness_of).items())}
    means = [mean(values) for values in sharpness.values()]
    rank = spearman(list(sharpness), means)
    first, *_, last = sharpness.values()
    return {
        "holds": rank <= -0.8 and means[0] - means[-1] > 2 * se_of_difference(first, last),
        "spearman": rank,
        "adaptive_sharpness": {f"{delta:.5g}": spread(values) for delta, values in sharpness.items()},
    }


CLAIMS = (
    Claim(
        "schedules",
        "(a) lr, batch and hybrid end with a higher test accuracy than constant from the same start.",
        "Holds if for each of the three the mean final test accuracy over 3 seeds exceeds that of constant by more than 2 SE.",
        schedules_beat_constant,
        f"{COMMON} --method constant lr batch hybrid --lr 0.1 --batchsize 32 --epochs 20 --decay-epoch 4",
    ),
    Claim(
        "noise-norm",
        "(d) The measured ||omega|| of SGD falls as b^-1/2.",
        "Holds if the least-squares slope of log ||omega|| against log b, fitted for each seed, has a mean within 0.05 of -1/2.",
        noise_falls_as_root,
        f"{COMMON} --mode sampling --steps 100 --draws 8 --bn eval --lr 0.05 --optimizer sgd shb nshb --beta 0.9 "
        "--batchsize 8..512x4 --epochs 10",
    ),
    Claim(
        "momentum-floor",
        "(e) SHB's search-direction noise keeps a floor as b grows, SGD's and NSHB's do not.",
        "Holds if the slope of log ||omega|| against log b between the two largest batches (mean over the seeds) is above "
        "-0.1 for shb and below -0.3 for sgd and nshb.",
        heavy_ball_keeps_a_floor,
        runs_of="noise-norm",
    ),
    Claim(
        "delta-accuracy",
        "(b) Test accuracy against delta is unimodal over a grid of lr and batch.",
        "Runs of equal delta are pooled. Holds if the best mean accuracy lies inside the grid, both ends are more than 2 SE "
        "below it, and going outwards from the best no mean exceeds the one before by more than 2 SE.",
        accuracy_is_unimodal_in_delta,
        f"{COMMON} --lr 0.05 0.2 0.8 --batchsize 8..512x4 --epochs 6",
    ),
    Claim(
        "delta-sharpness",
        "(f) A larger delta goes with a smaller adaptive sharpness.",
        "Runs of equal delta are pooled. Holds if Spearman's rank correlation of delta and mean sharpness (the published "
        "setting of python -m fastsmooth.sharpness) is at most -0.8 and the smallest delta's sharpness exceeds the largest "
        "delta's by more than 2 SE.",
        smoother_is_less_sharp,
        runs_of="delta-accuracy",
    ),
    Claim(
        "critical-batch",
        "(c) N(b) = b T(b) is convex in log b, with b* falling as eps grows.",
        "On the 1,000 training images of the first 10 classes. Holds if for every eps at least four batch sizes reach it "
        "with all seeds and every second difference of the mean N over log b is at least -2 SE, if for one eps at least the "
        "best batch is neither the smallest nor the largest, and if b* never grows with eps and is smaller for the largest "
        "than for the smallest.",
        critical_batch_exists,
        f"{COMMON.replace(' --log-every 1000000', '')} --mode critical --augment none --lr 0.1 --batchsize 32..512x2 --eps 0.7 0.9 "
        "--min-epochs 11 --epochs 500 --log-every 10 --checkpoint-every 2000",
    ),
)


# Numbers of runs ------------------------------------------------------------------------------------------------------


def final_accuracy(run: SavedRun) -> float:
    return run.summary["final_test_acc"]


def delta_of(run: SavedRun) -> float:
    return float(f"{run.of_kind('epoch')[-1]['delta']:.12g}")


def noise_norm(run: SavedRun) -> float:
    return run.noise["points"][-1]["noise_norm"]


def sharpness_of(run: SavedRun) -> float:
    return run.sharpness["results"][-1]["value"]


def grouped(runs: list[SavedRun], key: str | Callable[[SavedRun], Any]) -> dict[Any, list[SavedRun]]:
    found: dict[Any, list[SavedRun]] = {}
    for run in runs:
        found.setdefault(run.config[key] if isinstance(key, str) else key(run), []).append(run)
    return dict(sorted(found.items()))


def by(runs: list[SavedRun], key: str | Callable, value: Callable[[SavedRun], float]) -> dict[Any, list[float]]:
    return {k: [value(run) for run in members] for k, members in grouped(runs, key).items()}


def slope_of(runs: list[SavedRun]) -> float:
    """The least-squares slope of log ||omega|| against log b."""
    x, y = ([math.log(v(run)) for run in runs] for v in (lambda run: run.config["batch_size"], noise_norm))
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


# Doing it -------------------------------------------------------------------------------------------------------------


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--data-dir", required=True, type=Path, help="cifar100-12k: train/ and test/")
    p.add_argument("--work", default=Path("runs/claims"), type=Path, help="where the runs are (runs/claims)")
    p.add_argument("--records", default=ROOT / "records" / "claims", type=Path, help="where the records go")
    p.add_argument("--only", nargs="+", choices=[c.name for c in CLAIMS], help="these claims alone")
    args = p.parse_args()
    args.data_dir, args.work, args.records = (path.absolute() for path in (args.data_dir, args.work, args.records))
    for split in ("train", "test"):
        if not (args.data_dir / split).is_dir():
            sys.exit(f"--data-dir {args.data_dir} has no {split}/: it must hold cifar100-12k")
    for claim in CLAIMS:
        if args.only is None or claim.name in args.only:
            runs = do_runs(claim, args)
            found = claim.judge(runs)
            write_record(args.records / claim.name, claim, runs, found)
            print(f"{claim.name}: {'holds' if found['holds'] else 'DOES NOT HOLD'}", flush=True)


def do_runs(claim: Claim, args: argparse.Namespace) -> list[SavedRun]:
    source = next(c for c in CLAIMS if c.name == (claim.runs_of or claim.name))
    out = args.work / source.name
    images = args.data_dir if source.name != "critical-batch" else first_classes(args.data_dir, args.work / "few")
    flags = [*source.flags.split(), "--data-dir", str(images), "--out", str(out)]
    call("sweep", *flags)
    paths = [path for path in find_runs([out]) if "sampled" not in path.parts]
    if claim.judge is smoother_is_less_sharp:
        lacking = [str(path) for path in paths if not (path / "sharpness.json").exists()]
        if lacking:
            call("sharpness", *lacking)
    return [read_run(path) for path in paths]


def call(command: str, *flags: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"fastsmooth.{command}", *flags], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"fastsmooth.{command} ended with exit code {done.returncode}: the same command goes on")


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
    dump(target / "result.json", {"claim": claim.text, "rule": claim.rule, **found, **about(runs[0])})
    lines = []
    for run in runs:
        settings = {name: run.config[name] for name in varying}
        last = {
            k: run.summary.get(k)
            for k in ("final_test_acc", "final_test_loss", "epochs", "updates", "samples", "seconds")
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
        shlex.join(["python", "-m", "fastsmooth.sweep", *source.flags.split()]) + " --data-dir cifar100-12k --out DIR"
    )
    verdict = "holds" if found["holds"] else "does not hold at this scale"
    numbers = json.dumps({k: v for k, v in found.items() if k != "curves"}, indent=1)
    return (
        f"# {claim.text}\n\nVerdict: **{verdict}** ({count} runs, 3 seeds each).\n\nRule, written before the runs: {claim.rule}\n\n"
        f"    {command}\n\nor `python scripts/claims.py --data-dir cifar100-12k --only {claim.name}`.\n\n```json\n{numbers}\n```\n"
    )


if __name__ == "__main__":
    main()
