"""What every contestant shares: its job in, its result out.

    python SCRIPT '{"kind": "train", ...}'

The last line on standard output is the result, JSON. The standard library and
NumPy only: the peers run this in environments of their own.
"""

from collections.abc import Callable, Iterator, Sequence
import json
import resource
import statistics
import sys
import time
from typing import Any

import numpy as np

STARTED = time.perf_counter()
RANK = 4
LEARNING_RATE = 1e-4


def main(train: Callable[[Any], Any], decode: Callable[[Any], Any] | None = None) -> None:
  """Runs the job given on the command line and prints its result."""
  job = json.loads(sys.argv[1])
  result = {'train': train, 'decode': decode}[job['kind']](job)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(json.dumps({**result, 'peak_gib': peak / 2**30}), flush=True)


def read_records(path: str) -> list[tuple[list[int], list[int]]]:
  """(tokens, loss mask) of every record."""
  records = []
  with open(path, encoding='utf-8') as f:
    for line in f:
      record = json.loads(line)
      tokens = record['tokens']
      records.append((tokens, record.get('loss_mask', [1] * len(tokens))))
  return records


def batches(job: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Records in their order, padded to the longest of each batch.

  Yields:
    tokens int32 [B, T], is_real bool [B, T] and loss_mask bool [B, T], whose
    first column is never a target.
  """
  records = read_records(job['records'])
  size = job['batch_size']
  starts = range(0, len(records), size)
  for start in starts[: job['steps'] or None]:
    chosen = records[start : start + size]
    length = max(len(tokens) for tokens, _ in chosen)
    tokens = np.zeros((len(chosen), length), np.int32)
    loss_mask = np.zeros((len(chosen), length), bool)
    is_real = np.zeros((len(chosen), length), bool)
    for row, (ids, mask) in enumerate(chosen):
      tokens[row, : len(ids)] = ids
      loss_mask[row, 1 : len(ids)] = np.array(mask[1:], bool)
      is_real[row, : len(ids)] = True
    yield tokens, is_real, loss_mask


def summarize_training(
  job: Any,
  seconds: Sequence[float],
  tokens: Sequence[int],
  supervised: int,
  losses: Sequence[float],
  first_step_seconds: float,
) -> dict[str, Any]:
  """The result of a training job, from every update's time.

  The first update may compile, so speed is that of the others: of all of them
  together if records differ in length, of the median one otherwise.

  Args:
    job: as given.
    seconds: of each update.
    tokens: real tokens in each update.
    supervised: targets in all updates.
    losses: of each update, nats per target.
    first_step_seconds: from the start of the process to the end of the first.
  """
  later = seconds[1:] or seconds
  result = {
    'updates': len(seconds),
    'tokens': sum(tokens),
    'supervised_tokens': supervised,
    'first_loss': losses[0],
    'last_loss': losses[-1],
    'first_step_seconds': first_step_seconds,
    'step_seconds': statistics.median(later),
  }
  result['tokens_per_second'] = tokens[-1] / result['step_seconds']
  if not job['steps']:
    num_records = len(read_records(job['records']))
    share = len(later) / len(seconds)  # of the records, without the first
    result['records_per_second'] = num_records * share / sum(later)
    result['tokens_per_second'] = sum(tokens[-len(later) :]) / sum(later)
  return result
