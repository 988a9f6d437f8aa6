"""How good an encoder is: kNN, linear probe, fine-tuning, and measures without labels."""
