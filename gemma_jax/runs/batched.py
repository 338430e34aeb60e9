"""K adapters trained at once over one base: the same step, mapped.

Members may differ in rank, scale, learning rate, seed and initial A; they see
the same batches. The base lives once in memory and the step is compiled once.

Ranks are made equal by zeros, and that is exact. Where a column of A and its
row of B are zero, so are their gradients (each is a product with the other),
hence their moments, updates and decay, and what they add to the clipped norm:

    rank 2 among 4    A [a1 a2 0 0]    B [b1 b2 0 0]^T    A B = a1 b1 + a2 b2

The rate and the scale enter the step as arguments. The leaves of a gang have a
leading axis K. On a CPU that many positions as fill its cores are mapped, and
the groups of members follow each other inside the step: more would cost memory
and caches, and gain nothing.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_jax import pytree
from gemma_jax.config import train as config_lib
from gemma_jax.config.train import TrainConfig
from gemma_jax.lora import align
from gemma_jax.runs import prepare as run_lib
from gemma_jax.training import compiler, optimizer, sharding
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib
from gemma_jax.training.state import TrainState

# In these fields the members of a gang may differ.
MEMBER_FIELDS = (
  'seed',
  'lora.rank',
  'lora.alpha',
  'lora.scale_rule',
  'lora.init',
  'optimizer.learning_rate',
)

# Positions that a CPU has enough to do with: two rows of 512 mapped took as
# long as one after the other, and more memory.
_CPU_POSITIONS = 768


@struct.dataclass
class Members:
  """What the step must know of each member besides its state; all [K]."""

  scale: jax.Array
  learning_rate: jax.Array
  seed: jax.Array


def common_fields(config: TrainConfig) -> dict[str, Any]:
  """The fields, by name, that all members of a gang share.

  The seed is one of them if the order of the data hangs on it.
  """
  fields = config_lib.flatten(config_lib.to_dict(config))
  own = set(MEMBER_FIELDS)
  if config.data.order_seed < 0:
    own.remove('seed')
  return {name: x for name, x in fields.items() if name not in own}


class Gang:
  """Members with one base and one stream of batches; nothing is loaded yet.

  Attributes:
    configs: of the members, resolved.
    run: what they share, prepared for the largest rank.
  """

  def __init__(self, configs: Sequence[TrainConfig], run: run_lib.Program | None = None):
    """Prepares the run that the members share.

    Args:
      configs: resolved; they differ in `MEMBER_FIELDS` only.
      run: of one of them, where it is prepared already; a `prepare.Program`
        will do to compile.

    Raises:
      ValueError: no member, base leaves to train, or configs that differ in
        more.
    """
    if not configs:
      raise ValueError('gang: got no member, expected at least one config.')
    first = configs[0]
    if any(not pattern.startswith('lora') for pattern in first.trainable):
      raise ValueError(
        f'trainable: got {first.trainable}, expected adapters only: the '
        'members of a gang share their base. Train this config alone.'
      )
    want = common_fields(first)
    for config in configs[1:]:
      got = common_fields(config)
      for name in sorted(want.keys() | got.keys()):
        if want.get(name) != got.get(name):
          raise ValueError(
            f'gang: {name} is {want.get(name)!r} for one '
            f'member and {got.get(name)!r} for another, expected one value. '
            'Train them in different gangs.'
          )
    if first.lora.path or first.lora.ranks:
      raise ValueError(
        'gang: got lora.path or lora.ranks, expected neither: members start '
        'anew, with one rank each. Train this config alone.'
      )
    if first.max_skipped_batches:
      raise ValueError(
        f'max_skipped_batches: got {first.max_skipped_batches}, expected 0: a '
        'batch is left out for one member and not for another. Train this '
        'config alone.'
      )
    self.configs = tuple(configs)
    largest = max(configs, key=lambda config: config.lora.rank)
    if run is None:
      run = run_lib.prepare(largest)
    # The run's own data: there `data.seq_len` is a number of positions.
    config = dataclasses.replace(largest, data=run.config.data).resolve()
    self.run = dataclasses.replace(run, config=config)

  def __len__(self) -> int:
    return len(self.configs)

  @property
  def members(self) -> Members:
    """The step's arguments."""
    column = lambda values, dtype: jnp.asarray(list(values), dtype)
    configs = self.configs
    return Members(
      scale=column((c.lora.scale for c in configs), jnp.float32),
      learning_rate=column((c.optimizer.learning_rate for c in configs), jnp.float32),
      seed=column((c.seed for c in configs), jnp.int32),
    )

  def init_adapters(self, params: pytree.Tree | None = None) -> pytree.Tree:
    """Every member's own initial factors, padded; leaves [K, ...].

    Args:
      params: the base, which DoRA starts from; no other adapter needs it.
    """
    model_config = self.run.source.config
    init = lambda c: state_lib.init_adapter(c, model_config, params)
    return stack(align.align([init(config) for config in self.configs]))

  @property
  def abstract(self) -> tuple[TrainState, Any]:
    """(state, frozen) as `jax.ShapeDtypeStruct`s; adapters are replicated."""
    state, frozen = self.run.abstract
    everywhere = sharding.replicated(self.run.mesh)
    stacked = jax.eval_shape(
      lambda leaves: init_state(stack([leaves] * len(self)), self.run.tx), state.trainable
    )
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    return jax.tree.map(place, stacked), frozen

  def compile_train_step(self, length: int | None = None) -> jax.stages.Compiled:
    """step(state, members, frozen, batch) -> (state, metrics [K])."""
    run = self.run
    return compiler.with_remat(
      run.model,
      run.config.model.remat,
      run.mesh,
      lambda model: self._compile_train_step(model, length),
    )

  def _compile_train_step(self, model, length: int | None) -> jax.stages.Compiled:
    run = self.run
    batch = run.abstract_batch(length)
    step = make_train_step(
      model,
      run.config,
      run.steps,
      num_pieces=run.num_pieces,
      at_once=self._at_once(batch['weights'].size // run.config.optimizer.accumulate_steps),
    )
    state, frozen = self.abstract
    everywhere = sharding.replicated(run.mesh)
    return run_lib.compile_step(
      f'training step of a gang of {len(self)}',
      jax.jit(
        step, donate_argnums=0, out_shardings=everywhere, compiler_options=run.compiler_options
      ),
      state,
      jax.eval_shape(lambda: self.members),
      frozen,
      batch,
    )

  def compile_eval_step(self, length: int | None = None) -> jax.stages.Compiled:
    """eval_step(trainable, members, frozen, batch) -> losses [K, B, T]."""
    run = self.run
    batch = run.abstract_batch(length)
    step = make_eval_step(
      run.model, num_pieces=run.num_pieces, at_once=self._at_once(batch['weights'].size)
    )
    state, frozen = self.abstract
    return run_lib.compile_step(
      f'evaluation step of a gang of {len(self)}',
      jax.jit(
        step, out_shardings=sharding.replicated(run.mesh), compiler_options=run.compiler_options
      ),
      state.trainable,
      jax.eval_shape(lambda: self.members),
      frozen,
      batch,
    )

  def _at_once(self, num_positions: int) -> int:
    """Members that a step maps at a time: a divisor of their number."""
    if self.run.mesh.devices.flat[0].platform != 'cpu':
      return len(self)
    most = max(1, _CPU_POSITIONS // num_positions)
    return max(n for n in range(1, most + 1) if len(self) % n == 0)


def init_state(trainable: Any, tx: optax.GradientTransformation) -> TrainState:
  """The state before the first update, from leaves [K, ...]."""
  return TrainState(jnp.int32(0), trainable, jax.vmap(tx.init)(trainable))


def make_train_step(
  model, config: TrainConfig, steps: int, *, num_pieces: int | None, at_once: int | None = None
):
  """Makes step(state, members, frozen, batch) -> (state, metrics).

  Args:
    model: the transformer.
    config: what the members share.
    steps: updates in the run, for the schedule.
    num_pieces: as in `training.step.make_train_step`.
    at_once: members that are mapped at a time, a divisor of K; None maps all.

  Returns:
    A pure function; state and metrics have a leading axis K, but for the
    finished updates, which the members share.
  """

  def step(state, members, frozen, batch):
    def one(leaves, member):
      settings = dataclasses.replace(config.optimizer, learning_rate=member.learning_rate)
      update = step_lib.make_train_step(
        model,
        optimizer.make_optimizer(settings, steps, config.trainable),
        optimizer.make_schedule(settings, steps),
        scale=member.scale,
        num_pieces=num_pieces,
        accumulate_steps=settings.accumulate_steps,
        seed=member.seed,
      )
      new, metrics = update(TrainState(state.step, *leaves), frozen, batch)
      return (new.trainable, new.opt_state), metrics

    leaves, metrics = _map(one, ((state.trainable, state.opt_state), members), at_once)
    return TrainState(state.step + 1, *leaves), metrics

  return step


def make_eval_step(model, *, num_pieces: int | None, at_once: int | None = None):
  """Makes eval_step(trainable, members, frozen, batch) -> losses [K, B, T].

  `at_once` as in `make_train_step`; losses in nats, weighted.
  """

  def eval_step(trainable, members, frozen, batch):
    def one(trainable, member):
      step = step_lib.make_eval_step(model, scale=member.scale, num_pieces=num_pieces)
      return step(state_lib.join(trainable, frozen), batch)

    return _map(one, (trainable, members), at_once)

  return eval_step


def _map(fn: Callable, args: tuple, at_once: int | None):
  """fn of each member, `at_once` of them mapped, their groups in turn."""
  if at_once in (None, jax.tree.leaves(args)[0].shape[0]):
    return jax.vmap(fn)(*args)
  return jax.lax.map(lambda xs: fn(*xs), args, batch_size=at_once)


def cut(factors: pytree.Tree, rank: int) -> pytree.Tree:
  """The first `rank` columns of A and rows of B: a member without padding."""

  def leaf(name, x):
    axis = _rank_axis(name, x)
    return x if axis is None else np.take(x, range(rank), axis)

  return pytree.map_with_name(leaf, factors)


def stack(trees: Sequence[pytree.Tree]) -> pytree.Tree:
  """Trees of one form → one whose leaves have a leading axis K."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def member(tree: pytree.Tree, index: int) -> pytree.Tree:
  """The leaves of one member."""
  return jax.tree.map(lambda x: x[index], tree)


def _rank_axis(name: str, x: Any) -> int | None:
  """Where R stands: last in A; first in B, behind L where layers are stacked.

  'lora/layers/attn/q/lora_b' [L, R, N, H]    1
  'lora/layer_0/attn/q/lora_b' [R, N, H]      0
  """
  if name.endswith('/lora_a'):
    return x.ndim - 1
  if name.endswith('/lora_b'):
    return 1 if 'layers' in name.split('/') else 0
  return None
