"""Small building blocks that the tests share.

Axis sizes are distinct, and primes where the architecture allows it, so that
no two axes can be confused. Weights are random in every leaf, norm scales
included: a switch that is ignored then changes the result.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig, OptimizerConfig
from gemma_jax.lora import factors as factors_lib
from gemma_jax.lora.lora import Lora
from gemma_jax.model import adapter, layout
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.transformer import Transformer
from gemma_jax.training import optimizer, sharding
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib
from gemma_jax.training.model import Model

# Gemma 1's switches: all layers global, one kv head, no caps, two norms.
PLAIN = ModelConfig(
  vocab_size=53, embed_dim=13, hidden_dim=17, num_layers=3, num_heads=5, num_kv_heads=1, head_dim=14
)

# Every switch of Gemma 2 and 3 at once; G = 5 query heads for a kv head.
FULL = dataclasses.replace(
  PLAIN,
  num_heads=10,
  num_kv_heads=2,
  query_scale=0.31,
  layer_is_local=(True, False, True),
  window_size=4,
  rope_theta=1e6,
  rope_local_theta=1e4,
  rope_scale=8.0,
  use_qk_norm=True,
  use_post_norms=True,
  attention_softcap=5.0,
  final_softcap=3.0,
)

# D divides by 8; F, N and V divide by 2; K = 3 does not, and is replicated.
DIVISIBLE = dataclasses.replace(
  FULL, vocab_size=58, embed_dim=40, hidden_dim=34, num_heads=6, num_kv_heads=3
)

CONFIGS = {'plain': PLAIN, 'full': FULL}
ALL_TARGETS = LoraConfig(rank=3, alpha=5.0, targets='all')


def assert_close(got: Any, want: Any, tolerance: float, message: str = ''):
  """|got - want| <= tolerance * max(1, |want|) in every leaf of two trees."""
  got, want = dict(pytree.items(got)), dict(pytree.items(want))
  assert got.keys() == want.keys(), message
  for name, x in want.items():
    x = np.asarray(x, np.float64)
    difference = np.abs(np.asarray(got[name], np.float64) - x)
    relative = difference / np.maximum(1.0, np.abs(x))
    worst = relative.max(initial=0.0)
    # Not `worst > tolerance`, which a NaN would pass.
    assert worst <= tolerance, f'{message} {name}: {worst:.3g} > {tolerance}'


def assert_equal(got: Any, want: Any):
  """Two trees have the same paths, dtypes and bits."""
  got, want = dict(pytree.items(got)), dict(pytree.items(want))
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert got[name].dtype == x.dtype, name
    np.testing.assert_array_equal(got[name], x, err_msg=name)


def base(config: ModelConfig = FULL, scan_layers: bool = True, dtype: Any = jnp.float32) -> Any:
  """Random weights of order one in every leaf; the same in both forms."""

  def leaf(name, x):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(x.shape, np.float32)
    if name.endswith('/scale'):
      values *= 0.3
    elif name.endswith('/w'):
      # Contracted axes are all but the last, roughly; o contracts N and H.
      fan_in = config.embed_dim
      if name.endswith('o/w') or name.endswith('down/w'):
        fan_in = int(np.prod(x.shape[:-1]))
      values *= fan_in**-0.5
    return values.astype(dtype)

  tree = pytree.map_with_name(leaf, layout.abstract_params(config, dtype, scan_layers=False))
  return jax.device_put(layout.stack_layers(tree) if scan_layers else tree)


def factors(
  config: ModelConfig = FULL, lora_config: LoraConfig = ALL_TARGETS, scan_layers: bool = True
) -> Any:
  """A random adapter, B too; the same in both forms."""

  def leaf(name, x):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return 0.3 * rng.standard_normal(x.shape, np.float32)

  abstract = jax.eval_shape(lambda: factors_lib.init(jax.random.key(0), config, lora_config))
  tree = pytree.map_with_name(leaf, abstract)
  return jax.device_put(tree if scan_layers else layout.unstack_layers(tree))


def batch(rows: int = 2, length: int = 11, seed: int = 0, vocab_size: int = 53):
  """Packed rows: two documents each, then padding; some targets count.

  For length 11, row 0:

      segment_ids  1 1 1 1 1 2 2 2 2 2 0
      positions    0 1 2 3 4 0 1 2 3 4 0
  """
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, vocab_size, (rows, length + 1), np.int32)
  segment_ids = np.zeros((rows, length), np.int32)
  positions = np.zeros((rows, length), np.int32)
  for i in range(rows):
    half, end = length // 2 - i % 2, length - 1 - i % 3
    segment_ids[i, :half], segment_ids[i, half:end] = 1, 2
    positions[i, :half] = np.arange(half)
    positions[i, half:end] = np.arange(end - half)
  weights = (rng.random((rows, length)) < 0.7) & (segment_ids > 0)
  return {
    'tokens': jnp.asarray(tokens[:, :-1] * (segment_ids > 0)),
    'targets': jnp.asarray(tokens[:, 1:]),
    'segment_ids': jnp.asarray(segment_ids),
    'positions': jnp.asarray(positions),
    'weights': jnp.asarray(weights, jnp.float32),
  }


def lora(
  config: ModelConfig = FULL,
  lora_config: LoraConfig = ALL_TARGETS,
  scan_layers: bool = True,
  trained_base: Any = None,
) -> Lora:
  """`factors` with their configuration and scale."""
  own = factors(config, lora_config, scan_layers)
  return Lora(own, np.float32(lora_config.scale), lora_config, trained_base or {})


def deltas(factors: Any, scale: float, config: ModelConfig = FULL) -> Any:
  """scale * B A for every adapted kernel, at the kernel's path; float32.

  It is the merge into a base of zeros. Of DoRA it is the update of the
  direction, before it is brought to length.
  """
  plain = {n: x for n, x in pytree.items(factors) if not n.endswith('/lora_magnitude')}
  sizes = layout.axis_sizes(config)
  zeros = {}
  for name in [n for n in plain if n.endswith('/lora_a')]:
    layer, block, projection, _ = name.split('/')
    letters = adapter.split(layout.PROJECTION_EQUATIONS[f'{block}/{projection}'])[1]
    lead = plain[name].shape[:1] if layer == 'layers' else ()
    shape = (*lead, *(sizes[c] for c in letters))
    zeros[f'{layer}/{block}/{projection}/w'] = jnp.zeros(shape, jnp.float32)
  return factors_lib.merge(pytree.unflatten(zeros), pytree.unflatten(plain), scale)


def with_scale(variables: Any, scale: float | jax.Array = 1.0) -> dict[str, Any]:
  """{'params', 'lora'} as trained → as the model takes them."""
  return factors_lib.variables(variables['params'], variables.get('lora'), scale)


def loss(model: Transformer, variables: Any, batch: Any, scale: float = 1.0) -> jax.Array:
  """Nats per supervised token."""
  total, weight, _ = step_lib.token_loss(Model(model), with_scale(variables, scale), batch, None)
  return total / weight


class Run(NamedTuple):
  """What `train` did.

  Attributes:
    state: after the last step.
    frozen: what the steps were given as frozen.
    metrics: of each step.
    traces: how often the step was traced in this process so far.
  """

  state: state_lib.TrainState
  frozen: Any
  metrics: list[dict[str, float]]
  traces: int

  @property
  def losses(self) -> list[float]:
    return [float(m['loss']) for m in self.metrics]

  @property
  def variables(self) -> dict[str, Any]:
    """{'params', 'lora'} as trained; see `with_scale`."""
    return state_lib.join(self.state.trainable, self.frozen)


ADAMW = OptimizerConfig(learning_rate=0.01, weight_decay=0.1)


def train(
  variables: Any,
  batches: Sequence[Any],
  *,
  config: ModelConfig = FULL,
  lora_config: LoraConfig = ALL_TARGETS,
  optimizer_config: OptimizerConfig = ADAMW,
  trainable: tuple[str, ...] = ('lora/',),
  scan_layers: bool = True,
  mesh: jax.sharding.Mesh | None = None,
  seed: int = 0,
) -> Run:
  """A short run of the real optimizer and step, jitted, state donated.

  Equal settings share one compiled step within a process.

  Args:
    variables: {'params', 'lora'}; they are copied, and survive the donation.
    batches: one for each step.
    config: architecture.
    lora_config: gives the scale and the dropout.
    optimizer_config: gives the accumulation, too.
    trainable: regexes over tree paths.
    scan_layers: form of the variables.
    mesh: where state, base and batches are sharded; None is one device.
    seed: of dropout.
  """
  tx, step, traces = _jitted_step(
    config,
    (lora_config.dropout, seed),
    dataclasses.astuple(optimizer_config),
    trainable,
    scan_layers,
    mesh,
  )
  leaves, frozen = state_lib.split(jax.tree.map(jnp.copy, variables), trainable)
  state = state_lib.init_state(leaves, tx)
  hyper = step_lib.Hyperparameters(jnp.float32(lora_config.scale))
  if mesh is not None:
    batches = jax.device_put(batches, sharding.batch_sharding(mesh))
    state, frozen = (
      jax.device_put(tree, sharding.tree_shardings(tree, config, mesh)) for tree in (state, frozen)
    )
  metrics = []
  for batch in batches:
    state, measured = step(state, hyper, frozen, batch)
    metrics.append(jax.device_get(measured))
  return Run(state, frozen, metrics, len(traces))


@functools.cache
def _jitted_step(config, lora_options, optimizer_options, trainable, scan_layers, mesh):
  """(optimizer, jitted step, a list that grows by one at each trace)."""
  dropout, seed = lora_options
  optimizer_config = OptimizerConfig(*optimizer_options)
  tx = optimizer.make_optimizer(optimizer_config, 100, trainable)
  schedule = optimizer.make_schedule(optimizer_config, 100)
  transformer = Transformer(
    config,
    scan_layers=scan_layers,
    dropout=dropout,
    hidden_sharding=None if mesh is None else sharding.batch_sharding(mesh),
  )
  step = step_lib.make_train_step(
    Model(transformer),
    step_lib.token_loss,
    lambda _: (tx, schedule),
    accumulate_steps=optimizer_config.accumulate_steps,
    seed=seed,
  )
  traces = []

  def counted(state, hyper, frozen, batch):
    traces.append(1)
    new_state, metrics = step(state, hyper, frozen, batch)
    if mesh is not None:  # what the step gives back lies where it was taken
      shardings = sharding.tree_shardings(new_state, config, mesh)
      new_state = jax.lax.with_sharding_constraint(new_state, shardings)
    return new_state, metrics

  return tx, jax.jit(counted, donate_argnums=0), traces


def optimizer_leaves(state: state_lib.TrainState) -> dict[str, Any]:
  """Moments of the optimizer by path, without the counts."""
  return {
    name: x for name, x in pytree.items(state.opt_state) if not jnp.issubdtype(x.dtype, jnp.integer)
  }
