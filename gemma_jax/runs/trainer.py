"""Updates of an adapter, or of several at once: the loop's inside.

    trainer = Trainer(base, lora, data, learning_rate=1e-3, batch_size=4)
    for metrics in trainer.run(steps=20):
      print(metrics.step, metrics.loss)

A notebook iterates over `run`; `runs.loop` does the same and calls what
evaluates, saves and reports. The compiled step donates its state, so a
`Trainer` copies what it is given, and gives copies away.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import time
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_jax import pytree
from gemma_jax.config import checks
from gemma_jax.config.train import DataConfig, OptimizerConfig
from gemma_jax.data import pipeline
from gemma_jax.data.dataset import Dataset
from gemma_jax.data.examples import Examples
from gemma_jax.lora.lora import Lora
from gemma_jax.runs import assemble, hosts, interrupts, saves
from gemma_jax.runs import batches as batches_lib
from gemma_jax.runs import evaluate as evaluate_lib
from gemma_jax.runs import summary as summary_lib
from gemma_jax.runs.base import Base
from gemma_jax.runs.prepare import Run
from gemma_jax.runs.summary import Summary
from gemma_jax.training import compiler, sharding
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib
from gemma_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Metrics:
  """What one update measured; for K adapters, float64 [K] in place of floats.

  Where the loss or the gradient is not finite, the update was skipped.

  Attributes:
    step: finished updates, this one included.
    loss: per unit of weight; for the default loss, nats per supervised token.
    weight: what the sum was divided by; for the default loss, supervised tokens.
    tokens: positions that are not padding.
    grad_norm: norm of the gradient, before clipping.
    learning_rate: NaN where the caller's own optimizer sets it.
    seconds: time for the update, including the wait for its batch.
    wait_seconds: time spent waiting for the batch.
    more: the metrics of `loss_fn`, by name.
  """

  step: int
  loss: Any
  weight: Any
  tokens: Any
  grad_norm: Any
  learning_rate: Any
  seconds: float
  wait_seconds: float
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def is_finite(self) -> bool:
    """Whether the update was made, of every adapter."""
    return bool(np.all(np.isfinite(self.loss) & np.isfinite(self.grad_norm)))

  def of_member(self, index: int) -> 'Metrics':
    """The metrics of one of K adapters."""
    pick = lambda x: float(x[index])
    names = ('loss', 'weight', 'tokens', 'grad_norm', 'learning_rate')
    own = {name: pick(getattr(self, name)) for name in names}
    return dataclasses.replace(self, **own, more={k: pick(x) for k, x in self.more.items()})


class Trainer:
  """Trains an adapter, or several at once (`Lora.stack`).

  Attributes:
    program: what is compiled.
    state: step, trainable leaves and optimizer state; donated by every update.
    frozen: the other leaves.
    hyperparameters: the step's other arguments.
    data: where batches come from.
    plan: the rows of every update; None unless the data are a `Dataset`.
    total_steps: where the schedule ends; None if it does not.
  """

  def __init__(
    self,
    base: Base,
    lora: Lora,
    data: Dataset | Iterable[Any],
    *,
    learning_rate: float | Sequence[float] | None = None,
    batch_size: int = 4,
    loss_fn: step_lib.LossFn = step_lib.token_loss,
    optimizer: OptimizerConfig | optax.GradientTransformation | None = None,
    total_steps: int | None = None,
    accumulate_steps: int = 1,
    trainable: str | Sequence[str] = ('lora/',),
    seed: int = 0,
    remat: str = 'auto',
    workdir: str = '',
    save_every_steps: int = 100,
  ):
    """Places copies on the mesh; the step is compiled for the first batch.

    Args:
      base: the base, loaded; it is not changed.
      lora: where training starts; it is not changed.
      data: a `Dataset`, or any iterable of batches: pytrees of arrays whose
        leading axis is rows.
      learning_rate: AdamW's, in place of the one in `optimizer`; for K adapters
        one for all, or K.
      batch_size: rows per update, if the data are a `Dataset`.
      loss_fn: see `training.step`.
      optimizer: settings for AdamW, or any optax transformation, which only sees
        the trainable leaves.
      total_steps: total number of updates, for a schedule that decays.
      accumulate_steps: parts in which a batch is computed.
      trainable: regexes over 'params/...' and 'lora/...', see `TrainConfig`.
      seed: for dropout and the order of the records.
      remat: see `BaseConfig`.
      workdir: where checkpoints are kept; a trainer with the same arguments
        resumes from there. An iterable of batches then needs `state()`, JSON-able,
        and `restore(state)`. '' keeps none.
      save_every_steps: updates between checkpoints; another is made whenever a
        `run` ends.

    Raises:
      ValueError: the first thing that does not fit, with its remedy.
    """
    checks.instance('base', base, Base, 'a loaded base, gemma_jax.load(...)')
    checks.instance('lora', lora, Lora, 'a Lora, e.g. Lora.init(base, rank=8)')
    if isinstance(data, str | DataConfig | Examples):
      raise ValueError(f'data: got {type(data).__name__}, expected a Dataset or batches.')
    settings = assemble.Settings(
      learning_rate=learning_rate,
      batch_size=batch_size,
      loss_fn=loss_fn,
      optimizer=optimizer,
      total_steps=total_steps,
      accumulate_steps=accumulate_steps,
      trainable=(trainable,) if isinstance(trainable, str) else tuple(trainable),
      seed=seed,
      remat=remat,
    )
    base = base.load()
    self._start(assemble.of_objects(base, lora, data, settings))
    if workdir:
      if not isinstance(data, Dataset) and not batches_lib.has_position(data):
        raise ValueError(
          f'data: got {type(data).__name__} beside a workdir, expected a Dataset, or an iterable '
          'with state() and restore(state): without a position it could not go on. workdir="" '
          'keeps no checkpoint.'
        )
      self._open_saves(workdir, save_every_steps, assemble.facts(base, lora, data, settings))

  @classmethod
  def of_run(
    cls,
    run: Run,
    base: Base | None = None,
    lora: Lora | None = None,
    state: TrainState | None = None,
  ) -> 'Trainer':
    """A trainer for a prepared run.

    Args:
      run: has program, records and rows.
      base: the base, loaded; its trained leaves are taken over. None loads it.
      lora: the initial adapter; None makes the run's own.
      state: a state to resume from; None starts at step 0.
    """
    self = cls.__new__(cls)
    self._start(assemble.of_run(run, base, lora, state))
    return self

  def _start(self, parts: assemble.Parts) -> None:
    self.program = parts.program
    self.hyperparameters = parts.hyperparameters
    self.state = parts.state
    self.frozen = parts.frozen
    self.data = parts.data
    self.plan = parts.plan
    self.total_steps = parts.total_steps
    self._lora = dataclasses.replace(parts.lora, factors={})
    self._iterator: Iterator[Any] | None = None
    self._saves: saves.Saves | None = None
    compiled = lambda compile_for: compiler.ByShape(
      lambda batch: compile_for(self.program.abstract_batch(batch))
    )
    self._train_step = compiled(self.program.compile_train_step)
    self._eval_step = compiled(self.program.compile_eval_step)

  def _open_saves(self, workdir: str, every_steps: int, facts: dict[str, Any]) -> None:
    self._saves = saves.Saves(workdir, every_steps, facts)
    if self._saves.newest is not None:
      self.state = self._saves.restore(self.program.abstract[0])
      if self.plan is None:
        assert batches_lib.has_position(self.data)  # others were refused
        self.data.restore(self._saves.newest[1]['data'])

  @property
  def finished(self) -> int:
    """Updates so far, including those of earlier processes."""
    return int(self.state.step)

  @property
  def lora(self) -> Lora:
    """A copy of the current adapter."""
    return self._current(lambda tree: jax.tree.map(jnp.copy, tree))

  @property
  def summary(self) -> Summary:
    """Parameters and bytes: trained, frozen, in the optimizer.

    print(trainer.summary.table())
    """
    return summary_lib.of_state(self.state, self.frozen)

  def host_lora(self) -> Lora:
    """The same in NumPy arrays; all processes have to ask for it."""
    return self._current(hosts.to_numpy)

  def compile(self, batch: Any) -> None:
    """Compiles both steps for batches of this shape, given as arrays or shapes."""
    self._train_step.program(batch)
    self._eval_step.program(batch)

  def run(self, steps: int) -> Iterator[Metrics]:
    """Trains for this many more updates, or until the data end.

    The iterator is lazy: `run` by itself trains nothing. Stop iterating at any time,
    and call it again to continue. Ctrl-C waits for the current update. An update
    whose loss or gradient is not finite is skipped, with a warning.

    Args:
      steps: updates, at least 1.

    Raises:
      ValueError: steps < 1 or beyond `total_steps`; a workdir that a later
        trainer has taken over.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
      raise ValueError(f'steps: got {steps!r}, expected an integer >= 1.')
    last = self.finished + steps
    if self.total_steps is not None and last > self.total_steps:
      raise ValueError(
        f'steps: got {steps} after {self.finished}, expected at most '
        f'{self.total_steps - self.finished}: the schedule ends at total_steps='
        f'{self.total_steps}.'
      )
    if self._saves is not None:
      self._saves.check_open()
    return self._run(last)

  def _run(self, last: int) -> Iterator[Metrics]:
    counted, position = self.finished, self._position()
    try:
      for wait_seconds, batch in self.batches(last):
        metrics = self.step(batch, wait_seconds)
        counted, position = metrics.step, self._position()
        if not metrics.is_finite:
          logging.warning('Update %d skipped: its loss or gradient is not finite.', counted)
        if self._saves is not None:
          self._saves.save_if_due(self.state, position)
        yield metrics
    finally:
      if self._saves is not None:
        if self.finished != counted:  # Ctrl-C came with this update
          position = self._position()
        self._saves.save(self.state, position)
        self._saves.wait()

  def _position(self) -> Any:
    """Where an iterable of batches stands, to resume there; None for planned rows."""
    if self._saves is None or self.plan is not None:
      return None
    assert batches_lib.has_position(self.data)  # others were refused
    return self.data.state()

  def batches(self, last: int) -> Iterator[tuple[float, Any]]:
    """(seconds waited, batch on the mesh) from here to update `last`."""
    if isinstance(self.data, Dataset):
      assert self.plan is not None  # it has one
      size = self.plan.global_batch_size
      rows = sharding.local_rows(self.program.mesh, size)
      numbered = pipeline.train_batches(
        self.data.train,
        self.plan,
        self.finished,
        last,
        rows,
        lambda batch: self.put(batch, size),
      )
      batches = (batch for _, batch in numbered)
    else:
      if self._iterator is None:
        self._iterator = iter(self.data)
      # A range in front, or a batch would be taken and lost at the end.
      count = range(self.finished, last)
      batches = (self.put(batch) for _, batch in zip(count, self._iterator, strict=False))
    return batches_lib.timed(batches)

  def step(self, batch: Any, wait_seconds: float = 0.0) -> Metrics:
    """One update.

    Args:
      batch: a pytree of arrays whose leading axis is rows.
      wait_seconds: how long the caller waited for the batch, for the metrics.

    Raises:
      ValueError: see `put`.
    """
    started = time.perf_counter()
    batch = self.put(batch)
    step = self.finished + 1
    train_step = self._train_step.program(batch)
    with interrupts.held():
      self.state, values = train_step(self.state, self.hyperparameters, self.frozen, batch)
      # Waits for the update; with K adapters the values are arrays.
      values = {name: np.asarray(x, np.float64) for name, x in values.items()}
    seconds = wait_seconds + time.perf_counter() - started
    if self.program.members is None:
      values = {name: float(x) for name, x in values.items()}
    own = {name: values.pop(name) for name in step_lib.OWN_METRICS}
    return Metrics(step=step, seconds=seconds, wait_seconds=wait_seconds, more=values, **own)

  def evaluate(
    self,
    data: Dataset | Iterable[Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
  ) -> Any:
    """Evaluates the current adapter, with the loss it is trained on.

    Args:
      data: a `Dataset`, whose held-out records are used, or batches; by default
        the trainer's own `Dataset`.
      should_stop: called before each batch.

    Returns:
      For the default loss on a `Dataset` an `Evaluation`, which has the loss of
      every record, or a list of K for K adapters; otherwise the means of `loss_fn`
      by name: 'loss', 'weight' and its metrics.

    Raises:
      ValueError: there are no data to evaluate on.
      Stopped: `should_stop` returned True.
    """
    data = self.data if data is None and isinstance(self.data, Dataset) else data
    if data is None:
      raise ValueError('data: got none, expected a Dataset or batches to evaluate on.')
    if isinstance(data, Dataset):
      size = 0 if self.plan is None else self.plan.global_batch_size
      batches = data.eval_batches(size, sharding.batch_parts(self.program.mesh))
      if self.program.loss_fn is step_lib.token_loss:
        lead = () if self.program.members is None else (self.program.members,)
        losses = evaluate_lib.evaluate(self.losses, batches, len(data.heldout), should_stop, lead)
        return losses.members() if lead else losses
      data = (batch for batch, _ in batches)
    return batches_lib.means(self._sums(batch) for batch in _until(should_stop, data))

  def losses(self, batch: Any) -> Any:
    """What `training.step.make_eval_step` returns for a batch."""
    batch = self._put(batch, parts=1)
    return self._eval_step(self.state.trainable, self.hyperparameters, self.frozen, batch)

  def put(self, batch: Any, num_rows: int | None = None) -> Any:
    """Places a batch on the mesh.

    Args:
      batch: a pytree of arrays; one that is on the mesh already is returned as is.
      num_rows: rows of the global batch, if this process has a part of them.

    Raises:
      ValueError: leaves that are not arrays with the same number of rows, rows
        that mesh and parts do not divide, or a dtype, a token id or a length that
        a leaf cannot have.
    """
    return self._put(batch, self.program.accumulate_steps, num_rows)

  def _put(self, batch: Any, parts: int, num_rows: int | None = None) -> Any:
    mesh = self.program.mesh
    placed = sharding.batch_sharding(mesh)
    leaves = jax.tree.leaves(batch)
    if leaves and all(isinstance(x, jax.Array) and x.sharding == placed for x in leaves):
      return batch
    # A process of several has a part of the rows.
    parts = parts * sharding.batch_parts(mesh) if jax.process_count() == 1 else 1
    model = self.program.model
    checked = batches_lib.checked(
      batch, parts, model.num_tokens, model.transformer.config.max_positions
    )
    return sharding.put_batch(checked, mesh, num_rows)

  def _sums(self, batch: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(sum, weight, metrics) of a batch, as `loss_fn` gives them."""
    losses = self.losses(batch)
    if self.program.loss_fn is not step_lib.token_loss:
      return losses
    total = np.asarray(losses, np.float64).sum((-2, -1))
    weight = np.asarray(batch['weights'], np.float64).sum()
    return total, np.broadcast_to(weight, total.shape), {}

  def _current(self, copy: Callable[[Any], Any]) -> Lora:
    variables = state_lib.join(self.state.trainable, self.frozen)
    trained_base = pytree.prune(self.state.trainable.get('params', {}))
    factors, trained_base = copy((variables['lora'], trained_base or self._lora.trained_base))
    return dataclasses.replace(self._lora, factors=factors, trained_base=trained_base)


def _until(should_stop: Callable[[], bool], items: Iterable[Any]) -> Iterator[Any]:
  """The items; raises Stopped before the next one if should_stop says so."""
  for item in items:
    if should_stop():
      raise evaluate_lib.Stopped
    yield item
