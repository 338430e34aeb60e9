"""The translation sequel, English to Korean, on Tatoeba's sentence pairs.

Question   5,749 sentence pairs: how far does the held-out loss per Korean token
           fall?
Command    python -m launch.train \\
             --config=experiments/translate_en_ko.py:PATH \\
             --workdir=DIR     with PATH the kor.txt of
             manythings.org/anki/kor-eng.zip (CC BY 2.0 FR)
Cost       see experiments/README.md#korean-and-translation
Result     see experiments/README.md#korean-and-translation
"""

import dataclasses

from experiments import korean
from gemma_jax.config.train import TrainConfig


def get_config(path: str = 'kor.txt', template: str = 'en_ko') -> TrainConfig:
  """`korean` on sentence pairs."""
  config = korean.get_config()
  return dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, path=f'tfds:tatoeba_en_ko:{path}', template=template),
  )
