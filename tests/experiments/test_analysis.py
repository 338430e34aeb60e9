"""Intervals that hold what they promise, and answers that follow from them."""

import dataclasses

import numpy as np
import pytest

from experiments.analysis import arms, compare, intervals, verdict, words
from tests import made_sweep
from tests.made_sweep import GAIN


def test_mean_is_weighted_by_tokens():
  contrast = np.array([[1.0, 2, -1], [3, 0, 1]])
  estimate = intervals.estimate(contrast, np.array([10, 20, 10]))
  assert estimate.mean == pytest.approx(0.075)  # the docstring's example


def made_contrasts(sims, seeds, records, of_seeds=0.0, of_cells=0.5, tail=0):
  """Contrasts [sims, S, N] with mean 0 a token, and tokens [N].

  A record's spread is 1, of normal or (`tail` degrees) t variables; a seed's
  is `of_seeds` times that of a mean of records.
  """
  rng = np.random.default_rng(seeds * records)
  draw = rng.standard_normal
  if tail:
    draw = lambda size: rng.standard_t(tail, size)
  tokens = np.maximum(np.exp(4 + 0.8 * rng.standard_normal(records)), 1).round()
  noise = (
    of_seeds / np.sqrt(records) * rng.standard_normal((sims, seeds, 1))
    + draw((sims, 1, records))
    + of_cells * draw((sims, seeds, records))
  )
  return noise * tokens, tokens


@pytest.mark.parametrize(('seeds', 'records'), [(3, 30), (5, 50), (5, 380)], ids=str)
@pytest.mark.parametrize('of_seeds', [0.0, 1.0, 4.0])
@pytest.mark.parametrize('tail', [0, 4])
def test_level_and_coverage(seeds, records, of_seeds, tail):
  """At a true mean of exactly 0 a bound lies below it in at most 5 %."""
  sims = 4000 if records < 100 else 1000
  contrasts, tokens = made_contrasts(sims, seeds, records, of_seeds, tail=tail)
  estimates = [intervals.estimate(each, tokens) for each in contrasts]
  deviation = np.sqrt(0.05 * 0.95 / sims)
  below = np.mean([each.upper() < 0 for each in estimates])
  inside = np.mean([np.prod(each.interval) <= 0 for each in estimates])
  assert 0.03 - 2 * deviation <= below <= 0.05 + 2 * deviation
  assert inside >= 0.95 - 2 * deviation
  for each in estimates[:20]:
    low, high = each.interval
    assert (each.p < 0.05) == (not low <= 0 <= high)


def test_small_p_values_of_few_seeds_are_honest():
  """A correction for many rests on levels far below 5 %."""
  contrasts, tokens = made_contrasts(4000, 3, 30, of_seeds=10.0)
  estimates = [intervals.estimate(each, tokens) for each in contrasts]
  beyond = [abs(each.mean) > each.distance(1 - 0.001 / 2) for each in estimates]
  assert np.mean(beyond) <= 0.004


def test_what_is_detectable_is_detected_four_times_in_five():
  contrasts, tokens = made_contrasts(1000, 5, 60, of_seeds=1.0)
  estimates = [intervals.estimate(each, tokens) for each in contrasts]
  size = np.mean([each.detectable() for each in estimates])
  held = [each.upper() - size < 0 for each in estimates]
  assert np.mean(held) == pytest.approx(0.8, abs=0.04)


def test_pairing_removes_what_records_share():
  """Losses that differ wildly between records, and by 0.1 between models."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(10, 90, 120)
  hard = rng.uniform(0, 9, 120)
  noise = lambda: 0.02 * rng.standard_normal((5, 120))
  contrast = (hard + 0.1 + noise()) - (hard + noise())
  estimate = intervals.estimate(contrast * tokens, tokens)
  low, high = estimate.interval
  assert 0.08 < low < 0.1 < high < 0.12
  assert estimate.p < 0.001


def test_no_interval_from_too_little():
  rng = np.random.default_rng(0)
  contrast, tokens = rng.standard_normal((2, 40)), np.full(40, 7)
  few_records = intervals.estimate(contrast[:, :9], tokens[:9])
  assert few_records.interval is None
  assert few_records.p is None
  assert str(few_records).endswith('(no interval: 9 records)')
  for seeds in (1, 2):
    few_seeds = intervals.estimate(contrast[:seeds], tokens)
    assert few_seeds.p is None
    assert str(few_seeds).endswith('] over records at these seeds')
  assert intervals.estimate(contrast[:0], tokens) is None
  assert intervals.estimate(contrast * np.nan, tokens) is None
  # Records without supervised tokens are none.
  tokens[9:] = 0
  assert intervals.estimate(contrast, tokens) == few_records


def test_losses_without_spread():
  tokens = np.full(12, 5)
  same = intervals.estimate(np.zeros((3, 12)), tokens)
  assert same.interval == (0, 0)
  assert same.p == 1
  lower = intervals.estimate(-np.ones((3, 12)), tokens)
  assert lower.upper() == pytest.approx(-0.2)
  assert lower.p < 1e-6


def test_holm():
  """The worked steps: 0.01 x 4, 0.02 x 3, 0.025 x 2 raised to 0.06, 0.5."""
  corrected = intervals.holm([0.02, 0.5, 0.01, 0.025])
  np.testing.assert_allclose(corrected, [0.06, 0.5, 0.04, 0.06])
  assert len(intervals.holm([])) == 0
  np.testing.assert_array_equal(intervals.holm([0.7, 0.9]), [1, 1])


def without(sweep, gone):
  """The sweep without the cells of which `gone` is true."""
  cells = [cell for cell in sweep.trials if not gone(cell)]
  return dataclasses.replace(sweep, trials=cells)


def answer_of(sweep):
  """(the only answer, all that is said)."""
  table = arms.rows(sweep)
  answers = verdict.answers(sweep, table)
  pairs = compare.pairs(sweep, table)
  text = '\n'.join(words.paragraphs(sweep, table, answers, pairs))
  assert 'nan' not in text
  (answer,) = [answer for answer in answers if answer.tests]
  return answer, text


def states(answer):
  return [(test.row.rank, test.state) for test in answer.tests]


# The margin is 0.1 of 0.5.
LEVELS = {1: 0.3, 2: 0.1, 4: 0.02, 8: 0.003, 16: -0.001, 32: 0.0}


def test_enough_is_the_smallest_rank_that_held_before_the_stop():
  answer, text = answer_of(made_sweep.make(LEVELS))
  assert answer.reference == 'rank 32'
  assert answer.gain.mean == pytest.approx(GAIN, abs=0.01)
  assert states(answer) == [
    (16, 'holds'),
    (8, 'holds'),
    (4, 'holds'),
    (2, 'does not hold'),
    (1, 'not reached'),
  ]
  assert answer.enough.label == 'rank 4'
  assert 'Rank 4 is enough' in text
  assert str(answer.enough.deficit) in text
  assert 'Rank 2 was not shown to be enough' in text
  assert 'Not reached, and so undecided: rank 1.' in text
  assert 'A claim needs' not in text


@pytest.mark.parametrize('more', [(), (1,), (2,), (1, 2), (1, 2, 4, 8)])
def test_smaller_ranks_change_nothing_of_larger_ones(more):
  """Two arms or six: the same bounds to the last bit, and the same states."""
  whole, _ = answer_of(made_sweep.make(LEVELS))
  part, _ = answer_of(made_sweep.make({r: LEVELS[r] for r in (*more, 16, 32)}))
  both = {test.label: test for test in whole.tests}
  assert part.gain == whole.gain
  for test in part.tests:
    assert test.excess == both[test.label].excess
    assert test.deficit == both[test.label].deficit
  assert part.tests[0].state == both['rank 16'].state == 'holds'


def test_level_of_the_whole_procedure():
  """Every arm exactly at the margin: few sweeps call any of them enough.

  The same sweeps with two arms and with six.
  """
  sims, limit, large = 300, 0.1 * GAIN, {16: 0.0}
  six = {rank: limit for rank in (1, 2, 3, 4, 8)} | large
  wrong = []
  for draw in range(sims):
    answers = []
    for levels in (six, {8: limit} | large):
      sweep = made_sweep.make(levels, rates=(1e-3,), records=100, draw=draw)
      answers += verdict.answers(sweep, arms.rows(sweep))
    wrong.append(answers[0].enough is not None)
    assert answers[0].tests[0] == answers[1].tests[0]
  assert np.mean(wrong) <= 0.07


def test_beside_other_axes_there_is_no_verdict():
  """One for each of their choices would be wrong somewhere more often than in 5 %."""
  alone, _ = answer_of(made_sweep.make(LEVELS))
  sweep = made_sweep.make(LEVELS | {('all', rank): level - 0.2 for rank, level in LEVELS.items()})
  table = arms.rows(sweep)
  mine, others = verdict.answers(sweep, table)
  assert (mine.reference, others.reference) == ('qv, rank 32', 'all, rank 32')
  assert [test.excess for test in mine.tests] == [test.excess for test in alone.tests]
  for answer in (mine, others):
    assert answer.unsupported_reason.startswith('adapters differ in targets too, and 2')
    assert answer.enough is None
    assert {test.state for test in answer.tests} == {''}


def test_seeds_that_failed_leave_no_verdict():
  """Those that are left are the ones that went well."""
  sweep = made_sweep.make({4: 0.0, 8: 0.0, 16: 0.0})

  def failed(rank):
    cells = [
      dataclasses.replace(cell, result=None, error='a loss is not finite')
      if cell.axes.get('rank') == rank and cell.axes.get('seed') in (3, 4)
      else cell
      for cell in sweep.trials
    ]
    for before, cell in zip(sweep.trials, cells, strict=True):
      vars(cell)['losses'] = before.losses
    return answer_of(dataclasses.replace(sweep, trials=cells))

  answer, text = failed(8)
  assert states(answer) == [(8, 'not comparable'), (4, 'not reached')]
  assert '2 of its seeds failed' in text
  assert 'Seeds failed, and are left out, of: rank 8.' in text
  answer, text = failed(16)
  assert answer.unsupported_reason == '2 of the seeds of the reference, rank 16, failed'
  assert 'is enough' not in text


def test_a_noisy_arm_is_never_enough():
  """Its mean is the best of all, and its bound is far above the margin."""
  levels = {1: 0.0, 2: -0.05, 4: 0.0, 8: 0.0}
  answer, text = answer_of(made_sweep.make(levels, noise={1: 0.02, 2: 5.0, 4: 0.02, 8: 0.02}))
  assert answer.tests[1].excess.upper() > 0
  assert states(answer) == [(4, 'holds'), (2, 'does not hold'), (1, 'not reached')]
  assert answer.enough.label == 'rank 4'
  assert 'even if rank 2 lost nothing' in text


def test_a_larger_deficit_never_turns_an_arm_into_enough():
  held = [
    answer_of(made_sweep.make({4: level, 8: 0.0}))[0].enough is not None
    for level in (-0.1, 0.0, 0.03, 0.045, 0.05, 0.06, 0.2)
  ]
  assert held == sorted(held, reverse=True)
  assert held[0]
  assert not any(held[4:])


def test_undecided_is_an_answer():
  answer, text = answer_of(made_sweep.make({4: 0.2, 8: 0.2, 16: 0.0}))
  assert answer.enough is None
  assert 'Undecided: no smaller rank was shown to be within the margin.' in text
  assert 'is enough' not in text


def test_no_common_seed_is_not_comparable():
  sweep = made_sweep.make({2: 0.0, 4: 0.0, 8: 0.0}, seeds={2: range(5), 4: (7, 8, 9), 8: range(5)})
  answer, text = answer_of(sweep)
  assert states(answer) == [(4, 'not comparable'), (2, 'not reached')]
  assert answer.tests[0].deficit is None
  assert 'Rank 4 cannot be compared: it has no seed in common' in text


def test_two_common_seeds_are_no_verdict():
  sweep = made_sweep.make({4: 0.0, 8: 0.0}, seeds={4: range(3, 8), 8: range(5)})
  answer, text = answer_of(sweep)
  assert states(answer) == [(4, 'not comparable')]
  assert 'cannot be compared: 2 of its seeds can be' in text


@pytest.mark.parametrize(
  ('change', 'why'),
  [
    ({'base': False}, 'has no finished trial'),
    ({'seeds': 2}, '2 of its seeds can be compared'),
    ({'seeds': 1}, '1 of its seeds can be compared'),
    ({'records': 58}, 'the 29 test records count as 23.4 (long ones weigh more), expected'),
    ({'records': 64}, 'the 32 test records count as 26.1'),
    ({'margin': None}, 'fixed no margin'),
    ({'levels': {4: GAIN, 8: GAIN}}, 'rank 8, has learnt nothing'),
  ],
)
def test_verdicts_are_withheld(change, why):
  change = {'levels': {4: 0.0, 8: 0.0}, **change}
  answer, text = answer_of(made_sweep.make(**change))
  assert why in answer.unsupported_reason
  assert f'below rank 8, the reference: {answer.unsupported_reason}.' in text
  assert answer.enough is None
  assert {test.state for test in answer.tests} == {''}
  assert 'is enough' not in text


def test_one_long_record_among_many_is_no_verdict():
  """It has most of the tokens, so that the answer would be about it alone."""
  sweep = made_sweep.make({4: 0.0, 8: 0.0})
  answer, _ = answer_of(sweep)
  assert answer.enough is not None
  tokens = sweep.trials[0].last[1]
  before = tokens[0]
  tokens[0] = 20_000
  for cell in sweep.trials:
    cell.last[0][0] *= 20_000 / before
  answer, text = answer_of(sweep)
  assert answer.unsupported_reason.startswith('the 120 test records count as 1.')
  assert 'is enough' not in text


def test_the_reference_is_the_largest_planned_rank():
  """One that the base cannot have was never planned; one that diverged was."""
  sweep = made_sweep.make({4: 0.0, 8: 0.0, 16: 0.0})
  cells = [
    dataclasses.replace(cell, result=None, error='diverged')
    if cell.axes.get('rank') == 16
    else cell
    for cell in sweep.trials
  ]
  answer, _ = answer_of(dataclasses.replace(sweep, trials=cells))
  assert answer.unsupported_reason == 'the reference, rank 16, has not finished'
  cells = [
    dataclasses.replace(cell, entry={'trainable_parameters': 0})
    if cell.axes.get('rank') == 16
    else cell
    for cell in cells
  ]
  for before, cell in zip(sweep.trials, cells, strict=True):
    vars(cell)['losses'] = before.losses
  answer, text = answer_of(dataclasses.replace(sweep, trials=cells))
  assert answer.reference == 'rank 8'
  assert 'Rank 4 is enough' in text


def test_another_reference_may_be_named():
  """Ranks above it are neither tested nor of any influence."""
  levels = {2: 0.01, 4: 0.0, 8: 0.0, 16: -0.3}
  answer, text = answer_of(made_sweep.make(levels, reference=8))
  assert answer.reference == 'rank 8'
  assert states(answer) == [(4, 'holds'), (2, 'holds')]
  assert 'Rank 2 is enough' in text
  answer, text = answer_of(made_sweep.make(levels, reference=7))
  assert answer.unsupported_reason == 'the reference, rank 7, is not among its ranks'
  assert 'is enough' not in text


def test_an_arm_that_still_trains_is_not_judged():
  sweep = made_sweep.make({4: 0.0, 8: 0.0})
  cells = list(sweep.trials)
  last = next(i for i, c in enumerate(cells) if c.axes.get('rank') == 4)
  cells[last] = dataclasses.replace(cells[last], result=None)
  answer, text = answer_of(dataclasses.replace(sweep, trials=cells))
  assert states(answer) == [(4, 'not comparable')]
  assert 'not all of its trials have ended' in text


def test_caveats_stand_before_numbers():
  sweep = made_sweep.make({4: 0.0, 8: 0.0}, seeds=3, rates=(1e-3, 2e-3))
  _, text = answer_of(sweep)
  for said in (
    'Measured on 120 test records, which count as 99 (long ones weigh more), and 3 seeds per arm.',
    'A claim needs 5 seeds',
    'Rate at the edge of the grid, so a better one may lie beyond: rank 4; rank 8.',
  ):
    assert text.index(said) < text.index('Rank 4 is enough')


def test_caveats_name_the_arms_with_fewer_seeds():
  seeds = {4: range(2), 8: range(5), 16: range(5)}
  _, text = answer_of(made_sweep.make({4: 0.0, 8: 0.0, 16: 0.0}, seeds=seeds))
  assert 'and 2 to 5 seeds per arm.' in text
  assert 'Fewer than 3 seeds (rank 4) give no interval' in text
  assert 'Rank 8 is enough' in text


def test_an_arm_without_a_result_has_its_full_name():
  sweep = made_sweep.make({('qv', 4): 0.0, ('qv', 8): 0.0, ('all', 8): 0.0})
  cells = [
    dataclasses.replace(cell, result=None) if cell.axes.get('targets') == 'all' else cell
    for cell in sweep.trials
  ]
  assert set(arms.labels(dataclasses.replace(sweep, trials=cells)).values()) == {
    'qv, rank 4',
    'qv, rank 8',
    'all, rank 8',
  }


def test_clipped_updates_are_said_by_arm(tmp_path):
  sweep = made_sweep.make({4: 0.0, 8: 0.0})
  sweep.manifest['config']['optimizer']['clip_norm'] = 1.0
  cells = []
  for i, cell in enumerate(sweep.trials):
    folder = tmp_path / str(i)
    folder.mkdir()
    norms = (0.5, 1.5, 2.0, 0.9) if cell.axes.get('rank') == 4 else (0.5, 0.7)
    (folder / 'metrics.jsonl').write_text(
      ''.join(f'{{"step": {j}, "grad_norm": {n}}}\n' for j, n in enumerate(norms))
      + '{"step": 4, "eval_loss_nats_per_token": 2.0}\n'
    )
    cells.append(dataclasses.replace(cell, folder=folder))
    vars(cells[-1])['losses'] = cell.losses
  _, text = answer_of(dataclasses.replace(sweep, trials=cells))
  said = (
    'clipped at a norm of 1, which treats arms differently; share of updates: '
    'rank 4 50 %, rank 8 0 %'
  )
  assert said in text
  sweep.manifest['config']['optimizer']['clip_norm'] = 0.0
  assert 'clipped' not in answer_of(dataclasses.replace(sweep, trials=cells))[1]


def test_pairs_of_other_axes_have_one_correction_and_no_verdict():
  """The budgets 5 and 21 of qv are 1 and 4 of all seven."""
  levels = {('qv', 5): 0.1, ('qv', 21): 0.0, ('all', 1): 0.0, ('all', 4): 0.0}
  sweep = made_sweep.make(levels, draw=3)
  table = arms.rows(sweep)
  pairs = compare.pairs(sweep, table)
  assert [{pair.first.label, pair.second.label} for pair in pairs] == [
    {'all, rank 1', 'qv, rank 5'},
    {'all, rank 4', 'qv, rank 21'},
  ]
  plain = [pair.difference.p for pair in pairs]
  np.testing.assert_array_equal([pair.p for pair in pairs], intervals.holm(plain))
  text = words.paragraphs(sweep, table, [], pairs)[-1]
  assert "After Holm's correction for 2, 1 can be told apart" in text
  assert 'does not show that arms are equal' in text
  assert 'enough' not in text
  few = made_sweep.make(levels, seeds=2)
  assert [pair.p for pair in compare.pairs(few, arms.rows(few))] == [None, None]


def test_small_categories_are_pooled():
  sweep = made_sweep.make({1: 0.5, 2: 0.0})
  names = ['a'] * 100 + ['b'] * 118 + ['c'] * 2 + ['d'] * 12 + ['e'] * 8
  for row, name in zip(sweep.heldout, names, strict=True):
    row['category'] = name
  table = arms.rows(sweep)
  answers = verdict.answers(sweep, table)
  lines = compare.categories(sweep, table, answers)
  assert [(x['category'], x['records'], x['label']) for x in lines] == [
    ('a', 50, 'rank 1'),
    ('a', 50, 'rank 2'),
    ('b', 59, 'rank 1'),
    ('b', 59, 'rank 2'),
    ('other, 3 categories', 11, 'rank 1'),
    ('other, 3 categories', 11, 'rank 2'),
  ]
  assert all((x['deficit'] is None) == (x['label'] == 'rank 2') for x in lines)
  assert all(x['deficit'].interval for x in lines if x['deficit'])
  # A pool that is small itself has a mean alone.
  for row in sweep.heldout[-20:]:
    row['category'] = 'b'
  sweep.heldout[-2]['category'] = 'c'
  lines = compare.categories(sweep, table, answers)
  assert [x['category'] for x in lines[4:]] == ['other, 1 category'] * 2
  assert lines[4]['deficit'].interval is None


def test_bars_are_the_intervals_and_the_hollow_one_is_the_reference():
  # Agg is chosen on import of figures.
  from matplotlib import pyplot as plt

  from experiments.analysis import figures

  for seeds, over in ((5, 'seeds and records'), (1, 'records at these seeds')):
    sweep = made_sweep.make({2: 0.1, 4: 0.0, 8: -0.2}, seeds=seeds)
    table = arms.rows(sweep)
    answers = verdict.answers(sweep, table)
    assert f'interval, over {over}, of' in figures.bars_caption(answers)
    figure = plt.figure()
    figures.draw_losses(figure, figures.THEMES['light'], table, answers, 'rank')
    (axes,) = figure.axes
    (bars,) = axes.containers[0][2]
    low, high = answers[0].tests[0].deficit.interval
    drawn = [bar[:, 1] for bar in bars.get_segments() if len(bar)]
    assert len(drawn) == 2  # ranks 2 and 4
    assert np.ptp(drawn[1]) == pytest.approx(high - low)
    assert axes.lines[-1].get_xydata() == pytest.approx(np.array([[8, table[2].test]]))
    plt.close(figure)


def test_truncation_goes_from_the_smallest_rank_to_the_largest():
  """By number: 16 comes after 2, which it does not as text."""
  sweep = made_sweep.make({1: 0.5, 2: 0.2, 16: 0.0, 32: 0.0})
  for cell in sweep.finished('lora'):
    if cell.axes['learning_rate'] == 2e-3 and cell.axes['rank'] < 32:
      cut = dataclasses.replace(cell, kind='truncated', axes={**cell.axes, 'from_rank': 32})
      vars(cut)['losses'] = cell.losses
      sweep.trials.append(cut)
  lines = compare.truncation(sweep, arms.rows(sweep))
  assert [each['rank'] for each in lines] == [1, 2, 16]
  for each in lines:
    assert each['from_rank'] == 32
    assert each['truncated'] == pytest.approx(each['trained'])


def test_a_rate_at_which_a_seed_failed_is_not_chosen():
  sweep = without(
    made_sweep.make({2: 0.0}),
    lambda c: (c.axes.get('seed'), c.axes.get('learning_rate')) == (4, 2e-3),
  )
  (chosen,) = sweep.chosen().values()
  assert len(chosen) == 5
  assert {cell.axes['learning_rate'] for cell in chosen} != {2e-3}


def test_a_rate_with_a_loss_that_is_not_a_number_is_not_chosen():
  sweep = made_sweep.make({2: 0.0})
  cell = next(c for c in sweep.trials if c.axes.get('learning_rate') == 1e-3)
  cell.last[0][:] = np.nan
  (chosen,) = sweep.chosen().values()
  assert {cell.axes['learning_rate'] for cell in chosen} == {2e-3}
