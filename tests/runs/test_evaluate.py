"""Sums first, one division; and the interval of a paired difference."""

import numpy as np
import pytest

from gemma_jax.runs import evaluate

IDS = np.array([[0, 0, 1, -1, -1], [2, 2, 2, 2, -1]])
WEIGHTS = np.array([[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]], np.float32)
LOSSES = np.array([[0, 3.0, 1, 9, 9], [2, 2, 5, 0, 9]], np.float32)


def test_sums_by_example_and_divides_by_tokens():
  measured = evaluate.evaluate(
    lambda batch: LOSSES * batch['weights'], [({'weights': WEIGHTS}, IDS)], 3
  )
  np.testing.assert_array_equal(measured.nll, [3, 1, 9])
  np.testing.assert_array_equal(measured.tokens, [1, 1, 3])
  assert measured.nll_per_token == 13 / 5  # not the mean of 3, 1 and 3
  line = measured.line()
  assert line['examples'] == 3
  assert line['tokens'] == 5
  np.testing.assert_allclose(line['perplexity'], np.exp(13 / 5))


def test_does_not_depend_on_how_rows_are_batched():
  rows = [({'weights': WEIGHTS[i : i + 1]}, IDS[i : i + 1]) for i in range(2)]
  together = evaluate.evaluate(
    lambda batch: LOSSES * batch['weights'], [({'weights': WEIGHTS}, IDS)], 3
  )
  losses = iter(LOSSES)
  apart = evaluate.evaluate(lambda batch: next(losses)[None] * batch['weights'], rows, 3)
  np.testing.assert_array_equal(together.nll, apart.nll)


def test_evaluations_of_a_quarter_of_the_updates_need_no_remedy():
  line, remedy = evaluate.cost(5.0, 2.0, steps=100, every=20, records=400)
  assert line == (
    'An evaluation takes about 5.0 s; 6 of them take 15 % of the time of 100 updates (200 s)'
  )
  assert remedy == ''
  line, remedy = evaluate.cost(25.0, 2.0, steps=100, every=0, records=400)
  assert '2 of them take 25 %' in line
  assert remedy == ''


@pytest.mark.parametrize(
  ('seconds', 'every', 'records', 'remedy'),
  [
    (40.0, 0, 400, 'data.max_eval_records=250'),
    (20.0, 20, 400, 'data.max_eval_records=166 or eval_every_steps=100'),
    (9.0, 10, 110, 'data.max_eval_records=55 or eval_every_steps=25'),
    (1e9, 10, 400, 'data.max_eval_records=1'),
  ],
)
def test_a_remedy_brings_longer_evaluations_to_a_quarter(seconds, every, records, remedy):
  run = {'update_secs': 2.0, 'steps': 100}
  line, got = evaluate.cost(seconds, every=every, records=records, **run)
  assert line
  assert got == f'{remedy} would take a quarter at most'
  if 'eval_every_steps' in remedy:
    every = int(remedy.rpartition('=')[2])
    assert evaluate.cost(seconds, every=every, records=records, **run)[1] == ''
    # One less would not do.
    assert evaluate.cost(seconds, every=every - 1, records=records, **run)[1] != ''


def test_nothing_supervised_gives_zero():
  measured = evaluate.Evaluation(np.zeros(2), np.zeros(2, np.int64))
  assert measured.nll_per_token == 0


def test_stops_when_asked():
  with pytest.raises(evaluate.Stopped):
    evaluate.evaluate(lambda batch: LOSSES, [({'weights': WEIGHTS}, IDS)], 3, lambda: True)


def test_interval_covers_a_known_difference():
  rng = np.random.default_rng(0)
  tokens = rng.integers(5, 50, 400)
  difference = -0.3 * tokens + rng.normal(0, 2, 400)
  low, high = evaluate.paired_interval(difference, tokens)
  assert low < difference.sum() / tokens.sum() < high
  assert low < -0.3 < high
  assert high - low < 0.05


def test_fewer_than_ten_records_give_no_interval():
  difference, tokens = np.arange(10) - 4.0, np.full(10, 7)
  assert evaluate.paired_interval(difference, tokens) is not None
  assert evaluate.paired_interval(difference[:9], tokens[:9]) is None
  assert evaluate.paired_interval(difference[:1], tokens[:1]) is None


def test_interval_of_no_difference_includes_zero():
  tokens = np.full(30, 7)
  low, high = evaluate.paired_interval(np.tile([-1.0, 1.0], 15), tokens)
  assert low < 0 < high
