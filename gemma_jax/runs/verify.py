"""Is a workdir what it claims to be? Its files, its facts, its arithmetic.

Checking reads every step: its checksums match, its notes name the same run as
run.json, and every number is finite. Replaying computes the newest step again
from the one before and compares all bits: if equal, code, base, data and machine
still do what they did.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import numpy as np

from gemma_jax import pytree
from gemma_jax.config import train as config_lib
from gemma_jax.runs import checksums, resume
from gemma_jax.runs import prepare as prepare_lib
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.checkpoint import Checkpoints
from gemma_jax.runs.trainer import Trainer
from gemma_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Finding:
  """The verdict on one step.

  Attributes:
    step: finished updates.
    text: a few words.
    is_good: nothing is wrong.
  """

  step: int
  text: str
  is_good: bool

  def __str__(self) -> str:
    return f'step {self.step}: {"ok" if self.is_good else "BAD"}, {self.text}'


def check(workdir: str) -> Iterator[Finding]:
  """Checks each step that is kept, the oldest first.

  Args:
    workdir: a run's; nothing in it is changed.

  Yields:
    A finding per step.

  Raises:
    ValueError: there is no run, or no checkpoint.
  """
  facts = _facts(workdir)
  checkpoints = Checkpoints(workdir, read_only=True)
  try:
    for step in _steps(checkpoints):
      yield _check_step(checkpoints, step, facts)
  finally:
    checkpoints.close()


def replay(workdir: str) -> Finding:
  """Computes the newest step from the one before it, and compares the bits.

  Args:
    workdir: a run's, with two steps kept; nothing in it is changed.

  Raises:
    ValueError: there are no two good steps, or base, tokenizer or data have
      changed.
  """
  facts = _facts(workdir)
  config = config_lib.from_dict(facts['config'])
  run = prepare_lib.prepare(config.resolve())
  remedy = 'A replay needs what the run was trained on; put it back at its path in run.json.'
  resume.check_fingerprints(workdir, facts['fingerprints'], run.fingerprints(), remedy)
  checkpoints = Checkpoints(workdir, read_only=True)
  try:
    first, last = _last_two(checkpoints)
    state = checkpoints.restore(first, run.program.abstract[0])
    want = checkpoints.restore(last, run.program.abstract[0])
  finally:
    checkpoints.close()
  different = _different(_train(run, state, last), want)
  what = f'computed again from step {first}: '
  if different:
    return Finding(last, f'{what}bits differ in {different[:3]}', False)
  return Finding(last, f'{what}all bits are equal', True)


def _check_step(checkpoints: Checkpoints, step: int, facts: dict[str, Any]) -> Finding:
  defects = _defects(checkpoints, step)
  if defects:
    return Finding(step, '; '.join(defects[:3]), False)
  try:
    notes = checkpoints.read_notes(step)
    leaves = checkpoints.read_leaves(step)
  except (ValueError, OSError) as e:
    return Finding(step, str(e), False)
  if notes.get('fingerprints') != facts['fingerprints']:
    return Finding(step, 'its fingerprints differ from run.json', False)
  if resume.differing(notes.get('config', {}), facts['config']):
    return Finding(step, 'its config differs from run.json', False)
  bad = [
    name
    for name, x in leaves.items()
    if np.issubdtype(x.dtype, np.inexact) and not np.isfinite(x).all()
  ]
  if bad:
    return Finding(step, f'{bad[:3]} are not finite', False)
  size = sum(x.nbytes for x in leaves.values())
  return Finding(
    step,
    f'{len(leaves)} leaves, {size} bytes; checksums, config, fingerprints of '
    'base, tokenizer and data, and values are right',
    True,
  )


def _train(run: prepare_lib.Run, state: TrainState, last: int) -> TrainState:
  """The state after step `last`, from an earlier one."""
  trainer = Trainer.of_run(run, state=state)
  for _, batch in trainer.batches(last):
    trainer.step(batch)
  return trainer.state


def _different(got: TrainState, want: TrainState) -> list[str]:
  """Names of the leaves in which any bit differs."""
  left, right = (
    {name: np.asarray(x).tobytes() for name, x in pytree.items(tree)}
    for tree in jax.device_get((got, want))
  )
  return [name for name in right if left[name] != right[name]]


def _last_two(checkpoints: Checkpoints) -> list[int]:
  steps = _steps(checkpoints)
  good = [step for step in steps if not _defects(checkpoints, step)]
  if len(good) < 2:
    raise ValueError(
      f'{checkpoints.folder}: got {len(good)} good checkpoint(s), expected 2 '
      'to replay the updates in between. Let the run continue, or set '
      'checkpoint_every_steps so that it saves more often.'
    )
  return good[-2:]


def _defects(checkpoints: Checkpoints, step: int) -> list[str]:
  return checksums.defects(checkpoints.folder / str(step))


def _steps(checkpoints: Checkpoints) -> list[int]:
  steps = checksums.steps(checkpoints.folder)
  if not steps:
    raise ValueError(f'{checkpoints.folder}: got no checkpoint, expected at least one.')
  return steps


def _facts(workdir: str) -> dict[str, Any]:
  facts = workdir_lib.read_json(workdir, 'run.json')
  if facts is None:
    raise ValueError(
      f'workdir: got {workdir}, which has no run.json; expected the folder of a run.'
    )
  return facts
