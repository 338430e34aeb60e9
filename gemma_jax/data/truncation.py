"""Documents that are longer than a row: what stays.

A model learns nothing good from an answer whose question was cut away. So

1. a conversation loses its oldest turns, a question with its answer, as long
   as there are others (the system's text stays);
2. a prompt and its response share the row: the prompt is shortened, down to a
   half of the row; what it is about (the context) goes first, from the middle,
   so that beginning and end stay, and an instruction is not touched;
3. then the response loses its end, EOS first, so that the model does not learn
   to stop there, down to a quarter of the row;
4. only then an instruction is shortened too, from the middle;
5. where the template's own words alone leave no room, the record is left out.

    row of 12       [BOS p1 .. p9 | r1 .. r9 EOS]
    kept            [BOS p1 p2 p3 p8 p9 | r1 .. r6]
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import NamedTuple

from gemma_jax.data.encoding import Document, Piece
from gemma_jax.data.record import Record
from gemma_jax.data.tokenizer import Tokenizer

# Shares of a row that a prompt and a response keep, if they are that long.
PROMPT_SHARE = 1 / 2
RESPONSE_SHARE = 1 / 4

_SPACE = '\u2581'  # a token's bytes have a space in its place


class Fitted(NamedTuple):
  """A document that fits.

  Attributes:
    document: at most seq_len tokens; None if nothing sensible is left.
    lost_prompt: a part of what precedes the last response is gone.
  """

  document: Document | None
  lost_prompt: bool = False


def fit(
  record: Record,
  document: Document,
  seq_len: int,
  encode: Callable[[Record], Document],
  tokenizer: Tokenizer,
) -> Fitted:
  """Shortens a document to seq_len tokens; see the module's docstring.

  Args:
    record: what it says.
    document: all of it.
    seq_len: at least 2.
    encode: makes the document of a record.
    tokenizer: that of `encode`.
  """
  lost_turns = False
  while document.num_tokens > seq_len and len(record.dialogue) > 2:
    record = _without_oldest(record)
    document = encode(record)
    lost_turns = True
  if document.num_tokens <= seq_len:
    return Fitted(document, lost_turns)
  prompt, response = _split(document.pieces)
  P, R = _count(prompt), _count(response)
  spare, last = (
    _spare_tokens(prompt, name, tokenizer) for name in ('spare', 'last_spare')
  )
  fixed = P - sum(tokens.count for tokens in spare)
  most = seq_len - min(R, math.ceil(RESPONSE_SHARE * seq_len))
  least = min(P, max(fixed, math.ceil(PROMPT_SHARE * seq_len)), most)
  excess = P - max(seq_len - R, least)
  prompt, left = _shortened(prompt, [*spare, *last], excess)
  if left:
    return Fitted(None, lost_prompt=True)
  room = seq_len - _count(prompt)
  pieces = [*prompt, *_beginning(response, room)]
  return Fitted(
    Document(pieces, document.spells_controls), lost_turns or excess > 0
  )


def _without_oldest(record: Record) -> Record:
  """A conversation without its first question and answer."""
  head = record.turns[: len(record.turns) - len(record.dialogue)]
  return dataclasses.replace(record, turns=(*head, *record.dialogue[2:]))


def _split(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
  """What precedes the last answer, and that answer."""
  start = len(pieces)
  while start and pieces[start - 1].span.is_answer:
    start -= 1
  return list(pieces[:start]), list(pieces[start:])


class _Tokens(NamedTuple):
  """Tokens of a piece that may be given up: ids[start:stop] of `piece`."""

  piece: int
  start: int
  stop: int

  @property
  def count(self) -> int:
    return self.stop - self.start


def _spare_tokens(
  pieces: Sequence[Piece], name: str, tokenizer: Tokenizer
) -> list[_Tokens]:
  """The tokens that lie within the ranges of characters of that name."""
  tokens = []
  for index, (span, ids) in enumerate(pieces):
    for first, last in getattr(span, name):
      ends = [0]
      for token_id in ids:
        ends.append(ends[-1] + len(tokenizer.token_bytes(token_id)))
      low, high = (_num_bytes(span.text[:n]) for n in (first, last))
      inside = [
        i for i in range(len(ids)) if low <= ends[i] and ends[i + 1] <= high
      ]
      if inside:
        tokens.append(_Tokens(index, inside[0], inside[-1] + 1))
  return tokens


def _num_bytes(text: str) -> int:
  return len(text.replace(_SPACE, ' ').encode())


def _shortened(
  pieces: list[Piece], spare: Sequence[_Tokens], excess: int
) -> tuple[list[Piece], int]:
  """Takes tokens out of the middle of the spare ones, in their order.

  Returns:
    (pieces, how many tokens too many are left).
  """
  gone: dict[int, set[int]] = {}
  for tokens in spare:
    taken = min(excess, tokens.count)
    first = tokens.start + math.ceil((tokens.count - taken) / 2)
    gone.setdefault(tokens.piece, set()).update(range(first, first + taken))
    excess -= taken
  kept = [
    Piece(p.span, [t for j, t in enumerate(p.ids) if j not in gone[i]])
    if i in gone
    else p
    for i, p in enumerate(pieces)
  ]
  return kept, excess


def _beginning(pieces: Sequence[Piece], room: int) -> list[Piece]:
  """The first `room` tokens."""
  kept = []
  for span, ids in pieces:
    kept.append(Piece(span, ids[:room]))
    room -= len(kept[-1].ids)
  return kept


def _count(pieces: Sequence[Piece]) -> int:
  return sum(len(piece.ids) for piece in pieces)
