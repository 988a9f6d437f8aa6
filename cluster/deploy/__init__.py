"""Templates of cluster manifests, the container image, and the watch for spot notices."""
