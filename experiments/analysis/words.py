"""A sweep's result in words: first what limits it, then what it shows."""

from collections.abc import Iterable

from experiments.analysis import arms, intervals, verdict
from experiments.analysis.arms import Row
from experiments.analysis.compare import Pair
from experiments.analysis.verdict import Answer, Test
from gemma_jax.runs.evaluate import FEWEST_RECORDS
from gemma_jax.sweep.results import Sweep


def paragraphs(
  sweep: Sweep, table: list[Row], answers: list[Answer], pairs: list[Pair]
) -> list[str]:
  """Caveats, pairs if other axes than the rank vary, and what is said of ranks."""
  texts = [' '.join(caveats(sweep, table))]
  if len(table) == 1:
    (row,) = table
    name = arms.quoted(row.label)
    texts.append(f'Only {name} was trained: test loss {row.test:.4f} nats per token.')
  if pairs:
    texts.append(_pairs(sweep, pairs))
  without: dict[str, list[str]] = {}
  for answer in (answer for answer in answers if answer.tests):
    if answer.unsupported_reason:
      without.setdefault(answer.unsupported_reason, []).append(answer.reference)
    else:
      texts.append(_ranks(answer))
  for reason, labels in without.items():
    noun = 'the reference' if len(labels) == 1 else 'the references'
    texts.append(f'No verdict on ranks below {_list(labels)}, {noun}: {reason}.')
  return texts


def title(sweep: Sweep) -> str:
  """'Scale rule and rank of adapters on gemma3_270m': what is compared, and on which base."""
  axes = arms.varied(sweep)
  if any(len(family) > 1 for family in arms.families(sweep).values()):
    axes.append(_budget(sweep))
  text = f'{arms.in_words(axes)} of adapters' if axes else 'adapters'
  return f'{text[0].upper()}{text[1:]} on {sweep.manifest["base"]}'


def caveats(sweep: Sweep, table: list[Row]) -> list[str]:
  """What the numbers rest on and what limits them, in one sentence each."""
  records = int(sweep.part('test').sum())
  seeds = sorted({len(row.trials) for row in table})
  tokens = table[0].trials[0].last[1][sweep.part('test')]
  sentences = [
    f'Measured on {records} test records, which count as '
    f'{intervals.effective(tokens):.0f} (long ones weigh more), and '
    f'{" to ".join(map(str, seeds[:: len(seeds) - 1 or 1]))} '
    f'{"seed" if seeds[-1] == 1 else "seeds"} per arm.'
  ]
  failed = [row.label for row in table if arms.lost_seeds(sweep, row)]
  if failed:
    sentences.append(f'Seeds failed, and are left out, of: {_list(failed)}.')
  if records < FEWEST_RECORDS:
    sentences.append(f'Fewer than {FEWEST_RECORDS} records give no interval, whatever the seeds.')
  elif few := _with_fewer(table, intervals.FEWEST_SEEDS):
    sentences.append(
      f'Fewer than {intervals.FEWEST_SEEDS} seeds ({few}) give no interval '
      'over seeds, no p-value and no verdict: what is left is over the records '
      'at these seeds, and other seeds may differ by more.'
    )
  elif few := _with_fewer(table, intervals.FEW_SEEDS):
    sentences.append(
      f'A claim needs {intervals.FEW_SEEDS} seeds: with fewer ({few}), '
      'their spread is hardly known.'
    )
  edge = [row.label for row in table if row.at_edge]
  if edge:
    sentences.append(
      f'Rate at the edge of the grid, so a better one may lie beyond: {_list(edge)}.'
    )
  if any(row.clipped for row in table):
    shares = ', '.join(
      f'{arms.quoted(row.label)} {percent(row.clipped)}' for row in table if row.clipped is not None
    )
    sentences.append(
      f'Gradients were clipped at a norm of {arms.clip_norm(sweep):g}, which '
      f'treats arms differently; share of updates: {shares}.'
    )
  return sentences


def _ranks(answer: Answer) -> str:
  assert answer.margin is not None  # there is a verdict
  text = [
    f'The margin is {percent(answer.margin)} of what {answer.reference}, the '
    f'reference, gains over the base ({answer.gain} nats per token).'
  ]
  held, stop = answer.enough, answer.stop
  if held:
    text.append(
      f'{_upper(held.label)} is enough: the upper 95 % bound of its deficit '
      f'minus the margin is {held.tested.upper():+.4f}, below 0'
      f'{_larger(answer)}. Its deficit is {held.deficit}.'
    )
  else:
    text.append('Undecided: no smaller rank was shown to be within the margin.')
  if stop and stop.state == verdict.FAILS:
    text.append(
      f'{_upper(stop.label)} was not shown to be enough: its bound is '
      f'{stop.tested.upper():+.4f}, its deficit {stop.deficit}.'
    )
  elif stop:
    text.append(f'{_upper(stop.label)} cannot be compared: {stop.unsupported_reason}.')
  rest = [t.label for t in answer.tests if t.state == verdict.NOT_REACHED]
  if rest:
    text.append(f'Not reached, and so undecided: {_list(rest)}.')
  text += _power(answer)
  return ' '.join(text)


def _larger(answer: Answer) -> str:
  count = sum(test.state == verdict.HOLDS for test in answer.tests)
  return ', and so is that of every larger rank' if count > 1 else ''


def _power(answer: Answer) -> list[str]:
  """What could have been seen at the ranks that were tested."""
  tested = [test for test in answer.tests if test.state in (verdict.HOLDS, verdict.FAILS)]
  if not tested:
    return []
  seen = ', '.join(f'{detectable(test, answer)} at {test.label}' for test in tested)
  text = [
    'With a power of 80 % this design calls a rank enough if its deficit lies below the '
    f'margin by {seen}.'
  ]
  assert answer.margin is not None and answer.gain is not None  # there is a verdict
  last, margin = tested[-1], answer.margin * answer.gain.mean
  if last.state == verdict.FAILS and last.tested.detectable() > margin:
    text.append(
      f'That is more than the margin ({margin:.4f}): even if {last.label} lost '
      'nothing, the design was too small to be likely to show it.'
    )
  return text


def detectable(test: Test, answer: Answer) -> str:
  """'0.0041 (4 % of the gain)'; without the share if the gain is not known."""
  size = test.tested.detectable()
  if answer.unsupported_reason or answer.gain is None:
    return f'{size:.4f}'
  return f'{size:.4f} ({percent(size / answer.gain.mean)} of the gain)'


def percent(share: float) -> str:
  """'10 %'."""
  return f'{100 * share:.0f} %'


def _budget(sweep: Sweep) -> str:
  """What the arms of a pair have in common."""
  is_equal = sweep.manifest['config']['grid'].get('equal_parameters')
  return 'number of parameters' if is_equal else 'rank'


def _pairs(sweep: Sweep, pairs: list[Pair]) -> str:
  known = [pair for pair in pairs if pair.p is not None]
  axes = arms.in_words(arms.varied(sweep))
  text = f'Pairs of arms of the same {_budget(sweep)} that differ in {axes}: {len(pairs)}.'
  if not known:
    return f'{text} None of them has a p-value.'
  told = [pair for pair in known if pair.p is not None and pair.p < 0.05]
  text += f" After Holm's correction for {len(known)}, {len(told)} can be told apart at 5 %."
  for pair in told:
    names = ' minus '.join(arms.quoted(row.label) for row in (pair.first, pair.second))
    text += f' {names}: {pair.difference} (95 % by itself, not corrected).'
  if len(told) < len(known):
    text += ' Not being told apart does not show that arms are equal.'
  return text


def _with_fewer(table: list[Row], seeds: int) -> str:
  few = [row.label for row in table if len(row.trials) < seeds]
  return 'all arms' if len(few) == len(table) else _list(few)


def _list(labels: Iterable[str]) -> str:
  return '; '.join(map(arms.quoted, labels))


def _upper(text: str) -> str:
  """Capitalizes the start of a sentence; names of settings stay as they are."""
  return text.replace('rank', 'Rank', 1) if text.startswith('rank') else text
