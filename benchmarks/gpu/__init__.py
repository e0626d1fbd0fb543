"""The cells of benchmarks.gpu_cells: what is measured and checked on a GPU, and how."""
