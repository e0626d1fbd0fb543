"""How many processors are this process's: its affinity, and the CPU quota of its control groups,
versions 1 and 2."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from images import tree

from fastsmooth import processors
from fastsmooth.processors import quota

ROOT = Path(__file__).parent.parent.parent
OTHERS = (
    "23 1 0:21 / /proc rw,nosuid - proc proc rw\n25 1 0:23 / {0}/memory rw - cgroup cgroup "
    "rw,memory\n"
)


def grouped(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """A folder like /proc/self whose control groups are files below `root`; {0} in `mounts` is
    where they are mounted."""
    place = str(root / "sys fs")
    tree(root / "sys fs", {name: text.encode() for name, text in files.items()})
    text = (OTHERS + mounts).format(place.replace(" ", "\\040"))
    tree(root / "self", {"cgroup": cgroup.encode(), "mountinfo": text.encode()})
    return root / "self"


V2 = "30 1 0:28 / {0} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 1 0:29 / {0}/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n33 1 0:30 / {0}/cpuset rw - "
    "cgroup cgroup rw,cpuset\n"
)
CASES = {  # name: cgroup, mountinfo, files, quota
    "2, a container": ("0::/\n", V2, {"cpu.max": "150000 100000\n"}, 1.5),
    "2, without a limit": ("0::/\n", V2, {"cpu.max": "max 100000\n"}, math.inf),
    "2, another period": ("0::/\n", V2, {"cpu.max": "80000 20000\n"}, 4.0),
    "2, the root has no file": ("0::/user.slice/a\n", V2,
        {"user.slice/a/cpu.max": "300000 100000\n"}, 3.0),
    "2, a limit of the group around it": (
        "0::/pod/box\n", V2, {"pod/cpu.max": "200000 100000\n", "pod/box/cpu.max": "max 100000\n"},
        2.0,
    ),
    "2, the tighter of two": ("0::/pod/box\n", V2, {"pod/cpu.max": "200000 100000\n",
        "pod/box/cpu.max": "50000 100000\n"}, 0.5),
    "2, a group of others": ("0::/pod/box\n", V2, {"pod/other/cpu.max": "50000 100000\n"},
        math.inf),
    "2, a path outside of the container": ("0::/../../host\n", V2, {"cpu.max": "200000 100000\n"},
        2.0),
    "1, a container that sees its part": (
        "5:cpu,cpuacct:/docker/3f\n4:memory:/docker/3f\n",
        "32 1 0:29 /docker/3f {0}/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n",
        {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        2.5,
    ),
    "1, a job of a machine": (
        "5:cpu,cpuacct:/slurm/job_7/step_0\n", V1,
        {"cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "400000\n",
        "cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000\n",
         "cpu,cpuacct/slurm/job_7/step_0/cpu.cfs_quota_us": "-1\n",
         "cpu,cpuacct/slurm/job_7/step_0/cpu.cfs_period_us": "100000\n"},
        4.0,
    ),
    "1, without a limit": (
        "5:cpu,cpuacct:/\n", V1, {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, math.inf,
    ),
    "1, its quota in the folder of another controller": (
        "5:cpuset:/\n4:cpu,cpuacct:/\n", V1, {"cpuset/cpu.cfs_quota_us": "100000\n",
            "cpuset/cpu.cfs_period_us": "100000\n"}, math.inf,
    ),
    "both, the limit in 1": (
        "1:cpu,cpuacct:/a\n0::/\n", V1 + V2.replace("{0}", "{0}/unified"),
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n",
        "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n", "unified/x": ""}, 0.5,
    ),
    "no control groups": ("", "", {}, math.inf),
    "damaged": ("0::/\n", V2, {"cpu.max": "many of them\n"}, math.inf),
    "damaged, without a period": ("0::/\n", V2, {"cpu.max": "100000\n"}, math.inf),
    "damaged, a period of 0": ("0::/\n", V2, {"cpu.max": "100000 0\n"}, math.inf),
    "damaged mounts": ("nonsense\n", "nonsense\n", {}, math.inf),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_quota_of_control_groups_is_found(tmp_path, name, cases):
    cases("CPU quotas of control groups, as files say them", 1, 1)
    cgroup, mounts, files, expected = CASES[name]
    assert quota(grouped(tmp_path, cgroup, mounts, files)) == expected


def test_there_is_no_quota_where_there_is_no_proc(tmp_path):
    assert quota(tmp_path / "none") == math.inf


@pytest.mark.parametrize(
    ("granted", "mine", "found"),
    [(0.2, 8, 1), (1.9, 8, 1), (2.5, 8, 2), (16, 8, 8), (math.inf, 8, 8), (3, 2, 2)],
)
def test_a_quota_is_rounded_down_but_never_to_none(monkeypatch, granted, mine, found):
    monkeypatch.setattr(processors, "quota", lambda: granted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(mine)), raising=False)
    assert processors.processors() == found


CODE = """
import os, sys
from fastsmooth import processors
processors.quota = lambda: 2.5
os.sched_getaffinity = lambda pid: set(range(6))
import torch
torch.set_num_threads(6)
from fastsmooth import train
from fastsmooth.cli.config import resolve
from fastsmooth.data import open_data
code = train.main(sys.argv[1:])
print("THREADS", torch.get_num_threads(), code)
print(open_data(resolve({"loader": "threads"}), torch.device("cpu")).choice)
"""


@pytest.mark.parametrize(("limit", "expected"), [(None, 2), ("6", 6)])
def test_pytorch_and_the_loaders_take_no_more_threads_than_the_quota_pays_for(
    tmp_path, limit, expected
):
    env = {key: value for key, value in os.environ.items() if key not in processors.THREADS} | {
        "PYTHONPATH": str(ROOT)
    }
    env |= {"OMP_NUM_THREADS": limit} if limit else {}
    argv = [
        "--device",
        "cpu",
        "--batchsize",
        "32",
        "--steps",
        "99999",
        "--mode",
        "sampling",
    ]  # refused when the data is
    found = subprocess.run(
        [sys.executable, "-c", CODE, *argv], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert f"THREADS {expected} 2" in found.stdout, found.stderr
    assert "2 threads," in found.stdout


def test_the_doctor_says_the_quota(monkeypatch):
    from fastsmooth.cli import doctor

    monkeypatch.setattr(doctor, "quota", lambda: 2.5)
    monkeypatch.setattr(processors, "quota", lambda: 2.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name in processors.THREADS:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        text = doctor.threads(torch).text
    finally:
        torch.set_num_threads(before)
    assert (
        text
        == f"2 of {os.cpu_count()} usable (the container's quota is 2.5), PyTorch takes 2 threads"
    )
