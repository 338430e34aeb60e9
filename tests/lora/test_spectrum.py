"""Spectra and truncations against the update that they never form."""

import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.lora import spectrum
from tests import toy

CONFIGS = [
  LoraConfig(rank=3, alpha=5.0, targets='all'),
  LoraConfig(rank=3, alpha=5.0, targets='q|v|o', factorization='keras'),
]


def updates(lora):
  """Path → scale B A as matrices [L, inputs, outputs], float64."""
  matrices = {}
  for name, x in pytree.items(toy.deltas(lora.factors, lora.scale)):
    x = np.asarray(x, np.float64)
    path = name.removeprefix('layers/').removesuffix('/w')
    if path == 'attn/o':  # [L, N, H, D]
      x = x.reshape(len(x), -1, x.shape[-1])
    elif x.ndim == 4:  # [L, heads, D, H]
      x = x.transpose(0, 2, 1, 3).reshape(len(x), x.shape[2], -1)
    matrices[path] = x
  return matrices


@pytest.fixture(params=CONFIGS, ids=['matrix', 'keras'])
def adapter(request):
  return toy.lora(lora_config=request.param)


def test_values_are_those_of_the_update(adapter):
  got = spectrum.singular_values(adapter, toy.FULL)
  for path, update in updates(adapter).items():
    want = np.linalg.svd(update, compute_uv=False)
    k = got[path].shape[-1]
    n = min(k, want.shape[-1])
    np.testing.assert_allclose(got[path][:, :n], want[:, :n], atol=1e-5)
    np.testing.assert_allclose(want[:, n:], 0, atol=1e-5)


def test_scanned_and_unrolled_agree():
  config = CONFIGS[0]
  scanned, unrolled = (
    spectrum.singular_values(toy.lora(lora_config=config, scan_layers=scan), toy.FULL)
    for scan in (True, False)
  )
  toy.assert_close(unrolled, scanned, 1e-12)


@pytest.mark.parametrize('rank', [1, 2, 3])
def test_truncation_is_the_best_of_its_rank(adapter, rank):
  """|dW - cut|_F^2 is the sum of the squares that were left out."""
  cut = spectrum.truncate(adapter, toy.FULL, rank)
  assert (cut.scale, cut.config.scale, cut.config.rank) == (1, 1, rank)
  after = updates(cut)
  for path, update in updates(adapter).items():
    values = np.linalg.svd(update, compute_uv=False)
    left_out = (values[:, rank:] ** 2).sum(-1)
    missing = ((update - after[path]) ** 2).sum((-1, -2))
    np.testing.assert_allclose(missing, left_out, atol=1e-4)
    assert np.linalg.matrix_rank(after[path], tol=1e-4).max() == rank


def test_a_truncation_of_dora_is_refused():
  lora = toy.lora(lora_config=LoraConfig(rank=3, targets='qv', dora=True))
  with pytest.raises(ValueError, match='magnitudes fit only their own dW'):
    spectrum.truncate(lora, toy.FULL, 1)


def test_effective_rank():
  rows = np.array([[2.0, 2, 2, 0], [7, 0, 0, 0], [0, 0, 0, 0], [4, 3, 2, 1]])
  ranks = spectrum.effective_rank(rows)
  np.testing.assert_allclose(ranks[:3], [3, 1, 0], atol=1e-12)
  assert 3 < ranks[3] < 4


def test_similarity():
  rng = np.random.default_rng(0)
  u = np.linalg.qr(rng.standard_normal((2, 13, 5)))[0]
  turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
  np.testing.assert_allclose(spectrum.similarity(u[..., :3] @ turn, u[..., :3]), 1)
  np.testing.assert_allclose(spectrum.similarity(u[..., :2], u[..., 2:]), 0, atol=1e-12)
  # One of two directions of the smaller lies in the larger.
  np.testing.assert_allclose(spectrum.similarity(u[..., [0, 4]], u[..., :3]), 0.5)
