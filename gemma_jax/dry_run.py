"""Everything short of training: read, tokenize, compile, check, show, stop."""

import os

import numpy as np

from gemma_jax import run as run_lib
from gemma_jax import summary
from gemma_jax import workdir as workdir_lib
from gemma_jax.checkpoint import Checkpoints
from gemma_jax.config import TrainConfig
from gemma_jax.data import examples as examples_lib


def dry_run(config: TrainConfig, workdir: str) -> str:
  """Goes through a run's start and returns what it found, as text.

  Nothing is written and no weight is read. The step is compiled for the
  devices that are there.

  Args:
    config: resolved.
    workdir: must be writable, and its checkpoint, if any, this run's.

  Raises:
    ValueError: the first thing that would have stopped the run.
  """
  workdir_lib.check_same_config(workdir, config)
  workdir_lib.check_writable(workdir)
  run = run_lib.prepare(config)
  workdir_lib.check_same_fingerprints(workdir, run.fingerprints())
  sections = [
    run.summary().table(),
    _checkpoint_line(run, workdir),
    _memory_lines(run),
    _first_batch(run),
  ]
  return '\n\n'.join(sections)


def _checkpoint_line(run: run_lib.Run, workdir: str) -> str:
  if not os.path.isdir(os.path.join(workdir, 'checkpoints')):
    return f'workdir {workdir}: writable; the run would start at step 0.'
  checkpoints = Checkpoints(workdir, read_only=True)
  try:
    step = checkpoints.latest_step()
    if step is None:
      return f'workdir {workdir}: writable; the run would start at step 0.'
    checkpoints.restore(step, run.abstract[0])
    return f'workdir {workdir}: writable; the run would resume at step {step}.'
  finally:
    checkpoints.close()


def _memory_lines(run: run_lib.Run) -> str:
  analysis = run.compile_train_step().memory_analysis()
  rows = (
      ('arguments (base, state, batch)', analysis.argument_size_in_bytes),
      ('temporaries (activations, gradients)', analysis.temp_size_in_bytes),
      ('outputs that are not donated',
       analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
  )  # fmt: skip
  total = sum(size for _, size in rows)
  lines = ['memory of the training step, per device']
  for name, size in (*rows, ('peak, at most', total)):
    lines.append(f'  {name:<38}{summary.format_bytes(size):>12}')
  return '\n'.join(lines)


def _first_batch(run: run_lib.Run) -> str:
  """The first row of step 0 as text; what counts in the loss in brackets."""
  row = run.plan.rows(0)[0]
  batch = examples_lib.make_batch(run.train, [row], run.config.data.seq_len)
  lines = [
    f'first batch: row 0 holds {len(row)} records, '
    f'{int((batch["segment_ids"] > 0).sum())} of '
    f'{run.config.data.seq_len} positions; targets of the loss in [[ ]]'
  ]
  for example_id in row[:2]:
    lines.append(f'--- record {run.train.record_ids[example_id]}')
    lines.append(_marked_text(run, *run.train[example_id]))
  return '\n'.join(lines)


def _marked_text(run, tokens, loss_mask) -> str:
  """'Instruction: ... [[answer<eos>]]', or ids where there is no tokenizer."""
  pieces = []
  edges = np.flatnonzero(np.diff(loss_mask)) + 1
  for ids, counts in zip(
    np.split(tokens, edges), np.split(loss_mask, edges), strict=True
  ):
    if run.tokenizer is None:
      text = ' '.join(map(str, ids))
    else:
      text = run.tokenizer.decode(ids.tolist())
      if ids[-1] == run.tokenizer.eos_id:
        text += '<eos>'
      if ids[0] == run.tokenizer.bos_id:
        text = '<bos>' + text
    pieces.append(f'[[{text}]]' if counts[0] else text)
  return ''.join(pieces)
