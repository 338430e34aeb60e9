"""Token-weighted evaluation: each record once, sums first, one division.

    nll_per_token = sum over records of nll / sum over records of tokens

A mean of batch means would give short records more weight.
"""

from collections.abc import Callable, Iterable
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from gemma_jax.runs import hosts

# With fewer, neither their spread nor the distribution of their mean is known.
FEWEST_RECORDS = 10

# Of the updates' time; evaluations that take more are warned of.
_MOST_OF_TRAINING = 0.25


class Stopped(Exception):
  """The caller asked an evaluation to end early."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Losses by example.

  Attributes:
    nll: float64 [N], nats, summed over each example's supervised tokens.
    tokens: int64 [N], supervised tokens.
  """

  nll: np.ndarray = dataclasses.field(repr=False)
  tokens: np.ndarray = dataclasses.field(repr=False)

  @property
  def nll_per_token(self) -> float:
    """Nats per supervised token, over all examples."""
    return float(self.nll.sum() / max(self.tokens.sum(), 1))

  def members(self) -> list['Evaluation']:
    """Splits nll [K, N] into one evaluation per adapter."""
    return [Evaluation(row, self.tokens) for row in self.nll]

  def line(self) -> dict[str, Any]:
    """The result line of `launch.evaluate`, without the adapter's name."""
    mean = self.nll_per_token
    return {
      'nll': float(self.nll.sum()),
      'tokens': int(self.tokens.sum()),
      'nll_per_token': mean,
      'perplexity': math.exp(min(mean, 700.0)),
      'examples': len(self.nll),
    }


def evaluate(
  eval_step: Callable[[dict[str, Any]], jax.Array],
  batches: Iterable[tuple[dict[str, Any], np.ndarray]],
  num_examples: int,
  should_stop: Callable[[], bool] = lambda: False,
  members: tuple[int, ...] = (),
) -> Evaluation:
  """Sums losses by example.

  Args:
    eval_step: batch → weighted losses float32 [*members, B, T].
    batches: (batch, example_ids [B, T], -1 at padding) from
      `pipeline.eval_batches`.
    num_examples: N.
    should_stop: asked before each batch.
    members: leading axes of the losses, (K,) for several adapters; the result's
      nll has them too.

  Raises:
    Stopped: should_stop said so.
  """
  nll = np.zeros((*members, num_examples), np.float64)
  tokens = np.zeros(num_examples, np.int64)
  with hosts.progress_bar(total=num_examples, desc='evaluation', unit='record', leave=False) as bar:
    for batch, ids in batches:
      if should_stop():
        raise Stopped
      losses = np.asarray(eval_step(batch), np.float64)
      real = ids >= 0
      np.add.at(nll, (..., ids[real]), losses[..., real])  # pyright: ignore[reportArgumentType]: it takes an Ellipsis
      np.add.at(tokens, ids[real], (batch['weights'] > 0)[real])
      bar.update(len(np.unique(ids[real])))
  return Evaluation(nll, tokens)


def cost(
  evaluation_secs: float, update_secs: float, steps: int, every: int, records: int
) -> tuple[str, str]:
  """What the evaluations of a run take beside its updates.

  Args:
    evaluation_secs: of one evaluation.
    update_secs: of one update.
    steps: updates of the whole run, which is evaluated before the first and after the last.
    every: updates between evaluations; 0 means only at the ends.
    records: in an evaluation.

  Returns:
    A sentence, and a remedy if they take more than a quarter of the updates' time, or else ''.
  """
  count = 2 + ((steps - 1) // every if every else 0)
  updates = steps * update_secs
  share = count * evaluation_secs / updates
  line = (
    f'An evaluation takes about {evaluation_secs:.1f} s; {count} of them take {100 * share:.0f} % '
    f'of the time of {steps} updates ({updates:.0f} s)'
  )
  if share <= _MOST_OF_TRAINING:
    return line, ''
  remedy = f'data.max_eval_records={max(1, int(records * _MOST_OF_TRAINING / share))}'
  fewer = int(_MOST_OF_TRAINING * updates / evaluation_secs)
  if every and fewer >= 2:
    remedy += f' or eval_every_steps={(steps - 1) // (fewer - 1) + 1}'
  return line, f'{remedy} would take a quarter at most'


def paired_interval(
  difference: np.ndarray, tokens: np.ndarray, seed: int = 0
) -> tuple[float, float] | None:
  """95 % bootstrap interval of a token-weighted mean difference per record.

  Records are drawn with replacement, 10,000 times; both models are measured on
  the same records, so what makes a record hard cancels (percentile interval,
  Efron and Tibshirani 1993, chapter 13). It covers other records for these two
  models, not what another seed would have trained.

  Args:
    difference: float [N], nll of one model minus nll of another, by record.
    tokens: int [N], supervised tokens of each record.
    seed: for the draws.

  Returns:
    (low, high) in nats per token; None with fewer than 10 records.
  """
  if len(difference) < FEWEST_RECORDS:
    return None
  rng = np.random.default_rng(seed)
  draws = rng.integers(0, len(difference), (10_000, len(difference)))
  means = difference[draws].sum(1) / tokens[draws].sum(1)
  low, high = np.quantile(means, [0.025, 0.975])
  return float(low), float(high)
