"""A base and its adapters, measured on the same records."""

from collections.abc import Iterator, Sequence

from absl import logging
import numpy as np

from gemma_jax.config import checks
from gemma_jax.config.train import TrainConfig
from gemma_jax.data import dataset, pipeline, sources
from gemma_jax.data import examples as examples_lib
from gemma_jax.formats import adapter
from gemma_jax.formats.base_source import BaseSource
from gemma_jax.lora import factors
from gemma_jax.lora.lora import Lora
from gemma_jax.runs import evaluate as evaluate_lib
from gemma_jax.runs.base import Base
from gemma_jax.runs.evaluate import Evaluation
from gemma_jax.training import sharding


def evaluate_adapters(
  config: TrainConfig, names: Sequence[str], source: BaseSource | None = None
) -> Iterator[tuple[str, examples_lib.Examples, Evaluation]]:
  """Evaluates one adapter after the other; one compilation serves all.

  Args:
    config: resolved; uses `model`, `mesh` and `data`: all held-out records of
      `data.path` (a file is held out whole), up to `data.max_eval_records`.
      `data.seq_len` cuts records; 0 scores them whole, as far as the base has
      positions.
    names: PEFT folders, or 'base'.
    source: the base, if it is open already.

  Yields:
    (name, the examples measured, their losses).

  Raises:
    ValueError: something does not fit; before any weight is read.
    FloatingPointError: a loss is not finite.
  """
  data = config.data
  base = Base.open(config.model, config.mesh, source=source)
  sharding.check_batch(base.mesh, data.global_batch_size, 'batch_size')
  seq_len = dataset.row_length(data.seq_len, base)
  reading = sources.load_heldout(
    data.path,
    data.template,
    'data',
    skip_bad_records=data.skip_bad_records,
    most=data.max_eval_records,
  )
  examples = examples_lib.make_examples(
    reading.records,
    base.tokenizer,
    data.template,
    data.loss_on,
    data.seq_len or base.config.max_positions,
    base.num_pieces or base.config.vocab_size,
    data.parse_control_tokens,
  )
  for line in (examples.stats.line('data'), *reading.lines()):
    logging.info('%s', line)
  examples.stats.log_warnings('data')
  folders = [name for name in names if name != adapter.BASE]
  loaded = adapter.load_adapters(folders, base.config, base.scan_layers)
  base = base.load()
  for name in names:
    measured = evaluate(
      base,
      examples,
      lora=loaded[name],
      seq_len=seq_len,
      batch_size=data.global_batch_size,
      packing=data.packing,
    )
    _check_finite(name, examples, measured)
    yield name, examples, measured


def evaluate(
  base: Base,
  data: examples_lib.Examples | dataset.Dataset,
  *,
  lora: Lora | None = None,
  seq_len: int = 0,
  batch_size: int = 4,
  packing: bool = True,
) -> Evaluation:
  """Losses of a base, or of an adapter on it, on every example.

  Args:
    base: loaded.
    data: examples, or a `Dataset`, whose held-out examples are measured.
    lora: an adapter of the base; None measures the base itself.
    seq_len: positions in a row; longer examples get longer rows. 0 takes the
      dataset's, or 512.
    batch_size: rows of this length at a time.
    packing: puts several examples into a row.

  Raises:
    ValueError: several adapters, or one of another base.
  """
  checks.instance('base', base, Base, 'a loaded base, gemma_jax.load(...)')
  checks.instance('lora', lora, Lora | None, 'a Lora, e.g. Lora.load(PATH, base)')
  kinds = (dataset.Dataset, examples_lib.Examples)
  checks.instance('data', data, kinds, 'a Dataset of the records, or its heldout examples')
  if isinstance(data, dataset.Dataset):
    seq_len = seq_len or data.config.seq_len
    data = data.heldout
  base = base.load()
  variables = {'params': base.params}
  if lora is not None:
    factors.check_fit(base.config, lora.shapes(), base.scan_layers)
    variables = lora.variables(base.params)
  batches = pipeline.eval_batches(
    data,
    seq_len or dataset.row_length(0, base),
    batch_size,
    packing,
    sharding.batch_parts(base.mesh),
  )
  return evaluate_lib.evaluate(
    lambda batch: base.token_losses(variables, sharding.put_batch(batch, base.mesh)),
    batches,
    len(data),
  )


def _check_finite(name: str, examples: examples_lib.Examples, measured: Evaluation):
  """FloatingPointError that names the first record whose loss is not finite."""
  bad = np.flatnonzero(~np.isfinite(measured.nll))
  if bad.size:
    reason = 'the adapter diverged in training, or belongs to another base.'
    if name == adapter.BASE:
      reason = 'the base itself overflows: its file is damaged, or its weights need float32.'
    raise FloatingPointError(
      f'{name}: the loss of record {examples.record_ids[bad[0]]} is '
      f'{measured.nll[bad[0]]} ({bad.size} of {len(examples)} records are not '
      f'finite), expected a finite number; {reason}'
    )
