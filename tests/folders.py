"""Folders of image files, for tests of what users keep in them."""

from pathlib import Path

from cluster.digits import scattered_digits


def digit_folders(root: Path, count: int, *, held_out: bool = False) -> Path:
    """`count` handwritten digits on coloured canvases of 32 pixels, as PNG in a folder for each digit."""
    for number, (image, label, _) in enumerate(scattered_digits(count, held_out=held_out, seed=4)):
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05}.png").write_bytes(image)
    return root
