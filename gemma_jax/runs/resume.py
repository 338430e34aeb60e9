"""Whether a run may continue in a workdir: what must be the same, what may change.

The decision rests on the notes of the newest checkpoint or, for a finished run,
on its result.json. Both hold the run's facts: its config, the number of steps
that follows from it, and the fingerprints of base, tokenizer, data and start.
(run.json is a copy to read.) A run continues if it ends with the bits of a run
that was never stopped, and is refused otherwise.

Some fields stay fixed although no update depends on them: `eval_every_steps` and
`early_stopping_evals` decide which adapter is the best and which is the last.
Fields that are free because they only change the order of sums (`mesh`,
`model.attention`, `model.remat`) may move the last bits. So may other versions of JAX
and of this package; a run that continues with others warns of it.
"""

from collections.abc import Mapping
from importlib import metadata
import math
import sys
from typing import Any

from absl import logging
import jax

from gemma_jax import files
from gemma_jax.config import train as config_lib
from gemma_jax.config.train import TrainConfig
from gemma_jax.data import dataset
from gemma_jax.runs import hosts
from gemma_jax.runs import prepare as prepare_lib
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.checkpoint import Checkpoints

Facts = Mapping[str, Any]

# Changing these changes nothing that is learnt: what is logged, traced and
# kept; where and in which pieces the same sums are computed; and what happens
# at the first batch that is not finite, up to which nothing differs.
FREE_FIELDS = (
  'log_every_steps',
  'profile_steps',
  'compilation_cache',
  'mesh',
  'checkpoint_every_steps',
  'model.remat',
  'model.attention',
  'max_skipped_batches',
)

# Where bytes are; the fingerprints tell whether they are the same.
PATH_FIELDS = ('data.path', 'data.eval_path', 'model.path', 'model.tokenizer', 'lora.path')

# Where a run ends; `_check_steps` compares the resulting steps. The evaluation at
# an earlier end stays among the others, and its adapter may be the best.
END_FIELDS = ('steps', 'epochs')

# The least that a result says.
_RESULT = ('steps', 'loss_base', 'loss_adapted')

# Facts that must be the same; earlier versions recorded no others.
_DECIDES = ('config', 'steps', 'fingerprints')

_MAY_DIFFER = FREE_FIELDS + PATH_FIELDS + END_FIELDS


def facts(run: prepare_lib.Run) -> dict[str, Any]:
  """What must be the same when a run is resumed, and what it is made with."""
  return {
    'config': config_lib.to_dict(run.given),
    'steps': run.steps,
    'fingerprints': run.fingerprints(),
    'made_with': {
      'gemma_jax': sys.modules['gemma_jax'].__version__,  # not imported: it is above
      'jax': jax.__version__,
      'jaxlib': metadata.version('jaxlib'),
      'mesh': ' '.join(f'{axis}={size}' for axis, size in run.program.mesh.shape.items()),
    },
  }


def finished(workdir: str, now: Facts) -> dict[str, Any] | None:
  """The result of a finished run; None if there is more to do.

  Args:
    workdir: the run's.
    now: facts of the requested run.

  Raises:
    ValueError: another run has finished here, or it is unknown which one.
  """
  remedy = 'Remove it to continue from the checkpoint with the same command.'
  result = workdir_lib.read_json(workdir, 'result.json', remedy)
  if result is None:
    return None
  for name in _RESULT:
    value = result.get(name)
    is_flag = isinstance(value, bool)
    if is_flag or not isinstance(value, int | float) or not math.isfinite(value):
      raise ValueError(
        f'{workdir}/result.json: {name} is {result.get(name)!r}, expected a number. {remedy}'
      )
  saved = result.pop('run', None)
  if saved is None:  # of an earlier version
    saved = workdir_lib.read_json(workdir, 'run.json')
  if saved is None:
    raise ValueError(
      f'{workdir}/run.json: missing, and result.json does not say which config, '
      'base and data it is from. Put it back, or use another workdir.'
    )
  check(workdir, saved, now, result['steps'])
  has_adapter = (files.path(workdir) / 'adapter' / 'adapter_config.json').exists()
  if saved['steps'] != now['steps'] or not has_adapter:
    return None
  # The folder may have been moved since.
  return {**result, 'adapter': f'{workdir}/adapter'}


def newest(
  workdir: str, checkpoints: Checkpoints | None, now: Facts
) -> tuple[int, dict[str, Any]] | None:
  """The step to continue from and its notes; None if there is none.

  Args:
    workdir: the run's.
    checkpoints: the workdir's; None if it has none.
    now: facts of the requested run.

  Raises:
    ValueError: the checkpoint is another run's, or is missing although a
      finished run is to continue.
  """
  step = None if checkpoints is None else checkpoints.latest_step()
  if checkpoints is None or step is None:
    if workdir_lib.has_result(workdir):
      raise ValueError(
        f'workdir {workdir}: its run has finished and kept no checkpoint to '
        f'continue from. {advice(workdir)}'
      )
    return None
  notes = checkpoints.read_notes(step)
  check(workdir, notes, now, step)
  if hosts.is_lead():
    _warn_of_other_bits(workdir, notes, now)
  skipped = notes['found'].get('skipped', ())
  allowed = now['config']['max_skipped_batches']
  if len(skipped) > allowed:
    raise ValueError(
      f'max_skipped_batches: got {allowed}, but the run in {workdir} has skipped '
      f'{len(skipped)}; expected at least as many. {advice(workdir)}'
    )
  return step, notes


def check(workdir: str, saved: Facts, now: Facts, done: int) -> None:
  """ValueError unless a run may continue.

  Args:
    workdir: the run's.
    saved: facts of the run in the workdir.
    now: facts of the requested run.
    done: finished updates.
  """
  missing = [name for name in _DECIDES if type(saved.get(name)) is not type(now[name])]
  if missing:
    raise ValueError(
      f'workdir {workdir}: was made by another version, which did not record '
      f'the {missing[0]}. {advice(workdir)}'
    )
  check_fields(workdir, saved['config'], now['config'])
  check_fingerprints(workdir, saved['fingerprints'], now['fingerprints'])
  _check_steps(workdir, saved['steps'], now, done)


def check_fields(
  workdir: str,
  before: dict[str, Any],
  now: dict[str, Any],
  defaults: dict[str, Any] | None = None,
  free: tuple[str, ...] = _MAY_DIFFER,
) -> None:
  """ValueError with the first field that affects the result and differs."""
  for name, was, is_now in differing(before, now, defaults, free):
    raise ValueError(
      f'workdir {workdir}: was made with {name}={was!r}, this config has '
      f'{is_now!r}. {advice(workdir, "config")}'
    )


def differing(
  before: dict[str, Any],
  now: dict[str, Any],
  defaults: dict[str, Any] | None = None,
  free: tuple[str, ...] = _MAY_DIFFER,
) -> list[tuple[str, Any, Any]]:
  """(name, before, now) of the fields that affect the result and differ.

  Args:
    before: a config as nested dicts; a field that it lacks, since an earlier
      version wrote it, has its default.
    now: the requested config, likewise.
    defaults: every field's; None takes a `TrainConfig`'s.
    free: fields, or groups of fields, that may differ.
  """
  defaults = config_lib.flatten(defaults or config_lib.to_dict(TrainConfig()))
  before, now = (defaults | config_lib.flatten(each) for each in (before, now))
  for each in (before, now):  # a sweep's is unresolved
    each['data.seq_len'] = each['data.seq_len'] or dataset.DEFAULT_SEQ_LEN
  return [
    (name, before.get(name), now.get(name))
    for name in sorted(before.keys() | now.keys())
    if before.get(name) != now.get(name)
    and not any(name == f or name.startswith(f'{f}.') for f in free)
  ]


def check_fingerprints(
  workdir: str, before: Mapping[str, str], now: Mapping[str, str], remedy: str = ''
) -> None:
  """ValueError if base, tokenizer, data or start have changed.

  Args:
    workdir: the run's.
    before: fingerprints of the run in the workdir.
    now: the requested run's; each must be the same.
    remedy: by default, how to train on.
  """
  for name, is_now in now.items():
    was = before.get(name)
    if was == is_now:
      continue
    changed = f'had the fingerprint {was[:16]}' if isinstance(was, str) else 'has no fingerprint'
    hint = ', or another version prepared it differently' if name == 'data' else ''
    raise ValueError(
      f'workdir {workdir}: its {name} {changed}, the {name} of this run has {is_now[:16]}{hint}. '
      f'{remedy or advice(workdir, name)}'
    )


def advice(workdir: str, same: str = '') -> str:
  """What to do when a run is refused.

  Args:
    workdir: the other run's.
    same: what must be the same, if the user can choose it.
  """
  text = 'Use another workdir'
  for name in ('adapter', 'adapter_best'):
    if (files.path(workdir) / name / 'adapter_config.json').exists():
      text += f' (there lora.path={workdir}/{name} starts from what was learnt here)'
      break
  return f'{text}, or the same {same}.' if same else f'{text}.'


def _warn_of_other_bits(workdir: str, before: Facts, now: Facts) -> None:
  """Warns if the run was made with something else."""
  was, is_now = before.get('made_with', {}), now['made_with']
  others = [name for name in is_now if was.get(name, is_now[name]) != is_now[name]]
  if others:
    said = ', '.join(f'{name} was {was[name]} and is {is_now[name]}' for name in others)
    logging.warning(
      'workdir %s: %s. The run continues, but its bits may differ from those of an undisturbed '
      'run; equal bits need the same %s.',
      workdir,
      said,
      ' and '.join(others),
    )


def _check_steps(workdir: str, before: int, now: Facts, done: int) -> None:
  """More or fewer steps leave the finished ones unchanged if the rate is constant."""
  steps = now['steps']
  if steps == before:
    return
  schedule = now['config']['optimizer']['schedule']
  if schedule != 'constant':
    raise ValueError(
      f'workdir {workdir}: was made for {before} steps, this config has '
      f'{steps}; with optimizer.schedule={schedule!r} the rate of every step '
      f'depends on their number. {advice(workdir, "number of steps")}'
    )
  if steps < done:
    raise ValueError(
      f'steps: got {steps}, but the run in {workdir} has done {done}; '
      f'expected at least as many. {advice(workdir)}'
    )
