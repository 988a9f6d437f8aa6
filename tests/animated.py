"""An animated PNG that ends the process in which DALI decodes it."""

import io

import numpy as np
import pyarrow as pa
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


def with_deadly(table: pa.Table, sample: int) -> pa.Table:
    """The table (reader.SCHEMA), that sample of which ends the decoder: past a header that would tell."""
    deadly = table["sample"].to_numpy() == sample
    columns = {
        "image": [
            broken_animation() if one else image
            for one, image in zip(deadly, table["image"].to_pylist(), strict=True)
        ],
        "height": np.where(deadly, 64, table["height"].to_numpy()),
        "width": np.where(deadly, 128, table["width"].to_numpy()),
    }
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    return table
