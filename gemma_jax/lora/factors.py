"""Low-rank adapters: shapes, initial values, application, merging.

W' = W + scale * B A, with B = 0 at the start, so that the first forward pass is
exactly the base's (Hu et al. 2021, arXiv 2106.09685, section 4.1).

The factors are a tree of their own (the collection `lora`), beside the base and
never inside it; `model.adapter` says what shapes they have.

DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) gives each output of W' a
trained length m of its own:

    W' = m * (W + scale * B A) / ||W + scale * B A||     m = ||W|| at the start

with the norm taken over an output's inputs and, as in section 4.3, treated as a
constant by the gradient. With B = 0 this is the base up to the rounding of the
norm. A magnitude of 0 means none: plain LoRA, to the bit.

The model applies whatever factors it is given and knows neither rank nor scale
nor norms: `variables` folds the scale into B and each m / norm into one number
per output, so adapters of one shape are interchangeable inputs of one compiled
program.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax import pytree
from gemma_jax.config.lora import PROJECTIONS, LoraConfig
from gemma_jax.model import adapter, layout
from gemma_jax.model.config import ModelConfig


def target_paths(lora: LoraConfig) -> dict[str, str]:
  """Path in a layer → equation, for the projections that carry an adapter."""
  return {
    path: equation
    for path, equation in layout.PROJECTION_EQUATIONS.items()
    if path.split('/')[1] in lora.target_names
  }


def leaf_axes(config: ModelConfig, lora: LoraConfig, scan_layers: bool = True) -> dict[str, str]:
  """Axis letters of every leaf, by path, as in `layout.param_axes`."""
  axes = {}
  for path, equation in target_paths(lora).items():
    a, b = adapter.factor_axes(equation, lora.factorization)
    axes |= {f'{path}/lora_a': a, f'{path}/lora_b': b}
    if lora.dora:
      axes[f'{path}/lora_magnitude'] = adapter.outputs(equation)
  return layout.in_layers(axes, config, scan_layers)


def init(
  key: jax.Array, config: ModelConfig, lora: LoraConfig, scan_layers: bool = True
) -> pytree.Tree:
  """Initial factors: A uniform within the rule's limit, B zero; float32.

  Where ranks differ between layers (`LoraConfig.ranks`), leaves are as wide as
  the largest, and zero beyond a layer's own rank: a column that is zero in both A
  and B has no gradient and stays zero.

  Column j of A is drawn with a key of its own (target, layer, j), so the A of a
  smaller rank is a prefix of the A of a larger one, and scanned and unrolled
  trees hold the same numbers.

  Args:
    key: PRNG key.
    config: the base's architecture.
    lora: rank, targets, factorization and limits.
    scan_layers: scanned (`layers/...` with a leading L) or unrolled tree.

  Returns:
    Tree of `<layer>/<projection>/lora_a` and `lora_b`; with DoRA also
    `lora_magnitude`, 0 until `with_magnitudes` sets them from a base.
  """
  check_rank(config, lora)
  sizes = layout.axis_sizes(config)
  tree = {}
  for path, equation in target_paths(lora).items():
    a, b = adapter.factor_axes(equation, lora.factorization)
    column = tuple(sizes[c] for c in a[:-1])
    target_key = jax.random.fold_in(key, PROJECTIONS.index(path.split('/')[1]))
    limit = _limit(lora, column, equation, sizes)
    ranks = _ranks(config, lora, path)

    def draw(layer, rank, j, key=target_key, shape=column, limit=limit):
      key = jax.random.fold_in(jax.random.fold_in(key, layer), j)
      x = jax.random.uniform(key, shape, jnp.float32, -limit, limit)
      return jnp.where(j < rank, x, 0.0)

    columns = jax.vmap(draw, (None, None, 0), -1)
    layers, j = jnp.arange(config.num_layers), jnp.arange(max(ranks))
    lora_a = jax.vmap(columns, (0, 0, None))(layers, jnp.array(ranks), j)
    b_shape = (max(ranks), *(sizes[c] for c in b[1:]))
    tree[f'layers/{path}/lora_a'] = lora_a
    tree[f'layers/{path}/lora_b'] = jnp.zeros((config.num_layers, *b_shape), jnp.float32)
    if lora.dora:
      outputs = (sizes[c] for c in adapter.outputs(equation))
      tree[f'layers/{path}/lora_magnitude'] = jnp.zeros((config.num_layers, *outputs), jnp.float32)
  tree = pytree.unflatten(tree)
  return tree if scan_layers else layout.unstack_layers(tree)


def rank_axis(name: str, x: Any) -> int | None:
  """Index of R: last in A; in B first, or after L where layers are stacked.

  >>> rank_axis('layers/attn/q/lora_b', jnp.zeros([3, 8, 4, 16]))  # [L, R, N, H]
  1
  >>> rank_axis('layer_0/attn/q/lora_b', jnp.zeros([8, 4, 16]))  # [R, N, H]
  0
  """
  if name.endswith('/lora_a'):
    return x.ndim - 1
  if name.endswith('/lora_b'):
    return 1 if 'layers' in name.split('/') else 0
  return None


def check_rank(config: ModelConfig, lora: LoraConfig) -> None:
  """ValueError if a rank exceeds the smaller side of a target's kernel.

  Also if a pattern in `lora.ranks` matches no target. An adapter to start from
  (`lora.path`) may have any rank.
  """
  sizes = layout.axis_sizes(config)
  modules = []
  for path, equation in target_paths(lora).items():
    a, b = adapter.factor_axes(equation, lora.factorization)
    side = min(math.prod(sizes[c] for c in a[:-1]), math.prod(sizes[c] for c in b[1:]))
    rank = max(_ranks(config, lora, path))
    if rank > side and not lora.path:
      raise ValueError(
        f'lora.rank: got {rank}, expected at most {side}, the smaller '
        f'side of {path}; a larger rank adds parameters but no freedom.'
      )
    modules += [f'layer_{i}/{path}' for i in range(config.num_layers)]
  for pattern in lora.ranks:
    if not any(re.fullmatch(pattern, module) for module in modules):
      raise ValueError(
        f'lora.ranks: {pattern!r} matches no target, expected a regex that '
        f'matches a whole path such as {modules[0]}.'
      )


def check_fit(config: ModelConfig, factors: pytree.Tree, scan_layers: bool) -> None:
  """ValueError unless the factors' paths and shapes fit a base.

  Args:
    config: the base's architecture.
    factors: one adapter's, as arrays or `jax.ShapeDtypeStruct`s.
    scan_layers: whether the base's layers are stacked.
  """
  remedy = 'it belongs to another base, or to one whose scan_layers differs.'
  flat = dict(pytree.items(factors))
  sizes = layout.axis_sizes(config)
  modules = set(layout.in_layers(layout.PROJECTION_EQUATIONS, config, scan_layers))
  for name, x in flat.items():
    module, _, leaf = name.rpartition('/')
    if module not in modules or leaf not in ('lora_a', 'lora_b', 'lora_magnitude'):
      raise ValueError(
        f'lora: got a leaf {name}, expected one at {sorted(modules)[0]}, ...; {remedy}'
      )
    equation, stacked = _equation(module)
    num_axes = flat[f'{module}/lora_a'].ndim - len(stacked) if f'{module}/lora_a' in flat else 0
    if leaf == 'lora_magnitude':
      axes = adapter.outputs(equation)
    else:
      axes = adapter.axes_of(equation, num_axes)[leaf == 'lora_b']
    want = [sizes.get(c) for c in stacked + axes]
    if len(want) != x.ndim or any(n not in (None, m) for n, m in zip(want, x.shape, strict=True)):
      raise ValueError(
        f'lora: got {name} of shape {list(x.shape)}, expected '
        f'[{", ".join("rank" if n is None else str(n) for n in want)}]; {remedy}'
      )


def _ranks(config: ModelConfig, lora: LoraConfig, path: str) -> list[int]:
  """Rank of a projection in each layer."""
  return [lora.rank_of(f'layer_{i}/{path}') for i in range(config.num_layers)]


def variables(params: pytree.Tree, factors: pytree.Tree, scale: float | jax.Array) -> dict:
  """{'params', 'lora'} as the model takes them: scaled, with DoRA's gains.

  Args:
    params: the base, with any trained leaves already in place.
    factors: an adapter of the same form (scanned or not); {} gives the base.
    scale: the factor on B A, a number or [].

  Raises:
    ValueError: an adapter of the other form, which the model would ignore.
  """
  if not factors:
    return {'params': params}
  _check_form(params, factors)
  return {'params': params, 'lora': _with_gains(_scaled(factors, scale), params)}


def _check_form(params: pytree.Tree, factors: pytree.Tree) -> None:
  base, adapter = ('scanned' if 'layers' in tree else 'unrolled' for tree in (params, factors))
  if base != adapter:
    raise ValueError(
      f'lora: the adapter is {adapter}, the base {base}; expected one form, '
      'see layout.stack_layers and layout.unstack_layers.'
    )


def _scaled(factors: pytree.Tree, scale: float | jax.Array) -> pytree.Tree:
  """B times the scale, the rest unchanged."""
  return pytree.map_with_name(lambda name, x: x * scale if name.endswith('lora_b') else x, factors)


def with_magnitudes(factors: pytree.Tree, params: pytree.Tree) -> pytree.Tree:
  """Sets every `lora_magnitude` to DoRA's start, m = ||W||."""
  flat, base = dict(pytree.items(factors)), dict(pytree.items(params))
  for module in _modules(flat, 'lora_magnitude'):
    flat[f'{module}/lora_magnitude'] = _norms(module, flat, base)
  return pytree.unflatten(flat)


def _with_gains(scaled: pytree.Tree, params: pytree.Tree) -> pytree.Tree:
  """DoRA's m / ||W + scale * B A||, `lora_gain`, for every `lora_magnitude`."""
  flat, base = dict(pytree.items(scaled)), dict(pytree.items(params))
  for module in _modules(flat, 'lora_magnitude'):
    m = flat.pop(f'{module}/lora_magnitude')
    norms = jax.lax.stop_gradient(_norms(module, flat, base))
    is_plain = (m == 0) | (norms == 0)
    gain = jnp.where(is_plain, 1.0, m / jnp.where(is_plain, 1.0, norms))
    flat[f'{module}/lora_gain'] = gain
  return pytree.unflatten(flat)


def merge(params: pytree.Tree, factors: pytree.Tree, scale: float) -> pytree.Tree:
  """W' = W + scale * B A, in float32, cast once to W's dtype.

  With magnitudes this is DoRA's W', whose outputs have those lengths.

  Args:
    params: the base, scanned or unrolled; it is not changed.
    factors: adapter of the same form.
    scale: `LoraConfig.scale`.

  Returns:
    A base with the adapter in its kernels.

  Raises:
    ValueError: factors where the base has no kernel.
  """
  names = {name for name, _ in pytree.items(params)}
  for module in _modules(dict(pytree.items(factors))):
    if f'{module}/w' not in names:
      raise ValueError(
        f'lora: got factors at {module}, where the base has no kernel; '
        'expected an adapter for its architecture and form (scanned or not).'
      )
  flat = dict(pytree.items(_with_gains(_scaled(factors, scale), params)))

  def add(name, w):
    module = name.removesuffix('/w')
    if f'{module}/lora_a' not in flat:
      return w
    merged = w.astype(jnp.float32) + _delta(module, flat, 1.0)
    if f'{module}/lora_gain' in flat:
      equation, stacked = _equation(module)
      axes = stacked + adapter.split(equation)[1]
      inputs = [i for i, c in enumerate(axes) if c in adapter.inputs(equation)]
      merged *= jnp.expand_dims(flat[f'{module}/lora_gain'], inputs)
    return merged.astype(w.dtype)

  return pytree.map_with_name(add, params)


def _modules(flat: dict[str, jax.Array], leaf: str = 'lora_a') -> list[str]:
  """Paths of the adapted projections that have a leaf, e.g. layers/attn/q."""
  return [n.removesuffix(f'/{leaf}') for n in flat if n.endswith(f'/{leaf}')]


def _equation(module: str) -> tuple[str, str]:
  """(equation of the projection at a path, 'L' if its layers are stacked else '')."""
  *layer, block, name = module.split('/')
  equation = layout.PROJECTION_EQUATIONS[f'{block}/{name}']
  return equation, 'L' if layer == ['layers'] else ''


def _norms(module: str, flat: dict[str, jax.Array], base: dict[str, jax.Array]) -> jax.Array:
  """||W + B A|| of each output of one projection, e.g. [N, H]; float32.

  ||W||² + 2 W·BA + ||BA||² is contracted through the rank, layer by layer, so the
  only array of a kernel's size is its float32 copy.
  """
  equation, stacked = _equation(module)
  _, w_axes, _ = adapter.split(equation)
  outputs = adapter.outputs(equation)

  def norms(leaves):
    w, lora_a, lora_b = (x.astype(jnp.float32) for x in leaves)
    a, b = adapter.axes_of(equation, lora_a.ndim)
    inputs = [i for i, c in enumerate(w_axes) if c in adapter.inputs(equation)]
    products = lambda equation, *x: jnp.einsum(f'{equation}->{outputs}', *x, precision='highest')
    square = jnp.sum(w * w, axis=inputs)
    square += 2.0 * products(f'{w_axes},{a},{b}', w, lora_a, lora_b)
    square += products(
      f'{a},{a.replace("R", "S")},{b},{b.replace("R", "S")}', lora_a, lora_a, lora_b, lora_b
    )
    return jnp.sqrt(jnp.maximum(square, 0.0))

  leaves = jax.lax.stop_gradient(
    (base[f'{module}/w'], flat[f'{module}/lora_a'], flat[f'{module}/lora_b'])
  )
  return jax.lax.map(norms, leaves) if stacked else norms(leaves)


def _delta(module: str, flat: dict[str, jax.Array], scale: float) -> jax.Array:
  """scale * B A of one projection, in the shape of its kernel; float32."""
  lora_a, lora_b = flat[f'{module}/lora_a'], flat[f'{module}/lora_b']
  equation, stacked = _equation(module)
  a, b = adapter.axes_of(equation, lora_a.ndim - len(stacked))
  _, w, _ = adapter.split(equation)
  return scale * jnp.einsum(
    f'{stacked}{a},{stacked}{b}->{stacked}{w}',
    lora_a.astype(jnp.float32),
    lora_b.astype(jnp.float32),
    precision='highest',
  )


def _limit(lora, column, equation, sizes) -> float:
  """Largest |A|: PEFT kaiming_uniform(sqrt 5), or Keras he_uniform.

  PEFT's fan-in is the projection's input width whatever the factorization;
  Keras's is the product of all of A's axes but the last.
  """
  if lora.init == 'keras':
    return math.sqrt(6 / math.prod(column))
  return 1 / math.sqrt(math.prod(sizes[c] for c in adapter.inputs(equation)))
