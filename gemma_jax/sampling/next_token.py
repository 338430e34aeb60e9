"""Which token comes next, given the logits: penalty, temperature, top-k, top-p, min-p.

The settings are traced inputs (`Settings`), so changing them costs no compilation.
A penalty and min-p that are off are not in the program at all.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How tokens are chosen.

  Attributes:
    max_new_tokens: longest continuation, the stop token included.
    temperature: divides the logits; 0 is greedy and ignores top_k, top_p and min_p.
    top_k: choose among the k most likely tokens; 0 is all.
    top_p: choose among the most likely tokens whose probabilities, after top_k,
      together reach p (Holtzman et al. 2019, 1904.09751); 1 is all.
    min_p: choose, among these, those with at least this share of the most likely
      one's probability (Nguyen et al. 2024, 2407.01082); 0 is all.
    repetition_penalty: divides the positive logits of tokens that the prompt or
      the answer has already, and multiplies the negative ones (Keskar et al. 2019,
      1909.05858, in the form of transformers); 1 is none.
    seed: of the draws.
  """

  max_new_tokens: int = 128
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  seed: int = 0

  def check(self):
    """ValueError on a value that makes no sense."""
    for name, ok, expected in (
      ('max_new_tokens', self.max_new_tokens >= 1, 'an integer >= 1'),
      ('temperature', 0 <= self.temperature < np.inf, 'a number >= 0'),
      ('top_k', self.top_k >= 0, 'an integer >= 0 (0 is all tokens)'),
      ('top_p', 0 < self.top_p <= 1, 'a number in (0, 1]'),
      ('min_p', 0 <= self.min_p <= 1, 'a number in [0, 1] (0 is all tokens)'),
      (
        'repetition_penalty',
        0.01 <= self.repetition_penalty <= 100,
        'a number in [0.01, 100] (1 is none)',
      ),
      ('seed', 0 <= self.seed < 2**32, 'an integer in [0, 2^32)'),
    ):
      if not ok:
        raise ValueError(f'{name}: got {getattr(self, name)}, expected {expected}.')


class Settings(NamedTuple):
  """A `SamplingConfig` as inputs of a program.

  Attributes:
    temperature: float32 [].
    top_k: float32 [], infinite for all tokens.
    top_p: float32 [], infinite for all tokens.
    log_min_p: float32 []; None for all tokens.
    repetition_penalty: float32 []; None without one.
    seed: uint32 [].
    row_ids: int32 [B], which tell the rows' draws apart.
  """

  temperature: jax.Array | np.float32
  top_k: jax.Array | np.float32
  top_p: jax.Array | np.float32
  log_min_p: jax.Array | np.float32 | None
  repetition_penalty: jax.Array | np.float32 | None
  seed: jax.Array | np.uint32
  row_ids: jax.Array | np.ndarray

  @classmethod
  def of(cls, sampling: SamplingConfig, row_ids: Sequence[int]) -> 'Settings':
    """NumPy arrays."""
    penalty = sampling.repetition_penalty
    return cls(
      temperature=np.float32(sampling.temperature),
      top_k=np.float32(sampling.top_k or np.inf),
      top_p=np.float32(sampling.top_p if sampling.top_p < 1 else np.inf),
      log_min_p=np.float32(np.log(sampling.min_p)) if sampling.min_p else None,
      repetition_penalty=None if penalty == 1 else np.float32(penalty),
      seed=np.uint32(sampling.seed),
      row_ids=np.array(row_ids, np.int32),
    )


def choose_tokens(
  logits: jax.Array, settings: Settings, step: jax.Array, seen: jax.Array | None = None
) -> jax.Array:
  """Draws a token for every row.

  A row draws with the key (seed, row id, step): neither the other rows nor the
  number of tokens decoded at a time changes its text.

  Args:
    logits: float32 [B, V]; -inf is never drawn.
    settings: how to choose.
    step: int32 [], number of tokens chosen so far.
    seen: bool [B, V], the tokens that a repetition penalty is for.

  Returns:
    int32 [B].
  """
  if settings.repetition_penalty is not None:
    assert seen is not None  # whoever sets a penalty keeps them
    logits = penalize(logits, seen, settings.repetition_penalty)

  def greedy(logits):
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def draw(logits):
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = keep_likely(logits / settings.temperature, settings)
    key = jax.random.key(settings.seed)

    def draw_row(row_id, weights):
      row_key = jax.random.fold_in(key, row_id)
      return draw_index(jax.random.fold_in(row_key, step), weights)

    return jax.vmap(draw_row)(settings.row_ids, jnp.exp(logits))

  return jax.lax.cond(settings.temperature > 0, draw, greedy, logits)


def draw_index(key: jax.Array, weights: jax.Array) -> jax.Array:
  """Draws an index with probability proportional to its weight.

  First a block of sqrt(V) indices by its sum, then an index in it, each where
  the cumulative sum passes a uniform number: two numbers are drawn, not V, and
  the cumulative sums are short. An index of weight 0 is never drawn.

  Args:
    key: PRNG key.
    weights: float32 [V], not negative, not all 0.

  Returns:
    int32 [].
  """
  width = math.isqrt(weights.shape[0] - 1) + 1
  blocks = jnp.pad(weights, (0, -weights.shape[0] % width))
  blocks = blocks.reshape(-1, width)

  def one(key, weights):
    # Rounding may move a sum even if the weight is 0: 0 passes nothing.
    # uniform() < 1, so the largest sum always passes.
    total = jnp.where(weights > 0, jnp.cumsum(weights), 0.0)
    passed = total > jax.random.uniform(key) * jnp.max(total)
    return jnp.argmax(passed).astype(jnp.int32)

  block_key, index_key = jax.random.split(key)
  block = one(block_key, jnp.sum(blocks, axis=1))
  return block * width + one(index_key, blocks[block])


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.typing.ArrayLike) -> jax.Array:
  """Logits in which the tokens seen are less likely, if the penalty is above 1.

  Args:
    logits: float32 [B, V].
    seen: bool [B, V].
    penalty: float32 [].
  """
  penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
  return jnp.where(seen, penalized, logits)


def keep_likely(logits: jax.Array, settings: Settings) -> jax.Array:
  """Logits with -inf for tokens that top-k, then top-p, then min-p leaves out.

  The first two are one rule, with weights 1 or probabilities: a token stays if the
  tokens above it weigh less than the limit. Tokens of equal logits stay or go together.

  Args:
    logits: float32 [B, V], the largest of each row 0.
    settings: top_k, top_p and log_min_p.
  """
  logits = _keep(logits, jnp.ones_like(logits), settings.top_k)
  logits = _keep(logits, jax.nn.softmax(logits, axis=-1), settings.top_p)
  if settings.log_min_p is None:
    return logits
  return jnp.where(logits >= settings.log_min_p, logits, -jnp.inf)


def _keep(logits, weights, limit):
  """-inf where tokens of larger logits together weigh `limit` or more.

  Determines each row's smallest logit to keep without sorting the vocabulary. The
  bits of -logit >= 0, read as an integer, have the same order as the numbers, so
  the cut is determined bit by bit: the largest integer such that the tokens below
  it weigh less than the limit.
  """
  depth = jax.lax.bitcast_convert_type(jnp.abs(logits), jnp.int32)
  bits = 31  # the sign is 0

  def try_bit(i, cut):
    trial = cut | (1 << (bits - 1 - i))
    above = jnp.where(depth < trial[:, None], weights, 0.0)
    return jnp.where(jnp.sum(above, axis=1) < limit, trial, cut)

  is_all = limit == jnp.inf  # then no bit needs trying
  first = jnp.where(is_all, jnp.int32(2**bits - 1), jnp.int32(0))
  cut = jax.lax.fori_loop(
    jnp.int32(0),
    jnp.where(is_all, jnp.int32(0), jnp.int32(bits)),
    try_bit,
    jnp.full(logits.shape[0], first),
  )
  return jnp.where(depth <= cut[:, None], logits, -jnp.inf)
