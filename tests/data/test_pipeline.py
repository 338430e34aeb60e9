import itertools

import numpy as np
import pytest

from gemma_jax.data import pipeline
from gemma_jax.data.examples import make_batch, make_examples
from gemma_jax.data.row_plan import RowPlan
from tests import data_toy

SEQ_LEN = 23
RNG = np.random.default_rng(0)
EXAMPLES = make_examples(
  data_toy.records(
    {
      'tokens': [2, *RNG.integers(4, 997, n - 1).tolist()],
      'loss_mask': [0, *RNG.integers(0, 2, n - 2).tolist(), 1],
    }
    for n in RNG.integers(2, SEQ_LEN, 103)
  ),
  None,
)


def make_plan(global_batch_size=6, packing=True):
  return RowPlan(EXAMPLES.slots, SEQ_LEN, global_batch_size, 7, packing)


def train(start_step=0, count=29, **kwargs):
  batches = pipeline.train_batches(EXAMPLES, make_plan(), start_step=start_step, **kwargs)
  return list(itertools.islice(batches, count))


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize('packing', [True, False])
def test_batches_are_the_rows_of_the_plan(packing):
  plan = make_plan(packing=packing)
  batches = pipeline.train_batches(EXAMPLES, plan, stop_step=41)
  steps = []
  for step, batch in batches:
    steps.append(step)
    rows = plan.rows(step)
    assert_equal(batch, make_batch(EXAMPLES, rows, plan.length(rows)))
  assert steps == list(range(41))
  # The last steps are of a later epoch.
  assert plan.rows_per_epoch(0) < 41 * 6


@pytest.mark.parametrize('start_step', [1, 13, 28])
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(start_step):
  whole = train()
  resumed = train(start_step, 29 - start_step)
  for (step, batch), (again, same) in zip(whole[start_step:], resumed, strict=True):
    assert step == again
    assert_equal(batch, same)


@pytest.mark.parametrize('rows', [(0, 1, 2), (3, 4, 5), (1, 4), (5,)])
def test_a_host_gets_its_rows_of_the_global_batch(rows):
  for (step, batch), (part_step, part) in zip(train(5, 7), train(5, 7, rows=rows), strict=True):
    assert part_step == step
    assert_equal(part, {name: x[list(rows)] for name, x in batch.items()})


def test_nothing_is_left_of_a_finished_run():
  assert train(start_step=4, stop_step=4) == []
  assert [step for step, _ in train(start_step=2, stop_step=4)] == [2, 3]


@pytest.mark.parametrize('packing', [True, False])
def test_evaluation_sees_every_example_once(packing):
  """Sums over slots by example are the examples' own sums."""
  slots, weights, tokens = np.zeros((3, len(EXAMPLES)))
  shapes = set()
  for batch, ids in pipeline.eval_batches(EXAMPLES, SEQ_LEN, 10, packing):
    real = ids >= 0
    np.testing.assert_array_equal(real, batch['segment_ids'] > 0)
    np.add.at(slots, ids[real], 1)
    np.add.at(weights, ids[real], batch['weights'][real])
    np.add.at(tokens, ids[real], batch['targets'][real])
    shapes |= {array.shape for array in (*batch.values(), ids)}
  if packing:
    assert shapes == {(10, SEQ_LEN)}
  else:
    assert {shape[0] for shape in shapes} == {10}
    assert (10, SEQ_LEN) in shapes and 1 < len(shapes) <= 4
  np.testing.assert_array_equal(slots, EXAMPLES.slots)
  np.testing.assert_array_equal(weights, [e.loss_mask.sum() for e in EXAMPLES])
  np.testing.assert_array_equal(tokens, [e.tokens[1:].sum() for e in EXAMPLES])


def test_the_last_evaluation_batch_is_filled_with_empty_rows():
  """As the docstring shows it."""
  made = make_examples(data_toy.records({'tokens': list(range(2, 2 + n))} for n in (5, 4, 3)), None)
  found = list(pipeline.eval_batches(made, 8, 2, packing=False))
  assert [ids.tolist() for _, ids in found] == [[[0, 0, 0, 0], [1, 1, 1, -1]], [[2, 2], [-1, -1]]]
  assert not any(array[1].any() for array in found[1][0].values())


def test_evaluation_is_repeatable():
  first, second = (list(pipeline.eval_batches(EXAMPLES, SEQ_LEN, 4)) for _ in range(2))
  for (batch, ids), (same, same_ids) in zip(first, second, strict=True):
    assert_equal(batch, same)
    np.testing.assert_array_equal(ids, same_ids)
