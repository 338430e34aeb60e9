"""Prompts as rows: alignment, lengths, and what is refused."""

import numpy as np
import pytest

from gemma_jax.model import variants
from gemma_jax.sampling import prompts


def test_pad_prompts_aligns_the_ends():
  tokens, segment_ids = prompts.pad([[2, 10, 11], [2, 12]])
  np.testing.assert_array_equal(tokens[:, -4:], [[0, 2, 10, 11], [0, 0, 2, 12]])
  np.testing.assert_array_equal(segment_ids[:, -4:], [[0, 1, 1, 1], [0, 0, 1, 1]])
  assert tokens.shape == (2, 16)
  assert tokens.dtype == segment_ids.dtype == np.int32
  assert prompts.pad([[2] * 513])[0].shape == (1, 1024)


def test_round_up_wastes_little_and_has_few_values():
  lengths = np.arange(1, 5000)
  rounded = np.array([prompts.round_up(int(n)) for n in lengths])
  assert (rounded >= lengths).all()
  assert (rounded <= np.maximum(16, lengths * 1.25 + 16)).all()
  assert (np.diff(rounded) >= 0).all()
  assert len(set(rounded.tolist())) < 32


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([], r'prompts: got none'),
    ([[2], []], r'prompt 1: got no tokens, expected at least BOS'),
    ([[2] * 442], r'prompt 0: got 442 tokens .*at most 512 together'),
    ([[2], [2, 263]], r'prompt 1: got token ids from 2 to 263, .*\[0, 263\)'),
    ([[-1]], r'prompt 0: got token ids from -1 to -1'),
  ],
)
def test_bad_prompts_are_named(rows, message):
  with pytest.raises(ValueError, match=message) as error:
    prompts.check(rows, 71, variants.get('tiny3'))
  assert '\n' not in str(error.value)


def test_ids_are_bounded_by_the_tokenizer():
  config = variants.get('tiny3')
  prompts.check([[2, 262]], 7, config)
  with pytest.raises(ValueError, match=r'from 2 to 260, .* ids in \[0, 260\)'):
    prompts.check([[2, 260]], 7, config, num_tokens=260)
