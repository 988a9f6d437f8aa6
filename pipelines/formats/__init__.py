"""Formats of data sets: Parquet files, WebDataset tars, folders of image files, torchvision's data sets."""
