"""Control tokens in texts: plain characters, counted, or parsed when asked."""

import logging

import pytest

from gemma_jax.data import encoding, examples
from gemma_jax.data.record import asking
from gemma_jax.data.templates import Span
from gemma_jax.data.tokenizer import AddedToken, SentencePieceTokenizer
from tests import data_toy

TOKENIZER = data_toy.make_tokenizer()
START, END = (TOKENIZER.control_id(name) for name in data_toy.TURNS)

# As another program renders a chat, and what it says.
RENDERED = {
  'prompt': '<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n',
  'response': 'ab<end_of_turn>',
}


def make(*rows, **kwargs):
  records = data_toy.records(rows)
  return examples.make_examples(records, TOKENIZER, 'plain', **kwargs)


def test_a_spelled_control_token_stays_text_and_is_counted():
  plain = {'prompt': 'Hi <b> [x]', 'response': 'ab'}
  made = make(RENDERED, plain)
  assert made.stats.spelling_controls == 1
  assert made.stats.warnings('data')
  tokens = made[0].tokens.tolist()
  assert START not in tokens
  assert END not in tokens
  assert tokens.count(2) == 1
  text = TOKENIZER.decode(tokens)
  assert text == RENDERED['prompt'] + RENDERED['response']


def test_a_rendered_text_is_what_the_chat_template_makes():
  """No second BOS, and the end of the turn is learned."""
  (parsed,) = make(RENDERED, parse_control_tokens=True)
  (chat,) = examples.make_examples(
    data_toy.records([{'prompt': 'Hi', 'response': 'ab'}]), TOKENIZER, 'chat'
  )
  assert parsed.tokens.tolist() == chat.tokens.tolist()
  assert parsed.loss_mask.tolist() == chat.loss_mask.tolist()
  made = make(RENDERED, parse_control_tokens=True)
  assert made.stats.spelling_controls == 1
  assert made.stats.warnings('data') == []


@pytest.mark.parametrize('blank', ['', ' ', '\n'])
def test_spelled_ends_are_not_doubled(blank):
  row = {'prompt': f'{blank}<bos>Hi', 'response': f'ab<eos>{blank}'}
  (example,) = make(row, parse_control_tokens=True)
  hi, ab = TOKENIZER.encode('Hi'), TOKENIZER.encode('ab')
  assert example.tokens.tolist() == [2, *hi, *ab, 1]
  ids = examples.prompt_tokens(TOKENIZER, 'plain', asking('<bos>Hi'), True)
  assert ids == [2, *TOKENIZER.encode('Hi')]


def test_a_parsed_conversation_is_shortened_as_one_text():
  turn = '<start_of_turn>user\n{}<end_of_turn>\n'
  row = {'prompt': turn.format('b' * 20) + turn.format('a' * 20), 'response': 'ab<end_of_turn>'}
  made = make(row, parse_control_tokens=True, seq_len=40)
  text = TOKENIZER.decode(made[0].tokens.tolist())
  assert text.startswith('user\nbbb')
  assert text.endswith('aaa\nab')


@pytest.mark.parametrize('seq_len', [16, 20, 30, 40])
def test_parsed_control_tokens_are_never_cut(seq_len):
  row = {
    'prompt': f'<start_of_turn>user\n{"a" * 50}<end_of_turn>\n<start_of_turn>u',
    'response': 'ab<end_of_turn>',
  }
  made = make(row, parse_control_tokens=True, seq_len=seq_len)
  tokens = made[0].tokens.tolist()
  assert len(tokens) == seq_len
  assert tokens.count(START) == 2
  assert tokens.count(END) == 2
  assert made.stats.lost_prompts == 1


def test_parts_of_a_span_keep_their_ranges():
  span = Span('ab<bos>cde', spare=((1, 9),), last_spare=((0, 1),))
  parts = list(encoding._parsed(span, encoding._Finder({'<bos>': 2})))
  assert [(p.text, p.spare, p.last_spare) for p in parts] == [
    ('ab', ((1, 2),), ((0, 1),)),
    ('<bos>', (), ()),
    ('cde', ((0, 2),), ((0, 0),)),
  ]


@pytest.mark.parametrize(
  'name',
  [
    '<<SYS>>',
    '<|tool call|>',
    '<｜tool▁call｜>',
    '###Human',
    f'<{"x" * 45}>',
    '<bos>.',
    '<a',
    '[[I]]',
  ],
)
def test_added_tokens_of_any_spelling_are_found(name):
  n = TOKENIZER.vocab_size
  added = [AddedToken(n + 1, name, True)]  # row n has no text
  tokenizer = SentencePieceTokenizer(TOKENIZER.model_proto, 'toy', added)
  text = f'a<bos>b <n{name}c [x] <eos><row {n}>'

  def encode(parse):
    (document,) = encoding.encode([[Span(text)]], tokenizer, parse)
    assert document.spells_controls
    return [i for piece in document.pieces for i in piece.ids]

  letters = lambda text: tokenizer.encode(text)
  want = [2, *letters('a'), 2, *letters('b <n'), n + 1, *letters('c [x] ')]
  assert encode(True) == [*want, 1, *letters(f'<row {n}>')]
  assert encode(False) == [2, *letters(text)]
  (document,) = encoding.encode([[Span(name)]], tokenizer)
  assert document.spells_controls
  (document,) = encoding.encode([[Span(f'x<row {n}>')]], tokenizer)
  assert not document.spells_controls


@pytest.mark.parametrize('template', ['plain', 'chat'])
def test_a_prompt_that_spells_control_tokens_is_said(template, caplog):
  with caplog.at_level(logging.WARNING):
    examples.prompt_tokens(TOKENIZER, template, asking('<bos>Hi'))
  (message,) = caplog.messages
  assert 'data.parse_control_tokens=True' in message
  assert ('template=chat' in message) == (template != 'chat')
