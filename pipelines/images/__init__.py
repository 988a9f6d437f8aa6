"""A single encoded image: its header, its orientation and its decoding."""
