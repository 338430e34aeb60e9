"""Medians and ratios: a table to read, a plot, and the numbers as JSON."""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import statistics
from typing import Any

from experiments.benchmarks.jobs import OURS, Case

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # by label, one per round


def rows(case: Case, results: Results) -> list[dict[str, Any]]:
  """One row for each contestant that finished at least once.

  `ratio` is the contestant's median against the best peer's, oriented so that
  more is better: 2 is twice as fast, or half the memory.
  """
  medians = {
    label: statistics.median(r[case.metric] for r in results[label])
    for label, _, _ in case.jobs
    if results.get(label)
  }
  peers = [m for label, m in medians.items() if not label.startswith(OURS)]
  best = (max if case.larger_is_better else min)(peers, default=None)
  made = []
  for label, median in medians.items():
    values = [r[case.metric] for r in results[label]]
    ratio = None
    if best is not None:
      ratio = median / best if case.larger_is_better else best / median
    made.append(
      {
        'contestant': label,
        'median': median,
        'low': min(values),
        'high': max(values),
        'rounds': len(values),
        'ratio': ratio,
        'shares': [r['share'] for r in results[label] if 'share' in r],
        'peak_gib': statistics.median(r['peak_gib'] for r in results[label]),
      }
    )
  return made


def markdown(case: Case, results: Results) -> str:
  """The table of a case."""
  lines = [
    f'### {case.name}',
    '',
    f'| | {case.metric}, median | range | rounds | against the best peer '
    '| share of the GEMM rate | peak GiB |',
    '|---|---|---|---|---|---|---|',
  ]
  for row in rows(case, results):
    ratio = '' if row['ratio'] is None else f'{row["ratio"]:.2f}'
    shares = row['shares']
    share = f'{statistics.median(shares):.0%}' if shares else ''
    lines.append(
      f'| {row["contestant"]} | {row["median"]:.4g} '
      f'| {row["low"]:.4g} to {row["high"]:.4g} | {row["rounds"]} | {ratio} '
      f'| {share} | {row["peak_gib"]:.2f} |'
    )
  return '\n'.join(lines) + '\n'


def write(folder: Path, facts: Mapping[str, Any], measured: Sequence[tuple[Case, Results]]) -> None:
  """Writes results.json, table.md and plot.png."""
  cases = [
    {'name': case.name, 'metric': case.metric, 'rows': rows(case, results), 'results': results}
    for case, results in measured
  ]
  text = json.dumps({**facts, 'cases': cases}, indent=1)
  (folder / 'results.json').write_text(text + '\n', 'utf-8')
  tables = '\n'.join(markdown(case, results) for case, results in measured)
  (folder / 'table.md').write_text(tables, 'utf-8')
  _plot(folder / 'plot.png', measured)


def _plot(path: Path, measured: Sequence[tuple[Case, Results]]) -> None:
  """Draws a panel for each case, with a bar for each contestant and a point for each round."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, panels = pyplot.subplots(len(measured), squeeze=False, figsize=(8, 2.6 * len(measured)))
  for panel, (case, results) in zip(panels[:, 0], measured, strict=True):
    made = rows(case, results)
    labels = [row['contestant'] for row in made]
    colours = ['tab:blue' if label.startswith(OURS) else 'tab:grey' for label in labels]
    panel.barh(labels, [row['median'] for row in made], color=colours)
    for i, label in enumerate(labels):
      values = [r[case.metric] for r in results[label]]
      panel.plot(values, [i] * len(values), 'k.', markersize=4)
    panel.invert_yaxis()
    panel.set_title(case.name)
    panel.set_xlabel(case.metric)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
