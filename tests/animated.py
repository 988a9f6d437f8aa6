"""An animated PNG that ends the process in which DALI decodes it."""

import io

import numpy as np
from PIL import Image


def broken_animation() -> bytes:
    """64 x 128 pixels; the chunk of a frame's pixels has a name that is none."""
    stripes = np.arange(64 * 128).reshape(64, 128) // 64 % 2 * 255
    frames = [
        Image.fromarray((stripes ^ (number * 255)).astype(np.uint8)).convert("1") for number in range(3)
    ]
    out = io.BytesIO()
    frames[0].save(out, "PNG", save_all=True, default_image=True, append_images=frames[1:])
    return out.getvalue().replace(b"fdAT", b"fd\xffT", 1)
