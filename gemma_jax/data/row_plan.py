"""Which examples are in which row of which step: a pure function of the seed.

Epoch e has its own order, a permutation drawn from (seed, e). Its examples are
packed into rows, and the rows of epochs 0, 1, 2, ... follow each other without
end. Only then are they cut into global batches:

    slots (5, 3, 2, 4), seq_len 7, 3 rows a batch
    epoch 0      (0, 2) (3, 1)
    epoch 1      (3, 1) (0, 2)
    step 0       (0, 2) (3, 1) (3, 1)
    step 1       (0, 2) and both rows of epoch 2

So a step depends neither on the number of hosts nor on where a run was
resumed; every host computes the same plan from the lengths alone.
"""

import bisect
from collections.abc import Sequence
import functools
import math
import threading

import numpy as np

Row = tuple[int, ...]
Slots = Sequence[int] | np.ndarray  # int [examples], places that each takes

# Examples that are packed together; at 512 positions, some 600 rows of Dolly.
WINDOW = 2048

# Examples of at least this share of a row are placed first, longest first, since
# they are hard to place; the others keep the order drawn, so that they share rows
# with different examples in every epoch.
LONG = 0.25


class RowPlan:
  """Rows of example ids for every step; thread-safe, computed on demand."""

  def __init__(
    self,
    slots: Slots,
    seq_len: int,
    global_batch_size: int,
    seed: int,
    packing: bool = True,
  ):
    """Describes the plan; nothing is computed yet.

    Args:
      slots: slots that each example takes in a row, `Examples.slots`.
      seq_len: slots in a row.
      global_batch_size: rows in a step, over all hosts.
      seed: of the order.
      packing: several examples in a row, or each in a row of its own.

    Raises:
      ValueError: no example, or one that is longer than a row.
    """
    self._slots = np.asarray(slots, np.int64)
    if not len(self._slots):
      raise ValueError('data: got 0 examples, expected at least 1.')
    if self._slots.max() > seq_len:
      raise ValueError(
        f'data.seq_len: got {seq_len}, expected at least {self._slots.max()}, the longest example.'
      )
    self.seq_len = seq_len
    self.global_batch_size = global_batch_size
    self._seed = seed
    self._packing = packing
    self._ends = [0]  # rows before epoch 0, 1, 2, ... as far as known
    self._lock = threading.Lock()
    self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

  def rows(self, step: int) -> list[Row]:
    """The global_batch_size rows that step 0, 1, 2, ... sees."""
    first = step * self.global_batch_size
    with self._lock:
      return [self._row(i) for i in range(first, first + self.global_batch_size)]

  def length(self, rows: Sequence[Row]) -> int:
    """Slots per row in a batch of these rows; see `batch_length`."""
    return self.seq_len if self._packing else batch_length(rows, self._slots, self.seq_len)

  def epoch_rows(self, epoch: int) -> list[Row]:
    """All rows of an epoch, before they are cut into steps."""
    with self._lock:
      return list(self._epoch(epoch))

  def rows_per_epoch(self, epoch: int = 0) -> int:
    """How many rows an epoch has; packed epochs differ by a few."""
    with self._lock:
      self._extend(epoch)
      return self._ends[epoch + 1] - self._ends[epoch]

  def steps_for_epochs(self, epochs: float) -> int:
    """Steps until every example has been seen `epochs` times, at least 1.

    The last step may reach into the next epoch.
    """
    whole = math.floor(epochs)
    part = self.rows_per_epoch(whole) * (epochs - whole)
    return max(1, math.ceil((self._ends[whole] + part) / self.global_batch_size))

  def _row(self, index: int) -> Row:
    """Row `index` of all epochs."""
    while self._ends[-1] <= index:
      self._extend(len(self._ends) - 1)
    epoch = bisect.bisect_right(self._ends, index) - 1
    return self._epoch(epoch)[index - self._ends[epoch]]

  def _extend(self, epoch: int):
    """Makes `_ends` reach to the end of an epoch."""
    while len(self._ends) <= epoch + 1:
      rows = self._epoch(len(self._ends) - 1)
      self._ends.append(self._ends[-1] + len(rows))

  def _plan_epoch(self, epoch: int) -> list[Row]:
    rng = np.random.default_rng([self._seed, epoch])
    order = rng.permutation(len(self._slots))
    if not self._packing:
      return [(int(i),) for i in order]
    rows = []
    for start in range(0, len(order), WINDOW):
      window = sorted(order[start : start + WINDOW].tolist(), key=self._rank)
      packed = pack(window, self._slots, self.seq_len)
      rows += [packed[i] for i in rng.permutation(len(packed))]
    return rows

  def _rank(self, example_id: int) -> int:
    slots = int(self._slots[example_id])
    return -slots if slots >= LONG * self.seq_len else 0


def eval_rows(slots: Slots, seq_len: int, packing: bool = True) -> dict[int, list[Row]]:
  """Rows that hold each example exactly once, by their length; longest first.

  Examples longer than seq_len go into rows of twice, four times, ... that.

      >>> eval_rows((5, 3, 20, 2), seq_len=8)
      {32: [(2,)], 8: [(0, 1), (3,)]}

  Args:
    slots: slots that each example takes.
    seq_len: length of most rows.
    packing: several examples in a row, or each in a row of its own.
  """
  by_length: dict[int, list[int]] = {}
  for i in sorted(range(len(slots)), key=lambda i: -slots[i]):
    doublings = (-(-int(slots[i]) // seq_len) - 1).bit_length()
    by_length.setdefault(seq_len << max(doublings, 0), []).append(i)
  return {
    length: pack(ids, slots, length) if packing else [(i,) for i in ids]
    for length, ids in by_length.items()
  }


def batch_length(rows: Sequence[Row], slots: Slots, seq_len: int) -> int:
  """The shortest of seq_len, its half, quarter and eighth that holds the rows.

  Rows of one example each would otherwise be mostly padding; a few lengths mean
  only a few compiled programs.

      >>> batch_length([(1,), (2,)], (5, 3, 2, 4), seq_len=16)
      4
      >>> batch_length([(0,), (1,)], (5, 3, 2, 4), seq_len=16)
      8
  """
  longest = max((sum(int(slots[i]) for i in row) for row in rows), default=0)
  lengths = (-(-seq_len // parts) for parts in (8, 4, 2, 1))
  return next(length for length in lengths if length >= longest)


def pack(ids: Sequence[int], slots: Slots, seq_len: int) -> list[Row]:
  """Best fit: each example goes to the fullest row that has room for it.

      >>> pack(ids=(3, 1, 0, 2), slots=(5, 3, 2, 4), seq_len=7)
      [(3, 1), (0, 2)]

  Args:
    ids: examples in the order in which they are placed.
    slots: slots that each takes, by id.
    seq_len: slots in a row.

  Returns:
    Rows of ids; every id once.
  """
  rows: list[list[int]] = []
  with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
  # Bit r is set if some row has room for r more: a successor query on an int
  # costs less than a tree at these sizes.
  rooms = 0
  for i in ids:
    need = int(slots[i])
    fitting = rooms >> need
    if fitting:
      room = need + (fitting & -fitting).bit_length() - 1
      row = with_room[room].pop()
      if not with_room[room]:
        rooms ^= 1 << room
      rows[row].append(i)
    else:
      room, row = seq_len, len(rows)
      rows.append([i])
    with_room[room - need].append(row)
    rooms |= 1 << (room - need)
  return [tuple(row) for row in rows]


def fill(rows: Sequence[Row], slots: Slots, seq_len: int) -> float:
  """The share of slots that hold an example."""
  return sum(int(slots[i]) for row in rows for i in row) / (len(rows) * seq_len)
