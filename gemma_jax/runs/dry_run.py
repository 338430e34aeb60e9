"""Everything short of training: read, tokenize, compile, check, show, stop."""

import itertools
import re

import numpy as np

from gemma_jax import files
from gemma_jax.config.train import TrainConfig
from gemma_jax.data import examples as examples_lib
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.runs import describe, resume, summary
from gemma_jax.runs import prepare as run_lib
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.checkpoint import Checkpoints
from gemma_jax.training import compiler

# Brackets of control tokens.
_OPEN, _CLOSE = '\u27e8', '\u27e9'

# Whatever in a text could be taken for a mark, or for an escaped one: brackets of
# control tokens, a square bracket beside its like or where another may follow (at
# an end of the text), and a backslash before the code of any of these.
_MARK = re.compile(
  rf'[{_OPEN}{_CLOSE}]|(?<![^\[])\[|\[(?![^\[])|(?<![^\]])\]|\](?![^\]])'
  r'|\\(?=u(?:27e8|27e9|005b|005c|005d))'
)


def dry_run(config: TrainConfig, workdir: str) -> str:
  """Goes through a run's start and returns a report, as text.

  Nothing is written to the workdir and no weight is read; downloads, prepared
  data sets and compiled programs are cached as in a run. The step is compiled
  for the devices that are there.

  Args:
    config: resolved.
    workdir: must be writable; a checkpoint in it must be this run's.

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
  """The step from which the run would continue; reads its checkpoint."""
  if not (files.path(workdir) / 'checkpoints').is_dir():
    resume.newest(workdir, None, facts)
    return 0
  checkpoints = Checkpoints(workdir, read_only=True)
  try:
    newest = resume.newest(workdir, checkpoints, facts)
    if newest is None:
      return 0
    checkpoints.restore(newest[0], run.program.abstract[0])
    return newest[0]
  finally:
    checkpoints.close()


def _memory_lines(run: run_lib.Run) -> str:
  analysis = compiler.memory_analysis(run.program.compile_train_step(run.abstract_batch()))
  rows = (
    ('arguments (base, state, batch)', analysis.argument_size_in_bytes),
    ('temporaries (activations, gradients)', analysis.temp_size_in_bytes),
    ('outputs that are not donated', analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
  )
  total = sum(size for _, size in rows)
  lines = ['memory of the training step, per device']
  for name, size in (*rows, ('peak, at most', total)):
    lines.append(f'  {name:<38}{summary.format_bytes(size):>12}')
  return '\n'.join(lines)


def _first_batch(run: run_lib.Run, step: int) -> str:
  """The rows of a step as text; what counts in the loss is in brackets."""
  rows = run.plan.rows(step)
  batch = examples_lib.make_batch(run.data.train, rows, run.config.data.seq_len)
  filled = (batch['segment_ids'] > 0).sum(axis=1)
  lines = [
    f'batch of step {step}; loss targets in [[ ]], control tokens in {_OPEN} {_CLOSE} '
    '(in a text these are \\uXXXX)'
  ]
  for i, row in enumerate(rows):
    lines.append(
      f'=== row {i}: {len(row)} records, {filled[i]} of {run.config.data.seq_len} positions'
    )
    for example_id in row:
      lines.append(f'--- record {run.data.train.record_ids[example_id]}')
      lines.append(_marked_text(run, *run.data.train[example_id]))
  return '\n'.join(lines)


def _marked_text(run, tokens, loss_mask) -> str:
  """'⟨bos⟩Instruction: ... [[answer⟨eos⟩]]', or ids without a tokenizer."""
  texts = []
  edges = np.flatnonzero(np.diff(loss_mask)) + 1
  for ids, counts in zip(np.split(tokens, edges), np.split(loss_mask, edges), strict=True):
    text = _visible(ids.tolist(), run.base.tokenizer)
    texts.append(f'[[{text}]]' if counts[0] else text)
  return ''.join(texts)


def _visible(ids: list[int], tokenizer: Tokenizer | None) -> str:
  """Text in which nothing but a control token looks like one, or like [[ ]]."""
  if tokenizer is None:
    return ' '.join(map(str, ids))
  names = {i: name.strip('<>[]') for name, i in tokenizer.controls.items()}
  texts = []
  for is_control, run_of_ids in itertools.groupby(ids, names.__contains__):
    if is_control:
      texts += [f'{_OPEN}{_escape(names[i])}{_CLOSE}' for i in run_of_ids]
    else:
      texts.append(_escape(tokenizer.decode(run_of_ids)))
  return ''.join(texts)


def _escape(text: str) -> str:
  """'[[1, 2]]' → '\\u005b\\u005b1, 2\\u005d\\u005d': no mark is left in it."""
  return _MARK.sub(lambda mark: f'\\u{ord(mark[0]):04x}', text)
