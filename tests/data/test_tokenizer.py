"""SentencePiece from a file or rebuilt, bytes, control tokens, streams."""

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from gemma_jax.data import tokenizer as tokenizer_lib
from tests import data_toy

SENTENCEPIECE = data_toy.make_tokenizer()
BYTES = tokenizer_lib.ByteTokenizer()
both = pytest.mark.parametrize('tokenizer', [SENTENCEPIECE, BYTES], ids=['sentencepiece', 'bytes'])

# U+2581 is SentencePiece's own space, so that it comes back as one.
texts = st.text(
  st.one_of(
    st.sampled_from('ab Hiuser\n가<>_'),
    st.characters(exclude_categories=['Cs'], exclude_characters='\u2581'),
  )
)


@both
@settings(deadline=None)
@given(text=texts)
def test_decoding_undoes_encoding(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert all(0 <= i < tokenizer.vocab_size for i in ids)


@both
@settings(deadline=None)
@given(st.data())
def test_streaming_gives_the_decoded_text(tokenizer, data):
  ids = st.integers(0, tokenizer.vocab_size - 1)
  chunks = data.draw(st.lists(st.lists(ids)))
  stream = tokenizer_lib.StreamDecoder(tokenizer)
  streamed = ''.join(stream.push(chunk) for chunk in chunks) + stream.flush()
  assert streamed == tokenizer.decode(i for chunk in chunks for i in chunk)


@both
@settings(deadline=None)
@given(text=texts.filter(lambda text: '\ufffd' not in text))
def test_streaming_never_breaks_a_character(tokenizer, text):
  stream = tokenizer_lib.StreamDecoder(tokenizer)
  pushed = [stream.push([token_id]) for token_id in tokenizer.encode(text)]
  assert '\ufffd' not in ''.join(pushed)
  assert stream.flush() == ''


@both
@settings(deadline=None)
@given(batch=st.lists(texts))
def test_encoding_many_is_encoding_each(tokenizer, batch):
  assert tokenizer.encode_all(batch) == [tokenizer.encode(t) for t in batch]


@pytest.mark.parametrize(
  'turn_type', [tokenizer_lib.CONTROL, tokenizer_lib.USER_DEFINED, tokenizer_lib.NORMAL]
)
def test_control_tokens_are_never_parsed_from_text(turn_type):
  tokenizer = data_toy.make_tokenizer(turn_type=turn_type)
  names = (*data_toy.CONTROL, *data_toy.TURNS)
  text = ''.join(names)
  ids = tokenizer.encode(text)
  assert not set(ids) & set(range(len(names)))
  assert tokenizer.decode(ids) == text
  for token_id, name in enumerate(names):
    if name != '<unk>':
      assert tokenizer.control_id(name) == token_id
    assert tokenizer.decode([token_id]) == ''
  assert tokenizer.end_of_turn_id == names.index('<end_of_turn>')


@pytest.mark.parametrize('kind', [tokenizer_lib.USER_DEFINED, tokenizer_lib.NORMAL])
def test_special_pieces_of_every_release_stay_text(kind):
  special = (
    '<2mass>',
    '[@BOS@]',
    '[toxicity=0]',
    '[multimodal]',
    '<start_of_image>',
    '<end_of_image>',
    '<image_soft_token>',
    '<start_of_audio>',
    '<|turn>',
    '<turn|>',
    '<|"|>',
    '<|tool_call>',
    '<tool_call|>',
    '<unused6241>',
  )
  text = ('<b>', '</b>', '<table>', '\n\n\n', '\t\t', '[]', '<=>', '<|>')
  pieces, scores, types = data_toy.vocabulary()
  first = len(pieces)
  added = (*special, *text)
  tokenizer = tokenizer_lib.SentencePieceTokenizer(
    tokenizer_lib.build_model_proto(
      [*pieces, *added],
      [*scores, *(-float(first + i) for i in range(len(added)))],
      [*types, *[kind] * len(special), *[tokenizer_lib.USER_DEFINED] * len(text)],
    )
  )
  for token_id, piece in enumerate(special, first):
    assert token_id not in tokenizer.encode(f'a{piece}b'), piece
    assert tokenizer.decode(tokenizer.encode(piece)) == piece
    assert tokenizer.control_id(piece) == token_id
  for token_id, piece in enumerate(text, first + len(special)):
    assert tokenizer.encode(piece) == [token_id], piece


def with_added(*added):
  return tokenizer_lib.SentencePieceTokenizer(
    SENTENCEPIECE.model_proto, 'a.model', [tokenizer_lib.AddedToken(*token) for token in added]
  )


def test_added_tokens_are_text_or_control_by_their_flag():
  n, b = SENTENCEPIECE.vocab_size, SENTENCEPIECE.encode('b')
  tokenizer = with_added((n, '<tool>', False), (n + 2, 'my word', False), (n + 1, '</think>', True))
  assert tokenizer.vocab_size == n + 3
  assert tokenizer.encode('b<tool>b') == [*b, n, *b]
  assert tokenizer.encode('my word') == [n + 2]
  assert tokenizer.decode([*b, n, n + 2, n + 1]) == 'b<tool>my word'
  assert n + 1 not in tokenizer.encode('</think>')
  assert tokenizer.control_id('</think>') == n + 1
  # The flag decides, not the name.
  assert with_added((n, '<|user|>', False)).encode('<|user|>') == [n]
  # What is exported holds them too, and is another tokenizer.
  again = tokenizer_lib.SentencePieceTokenizer(tokenizer.model_proto)
  assert again.encode('b<tool>b') == [*b, n, *b]
  assert again.fingerprint() == tokenizer.fingerprint()
  assert tokenizer.fingerprint() != SENTENCEPIECE.fingerprint()


def test_added_tokens_may_name_pieces_again():
  pieces, _, _ = data_toy.vocabulary()
  unused, word = pieces.index('<unused0>'), pieces.index('Hi')
  same = with_added(
    (unused, '<unused0>', False), (2, '<bos>', True), (pieces.index('  '), '▁▁', False)
  )
  assert same.model_proto == SENTENCEPIECE.model_proto
  assert same.fingerprint() == SENTENCEPIECE.fingerprint()
  assert unused not in same.encode('<unused0>')
  # A spare row that was given a name, and a word that was made special.
  renamed = with_added((unused, '<tool>', False), (word, 'Hi', True))
  assert renamed.encode('<tool>') == [unused]
  assert renamed.vocab_size == SENTENCEPIECE.vocab_size
  assert word not in renamed.encode('Hi')
  special = with_added((word, 'Hi', True))
  assert special.model_proto == SENTENCEPIECE.model_proto
  assert special.fingerprint() != SENTENCEPIECE.fingerprint()


def test_an_added_token_that_its_name_would_make_control_is_in_the_fingerprint():
  """tokenizer.model alone loses that it is text, so it is another tokenizer."""
  n = SENTENCEPIECE.vocab_size
  as_text = with_added((n, '<|tool|>', False))
  alone = tokenizer_lib.SentencePieceTokenizer(as_text.model_proto)
  assert as_text.encode('<|tool|>') == [n] != alone.encode('<|tool|>')
  assert as_text.fingerprint() != alone.fingerprint()
  control = with_added((n, '<|tool|>', True))
  alone = tokenizer_lib.SentencePieceTokenizer(control.model_proto)
  assert control.fingerprint() == alone.fingerprint()


def test_rows_between_pieces_and_added_tokens_have_no_text():
  n = SENTENCEPIECE.vocab_size
  tokenizer = with_added((n + 2, '<tool>', False))
  assert tokenizer.vocab_size == n + 3
  assert tokenizer.decode([n, n + 1, n + 2]) == '<tool>'


def test_an_added_token_with_anothers_spelling_is_refused():
  n = SENTENCEPIECE.vocab_size
  with pytest.raises(ValueError, match=f"a.model: added token 'Hi' has id {n}"):
    with_added((n, 'Hi', False))


def test_control_id_refuses_what_is_none():
  for name in ('<no_such_token>', 'Hi', '<unk>'):
    with pytest.raises(ValueError, match=f"control token: got '{name}'"):
      SENTENCEPIECE.control_id(name)
  with pytest.raises(ValueError, match='byte tokenizer has no turns'):
    BYTES.control_id('<start_of_turn>')
  assert BYTES.end_of_turn_id is None


def test_runs_of_spaces_are_found_in_text():
  pieces, _, _ = data_toy.vocabulary()
  two, three = pieces.index('  '), pieces.index('   ')
  a, b = pieces.index('a'), pieces.index('b')
  assert SENTENCEPIECE.encode('a  b') == [a, two, b]
  assert SENTENCEPIECE.encode('a   b') == [a, three, b]
  assert SENTENCEPIECE.encode('a     b') == [a, three, two, b]
  assert SENTENCEPIECE.decode([a, three, two, b]) == 'a     b'


def test_a_run_that_is_a_piece_already_keeps_its_place():
  words = (*data_toy.WORDS, '▁▁')
  tokenizer = data_toy.make_tokenizer(words=words)
  pieces, _, _ = data_toy.vocabulary(words=words)
  ids = tokenizer.encode('a  b')
  assert ids == [pieces.index(p) for p in ('a', '▁▁', 'b')]
  assert tokenizer.vocab_size == len(pieces)


def test_merges_follow_the_scores():
  pieces, _, _ = data_toy.vocabulary()
  ids = SENTENCEPIECE.encode(' ab user')
  # '▁a' stands after 'ab' in the list, so 'ab' is merged first.
  names = ('▁', 'ab', '▁', 'user')
  assert ids == [pieces.index(p) for p in names]


def test_unknown_characters_are_bytes():
  pieces, _, _ = data_toy.vocabulary()
  expected = [pieces.index(f'<0x{byte:02X}>') for byte in '나'.encode()]
  assert SENTENCEPIECE.encode('나') == expected
  assert SENTENCEPIECE.decode(expected[:2]) == '\ufffd'


def test_byte_tokenizer_counts_from_four():
  assert BYTES.encode('a\xe9') == [4 + 0x61, 4 + 0xC3, 4 + 0xA9]
  assert BYTES.decode([2, 4 + 0x61, 1, 0]) == 'a'
  assert BYTES.vocab_size == 260
  assert BYTES.model_proto is None


@both
def test_special_ids_are_gemmas(tokenizer):
  assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)


@both
def test_bad_ids_and_texts_are_refused(tokenizer):
  for bad in (-1, tokenizer.vocab_size):
    with pytest.raises(ValueError, match=f'token id: got {bad}'):
      tokenizer.decode([4, bad])
  with pytest.raises(ValueError, match='surrogate'):
    tokenizer.encode('a\ud800')


def test_a_saved_model_is_the_same_tokenizer(tmp_path):
  # Turns that the file defines for text: loaded otherwise, but kept as given.
  model = data_toy.make_tokenizer(turn_type=tokenizer_lib.USER_DEFINED)
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(model.model_proto)
  again = tokenizer_lib.SentencePieceTokenizer.from_file(str(path))
  assert again.model_proto == model.model_proto
  assert again.fingerprint() == model.fingerprint()
  assert again.fingerprint() != SENTENCEPIECE.fingerprint()
  assert again.fingerprint() != BYTES.fingerprint()


@pytest.mark.parametrize(
  'content, message',
  [
    (None, 'which is not a file.*model.tokenizer=PATH'),
    (b'\x07garbage' * 99, 'are not a SentencePiece model'),
    (SENTENCEPIECE.model_proto[:-7], 'are not a SentencePiece model'),
    (b'', 'expected'),
  ],
  ids=['missing', 'garbage', 'truncated', 'empty'],
)
def test_a_broken_file_is_one_clear_line(tmp_path, content, message):
  path = tmp_path / 'tokenizer.model'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    tokenizer_lib.SentencePieceTokenizer.from_file(str(path))
  assert str(path) in str(error.value)
  assert '\n' not in str(error.value)


def test_another_models_layout_is_refused(tmp_path):
  import sentencepiece

  corpus = tmp_path / 'corpus.txt'
  corpus.write_text('\n'.join(f'a sentence {i}' for i in range(97)))
  sentencepiece.SentencePieceTrainer.train(
    input=str(corpus), model_prefix=str(tmp_path / 'other'), vocab_size=29, minloglevel=2
  )
  with pytest.raises(ValueError, match=r'got PAD, EOS, BOS, UNK = \(-1, 2, 1'):
    tokenizer_lib.SentencePieceTokenizer.from_file(str(tmp_path / 'other.model'))


@pytest.mark.parametrize(
  ('column', 'value', 'message'),
  [
    (0, 7, 'got piece 7, expected a string'),
    (1, 'x', "got score 'x', expected a number"),
    (2, 259, 'got type 259, expected 1 to 6'),
    (2, 0, 'got type 0, expected 1 to 6'),
  ],
)
def test_a_vocabulary_of_another_kind_is_refused(column, value, message):
  lists = data_toy.vocabulary()
  lists[column][9] = value
  with pytest.raises(ValueError, match=message):
    tokenizer_lib.build_model_proto(*lists)


def test_vocabulary_lists_must_match():
  pieces, scores, types = data_toy.vocabulary()
  with pytest.raises(ValueError, match='vocabulary: got'):
    tokenizer_lib.build_model_proto(pieces, scores[:-1], types)
  with pytest.raises(ValueError, match='at least 4'):
    tokenizer_lib.build_model_proto(pieces[:3], scores[:3], types[:3])


def test_importing_the_data_package_is_light():
  code = """
import sys
from gemma_jax.data import examples, pipeline, records, row_plan, sources
from gemma_jax.data import templates, tfds, tokenizer
heavy = {'jax', 'sentencepiece', 'grain', 'tensorflow_datasets', 'tensorflow'}
print(sorted(heavy & set(sys.modules)))
"""
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == '[]'


def test_a_piece_that_is_not_text_is_named():
  proto = data_toy.make_tokenizer().model_proto
  assert proto.count(b'<unused0>') == 1
  broken = proto.replace(b'<unused0>', b'<unus\xffd0>')
  with pytest.raises(ValueError, match=r'piece 4 is not UTF-8 text.*tokenizer\.model'):
    tokenizer_lib.SentencePieceTokenizer(broken)
