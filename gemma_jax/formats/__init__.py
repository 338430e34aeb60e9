"""Checkpoint formats, one file each: how they are recognized, read and written."""
