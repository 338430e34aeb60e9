"""A sweep's results as one self-contained page.

  python -m experiments.report DIR

Writes DIR/report/: report.html (needs no network and no other file),
results.csv (one line per trial), records.csv (one line per held-out record, with
its loss under every trial: publish it with a result, so that others can analyse
it again), and every figure as SVG and PNG. Prints their paths.
"""

import base64
import html
import io
import json
from pathlib import Path
import sys
from typing import Any

from experiments.analysis import arms, compare, intervals, spectra, tables, verdict, words
from gemma_jax import files
from gemma_jax.formats import open_base
from gemma_jax.sweep import manifest, results

# The most adapters that one similarity map shows legibly.
_MAX_SIMILAR = 12


def write(workdir: str) -> list[Path]:
  """Writes the report of a sweep that has a finished trial.

  Returns:
    Paths of the files written, the page first.

  Raises:
    ValueError: the folder is not a sweep's, or no adapter has been trained.
  """
  sweep = results.read(workdir)
  table = arms.rows(sweep)
  answers = verdict.answers(sweep, table)
  folder = Path(workdir) / 'report'
  (folder / 'figures').mkdir(parents=True, exist_ok=True)
  pictures = _figures(sweep, table, answers, folder / 'figures')
  html_path, rows = folder / 'report.html', folder / 'results.csv'
  records = folder / 'records.csv'
  files.write(html_path, page(sweep, table, answers, pictures))
  tables.write_trials(sweep, table, answers, rows)
  tables.write_records(sweep, records)
  return [html_path, rows, records, *sorted((folder / 'figures').iterdir())]


def _directions(sweep, table) -> dict[str, spectra.Directions]:
  """Directions of all seeds of the largest rank, and of each other rank's first seed."""
  largest = max(table, key=lambda row: row.rank)
  trials = [row.trials[0] for row in table if row is not largest]
  trials = [*trials, *largest.trials][-_MAX_SIMILAR:]
  config = sweep.manifest['config']['model']
  try:
    source = open_base.open_base(config['path'], config['tokenizer'])
  except ValueError as e:  # moved, or on another machine
    print(
      f'The base is missing, so the similarity of directions is left out ({e})', file=sys.stderr
    )
    return {}
  return {trial.name: spectra.directions(trial, source.config) for trial in trials}


def _figures(sweep, table, answers, folder: Path) -> dict[str, tuple[str, dict]]:
  """Name → (caption, theme → SVG); writes the light ones beside the page."""
  from matplotlib import pyplot as plt

  from experiments.analysis import figures

  captioned = {}
  drawn = figures.all_figures(sweep, table, answers, _directions(sweep, table))
  for name, (caption, draw) in drawn.items():
    pictures = {}
    for theme in figures.THEMES:
      with figures.theme(theme) as colours:
        figure = plt.figure(figsize=figures.SIZE)
        draw(figure, colours)
        buffer = io.BytesIO()
        figure.savefig(buffer, format='svg', metadata={'Date': None})
        pictures[theme] = buffer.getvalue()
        if theme == 'light':
          (folder / f'{name}.svg').write_bytes(pictures[theme])
          figure.savefig(folder / f'{name}.png', dpi=150)
        plt.close(figure)
    captioned[name] = (caption, pictures)
  return captioned


def page(sweep, table, answers, pictures) -> str:
  """The page, with the figures of `_figures`."""
  waiting = [trial for trial in sweep.trials if not trial.has_ended]
  pairs = compare.pairs(sweep, table)
  answer = ''.join(
    f'<p class="answer">{_text(text)}</p>'
    for text in words.paragraphs(sweep, table, answers, pairs)
  )
  sections = [
    ('Answer', answer),
    ('Arms', _arms(sweep, table, answers)),
    ('Pairs', _pairs(pairs)),
    ('Figures', ''.join(_figure(*each) for each in pictures.values())),
    ('Truncated or trained', _truncation(sweep, table)),
    ('By category', _categories(sweep, table, answers)),
    ('Sample answers', _samples(sweep)),
    ('Failed trials', _failed(sweep)),
    ('Trials', f'<pre>{_text(results.table(sweep))}</pre>'),
    ('Configuration and fingerprints', _configuration(sweep)),
  ]
  if waiting:
    note = f'{len(waiting)} trials have not ended: this report covers part of the sweep.'
    sections.insert(0, ('Not finished', f'<p>{note}</p>'))
  body = ''.join(
    f'<section><h2>{title}</h2>{content}</section>' for title, content in sections if content
  )
  return _PAGE.format(title=_text(words.title(sweep)), style=_STYLE, body=body)


def _arms(sweep, table, answers) -> str:
  tests = {test.row.arm: (test, answer) for answer in answers for test in answer.tests if test.row}
  states, rows = verdict.states(answers), []
  for row in table:
    test, answer = tests.get(row.arm, (None, None))
    is_bounded = test and test.excess and test.excess.over == intervals.BOTH
    rows.append(
      [
        row.label,
        f'{row.parameters:,}',
        f'{row.trials[0].entry["scale"]:.4g}',
        f'{row.rate:g}{" (at the edge of the grid)" if row.at_edge else ""}',
        '-' if row.clipped is None else words.percent(row.clipped),
        f'{row.validation:.4f}',
        f'{row.test:.4f}',
        _estimate(test and test.deficit),
        f'{test.excess.upper():+.4f}' if is_bounded else '-',
        words.detectable(test, answer) if is_bounded else '-',
        f'{row.seconds:.0f}',
        len(row.trials),
        states.get(row.arm, '-'),
      ]
    )
  for kind in ('base', 'full'):
    for trials in (
      sweep.chosen(kind).values()
      if kind == 'full'
      else [[trial] for trial in sweep.finished('base')]
    ):
      means = [
        sum(trial.loss(sweep.part(part)) for trial in trials) / len(trials)
        for part in ('validation', 'test')
      ]
      rows.append(
        [
          {'base': 'base model', 'full': 'all of these kernels'}[kind],
          f'{trials[0].entry["trainable_parameters"]:,}',
          '-',
          f'{trials[0].axes["learning_rate"]:g}' if kind == 'full' else '-',
          '-',
          *(f'{mean:.4f}' for mean in means),
          '-',
          '-',
          '-',
          '-',
          len(trials),
          '-',
        ]
      )
  head = [
    'arm',
    'trained parameters',
    'scale',
    'rate',
    'clipped updates',
    'validation loss',
    'test loss',
    'deficit from the reference [95 %]',
    'upper 95 % bound of deficit - margin',
    'detectable at a power of 80 %',
    'seconds',
    'seeds',
    'verdict',
  ]
  return _table(head, rows)


def _pairs(pairs) -> str:
  rows = [
    [
      f'{pair.first.label} minus {pair.second.label}',
      _estimate(pair.difference),
      '-' if pair.p is None else f'{pair.p:.3g}',
    ]
    for pair in pairs
  ]
  head = ['arms', 'difference [95 %, each by itself]', 'p, Holm-corrected']
  return _table(head, rows) if rows else ''


def _truncation(sweep, table) -> str:
  rows = [
    [
      each['label'],
      f'{each["trained"]:.4f}',
      f'{each["truncated"]:.4f}',
      _estimate(each['difference']),
    ]
    for each in compare.truncation(sweep, table)
  ]
  head = ['arm', 'trained', 'truncated', 'truncated - trained [95 %]']
  return _table(head, rows) if rows else ''


def _categories(sweep, table, answers) -> str:
  rows = [
    [
      f'{each["category"]}: {each["label"]}',
      each['records'],
      f'{each["test"]:.4f}',
      _estimate(each['deficit']),
    ]
    for each in compare.categories(sweep, table, answers)
  ]
  note = (
    '<p>For exploration: each interval holds by itself, and among many some miss by chance.</p>'
  )
  head = [
    'category: arm',
    'records',
    'test loss',
    'deficit from the reference [95 %, each by itself]',
  ]
  return note + _table(head, rows) if rows else ''


def _samples(sweep) -> str:
  path = sweep.folder / manifest.SAMPLES
  if not path.exists():
    return ''
  parts = []
  for sample in files.read_json_lines(path):
    answers = {'reference': sample['reference'], **sample['answers']}
    cards = ''.join(
      f'<div class="card"><h4>{_text(name)}</h4><p>{_text(text)}</p></div>'
      for name, text in answers.items()
    )
    parts.append(
      f'<blockquote>{_text(sample["prompt"])}</blockquote><div class="cards">{cards}</div>'
    )
  return ''.join(parts)


def _failed(sweep) -> str:
  rows = [[trial.name, trial.error] for trial in sweep.trials if trial.error is not None]
  return _table(['trial', 'why'], rows) if rows else '<p>None.</p>'


def _configuration(sweep) -> str:
  prints = _table(['of', 'fingerprint'], list(sweep.manifest['fingerprints'].items()))
  config = json.dumps(sweep.manifest['config'], indent=2)
  return (
    f'{prints}<details open><summary>configuration</summary><pre>{_text(config)}</pre></details>'
  )


def _figure(caption: str, pictures: dict[str, bytes]) -> str:
  images = ''.join(
    f'<img class="{theme}" alt="{_text(caption)}" src="data:image/svg+xml;'
    f'base64,{base64.b64encode(svg).decode()}">'
    for theme, svg in pictures.items()
  )
  return f'<figure>{images}<figcaption>{_text(caption)}</figcaption></figure>'


def _table(head: list[str], rows: list[list[Any]]) -> str:
  cells = lambda row, tag: ''.join(f'<{tag}>{_text(x)}</{tag}>' for x in row)
  body = ''.join(f'<tr>{cells(row, "td")}</tr>' for row in rows)
  return (
    f'<div class="wide"><table><thead><tr>{cells(head, "th")}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _estimate(value) -> str:
  return '-' if value is None else str(value)


def _text(value: Any) -> str:
  return html.escape(str(value))


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --ground: #ffffff;
  --line: #d5d9de; --card: #f4f6f8; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--ink);
  background: var(--ground); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h4 { margin: 0; font-size: .85rem; overflow-wrap: anywhere; }
.answer { font-size: 1.15rem; }
figure { display: inline-block; margin: 0 .5rem 1.5rem 0; width: 29rem;
  max-width: 100%; vertical-align: top; }
figure img { width: 100%; height: auto; }
figcaption { font-size: .85rem; }
.dark { display: none; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; }
td:last-child { white-space: normal; }
/* What a row is about stays in view when a narrow window scrolls the rest. */
th:first-child, td:first-child { position: sticky; left: 0; min-width: 8rem;
  white-space: normal; overflow-wrap: anywhere; background: var(--ground); }
pre { overflow-x: auto; font-size: .75rem; background: var(--card);
  padding: .6rem; }
blockquote { margin: 1rem 0 .5rem; padding-left: .8rem; white-space: pre-wrap;
  border-left: 3px solid var(--line); overflow-wrap: anywhere; }
.cards { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr)); }
.card { background: var(--card); padding: .6rem; }
.card p { margin: .3rem 0 0; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --ground: #14171b; --line: #3a4048;
    --card: #20252b; }
  .light { display: none; }
  .dark { display: inline; }
}
@media print {
  :root { --ink: #000000; --ground: #ffffff; --card: #f4f6f8; }
  .light { display: inline; }
  .dark { display: none; }
  figure, tr, .card { break-inside: avoid; }
  td, pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>{body}</body></html>
"""


def main(arguments: list[str]) -> int:
  """Runs the command; prints one line on standard error if something is wrong."""
  if len(arguments) != 1 or arguments[0].startswith('-'):
    print((__doc__ or '').strip(), file=sys.stderr)
    return 0 if arguments == ['--help'] else 1
  try:
    paths = write(arguments[0])
  except (ValueError, OSError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 1
  print('\n'.join(map(str, paths)))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
