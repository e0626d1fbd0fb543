"""Two methods, trained as the command line trains, and compared by what their run folders hold."""

import contextlib
import io
import tempfile

import fastsmooth as fs
from fastsmooth.train import main as train  # the words of a command line in, its exit code out

FLAGS = "--epochs 3 --batchsize 64 --norm group --track-noise every=1ep"

with tempfile.TemporaryDirectory() as folder:
    for method in ("constant", "hybrid"):
        with contextlib.redirect_stdout(io.StringIO()):  # the lines of the epochs
            assert train([*FLAGS.split(), "--method", method, "--out", f"{folder}/{method}"]) == 0
    runs = fs.load_runs(folder)  # which pandas.DataFrame takes
    measured = fs.load_runs(folder, rows="measure")

for run in runs:
    accuracy, updates = run["final_test_acc"], run["updates"]
    print(f"{run['configuration']}: test accuracy {accuracy:.1%} after {updates} updates")
for row in measured:
    print(
        f"{row['run']:8}  epoch {row['epoch']}  batch {row['batch_size']:3}  "
        f"C2 {row['c2_sampled']:5.1f}  delta {row['delta_measured']:.3f}"
    )
