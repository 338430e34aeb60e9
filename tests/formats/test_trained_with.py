"""How an adapter was trained: kept beside it, taken up again, or refused."""

import dataclasses
import json
import logging

import pytest

from gemma_jax.config.train import LoraConfig
from gemma_jax.export import convert
from gemma_jax.formats import adapter, open_base, peft, trained_with
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.runs import train
from tests import run_toy, toy

KOREAN = TrainedWith('korean', 'all', 96)
CHAT = TrainedWith('chat', 'response', 128)
NOTHING = {'template': None, 'loss_on': None, 'seq_len': None, 'parse_control_tokens': None}


def write(folder, with_=None):
  config = LoraConfig(rank=2)
  base = open_base.open_base('random:tiny3')
  factors = toy.factors(base.config, config)
  peft.write_adapter(folder, factors, config, 'b', trained_with=with_)
  return str(folder)


def test_training_leaves_it_and_peft_form_keeps_it(tmp_path):
  config = run_toy.config(run_toy.write_records(tmp_path), steps=2)
  config.data.template, config.data.loss_on = 'korean', 'all'
  workdir = tmp_path / 'run'
  result = train.train(config.resolve(), str(workdir))
  for name in ('adapter', 'adapter_best'):
    assert adapter.read_trained_with(workdir / name) == KOREAN
  convert.convert('random:tiny3', str(tmp_path / 'peft'), 'peft', result['adapter'])
  assert adapter.read_trained_with(tmp_path / 'peft') == KOREAN
  assert json.loads((tmp_path / 'peft' / trained_with.NAME).read_text()) == {
    'template': 'korean',
    'loss_on': 'all',
    'seq_len': 96,
    'parse_control_tokens': False,
  }
  base = open_base.open_base('random:tiny3')
  loaded = adapter.load_adapters([result['adapter']], base.config)
  assert loaded[result['adapter']].trained_with == KOREAN


def test_an_adapter_of_others_says_nothing(tmp_path):
  assert adapter.read_trained_with(write(tmp_path / 'a')) is None
  (tmp_path / 'a.lora.h5').write_bytes(b'')
  assert adapter.read_trained_with(tmp_path / 'a.lora.h5') is None


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{', 'cannot be read as JSON'),
    ('[]', 'got fields list, expected'),
    ('{"template": "dolly"}', r"got fields \['template'\], expected"),
    (
      '{"template": "x", "loss_on": "all", "seq_len": 9, PARSE}',
      "data.template: got 'x', expected one of dolly",
    ),
    ('{"template": ["dolly"], "loss_on": "all", "seq_len": 9, PARSE}', 'gemma_jax.js'),
    (
      '{"template": "dolly", "loss_on": "none", "seq_len": 9, PARSE}',
      "got loss_on='none', expected response or all",
    ),
    (
      '{"template": "dolly", "loss_on": "all", "seq_len": -1, PARSE}',
      'got seq_len=-1, expected an integer >= 0',
    ),
  ],
)
def test_a_broken_file_is_one_line(content, message, tmp_path):
  folder = write(tmp_path / 'a', KOREAN)
  content = content.replace('PARSE', '"parse_control_tokens": false')
  (tmp_path / 'a' / trained_with.NAME).write_text(content)
  base = open_base.open_base('random:tiny3')
  with pytest.raises(ValueError, match=message) as error:
    adapter.load_adapters([folder], base.config)
  assert '\n' not in str(error.value)
  assert trained_with.NAME in str(error.value)


def test_what_was_trained_is_the_default(caplog):
  choose = trained_with.choose
  assert choose({}, NOTHING) == TrainedWith('dolly', 'response')
  assert choose({'a': None}, NOTHING) == TrainedWith()
  # Whole records, however long the rows of training were.
  whole = TrainedWith('korean', 'all', 0, True)
  parsing = dataclasses.replace(whole, seq_len=96)
  longer = dataclasses.replace(whole, seq_len=256)
  assert choose({'a': parsing, 'b': longer}, NOTHING) == whole
  assert choose({'base': parsing}, NOTHING) == whole
  caplog.clear()
  assert choose({'a': parsing}, NOTHING | {'seq_len': 0}) == whole
  assert not caplog.text
  assert not caplog.records


def test_what_is_measured_as_its_neighbour_is_said(caplog):
  with caplog.at_level(logging.WARNING):
    got = trained_with.choose({'a': None, 'b': KOREAN}, {**NOTHING, 'loss_on': 'all'})
  assert got == TrainedWith('korean', 'all', 0)
  assert [record.getMessage() for record in caplog.records] == [
    'a has no gemma_jax.json: it is measured with template=korean, as b was trained',
    'a has no gemma_jax.json: it is measured with parse_control_tokens=False, as b was trained',
  ]


def test_what_was_told_wins_with_a_warning(caplog):
  told = NOTHING | {'template': 'dolly', 'seq_len': 96}
  with caplog.at_level(logging.WARNING):
    got = trained_with.choose({'a': KOREAN}, told)
  assert got == TrainedWith('dolly', 'all', 96)
  (record,) = caplog.records
  assert record.getMessage() == '--template=dolly: a was trained with korean'


def test_adapters_of_two_templates_are_not_measured_together():
  both = {'A': KOREAN, 'B': CHAT}
  message = '--template: A was trained with korean, B with chat.*--template=kor'
  with pytest.raises(ValueError, match=message):
    trained_with.choose(both, NOTHING)
  with pytest.raises(ValueError, match='--loss_on: A was trained with all'):
    trained_with.choose(both, {**NOTHING, 'template': 'plain'})


def test_each_adapter_is_asked_as_it_was_trained(caplog):
  parsing = dataclasses.replace(CHAT, parse_control_tokens=True)
  both = {'A': KOREAN, 'B': parsing, 'C': None}
  ask = trained_with.asked_with
  asked = ask(['base', 'A', 'B', 'C'], both, NOTHING)
  assert asked == {'base': KOREAN, **both, 'C': TrainedWith()}
  assert ask(['base'], {}, NOTHING) == {'base': TrainedWith()}
  assert ask(['base', 'A'], {'A': KOREAN}, NOTHING, CHAT) == {'base': CHAT, 'A': KOREAN}
  assert not caplog.records
  told = NOTHING | {'template': 'plain', 'parse_control_tokens': False}
  with caplog.at_level(logging.WARNING):
    asked = ask(['base', *both], both, told)
  assert {each.template for each in asked.values()} == {'plain'}
  assert not any(each.parse_control_tokens for each in asked.values())
  assert [record.getMessage() for record in caplog.records] == [
    '--template=plain: A was trained with korean',
    '--template=plain: B was trained with chat',
    '--parse_control_tokens=False: B was trained with True',
  ]
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    assert ask(['base'], {}, {'template': 'dolly'}, KOREAN)['base'].template == 'dolly'
  assert caplog.messages == ['--template=dolly: base was trained with korean']


def test_a_start_with_another_template_is_said(tmp_path, caplog):
  config = run_toy.config(run_toy.write_records(tmp_path))
  config.lora.path = write(tmp_path / 'a', KOREAN)
  base = open_base.open_base('random:tiny3')
  with caplog.at_level(logging.WARNING):
    adapter.start_from(config.resolve(), base)
  assert 'data.template: got dolly, but' in caplog.text
