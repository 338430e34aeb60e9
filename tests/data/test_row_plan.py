import collections
import itertools
import threading

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from gemma_jax.data import row_plan
from tests import data_toy

SEQ_LEN = 23
some_slots = st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=61)


def make_plan(slots, global_batch_size=3, seed=5, packing=True):
  return row_plan.RowPlan(slots, SEQ_LEN, global_batch_size, seed, packing)


@settings(deadline=None)
@given(slots=some_slots, seed=st.integers(0, 97), packing=st.booleans())
def test_an_epoch_holds_every_example_once(slots, seed, packing):
  plan = make_plan(slots, seed=seed, packing=packing)
  for epoch in range(3):
    rows = plan.epoch_rows(epoch)
    assert sorted(itertools.chain(*rows)) == list(range(len(slots)))
    assert all(0 < sum(slots[i] for i in row) <= SEQ_LEN for row in rows)
    assert len(rows) == plan.rows_per_epoch(epoch)
    if not packing:
      assert all(len(row) == 1 for row in rows)


@settings(deadline=None)
@given(slots=some_slots, batch=st.integers(1, 11), steps=st.permutations(range(7)))
def test_steps_cut_the_concatenated_epochs(slots, batch, steps):
  """In whichever order the steps are asked for."""
  plan = make_plan(slots, batch)
  epochs = make_plan(slots, 1)
  endless = itertools.chain.from_iterable(epochs.epoch_rows(e) for e in itertools.count())
  expected = list(itertools.islice(endless, 7 * batch))
  for step in steps:
    assert plan.rows(step) == expected[step * batch : (step + 1) * batch]


def test_a_plan_is_the_same_on_every_machine():
  plan = row_plan.RowPlan([1] * 11, 7, 3, seed=0, packing=False)
  rows = [plan.epoch_rows(epoch) for epoch in range(2)]
  assert [i for (i,) in rows[0]] == [4, 6, 7, 2, 0, 3, 5, 10, 9, 8, 1]
  assert [i for (i,) in rows[1]] == [7, 1, 10, 3, 9, 4, 0, 6, 8, 2, 5]


def test_the_plan_in_the_docstring():
  plan = row_plan.RowPlan([5, 3, 2, 4], 7, 3, seed=4)
  assert plan.epoch_rows(0) == [(0, 2), (3, 1)]
  assert plan.epoch_rows(1) == [(3, 1), (0, 2)]
  assert plan.rows(0) == [(0, 2), (3, 1), (3, 1)]
  assert plan.rows(1) == [(0, 2), *plan.epoch_rows(2)]


def test_orders_differ_by_epoch_and_by_seed():
  slots = np.random.default_rng(0).integers(1, SEQ_LEN, 211)
  plan = make_plan(slots)
  epochs = [plan.epoch_rows(e) for e in range(3)]
  other = make_plan(slots, seed=6).epoch_rows(0)
  for a, b in itertools.combinations([*epochs, other], 2):
    assert a != b
  assert make_plan(slots).epoch_rows(2) == epochs[2]


def test_short_examples_meet_others_in_every_epoch():
  slots = np.random.default_rng(0).integers(1, 6, 211)
  plan = make_plan(slots)
  together = collections.Counter(
    pair
    for epoch in range(5)
    for row in plan.epoch_rows(epoch)
    for pair in itertools.combinations(sorted(row), 2)
  )
  assert sum(n > 2 for n in together.values()) < 0.02 * len(together)


@pytest.mark.parametrize('packing', [True, False])
def test_steps_for_epochs_see_every_example(packing):
  slots = np.random.default_rng(1).integers(1, SEQ_LEN, 101)
  plan = make_plan(slots, 7, packing=packing)
  for epochs in (1, 2, 3):
    steps = plan.steps_for_epochs(epochs)
    rows = [row for step in range(steps) for row in plan.rows(step)]
    seen = collections.Counter(itertools.chain(*rows))
    assert min(seen[i] for i in range(101)) == epochs
    fewer = collections.Counter(itertools.chain(*rows[:-7]))
    assert min(fewer[i] for i in range(101)) < epochs
  half = plan.steps_for_epochs(0.5)
  assert abs(half * 7 - plan.rows_per_epoch(0) / 2) <= 7
  assert plan.steps_for_epochs(1.5) > plan.steps_for_epochs(1)
  assert plan.steps_for_epochs(1e-9) == 1


def test_threads_see_one_plan():
  slots = np.random.default_rng(2).integers(1, SEQ_LEN, 211)
  plan, expected = make_plan(slots), make_plan(slots)
  found = {}

  def read(steps):
    for step in steps:
      found[step] = plan.rows(step)

  orders = [range(0, 200, 2), range(199, 0, -2)]
  threads = [threading.Thread(target=read, args=(o,)) for o in orders]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == {step: expected.rows(step) for step in range(200)}


@settings(deadline=None)
@given(slots=some_slots)
def test_evaluation_rows_hold_every_example_once(slots):
  packed = row_plan.eval_rows(slots, SEQ_LEN)[SEQ_LEN]
  assert sorted(itertools.chain(*packed)) == list(range(len(slots)))
  assert all(sum(slots[i] for i in row) <= SEQ_LEN for row in packed)
  alone = row_plan.eval_rows(slots, SEQ_LEN, packing=False)[SEQ_LEN]
  assert sorted(alone) == [(i,) for i in range(len(slots))]
  lengths = [slots[i] for (i,) in alone]
  assert lengths == sorted(lengths, reverse=True)
  # No two rows fit into one.
  filled = [sum(slots[i] for i in row) for row in packed]
  assert all(a + b > SEQ_LEN for a, b in itertools.combinations(filled, 2))


def test_long_examples_are_evaluated_in_longer_rows():
  """As the docstring shows it; a length is a power of two times seq_len."""
  assert row_plan.eval_rows((5, 3, 20, 2), 8) == {32: [(2,)], 8: [(0, 1), (3,)]}
  lengths = row_plan.eval_rows((1, 8, 9, 16, 17, 32, 33), 8, packing=False)
  assert list(lengths) == [64, 32, 16, 8]
  assert lengths == {8: [(1,), (0,)], 16: [(3,), (2,)], 32: [(5,), (4,)], 64: [(6,)]}


@settings(deadline=None)
@given(slots=some_slots, count=st.integers(1, 5))
def test_padded_batches_have_few_lengths_that_hold_their_rows(slots, count):
  plan = make_plan(slots, count, packing=False)
  packed = make_plan(slots, count)
  for step in range(5):
    rows = plan.rows(step)
    longest = max(slots[i] for (i,) in rows)
    length = plan.length(rows)
    assert longest <= length and length in (3, 6, 12, SEQ_LEN)
    assert length < 2 * longest or length == 3  # no shorter one would do
    assert packed.length(packed.rows(step)) == SEQ_LEN


def test_batch_length_as_documented():
  slots = (5, 3, 2, 4)
  assert row_plan.batch_length([(1,), (2,)], slots, 16) == 4
  assert row_plan.batch_length([(0,), (1,)], slots, 16) == 8
  assert row_plan.batch_length([()], slots, 16) == 2


def test_best_fit_as_documented():
  assert row_plan.pack([3, 1, 0, 2], [5, 3, 2, 4], 7) == [(3, 1), (0, 2)]


@settings(deadline=None)
@given(slots=some_slots)
def test_best_fit_against_a_plain_search(slots):
  """Each example goes to the fullest row that has room, else to a new one."""
  rows, room = [], []
  for i, need in enumerate(slots):
    fitting = [r for r in range(len(rows)) if room[r] >= need]
    tightest = min((room[r] for r in fitting), default=None)
    found = row_plan.pack(range(i + 1), slots, SEQ_LEN)
    (home,) = [r for r, row in enumerate(found) if i in row]
    if tightest is None:
      assert found == [*rows, (i,)]
    else:
      assert room[home] == tightest
    rows = found
    room = [SEQ_LEN - sum(slots[j] for j in row) for row in rows]


def test_bad_plans_are_refused():
  with pytest.raises(ValueError, match='got 0 examples'):
    make_plan([])
  with pytest.raises(ValueError, match=r'data\.seq_len: got 23.*at least 24'):
    make_plan([24, 3])


def test_real_dolly_fills_its_rows():
  """Byte tokens, a quarter of them, stand for the lengths of real tokens."""
  from gemma_jax.data import records, tokenizer
  from gemma_jax.data.examples import make_examples

  path = data_toy.shared_file('dolly-15k/databricks-dolly-15k.jsonl')
  rows = [row for _, row in records.read_jsonl(path)]
  made = make_examples(data_toy.records(rows), tokenizer.ByteTokenizer(), seq_len=2048)
  slots = -(-made.slots // 4)
  plan = row_plan.RowPlan(slots, 512, 4, seed=0)
  for epoch in range(2):
    assert row_plan.fill(plan.epoch_rows(epoch), slots, 512) > 0.97
