"""Batches for training and evaluation, in the order that the row plan gives."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gemma_jax.data import row_plan as row_plan_lib
from gemma_jax.data.examples import Batch, Examples, make_batch

# Laying out a batch takes well under a millisecond: a few in advance are enough
# to hide that behind a step, and more would only take memory.
_THREADS = 2
_BATCHES_AHEAD = 8


def train_batches(
  examples: Examples,
  plan: row_plan_lib.RowPlan,
  start_step: int = 0,
  stop_step: int | None = None,
  rows: Sequence[int] | np.ndarray | None = None,
  place: Callable[[Batch], Any] = lambda batch: batch,
) -> Iterator[tuple[int, Any]]:
  """Batches of steps start_step, start_step + 1, ..., read ahead by threads.

  A batch depends only on the plan and its step, so a run that starts at step n
  sees what an uninterrupted one would.

      global_batch_size 4      plan.rows(s) = [a, b, c, d]
      rows (0, 1)              (s, batch of [a, b])
      rows (2, 3)              (s, batch of [c, d])

  Args:
    examples: those whose slots the plan was made from.
    plan: rows of each step.
    start_step: first step, the number of finished updates.
    stop_step: one past the last step; None goes on forever.
    rows: those of the global batch that this process needs; None is all.
    place: called on each batch, in a thread: puts it on the devices, say, while
      they work on another.

  Yields:
    (step, place(batch)), where batch has the arrays of `examples.make_row` with
    a leading axis of rows, [len(rows), T]; T is the plan's seq_len or, if rows
    are padded, `row_plan.batch_length`.
  """
  rows = range(plan.global_batch_size) if rows is None else rows
  # grain stores lengths as C long; 2**40 steps take a while.
  stop = 2**40 if stop_step is None else stop_step

  def load(step: int) -> tuple[int, Any]:
    in_step = plan.rows(step)
    mine = [in_step[i] for i in rows]
    length = plan.length(in_step)  # of all rows: the processes agree on it
    return step, place(make_batch(examples, mine, length))

  return _read_ahead(start_step, stop, load)


def eval_batches(
  examples: Examples, seq_len: int, batch_size: int, packing: bool = True, rows_multiple: int = 1
) -> Iterator[tuple[Batch, np.ndarray]]:
  """Batches that hold every example exactly once, longest first.

  Examples longer than seq_len go into longer rows, fewer at a time
  (`row_plan.eval_rows`).

      3 documents of 4, 3 and 2 slots, seq_len 8, batch_size 2, unpacked
      batch 0 example_ids    [[0, 0, 0, 0], [1, 1, 1, -1]]
      batch 1 example_ids    [[2, 2], [-1, -1]]     # an empty row

  Args:
    examples: to evaluate on.
    seq_len: T.
    batch_size: B; the last batch is filled with empty rows.
    packing: several examples in a row, or each in a row of its own, cut to
      `row_plan.batch_length`.
    rows_multiple: the number of rows in a batch is a multiple of it.

  Yields:
    (batch, example_ids): the arrays of `examples.make_row`, [B, T], and int32
    [B, T], the example of each slot, -1 at padding:
    `np.add.at(nll, ids[ids >= 0], losses[ids >= 0])` sums losses by example.
  """
  plan: list[tuple[int, list[row_plan_lib.Row]]] = []
  rows_by_length = row_plan_lib.eval_rows(examples.slots, seq_len, packing)
  for length, rows in rows_by_length.items():
    size = batch_size * seq_len // length
    size = max(size // rows_multiple, 1) * rows_multiple
    rows += [()] * (-len(rows) % size)
    starts = range(0, len(rows), size)
    plan += [(length, rows[start : start + size]) for start in starts]

  def load(number: int) -> tuple[Batch, np.ndarray]:
    length, in_batch = plan[number]
    if not packing:
      length = row_plan_lib.batch_length(in_batch, examples.slots, length)
    batch = make_batch(examples, in_batch, length)
    ids = [
      np.array([-1, *row], np.int32)[segments]
      for row, segments in zip(in_batch, batch['segment_ids'], strict=True)
    ]
    return batch, np.stack(ids)

  return _read_ahead(0, len(plan), load)


def _read_ahead(start: int, stop: int, load) -> Iterator:
  """Yields load(start), load(start + 1), ..., computed by threads, in order."""
  import grain

  if start >= stop:
    return iter(())
  options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
  numbers = grain.MapDataset.range(start, stop)
  return iter(numbers.map(load).to_iter_dataset(options))
