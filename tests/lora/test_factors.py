"""The adapter: its counts, its start, its application and its merging."""

import dataclasses
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
  deltas = pytree.items(toy.deltas(factors, 2.0, config))
  assert len(deltas) == 7
  for name, delta in deltas:
    for layer in np.asarray(delta, np.float64):
      rank = np.linalg.matrix_rank(flattened(name, layer), tol=1e-4)
      path = name.removeprefix('layers/').removesuffix('/w')
      most = R * heads.get(path, 1) if factorization == 'keras' else R
      assert rank == min(most, 37), name


@pytest.mark.parametrize('factorization', FACTORIZATIONS)
@pytest.mark.parametrize('path', layout.PROJECTION_EQUATIONS)
def test_an_update_equals_float64_einsum(path, factorization):
  equation = layout.PROJECTION_EQUATIONS[path]
  _, w_axes, _ = adapter.split(equation)
  a_axes, b_axes = adapter.factor_axes(equation, factorization)
  sizes = layout.axis_sizes(toy.FULL) | {'R': R}
  rng = np.random.default_rng(0)
  a, b = (rng.standard_normal([sizes[c] for c in axes]) for axes in (a_axes, b_axes))
  update = np.einsum(f'{a_axes},{b_axes}->{w_axes}', a, b)
  a32, b32 = (jnp.asarray(y, jnp.float32) for y in (a, b))
  for layers, axis in (('layers', 1), ('layer_5', 0)):
    stack = lambda y, axis=axis: y[None] if axis else y
    factors = pytree.unflatten(
      {f'{layers}/{path}/lora_a': stack(a32), f'{layers}/{path}/lora_b': stack(b32)}
    )
    got = toy.deltas(factors, 1.7)
    want = pytree.unflatten({f'{layers}/{path}/w': 1.7 * stack(update)})
    toy.assert_close(got, want, 1e-5)


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
  got = hidden(factors_lib.variables(params, factors, 5.0))
  np.testing.assert_array_equal(got, hidden({'params': params}))


@pytest.mark.parametrize('factorization', FACTORIZATIONS)
def test_merged_equals_adapter_and_differs_from_base(hidden, params, factorization):
  factors = toy.factors(toy.FULL, all_targets(factorization))
  scale = all_targets(factorization).scale
  adapted = hidden(factors_lib.variables(params, factors, scale))
  merged = hidden({'params': factors_lib.merge(params, factors, scale)})
  toy.assert_close(merged, adapted, 1e-4)
  assert np.abs(merged - hidden({'params': params})).max() > 0.1


class TestMerge:
  def test_is_in_float32_and_cast_once(self, params):
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    factors = toy.factors()
    merged = dict(pytree.items(factors_lib.merge(base, factors, 0.01)))
    deltas = dict(pytree.items(toy.deltas(factors, 0.01)))
    for name, w in pytree.items(base):
      want = w
      if name in deltas:
        want = (w.astype(jnp.float32) + deltas[name]).astype(jnp.bfloat16)
        assert np.any(want != w)
      toy.assert_equal(merged[name], want)

  def test_asks_for_the_highest_precision(self):
    """A TPU would otherwise multiply float32 in bfloat16."""
    merge = lambda params, factors: factors_lib.merge(params, factors, 1.0)
    jaxpr = str(jax.make_jaxpr(merge)(toy.base(), toy.factors()))
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


def test_variables_scale_b_alone(params):
  factors = toy.factors()
  made = factors_lib.variables(params, factors, 0.5)
  assert made['params'] is params
  for (name, got), (_, x) in itertools.zip_longest(
    pytree.items(made['lora']), pytree.items(factors)
  ):
    scale = np.float32(0.5 if name.endswith('lora_b') else 1.0)
    np.testing.assert_array_equal(got, x * scale, err_msg=name)


def test_targets_by_path():
  paths = factors_lib.target_paths(LoraConfig(targets='q|down'))
  assert paths == {'attn/q': 'BTD,NDH->BTNH', 'mlp/down': 'BTF,FD->BTD'}


def test_no_factors_are_the_base(params):
  for nothing in ({}, None):
    assert factors_lib.variables(params, nothing, 1.0) == {'params': params}


@pytest.mark.parametrize('scan_layers', [True, False])
def test_variables_of_another_form_are_refused(scan_layers):
  """The model would find no factors and compute the base."""
  base, own = toy.base(scan_layers=scan_layers), toy.factors(scan_layers=not scan_layers)
  got, want = ('unrolled', 'scanned') if scan_layers else ('scanned', 'unrolled')
  message = f'the adapter is {got}, the base {want}; expected one form, see layout'
  with pytest.raises(ValueError, match=message):
    factors_lib.variables(base, own, 1.0)


class TestFit:
  """Factors against the architecture and the form of a base, by shapes alone."""

  @pytest.mark.parametrize('factorization', FACTORIZATIONS)
  @pytest.mark.parametrize('scan_layers', [True, False])
  @pytest.mark.parametrize('dora', [False, True])
  def test_what_init_makes_fits(self, factorization, scan_layers, dora):
    config = all_targets(factorization, dora=dora)
    make = lambda: factors_lib.init(jax.random.key(0), toy.FULL, config, scan_layers)
    factors_lib.check_fit(toy.FULL, jax.eval_shape(make), scan_layers)

  def test_any_rank_fits(self):
    ranks = LoraConfig(rank=2, targets='qv', ranks={'layer_1/.*': 5})
    factors_lib.check_fit(toy.FULL, init(toy.FULL, ranks), True)
    factors_lib.check_fit(toy.FULL, {}, True)

  @pytest.mark.parametrize('factorization', FACTORIZATIONS)
  @pytest.mark.parametrize(
    ('change', 'leaf'),
    [
      ({'embed_dim': 15}, 'attn/k/lora_a of shape .* expected .*15'),
      ({'hidden_dim': 19}, 'mlp/down/lora_a of shape .* expected .*19'),
      ({'head_dim': 16}, 'attn/k/lora_b of shape .* expected .*16'),
      ({'num_heads': 4}, 'attn/(o/lora_a|q/lora_a|q/lora_b) of shape .* expected .*4'),
      ({'num_layers': 4, 'layer_is_local': (True,) * 4}, 'attn/k/lora_a of shape .* expected .4'),
    ],
  )
  def test_another_base_is_refused(self, change, leaf, factorization):
    own = toy.factors(lora_config=all_targets(factorization))
    other = dataclasses.replace(toy.FULL, **change)
    with pytest.raises(ValueError, match=f'lora: got layers/{leaf}.*belongs to another base'):
      factors_lib.check_fit(other, own, True)

  def test_magnitudes_of_another_base_are_refused(self):
    own = toy.factors(lora_config=LoraConfig(rank=R, targets='down', dora=True))
    own['layers']['mlp']['down']['lora_magnitude'] = jnp.ones((3, 17))
    message = r'down/lora_magnitude of shape \[3, 17\], expected \[3, 13\]'
    with pytest.raises(ValueError, match=message):
      factors_lib.check_fit(toy.FULL, own, True)

  @pytest.mark.parametrize('scan_layers', [True, False])
  def test_another_form_is_refused(self, scan_layers):
    own = toy.factors(scan_layers=not scan_layers)
    got, want = ('layer_0', 'layers') if scan_layers else ('layers', 'layer_0')
    message = f'got a leaf {got}/attn/k/lora_a, expected one at {want}/attn/k.*scan_layers'
    with pytest.raises(ValueError, match=message):
      factors_lib.check_fit(toy.FULL, own, scan_layers)

  @pytest.mark.parametrize(
    'name',
    ['layers/attn/q/w', 'layers/attn/z/lora_a', 'layer_3/attn/q/lora_a', 'lora_a', 'x/lora_b'],
  )
  def test_leaves_of_no_adapter_are_refused(self, name):
    own = pytree.unflatten({name: jnp.ones((3, 13, R))})
    with pytest.raises(ValueError, match=f'got a leaf {name}, expected one at'):
      factors_lib.check_fit(toy.FULL, own, not name.startswith('layer_'))

  def test_a_b_without_its_a_is_refused(self):
    own = toy.factors(lora_config=LoraConfig(rank=R, targets='q'))
    del own['layers']['attn']['q']['lora_a']
    with pytest.raises(ValueError, match='attn/q'):
      factors_lib.check_fit(toy.FULL, own, True)


@pytest.mark.parametrize(
  ('name', 'shape', 'axis'),
  [
    ('layers/attn/q/lora_a', (3, 13, R), 2),
    ('layers/attn/q/lora_b', (3, R, 10, 14), 1),
    ('layer_0/attn/q/lora_b', (R, 10, 14), 0),
    ('params/lora/layers/attn/q/lora_b', (3, R, 10, 14), 1),
    ('layers/attn/q/lora_magnitude', (3, 10, 14), None),
    ('layers/attn/q/w', (3, 10, 13, 14), None),
  ],
)
def test_where_the_rank_stands(name, shape, axis):
  assert factors_lib.rank_axis(name, np.zeros(shape)) == axis
