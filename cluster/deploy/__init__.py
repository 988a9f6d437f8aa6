"""What clusters are made from: templates of manifests, the image, and the watch for spot notices."""
