"""Bases and merged adapters, written for other tools and compared."""
