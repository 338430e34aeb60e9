"""The report's figures, each in a light and a dark version.

Lines of ranks take their colours from viridis, cut so that all of them stand
out from the background, and a marker each, so that nobody has to tell colours
apart; maps use cividis. Both are made for colour-blind readers. Sizes suit a
phone.
"""

from collections.abc import Callable, Iterable
import contextlib
from typing import Any

import matplotlib

matplotlib.use('Agg')

from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from experiments.analysis import arms, compare, intervals, spectra
from experiments.analysis.arms import Row
from experiments.analysis.verdict import Answer
from gemma_jax.sweep.results import Sweep

SIZE = (4.6, 3.3)  # inches; 1 inch is 96 CSS pixels
MARKERS = 'os^Dv<>Pp*Xhd'
THEMES = {
  'light': {'ground': '#ffffff', 'ink': '#1b1f24', 'grid': '#d5d9de', 'range': (0.0, 0.8)},
  'dark': {'ground': '#14171b', 'ink': '#e8eaed', 'grid': '#3a4048', 'range': (0.4, 1.0)},
}

Draw = Callable[[Figure, dict], None]


@contextlib.contextmanager
def theme(name: str):
  """Applies Matplotlib's settings for a theme; yields its colours."""
  colours = THEMES[name]
  ink, ground = colours['ink'], colours['ground']
  settings: dict[Any, Any] = {
    'figure.facecolor': ground,
    'axes.facecolor': ground,
    'savefig.facecolor': ground,
    'text.color': ink,
    'axes.labelcolor': ink,
    'axes.edgecolor': ink,
    'xtick.color': ink,
    'ytick.color': ink,
    'grid.color': colours['grid'],
    'axes.grid': True,
    'axes.axisbelow': True,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'font.size': 10,
    'legend.fontsize': 9,
    'legend.frameon': False,
    'figure.constrained_layout.use': True,
    'svg.hashsalt': 'gemma_jax',  # the same figure is the same file
  }
  with matplotlib.rc_context(settings):
    yield colours


def all_figures(
  sweep: Sweep, table: list[Row], answers: list[Answer], directions: dict[str, dict]
) -> dict[str, tuple[str, Draw]]:
  """Name → (caption, draw); figures for which a sweep has no data are left out.

  Args:
    sweep: with a finished adapter.
    table: of `arms.rows`.
    answers: of `verdict.answers`.
    directions: trial's name → `spectra.directions`, for the adapters compared.
  """
  draws: dict[str, tuple[str, Draw]] = {}
  bars, others = bars_caption(answers), arms.in_words(arms.varied(sweep))
  by = f' by {others}' if others else ''
  draws['loss_by_rank'] = (
    f'Test loss against rank{by}, each arm at its own best learning rate. {bars}',
    lambda figure, theme: draw_losses(figure, theme, table, answers, 'rank'),
  )
  draws['loss_by_parameters'] = (
    f'Test loss against trainable parameters{by}. {bars}',
    lambda figure, theme: draw_losses(figure, theme, table, answers, 'parameters'),
  )
  draws['loss_by_seconds'] = (
    f"Test loss against seconds of training{by} (a batched adapter's share, mean over seeds). "
    f'{bars}',
    lambda figure, theme: draw_losses(figure, theme, table, answers, 'seconds'),
  )
  draws['learning_curves'] = (
    'Held-out loss (validation and test) while training, first seed.',
    lambda figure, theme: _curves(figure, theme, sweep, table),
  )
  cut = compare.truncation(sweep, table)
  if cut:
    draws['truncation'] = (
      'Adapters trained at a rank, and the largest one truncated to it by SVD.',
      lambda figure, theme: _truncation(figure, theme, cut),
    )
  largest = max(table, key=lambda row: row.rank).trials[0]
  for path in largest.spectrum():
    draws[f'spectrum_{path.replace("/", "_")}'] = (
      f'Singular values of the update to {path} of "{largest.name}".',
      lambda figure, theme, path=path: _heat_map(figure, theme, largest.spectrum()[path]),
    )
  draws['effective_rank'] = (
    "Effective rank of the updates (exp of the spectrum's entropy, mean over "
    'projections and layers) while training, first seed.',
    lambda figure, theme: _while_training(
      figure, theme, table, spectra.effective_ranks, 'effective rank'
    ),
  )
  draws['energy'] = (
    'Energy of the updates (the sum of their squared singular values) while training, first seed.',
    lambda figure, theme: _while_training(figure, theme, table, spectra.energies, 'energy'),
  )
  if len(directions) > 1:
    draws['similarity'] = (
      f'Shared input directions (of the {spectra.DIRECTIONS} strongest; 0 '
      f'none, 1 all, {spectra.by_chance(directions[largest.name]):.3f} by '
      'chance). Trials of one seed start from nested factors and share some '
      'from the start.',
      lambda figure, theme: _similarity(figure, theme, directions),
    )
    path = next(iter(directions[largest.name]))
    draws['similarity_of_layers'] = (
      f'Shared input directions of the updates to {path} in different layers of "{largest.name}".',
      lambda figure, theme: _layers(
        figure, theme, spectra.between_layers(directions[largest.name], path)
      ),
    )
  return draws


def colours(theme: dict, count: int) -> np.ndarray:
  """A colour for each of `count` ordered arms."""
  low, high = theme['range']
  return plt.get_cmap('viridis')(np.linspace(low, high, count))


def bars_caption(answers: list[Answer]) -> str:
  """What the bars of `draw_losses` are; '' if there are none."""
  over = {
    test.deficit.over
    for answer in answers
    for test in answer.tests
    if test.deficit and test.deficit.interval
  }
  if not over:
    return ''
  return (
    f'Bars: 95 % interval, over {" or ".join(sorted(over))}, of the paired '
    'deficit from the reference (hollow), drawn around the arm.'
  )


def draw_losses(figure, theme, table, answers, what) -> None:
  """Test losses against 'rank', 'parameters' or 'seconds'."""
  axes = figure.add_subplot()
  references = [answer.row for answer in answers if answer.tests]
  deficits = {
    test.row.arm: test.deficit
    for answer in answers
    for test in answer.tests
    if test.row and test.deficit
  }
  families: dict[str, list[Row]] = {}
  for row in table:
    family = row.label.rpartition('rank ')[0].rstrip(', ')
    families.setdefault(family, []).append(row)
  for (name, rows), colour, marker in zip(
    families.items(), colours(theme, len(families)), MARKERS, strict=False
  ):
    x = [getattr(row, what) for row in rows]
    y = [row.test for row in rows]
    bars = np.array([_bar(deficits.get(row.arm)) for row in rows])
    line = '' if what == 'seconds' else '-'
    for row, place in zip(rows, zip(x, y, strict=True), strict=True):
      if what == 'seconds':
        axes.annotate(row.rank, place, (9, -3), textcoords='offset points')
    axes.errorbar(
      x, y, yerr=bars, fmt=f'{line}{marker}', color=colour, capsize=3, label=name or None
    )
    for i in (i for i, row in enumerate(rows) if row in references):
      axes.plot(x[i], y[i], marker, markersize=11, markerfacecolor='none', color=theme['ink'])
  if what == 'seconds':
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
  else:
    _count_ticks(axes, {getattr(row, what) for row in table})
  axes.set_xlabel(
    {
      'rank': 'rank',
      'parameters': 'trainable parameters',
      'seconds': 'seconds of training (ranks next to the points)',
    }[what]
  )
  axes.set_ylabel('test loss, nats per token')
  if len(families) > 1:
    _legend(figure)


def _legend(figure) -> None:
  """Below the axes, where it covers no line; the figure grows by its height."""
  (axes,) = figure.axes
  handles, labels = axes.get_legend_handles_labels()
  columns = max(1, min(len(labels), 60 // (max(map(len, labels)) + 6)))
  figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
  figure.legend(handles, labels, loc='outside lower center', ncols=columns)


def _count_ticks(axes, counts: Iterable[int]) -> None:
  """A logarithmic axis with ticks at these counts, without those too near to be read."""
  values = sorted(counts)
  room = 0.02 * (1 + max(len(_short(value)) for value in values))  # a label's share of the axis
  least = (values[-1] / values[0]) ** room
  ticks = values[:1]
  for value in values[1:]:
    if value >= ticks[-1] * least:
      ticks.append(value)
  axes.set_xscale('log', base=2)
  axes.set_xticks(ticks, [_short(tick) for tick in ticks], fontsize=8)
  axes.minorticks_off()


def _bar(deficit: intervals.Estimate | None) -> float:
  """Half the length of its interval; nan draws none."""
  if deficit is None or deficit.interval is None:
    return np.nan
  return deficit.interval[1] - deficit.mean


def _short(count: int) -> str:
  """46080 → '46.1k'; small numbers as they are."""
  for size, letter in ((1e6, 'M'), (1e3, 'k')):
    if count >= size:
      return f'{count / size:.3g}{letter}'
  return str(count)


def _curves(figure, theme, sweep, table) -> None:
  axes = figure.add_subplot()
  base = sweep.finished('base')
  for row, colour, marker in zip(
    table, colours(theme, len(table)), MARKERS * len(table), strict=False
  ):
    losses = row.trials[0].losses
    points = {s: nll.sum() / tokens.sum() for s, (nll, tokens) in losses.items()}
    if base:
      nll, tokens = base[0].last
      points = {0: nll.sum() / tokens.sum(), **points}
    axes.plot(
      points.keys(), points.values(), marker=marker, color=colour, label=row.label, markersize=4
    )
  axes.set_xlabel('updates')
  axes.set_ylabel('held-out loss, nats per token')
  _legend(figure)


def _truncation(figure, theme, cut) -> None:
  axes = figure.add_subplot()
  families = {each['others']: [x for x in cut if x['others'] == each['others']] for each in cut}
  # Two colours for one family's two lines, or one for each family.
  palette = colours(theme, max(2, len(families)))
  for i, (others, rows) in enumerate(families.items()):
    x = [each['rank'] for each in rows]
    axes.plot(
      x,
      [each['trained'] for each in rows],
      '-o',
      color=palette[i],
      label=f'{others}trained at this rank',
    )
    axes.plot(
      x,
      [each['truncated'] for each in rows],
      '--s',
      color=palette[i if len(families) > 1 else 1],
      label=f'{others}cut from {rows[0]["from_rank"]}',
    )
  _count_ticks(axes, {each['rank'] for each in cut})
  axes.set_xlabel('rank')
  axes.set_ylabel('test loss, nats per token')
  _legend(figure)


def _heat_map(figure, theme, values) -> None:
  axes = figure.add_subplot()
  axes.grid(False)
  image = axes.imshow(values, aspect='auto', cmap='cividis', origin='lower')
  axes.set_xlabel('index of the singular value, largest first')
  axes.set_ylabel('layer')
  _whole_ticks(axes)
  figure.colorbar(image, label='singular value')


def _while_training(figure, theme, table, measure, name) -> None:
  axes = figure.add_subplot()
  for row, colour, marker in zip(
    table, colours(theme, len(table)), MARKERS * len(table), strict=False
  ):
    points = measure(row.trials[0])
    axes.plot(
      points.keys(), points.values(), marker=marker, color=colour, label=row.label, markersize=4
    )
  axes.set_xlabel('updates')
  axes.set_ylabel(name)
  _legend(figure)


def _similarity(figure, theme, directions) -> None:
  axes = figure.add_subplot()
  axes.grid(False)
  values = spectra.between(list(directions.values()))
  image = axes.imshow(values, cmap='cividis', vmin=0, vmax=1)
  names = [name.rpartition('-lr')[0] for name in directions]
  axes.set_xticks([])
  axes.set_xlabel('the same trials in the same order')
  axes.set_yticks(range(len(names)), names, fontsize=8)
  figure.colorbar(image, label='shared directions')


def _layers(figure, theme, values) -> None:
  axes = figure.add_subplot()
  axes.grid(False)
  image = axes.imshow(values, cmap='cividis', vmin=0, vmax=1, origin='lower')
  axes.set_xlabel('layer')
  axes.set_ylabel('layer')
  _whole_ticks(axes)
  figure.colorbar(image, label='shared directions')


def _whole_ticks(axes) -> None:
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(ticker.MaxNLocator(integer=True))
