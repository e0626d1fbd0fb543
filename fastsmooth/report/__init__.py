"""Run folders in, figures and one page out: python -m fastsmooth.report RUNS... [--out DIR].
Nothing here imports torch."""
