"""Which token comes next: the rules against NumPy, the draws against odds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.sampling import next_token
from gemma_jax.sampling.next_token import SamplingConfig, Settings

pytestmark = [pytest.mark.usefixtures('strict'), pytest.mark.filterwarnings('error')]

B, V = 3, 101
keep_likely = jax.jit(next_token.keep_likely)
penalize = jax.jit(next_token.penalize)
choose_tokens = jax.jit(next_token.choose_tokens)
draw_indices = jax.jit(jax.vmap(next_token.draw_index, (0, None)))


def random_logits(seed=0, spread=3.0):
  """float32 [B, V], the largest of each row 0."""
  logits = np.random.default_rng(seed).standard_normal((B, V), np.float32)
  logits *= np.float32(spread)
  return logits - logits.max(axis=1, keepdims=True)


def likely(logits, top_k, top_p):
  """Indices to keep of one row, by sorting."""
  order = np.argsort(-logits)[: top_k or None]
  probs = np.exp(logits[order].astype(np.float64))
  probs /= probs.sum()
  before = np.cumsum(probs) - probs
  return set(order[before < top_p].tolist())


def likely_enough(logits, kept, min_p):
  """Of the indices kept, those with a share of the largest probability, in float64."""
  probs = np.exp(logits.astype(np.float64))
  return {i for i in kept if probs[i] >= min_p * probs.max()}


def penalized(logits, tokens, penalty):
  """One row, a token after the other, as transformers defines it."""
  logits = logits.copy()
  for token in set(tokens):
    if logits[token] < 0:
      logits[token] *= np.float32(penalty)
    else:
      logits[token] /= np.float32(penalty)
  return logits


@pytest.mark.parametrize('top_p', [1.0, 0.93, 0.5, 1e-6])
@pytest.mark.parametrize('top_k', [0, 1, 7, V, 1000])
def test_top_k_then_top_p(top_k, top_p):
  logits = random_logits()
  settings = Settings.of(SamplingConfig(top_k=top_k, top_p=top_p), range(B))
  kept = np.asarray(keep_likely(logits, settings))
  for row, before in zip(kept, logits, strict=True):
    expected = likely(before, top_k, top_p)
    assert set(np.flatnonzero(row > -np.inf).tolist()) == expected
    left = sorted(expected)
    np.testing.assert_array_equal(row[left], before[left])


def test_top_k_and_top_p_together_keep_fewer_than_each():
  sizes = [
    len(likely(random_logits()[0], k, p)) for k, p in ((0, 1.0), (7, 1.0), (0, 0.93), (7, 0.5))
  ]
  assert sizes[0] == V
  assert sizes[1] == 7
  assert 1 < sizes[2] < V
  assert 1 < sizes[3] < 7


@pytest.mark.parametrize('min_p', [1e-6, 0.05, 0.3, 1.0])
@pytest.mark.parametrize(('top_k', 'top_p'), [(0, 1.0), (7, 1.0), (0, 0.93), (20, 0.9)])
def test_min_p_among_those_that_are_left(min_p, top_k, top_p):
  logits = random_logits()
  sampling = SamplingConfig(top_k=top_k, top_p=top_p, min_p=min_p)
  kept = np.asarray(keep_likely(logits, Settings.of(sampling, range(B))))
  sizes = set()
  for row, before in zip(kept, logits, strict=True):
    expected = likely_enough(before, likely(before, top_k, top_p), min_p)
    np.testing.assert_array_equal(np.flatnonzero(row > -np.inf), sorted(expected))
    np.testing.assert_array_equal(row[sorted(expected)], before[sorted(expected)])
    sizes.add(len(expected))
  assert sizes == {1} if min_p == 1 else max(sizes) > 1


def test_min_p_follows_the_temperature():
  """A hot draw keeps more: the share is that of the tempered probabilities."""
  logits = np.log(np.array([[0.7, 0.2, 0.1]], np.float32))
  settings = SamplingConfig(temperature=1.0, min_p=0.25)  # 0.2 / 0.7 > 0.25 > 0.1 / 0.7
  for temperature, expected in ((1.0, {0, 1}), (3.0, {0, 1, 2}), (0.1, {0})):
    hot = Settings.of(dataclasses.replace(settings, temperature=temperature), [0])
    draw = jax.jit(jax.vmap(lambda step, hot=hot: next_token.choose_tokens(logits, hot, step)))
    assert set(np.asarray(draw(jnp.arange(499)))[:, 0].tolist()) == expected


@pytest.mark.parametrize('penalty', [0.5, 1.1, 1.3, 7.0])
def test_a_penalty_is_that_of_every_token_seen(penalty):
  rng = np.random.default_rng(5)
  logits = rng.standard_normal((B, V), np.float32) * np.float32(3)
  logits[:, 3] = -np.inf
  logits[:, 4] = 0.0
  tokens = [[3, 4, 5, 5, 9], [], rng.integers(V, size=60).tolist()]
  seen = np.zeros((B, V), bool)
  for row, ids in enumerate(tokens):
    seen[row, ids] = True
  want = np.stack([penalized(*row, penalty) for row in zip(logits, tokens, strict=True)])
  np.testing.assert_array_equal(penalize(logits, seen, np.float32(penalty)), want)
  np.testing.assert_array_equal(want[1], logits[1])
  assert (want[2] != logits[2]).sum() > 30
  # It comes before temperature, greedy or not.
  for sampling in (SamplingConfig(), SamplingConfig(temperature=0.8, top_p=0.9, seed=1)):
    with_penalty = dataclasses.replace(sampling, repetition_penalty=penalty)
    got = choose_tokens(logits, Settings.of(with_penalty, range(B)), np.int32(0), seen)
    plain = choose_tokens(want, Settings.of(sampling, range(B)), np.int32(0))
    np.testing.assert_array_equal(got, plain)


def test_what_is_off_is_not_in_the_program():
  off = Settings.of(SamplingConfig(min_p=0.0, repetition_penalty=1.0), range(B))
  assert off.log_min_p is None and off.repetition_penalty is None
  logits, seen = random_logits(), np.ones((B, V), bool)
  text = lambda settings, *more: choose_tokens.lower(logits, settings, np.int32(0), *more).as_text()
  plain = text(off)
  assert text(off, None) == plain
  for on in (SamplingConfig(min_p=0.1), SamplingConfig(repetition_penalty=1.1)):
    assert len(text(Settings.of(on, range(B)), seen)) > len(plain)


def test_equal_logits_stay_together():
  logits = np.full((B, V), -9.0, np.float32)
  logits[:, [5, 17, 43]] = 0.0
  settings = Settings.of(SamplingConfig(top_k=2), range(B))
  kept = np.asarray(keep_likely(logits, settings))
  np.testing.assert_array_equal(np.flatnonzero(kept[1] > -np.inf), [5, 17, 43])


def test_what_is_excluded_before_stays_excluded():
  logits = random_logits()
  logits[:, 90:] = -np.inf
  settings = Settings.of(SamplingConfig(top_k=0, top_p=0.999), range(B))
  kept = np.asarray(keep_likely(logits, settings))
  assert (kept[:, 90:] == -np.inf).all()
  assert (kept > -np.inf).any(axis=1).all()


def test_draws_follow_the_weights():
  weights = np.random.default_rng(1).random(V, np.float32) ** 4
  weights[[0, 13, 50, V - 1]] = 0.0
  draws = 40_009
  keys = jax.random.split(jax.random.key(2), draws)
  counts = np.bincount(np.asarray(draw_indices(keys, weights)), minlength=V)
  assert counts.size == V
  assert (counts[weights == 0] == 0).all()
  expected = draws * weights / weights.sum()
  # A count's standard deviation is at most the root of its expectation.
  assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1e-9).all()


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 101])
@pytest.mark.parametrize('position', [0, -1])
def test_a_single_weight_is_always_drawn(size, position):
  weights = np.zeros(size, np.float32)
  weights[position] = 1e-30
  keys = jax.random.split(jax.random.key(3), 97)
  drawn = np.asarray(draw_indices(keys, weights))
  np.testing.assert_array_equal(drawn, np.full(97, position % size))


def test_temperature_zero_takes_the_largest_logit():
  logits = random_logits()
  # What the rest says is ignored.
  settings = Settings.of(SamplingConfig(top_k=5, top_p=0.5, seed=3), range(B))
  chosen = choose_tokens(logits, settings, np.int32(0))
  np.testing.assert_array_equal(chosen, logits.argmax(axis=1))


@pytest.mark.parametrize(
  'sampling',
  [
    SamplingConfig(temperature=1.3, top_k=1),
    SamplingConfig(temperature=1.3, top_p=1e-6),
    SamplingConfig(temperature=1e-30),
  ],
  ids=str,
)
def test_what_leaves_one_token_is_greedy(sampling):
  logits = random_logits()
  chosen = choose_tokens(logits, Settings.of(sampling, range(B)), np.int32(0))
  np.testing.assert_array_equal(chosen, logits.argmax(axis=1))


def test_temperature_divides_the_logits():
  logits = random_logits()[:1]
  temperature = 0.7
  steps = 20_011
  settings = Settings.of(SamplingConfig(temperature=temperature), [0])
  draw = jax.jit(jax.vmap(lambda step: next_token.choose_tokens(logits, settings, step)))
  drawn = np.asarray(draw(jnp.arange(steps)))[:, 0]
  counts = np.bincount(drawn, minlength=V)
  odds = np.exp(logits[0].astype(np.float64) / temperature)
  expected = steps * odds / odds.sum()
  assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1).all()


def test_draws_depend_on_seed_row_id_and_step_only():
  logits = np.zeros((B, V), np.float32)

  def chosen(seed=0, row_ids=(0, 1, 2), step=0):
    sampling = SamplingConfig(temperature=1.0, seed=seed)
    settings = Settings.of(sampling, row_ids)
    return np.asarray(choose_tokens(logits, settings, np.int32(step))).tolist()

  a, b, c = chosen()
  assert len({a, b, c}) == 3
  assert chosen(row_ids=(2, 5, 0)) == [c, chosen(row_ids=(5, 5, 5))[0], a]
  assert chosen(seed=1) != [a, b, c]
  assert chosen(step=1) != [a, b, c]


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('max_new_tokens', 0),
    ('temperature', -0.1),
    ('temperature', float('nan')),
    ('temperature', float('inf')),
    ('top_k', -1),
    ('top_p', 0.0),
    ('top_p', 1.01),
    ('min_p', -0.1),
    ('min_p', 1.01),
    ('min_p', float('nan')),
    ('repetition_penalty', 0.0),
    ('repetition_penalty', -1.0),
    ('repetition_penalty', float('inf')),
    ('repetition_penalty', float('nan')),
    ('seed', -1),
    ('seed', 2**32),
  ],
)
def test_bad_values_are_named(field, value):
  with pytest.raises(ValueError, match=f'^{field}: got .*, expected [^\n]*$'):
    SamplingConfig(**{field: value}).check()


@pytest.mark.parametrize(
  'settings',
  [
    (
      SamplingConfig(),
      SamplingConfig(temperature=0.5, top_k=3, seed=7),
      SamplingConfig(temperature=2.0, top_p=0.5, seed=2**32 - 1),
    ),
    (
      SamplingConfig(min_p=0.1, repetition_penalty=1.2),
      SamplingConfig(temperature=0.5, top_k=3, min_p=1.0, repetition_penalty=0.9),
    ),
  ],
  ids=['usual', 'with min-p and a penalty'],
)
def test_settings_compile_once(settings):
  logits, seen = random_logits(), np.zeros((B, V), bool)
  traces = 0

  def counted(*args):
    nonlocal traces
    traces += 1
    return next_token.choose_tokens(*args)

  counted = jax.jit(counted)
  for sampling in settings:
    counted(logits, Settings.of(sampling, range(B)), np.int32(1), seen)
  assert traces == 1
