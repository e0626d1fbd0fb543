"""Run folders in, figures, tables and one page out: python -m fastsmooth.report RUNS... Nothing here
imports torch."""
