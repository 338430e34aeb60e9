"""Decoding: prompts in, new tokens out, with a cache of keys and values.

    sampler = Sampler.of_base(source, tokenizer)
    base = weights.prepare({'params': params})
    sampler.generate(base, prompts, SamplingConfig())

A `Sampler` holds two compiled programs: `prefill` reads the prompts and chooses
each row's first token, `decode` chooses up to a given number more. Weights,
adapter, temperature, top-k, top-p and seed are inputs of both, so changing them
does not recompile; nor does changing a min-p or a repetition penalty that is on.
Changing the number of rows, the padded length of the prompts or the length of the
cache does; lengths are rounded up, so that prompts of similar length share a program.
"""

from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Any, NamedTuple

from absl import logging
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import pytree
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.formats.base_source import BaseSource
from gemma_jax.model.attention import Cache, init_cache
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.transformer import Transformer
from gemma_jax.sampling import prompts as prompts_lib
from gemma_jax.sampling.next_token import SamplingConfig, Settings, choose_tokens

# Tokens per row that one call of `decode` can return, and that it returns while
# the output is streamed.
DECODE_TOKENS = 64
STREAM_TOKENS = 1

# Passes of XLA's CPU compiler that are disabled, only for speed and memory:
# - narrow weights are widened where they are used; moved out of the loops over
#   layers and tokens, that would keep a float32 copy of the whole base;
# - a product with `model.rows` is one loop; its sum must not be split in two or
#   left to a library, nor the computation of its input be repeated for every
#   output (the expander would remove the barrier against that).
_CPU_OPTIONS = {
  'xla_disable_hlo_passes': (
    'while-loop-invariant-code-motion,tree_reduction_rewriter,cse_barrier_expander'
  ),
  'xla_cpu_experimental_ynn_fusion_type': '',
}


class Generation(NamedTuple):
  """The result of `Sampler.generate`.

  Attributes:
    tokens: the new ids of each row, including the stop token if there is one.
    decoded_tokens: how many of them `decode` chose: all but each row's first.
    decode_seconds: the time that took, without compilation and prompts.
  """

  tokens: list[list[int]]
  decoded_tokens: int
  decode_seconds: float

  @property
  def tokens_per_second(self) -> float | None:
    """Of all rows together; None if every row ended with its first token."""
    if not self.decoded_tokens:
      return None
    return self.decoded_tokens / self.decode_seconds


class Sampler:
  """Decodes with one architecture; reuse it, since it keeps its compiled programs."""

  def __init__(
    self,
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    scan_layers: bool = True,
    stop_ids: Sequence[int] | None = None,
  ):
    """Does not compile anything yet.

    Args:
      config: architecture.
      tokenizer: embedding rows beyond its pieces are never chosen; None treats
        every row as a token.
      dtype: of the activations and the cache; default: float32 on a CPU, else
        bfloat16.
      scan_layers: form of the variables.
      stop_ids: a row ends with any of these; default: EOS, and <end_of_turn> if
        the tokenizer has it.
    """
    on_cpu = jax.default_backend() == 'cpu'
    default: jax.typing.DTypeLike = jnp.float32 if on_cpu else jnp.bfloat16
    dtype = default if dtype is None else dtype
    if stop_ids is None:
      end_of_turn = None if tokenizer is None else tokenizer.end_of_turn_id
      stop_ids = [i for i in (Tokenizer.eos_id, end_of_turn) if i is not None]
    self.config = config
    self.num_pieces = config.vocab_size if tokenizer is None else tokenizer.vocab_size
    self.stop_ids = frozenset(stop_ids)
    self.dtype = dtype
    self.model = Transformer(config, dtype, scan_layers, remat='none')
    options = _CPU_OPTIONS if on_cpu else None
    self.prefill = jax.jit(
      self._prefill, static_argnames=('cache_length', 'num_samples'), compiler_options=options
    )
    self.decode = jax.jit(self._decode, donate_argnames='state', compiler_options=options)

  @classmethod
  def of_base(cls, source: BaseSource, tokenizer: Tokenizer | None, **kwargs: Any) -> 'Sampler':
    """A sampler whose rows also end at the stop tokens of the base's folder.

    Args:
      source: the base.
      tokenizer: as in `__init__`.
      **kwargs: the other arguments of `__init__`.

    Raises:
      ValueError: the folder's file is broken.
    """
    made = cls(source.config, tokenizer, **kwargs)
    own = source.read_stop_ids()
    known = {i for i in own if 0 <= i < made.num_pieces}
    if unknown := sorted(set(own) - known):
      logging.warning(
        'Stop tokens %s of %s are not among its %d tokens, and are ignored',
        *(', '.join(map(str, unknown)), source.reference, made.num_pieces),
      )
    made.stop_ids |= known
    return made

  def generate(
    self,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    row_ids: Sequence[int] | None = None,
    num_samples: int = 1,
  ) -> Generation:
    """Continues every prompt.

    Args:
      variables: of `sampling.weights`; those of training work too, but are slower.
      prompts: token ids with BOS, each of any length.
      sampling: how tokens are chosen.
      on_tokens: called with (row, its new ids) as soon as they are decoded; all
        calls together give the result.
      row_ids: integers that tell the draws of the rows apart; default: 0, 1, 2,
        ... A row with the same id draws the same alone and among others.
      num_samples: rows that continue each prompt, next to each other: sample s of
        prompt p is row p * num_samples + s. The prompt is read once.

    Raises:
      ValueError: no prompts, an empty one, one that leaves no room for
        max_new_tokens, or an id beyond the tokens.
      FloatingPointError: the logits are not finite.
    """
    sampling.check()
    prompts_lib.check(prompts, sampling.max_new_tokens, self.config, self.num_pieces)
    if row_ids is None:
      row_ids = range(len(prompts) * num_samples)
    settings = Settings.of(sampling, row_ids)
    rows: list[list[int]] = [[] for _ in row_ids]

    def take(tokens):  # [rows, n]
      for row, new in enumerate(tokens.tolist()):
        new = self._until_stop(rows[row], new)
        rows[row] += new
        if new and on_tokens is not None:
          on_tokens(row, new)

    tokens, segment_ids = prompts_lib.pad(prompts)
    state = self.prefill(
      variables,
      tokens,
      segment_ids,
      settings,
      cache_length=prompts_lib.round_up(tokens.shape[1] + sampling.max_new_tokens),
      num_samples=num_samples,
    )
    _check_finite(state, num_samples, variables)
    take(np.asarray(state.token)[:, None])
    # Asks for no tokens: this only compiles, outside of the time measured.
    state, _, _ = self.decode(variables, state, settings, np.int32(0))
    jax.block_until_ready(state)

    remaining = sampling.max_new_tokens - 1
    at_a_time = DECODE_TOKENS if on_tokens is None else STREAM_TOKENS
    started = time.perf_counter()
    while remaining > 0:
      limit = min(remaining, at_a_time)
      state, tokens, count = self.decode(variables, state, settings, np.int32(limit))
      count = int(count)
      _check_finite(state, num_samples, variables)
      take(np.asarray(tokens)[:, :count])
      remaining = 0 if count < limit else remaining - limit
    return Generation(
      tokens=rows,
      decoded_tokens=sum(map(len, rows)) - len(rows),
      decode_seconds=time.perf_counter() - started,
    )

  def _until_stop(self, before: list[int], new: list[int]) -> list[int]:
    """The new ids up to the first stop id; none if that came before."""
    if before and before[-1] in self.stop_ids:
      return []
    ends = [i for i, token in enumerate(new) if token in self.stop_ids]
    return new[: ends[0] + 1] if ends else new

  def _apply(self, variables: Any, *arguments: Any, **options: Any) -> Any:
    """`Transformer.apply`, whose own type allows for variables that change."""
    return self.model.apply(variables, *arguments, **options)

  def _prefill(self, variables, tokens, segment_ids, settings, cache_length, num_samples=1):
    """Prompts [B, P], padded on the left → `State` with the first tokens."""
    B, P = tokens.shape
    positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    width = min(P, prompts_lib.PREFILL_TOKENS)

    def read(cache, part):
      hidden, cache = self._apply(variables, *part, cache)
      return cache, hidden[:, -1]

    parts = [
      jnp.moveaxis(x.reshape(B, P // width, width), 1, 0) for x in (tokens, segment_ids, positions)
    ]
    cache = init_cache(self.config, B, cache_length, self.dtype)
    cache, hidden = jax.lax.scan(read, cache, parts)  # [P / width, B, D]
    seen = None
    if settings.repetition_penalty is not None:
      seen = jnp.zeros((B, self.config.vocab_size), bool)
      seen = seen.at[jnp.arange(B)[:, None], tokens].max(segment_ids > 0)
    repeat = lambda x, axis: jnp.repeat(x, num_samples, axis)
    cache = dataclasses.replace(
      cache,
      k=repeat(cache.k, 1),
      v=repeat(cache.v, 1),
      positions=repeat(cache.positions, 0),
      segment_ids=repeat(cache.segment_ids, 0),
    )
    return self._choose(
      variables,
      repeat(hidden[-1], 0),
      settings,
      State(
        cache=cache,
        token=jnp.zeros(B * num_samples, jnp.int32),
        position=repeat(positions[:, -1], 0),
        done=jnp.zeros(B * num_samples, bool),
        finite=jnp.ones(B * num_samples, bool),
        step=jnp.int32(0),
        seen=None if seen is None else repeat(seen, 0),
      ),
    )

  def _decode(self, variables, state, settings, limit):
    """Chooses up to `limit` tokens, fewer if all rows end earlier.

    Args:
      variables: as in `generate`.
      state: `State`; donated.
      settings: `Settings`.
      limit: int32 [], at most DECODE_TOKENS.

    Returns:
      The next state; tokens int32 [B, DECODE_TOKENS], PAD after a row's end;
      how many of them were chosen, int32 [].
    """

    def unfinished(loop):
      i, state, _ = loop
      return (i < limit) & ~jnp.all(state.done)

    def one_token(loop):
      i, state, tokens = loop
      hidden, cache = self._apply(
        variables,
        state.token[:, None],
        jnp.ones_like(state.token)[:, None],
        state.position[:, None],
        state.cache,
      )
      state = self._choose(variables, hidden[:, 0], settings, state.replace(cache=cache))
      tokens = jax.lax.dynamic_update_slice(tokens, state.token[:, None], (jnp.int32(0), i))
      return i + 1, state, tokens

    tokens = jnp.full((state.token.shape[0], DECODE_TOKENS), prompts_lib.PAD_ID, jnp.int32)
    count, state, tokens = jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), state, tokens))
    return state, tokens, count

  def _choose(self, variables, hidden, settings, state):
    """The state with its next token, from hidden [B, D]."""
    logits = self._apply(variables, hidden[:, None], method='logits')[:, 0]
    is_piece = jnp.arange(logits.shape[1]) < self.num_pieces
    is_finite = jnp.all(jnp.isfinite(logits) | ~is_piece[None], axis=1)
    finite = state.finite & (is_finite | state.done)
    logits = jnp.where(is_piece[None], logits, -jnp.inf)
    token = choose_tokens(logits, settings, state.step, state.seen)
    token = jnp.where(state.done, prompts_lib.PAD_ID, token)
    seen = state.seen
    if seen is not None:
      seen = seen.at[jnp.arange(seen.shape[0]), token].set(True)
    ends = jnp.zeros_like(state.done)
    for stop_id in self.stop_ids:
      ends |= token == stop_id
    return state.replace(
      token=token,
      position=state.position + 1,
      done=state.done | ends | ~finite,
      finite=finite,
      step=state.step + 1,
      seen=seen,
    )


def _check_finite(state: 'State', num_samples: int, variables: Any):
  """Raises FloatingPointError naming the first prompt with logits that are not finite."""
  bad = np.flatnonzero(~np.asarray(state.finite))
  if bad.size:
    # A base among adapters has an adapter of zeros.
    factors = [x for path, x in pytree.items(variables.get('lora', {})) if path.endswith('lora_b')]
    reason = 'the base itself overflows: its file is damaged, or its weights need float32.'
    if any(np.any(x) for x in factors):
      reason = 'the adapter diverged in training, or belongs to another base.'
    raise FloatingPointError(
      f'prompt {bad[0] // num_samples}: got logits that are NaN or infinite '
      f'within its first {int(state.step)} new tokens, expected finite ones; '
      f'{reason}'
    )


@struct.dataclass
class State:
  """The state of decoding.

  Attributes:
    cache: of all tokens but the last.
    token: int32 [B], the last one chosen; PAD in rows that ended earlier.
    position: int32 [B], its position.
    done: bool [B], whether the row has ended.
    finite: bool [B], whether all logits so far were finite; a row ends when they
      are not.
    step: int32 [], tokens chosen so far.
    seen: bool [B, V], the tokens of the prompt and of the answer so far; None
      without a repetition penalty.
  """

  cache: Cache
  token: jax.Array
  position: jax.Array
  done: jax.Array
  finite: jax.Array
  step: jax.Array
  seen: jax.Array | None
