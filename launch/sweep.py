"""Trains a grid of adapters, many at once, and compares them fairly.

  python -m launch.sweep --config=experiments/rank_ablation.py --workdir=DIR

The same command resumes after a stop or a kill; run on another machine that
shares the folder, it takes part. Any field can be set: of the base config as for
launch.train (--config.data.path=FILE), of the grid as --config.grid.ranks="(1,4,16)";
--help_config explains them all. Standard output is the table of trials;
`python -m experiments.report DIR` makes the report. --dry_run --topology=v5e:1x1
says, on any machine, how many trials would train at once on that TPU slice, what
they need there and what training them together gains.
"""

import os

from absl import flags, logging
from ml_collections import config_flags

from launch import app

with app.errors_of_flags():
  _CONFIG = config_flags.DEFINE_config_file(
    'config', 'experiments/rank_ablation.py', 'File whose get_config() has a grid.'
  )
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the sweep; machines that take part share it.'
)
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'With --topology: compile for it, then stop.')
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  'With --dry_run: a TPU slice, such as v5e:1x1, with no TPU, data or --workdir (extra tpu).',
)
_HELP_CONFIG = flags.DEFINE_bool(
  'help_config',
  False,
  'Print every field of the config, with its value, its choices and its meaning, then stop.',
)


def main() -> int:
  """Runs the command."""
  from gemma_jax.config.sweep import SweepConfig

  config = app.config_of(SweepConfig, _CONFIG.value)
  if _HELP_CONFIG.value:
    from gemma_jax.config.describe import describe

    print(describe(config.base), describe(config.grid, 'config.grid'), sep='\n')
    return 0
  if bool(_TOPOLOGY.value) != _DRY_RUN.value:
    app.fail('--dry_run, --topology: got one, expected both or neither')
  workdir = _WORKDIR.value or ''
  if not workdir and not _DRY_RUN.value:
    app.fail('--workdir: missing, expected a folder for the sweep')
  config = config.resolve()
  if _DRY_RUN.value:
    return forecast(config)

  from gemma_jax.runs.evaluate import Stopped
  from gemma_jax.sweep import results, worker

  app.set_compilation_cache(config.base.compilation_cache)
  try:
    with app.stop_on_signal() as should_stop:
      sweep = worker.run(config, os.path.expanduser(workdir), should_stop)
  except Stopped:
    logging.warning('Run the same command again to resume.')
    return app.EXIT_RESUMABLE
  print(results.table(sweep))
  if not sweep.finished('lora') and not sweep.finished('full'):
    app.fail('sweep: every trial failed; the table above says why')
  return 0


def forecast(config) -> int:
  """Prints what batched adapters would need on --topology; 1 if a batch does not fit."""
  import jax

  from gemma_jax.sweep import forecast
  from gemma_jax.tpu import topology

  assert _TOPOLOGY.value is not None  # `main` asks for it
  # The slice is compiled for, not used; this machine's own devices are left alone.
  jax.config.update('jax_platforms', 'cpu')
  forecasts = forecast.forecast(config, topology.parse(_TOPOLOGY.value))
  print('\n\n'.join(each.report() for each in forecasts))
  return 0 if all(each.together.fits for each in forecasts) else 1


if __name__ == '__main__':
  app.run(main)
