"""The adapter: its counts, its start, its application and its merging."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.lora import factors as factors_lib
from gemma_jax.model import adapter, layout, variants
from gemma_jax.model.transformer import Transformer
from tests import toy

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]

R = 3
FACTORIZATIONS = ('matrix', 'keras')
all_targets = lambda factorization, **fields: LoraConfig(
  rank=R, alpha=5.0, targets='all', factorization=factorization, **fields
)


def init(config, lora_config, scan_layers=True, seed=0):
  tree = factors_lib.init(jax.random.key(seed), config, lora_config, scan_layers)
  return jax.device_get(tree)


class TestCounts:
  def count(self, name, lora_config):
    make = lambda: factors_lib.init(jax.random.key(0), variants.get(name), lora_config)
    return pytree.num_params(jax.eval_shape(make))

  @pytest.mark.parametrize(
    ('factorization', 'targets', 'published'),
    [
      ('keras', 'qv', (1_363_968, 2_928_640, 267_264, 652_288)),
      ('matrix', 'qv', (460_800, 798_720, 184_320, 372_736)),
      ('matrix', 'all', (4_902_912, 5_191_680, 949_248, 3_261_440)),
    ],
  )
  def test_published_counts_at_rank_four(self, factorization, targets, published):
    config = LoraConfig(rank=4, targets=targets, factorization=factorization)
    names = ('gemma_2b', 'gemma2_2b', 'gemma3_270m', 'gemma3_1b')
    assert tuple(self.count(name, config) for name in names) == published

  @pytest.mark.parametrize('factorization', FACTORIZATIONS)
  @pytest.mark.parametrize('target', ['q', 'k', 'v', 'o', 'gate', 'up', 'down'])
  @pytest.mark.parametrize('name', ['gemma_7b', 'gemma2_2b', 'tiny3'])
  def test_closed_form(self, name, target, factorization):
    c = variants.get(name)
    D, F, H = c.embed_dim, c.hidden_dim, c.head_dim
    N, K = c.num_heads, c.num_kv_heads
    matrix = {
      'q': D + N * H,
      'k': D + K * H,
      'v': D + K * H,
      'o': N * H + D,
      'gate': D + F,
      'up': D + F,
      'down': F + D,
    }
    keras = matrix | {'q': N * D + H, 'k': K * D + H, 'v': K * D + H}
    sides = {'matrix': matrix, 'keras': keras}[factorization]
    config = LoraConfig(rank=7, targets=target, factorization=factorization)
    assert self.count(name, config) == 7 * sides[target] * c.num_layers


@pytest.mark.parametrize(
  ('equation', 'matrix', 'keras'),
  [
    ('BTD,NDH->BTNH', ('DR', 'RNH'), ('NDR', 'RH')),
    ('BTD,KDH->BTKH', ('DR', 'RKH'), ('KDR', 'RH')),
    ('BTNH,NHD->BTD', ('NHR', 'RD'), ('NHR', 'RD')),
    ('BTD,DF->BTF', ('DR', 'RF'), ('DR', 'RF')),
  ],
)
def test_factor_axes(equation, matrix, keras):
  assert adapter.factor_axes(equation, 'matrix') == matrix
  assert adapter.factor_axes(equation, 'keras') == keras


class TestInit:
  @pytest.mark.parametrize('factorization', FACTORIZATIONS)
  def test_a_smaller_rank_is_a_prefix_of_a_larger_one(self, factorization):
    small = all_targets(factorization)
    large = dataclasses.replace(small, rank=7)
    wide = dict(pytree.items(init(toy.FULL, large)))
    for name, x in pytree.items(init(toy.FULL, small)):
      if name.endswith('lora_a'):
        np.testing.assert_array_equal(x, wide[name][..., :R], err_msg=name)

  @pytest.mark.parametrize('factorization', FACTORIZATIONS)
  def test_scanned_and_unrolled_hold_the_same_numbers(self, factorization):
    config = all_targets(factorization)
    unrolled = init(toy.FULL, config, scan_layers=False)
    toy.assert_equal(layout.stack_layers(unrolled), init(toy.FULL, config))

  def test_b_is_zero_and_no_two_columns_of_a_are_equal(self):
    tree = init(toy.FULL, all_targets('matrix'))
    columns = []
    for name, x in pytree.items(tree):
      assert x.dtype == np.float32
      if name.endswith('lora_b'):
        np.testing.assert_array_equal(x, np.zeros_like(x))
      else:  # of every layer and rank; the first values tell them apart
        columns += list(np.moveaxis(x, -1, 1).reshape(-1, *x.shape[1:-1]))
    starts = {tuple(c.ravel()[:5].tolist()) for c in columns}
    assert len(starts) == len(columns) == 7 * toy.FULL.num_layers * R

  def test_another_seed_gives_another_a(self):
    config = LoraConfig(rank=R, targets='q')
    a, b = (init(toy.FULL, config, seed=s) for s in (0, 1))
    assert np.all(a['layers']['attn']['q']['lora_a'] != (b['layers']['attn']['q']['lora_a']))

  @pytest.mark.parametrize(
    ('factorization', 'rule', 'fan_in_q', 'fan_in_v', 'numerator'),
    [
      ('matrix', 'peft', 'D', 'D', 1),
      ('keras', 'peft', 'D', 'D', 1),
      ('matrix', 'keras', 'D', 'D', 6),
      ('keras', 'keras', 'ND', 'KD', 6),
    ],
  )
  def test_limits_of_a(self, factorization, rule, fan_in_q, fan_in_v, numerator):
    """sqrt(numerator / fan-in), reached by the extreme of many samples."""
    tree = init(toy.FULL, LoraConfig(rank=R, factorization=factorization, init=rule, targets='qv'))
    sizes = layout.axis_sizes(toy.FULL)
    for target, letters in (('q', fan_in_q), ('v', fan_in_v)):
      a = tree['layers']['attn'][target]['lora_a']
      limit = math.sqrt(numerator / math.prod(sizes[c] for c in letters))
      assert 0.95 * limit < np.abs(a).max() <= limit
      assert abs(a.mean()) < 0.2 * limit

  def test_kerass_limit_is_sqrt_six_over_heads_times_pefts(self):
    """For Gemma 1 2B 0.87 for q and 2.45 for v: a hidden variable, named."""
    keras, peft = (
      init(toy.FULL, LoraConfig(rank=R, factorization='keras', init=rule))
      for rule in ('keras', 'peft')
    )
    for target, ratio in (('q', math.sqrt(6 / 10)), ('v', math.sqrt(6 / 2))):
      a, b = (t['layers']['attn'][target]['lora_a'] for t in (keras, peft))
      toy.assert_close(a, ratio * b, 1e-6)

  @pytest.mark.parametrize(
    ('factorization', 'rank', 'side', 'path'),
    [('matrix', 14, 13, 'attn/q'), ('keras', 14, 13, 'attn/o')],
  )
  def test_a_rank_beyond_a_kernels_side_is_refused(self, factorization, rank, side, path):
    config = dataclasses.replace(all_targets(factorization), rank=rank)
    with pytest.raises(ValueError, match=rf'lora.rank: got {rank}, .* at most {side}, .*{path}'):
      init(toy.FULL, config)
    # Of an adapter that is there already, it is what it is.
    there = dataclasses.replace(config, path='adapter')
    factors_lib.check_rank(toy.FULL, there)


def axes_of(equation):
  """'BTD,NDH->BTNH' → ('BTD', 'NDH', 'BTNH')."""
  return re.fullmatch(r'(\w+),(\w+)->(\w+)', equation).groups()


def flattened(name, delta):
  """One layer's update as the matrix [inputs, outputs]."""
  path = name.removeprefix('layers/').removesuffix('/w')
  x, w, out = axes_of(layout.PROJECTION_EQUATIONS[path])
  inputs = [w.index(c) for c in w if c in x and c not in out]
  outputs = [i for i in range(len(w)) if i not in inputs]
  rows = math.prod(delta.shape[i] for i in inputs)
  return delta.transpose(inputs + outputs).reshape(rows, -1)


@pytest.mark.parametrize('factorization', FACTORIZATIONS)
def test_rank_of_the_update(factorization):
  """At most r; keras: each head has its own r, N r or K r in all."""
  config = dataclasses.replace(toy.FULL, embed_dim=37)
  factors = toy.factors(config, all_targets(factorization))
  heads = {'attn/q': config.num_heads, 'attn/k': 2, 'attn/v': 2}
  deltas = pytree.items(factors_lib.deltas(factors, 2.0))
  assert len(deltas) == 7
  for name, delta in deltas:
    for layer in np.asarray(delta, np.float64):
      rank = np.linalg.matrix_rank(flattened(name, layer), tol=1e-4)
      path = name.removeprefix('layers/').removesuffix('/w')
      most = R * heads.get(path, 1) if factorization == 'keras' else R
      assert rank == min(most, 37), name


@pytest.mark.parametrize('factorization', FACTORIZATIONS)
@pytest.mark.parametrize('path', layout.PROJECTION_EQUATIONS)
def test_apply_and_deltas_equal_float64_einsum(path, factorization):
  equation = layout.PROJECTION_EQUATIONS[path]
  x_axes, w_axes, _ = axes_of(equation)
  a_axes, b_axes = adapter.factor_axes(equation, factorization)
  sizes = layout.axis_sizes(toy.FULL) | {'B': 2, 'T': 7, 'R': R}
  rng = np.random.default_rng(0)
  x, a, b = (rng.standard_normal([sizes[c] for c in axes]) for axes in (x_axes, a_axes, b_axes))
  product = f'{a_axes},{b_axes}->{w_axes}'
  update = np.einsum(product, a, b)
  x32, a32, b32 = (jnp.asarray(y, jnp.float32) for y in (x, a, b))
  got = adapter.apply(equation, x32, a32, b32)
  toy.assert_close(got, np.einsum(equation, x, update), 1e-5)
  for layers, axis in (('layers', 1), ('layer_5', 0)):
    stack = lambda y, axis=axis: y[None] if axis else y
    factors = pytree.unflatten(
      {f'{layers}/{path}/lora_a': stack(a32), f'{layers}/{path}/lora_b': stack(b32)}
    )
    got = factors_lib.deltas(factors, 1.7)
    want = pytree.unflatten({f'{layers}/{path}/w': 1.7 * stack(update)})
    toy.assert_close(got, want, 1e-5)


plain_apply = functools.partial(adapter.apply, plain_gradients=True)


def one_einsum(equation, x, a, b):
  """`adapter.apply` without the product of the rank between."""
  x_axes, _, out = axes_of(equation)
  a_axes, b_axes = adapter.axes_of(equation, a.ndim)
  return jnp.einsum(f'{x_axes},{a_axes},{b_axes}->{out}', x, a, b)


@pytest.mark.parametrize('factorization', FACTORIZATIONS)
@pytest.mark.parametrize('path', layout.PROJECTION_EQUATIONS)
def test_gradients_of_apply_equal_those_of_one_einsum(path, factorization):
  """Also for adapters mapped over one input, and over an input for each."""
  equation = layout.PROJECTION_EQUATIONS[path]
  x_axes, _, _ = axes_of(equation)
  a_axes, b_axes = adapter.factor_axes(equation, factorization)
  sizes = layout.axis_sizes(toy.FULL) | {'B': 2, 'T': 7, 'R': R}
  rng = np.random.default_rng(1)

  def draw(axes, summed):  # so that outputs are of order one
    scale = math.prod(sizes[c] for c in summed) ** -0.5
    values = rng.standard_normal([3, *(sizes[c] for c in axes)])
    return jnp.asarray(scale * values, jnp.float32)

  x = draw(x_axes, '')
  a, b = draw(a_axes, set(a_axes) & set(x_axes)), draw(b_axes, 'R')
  one = x[0], a[0], b[0]

  def gradients(function, mapped, arrays):
    function = functools.partial(function, equation)
    if mapped:
      function = jax.vmap(function, mapped)
    total = lambda *arrays: jnp.sum(jnp.sin(function(*arrays)))
    found = jax.jit(jax.grad(total, (0, 1, 2)))(*arrays)
    return dict(zip('xab', found, strict=True))

  for mapped, arrays in ((None, one), ((None, 0, 0), (x[0], a, b)), ((0, 0, 0), (x, a, b))):
    want = gradients(one_einsum, mapped, arrays)
    toy.assert_close(gradients(adapter.apply, mapped, arrays), want, 1e-5)
    toy.assert_close(gradients(plain_apply, mapped, arrays), want, 1e-5)

  half = [y.astype(jnp.bfloat16) for y in one]
  want = gradients(one_einsum, None, [y.astype(jnp.float32) for y in half])
  got = gradients(adapter.apply, None, half)
  for name, y in got.items():
    assert y.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(y, np.float32) - want[name])
    assert error <= 0.02 * np.linalg.norm(want[name]), name


def test_the_gradient_of_b_copies_no_cotangent():
  """JAX's own does: it would be moved for its tokens to come first."""
  x, a, b = jnp.ones((4, 256, 64)), jnp.ones((64, R)), jnp.ones((R, 4, 256))
  shape = (4, 256, 4, 256)

  def largest_copy(apply):
    def gradient(b, cotangent):
      return jax.vjp(lambda b: apply('BTD,NDH->BTNH', x, a, b), b)[1](cotangent)

    program = jax.jit(gradient).lower(b, jnp.ones(shape)).compile().as_text()
    copies = re.findall(r'\[([\d,]+)\]\S* copy\(', program)
    return max(math.prod(map(int, copy.split(','))) for copy in copies)

  assert largest_copy(plain_apply) == math.prod(shape)
  assert largest_copy(adapter.apply) < math.prod(shape)


@pytest.fixture(scope='module')
def hidden():
  """variables → hidden [2, 11, D], compiled once for each structure."""
  model = Transformer(toy.FULL)
  tokens = toy.batch()['tokens']
  return jax.jit(lambda variables: model.apply(variables, tokens))


@pytest.fixture(scope='module')
def params():
  return toy.base()


@pytest.mark.parametrize('factorization', FACTORIZATIONS)
def test_a_new_adapter_leaves_the_output_bit_equal(hidden, params, factorization):
  factors = init(toy.FULL, all_targets(factorization))
  got = hidden({'params': params, 'lora': factors_lib.effective(factors, 5.0)})
  np.testing.assert_array_equal(got, hidden({'params': params}))


@pytest.mark.parametrize('factorization', FACTORIZATIONS)
def test_merged_equals_adapter_and_differs_from_base(hidden, params, factorization):
  factors = toy.factors(toy.FULL, all_targets(factorization))
  scale = all_targets(factorization).scale
  adapted = hidden({'params': params, 'lora': factors_lib.effective(factors, scale)})
  merged = hidden({'params': factors_lib.merge(params, factors, scale)})
  toy.assert_close(merged, adapted, 1e-4)
  assert np.abs(merged - hidden({'params': params})).max() > 0.1


class TestMerge:
  def test_is_in_float32_and_cast_once(self, params):
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    factors = toy.factors()
    merged = dict(pytree.items(factors_lib.merge(base, factors, 0.01)))
    deltas = dict(pytree.items(factors_lib.deltas(factors, 0.01)))
    for name, w in pytree.items(base):
      want = w
      if name in deltas:
        want = (w.astype(jnp.float32) + deltas[name]).astype(jnp.bfloat16)
        assert np.any(want != w)
      toy.assert_equal(merged[name], want)

  def test_asks_for_the_highest_precision(self):
    """A TPU would otherwise multiply float32 in bfloat16."""
    jaxpr = str(jax.make_jaxpr(lambda f: factors_lib.deltas(f, 1.0))(toy.factors()))
    count = lambda text: jaxpr.count(text)
    assert count('dot_general') == 7
    assert count('precision=(Precision.HIGHEST, Precision.HIGHEST)') == 7

  def test_leaves_the_base_as_it_is(self, params):
    before = jax.device_get(params)
    factors_lib.merge(params, toy.factors(), 1.0)
    toy.assert_equal(params, before)

  def test_factors_without_a_kernel_are_refused(self, params):
    unrolled = toy.factors(scan_layers=False)
    with pytest.raises(ValueError, match='layer_0/attn/k, where the base has'):
      factors_lib.merge(params, unrolled, 1.0)


def test_effective_scales_b_alone():
  factors = toy.factors()
  for (name, got), (_, x) in itertools.zip_longest(
    pytree.items(factors_lib.effective(factors, 0.5)), pytree.items(factors)
  ):
    scale = np.float32(0.5 if name.endswith('lora_b') else 1.0)
    np.testing.assert_array_equal(got, x * scale, err_msg=name)


def test_targets_by_path():
  paths = factors_lib.target_paths(LoraConfig(targets='q|down'))
  assert paths == {'attn/q': 'BTD,NDH->BTNH', 'mlp/down': 'BTF,FD->BTD'}
