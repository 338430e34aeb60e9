"""A sweep's results as one self-contained page.

  python -m experiments.report DIR

Writes DIR/report/: report.html (needs no network and no other file),
results.csv, and every figure as SVG and PNG. Prints their paths.
"""

import base64
import csv
import html
import io
import json
from pathlib import Path
import sys
from typing import Any

from experiments.analysis import compare, spectra
from gemma_jax import files
from gemma_jax.formats import source as source_lib
from gemma_jax.sweep import closing, results

# The largest number of adapters that one similarity map holds legibly.
_MAX_SIMILAR = 12


def write(workdir: str) -> list[Path]:
  """Writes the report of a sweep that has a finished cell.

  Returns:
    Paths of what was written, the page first.

  Raises:
    ValueError: the folder is no sweep's, or no adapter has been trained.
  """
  sweep = results.read(workdir)
  table = compare.rows(sweep)
  folder = Path(workdir) / 'report'
  (folder / 'figures').mkdir(parents=True, exist_ok=True)
  pictures = _figures(sweep, table, folder / 'figures')
  page, rows = folder / 'report.html', folder / 'results.csv'
  page.write_text(_page(sweep, table, pictures), encoding='utf-8')
  _write_csv(sweep, table, rows)
  return [page, rows, *sorted((folder / 'figures').iterdir())]


def _directions(sweep, table) -> dict[str, spectra.Directions]:
  """Of all seeds of the largest rank, and of each other rank's first."""
  largest = max(table, key=lambda row: row.arm['rank'])
  cells = [row.cells[0] for row in table if row is not largest]
  cells = [*cells, *largest.cells][-_MAX_SIMILAR:]
  config = sweep.manifest['config']['model']
  source = source_lib.open_base(config['path'], config['tokenizer'])
  return {c.name: spectra.directions(c, source.config) for c in cells}


def _figures(sweep, table, folder: Path) -> dict[str, tuple[str, dict]]:
  """Name → (caption, theme → SVG); writes the light ones beside the page."""
  from matplotlib import pyplot as plt

  from experiments.analysis import figures

  found = {}
  drawn = figures.all_figures(sweep, table, _directions(sweep, table))
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
    found[name] = (caption, pictures)
  return found


def _write_csv(sweep, table, path: Path) -> None:
  """A line a cell; losses in nats per token."""
  parts = {name: sweep.part(name) for name in ('validation', 'test')}
  chosen = {cell.name for row in table for cell in row.cells}
  axes = sorted({name for cell in sweep.cells for name in cell.axes})
  with path.open('w', newline='', encoding='utf-8') as f:
    writer = csv.writer(f)
    writer.writerow([
        'cell', 'kind', *axes, 'scale', 'rate', 'trainable_parameters',
        'validation_loss', 'test_loss', 'seconds', 'chosen', 'error',
    ])  # fmt: skip
    for cell in sweep.cells:
      done = cell.result is not None
      writer.writerow([
          cell.name, cell.kind, *(cell.axes.get(name, '') for name in axes),
          cell.entry.get('scale', ''), cell.entry.get('rate', ''),
          cell.entry['trainable_parameters'],
          *(cell.loss(part) if done else '' for part in parts.values()),
          cell.result.get('seconds', '') if done else '',
          int(cell.name in chosen), cell.error or '',
      ])  # fmt: skip


def _page(sweep, table, pictures) -> str:
  waiting = [c for c in sweep.cells if c.result is None and c.error is None]
  sections = [
    ('Answer', f'<p class="answer">{_text(compare.answer(sweep, table))}</p>'),
    ('Ranks', _ranks(sweep, table)),
    ('Figures', ''.join(_figure(*each) for each in pictures.values())),
    ('Truncated or trained', _truncation(sweep, table)),
    ('By category', _categories(sweep, table)),
    ('Sample answers', _samples(sweep)),
    ('Failed cells', _failed(sweep)),
    ('Cells', f'<pre>{_text(results.table(sweep))}</pre>'),
    ('Configuration and fingerprints', _configuration(sweep)),
  ]
  if waiting:
    note = f'{len(waiting)} cells have not ended: this is a part of the sweep.'
    sections.insert(1, ('Not finished', f'<p>{note}</p>'))
  body = ''.join(
    f'<section><h2>{title}</h2>{content}</section>'
    for title, content in sections
    if content
  )
  title = f'Rank ablation of {sweep.manifest["base"]}'
  return _PAGE.format(title=_text(title), style=_STYLE, body=body)


def _ranks(sweep, table) -> str:
  rows = []
  for row in table:
    d = row.difference
    rows.append([
        row.label, f'{row.parameters:,}', f'{row.cells[0].entry["scale"]:.4g}',
        f'{row.rate:g}', f'{row.validation:.4f}', f'{row.test:.4f}',
        f'{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]',
        f'{row.p_adjusted:.3g}', f'{row.seconds:.0f}', len(row.cells),
    ])  # fmt: skip
  for kind in ('base', 'full'):
    for cells in (
      sweep.chosen(kind).values()
      if kind == 'full'
      else [[cell] for cell in sweep.finished('base')]
    ):
      means = [
        sum(c.loss(sweep.part(part)) for c in cells) / len(cells)
        for part in ('validation', 'test')
      ]
      rows.append([
          {'base': 'base model', 'full': 'all of these kernels'}[kind],
          f'{cells[0].entry["trainable_parameters"]:,}', '-',
          f'{cells[0].axes["learning_rate"]:g}' if kind == 'full' else '-',
          *(f'{mean:.4f}' for mean in means), '-', '-', '-', len(cells),
      ])  # fmt: skip
  head = [
      'arm', 'trained parameters', 'scale', 'rate', 'validation loss',
      'test loss', 'difference from the best [95 %]', 'p, corrected',
      'seconds', 'seeds',
  ]  # fmt: skip
  return _table(head, rows)


def _truncation(sweep, table) -> str:
  rows = [
    [
      each['label'],
      f'{each["trained"]:.4f}',
      f'{each["truncated"]:.4f}',
      _interval(each['difference']),
    ]
    for each in compare.truncation(sweep, table)
  ]
  head = ['arm', 'trained', 'truncated', 'truncated - trained [95 %]']
  return _table(head, rows) if rows else ''


def _categories(sweep, table) -> str:
  found = compare.categories(sweep, table)
  rows = [
    [
      each['category'],
      each['records'],
      each['label'],
      f'{each["test"]:.4f}',
      _interval(each['difference']),
      f'{each["p_adjusted"]:.3g}',
    ]
    for each in found
  ]
  head = [
      'category', 'records', 'arm', 'test loss',
      'difference from the best [95 %]', 'p, corrected',
  ]  # fmt: skip
  return _table(head, rows) if rows else ''


def _samples(sweep) -> str:
  path = sweep.folder / closing.SAMPLES
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
      f'<blockquote>{_text(sample["prompt"])}</blockquote>'
      f'<div class="cards">{cards}</div>'
    )
  return ''.join(parts)


def _failed(sweep) -> str:
  rows = [[c.name, c.error] for c in sweep.cells if c.error is not None]
  return _table(['cell', 'why'], rows) if rows else '<p>None.</p>'


def _configuration(sweep) -> str:
  prints = _table(
    ['of', 'fingerprint'], list(sweep.manifest['fingerprints'].items())
  )
  config = json.dumps(sweep.manifest['config'], indent=2)
  return (
    f'{prints}<details open><summary>configuration</summary>'
    f'<pre>{_text(config)}</pre></details>'
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


def _interval(d) -> str:
  return f'{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]'


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
  """Runs the command; one line on standard error where something is wrong."""
  if len(arguments) != 1 or arguments[0].startswith('-'):
    print(__doc__.strip(), file=sys.stderr)
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
