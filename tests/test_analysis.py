"""Intervals that hold what they promise, and answers that follow from them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from experiments.analysis import compare, intervals
from gemma_jax.sweep import results

RECORDS = 120


def test_mean_is_weighted_by_tokens():
  first = np.array([[2.0, 5, 0], [6, 3, 2]])
  second = np.array([[1.0, 3, 1], [3, 3, 1]])
  found = intervals.paired(first, second, np.array([10, 20, 10]))
  assert found.mean == pytest.approx(0.075)  # the docstring's example
  assert found.low <= found.mean <= found.high


def test_pairing_removes_what_records_share():
  """Losses that differ wildly between records, and by 0.1 between models."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(10, 90, RECORDS)
  hard = rng.uniform(0, 9, RECORDS) * tokens
  noise = lambda: 0.02 * rng.standard_normal((5, RECORDS)) * tokens
  found = intervals.paired(
    hard + 0.1 * tokens + noise(), hard + noise(), tokens
  )
  assert found.low > 0.08
  assert found.high < 0.12
  assert found.p < 0.001


@pytest.mark.parametrize('of_seeds', [0.0, 0.05])
def test_an_interval_covers_the_truth_as_often_as_it_says(of_seeds):
  """No difference but noise of records and seeds: 0 is inside, mostly."""
  rng = np.random.default_rng(0)
  tokens = np.full(RECORDS, 20)
  inside = 0
  for i in range(200):
    noise = 0.3 * rng.standard_normal((8, RECORDS))
    noise += of_seeds * rng.standard_normal((8, 1))
    found = intervals.paired(
      noise * tokens, np.zeros_like(noise), tokens, draws=400, seed=i
    )
    inside += found.low <= 0 <= found.high
  assert inside >= 178  # 95 % of 200, less three deviations and 8 seeds' bias


def test_correction_grows_with_the_number_of_comparisons():
  alone = intervals.adjust([0.01])
  many = intervals.adjust([0.01, 0.6, 0.7, 0.8])
  assert alone[0] == pytest.approx(0.01)
  assert many[0] == pytest.approx(0.01 * 4 * (1 + 1 / 2 + 1 / 3 + 1 / 4))
  assert len(intervals.adjust([])) == 0


def outcome(rank, seed, rate, nll, tokens):
  axes = {
    'rank': rank, 'seed': seed, 'learning_rate': rate, 'targets': 'qv',
    'scale_rule': 'constant', 'rate_rule': 'constant', 'init': 'peft',
    'factorization': 'matrix',
  }  # fmt: skip
  cell = results.Outcome(
    name=f'r{rank}-s{seed}-lr{rate:g}', kind='lora', axes=axes,
    folder=Path('nowhere'), entry={'trainable_parameters': 100 * rank},
    result={'seconds': 1.0}, error=None,
  )  # fmt: skip
  vars(cell)['losses'] = {9: (nll, tokens)}
  return cell


def made_sweep(levels, seeds=5, rates=(1e-3, 2e-3)):
  """A sweep whose rank r has the loss levels[r], worse at the first rate."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(10, 90, RECORDS)
  hard = rng.uniform(1, 9, RECORDS)
  cells = []
  for rank, level in levels.items():
    for rate in rates:
      for seed in range(seeds):
        noise = 0.02 * rng.standard_normal(RECORDS)
        loss = hard + level + noise + 0.5 * (rate == rates[0])
        cells.append(outcome(rank, seed, rate, loss * tokens, tokens))
  heldout = [
    {'part': ('test', 'validation')[i % 2], 'category': ('a', 'b')[i // 60]}
    for i in range(RECORDS)
  ]
  return results.Sweep(Path('nowhere'), {}, cells, heldout)


def test_the_smallest_rank_that_is_not_worse():
  sweep = made_sweep({1: 0.5, 2: 0.2, 4: 0.0, 8: 0.0, 16: -0.003})
  table = compare.rows(sweep)
  assert [row.arm['rank'] for row in table] == [1, 2, 4, 8, 16]
  assert {row.rate for row in table} == {2e-3}
  assert [row.is_worse for row in table[:2]] == [True, True]
  assert compare.enough(table).arm['rank'] == 4
  text = compare.answer(sweep, table)
  assert text.startswith('Rank 4 is enough')
  low, high = table[2].difference[1:3]
  assert f'[{low:+.4f}, {high:+.4f}]' in text
  assert 'Distinguishably worse than the best: rank 1, rank 2.' in text
  assert 'fewer than' not in text


def test_truncation_goes_from_the_smallest_rank_to_the_largest():
  """By number: 16 comes after 2, which it does not as text."""
  levels = {1: 0.5, 2: 0.2, 16: 0.0, 32: 0.0}
  sweep = made_sweep(levels)
  for cell in sweep.finished('lora'):
    if cell.axes['learning_rate'] == 2e-3 and cell.axes['rank'] < 32:
      cut = dataclasses.replace(
        cell, kind='truncated', axes={**cell.axes, 'from_rank': 32}
      )
      vars(cut)['losses'] = cell.losses
      sweep.cells.append(cut)
  found = compare.truncation(sweep, compare.rows(sweep))
  assert [each['rank'] for each in found] == [1, 2, 16]
  for each in found:
    assert each['from_rank'] == 32
    assert each['truncated'] == pytest.approx(each['trained'])


def test_few_seeds_are_said():
  sweep = made_sweep({1: 0.0, 2: 0.0}, seeds=3)
  assert 'fewer than 5 seeds' in compare.answer(sweep, compare.rows(sweep))


def test_ranks_that_do_not_part_are_said():
  sweep = made_sweep({1: 0.0, 2: 0.0, 4: 0.0})
  assert 'No arm parts' in compare.answer(sweep, compare.rows(sweep))


def test_the_largest_rank_may_be_the_only_good_one():
  sweep = made_sweep({1: 0.4, 2: 0.2, 4: 0.0})
  text = compare.answer(sweep, compare.rows(sweep))
  assert 'every smaller one is distinguishably worse' in text


def test_categories_are_corrected_together():
  sweep = made_sweep({1: 0.5, 2: 0.0})
  found = compare.categories(sweep, compare.rows(sweep))
  assert [(f['category'], f['label']) for f in found] == [
    ('a', 'rank 1'), ('a', 'rank 2'), ('b', 'rank 1'), ('b', 'rank 2'),
  ]  # fmt: skip
  for each in found:
    assert each['records'] == 30
    worse = each['label'] == 'rank 1'
    assert (each['p_adjusted'] < 0.05) == worse
    assert (each['difference'].mean > 0.4) == worse


def test_a_rate_at_which_a_seed_failed_is_not_chosen():
  sweep = made_sweep({2: 0.0})
  cells = [c for c in sweep.cells if c.name != 'r2-s4-lr0.002']
  sweep = results.Sweep(sweep.folder, {}, cells, sweep.heldout)
  (chosen,) = sweep.chosen().values()
  assert len(chosen) == 5
  assert {cell.axes['learning_rate'] for cell in chosen} == {1e-3}
