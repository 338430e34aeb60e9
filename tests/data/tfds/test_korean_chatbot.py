"""The builder of the Korean pairs."""

import pytest

from gemma_jax.config.train import DataConfig
from gemma_jax.data import sources, tfds
from tests import data_toy


def parse(content):
  from gemma_jax.data.tfds.korean_chatbot import KoreanChatbot

  return list(KoreanChatbot.parse(KoreanChatbot, content.encode()))


def test_rows_are_instructions():
  assert parse('Q,A,label\n12시 땡!,하루가 또 가네요.,0\n') == [
    {'instruction': '12시 땡!', 'response': '하루가 또 가네요.', 'category': '0'}
  ]
  # Quotes, a line break and a BOM, as a spreadsheet writes them.
  assert parse('\ufeffQ,A,label\r\n"a, ""b""","c\nd",2\r\n') == [
    {'instruction': 'a, "b"', 'response': 'c\nd', 'category': '2'}
  ]


@pytest.mark.parametrize(
  'content, message',
  [
    ('', "line 1: got '', expected the header 'Q,A,label'"),
    ('A,Q,label\n', "line 1: got 'A,Q,label'"),
    ('Q,A,label\na,b,0\na,b\n', 'line 3: got 2 fields, expected 3'),
  ],
)
def test_another_layout_is_refused(content, message):
  with pytest.raises(ValueError, match=message):
    parse(content)


def test_real_chatbot_is_a_source(tmp_path):
  path = data_toy.shared_file('korean-chatbot-qa/ChatbotData.csv')
  config = DataConfig(path=f'tfds:korean_chatbot:{path}', template='korean')
  found = sources.load_records(config, str(tmp_path))
  test = tfds.read_split('korean_chatbot', 'test', path, str(tmp_path))
  assert len(found.train) + len(found.heldout) + len(test) == 11_823
  train = {record.question for record in found.train}
  heldout = {record.question for record in found.heldout}
  assert not train & (heldout | {row['instruction'] for row in test})
