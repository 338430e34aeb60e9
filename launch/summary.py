"""The parameter table of a config, from shapes alone.

  python -m launch.summary --config=experiments/keras_tutorial.py \\
      --model=random:gemma_2b
"""

from absl import flags
import jax.numpy as jnp
from ml_collections import config_flags

from gemma_jax import files
from launch import app

_CONFIG = config_flags.DEFINE_config_file(
  'config', 'experiments/quickstart.py', 'Experiment file with get_config().'
)
_MODEL = flags.DEFINE_string('model', '', "Base to use instead of the config's model.path.")
_FORMAT = flags.DEFINE_enum('format', 'text', ['text', 'json'], 'Table, or one JSON line.')


def main() -> int:
  """Runs the command."""
  from gemma_jax.config.train import TrainConfig
  from gemma_jax.formats import adapter, open_base
  from gemma_jax.runs import summary

  config = app.config_of(TrainConfig, _CONFIG.value)
  config.model.path = _MODEL.value or config.model.path
  config = config.resolve()
  base = open_base.open_base(config.model.path)
  config, _ = adapter.start_from(config, base)
  dtype = config.model.dtype
  result = summary.summarize(
    config, base.config, jnp.dtype('float32' if dtype == 'auto' else dtype)
  )
  print(files.to_json(result.to_json()) if _FORMAT.value == 'json' else result.table())
  return 0


if __name__ == '__main__':
  app.run(main)
