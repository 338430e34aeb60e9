"""Is one adapter better than another, or do the numbers only look like it?

Both are measured on the same records and trained from the same seeds, so what
makes a record hard or a seed lucky cancels in the difference of a pair. Seeds
and records are then drawn with replacement, each on its own (a two-way, or
pigeonhole, bootstrap: Owen 2007, arXiv 0712.1111), since both would be others
the next time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000

# With fewer, the spread over seeds is hardly known: say so beside the interval.
FEW_SEEDS = 5


class Interval(NamedTuple):
  """Of a mean difference, in nats per token.

  Attributes:
    mean: the difference as measured.
    low: end of the 95 % percentile interval.
    high: its other end.
    p: two-sided, that the difference is 0: twice the share of draws beyond 0
      (at least 2 / (draws + 1): a bootstrap knows no smaller one).
  """

  mean: float
  low: float
  high: float
  p: float


def paired(
  first: np.ndarray,
  second: np.ndarray,
  tokens: np.ndarray,
  draws: int = DRAWS,
  seed: int = 0,
) -> Interval:
  """The token-weighted mean of first minus second, and its interval.

      seeds 2, records 3; first - second    [[ 1, 2, -1],
      tokens [10, 20, 10]                    [ 3, 0,  1]]
      mean = (mean over seeds of 2 and 4) / 40 = 0.075

  Args:
    first: nll [S, N] in nats, by seed and record.
    second: nll [S, N], of the same seeds and records.
    tokens: supervised tokens [N].
    draws: of the bootstrap.
    seed: of the draws.
  """
  difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
  S, N = difference.shape
  rng = np.random.default_rng(seed)
  # How often each seed and record was drawn.
  of_seeds = rng.multinomial(S, np.full(S, 1 / S), draws) / S
  of_records = rng.multinomial(N, np.full(N, 1 / N), draws)
  sums = ((of_seeds @ difference) * of_records).sum(1)
  counts = of_records @ tokens
  means = sums / np.maximum(counts, 1)
  low, high = np.quantile(means, [0.025, 0.975])
  beyond = min((means <= 0).sum(), (means >= 0).sum())
  return Interval(
    mean=float(difference.mean(0).sum() / max(tokens.sum(), 1)),
    low=float(low),
    high=float(high),
    p=min(1.0, 2 * (beyond + 1) / (draws + 1)),
  )


def adjust(p_values: Sequence[float]) -> np.ndarray:
  """p-values corrected for being many, under any dependence between them.

  Controls the false discovery rate (Benjamini and Yekutieli 2001): the ranks
  are compared with one best, so the comparisons hang together.
  """
  import scipy.stats

  if not len(p_values):
    return np.zeros(0)
  return scipy.stats.false_discovery_control(list(p_values), method='by')
