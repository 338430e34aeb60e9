"""LoRA fine-tuning of Gemma in JAX and Flax; the README says what to read."""
