"""The builder of the sentence pairs; no sentence in two splits."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from gemma_jax.config.train import DataConfig
from gemma_jax.data import sources, tfds
from tests import data_toy


def builder_class():
  from gemma_jax.data.tfds.tatoeba_en_ko import TatoebaEnKo

  return TatoebaEnKo


def parse(content):
  return list(builder_class().parse(builder_class(), content.encode()))


def test_rows_keep_their_attribution():
  assert parse('Hi.\t안녕.\tCC-BY 2.0: #1 (a) & #2 (b)\r\n\n') == [
    {'en': 'Hi.', 'ko': '안녕.', 'attribution': 'CC-BY 2.0: #1 (a) & #2 (b)'}
  ]
  with pytest.raises(ValueError, match='line 2: got 2 fields between tabs'):
    parse('a\tb\tc\nd\te\n')


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 13), st.integers(0, 13)), max_size=31))
def test_groups_are_connected_sentences(pairs):
  """Two pairs share a group if and only if sentences link them."""
  rows = [{'en': f's{a}', 'ko': f's{b}'} for a, b in pairs]
  groups = builder_class().prompts(builder_class(), rows)
  linked = {(i, i) for i in range(len(pairs))} | {
    (i, j)
    for (i, (a, b)), (j, (c, d)) in itertools.product(enumerate(pairs), repeat=2)
    if a == c or b == d
  }
  for k, i, j in itertools.product(range(len(pairs)), repeat=3):
    if (i, k) in linked and (k, j) in linked:
      linked.add((i, j))
  for i, j in itertools.product(range(len(pairs)), repeat=2):
    assert (groups[i] == groups[j]) == ((i, j) in linked)


def test_groups_do_not_depend_on_the_order():
  rows = [{'en': e, 'ko': k} for e, k in ('ax', 'bx', 'by', 'cz', 'cx')]
  groups = builder_class().prompts(builder_class(), rows)
  backwards = builder_class().prompts(builder_class(), rows[::-1])
  assert groups == backwards[::-1]


def test_real_tatoeba_is_a_source_in_both_directions(tmp_path):
  path = data_toy.shared_file('tatoeba-en-ko/kor.txt')
  found = {
    template: sources.load_records(
      DataConfig(path=f'tfds:tatoeba_en_ko:{path}', template=template), str(tmp_path)
    )
    for template in ('en_ko', 'ko_en')
  }
  turned = lambda part: [r.turns[0].text for r in part]
  answers = lambda part: [r.turns[1].text for r in part]
  for part in ('train', 'heldout'):
    there, back = (getattr(f, part) for f in found.values())
    assert (turned(there), answers(there)) == (answers(back), turned(back))
  train, heldout = found['en_ko'].train, found['en_ko'].heldout
  test = tfds.read_split('tatoeba_en_ko', 'test', path, str(tmp_path))
  assert len(train) + len(heldout) + len(test) == 5749
  assert all('tatoeba.org' in row['attribution'] for row in test)
  assert f'attribution × {len(train) + len(heldout):,}' in found['en_ko'].lines()[0]
  for i, field in enumerate(('en', 'ko')):
    others = {r.turns[i].text for r in heldout} | {r[field] for r in test}
    assert not {r.turns[i].text for r in train} & others
