#!/usr/bin/env bash
# Training at full length on a GPU: bash benchmarks/gpu_runs.sh [CELL ...]
#
# Decoding by DALI while ResNet-50 trains (decode), 200 epochs of CIFAR-100 under three schedules (long), and the accuracies of
# three seeds by precision (precisions): the table RUNS of benchmarks/gpu_cells.py has the seconds of each. Needs what
# gpu_check.sh needs, and heeds PYTHON, DATA and OUT as it does; the images are those of cifar100-12k.tar and imagenet-128.tar.
#
# Writes <date>_gpu_runs.jsonl and .log, a row as soon as it is known. Exit code: 0 all passed, 1 something failed, 2 no GPU.
set -u

. "$(dirname "$0")/gpu_python.sh" || exit
exec "$python" -m benchmarks.gpu_cells --runs "$@" "${flags[@]}"
