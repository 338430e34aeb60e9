"""The real Gemma 3 270M against transformers, both in float32."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.formats import open_base
from gemma_jax.model.transformer import Transformer
from gemma_jax.training import losses
from tests import toy

pytestmark = pytest.mark.real

GOLDEN = Path(__file__).parents[1] / 'golden' / 'oracle_gemma3_270m.json'
PROMPTS = json.loads(GOLDEN.read_text('utf-8'))['prompts']


@pytest.fixture(scope='module')
def computed():
  """(last logits [B, V], token log-likelihoods [B, T]) of all prompts.

  Right-padded rows of one batch. Logits are made for the last position of a
  prompt only, log-likelihoods in chunks: [B, T, V] would be 225 MB.
  """
  base = open_base.open_base(open_base.REAL_270M)
  model = Transformer(base.config, remat='none')
  params = base.load_params('float32')
  lengths = np.array([len(p['ids']) for p in PROMPTS])
  tokens = np.zeros((len(PROMPTS), lengths.max()), np.int32)
  for row, prompt in zip(tokens, PROMPTS, strict=True):
    row[: len(prompt['ids'])] = prompt['ids']
  is_real = np.arange(tokens.shape[1]) < lengths[:, None]

  @jax.jit
  def run(params, tokens, segment_ids):
    hidden = model.apply({'params': params}, tokens, segment_ids)
    last = hidden[jnp.arange(len(lengths)), lengths - 1][:, None]
    logits = model.apply({'params': params}, last, method='logits')
    token_losses = losses.token_cross_entropy(
      hidden[:, :-1],
      params['embedder']['input_embedding'],
      tokens[:, 1:],
      segment_ids[:, 1:].astype(jnp.float32),
    )
    return logits[:, 0], -token_losses

  out = run(params, jnp.asarray(tokens), jnp.asarray(is_real, jnp.int32))
  return jax.device_get(out)


@pytest.mark.parametrize('i', range(len(PROMPTS)))
def test_the_five_likeliest_next_tokens(computed, i):
  logits = computed[0][i]
  best = np.argsort(-logits)[:5]
  assert best.tolist() == PROMPTS[i]['top5_ids']
  toy.assert_close(logits[best], np.array(PROMPTS[i]['top5_logits']), 2e-3)
  logsumexp = np.logaddexp.reduce(logits.astype(np.float64))
  toy.assert_close(logsumexp, PROMPTS[i]['logsumexp_last'], 2e-3)


@pytest.mark.parametrize('i', range(len(PROMPTS)))
def test_log_likelihoods(computed, i):
  count = len(PROMPTS[i]['ids']) - 1
  got = computed[1][i, :count].astype(np.float64)
  toy.assert_close(got, np.array(PROMPTS[i]['token_loglik']), 1e-4)
  mean = PROMPTS[i]['mean_token_loglik']
  np.testing.assert_allclose(got.mean(), mean, atol=1e-4, rtol=0)
