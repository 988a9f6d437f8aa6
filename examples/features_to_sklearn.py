"""Features of a trained encoder in scikit-learn: a classifier from a few labels, and clusters without any.

python examples/features_to_sklearn.py runs/own-images FOLDER
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import normalized_mutual_info_score
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cluster import run_embed


def main() -> None:
    """Embed the labelled images in FOLDER by the encoder of RUN, and see what their features are good for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="OUTPUT/NAME of a run")
    parser.add_argument("folder", help="labelled images: a path or URI")
    parser.add_argument("--features", default="features", help="where the features are kept")
    given = parser.parse_args()

    run_embed(given.run, given.folder, given.features)
    shards = sorted(str(path) for path in Path(given.features).glob("*.parquet"))
    table = ds.dataset(shards).to_table(columns=["label", "feature"])
    features = np.stack(table["feature"].to_numpy())
    labels = table["label"].to_numpy()

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    accuracy = cross_val_score(classifier, features, labels, cv=5)
    print(f"logistic regression: {accuracy.mean():.1%} of {len(labels):,} images, 5-fold")

    found = KMeans(n_clusters=len(np.unique(labels)), random_state=0).fit_predict(features)
    shared = normalized_mutual_info_score(labels, found)
    print(f"k-means without labels: normalised mutual information with the classes {shared:.2f}")


if __name__ == "__main__":
    main()
