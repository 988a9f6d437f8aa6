"""One encoded image: its header, its orientation, and whether and how it decodes."""
