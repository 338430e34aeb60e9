"""The translation sequel, Korean to English; it starts from the opposite direction's config.

Question   is this direction easier for a model that has read more English?
Command    python -m launch.train \\
             --config=experiments/translate_ko_en.py:PATH \\
             --workdir=DIR     with PATH as in translate_en_ko.py
Cost       see experiments/README.md#korean-and-translation
Result     see experiments/README.md#korean-and-translation
"""

from experiments import translate_en_ko
from gemma_jax.config.train import TrainConfig


def get_config(path: str = 'kor.txt') -> TrainConfig:
  """`translate_en_ko` with the two languages swapped."""
  return translate_en_ko.get_config(path, template='ko_en')
