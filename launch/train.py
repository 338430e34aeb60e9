"""Trains a LoRA adapter, or resumes it from its workdir.

  python -m launch.train --config=experiments/quickstart.py --workdir=DIR

Any field of the config can be set: --config.lora.rank=8; --help_config explains
them all. The same command resumes a stopped run, and only reports a finished
one; with a constant rate, a larger --config.steps continues from its end.
--dry_run stops before the first step; with --topology=v5e:2x4 it says, on any
machine, what the run needs on that TPU slice.
The last line on standard output is the result as JSON: steps, tokens, seconds,
loss_base and loss_adapted (held-out, nats per token: before the first update,
which is the base's unless --config.lora.path starts from an adapter, and after
the last), loss_best, adapter (its folder), peak_memory_bytes. On a TPU slice
every worker runs the same command (`launch/multihost.py`).
"""

from collections.abc import Callable
import os

from absl import flags, logging
from ml_collections import config_flags

from launch import app, multihost

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Experiment file with get_config(), e.g. '
  'experiments/dolly_lora.py; an argument may follow a colon.',
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for checkpoints, adapters and metrics.')
_DRY_RUN = flags.DEFINE_bool(
  'dry_run',
  False,
  'Read the data, compile the step, check the workdir, print memory and the '
  'first batch, then stop. Nothing is written to the workdir.',
)
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  'With --dry_run: a TPU slice to compile for instead, '
  'such as v5e:2x4 or 2xv5e:4x4, with no TPU, data or --workdir (extra tpu).',
)
_FIT = flags.DEFINE_bool(
  'fit', False, "With --topology: search for the largest batch that fits, from the config's own."
)
_FORMAT = flags.DEFINE_enum('format', 'text', ['text', 'json'], 'Of the report with --topology.')
_HELP_CONFIG = flags.DEFINE_bool(
  'help_config',
  False,
  'Print every field of the config, with its value, its choices and its meaning, then stop.',
)
flags.adopt_module_key_flags(multihost)


def main() -> int:
  """Runs the command."""
  from gemma_jax.config.train import TrainConfig

  if _CONFIG.value is None and not _HELP_CONFIG.value:
    app.fail('--config: missing, expected e.g. experiments/dolly_lora.py')
  config = app.config_of(TrainConfig, _CONFIG.value or TrainConfig())
  if _HELP_CONFIG.value:
    from gemma_jax.config.describe import describe

    print(describe(config))
    return 0
  if _TOPOLOGY.value:
    return forecast(config.resolve())
  if not _WORKDIR.value:
    app.fail('--workdir: missing, expected a folder for the run')
  workdir = os.path.expanduser(_WORKDIR.value)
  config = config.resolve()
  multihost.join()
  if _DRY_RUN.value:
    from gemma_jax.runs import dry_run

    app.set_compilation_cache(config.compilation_cache)
    print(dry_run.dry_run(config, workdir))
    return 0
  # Before the imports, which take a while.
  with app.stop_on_signal() as should_stop:
    return _train(config, workdir, should_stop)


def _train(config, workdir: str, should_stop: Callable[[], bool]) -> int:
  from gemma_jax import files
  from gemma_jax.runs import hosts, train

  app.set_compilation_cache(config.compilation_cache)
  try:
    result = train.train(config, workdir, should_stop, log_to=app.log_to)
  except train.Stopped:
    logging.warning('Run the same command again to resume.')
    return app.EXIT_RESUMABLE
  base, adapted = result['loss_base'], result['loss_adapted']
  logging.info(
    'Held-out loss %.4f -> %.4f nats/token (%+.1f %%). Try the adapter:\n'
    '  %s -m launch.generate --model=%s --adapter=%s --template=%s '
    "--prompt='...'",
    base,
    adapted,
    100 * (adapted / base - 1),
    app.python(),
    config.model.path,
    result['adapter'],
    config.data.template,
  )
  if hosts.is_lead():
    print(files.to_json(result))
  return 0


def forecast(config) -> int:
  """Prints what the run would need on --topology; 1 if it does not fit."""
  import jax

  from gemma_jax import files
  from gemma_jax.tpu import forecast, topology

  if not _DRY_RUN.value:
    app.fail('--topology: got one without --dry_run, expected both')
  assert _TOPOLOGY.value is not None  # or `main` would train
  # The slice is compiled for, not used; this machine's own devices are left alone.
  jax.config.update('jax_platforms', 'cpu')
  find = forecast.largest_fit if _FIT.value else forecast.forecast
  result = find(config, topology.parse(_TOPOLOGY.value))
  is_text = _FORMAT.value == 'text'
  print(result.report() if is_text else files.to_json(result.to_json()))
  return 0 if result.fits else 1


if __name__ == '__main__':
  app.run(main)
