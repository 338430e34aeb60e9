"""The Korean sequel: does an adapter make the 270M chat in Korean?

Question   11,823 short question/answer pairs of everyday talk: how far does the
           held-out loss fall, and does the answer stay in Korean?
Command    python -m launch.train --config=experiments/korean.py:PATH \\
             --workdir=DIR     with PATH the ChatbotData.csv of
             github.com/songys/Chatbot_data (MIT)
Cost       see experiments/README.md#korean-and-translation
Result     see experiments/README.md#korean-and-translation
"""

import dataclasses

from experiments import dolly_lora
from gemma_jax.config.train import TrainConfig


def get_config(path: str = 'ChatbotData.csv') -> TrainConfig:
  """`dolly_lora` on the Korean pairs, in short rows since the pairs are short."""
  config = dolly_lora.get_config()
  return dataclasses.replace(
    config,
    data=dataclasses.replace(
      config.data, path=f'tfds:korean_chatbot:{path}', template='korean', seq_len=256
    ),
  )
