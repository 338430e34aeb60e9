"""The adapter as one object: what it carries, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import BaseConfig, LoraConfig, MeshConfig
from gemma_jax.formats import adapter
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.lora import align
from gemma_jax.lora import factors as factors_lib
from gemma_jax.lora.lora import Lora
from gemma_jax.runs.base import Base
from tests import toy

pytestmark = pytest.mark.usefixtures('quick_compile')

KOREAN = TrainedWith('korean', 'all', 96)
CONFIGS = (
  LoraConfig(rank=2, alpha=3.0, targets='qv'),
  LoraConfig(rank=5, alpha=1.5, targets='qv', scale_rule='alpha_over_sqrt_r'),
)


@functools.cache
def base(scan_layers=True):
  """The tiny base, opened; without weights."""
  config = BaseConfig(path='random:tiny3', scan_layers=scan_layers)
  return Base.open(config, MeshConfig(fsdp=1))


def lora(config=CONFIGS[0]):
  """A trained adapter with all that one can have."""
  along = {'final_norm': {'scale': np.linspace(0, 1, 13, dtype=np.float32)}}
  own = toy.lora(lora_config=config, trained_base=along)
  return dataclasses.replace(own, reference='toy', trained_with=KOREAN)


class TestInit:
  def test_it_changes_nothing_and_says_what_it_is(self):
    made = Lora.init(base(), rank=4, targets='all', scale_rule='alpha_over_sqrt_r', alpha=6.0)
    assert made.config == LoraConfig(
      rank=4, targets='all', scale_rule='alpha_over_sqrt_r', alpha=6.0
    )
    assert (made.scale, made.scale.dtype) == (3, np.float32)
    assert made.reference == 'random:tiny3'
    assert made.is_single and made.configs == (made.config,) and made.members() == [made]
    for name, x in pytree.items(made.factors):
      assert x.dtype == jnp.float32
      assert np.any(x) == name.endswith('lora_a'), name
    factors_lib.check_fit(base().config, made.factors, True)

  def test_it_is_a_function_of_the_seed(self):
    first, again, other = (Lora.init(base(False), rank=3, seed=seed) for seed in (5, 5, 0))
    toy.assert_equal(first.factors, again.factors)
    a = lambda lora: lora.factors['layer_1']['attn']['q']['lora_a']
    assert (a(first) != a(other)).all()

  def test_fields_take_the_place_of_the_configs(self):
    config = LoraConfig(rank=4, targets='down')
    made = Lora.init(base(), config, rank=2)
    assert (made.config.rank, made.config.targets, config.rank) == (2, 'down', 4)

  def test_dora_starts_from_the_weights(self):
    with pytest.raises(ValueError, match=r'lora\.dora: got a base without weights'):
      Lora.init(base(), dora=True)
    loaded = base().load()
    made = Lora.init(loaded, rank=2, dora=True)
    w = np.asarray(loaded.params['layers']['attn']['q']['w'], np.float64)  # [L, N, D, H]
    got = made.factors['layers']['attn']['q']['lora_magnitude']
    toy.assert_close(got, np.sqrt((w**2).sum(2)), 1e-5)

  @pytest.mark.parametrize(
    ('fields', 'error', 'message'),
    [
      ({'rnak': 3}, TypeError, 'rnak'),
      ({'rank': 0}, ValueError, r'lora\.rank: got 0'),
      ({'rank': 999}, ValueError, r'lora\.rank: got 999, expected at most'),
      ({'targets': 'nose'}, ValueError, r'lora\.targets'),
      ({'path': 'somewhere'}, ValueError, r"lora\.path: got 'somewhere'.*Lora\.load reads one"),
      ({'ranks': {'layer_99/.*': 2}}, ValueError, 'layer_99.* matches no target'),
    ],
  )
  def test_what_does_not_fit_is_refused(self, fields, error, message):
    with pytest.raises(error, match=message):
      Lora.init(base(), **fields)


class TestPytree:
  def test_it_goes_through_jit_and_back(self):
    before = lora()
    after = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 0, x))(before)
    assert isinstance(after, Lora)
    assert after.config is before.config
    assert (after.reference, after.trained_with) == ('toy', KOREAN)
    toy.assert_equal(jax.device_get(after), jax.device_get(before))
    names = [name for name, _ in pytree.items(before)]
    assert 'factors/layers/attn/q/lora_a' in names and 'scale' in names
    assert 'trained_base/final_norm/scale' in names
    assert len(names) == 4 + 1 + 1

  def test_adapters_of_one_kind_share_a_program(self):
    traces = []

    @jax.jit
    def total(lora):
      traces.append(lora.config)
      return lora.scale * sum(jnp.sum(x) for x in jax.tree.leaves(lora.factors))

    first = lora()
    # As read from a file: another object, an integer where that one has a float.
    same = dataclasses.replace(first.config, alpha=3)
    second = dataclasses.replace(first, scale=np.float32(2), config=same)
    assert total(first) != total(second)
    assert len(traces) == 1
    total(lora(dataclasses.replace(CONFIGS[0], dropout=0.5)))
    assert len(traces) == 2

  def test_gradients_have_its_form(self):
    own = dataclasses.replace(lora(), scale=jnp.float32(2))
    square = lambda lora: lora.scale * sum(jnp.sum(x**2) for x in jax.tree.leaves(lora.factors))
    got = jax.grad(square)(own)
    toy.assert_close(got.factors, jax.tree.map(lambda x: 4 * x, own.factors), 1e-6)
    assert got.config == own.config

  def test_equal_configs_have_equal_hashes(self):
    config = LoraConfig(alpha=16.0, ranks={'a': 2, 'b': 3})
    same = LoraConfig(alpha=16, ranks={'a': 2, 'b': 3})
    assert config == same and hash(config) == hash(same)
    others = [
      dataclasses.replace(config, **change)
      for change in ({'rank': 7}, {'alpha': 17.0}, {'ranks': {'a': 2}}, {'dora': True})
    ]
    assert len({hash(each) for each in (config, *others)}) == 5


class TestStack:
  def test_members_undo_it(self):
    loras = [toy.lora(lora_config=config) for config in CONFIGS]
    stacked = Lora.stack(loras)
    assert not stacked.is_single and stacked.configs == CONFIGS
    assert stacked.factors['layers']['attn']['q']['lora_a'].shape == (2, 3, 13, 5)
    assert stacked.scale.dtype == jnp.float32
    np.testing.assert_array_equal(stacked.scale, [each.scale for each in loras])
    want = jax.tree.map(lambda x: (x.shape[1:], x.dtype), stacked.factors)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stacked.shapes()) == want
    for got, want in zip(stacked.members(), loras, strict=True):
      toy.assert_equal(jax.device_get(got.factors), jax.device_get(want.factors))
      assert (got.scale, got.config) == (want.scale, want.config)

  def test_members_have_their_own_targets_and_magnitudes(self):
    configs = [
      CONFIGS[0],
      LoraConfig(rank=3, targets='all'),
      LoraConfig(rank=4, targets='v|down', dora=True),
    ]
    loras = [toy.lora(lora_config=config) for config in configs]
    for got, want in zip(Lora.stack(loras).members(), loras, strict=True):
      toy.assert_equal(jax.device_get(got.factors), jax.device_get(want.factors))

  def test_it_is_a_pytree_of_arrays_with_a_leading_axis(self):
    loras = [toy.lora(lora_config=config) for config in CONFIGS]
    after = jax.jit(lambda x: x)(Lora.stack(loras))
    assert after.configs == CONFIGS
    assert {len(x) for x in jax.tree.leaves(after)} == {2}

  def test_several_are_neither_applied_nor_merged_nor_saved(self, tmp_path):
    stacked = Lora.stack([toy.lora(lora_config=config) for config in CONFIGS])
    for verb, call in (
      ('apply', lambda: stacked.variables(toy.base())),
      ('merge', lambda: stacked.merge(toy.base())),
      ('save', lambda: stacked.save(tmp_path / 'a')),
    ):
      with pytest.raises(ValueError, match=f'got 2 adapters to {verb}, expected one; see `Lora.m'):
        call()
    assert not list(tmp_path.iterdir())

  @pytest.mark.parametrize(
    ('loras', 'message'),
    [
      ([], 'got no adapter to stack'),
      ([lora()], 'trained leaves of the base, expected adapters with a single rank'),
      ([toy.lora(lora_config=LoraConfig(rank=2, ranks={'.*/v': 1}))], r'lora\.ranks'),
      (
        [toy.lora(lora_config=LoraConfig(factorization=form)) for form in ('matrix', 'keras')],
        'a mix of factorizations or forms',
      ),
    ],
    ids=['none', 'trained base', 'ranks', 'two factorizations'],
  )
  def test_what_cannot_be_stacked_is_refused(self, loras, message):
    with pytest.raises(ValueError, match=message):
      Lora.stack(loras)


class TestVariables:
  def test_scale_and_trained_base_are_in_them(self):
    own = lora()
    params = toy.base()
    made = own.variables(params)
    want = align.replace_leaves(params, own.trained_base)
    assert made.keys() == {'params', 'lora'}
    toy.assert_equal(made['params'], want)
    toy.assert_equal(made, factors_lib.variables(want, own.factors, own.scale))
    merged = own.merge(params)
    toy.assert_equal(merged, factors_lib.merge(want, own.factors, own.scale))
    b = lambda tree: np.asarray(tree['layers']['attn']['q']['lora_b'])
    np.testing.assert_array_equal(b(made['lora']), own.scale * b(own.factors))

  def test_no_factors_are_the_base(self):
    nothing = Lora({}, np.float32(1), LoraConfig())
    params = toy.base()
    assert nothing.variables(params)['params'] is params
    assert nothing.variables(params).keys() == {'params'}

  def test_another_form_is_refused(self):
    with pytest.raises(ValueError, match='the adapter is unrolled, the base scanned'):
      toy.lora(scan_layers=False).variables(toy.base())


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('dora', [False, True])
def test_saved_and_loaded_it_is_the_same(tmp_path, scan_layers, dora):
  opened = base(scan_layers)
  config = LoraConfig(rank=3, alpha=5.0, targets='q|down', dora=dora)
  along = {'final_norm': {'scale': np.linspace(0, 1, 34, dtype=np.float32)}}
  own = dataclasses.replace(
    toy.lora(opened.config, config, scan_layers, along), reference='toy', trained_with=KOREAN
  )
  own.save(tmp_path / 'a')
  again = Lora.load(tmp_path / 'a', opened)
  toy.assert_equal(jax.device_get(again), jax.device_get(own))
  assert again.config == own.config
  assert (again.reference, again.trained_with) == ('toy', KOREAN)
  # Also of nobody's base, trained nobody knows how; in place of the first.
  plain = Lora(own.factors, own.scale, own.config)
  plain.save(tmp_path / 'a')
  again = adapter.read(tmp_path / 'a', opened.config, scan_layers)
  assert (again.trained_base, again.reference, again.trained_with) == ({}, '', None)
