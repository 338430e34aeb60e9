"""English and Korean sentences that translate each other."""

from gemma_jax.data.tfds.tatoeba_en_ko.tatoeba_en_ko import TatoebaEnKo

__all__ = ['TatoebaEnKo']
