"""JPEGs decoded at 1/2, 1/4 or 1/8 of their size where no more is wanted: --decode reduced.

libjpeg leaves out the frequencies that a smaller image does not have, and most of the work on
pixels; reading the bits stays. What it makes is sharper than pixels averaged, so the view differs
from that of the full decode. Measured on 256 photographs of ImageNet (usually 500 x 375), and on 32
of them enlarged to 2000 x 1500, both views at each size, a core of an EPYC, processor time:

    photographs   view  reduced    difference of 255     PSNR       times as fast as in full
                        of both    mean (worst image)   (worst)     threads      torch
    as they are   224       3 %    1.1  (2.0)           41 (38) dB  0.9 to 1.1   1.5 to 1.6
                  128      69 %    1.5  (4.4)           39 (33) dB  0.9 to 1.0   1.3 to 1.4
                   64      94 %    1.5  (3.9)           40 (33) dB  1.1          1.3 to 1.5
    enlarged      224      97 %    0.8  (1.6)           45 (41) dB  1.3 to 1.4   2.2 to 2.8
                  128     100 %    1.5  (3.4)           40 (34) dB  1.6 to 1.8   2.4 to 3.8

(threads decodes in full by torchvision, torch by PIL, as here.) So it is for photographs much
larger than they are trained at: ImageNet's gain nothing from it by threads, and what `prepare` made
at 256 is not reduced for views of 224. With twice the pixels to spare the PSNR was 50 dB and more,
and the large ones 0.9 to 1.4 times as fast by threads: hardly worth it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

from PIL import Image

from fastsmooth.data.augment import View
from fastsmooth.data.files import Files
from fastsmooth.data.images import opened

FACTORS = (8, 4, 2)  # of libjpeg's scales


def factor(view: View) -> int:
    """By which the image may be smaller: the box of the view still has as many pixels as it is
    resized to, or more. 1 where it may not."""
    (_, _, height, width), (tall, wide), _, _ = view
    return next((k for k in FACTORS if height >= k * tall and width >= k * wide), 1)


def decoded(files: Files, i: int, view_of: Callable[[int, int], View | None]) -> Image.Image | None:
    """The view of image i, RGB, decoded at the smallest scale that does.

    view_of(width, height) says which view that is; None: none. None where only the whole image
    will do, is no usual JPEG, or cannot be read: whoever decodes it finds the words.
    """
    with suppress(Exception), opened(files, i) as image:
        usual = image.format == "JPEG" and image.mode in ("RGB", "L")
        view = view_of(*image.size) if usual else None
        if view is not None and (k := factor(view)) > 1:
            image.draft(None, (image.width // k, image.height // k))
            image.load()
            whole = image if image.mode == "RGB" else image.convert("RGB")
            return cut(whole, k, view)
    return None


def cut(image: Image.Image, k: int, view: View) -> Image.Image:
    """The view, in pixels of the whole image, of one that is k times smaller.

    A pixel there is k x k pixels here, the last ones in part; so the box begins and ends within
    pixels, and none that lies outside of it is looked at.
    """
    (top, left, height, width), (tall, wide), (down, right), size = view
    x, y = left // k, top // k
    image = image.crop((x, y, math.ceil((left + width) / k), math.ceil((top + height) / k)))
    box = left / k - x, top / k - y, (left + width) / k - x, (top + height) / k - y
    image = image.resize((wide, tall), Image.Resampling.BILINEAR, box)
    return image.crop((right, down, right + size, down + size))
