"""Random views: the draws, and DALI and our own code that carry them out."""
