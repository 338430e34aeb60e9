"""A base and adapters on it, measured on the same records."""

from collections.abc import Iterator, Sequence

from absl import logging
import jax
import numpy as np

from gemma_jax.config.train import TrainConfig
from gemma_jax.data import examples as examples_lib
from gemma_jax.data import pipeline, sources
from gemma_jax.formats import open_base
from gemma_jax.formats.base_source import BaseSource
from gemma_jax.lora import align
from gemma_jax.model import layout
from gemma_jax.runs import evaluate
from gemma_jax.runs import prepare as run_lib
from gemma_jax.training import compiler, sharding
from gemma_jax.training import step as step_lib


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
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(mesh, data.global_batch_size, 'batch_size')
  if source is None:
    source = open_base.open_base(config.model.path, config.model.tokenizer)
  seq_len = run_lib.with_length(config, source).data.seq_len
  tokenizer = source.tokenizer()
  reading = sources.load_heldout(
    data.path, data.template, 'data', skip_bad_records=data.skip_bad_records
  )
  examples = examples_lib.make_examples(
    reading.records[: data.max_eval_records or None],
    tokenizer,
    data.template,
    data.loss_on,
    data.seq_len or source.config.max_positions,
    source.config.vocab_size if tokenizer is None else tokenizer.vocab_size,
    data.parse_control_tokens,
  )
  for line in (examples.stats.line('data'), *reading.lines()):
    logging.info('%s', line)
  examples.stats.log_warnings('data')
  folders = [name for name in names if name != align.BASE]
  loaded = align.load_adapters(folders, source.config)
  by_name = {adapter.name: adapter for adapter in loaded}

  model = run_lib.make_model(config, source.config, mesh)
  shardings = sharding.tree_shardings(
    {'params': layout.abstract_params(source.config)}, source.config, mesh
  )
  params = source.load_params(config.model.dtype, shardings=shardings['params'])
  pieces = None if tokenizer is None else tokenizer.vocab_size
  step = jax.jit(
    step_lib.make_eval_step(model, scale=1.0, num_pieces=pieces),
    compiler_options=compiler.options(mesh.devices.flat[0].platform),
  )
  for name in names:
    variables = by_name[name].variables(params)
    batches = pipeline.eval_batches(
      examples, seq_len, data.global_batch_size, data.packing, sharding.batch_parts(mesh)
    )
    measured = evaluate.evaluate(
      lambda batch, variables=variables: step(variables, sharding.put_batch(batch, mesh)),
      batches,
      len(examples),
    )
    _check_finite(name, examples, measured)
    yield name, examples, measured


def _check_finite(name: str, examples: examples_lib.Examples, measured: evaluate.Evaluation):
  """FloatingPointError that names the first record whose loss is not."""
  bad = np.flatnonzero(~np.isfinite(measured.nll))
  if bad.size:
    reason = 'the adapter diverged in training, or is for another base.'
    if name == align.BASE:
      reason = 'the base itself overflows: its file is damaged, or its weights need float32.'
    raise FloatingPointError(
      f'{name}: the loss of record {examples.record_ids[bad[0]]} is '
      f'{measured.nll[bad[0]]} ({bad.size} of {len(examples)} records are not '
      f'finite), expected numbers; {reason}'
    )
