"""Configs whose fields a test overrides: `--config=tests/config/configs.py:KIND`."""

from gemma_jax.config.sweep import GridConfig, SweepConfig
from gemma_jax.config.train import TrainConfig

KINDS = {
  'train': TrainConfig,
  'sweep': lambda: SweepConfig(grid=GridConfig(ranks=(1, 2), seeds=(0, 1, 2))),
  # An integer and a list, which do for a float and a tuple.
  'loose': lambda: SweepConfig(
    TrainConfig(epochs=1, trainable=['lora/']), GridConfig(ranks=(1, 2))
  ),
}


def get_config(kind: str) -> TrainConfig | SweepConfig:
  """A new one of a kind."""
  return KINDS[kind]()
