"""The formats of data sets: Parquet files, WebDataset tars, folders of images, torchvision's data sets."""
