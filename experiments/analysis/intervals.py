"""How sure is a mean difference of losses, over seeds and over records?

Both models are measured on the same records and trained from the same seeds, so
what makes a record hard or a seed lucky cancels in the difference of a pair.
Seeds and records would both be others the next time, so both count as drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from gemma_jax.evaluate import FEWEST_RECORDS

# With two seeds, their spread is one number: t has one degree of freedom.
FEWEST_SEEDS = 3

# What a claim asks for. With three or four seeds the caveat is said.
FEW_SEEDS = 5

BOTH = 'seeds and records'
RECORDS = 'records at these seeds'
NOTHING = 'nothing'


class Estimate(NamedTuple):
  """A mean in nats per token, with what is known of its error.

  Attributes:
    mean: as measured.
    error: standard error; nan where `over` is NOTHING.
    freedom: degrees of freedom of that error.
    over: what the error counts as drawn: BOTH; RECORDS where there are fewer
      than 3 seeds; NOTHING where there are fewer than 10 records.
    seeds: S.
    records: N, those with supervised tokens.
  """

  mean: float
  error: float
  freedom: float
  over: str
  seeds: int
  records: int

  def upper(self, level: float = 0.95) -> float:
    """The one-sided upper bound; that of 1 - level is the lower bound."""
    return self.mean + float(stats.t.ppf(level, self.freedom)) * self.error

  @property
  def interval(self) -> tuple[float, float] | None:
    """Two-sided, 95 %."""
    if self.over == NOTHING:
      return None
    return self.upper(0.025), self.upper(0.975)

  @property
  def p(self) -> float | None:
    """Two-sided, that the mean is 0; None unless it counts seeds as drawn."""
    if self.over != BOTH:
      return None
    if not self.error:
      return float(self.mean == 0)
    return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))

  def detectable(self, power: float = 0.8) -> float:
    """What a one-sided test at 5 % would see with this power.

    The textbook's (z_0.95 + z_0.80) * error, with the quantiles of t.
    """
    quantiles = stats.t.ppf([0.95, power], self.freedom)
    return float(quantiles.sum() * self.error)

  def __str__(self) -> str:
    if self.interval is None:
      plural = '' if self.records == 1 else 's'
      return f'{self.mean:+.4f} (no interval: {self.records} record{plural})'
    low, high = self.interval
    over = '' if self.over == BOTH else f' over {self.over}'
    return f'{self.mean:+.4f} [{low:+.4f}, {high:+.4f}]{over}'


def estimate(contrast: np.ndarray, tokens: np.ndarray) -> Estimate | None:
  """The token-weighted mean of a contrast, and its error.

      seeds 2, records 3; contrast    [[ 1, 2, -1],
      tokens [10, 20, 10]              [ 3, 0,  1]]
      mean = (mean over seeds of 2 and 4) / 40 = 0.075

  The variance is the sum of two parts: that of the seeds' means over S, and
  that of the records' over N (a ratio of sums: Cochran 1977, chapter 6, with
  Kish's effective number of records for N - 1, as long records weigh more).
  What a record does at one seed is in both parts, so the sum errs upwards. Its
  degrees of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946).

  Why no bootstrap: one that draws seeds and records (Owen 2007, arXiv
  0712.1111) has (S - 1) / S of the seeds' part and no t, so that with three
  seeds its one-sided 5 % are in truth 9 to 11 % where seeds decide, with five
  6 to 7 %. Those of this estimate are 4 to 7 % with normal and t_4 records
  (`tests/test_analysis.py`). Neither holds where few records have most of a
  loss: with exponential ones, 11 to 13 % of 30 to 50 records and 7 to 8 % of
  380, by either method.

  Args:
    contrast: [S, N] in nats, by seed and record: a sum of losses whose
      weights sum to 0.
    tokens: supervised tokens [N].

  Returns:
    None where there is nothing to average, or a loss is not finite.
  """
  counts = np.asarray(tokens) > 0
  contrast, tokens = np.asarray(contrast)[:, counts], tokens[counts]
  S, N = contrast.shape
  if not contrast.size or not np.isfinite(contrast).all():
    return None
  total = tokens.sum()
  by_seed = contrast.sum(1) / total
  mean = float(by_seed.mean())
  if N < FEWEST_RECORDS:
    return Estimate(mean, np.nan, np.nan, NOTHING, S, N)
  size = effective(tokens)
  residual = (contrast.mean(0) - mean * tokens) / total
  of_records = (residual**2).sum() * size / (size - 1)
  if S < FEWEST_SEEDS:
    return Estimate(
      mean, float(np.sqrt(of_records)), float(size - 1), RECORDS, S, N
    )
  of_seeds = by_seed.var(ddof=1) / S
  variance = of_seeds + of_records
  freedom = size - 1
  if variance > 0:
    freedom = variance**2 / (of_seeds**2 / (S - 1) + of_records**2 / (size - 1))
  return Estimate(mean, float(np.sqrt(variance)), float(freedom), BOTH, S, N)


def effective(tokens: np.ndarray) -> float:
  """As how many records of one length these count (Kish 1965)."""
  return float(tokens.sum() ** 2 / (tokens.astype(float) ** 2).sum())


def holm(p_values: Sequence[float]) -> np.ndarray:
  """p-values corrected for being many: Holm, Scand. J. Statist. 6, 1979.

  The chance of one false claim among all of them stays at the level, whatever
  the dependence between them.
  """
  p = np.asarray(p_values, float)
  order = np.argsort(p)
  corrected = np.empty_like(p)
  steps = p[order] * np.arange(len(p), 0, -1)
  corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
  return corrected
