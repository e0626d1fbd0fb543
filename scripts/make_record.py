"""Turn finished runs that differ in their seed alone into a record: python scripts/make_record.py
records/NAME RUN [RUN ...]

record.json          command, n, mean and standard deviation of the final and the best test
                     accuracy, seeds, machine
config.json          the configuration that the runs share
seed<N>.jsonl        each run's metrics.jsonl; seed<N>.noise.json, seed<N>.critical.json where the
                     mode made one
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastsmooth.messages import BAD_INPUT, DONE, end_with, show, tell

OWN = ("seed", "out", "resume")  # of each run; the rest of the configuration must be the same
ABOUT = ("commit", "torch", "processor", "cpus", "threads", "gpu")


def read(run: Path, name: str) -> dict:
    return json.loads((run / name).read_text())


def command(run: Path) -> str:
    """The command line as a reader would type it: where the run's images and folder were is left
    out."""
    words, kept = read(run, "env.json")["command"][2:], []
    if words[:1] == ["train"]:  # after the name of the program: fastsmooth train
        words.pop(0)
    while words:
        word = words.pop(0)
        if word in ("--out", "--seed"):
            words.pop(0)
        elif word == "--data-dir":
            kept += [word, Path(words.pop(0)).name]
        else:
            kept.append(word)
    return " ".join(["python -m fastsmooth.train", *kept])


def spread(values: list[float]) -> dict:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": values}


def main() -> int:
    if len(sys.argv) < 3:
        show(*__doc__.splitlines())
        return BAD_INPUT
    try:
        make(*map(Path, sys.argv[1:]))
    except (OSError, ValueError) as error:
        tell("error", error)
        return BAD_INPUT
    return DONE


def make(target: Path, *runs: Path) -> None:
    """Write the record. Raises ValueError where the runs are no repetitions of each other."""
    configs = [read(run, "config.json") for run in runs]
    shared = {key: value for key, value in configs[0].items() if key not in OWN}
    for run, config in zip(runs, configs, strict=True):
        if read(run, "status.json")["state"] != "done":
            raise ValueError(f"{run} is not done: go on with --resume --out {run}")
        differing = [key for key in shared if config[key] != shared[key]]
        if differing:
            raise ValueError(
                f"{run} differs from {runs[0]} in {', '.join(differing)}: make a record of each"
            )
    summaries = [read(run, "summary.json") for run in runs]
    record = {
        "command": command(runs[0]),
        "n": len(runs),
        "seeds": [config["seed"] for config in configs],
    }
    if shared["mode"] == "normal":
        for key in ("final_test_acc", "best_test_acc"):
            record[key] = spread([summary[key] for summary in summaries])
    record["seconds"] = [summary["seconds"] for summary in summaries]
    record |= {key: read(runs[0], "env.json")[key] for key in ABOUT}
    target.mkdir(parents=True)
    shared["data_dir"] = Path(shared["data_dir"] or "").name
    for name, value in {"record.json": record, "config.json": shared}.items():
        (target / name).write_text(json.dumps(value, indent=1) + "\n")
    for run, config in zip(runs, configs, strict=True):
        for name in ("metrics.jsonl", "noise.json", "critical.json"):
            if (run / name).exists():
                kind = "jsonl" if name == "metrics.jsonl" else name
                shutil.copy(run / name, target / f"seed{config['seed']}.{kind}")


if __name__ == "__main__":
    end_with(main)
