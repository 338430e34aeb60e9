"""databricks-dolly-15k."""

from gemma_jax.data.tfds.dolly.dolly import Dolly

__all__ = ['Dolly']
