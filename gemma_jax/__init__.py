"""LoRA fine-tuning of Gemma in JAX and Flax; the README says what to read."""

__version__ = '0.1.0'
