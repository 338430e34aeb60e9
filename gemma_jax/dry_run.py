"""Everything short of training: read, tokenize, compile, check, show, stop."""

import numpy as np

from gemma_jax import describe, files, resume, summary
from gemma_jax import run as run_lib
from gemma_jax import workdir as workdir_lib
from gemma_jax.checkpoint import Checkpoints
from gemma_jax.config import TrainConfig
from gemma_jax.data import examples as examples_lib


def dry_run(config: TrainConfig, workdir: str) -> str:
  """Goes through a run's start and returns what it found, as text.

  Nothing is written to the workdir and no weight is read; downloads, prepared
  data sets and compiled programs are cached as in a run. The step is compiled
  for the devices that are there.

  Args:
    config: resolved.
    workdir: must be writable, and its checkpoint, if any, this run's.

  Raises:
    ValueError: the first thing that would have stopped the run.
  """
  workdir_lib.check_writable(workdir)
  run = run_lib.prepare(config)
  facts = resume.facts(run)
  result = resume.finished(workdir, facts)
  if result is not None:
    step, what = result['steps'], 'has finished'
  else:
    step = _start(run, workdir, facts)
    what = f'would resume at step {step}' if step else 'would start at step 0'
  sections = [
    run.summary().table(),
    describe.describe(run),
    f'workdir {workdir}: writable; the run {what}.',
    _memory_lines(run),
    _first_batch(run, step),
  ]
  return '\n\n'.join(sections)


def _start(run: run_lib.Run, workdir: str, facts: resume.Facts) -> int:
  """The step at which the run would go on; its checkpoint can be read."""
  if not (files.path(workdir) / 'checkpoints').is_dir():
    resume.newest(workdir, None, facts)
    return 0
  checkpoints = Checkpoints(workdir, read_only=True)
  try:
    newest = resume.newest(workdir, checkpoints, facts)
    if newest is None:
      return 0
    checkpoints.restore(newest[0], run.abstract[0])
    return newest[0]
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


def _first_batch(run: run_lib.Run, step: int) -> str:
  """The rows of a step as text; what counts in the loss in brackets."""
  rows = run.plan.rows(step)
  batch = examples_lib.make_batch(run.train, rows, run.config.data.seq_len)
  filled = (batch['segment_ids'] > 0).sum(axis=1)
  lines = [f'batch of step {step}; targets of the loss in [[ ]]']
  for i, row in enumerate(rows):
    lines.append(
      f'=== row {i}: {len(row)} records, {filled[i]} of '
      f'{run.config.data.seq_len} positions'
    )
    for example_id in row:
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
