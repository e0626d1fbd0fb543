"""Make fastsmooth/data/imagenet.npz: python scripts/make_imagenet.py WNIDS.txt.gz

WNIDS.txt.gz has the WordNet id of each image of ImageNet's validation set (ILSVRC2012), a line an
image, in the order of the images' numbers. The names of the classes are torchvision's. The output
is the same bytes on every run.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
from torchvision.models import ResNet18_Weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastsmooth.messages import say
from scripts import npz

TARGET = Path(__file__).resolve().parent.parent / "fastsmooth" / "data" / "imagenet.npz"


def main() -> None:
    given = gzip.decompress(Path(sys.argv[1]).read_bytes()).decode().split()
    wnids, labels = np.unique(given, return_inverse=True)
    names = "\n".join(ResNet18_Weights.DEFAULT.meta["categories"]).encode()
    arrays = {
        "wnids": np.array([int(wnid.removeprefix("n")) for wnid in wnids], np.uint32),  # [1000]
        "names": np.frombuffer(names, np.uint8),  # in the order of wnids, a line each
        "labels": labels.astype(np.uint16),  # [50,000], positions in wnids
    }
    npz.write(TARGET, arrays)
    say(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
