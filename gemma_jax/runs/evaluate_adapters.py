"""A base and adapters on it, measured on the same records."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging
import jax
import numpy as np

from gemma_jax.config.train import TrainConfig
from gemma_jax.data import dataset, pipeline, sources
from gemma_jax.data import examples as examples_lib
from gemma_jax.formats import adapter
from gemma_jax.formats.base_source import BaseSource
from gemma_jax.lora.lora import Lora
from gemma_jax.runs import evaluate
from gemma_jax.runs.base import Base
from gemma_jax.training import compiler, sharding


def evaluate_adapters(
  config: TrainConfig, names: Sequence[str], source: BaseSource | None = None
) -> Iterator[tuple[str, examples_lib.Examples, evaluate.Evaluation]]:
  """Evaluates one adapter after the other; one compilation serves all.

  Args:
    config: resolved; `model`, `mesh` and `data` are used, and all held-out
      records of `data.path` (a file is held out whole), up to
      `data.max_eval_records`. `data.seq_len` cuts records; 0 scores them whole,
      as far as the base has positions.
    names: PEFT folders, or 'base'.
    source: the base, if it is open already.

  Yields:
    (name, the examples measured, their losses).

  Raises:
    ValueError: what does not fit, before any weight is read.
    FloatingPointError: a loss that is not finite.
  """
  data = config.data
  base = Base.open(config.model, config.mesh, source=source)
  sharding.check_batch(base.mesh, data.global_batch_size, 'batch_size')
  seq_len = dataset.row_length(data.seq_len, base)
  reading = sources.load_heldout(
    data.path, data.template, 'data', skip_bad_records=data.skip_bad_records
  )
  examples = examples_lib.make_examples(
    reading.records[: data.max_eval_records or None],
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
  losses = evaluator(base)
  for name in names:
    measured = measure(
      base, loaded[name], losses, examples, seq_len, data.global_batch_size, data.packing
    )
    _check_finite(name, examples, measured)
    yield name, examples, measured


def evaluator(base: Base) -> Callable[[Any, Any], jax.Array]:
  """Compiles losses(variables, batch), float32 [B, T], for each form of batch."""
  return jax.jit(base.model.token_losses, compiler_options=compiler.options(base.platform))


def measure(
  base: Base,
  lora: Lora,
  losses: Callable[[Any, Any], jax.Array],
  examples: examples_lib.Examples,
  seq_len: int,
  batch_size: int,
  packing: bool = True,
) -> evaluate.Evaluation:
  """Losses of one adapter on every example.

  Args:
    base: loaded.
    lora: of the base.
    losses: of `evaluator`.
    examples: to measure on.
    seq_len: positions in a row; longer examples go into longer rows.
    batch_size: rows of this length at a time.
    packing: several examples in a row.
  """
  variables = lora.variables(base.params)
  batches = pipeline.eval_batches(
    examples, seq_len, batch_size, packing, sharding.batch_parts(base.mesh)
  )
  return evaluate.evaluate(
    lambda batch: losses(variables, sharding.put_batch(batch, base.mesh)), batches, len(examples)
  )


def _check_finite(name: str, examples: examples_lib.Examples, measured: evaluate.Evaluation):
  """FloatingPointError that names the first record whose loss is not."""
  bad = np.flatnonzero(~np.isfinite(measured.nll))
  if bad.size:
    reason = 'the adapter diverged in training, or is for another base.'
    if name == adapter.BASE:
      reason = 'the base itself overflows: its file is damaged, or its weights need float32.'
    raise FloatingPointError(
      f'{name}: the loss of record {examples.record_ids[bad[0]]} is '
      f'{measured.nll[bad[0]]} ({bad.size} of {len(examples)} records are not '
      f'finite), expected numbers; {reason}'
    )
