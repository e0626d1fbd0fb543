"""The flags of runs whose results are compared bit for bit: on a GPU they must ask for it."""

import torch

EXACT = ["--deterministic"] if torch.cuda.is_available() else []
