#!/usr/bin/env bash
# Every check that needs a GPU, in one call of under ten minutes: bash benchmarks/gpu_check.sh [--tests] [CELL ...]
#
# Runs the cells of the check (benchmarks/gpu_cells.py has the table; CELL names some), or with --tests the tests that need a
# GPU: alone, or after the cells that are named. Needs Linux, an NVIDIA driver, a C compiler (Triton calls it) and Python 3.11 or
# newer with PyTorch, torchvision and NumPy, for the tests pytest and pytest-xdist too; PYTHON names one, else .venv or python3.
# Nothing is downloaded. DATA may name the folder with the images' archives, else it is data in the checkout.
#
# Writes <date>_gpu_check.jsonl and .log into ${OUT:-benchmarks/results}, a row as soon as it is known. A cell or a file of tests
# that fails or takes too long stops no other. Exit code: 0 all passed, 1 something failed, 2 no GPU.
set -u

TESTS=220 # seconds

. "$(dirname "$0")/gpu_python.sh" || exit

tests=0 cells=()
for argument; do
    if [ "$argument" = --tests ]; then tests=1; else cells+=("$argument"); fi
done
failed=0
if ((!tests)) || ((${#cells[@]})); then
    "$python" -m benchmarks.gpu_cells "${cells[@]}" "${flags[@]}" || failed=$?
fi
((tests && failed != 2)) || exit "$failed"

if ! "$python" -c 'import pytest, xdist'; then
    echo "gpu_check: $python has no pytest and pytest-xdist: pip install pytest pytest-xdist" >&2
    exit 1
fi
log=$out/$(date -u +%F)_gpu_tests.log
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
{
    date -u
    nvidia-smi
} >"$log" 2>&1

# start PART PROCESSES FILE...: runs files of tests for so long at most. Another PyTorch may warn of other things, which are no
# failures here.
start() {
    local part=$1 processes=$2 began=$SECONDS
    shift 2
    timeout -k 5 "$TESTS" "$python" -m pytest -W default --numprocesses "$processes" --durations 5 "$@" >"$scratch/$part" 2>&1
    echo "$? $((SECONDS - began))" >"$scratch/$part.code"
}

# report PART: what became of it, on the screen and, with all its words, in the log.
report() {
    local part=$1 code seconds verdict=passed
    read -r code seconds <"$scratch/$part.code"
    ((code == 124 || code == 137)) && verdict="stopped, out of time"
    ((code != 0 && code != 124 && code != 137)) && verdict="failed with code $code"
    ((code != 0)) && failed=1
    {
        echo "== $part: $verdict ($seconds s)"
        cat "$scratch/$part"
    } >>"$log"
    echo "$part: $verdict ($seconds s)"
    ((code == 0)) || tail -n 15 "$scratch/$part"
}

# side by side and in several processes: most of their time goes into compiling kernels, on one core each
workers=$((($(nproc) + 1) / 2))
start tests_gpu "$(((workers + 1) / 2))" tests/test_gpu.py &
start tests_kernels "$workers" tests/test_kernels*.py &
start tests_machine_code 1 tests/test_aot.py &
start tests_optim 1 tests/test_optim.py &
wait
for part in tests_kernels tests_machine_code tests_optim tests_gpu; do
    report "$part"
done
echo "gpu_check: $( ((failed)) && echo "something failed" || echo "all passed") in $SECONDS s: $log"
exit "$failed"
