"""Trains a LoRA adapter, or resumes it from its workdir.

  python -m launch.train --config=experiments/quickstart.py --workdir=DIR

Any field of the config (gemma_jax/config.py explains them) can be set:
--config.lora.rank=8. The same command again resumes a stopped run, and only
reports a finished one. The last line on standard output is the result as JSON:
steps, tokens, seconds, loss_base and loss_adapted (held-out, nats per token),
loss_best, adapter (its folder), peak_memory_bytes.
"""

import json
import os

from absl import flags, logging
from ml_collections import config_flags

from launch import app

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Experiment file with get_config(), e.g. '
    'experiments/dolly_lora.py; an argument may follow a colon.',
)  # fmt: skip
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder for checkpoints, adapters and metrics.'
)
_DRY_RUN = flags.DEFINE_bool(
    'dry_run', False,
    'Read the data, compile the step, check the workdir, print memory and the '
    'first batch, then stop. Nothing is written to the workdir.',
)  # fmt: skip


def main() -> int:
  """Runs the command."""
  from gemma_jax import dry_run, train

  if _CONFIG.value is None:
    app.fail('--config: missing, expected e.g. experiments/dolly_lora.py')
  if not _WORKDIR.value:
    app.fail('--workdir: missing, expected a folder for the run')
  workdir = os.path.expanduser(_WORKDIR.value)
  config = _CONFIG.value.resolve()
  app.set_compilation_cache(config.compilation_cache)
  if _DRY_RUN.value:
    print(dry_run.dry_run(config, workdir))
    return 0
  try:
    with app.stop_on_signal() as should_stop:
      result = train.train(config, workdir, should_stop)
  except train.Stopped:
    logging.warning('Run the same command again to resume.')
    return app.EXIT_RESUMABLE
  base, adapted = result['loss_base'], result['loss_adapted']
  logging.info(
      'Held-out loss %.4f -> %.4f nats/token (%+.1f %%). Try the adapter:\n'
      '  python -m launch.generate --model=%s --adapter=%s --template=%s '
      "--prompt='...'",
      base, adapted, 100 * (adapted / base - 1), config.model.path,
      result['adapter'], config.data.template,
  )  # fmt: skip
  print(json.dumps(result))
  return 0


if __name__ == '__main__':
  app.run(main)
