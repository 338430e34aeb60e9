"""The named architectures against the figures of their releases."""

import jax.numpy as jnp
import pytest

from gemma_jax import pytree
from gemma_jax.model import layout, variants

# Parameters of the Hugging Face and Keras releases.
RELEASED = {
  'gemma_2b': 2_506_172_416,
  'gemma_7b': 8_537_680_896,
  'gemma2_2b': 2_614_341_888,
  'gemma3_270m': 268_098_176,
  'gemma3_1b': 999_885_952,
}


@pytest.mark.parametrize('name', RELEASED)
@pytest.mark.parametrize('scan_layers', [True, False])
def test_parameters_equal_those_of_the_release(name, scan_layers):
  config = variants.get(name)
  params = layout.abstract_params(config, jnp.bfloat16, scan_layers)
  assert pytree.num_params(params) == RELEASED[name]
  assert pytree.num_bytes(params) == 2 * RELEASED[name]


@pytest.mark.parametrize(
  ('num_layers', 'locals_per_global', 'expected'),
  [(5, 2, (True, True, False, True, True)), (3, 1, (True, False, True)), (2, 0, (False, False))],
)
def test_alternating(num_layers, locals_per_global, expected):
  assert variants.alternating(num_layers, locals_per_global) == expected


@pytest.mark.parametrize(
  ('name', 'global_layers'),
  [
    ('gemma2_2b', list(range(1, 26, 2))),
    ('gemma3_270m', [5, 11, 17]),
    ('gemma3_1b', [5, 11, 17, 23]),  # the last two of 26 are local
  ],
)
def test_global_layers(name, global_layers):
  flags = variants.get(name).layer_is_local
  assert [i for i, is_local in enumerate(flags) if not is_local] == (global_layers)


def test_every_switch_differs_between_the_tiny_variants_as_in_the_families():
  pairs = (
    (variants.TINY, variants.GEMMA_2B),
    (variants.TINY2, variants.GEMMA2_2B),
    (variants.TINY3, variants.GEMMA3_270M),
  )
  for tiny, real in pairs:
    for field in ('use_qk_norm', 'use_post_norms'):
      assert getattr(tiny, field) == getattr(real, field)
    for field in (
      'layer_is_local',
      'window_size',
      'rope_local_theta',
      'attention_softcap',
      'final_softcap',
    ):
      assert (getattr(tiny, field) is None) == (getattr(real, field) is None)
    if tiny.layer_is_local:
      assert set(tiny.layer_is_local) == {True, False}


def test_an_unknown_name_lists_those_there_are():
  with pytest.raises(ValueError, match=r"variant: got 'gemma_3b'.*gemma3_270m"):
    variants.get('gemma_3b')
