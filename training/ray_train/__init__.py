"""Training on a Ray cluster: workers, their events, lost and new nodes."""
