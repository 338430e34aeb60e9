"""The call that reaches cuDNN computes what einsum does; what it refuses.

The same call is checked with XLA's implementation in cuDNN's place: masks,
window, scale and empty rows are then right, and only the kernel itself is
left to a GPU.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.model import attention, cudnn, variants
from tests import toy

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]


@pytest.fixture(scope='module')
def arrays():
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((2, 37, n, 14), np.float32)) for n in (6, 2, 2))
  batch = toy.batch(rows=2, length=37)
  positions, segments = batch['positions'], batch['segment_ids']
  context = attention.Context(None, None, positions, segments, positions, segments, None)
  return (q, k, v), context


@pytest.mark.parametrize('window', [None, 7])
def test_equals_einsum(arrays, window):
  (q, k, v), context = arrays

  def total(attend, *options):
    def f(q, k, v):
      out = attend(q, k, v, context, window, None, *options)
      return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))
    (_, out), grads = run(q, k, v)
    return dict(zip('oqkv', (out, *grads), strict=True))

  got, want = total(cudnn.attend, 'xla'), total(attention.attend_by_einsum)
  toy.assert_close(got, want, 1e-5)
  padding = np.asarray(context.q_segment_ids) == 0
  assert padding.any() and not np.asarray(got['o'])[padding].any()


def test_asks_for_cudnn(arrays):
  """Without an NVIDIA GPU JAX refuses, so the call did arrive there."""
  if jax.default_backend() != 'cpu':
    pytest.skip('there is a GPU')
  (q, k, v), context = arrays
  half = (x.astype(jnp.bfloat16) for x in (q, k, v))
  with pytest.raises((RuntimeError, NotImplementedError), match='cuDNN'):
    jax.jit(cudnn.attend, static_argnums=(4, 5))(*half, context, None, None)


def gpu(capability):
  return types.SimpleNamespace(platform='gpu', device_kind='a GPU', compute_capability=capability)


@pytest.mark.parametrize(
  ('changes', 'dtype', 'device', 'reason'),
  [
    ({}, 'bfloat16', gpu('9.0'), None),
    ({}, 'bfloat16', gpu('10.0'), None),
    ({'head_dim': 128}, 'bfloat16', gpu('8.0'), None),
    ({}, 'bfloat16', gpu('8.0'), 'head_dim up to 128'),
    ({'head_dim': 20}, 'bfloat16', gpu('9.0'), 'in eights'),
    ({}, 'float32', gpu('9.0'), 'takes bfloat16 activations, not float32'),
    ({'attention_softcap': 50.0}, 'bfloat16', gpu('9.0'), 'no soft cap'),
    ({}, 'bfloat16', jax.devices('cpu')[0], 'on a GPU, not on cpu'),
  ],
)
def test_refusal_names_the_reason(changes, dtype, device, reason):
  config = dataclasses.replace(variants.GEMMA_2B, **changes)
  got = cudnn.unsupported_reason(config, dtype, device)
  assert got is None if reason is None else reason in got
