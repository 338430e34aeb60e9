"""Prompts of any length to the rows of a batch. NumPy only."""

from collections.abc import Sequence

import numpy as np

from gemma_jax.model.config import ModelConfig

PAD_ID = 0

# Prompt tokens that go through the model at a time; this bounds the memory of the
# attention scores, [B, N, PREFILL_TOKENS, S].
PREFILL_TOKENS = 512


def check(
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  config: ModelConfig,
  num_tokens: int | None = None,
):
  """Raises ValueError unless the model can continue all prompts that far.

  Args:
    prompts: token ids.
    max_new_tokens: length of the continuations.
    config: of the model.
    num_tokens: number in its tokenizer; default: the rows of its embedding.
  """
  num_tokens = config.vocab_size if num_tokens is None else num_tokens
  if len(prompts) == 0:
    raise ValueError('prompts: got none, expected at least one.')
  for i, prompt in enumerate(prompts):
    if len(prompt) == 0:
      raise ValueError(f'prompt {i}: got no tokens, expected at least BOS.')
    if len(prompt) + max_new_tokens > config.max_positions:
      raise ValueError(
        f'prompt {i}: got {len(prompt)} tokens and max_new_tokens='
        f'{max_new_tokens}, expected at most {config.max_positions} together, '
        'the positions of the model.'
      )
    if not 0 <= min(prompt) <= max(prompt) < num_tokens:
      raise ValueError(
        f'prompt {i}: got token ids from {min(prompt)} to {max(prompt)}, '
        f"expected ids in [0, {num_tokens}), the model's tokens."
      )


def pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Rows of one length, padded on the left so that all end together.

      prompts      [[2, 10, 11], [2, 12]]
      tokens       [[0, ..., 0, 2, 10, 11], [0, ..., 0, 0, 2, 12]]
      segment_ids  [[0, ..., 0, 1,  1,  1], [0, ..., 0, 0, 1,  1]]

  Returns:
    tokens, segment_ids int32 [B, P]; P is `round_up` of the longest; above
    PREFILL_TOKENS, a multiple of it.
  """
  length = round_up(max(map(len, prompts)))
  if length > PREFILL_TOKENS:
    length = -(-length // PREFILL_TOKENS) * PREFILL_TOKENS
  tokens = np.full((len(prompts), length), PAD_ID, np.int32)
  segment_ids = np.zeros_like(tokens)
  for row, prompt in enumerate(prompts):
    tokens[row, length - len(prompt) :] = prompt
    segment_ids[row, length - len(prompt) :] = 1
  return tokens, segment_ids


def round_up(length: int) -> int:
  """The next of four sizes per octave, so that few programs are compiled.

  16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, ...
  """
  step = max(16, 2 ** (length.bit_length() - 3))
  return -(-length // step) * step
