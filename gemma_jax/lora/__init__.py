"""Adapters: their factors, how they align, what their updates are."""
