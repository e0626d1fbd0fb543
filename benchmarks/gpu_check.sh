#!/usr/bin/env bash
# Every check that needs a GPU, in one call of under 8 minutes: bash benchmarks/gpu_check.sh
#
# Runs the kernels' tests on the GPU, not in Triton's interpreter, and those of whole runs there, then the benchmarks of the
# kernels and of gradient noise. Needs Linux, an NVIDIA driver, a C compiler (Triton calls it) and Python 3.11 or newer;
# PYTHON names one, else .venv or python3. Where that has no PyTorch that sees the GPU, no torchvision, pytest or
# pytest-xdist, they are installed into .venv/gpu: up to 3 GB to download. IMAGES may name a tree like ImageNet's: then its
# decoding by DALI is measured too (python -m benchmarks.gpu_decode), 100 seconds more.
#
# Writes <date>_gpu_kernels.jsonl, _noise.jsonl, _decode.jsonl and _check.log into ${OUT:-benchmarks/results}. A part that
# fails or takes too long stops no other. Exit code: 0 all passed, 1 something failed, 2 no GPU.
set -u

LIMIT=460 # seconds for everything but decoding
INSTALL=200 TESTS=220
NOISE=110 # of LIMIT, kept for the benchmark of noise

if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    echo "gpu_check: no NVIDIA GPU on this machine (nvidia-smi lists none): nothing was run" >&2
    exit 2
fi

root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
out=${OUT:-$root/benchmarks/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$root" || exit 1
name=$out/$(date -u +%F)_gpu
log=${name}_check.log
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
unset TRITON_INTERPRET
failed=0

# start PART SECONDS COMMAND...: runs the command for so long at most, within what is left of LIMIT.
start() {
    local part=$1 most=$2 left=$((LIMIT - SECONDS)) began=$SECONDS
    shift 2
    ((left < most)) && most=$left
    if ((most > 0)); then
        timeout -k 5 "$most" "$@" >"$scratch/$part" 2>&1
    else
        echo "no time left" >"$scratch/$part"
        false
    fi
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

sees_gpu() {
    "$1" -c 'import sys, torch; assert torch.cuda.is_available() and torch.__version__ >= (2, 10) and sys.version_info >= (3, 11)'
} >/dev/null 2>&1

complete() {
    sees_gpu "$1" && "$1" -c 'import numpy, pytest, torchvision, xdist'
} >/dev/null 2>&1

install() {
    local with=() base=${PYTHON:-python3}
    sees_gpu "$base" && with=(--system-site-packages) # then only what is missing is downloaded
    "$base" -m venv "${with[@]}" .venv/gpu &&
        .venv/gpu/bin/python -m pip install --quiet --disable-pip-version-check torch torchvision pytest pytest-xdist -e .
}

{
    date -u
    nvidia-smi
} >"$log" 2>&1

python=
for candidate in ${PYTHON:+"$PYTHON"} .venv/bin/python .venv/gpu/bin/python python3; do
    if complete "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    export -f install sees_gpu
    start install "$INSTALL" bash -c install
    report install
    ((failed)) && exit 1
    python=.venv/gpu/bin/python
    if ! complete "$python"; then # without this the tests would pass in the interpreter
        echo "gpu_check: the PyTorch that pip installs cannot use this GPU: update the driver, or set PYTHON" >&2
        exit 1
    fi
fi

# side by side and in several processes: most of their time goes into compiling kernels, on one core each
# another PyTorch may warn of other things, which are no failures here
pytest=("$python" -m pytest -W default)
workers=$((($(nproc) + 1) / 2))
start tests_gpu "$TESTS" "${pytest[@]}" --numprocesses "$(((workers + 1) / 2))" --durations 10 tests/test_gpu.py &
start tests_kernels "$TESTS" "${pytest[@]}" --numprocesses "$workers" tests/test_kernels.py tests/test_kernels_augment.py &
start tests_machine_code "$TESTS" "${pytest[@]}" --numprocesses 1 tests/test_aot.py &
start tests_optim "$TESTS" "${pytest[@]}" --numprocesses 1 tests/test_optim.py &
wait
for part in tests_kernels tests_machine_code tests_optim tests_gpu; do
    report "$part"
done

# The cases and variants that fit in the time, the most telling first; what is finished when time is up is kept.
start bench_kernels $((LIMIT - NOISE - SECONDS)) "$python" -m benchmarks.bench_kernels --device cuda --json --out "${name}_kernels.jsonl" \
    --cases update/resnet18/shb persample_noise/B32 persample_noise/B8 update/resnet18/sgd \
    --variants ours loop foreach fused compiled eager
report bench_kernels
start bench_noise "$LIMIT" "$python" -m benchmarks.bench_noise --device cuda --json --out "${name}_noise.jsonl" \
    --cases persample/resnet18/group/b128 persample/resnet20/group/b32 \
    --variants ours ours_inner vmap opacus opacus_ghost backpack
report bench_noise
if [ -n "${IMAGES:-}" ]; then
    LIMIT=$((SECONDS + 180))
    start gpu_decode "$LIMIT" "$python" -m benchmarks.gpu_decode "$IMAGES" --out "${name}_decode.jsonl"
    report gpu_decode
fi

verdict=$( ((failed)) && echo "something failed" || echo "all passed")
echo "gpu_check: $verdict in $SECONDS s: ${name}_*.jsonl, $log"
exit "$failed"
