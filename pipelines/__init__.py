"""Bytes in object storage to two augmented views on the device."""
