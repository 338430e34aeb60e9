"""How sure is a mean difference of losses, over seeds and over records?

Both models are measured on the same records and trained from the same seeds, so
what makes a record hard or a seed lucky cancels in the difference of a pair.
Seeds and records would both differ the next time, so both count as drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from gemma_jax.runs.evaluate import FEWEST_RECORDS

# With two seeds, their spread is one number: t has one degree of freedom.
FEWEST_SEEDS = 3

# What a claim needs. With three or four seeds the report adds a caveat.
FEW_SEEDS = 5

# Smaller p-values are not distinguished.
LEAST_P = 1e-9

BOTH = 'seeds and records'
RECORDS = 'records at these seeds'
NOTHING = 'nothing'


class Estimate(NamedTuple):
  """A mean in nats per token, with what is known of its error.

  Attributes:
    mean: as measured.
    parts: (variance, degrees of freedom) of what counts as drawn: records and
      seeds; records alone with fewer than 3 seeds; nothing with fewer than 10
      records.
    seeds: S.
    records: N, those with supervised tokens.
    effective: as how many records of one length they count.
  """

  mean: float
  parts: tuple[tuple[float, float], ...]
  seeds: int
  records: int
  effective: float

  @property
  def over(self) -> str:
    """What counts as drawn: BOTH, RECORDS or NOTHING."""
    return (NOTHING, RECORDS, BOTH)[len(self.parts)]

  def distance(self, level: float) -> float:
    """From the mean to its one-sided bound.

    With two parts the quantile of t is the mean of theirs, weighted by their
    variances (Cochran, Biometrics 20, 1964).
    """
    variances, freedoms = np.array(self.parts).T
    weighted = (variances * stats.t.ppf(level, freedoms)).sum()
    error = np.sqrt(variances.sum())
    return float(weighted / error) if error else 0.0

  def upper(self, level: float = 0.95) -> float:
    """The one-sided upper bound; that of 1 - level is the lower bound."""
    return self.mean + self.distance(level)

  @property
  def interval(self) -> tuple[float, float] | None:
    """Two-sided, 95 %."""
    if self.over == NOTHING:
      return None
    return self.upper(0.025), self.upper(0.975)

  @property
  def p(self) -> float | None:
    """Two-sided, that the mean is 0; None unless seeds count as drawn.

    That is where an end of the interval of level 1 - p is 0.
    """
    if self.over != BOTH:
      return None
    excess = lambda p: self.distance(1 - p / 2) - abs(self.mean)
    if excess(LEAST_P) <= 0:
      return LEAST_P if self.mean else 1.0
    return float(optimize.brentq(excess, LEAST_P, 1.0))  # pyright: ignore[reportArgumentType]: a pair with full_output

  def detectable(self, power: float = 0.8) -> float:
    """The distance from a bound that a one-sided test at 5 % would detect.

    The textbook's (z_0.95 + z_0.80) * error, with quantiles of t.
    """
    return self.distance(0.95) + self.distance(power)

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
  Kish's effective number for N, as long records weigh more). What is
  particular to a record at one seed is in both, so the sum errs upwards.

  Simulated, a one-sided 5 % is in truth 3 to 5 %, from 3 seeds and 30 records
  on, whichever part is the larger (`tests/experiments`). A bootstrap that
  draws seeds and records (Owen 2007, arXiv 0712.1111) has (S - 1) / S of the
  seeds' part and no t: with three seeds its 5 % are 9 to 11 %. Satterthwaite's
  degrees of freedom give 7 % there, and 1.5 % for 0.1 %, so that no correction
  for many p-values would hold. None of them helps if a few records have most
  of the loss: with exponential ones 5 % are 10 to 13 % of 30 to 50 records and 7
  to 8 % of 380.

  Args:
    contrast: [S, N] in nats, by seed and record: a sum of losses whose
      weights sum to 0.
    tokens: supervised tokens [N].

  Returns:
    The estimate, or None if there is nothing to average or a loss is not finite.
  """
  counts = np.asarray(tokens) > 0
  contrast, tokens = np.asarray(contrast)[:, counts], tokens[counts]
  S, N = contrast.shape
  if not contrast.size or not np.isfinite(contrast).all():
    return None
  by_seed = contrast.sum(1) / tokens.sum()
  mean = float(by_seed.mean())
  parts, size = [], effective(tokens)
  if N >= FEWEST_RECORDS:
    residual = (contrast.mean(0) - mean * tokens) / tokens.sum()
    parts.append((float((residual**2).sum() * size / (size - 1)), size - 1))
    if S >= FEWEST_SEEDS:
      parts.append((float(by_seed.var(ddof=1) / S), S - 1))
  return Estimate(mean, tuple(parts), S, N, size)


def effective(tokens: np.ndarray) -> float:
  """As how many records of one length these count (Kish 1965)."""
  return float(tokens.sum() ** 2 / (tokens.astype(float) ** 2).sum())


def holm(p_values: Sequence[float]) -> np.ndarray:
  """p-values corrected for multiple tests: Holm, Scand. J. Statist. 6, 1979.

  The chance of one false claim among all of them stays at the level, whatever
  the dependence between them.
  """
  p = np.asarray(p_values, float)
  order = np.argsort(p)
  corrected = np.empty_like(p)
  steps = p[order] * np.arange(len(p), 0, -1)
  corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
  return corrected
