"""From a folder of images to an encoder: train without the labels, judge it with them, and export it.

    python examples/own_images.py FOLDER --epochs 50    # classes are the folders within FOLDER

Without such folders, add --no-labels: nothing is judged then.
"""

import argparse
from pathlib import Path

import torch

from cluster import run_export, run_training
from pipelines import DataConfig, ViewRecipe
from training import EncoderConfig, EvaluationConfig, OptimizerConfig, TrainConfig, read_trained


def main() -> None:
    """Train on the images in FOLDER; the run, its report and encoder.safetensors are in OUTPUT/NAME."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="images in folders, or Parquet or tars of them; a path or URI")
    parser.add_argument("--no-labels", action="store_true", help="the images have none")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="height and width of a view")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--output", default="runs")
    parser.add_argument("--name", default="own-images")
    given = parser.parse_args()

    run = Path(given.output) / given.name
    config = TrainConfig(
        data=DataConfig(train=given.folder, view=ViewRecipe(size=given.size)),
        encoder=EncoderConfig(name=given.encoder),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3, scaling="none"),
        # A tenth of the images is not trained on: how well their neighbours tell their classes is watched.
        evaluation=EvaluationConfig(held_out=None if given.no_labels else 0.1),
        batch_size=given.batch_size,
        epochs=given.epochs,
        output=given.output,
        name=given.name,
    )
    for line in run_training(config):
        if "knn_top1" in line:
            accuracy = f"{line['knn_top1']:.1%} ± {100 * line['knn_top1_margin']:.1f}"
            print(f"step {line['step']}: kNN accuracy {accuracy} on images that were held out")
    run_export(str(run), str(run / "encoder.safetensors"), "safetensors")

    trained = read_trained(str(run))
    with torch.inference_mode():
        features = trained.encoder(torch.zeros(1, 3, given.size, given.size))
    print(f"an image of {given.size} x {given.size} pixels becomes {features.shape[1]} numbers")


if __name__ == "__main__":
    main()
