"""Text to token ids and back: SentencePiece for Gemma, bytes for tests.

Control tokens (`<bos>`, `<start_of_turn>`, ...) are never parsed from text: a
record that contains their spelling is encoded as plain characters, and a
template inserts their ids with `control_id`. Nothing here adds BOS or EOS.

A fine-tuned model may have tokens of its own, which a Hugging Face folder names
beside tokenizer.model (`AddedToken`). Those marked special are control tokens;
the others are matched in text, as in transformers.
"""

import abc
import codecs
from collections.abc import Iterable, Mapping, Sequence
import functools
import hashlib
import re
from typing import Any, NamedTuple

from gemma_jax import files

START_OF_TURN = '<start_of_turn>'
END_OF_TURN = '<end_of_turn>'

# Which pieces are control tokens, by their names. Some releases store them as
# user-defined pieces, which SentencePiece would match in text like normal ones;
# they are loaded as control pieces, whatever the file says. Other user-defined
# pieces (HTML tags, runs of spaces, tabs and newlines) are text.
_CONTROL_NAME = re.compile(
  r'<(pad|eos|bos|unk|mask|2mass|unused\d+)>'
  r'|<(start|end)_of_\w+>|<\w+_soft_token>'
  r'|\[(multimodal|@BOS@|toxicity=\d+)\]'
  r'|<\|[^<>]+>|<[^<>]+\|>'  # Gemma 4: <|turn>, <turn|>, <|"|>
)
SPACE = '\u2581'  # SentencePiece's stand-in for a space

_MOST_PIECES = 1 << 19

# Piece types, numbered alike in SentencePiece and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class AddedToken(NamedTuple):
  """A token that is named beside the SentencePiece model.

  Attributes:
    id: a row of the embedding, after the model's pieces or one of them.
    content: its text.
    special: whether it is a control token, never parsed from text.
  """

  id: int
  content: str
  special: bool


class Tokenizer(abc.ABC):
  """What the data pipeline and the sampler need of a tokenizer.

  Attributes:
    vocab_size: number of tokens; ids are in [0, vocab_size).
    model_proto: the serialized SentencePiece model, to be stored beside
      exported weights as `tokenizer.model`; None if there is none.
    named_pieces: control tokens (special) and user-defined pieces, by id. Other
      readers of a SentencePiece model need to be told which they are.
  """

  pad_id = 0
  eos_id = 1
  bos_id = 2
  unk_id = 3
  vocab_size: int
  model_proto: bytes | None = None
  named_pieces: Sequence[AddedToken] = ()

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Ids of the text alone: no BOS, no EOS, no control token.

    Raises:
      ValueError: the text is not valid Unicode (a lone surrogate).
    """

  def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text; on all cores if the tokenizer can."""
    return [self.encode(text) for text in texts]

  @abc.abstractmethod
  def token_bytes(self, token_id: int) -> bytes:
    """UTF-8 bytes that a token stands for; b'' for a control token.

    A token may hold only a part of a character. ValueError for an id outside
    [0, vocab_size).
    """

  @abc.abstractmethod
  def control_id(self, name: str) -> int:
    """Id of a control token, e.g. '<start_of_turn>'; ValueError if there is none."""

  @property
  def controls(self) -> Mapping[str, int]:
    """Ids of the control tokens by their spelling, e.g. `<bos>`."""
    return {}

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """A short name; tokenizers with equal fingerprints encode alike."""

  @property
  def end_of_turn_id(self) -> int | None:
    """Id of '<end_of_turn>', or None if there are no turns."""
    try:
      return self.control_id(END_OF_TURN)
    except ValueError:
      return None

  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids without control tokens; broken UTF-8 becomes U+FFFD."""
    return b''.join(map(self.token_bytes, ids)).decode('utf-8', 'replace')

  def _check_id(self, token_id: int):
    if not 0 <= token_id < self.vocab_size:
      raise ValueError(
        f'token id: got {token_id}, expected one in [0, {self.vocab_size}), '
        'the tokens of this tokenizer.'
      )


class StreamDecoder:
  """Decodes ids as they are sampled, in whole characters only.

      ids of '가' as bytes       EA   B0   80
      push returns               ''   ''   '가'

  What `push` and a final `flush` return, joined, equals `decode` of all ids.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._utf8 = codecs.getincrementaldecoder('utf-8')('replace')

  def push(self, ids: Iterable[int]) -> str:
    """Returns the text that these further ids complete; may be empty."""
    return self._utf8.decode(b''.join(map(self._tokenizer.token_bytes, ids)))

  def flush(self) -> str:
    """Returns what is left at the end: U+FFFD for an unfinished character."""
    return self._utf8.decode(b'', final=True)


class SentencePieceTokenizer(Tokenizer):
  """Gemma's tokenizer, from the bytes of a `tokenizer.model`."""

  def __init__(
    self, model_proto: bytes, source: str = 'tokenizer', added: Sequence[AddedToken] = ()
  ):
    """Parses the model.

    Args:
      model_proto: serialized SentencePiece ModelProto. `self.model_proto` is
        the same bytes or, if `added` names tokens other than its pieces, a model
        that holds these too.
      source: its name in error messages.
      added: tokens named beside the model, see the module.

    Raises:
      ValueError: not a SentencePiece model, not laid out like Gemma's (PAD 0,
        EOS 1, BOS 2, UNK 3), or an added token has the spelling of another.
    """
    import sentencepiece

    proto = _empty_model_proto()
    # Parsed, a piece is dozens of times its bytes; it has two newlines, its tags.
    num_pieces = model_proto.count(b'\n') // 2
    try:
      if num_pieces <= _MOST_PIECES:
        proto.ParseFromString(model_proto)
        num_pieces = max(len(proto.pieces), *(token.id + 1 for token in added), 0)
    except Exception as e:  # protobuf raises its own types
      raise _not_a_model(source, model_proto, e) from None
    if num_pieces > _MOST_PIECES:
      raise ValueError(
        f'{source}: got {num_pieces:,} pieces or more, expected at most {_MOST_PIECES:,}, '
        "twice Gemma's."
      )
    # protobuf returns bytes for a text that is not UTF-8.
    bad = next((i for i, x in enumerate(proto.pieces) if not isinstance(x.piece, str)), None)
    if bad is not None:
      raise ValueError(
        f'{source}: piece {bad} is not UTF-8 text, expected the pieces of a tokenizer.model; is '
        'the file damaged?'
      )
    named = _add(proto.pieces, added, source)
    if named:
      model_proto = proto.SerializeToString()
    self._retyped = _retype(proto.pieces, added) + [
      (i, USER_DEFINED)
      for i in sorted(named)
      # If read without `added`, its name would make it a control token.
      if proto.pieces[i].type == USER_DEFINED and is_control_name(proto.pieces[i].piece)
    ]
    by_name = _make_control(proto.pieces, named)
    self.named_pieces = [
      AddedToken(i, piece.piece, special=piece.type != USER_DEFINED)
      for i, piece in enumerate(proto.pieces)
      if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    loaded = proto.SerializeToString() if self._retyped or by_name else model_proto
    del proto  # as large as what is made of it
    try:
      self._pieces = sentencepiece.SentencePieceProcessor(model_proto=loaded)
    except Exception as e:  # so does SentencePiece
      raise _not_a_model(source, model_proto, e) from None
    got = tuple(getattr(self._pieces, f'{name}_id')() for name in ('pad', 'eos', 'bos', 'unk'))
    if got != (self.pad_id, self.eos_id, self.bos_id, self.unk_id):
      raise ValueError(
        f'{source}: got PAD, EOS, BOS, UNK = {got}, expected (0, 1, 2, 3) as '
        "in Gemma; is it another model's tokenizer?"
      )
    self.model_proto: bytes = model_proto
    self.vocab_size = self._pieces.get_piece_size()
    self._bytes: dict[int, bytes] = {}  # of the tokens asked for so far

  @classmethod
  def from_file(cls, path: str, added: Sequence[AddedToken] = ()) -> 'SentencePieceTokenizer':
    """Reads a `tokenizer.model`; ValueError names a missing or broken file."""
    file = files.path(path)
    if not file.is_file():
      raise ValueError(
        f'tokenizer: got {str(path)!r}, which is not a file; expected a '
        'SentencePiece tokenizer.model. Set model.tokenizer=PATH.'
      )
    return cls(file.read_bytes(), str(path), added)

  def encode(self, text: str) -> list[int]:
    return self._pieces.encode(text.encode())

  def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
    return self._pieces.encode([t.encode() for t in texts], num_threads=-1)

  def token_bytes(self, token_id: int) -> bytes:
    token_id = int(token_id)
    if token_id not in self._bytes:
      self._check_id(token_id)
      self._bytes[token_id] = self._read_bytes(token_id)
    return self._bytes[token_id]

  def _read_bytes(self, token_id: int) -> bytes:
    if self._pieces.is_control(token_id) or self._pieces.is_unknown(token_id):
      return b''
    piece = self._pieces.id_to_piece(token_id)
    if self._pieces.is_byte(token_id):
      return bytes([int(piece[3:-1], 16)])  # '<0xEA>'
    return piece.replace(SPACE, ' ').encode()

  def control_id(self, name: str) -> int:
    token_id = self._pieces.piece_to_id(name)
    if not self._pieces.is_control(token_id):
      raise ValueError(
        f'control token: got {name!r}, which this tokenizer lacks; the chat '
        'template needs a Gemma tokenizer, other templates do not.'
      )
    return token_id

  @functools.cached_property
  def controls(self) -> Mapping[str, int]:
    return {
      self._pieces.id_to_piece(i): i for i in range(self.vocab_size) if self._pieces.is_control(i)
    }

  def fingerprint(self) -> str:
    digest = hashlib.sha256(self.model_proto)
    if self._retyped:
      digest.update(repr(self._retyped).encode())
    return 'sentencepiece-' + digest.hexdigest()


class ByteTokenizer(Tokenizer):
  """UTF-8 bytes as tokens 4-259, for random models in tests and dry runs.

  encode('aé')    [101, 199, 173]     # 4 + 0x61, 4 + 0xC3, 4 + 0xA9
  """

  vocab_size = 260
  _first = 4

  @property
  def controls(self) -> Mapping[str, int]:
    return {'<pad>': 0, '<eos>': 1, '<bos>': 2, '<unk>': 3}

  def encode(self, text: str) -> list[int]:
    return [self._first + b for b in text.encode()]

  def token_bytes(self, token_id: int) -> bytes:
    token_id = int(token_id)
    self._check_id(token_id)
    return b'' if token_id < self._first else bytes([token_id - self._first])

  def control_id(self, name: str) -> int:
    if name in self.controls:
      return self.controls[name]
    raise ValueError(
      f'control token: got {name!r}, but the byte tokenizer has no turns; use '
      'another template than chat, or set model.tokenizer=PATH.'
    )

  def fingerprint(self) -> str:
    return 'bytes-260'


def build_model_proto(
  pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> bytes:
  """Builds a SentencePiece BPE model from the vocabulary in a GGUF file.

  GGUF stores runs of U+2581 as literal spaces, which SentencePiece would never
  match since it turns every space of a text into U+2581: they are mapped back,
  unless that spelling is already a piece.

  Args:
    pieces: `tokenizer.ggml.tokens`, in the order of their ids.
    scores: `tokenizer.ggml.scores`, higher merges first.
    types: `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4
      user-defined, 5 unused, 6 byte.

  Returns:
    A serialized ModelProto: identity normalizer, no dummy prefix, all
    whitespace kept, byte fallback; PAD 0, EOS 1, BOS 2, UNK 3.

  Raises:
    ValueError: the lists differ in length, are too short, or hold something that
      is not a piece, score or type.
  """
  if not 4 <= len(pieces) == len(scores) == len(types):
    raise ValueError(
      f'vocabulary: got {len(pieces)} pieces, {len(scores)} scores and '
      f'{len(types)} types, expected the same number of each and at least 4.'
    )
  for name, values, is_fine, expected in (
    ('piece', pieces, lambda x: isinstance(x, str), 'a string'),
    ('score', scores, lambda x: isinstance(x, int | float), 'a number'),
    ('type', types, lambda x: x in range(NORMAL, BYTE + 1), '1 to 6'),
  ):
    bad = next((x for x in values if not is_fine(x)), None)
    if bad is not None:
      raise ValueError(f'vocabulary: got {name} {bad!r}, expected {expected}.')
  proto = _empty_model_proto()
  trainer = proto.trainer_spec
  trainer.model_type = trainer.BPE
  trainer.vocab_size = len(pieces)
  trainer.byte_fallback = True
  for token_id, name in enumerate(('pad', 'eos', 'bos', 'unk')):
    setattr(trainer, f'{name}_id', token_id)
    setattr(trainer, f'{name}_piece', pieces[token_id])
  normalizer = proto.normalizer_spec
  normalizer.name = 'identity'
  normalizer.add_dummy_prefix = False
  normalizer.remove_extra_whitespaces = False
  normalizer.escape_whitespaces = True

  taken = set(pieces)
  for token_id, (piece, score, kind) in enumerate(zip(pieces, scores, types, strict=True)):
    if ' ' in piece and kind != CONTROL:
      spelled = piece.replace(' ', SPACE)
      if spelled not in taken:
        taken.add(spelled)
        piece = spelled
    if token_id == Tokenizer.unk_id:
      kind = UNKNOWN  # GGUF calls it a control token
    proto.pieces.add(piece=piece, score=score, type=kind)
  return proto.SerializeToString()


def _empty_model_proto() -> Any:
  from sentencepiece import sentencepiece_model_pb2 as pb2

  return pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]: made when imported


def is_control_name(spelling: str) -> bool:
  """Whether a piece is a control token by its name, whatever its type."""
  return _CONTROL_NAME.fullmatch(spelling) is not None


def _add(pieces: Any, added: Sequence[AddedToken], source: str) -> set[int]:
  """Spells pieces as `added` says, and appends those that are not there yet.

  Rows between the last piece and an added token become control tokens without
  text.

  Returns:
    Ids of the tokens that it spelled or appended: for these only the flag, not
    the name, says whether they are control tokens.
  """
  new = [token._replace(content=token.content.replace(' ', SPACE)) for token in sorted(added)]
  new = [
    token for token in new if token.id >= len(pieces) or pieces[token.id].piece != token.content
  ]
  if not new:
    return set()
  ids = {piece.piece: i for i, piece in enumerate(pieces)}
  for token in new:
    if ids.setdefault(token.content, token.id) != token.id:
      raise ValueError(
        f'{source}: added token {token.content!r} has id {token.id}, but token '
        f'{ids[token.content]} has the same spelling; expected one id per spelling.'
      )
    for i in range(len(pieces), token.id + 1):
      pieces.add(piece=f'<row {i}>', score=0.0, type=CONTROL)
    pieces[token.id].piece = token.content
    pieces[token.id].type = CONTROL if token.special else USER_DEFINED
  return {token.id for token in new}


def _retype(pieces: Any, added: Sequence[AddedToken]) -> list[tuple[int, int]]:
  """Types pieces as `added` says; returns (id, type) of those that it changed.

  A control piece of the file stays one: releases mark even <mask> and <unused0>
  as not special. Types that depend on the name (`_make_control`) are left alone.
  """
  retyped = []
  for token in sorted(added):
    piece = pieces[token.id]
    kind = CONTROL if token.special else USER_DEFINED
    if piece.type not in (NORMAL, USER_DEFINED, kind):
      continue
    if piece.type != kind and not is_control_name(piece.piece):
      piece.type = kind
      retyped.append((token.id, kind))
  return retyped


def _make_control(pieces: Any, but: set[int]) -> bool:
  """Retypes control tokens that text could match; returns whether there were any."""
  named = [
    piece
    for i, piece in enumerate(pieces)
    if piece.type in (NORMAL, USER_DEFINED) and is_control_name(piece.piece) and i not in but
  ]
  for piece in named:
    piece.type = CONTROL
  return bool(named)


def _not_a_model(source: str, model_proto: bytes, e: Exception) -> ValueError:
  return ValueError(
    f'{source}: got {len(model_proto)} bytes that are not a SentencePiece model '
    f'({str(e).strip()}), expected a tokenizer.model.'
  )
