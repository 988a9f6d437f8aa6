"""Train with an objective and a recipe of one's own: VICReg, on views that are cropped and rotated alone.

python examples/own_objective.py FOLDER --epochs 20 --workers 2
"""

import argparse

from cluster import run_training
from pipelines import DataConfig, ViewRecipe
from training import EncoderConfig, EvaluationConfig, OptimizerConfig, TrainConfig


def main() -> None:
    """Train on the images in FOLDER, and print the loss of each step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="images, or Parquet or tars of them; a path or URI")
    parser.add_argument("--size", type=int, default=64, help="height and width of a view")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="the loss is the same with any number")
    parser.add_argument("--output", default="runs")
    parser.add_argument("--name", default="vicreg")
    given = parser.parse_args()

    # Whatever a view is made with is a field of ViewRecipe; this one leaves the colours alone.
    recipe = ViewRecipe(
        size=given.size, crop_scale=(0.3, 1.0), jitter=0.0, grey=0.0, blur=0.0,
        rotate=0.5, rotate_degrees=(-20.0, 20.0),
    )  # fmt: skip
    config = TrainConfig(
        data=DataConfig(train=given.folder, view=recipe, window_rows=256),
        objective="vicreg:VICReg",  # The file vicreg.py beside this one; workers get it from here.
        objective_options={"dim": 256, "variance": 25.0},
        encoder=EncoderConfig(name="resnet8"),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3, scaling="none"),
        evaluation=EvaluationConfig(diagnostic_images=256),
        batch_size=given.batch_size,
        epochs=given.epochs,
        workers=given.workers,
        output=given.output,
        name=given.name,
    )
    for line in run_training(config):
        if "loss" in line:
            print(f"step {line['step']}: loss {line['loss']:.6f}")


if __name__ == "__main__":
    main()
