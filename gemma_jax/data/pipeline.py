"""Batches for training and evaluation, in the order that the row plan gives."""

from collections.abc import Iterator

import numpy as np

from gemma_jax.data import row_plan as row_plan_lib
from gemma_jax.data.examples import Batch, Examples, make_batch

# A batch is laid out in well under a millisecond: a few in advance are enough
# to hide it behind a step, and more would only hold memory.
_THREADS = 2
_BATCHES_AHEAD = 8


def train_batches(
  examples: Examples,
  plan: row_plan_lib.RowPlan,
  start_step: int = 0,
  stop_step: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[tuple[int, Batch]]:
  """Batches of steps start_step, start_step + 1, ..., read ahead by threads.

  A batch depends on the plan and its step alone, so a run that starts at step
  n sees what an uninterrupted one would.

      global_batch_size 4, process_count 2     plan.rows(s) = [a, b, c, d]
      process 0                                (s, batch of [a, b])
      process 1                                (s, batch of [c, d])

  Args:
    examples: those whose slots the plan was made from.
    plan: rows of each step.
    start_step: first step, the number of finished updates.
    stop_step: one past the last step; None goes on without end.
    process_index: of this host.
    process_count: hosts that share a global batch.

  Yields:
    (step, batch): the arrays of `examples.make_row` with the rows of this host
    in front, [global_batch_size / process_count, T].

  Raises:
    ValueError: process_count does not divide the global batch.
  """
  part = _rows_of_process(plan.global_batch_size, process_index, process_count)
  # Lengths of grain are C long; 2**40 steps take a while.
  stop = 2**40 if stop_step is None else stop_step
  return _read_ahead(
    start_step,
    stop,
    lambda step: (
      step,
      make_batch(examples, plan.rows(step)[part], plan.seq_len),
    ),
  )


def eval_batches(
  examples: Examples,
  seq_len: int,
  batch_size: int,
  packing: bool = True,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[tuple[Batch, np.ndarray]]:
  """Batches that hold every example exactly once, in a fixed order.

      3 documents of 4, 3 and 2 slots, seq_len 7, batch_size 2, unpacked
      batch 0 example_ids    [[0, 0, 0, 0, -1, -1, -1], [1, 1, 1, -1, ...]]
      batch 1 example_ids    [[2, 2, -1, ...], [-1, ...]]     # an empty row

  Args:
    examples: to evaluate on.
    seq_len: T.
    batch_size: B, rows over all hosts; the last batch is filled with empty
      rows, so that all batches have one shape.
    packing: several examples in a row, or each in a row of its own.
    process_index: of this host.
    process_count: hosts that share a batch, each with rows of its own.

  Yields:
    (batch, example_ids): the arrays of `examples.make_row`, [B, T] (B divided
    by the hosts), and int32 [B, T], the example of each slot, -1 at padding:
    `np.add.at(nll, ids[ids >= 0], losses[ids >= 0])` sums losses by example.

  Raises:
    ValueError: process_count does not divide batch_size.
  """
  part = _rows_of_process(batch_size, process_index, process_count)
  rows = row_plan_lib.eval_rows(examples.slots, seq_len, packing)
  rows += [()] * (-len(rows) % batch_size)

  def load(number: int) -> tuple[Batch, np.ndarray]:
    start = number * batch_size
    mine = rows[start : start + batch_size][part]
    batch = make_batch(examples, mine, seq_len)
    ids = [
      np.array([-1, *row], np.int32)[segments]
      for row, segments in zip(mine, batch['segment_ids'], strict=True)
    ]
    return batch, np.stack(ids)

  return _read_ahead(0, len(rows) // batch_size, load)


def _read_ahead(start: int, stop: int, load) -> Iterator:
  """load(start), load(start + 1), ... computed by threads, in order."""
  import grain

  if start >= stop:
    return iter(())
  options = grain.ReadOptions(
    num_threads=_THREADS, prefetch_buffer_size=_BATCHES_AHEAD
  )
  numbers = grain.MapDataset.range(start, stop)
  return iter(numbers.map(load).to_iter_dataset(options))


def _rows_of_process(batch_size: int, index: int, count: int) -> slice:
  """The block of a global batch that a host lays out."""
  if batch_size % count:
    raise ValueError(
      f'data.global_batch_size: got {batch_size}, expected a multiple of the '
      f'{count} processes.'
    )
  size = batch_size // count
  return slice(index * size, (index + 1) * size)
