"""The report of a real, tiny sweep: complete, self-contained, and legible."""

import csv
import html
import html.parser
import itertools
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys

import pytest

from experiments import report
from experiments.analysis import arms, tables, verdict
from gemma_jax.sweep import results, worker
from tests import made_sweep, sweep_toy

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')

pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """(folder of the sweep, what `report.write` returned)."""
  folder = tmp_path_factory.mktemp('report')
  records = sweep_toy.write_records(folder)
  config = sweep_toy.config(records, ranks=(1, 2, 5, 99))
  worker.run(config.resolve(), str(folder / 'sweep'))
  return folder / 'sweep', report.write(str(folder / 'sweep'))


class Page(html.parser.HTMLParser):
  """Checks that tags close, and collects attributes and headings."""

  VOID = ('meta', 'img', 'br')

  def __init__(self, text):
    super().__init__()
    self.stack, self.attributes, self.headings = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.attributes += [(tag, *pair) for pair in attrs]
    if tag not in self.VOID:
      self.stack.append(tag)

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag

  def handle_data(self, data):
    if self.stack and self.stack[-1] == 'h2':
      self.headings.append(data)


def test_the_page_needs_nothing_else_and_has_every_part(written):
  page = Page(written[1][0].read_text())
  assert page.stack == []
  assert page.headings[0] == 'Answer'
  assert set(page.headings) == {
    'Answer',
    'Arms',
    'Figures',
    'Truncated or trained',
    'By category',
    'Sample answers',
    'Failed trials',
    'Trials',
    'Configuration and fingerprints',
  }
  links = [a for a in page.attributes if a[1] in ('src', 'href')]
  assert len(links) >= 2 * 9
  assert all(a[2].startswith('data:image/svg+xml;base64,') for a in links)
  assert 'url(' not in written[1][0].read_text()


def test_csv_has_a_line_for_every_cell(written):
  with open(written[1][1], newline='') as f:
    rows = {row['cell']: row for row in csv.DictReader(f)}
  assert len(rows) == 1 + 16 + 4  # base, adapters, truncated
  assert rows['r99-s0-lr0.001']['error'].startswith('lora.rank: got 99')
  done = [row for row in rows.values() if row['kind'] == 'lora']
  assert sum(int(row['chosen']) for row in done) == 6
  assert float(rows['r5-s0-lr0.01']['scale']) == 1.0
  assert 1 < float(rows['base']['test_loss']) < 9
  assert {row['rate_at_edge'] for row in done if row['chosen'] == '1'} == {'1'}
  assert all(0 <= float(row['clipped_share']) <= 1 for row in done if not row['error'])
  # Rank 99 was refused before the start, so the reference is rank 5.
  assert {r['rank']: r['state'] for r in done if r['chosen'] == '1'} == {
    '1': 'no verdict',
    '2': 'no verdict',
    '5': 'reference',
  }


def test_losses_by_record_are_kept_and_give_the_losses_again(written):
  with open(written[1][1], newline='') as f:
    cells = [row for row in csv.DictReader(f) if not row['error']]
  with open(written[1][2], newline='') as f:
    records = list(csv.DictReader(f))
  assert len(records) == 16
  assert {record['category'] for record in records} == {*sweep_toy.CATEGORIES}
  for part in ('validation', 'test'):
    mine = [record for record in records if record['part'] == part]
    tokens = sum(int(record['tokens']) for record in mine)
    for cell in cells:
      nll = sum(float(record[f'nll {cell["cell"]}']) for record in mine)
      assert nll / tokens == pytest.approx(float(cell[f'{part}_loss']), rel=1e-8)


def page_of(sweep, folder) -> tuple[str, list[dict[str, str]]]:
  """(the page without figures, rows of results.csv) of a sweep's folder."""
  sweep = results.read(made_sweep.write(sweep, folder))
  table = arms.rows(sweep)
  answers = verdict.answers(sweep, table)
  text = report.page(sweep, table, answers, {})
  assert Page(text).stack == []
  assert 'nan' not in text
  tables.write_trials(sweep, table, answers, folder / 'results.csv')
  with open(folder / 'results.csv', newline='') as f:
    return html.unescape(text), list(csv.DictReader(f))


def test_two_arms_and_six_get_the_same_answer(tmp_path):
  levels = {1: 0.3, 2: 0.1, 4: 0.02, 8: 0.0, 16: 0.0, 32: 0.0}
  six, rows = page_of(made_sweep.make(levels), tmp_path / 'six')
  two, _ = page_of(made_sweep.make({r: levels[r] for r in (16, 32)}), tmp_path / 'two')
  # The whole line of the table: deficit, bound, power, verdict.
  (line,) = re.findall(r'<tr><td>rank 16</td>.*?</tr>', two)
  assert 'holds' in line
  assert line in six
  assert 'Rank 4 is enough' in six
  assert 'Rank 16 is enough' in two
  states = {row['rank']: row['state'] for row in rows if row['chosen'] == '1'}
  assert states == {
    '1': 'not reached',
    '2': 'does not hold',
    '4': 'holds',
    '8': 'holds',
    '16': 'holds',
    '32': 'reference',
  }


def test_a_noisy_arm_and_one_without_a_common_seed(tmp_path):
  levels = {2: 0.0, 4: -0.05, 8: 0.0}
  noisy, _ = page_of(made_sweep.make(levels, noise={2: 0.02, 4: 9.0, 8: 0.02}), tmp_path / 'a')
  assert 'Undecided' in noisy
  assert 'is enough' not in noisy
  apart, _ = page_of(
    made_sweep.make(levels, seeds={2: range(5), 4: (7, 8, 9), 8: range(5)}), tmp_path / 'b'
  )
  assert 'Rank 4 cannot be compared: it has no seed in common' in apart
  (line,) = re.findall(r'<tr><td>rank 4</td>.*?</tr>', apart)
  assert line.endswith('<td>not comparable</td></tr>')


def test_one_seed_and_a_category_of_one_record(tmp_path):
  sweep = made_sweep.make({4: 0.1, 8: 0.0}, seeds=1)
  sweep.heldout[0]['category'] = 'rare'
  text, _ = page_of(sweep, tmp_path)
  caveat = 'Fewer than 3 seeds (all arms) give no interval over seeds'
  assert text.index(caveat) < text.index('No verdict on ranks below rank 8')
  (line,) = re.findall(r'<tr><td>other, 1 category: rank 4</td>.*?</tr>', text)
  assert line.endswith('(no interval: 1 record)</td></tr>')
  assert len(re.findall('over records at these seeds', text)) >= 3


@pytest.mark.parametrize(
  ('axis', 'values', 'equal', 'title', 'alike'),
  [
    ('scale_rule', ('constant', 'alpha_over_r'), False, 'Scale rule and rank', 'rank'),
    ('init', ('peft', 'keras'), False, 'Init and rank', 'rank'),
    ('targets', ('qv', 'all'), True, 'Targets and number of parameters', 'number of parameters'),
    (
      'factorization',
      ('matrix', 'keras'),
      True,
      'Factorization and number of parameters',
      'number of parameters',
    ),
  ],
)
def test_an_ablation_is_worded_by_its_axes(tmp_path, axis, values, equal, title, alike):
  first, second = values
  levels = {(first, 4): 0.2, (first, 8): 0.0, (second, 4): 0.2, (second, 8): 0.1}
  sweep = made_sweep.make(levels, axis=axis, equal_parameters=equal)
  text, _ = page_of(sweep, tmp_path)
  assert f'<h1>{title} of adapters on made</h1>' in text
  said = axis.replace('_', ' ')
  pairs = f'Pairs of arms of the same {alike} that differ in {said}: 2.'
  verdict_text = (
    f'No verdict on ranks below "{first}, rank 8"; "{second}, rank 8", the references: '
  )
  assert text.index(pairs) < text.index(verdict_text)
  assert f'adapters differ in {said} too' in text
  prose = ' '.join(re.findall(r'<p class="answer">(.*?)</p>', text))
  # Every label of the prose stands in quotes.
  assert len(re.findall('"[^"]*, rank [48]"', prose)) == len(re.findall(', rank', prose)) >= 4


def test_ranks_alone_are_titled_and_not_quoted(tmp_path):
  text, _ = page_of(made_sweep.make({4: 0.2, 8: 0.0}), tmp_path)
  assert '<h1>Rank of adapters on made</h1>' in text
  assert '"' not in ' '.join(re.findall(r'<p class="answer">(.*?)</p>', text))


@pytest.mark.parametrize('what', ['rank', 'parameters'])
def test_ticks_do_not_collide_and_the_legend_covers_nothing(what):
  from matplotlib import pyplot as plt

  from experiments.analysis import figures

  ranks = (1, 8, 9, 32, 33, 34)
  values = ('constant', 'alpha_over_r', 'alpha_over_sqrt_r')
  levels = {(value, rank): 1 / rank for value in values for rank in ranks}
  table = arms.rows(made_sweep.make(levels, axis='scale_rule', rates=(1e-3,), seeds=1))
  with figures.theme('light') as colours:
    figure = plt.figure(figsize=figures.SIZE)
    figures.draw_losses(figure, colours, table, [], what)
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) >= 3
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    assert legend.get_window_extent().y1 < axes.get_tightbbox().y0
    assert figure.bbox.contains(*legend.get_window_extent().min)
    plt.close(figure)


def test_figures_are_written_as_svg_and_png(written):
  names = {path.name for path in written[1][3:]}
  for name in (
    'loss_by_rank',
    'loss_by_parameters',
    'loss_by_seconds',
    'learning_curves',
    'truncation',
    'spectrum_attn_q',
    'effective_rank',
    'energy',
    'similarity',
  ):
    assert {f'{name}.svg', f'{name}.png'} <= names


def test_the_same_sweep_gives_the_same_page(written):
  before = written[1][0].read_bytes()
  report.write(str(written[0]))
  assert written[1][0].read_bytes() == before


def call(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.report', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )


def test_a_folder_that_is_no_sweep_is_one_line(tmp_path):
  done = call(str(tmp_path))
  assert done.returncode == 1
  assert done.stderr.startswith('error: ')
  assert 'manifest.json' in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_a_sweep_without_a_finished_cell_is_refused(written, tmp_path):
  for name in ('manifest.json', 'heldout.jsonl'):
    shutil.copy(written[0] / name, tmp_path)
  with pytest.raises(ValueError, match='no finished trial'):
    report.write(str(tmp_path))
  assert not (tmp_path / 'report').exists()


_MEASURE = """<script>onload = () => {
  const wide = document.documentElement.scrollWidth;
  const small = [...document.images].filter(
    x => x.offsetParent && (!x.complete || x.naturalWidth < 100));
  const hidden = [...document.querySelectorAll('.wide')].flatMap(wide => {
    wide.scrollLeft = 1e6;
    return [...wide.querySelectorAll('tr > :first-child')];
  }).filter(cell => cell.getBoundingClientRect().left < 0);
  const shown = [...document.images].filter(x => x.offsetParent);
  document.title = JSON.stringify({
    wide: wide, inner: innerWidth, small: small.length, shown: shown.length, hidden: hidden.length,
    classes: [...new Set(shown.map(x => x.className))]});
}</script>"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed')
@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1200])
def test_in_a_browser(written, tmp_path, width, theme):
  """Nothing is wider than the window; figures of the theme and keys of scrolled rows are shown."""
  text = written[1][0].read_text()
  # Headless Chromium's own windows are at least 500 wide: a frame is not.
  inner = tmp_path / 'inner.html'
  inner.write_text(text.replace('</head>', f'{_MEASURE}</head>'))
  outer = tmp_path / 'outer.html'
  outer.write_text(
    f'<body style="margin:0"><iframe src="inner.html" id=f style="border:0;'
    f'width:{width}px;height:6000px"></iframe><script>onload=()=>setTimeout('
    '()=>document.title=f.contentDocument.title,500)</script>'
  )
  done = subprocess.run(
    [
      CHROMIUM,
      '--headless',
      '--no-sandbox',
      '--disable-gpu',
      '--disable-quic',
      '--no-first-run',
      '--disable-background-networking',
      '--disable-component-update',
      '--disable-sync',
      '--allow-file-access-from-files',
      '--virtual-time-budget=4000',
      f'--user-data-dir={tmp_path}/profile',
      *(
        ['--blink-settings=preferredColorScheme=0']
        if theme == 'dark'
        else ['--blink-settings=preferredColorScheme=1']
      ),
      f'--window-size={width},6000',
      f'--screenshot={tmp_path}/{theme}-{width}.png',
      '--dump-dom',
      outer.as_uri(),
    ],
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  (title,) = re.findall(r'<title>(\{.*?\})</title>', done.stdout) or [None]
  assert title, done.stderr[-2000:]
  found = json.loads(html.unescape(title))
  assert found['inner'] == width
  assert found['wide'] <= width
  assert found['small'] == 0
  assert found['hidden'] == 0
  assert found['shown'] >= 9
  assert found['classes'] == [theme]
