"""Spans to token ids: control tokens by their ids, texts by the tokenizer.

    spans       Span('Hi'), Span('Hello', is_answer=True, is_target=True)
    document    Piece(BOS), Piece([10, 11], 'Hi'), Piece([20], 'Hello'),
                Piece(EOS, is_answer, is_target)

A control token spelled out in a text stays plain characters, and is counted,
unless the caller asks for it to be parsed: a text that was rendered elsewhere
(`<bos><start_of_turn>user\n...`) then becomes the tokens that it spells.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
import dataclasses
import itertools
import re
from typing import NamedTuple
import weakref

import numpy as np

from gemma_jax.data.templates import Range, Span
from gemma_jax.data.tokenizer import SPACE, Tokenizer

# What Gemma's control tokens look like: <bos>, <|turn>, [multimodal].
_USUAL = r'[<\[][^<>\[\]\s]{1,40}[>\]]'


class _Finder:
  """Finds the control tokens that a text spells."""

  def __init__(self, controls: Mapping[str, int]):
    """Compiles one pattern for Gemma's own, preceded by names of other forms."""
    # A row without a text (`tokenizer`) has a name that no text refers to.
    named = [name for name, i in controls.items() if name != f'<row {i}>']
    spaced = {name.replace(SPACE, ' '): name for name in named}
    names = spaced | {name: name for name in named}
    odd = tuple(name for name in names if not re.fullmatch(_USUAL, name))
    apart = [name for name in names if odd and name.startswith(odd)]
    apart.sort(key=len, reverse=True)
    self._names = names
    self._pattern = re.compile('|'.join([*map(re.escape, apart), _USUAL]))

  def find(self, text: str) -> Iterator[tuple[int, int, str]]:
    """Yields (start, end, name) of each, the longest at its place, in order."""
    start = 0
    while match := self._pattern.search(text, start):
      name = self._names.get(match[0])
      if name is None:
        start = match.start() + 1
        continue
      yield *match.span(), name
      start = match.end()


# Finders are cached: one takes a while to make.
_finders: MutableMapping[Tokenizer, _Finder] = weakref.WeakKeyDictionary()


def _finder(tokenizer: Tokenizer) -> _Finder:
  if tokenizer not in _finders:
    _finders[tokenizer] = _Finder(tokenizer.controls)
  return _finders[tokenizer]


class Piece(NamedTuple):
  """A span with its ids.

  Attributes:
    span: what it says.
    ids: of its tokens.
  """

  span: Span
  ids: list[int]


class Document(NamedTuple):
  """A record's pieces, BOS first and EOS last.

  Attributes:
    pieces: in order.
    spells_controls: whether one of its texts spells a control token.
  """

  pieces: list[Piece]
  spells_controls: bool = False

  @property
  def num_tokens(self) -> int:
    return sum(len(piece.ids) for piece in self.pieces)

  def arrays(self, loss_on: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and loss mask, int32 [n].

    Args:
      loss_on: 'response', or 'all' for every token except the first and those of
        answers that are shown but not learned.
    """
    counts = {
      'response': lambda span: span.is_target,
      'all': lambda span: span.is_target or not span.is_answer,
    }[loss_on]
    tokens = list(itertools.chain.from_iterable(p.ids for p in self.pieces))
    mask = np.repeat(
      np.array([counts(p.span) for p in self.pieces], np.int32), [len(p.ids) for p in self.pieces]
    )
    mask[0] = 0
    return np.array(tokens, np.int32), mask


def encode(
  rendered: Sequence[Sequence[Span]], tokenizer: Tokenizer, parse_controls: bool = False
) -> list[Document]:
  """Tokenizes documents, each span by itself.

  Args:
    rendered: spans of each document.
    tokenizer: encodes all texts at once, on all cores.
    parse_controls: turn control tokens that a text spells into their ids; a BOS
      at the start or an EOS at the end is then not added again.
  """
  finder = _finder(tokenizer)
  spelled = [any(any(finder.find(s.text)) for s in spans if not s.is_control) for spans in rendered]
  if parse_controls:
    rendered = [
      [part for span in spans for part in _parsed(span, finder)] if is_spelled else spans
      for spans, is_spelled in zip(rendered, spelled, strict=True)
    ]
  texts = [s.text for spans in rendered for s in spans if not s.is_control]
  encoded = iter(tokenizer.encode_all(texts) if texts else ())
  documents = []
  for spans, is_spelled in zip(rendered, spelled, strict=True):
    pieces = []
    for span in spans:
      is_control = span.is_control
      ids = [tokenizer.control_id(span.text)] if is_control else next(encoded)
      pieces.append(Piece(span, ids))
    documents.append(Document(_closed(pieces, tokenizer), is_spelled))
  return documents


def _closed(pieces: list[Piece], tokenizer: Tokenizer) -> list[Piece]:
  """Adds BOS, and EOS after an answer, unless a text spells them.

  White space outside of those is removed.
  """
  said = [i for i, piece in enumerate(pieces) if piece.span.text.strip()]
  if said and pieces[said[0]].ids == [tokenizer.bos_id]:
    pieces = pieces[said[0] :]
  else:
    bos = Span('<bos>', is_control=True)
    pieces = [Piece(bos, [tokenizer.bos_id]), *pieces]
  if not pieces[-1].span.is_answer:  # it is still to come
    return pieces
  said = [i for i, piece in enumerate(pieces) if piece.span.text.strip()]
  if pieces[said[-1]].ids == [tokenizer.eos_id]:
    return pieces[: said[-1] + 1]
  eos = dataclasses.replace(pieces[-1].span, text='<eos>', is_control=True, spare=(), last_spare=())
  return [*pieces, Piece(eos, [tokenizer.eos_id])]


def _parsed(span: Span, finder: _Finder) -> Iterator[Span]:
  """A span as texts and the control tokens between them."""
  if span.is_control:
    yield span
    return
  start = 0
  for first, end, name in finder.find(span.text):
    if first > start:
      yield _part(span, (start, first))
    yield dataclasses.replace(span, text=name, is_control=True, spare=(), last_spare=())
    start = end
  if start < len(span.text):
    yield _part(span, (start, len(span.text)))


def _part(span: Span, part: Range) -> Span:
  """A span's characters of a range."""
  first, last = part

  def within(ranges):
    # Empty ranges are kept too: the place in the list is the priority.
    cut = ((max(a, first), min(b, last)) for a, b in ranges)
    return tuple((a - first, max(b, a) - first) for a, b in cut)

  return dataclasses.replace(
    span, text=span.text[first:last], spare=within(span.spare), last_spare=within(span.last_spare)
  )
