"""Low-rank adapters: shapes, initial values, application, merging.

W' = W + scale * B A, with B = 0 at the start, so that the first forward pass is
exactly the base's (Hu et al. 2021, arXiv 2106.09685, section 4.1).

The factors are a tree of their own (the collection `lora`), beside the base and
never inside it. A projection's equation and kernel letters (`layout`) say what
its factors are. For the queries, `BTD,NDH->BTNH`:

    matrix   A [D, R]     B [R, N, H]    the paper's and PEFT's, rank <= r
    keras    A [N, D, R]  B [R, H]       Keras's EinsumDense, rank <= N r

The model applies whatever factors it is given and knows neither rank nor scale:
`effective` folds the scale into B, so adapters of one shape are interchangeable
inputs of one compiled program.
"""

import math

import jax
import jax.numpy as jnp

from gemma_jax import layout, pytree
from gemma_jax.config import PROJECTIONS, LoraConfig
from gemma_jax.model_config import ModelConfig


def target_paths(lora: LoraConfig) -> dict[str, str]:
  """Path in a layer → equation, for the projections that carry an adapter."""
  return {
    path: equation
    for path, equation in layout.PROJECTION_EQUATIONS.items()
    if path.split('/')[1] in lora.target_names
  }


def factor_axes(equation: str, factorization: str) -> tuple[str, str]:
  """Axis letters of A and B, R being the rank.

  factor_axes('BTD,NDH->BTNH', 'matrix')    ('DR', 'RNH')
  factor_axes('BTD,NDH->BTNH', 'keras')     ('NDR', 'RH')
  """
  x, w, out = _split(equation)
  if factorization == 'keras':
    return w[:-1] + 'R', 'R' + w[-1]
  contracted = ''.join(c for c in w if c in x and c not in out)
  return contracted + 'R', 'R' + ''.join(c for c in w if c not in contracted)


def leaf_axes(
  config: ModelConfig, lora: LoraConfig, scan_layers: bool = True
) -> dict[str, str]:
  """Axis letters of every factor, by path; as `layout.param_axes`."""
  axes = {}
  for path, equation in target_paths(lora).items():
    a, b = factor_axes(equation, lora.factorization)
    axes |= {f'{path}/lora_a': a, f'{path}/lora_b': b}
  return layout.in_layers(axes, config, scan_layers)


def apply(
  equation: str, x: jax.Array, lora_a: jax.Array, lora_b: jax.Array
) -> jax.Array:
  """x A B, by two products through the rank; the scale is already in B.

  Args:
    equation: of the projection, e.g. 'BTD,NDH->BTNH'.
    x: the projection's input, e.g. [B, T, D].
    lora_a: A; its number of axes tells the factorization.
    lora_b: B.

  Returns:
    The update to the projection's output, e.g. [B, T, N, H], in x's dtype.
  """
  x_axes, _, out = _split(equation)
  a, b = factor_axes(equation, 'matrix')
  if len(a) != lora_a.ndim:
    a, b = factor_axes(equation, 'keras')
  mid = ''.join(c for c in out if c in x_axes + a) + 'R'
  x = jnp.einsum(f'{x_axes},{a}->{mid}', x, lora_a.astype(x.dtype))
  return jnp.einsum(f'{mid},{b}->{out}', x, lora_b.astype(x.dtype))


def init(
  key: jax.Array,
  config: ModelConfig,
  lora: LoraConfig,
  scan_layers: bool = True,
) -> pytree.Tree:
  """Factors at the start: A uniform within the rule's limit, B zero; float32.

  Column j of A comes from a key of its own (target, layer, j), so the A of a
  smaller rank is a prefix of the A of a larger one, and scanned and unrolled
  trees hold the same numbers.

  Args:
    key: PRNG key.
    config: the base's architecture.
    lora: rank, targets, factorization and limits.
    scan_layers: scanned (`layers/...` with a leading L) or unrolled tree.

  Returns:
    Tree of `<layer>/<projection>/lora_a` and `lora_b`.
  """
  check_rank(config, lora)
  sizes = layout.axis_sizes(config)
  tree = {}
  for path, equation in target_paths(lora).items():
    a, b = factor_axes(equation, lora.factorization)
    column = tuple(sizes[c] for c in a[:-1])
    target_key = jax.random.fold_in(key, PROJECTIONS.index(path.split('/')[1]))
    limit = _limit(lora, column, equation, sizes)

    def draw(layer, j, key=target_key, shape=column, limit=limit):
      key = jax.random.fold_in(jax.random.fold_in(key, layer), j)
      return jax.random.uniform(key, shape, jnp.float32, -limit, limit)

    columns = jax.vmap(draw, (None, 0), -1)
    layers = jnp.arange(config.num_layers)
    lora_a = jax.vmap(columns, (0, None))(layers, jnp.arange(lora.rank))
    b_shape = (lora.rank, *(sizes[c] for c in b[1:]))
    tree[f'layers/{path}/lora_a'] = lora_a
    tree[f'layers/{path}/lora_b'] = jnp.zeros(
      (config.num_layers, *b_shape), jnp.float32
    )
  tree = pytree.unflatten(tree)
  return tree if scan_layers else layout.unstack_layers(tree)


def check_rank(config: ModelConfig, lora: LoraConfig) -> None:
  """ValueError if the rank exceeds a target kernel's smaller side."""
  sizes = layout.axis_sizes(config)
  for path, equation in target_paths(lora).items():
    a, b = factor_axes(equation, lora.factorization)
    side = min(
      math.prod(sizes[c] for c in a[:-1]), math.prod(sizes[c] for c in b[1:])
    )
    if lora.rank > side:
      raise ValueError(
        f'lora.rank: got {lora.rank}, expected at most {side}, the smaller '
        f'side of {path}; a larger rank adds parameters but no freedom.'
      )


def effective(factors: pytree.Tree, scale: float | jax.Array) -> pytree.Tree:
  """The tree that the model applies: B times the scale, A as it is."""
  return pytree.map_with_name(
    lambda name, x: x * scale if name.endswith('lora_b') else x, factors
  )


def merge(
  params: pytree.Tree, factors: pytree.Tree, scale: float
) -> pytree.Tree:
  """W' = W + scale * B A, in float32, cast once to W's dtype.

  Args:
    params: the base, scanned or unrolled; it is not changed.
    factors: adapter of the same form.
    scale: `LoraConfig.scale`.

  Returns:
    A base with the adapter in its kernels.

  Raises:
    ValueError: factors where the base has no kernel.
  """
  flat = dict(pytree.items(factors))
  names = {name for name, _ in pytree.items(params)}
  for module in _modules(flat):
    if f'{module}/w' not in names:
      raise ValueError(
        f'lora: got factors at {module}, where the base has no kernel; '
        'expected an adapter of its architecture and form (scanned or not).'
      )

  def add(name, w):
    module = name.removesuffix('/w')
    if f'{module}/lora_a' not in flat:
      return w
    update = _delta(module, flat, scale)
    return (w.astype(jnp.float32) + update).astype(w.dtype)

  return pytree.map_with_name(add, params)


def deltas(factors: pytree.Tree, scale: float) -> pytree.Tree:
  """scale * B A for every adapted kernel, at the kernel's path; float32."""
  flat = dict(pytree.items(factors))
  return pytree.unflatten(
    {f'{module}/w': _delta(module, flat, scale) for module in _modules(flat)}
  )


def _modules(flat: dict[str, jax.Array]) -> list[str]:
  """Paths of the adapted projections, e.g. layers/attn/q."""
  return [n.removesuffix('/lora_a') for n in flat if n.endswith('/lora_a')]


def _delta(module: str, flat: dict[str, jax.Array], scale: float) -> jax.Array:
  """scale * B A of one projection, in the shape of its kernel; float32."""
  lora_a, lora_b = flat[f'{module}/lora_a'], flat[f'{module}/lora_b']
  layer, path = module.split('/', 1)
  equation = layout.PROJECTION_EQUATIONS[path]
  stacked = 'L' if layer == 'layers' else ''
  a, b = factor_axes(equation, 'matrix')
  if len(a) + len(stacked) != lora_a.ndim:
    a, b = factor_axes(equation, 'keras')
  _, w, _ = _split(equation)
  return scale * jnp.einsum(
    f'{stacked}{a},{stacked}{b}->{stacked}{w}',
    lora_a.astype(jnp.float32),
    lora_b.astype(jnp.float32),
    precision='highest',
  )


def _split(equation: str) -> tuple[str, str, str]:
  inputs, out = equation.split('->')
  x, w = inputs.split(',')
  return x, w, out


def _limit(lora, column, equation, sizes) -> float:
  """Largest |A|: PEFT kaiming_uniform(sqrt 5), or Keras he_uniform.

  PEFT's fan-in is the projection's input width whatever the factorization;
  Keras's is the product of all of A's axes but the last.
  """
  if lora.init == 'keras':
    return math.sqrt(6 / math.prod(column))
  x, w, out = _split(equation)
  fan_in = math.prod(sizes[c] for c in w if c in x and c not in out)
  return 1 / math.sqrt(fan_in)
