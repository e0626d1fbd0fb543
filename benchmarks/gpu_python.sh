# Sourced by the scripts for GPUs: goes to the root of the checkout and sets `python`, the interpreter; `out`, the folder of
# results; and `flags`, what both scripts give to benchmarks.gpu_cells.

if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    echo "$(basename "$0" .sh): no NVIDIA GPU on this machine (nvidia-smi lists none): nothing was run" >&2
    exit 2
fi

# importing PyTorch takes too long on a cold machine to be done only to look
complete() {
    "$1" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "torchvision", "numpy"))))'
} >/dev/null 2>&1

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
out=$(realpath -m "${OUT:-$root/benchmarks/results}")
flags=(--out "$out")
[ -z "${DATA:-}" ] || flags+=(--data "$(realpath -m "$DATA")")
cd "$root" || exit 1
python=
for candidate in ${PYTHON:+"$PYTHON"} .venv/bin/python python3; do
    if complete "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "$(basename "$0" .sh): no Python here has PyTorch, torchvision and NumPy: pip install torch torchvision numpy, or set PYTHON" >&2
    exit 1
fi
unset TRITON_INTERPRET
mkdir -p "$out" || exit 1
