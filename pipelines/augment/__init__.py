"""Random views: the random draws, and the DALI and PyTorch code that applies them."""
