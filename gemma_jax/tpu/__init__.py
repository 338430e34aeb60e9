"""What a run needs on a TPU slice that is not here."""
