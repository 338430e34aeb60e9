"""Faults, made on purpose and counted; see README.md."""
