"""Checkpoint formats, one file each: how they are found, read and written."""
