"""Everything that a run is made of, before a weight is read.

`prepare` opens the base (its header), reads and tokenizes the records, plans
the rows, and derives shapes and shardings from the config. Training, dry
run and tests start from the same `Run`, so they cannot differ. What of it is
compiled, a `Program`, needs no records: shapes are enough.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import time
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh
import numpy as np

from gemma_jax import pytree
from gemma_jax.config.train import TrainConfig
from gemma_jax.data import audit as audit_lib
from gemma_jax.data import examples as examples_lib
from gemma_jax.data import row_plan, sources
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.formats import open_base
from gemma_jax.formats.base_source import BaseSource
from gemma_jax.lora import align
from gemma_jax.model import kernels
from gemma_jax.model.transformer import Transformer
from gemma_jax.runs import hosts, summary
from gemma_jax.training import compiler, optimizer, sharding
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib

# Positions in a row where `data.seq_len` is 0.
DEFAULT_SEQ_LEN = 512


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled part of a run; see the methods for what is derived from it.

  Attributes:
    given: the resolved config that `prepare` was given, with a length of rows.
    config: the same, with the facts of the adapter at `lora.path`.
    start: the factors of that adapter, or None.
    source: the base, not yet read.
    tokenizer: None if all records are token ids.
    steps: updates in the run.
    mesh: devices; not this machine's if it is compiled for others.
    dtype: of the base in memory.
    model: the transformer.
  """

  given: TrainConfig
  config: TrainConfig
  start: Any
  source: BaseSource
  tokenizer: Tokenizer | None
  steps: int
  mesh: Mesh
  dtype: np.dtype
  model: Transformer

  @property
  def num_pieces(self) -> int | None:
    """Embedding rows that are tokens, or None where nobody knows."""
    return None if self.tokenizer is None else self.tokenizer.vocab_size

  @property
  def compiler_options(self) -> dict[str, str] | None:
    """Of `jax.jit`, for the platform of the mesh."""
    return compiler.options(self.mesh.devices.flat[0].platform)

  @functools.cached_property
  def schedule(self):
    """Learning rate by finished updates."""
    return optimizer.make_schedule(self.config.optimizer, self.steps)

  @functools.cached_property
  def tx(self):
    """The optimizer, frozen where `trainable` says nothing."""
    return optimizer.make_optimizer(self.config.optimizer, self.steps, self.config.trainable)

  @functools.cached_property
  def abstract(self) -> tuple[state_lib.TrainState, Any]:
    """(state, frozen) as `jax.ShapeDtypeStruct`s with their shardings."""
    variables = state_lib.abstract_variables(self.config, self.source.config, self.dtype)
    trainable, frozen = state_lib.split(variables, self.config.trainable)
    state = jax.eval_shape(lambda t: state_lib.init_state(t, self.tx), trainable)
    return self._placed(state), self._placed(frozen)

  def abstract_batch(self, length: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch [B, length], by default [B, T]; rows over the mesh."""
    length = length or self.config.data.seq_len
    shape = (self.config.data.global_batch_size, length)
    return {
      name: jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding.batch_sharding(self.mesh))
      for name, x in examples_lib.empty_row(shape[1]).items()
    }

  def compile_train_step(self, length: int | None = None) -> jax.stages.Compiled:
    """step(state, frozen, batch) -> (state, metrics), state donated.

    Args:
      length: of the batch's rows; default: seq_len.
    """
    return compiler.with_remat(
      self.model,
      self.config.model.remat,
      self.mesh,
      lambda model: self._compile_train_step(model, length),
    )

  def _compile_train_step(self, model: Transformer, length: int | None) -> jax.stages.Compiled:
    step = step_lib.make_train_step(
      model,
      self.tx,
      self.schedule,
      scale=self.config.lora.scale,
      num_pieces=self.num_pieces,
      accumulate_steps=self.config.optimizer.accumulate_steps,
      seed=self.config.seed,
      skip_nonfinite=self.config.max_skipped_batches > 0,
    )
    state, frozen = self.abstract
    out = (jax.tree.map(lambda x: x.sharding, state), sharding.replicated(self.mesh))
    return compile_step(
      'training step',
      jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=self.compiler_options),
      state,
      frozen,
      self.abstract_batch(length),
    )

  def compile_eval_step(self, length: int | None = None) -> jax.stages.Compiled:
    """eval_step(trainable, frozen, batch) -> losses [B, T]."""
    step = step_lib.make_eval_step(
      self.model, scale=self.config.lora.scale, num_pieces=self.num_pieces
    )
    state, frozen = self.abstract
    return compile_step(
      'evaluation step',
      jax.jit(
        lambda trainable, frozen, batch: step(state_lib.join(trainable, frozen), batch),
        out_shardings=sharding.replicated(self.mesh),
        compiler_options=self.compiler_options,
      ),
      state.trainable,
      frozen,
      self.abstract_batch(length),
    )

  def init_adapter(self, params: Any) -> Any:
    """The adapter before the first update.

    Args:
      params: the base, as `training.state.init_adapter` takes it.
    """
    if self.start is not None:
      return jax.tree.map(jax.numpy.asarray, self.start)
    return state_lib.init_adapter(self.config, self.source.config, params)

  def load(self) -> tuple[Any, Any]:
    """(trainable, frozen) before the first update: the base, a new adapter."""
    state, frozen = self.abstract
    placed = jax.tree.map(lambda x: x.sharding, state_lib.join(state.trainable, frozen))
    started = time.perf_counter()
    params = self.source.load_params(self.dtype, self.config.model.scan_layers, placed['params'])
    logging.info('Loaded the base in %.1f s', time.perf_counter() - started)
    adapter = sharding.put(hosts.to_numpy(self.init_adapter(params)), placed['lora'])
    return state_lib.split({'params': params, 'lora': adapter}, self.config.trainable)

  def check(self) -> None:
    """ValueError if the trainable leaves or the mesh do not fit the base."""
    _ = self.abstract

  def summary(self) -> summary.Summary:
    """The parameter table of this run."""
    return summary.summarize(self.config, self.source.config, self.dtype)

  def _placed(self, tree):
    config = self.config
    placed = sharding.tree_shardings(
      tree, self.source.config, self.mesh, config.lora if config.mesh.shard_adapter else None
    )
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed
    )


@dataclasses.dataclass(frozen=True)
class Run(Program):
  """A prepared run: a program and its records.

  Attributes:
    train: training examples.
    heldout: held-out examples.
    record_notes: what of the records was skipped or not read, for people.
    plan: rows of every step.
  """

  train: examples_lib.Examples
  heldout: examples_lib.Examples
  record_notes: tuple[str, ...]
  plan: row_plan.RowPlan

  def record_ids(self, step: int) -> list[int]:
    """Which training records the batch of step 0, 1, 2, ... holds."""
    rows = self.plan.rows(step)
    return [int(self.train.record_ids[i]) for row in rows for i in row]

  def fingerprints(self) -> dict[str, str]:
    """What a resume must find unchanged besides the config."""
    digest = hashlib.sha256()
    for part in (self.train, self.heldout):
      for array in (part.tokens, part.loss_mask, part.offsets):
        digest.update(np.ascontiguousarray(array).tobytes())
    tokenizer = self.tokenizer
    start = hashlib.sha256()
    if self.start is not None:
      # The adapter's own settings: its path may change, its scale may not.
      settings = dataclasses.replace(self.config.lora, path='', dropout=0.0)
      start.update(repr(settings).encode())
    for name, array in pytree.items(self.start or {}):
      start.update(name.encode())
      start.update(np.ascontiguousarray(array).tobytes())
    return {
      'adapter': start.hexdigest(),
      'base': self.source.fingerprint(),
      'tokenizer': '' if tokenizer is None else tokenizer.fingerprint(),
      'data': digest.hexdigest(),
    }


def prepare_program(config: TrainConfig, devices: Sequence[Any] | None = None) -> Program:
  """Opens the base and checks it against the mesh; reads no record.

  Args:
    config: resolved (`TrainConfig.resolve`).
    devices: default: all that JAX sees.

  Raises:
    ValueError: the first thing that does not fit, with its remedy.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  sharding.check_batch(
    mesh,
    config.data.global_batch_size // config.optimizer.accumulate_steps,
    'data.global_batch_size / optimizer.accumulate_steps',
  )
  source = open_base.open_base(config.model.path, config.model.tokenizer)
  given = config = with_length(config, source)
  config, start = align.start_from(given, source)
  dtype = config.model.dtype
  return Program(
    given=given,
    config=config,
    start=start,
    source=source,
    tokenizer=source.tokenizer(),
    steps=config.steps or 1,  # a run without steps counts its records
    mesh=mesh,
    dtype=np.dtype(source.stored_dtype if dtype == 'auto' else dtype),
    model=make_model(config, source.config, mesh),
  )


def prepare(config: TrainConfig) -> Run:
  """Opens, reads and checks everything but the weights.

  Args:
    config: resolved (`TrainConfig.resolve`).

  Raises:
    ValueError: the first thing that does not fit, with its remedy.
  """
  program = prepare_program(config)
  data = program.given.data
  started = time.perf_counter()
  records = sources.load_records(data)
  heldout_records = records.heldout[: data.max_eval_records or None]
  audit_lib.audit(records.train, heldout_records).log()
  train, heldout = (
    examples_lib.make_examples(
      part,
      program.tokenizer,
      data.template,
      data.loss_on,
      data.seq_len,
      program.num_pieces or program.source.config.vocab_size,
      data.parse_control_tokens,
    )
    for part in (records.train, heldout_records)
  )
  train.stats.log_warnings('training')
  heldout.stats.log_warnings('held-out')
  plan = row_plan.RowPlan(
    train.slots,
    data.seq_len,
    data.global_batch_size,
    config.seed if data.order_seed < 0 else data.order_seed,
    data.packing,
  )
  logging.info('Read the records in %.1f s', time.perf_counter() - started)
  found = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
  found['steps'] = config.steps or plan.steps_for_epochs(config.epochs)
  return Run(**found, train=train, heldout=heldout, record_notes=tuple(records.lines()), plan=plan)


def with_length(config: TrainConfig, source: BaseSource) -> TrainConfig:
  """The config with the length of a row, if `data.seq_len` is 0.

  Raises:
    ValueError: a row is longer than the base's positions.
  """
  seq_len, most = config.data.seq_len, source.config.max_positions
  if seq_len > most:
    raise ValueError(
      f'data.seq_len: got {seq_len}, expected at most {most}, the positions of {source.reference}.'
    )
  if seq_len:
    return config
  if most < DEFAULT_SEQ_LEN:
    logging.warning(
      'Rows have %d positions, as many as %s has (data.seq_len=0 is %d elsewhere)',
      most,
      source.reference,
      DEFAULT_SEQ_LEN,
    )
  data = dataclasses.replace(config.data, seq_len=min(DEFAULT_SEQ_LEN, most))
  return dataclasses.replace(config, data=data).resolve()


def make_model(config: TrainConfig, model_config, mesh: Mesh) -> Transformer:
  """The transformer as a config wants it computed on a mesh."""
  dtype = activation_dtype(config.model.activation_dtype, mesh)
  return Transformer(
    model_config,
    dtype=dtype,
    scan_layers=config.model.scan_layers,
    dropout=config.lora.dropout,
    hidden_sharding=sharding.batch_sharding(mesh),
    attend=kernels.choose(
      config.model.attention, model_config, dtype, mesh, sharding.BATCH, sharding.RULES.axis('N')
    ),
  )


def activation_dtype(name: str, mesh: Mesh) -> np.dtype:
  """auto: bfloat16 on an accelerator, float32 on a CPU."""
  if name == 'auto':
    on_cpu = mesh.devices.flat[0].platform == 'cpu'
    name = 'float32' if on_cpu else 'bfloat16'
  return np.dtype(jax.numpy.dtype(name))


def compile_step(name: str, function: Any, *abstract: Any) -> jax.stages.Compiled:
  """Compiles a jitted function for abstract arguments and logs how long."""
  started = time.perf_counter()
  compiled = function.lower(*abstract).compile()
  logging.info('Compiled the %s in %.1f s', name, time.perf_counter() - started)
  return compiled
