"""Documents that are longer than a row: what stays.

A model learns nothing good from an answer whose question was cut away. So

1. a conversation loses whole turns, each question with its answer, as long as
   there are others: first those after the last answer that is learned, then the
   oldest (the system's text and a context stay);
2. a prompt and its response share the row: the prompt is shortened, down to a
   quarter of the row; what it is about (the context) is cut first, from the
   middle, so that its beginning and end stay, and an instruction is not touched;
3. then the response loses its end, EOS first, so that the model does not learn
   to stop there, down to a quarter of the row;
4. only then is an instruction shortened too, from the middle;
5. if the other words of the prompt leave no room, the record is left out.

Only whole characters are cut. A text that was rendered elsewhere and parsed keeps
all its control tokens; what lies between them is shortened as one text.

    row of 12       [BOS p1 .. p9 | r1 .. r9 EOS]
    kept            [BOS p1 p9 | r1 .. r9]
"""

import bisect
from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import NamedTuple

from gemma_jax.data.encoding import Document, Piece
from gemma_jax.data.record import Record
from gemma_jax.data.tokenizer import SPACE, Tokenizer

# Shares of a row that a prompt and a response keep, if they are that long.
PROMPT_SHARE = 1 / 4
RESPONSE_SHARE = 1 / 4

# A token: the index of its piece, and its own index in the piece.
_Place = tuple[int, int]


class Fitted(NamedTuple):
  """A document that fits.

  Attributes:
    document: at most seq_len tokens; None if nothing sensible is left.
    lost_prompt: whether part of what precedes the last response is gone.
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
    record: what the document says.
    document: the whole of it.
    seq_len: at least 2.
    encode: makes the document of a record.
    tokenizer: that of `encode`.
  """
  if document.num_tokens <= seq_len:
    return Fitted(document)
  fewer = _without_unlearned_end(record)
  if fewer is not record:
    record, document = fewer, encode(fewer)
  # One pair stays. Fewer turns are fewer tokens, so bisection works.
  pairs = len(record.dialogue) // 2
  encoded = {0: document}

  def tokens_without(gone: int) -> int:
    if gone not in encoded:
      encoded[gone] = encode(_without_oldest(record, gone))
    return encoded[gone].num_tokens

  gone = bisect.bisect_left(range(pairs - 1), -seq_len, key=lambda gone: -tokens_without(gone))
  if tokens_without(gone) <= seq_len:
    return Fitted(encoded[gone], lost_prompt=gone > 0)
  pieces, lost = _share(encoded[gone].pieces, seq_len, tokenizer)
  if pieces is None:
    return Fitted(None, lost_prompt=True)
  shortened = Document(pieces, document.spells_controls)
  return Fitted(shortened, lost_prompt=lost or gone > 0)


def _share(
  pieces: Sequence[Piece], seq_len: int, tokenizer: Tokenizer
) -> tuple[list[Piece] | None, bool]:
  """Fits one prompt and one response into a row that is too short for both.

  Returns:
    (pieces, or None if there is no room; whether the prompt lost a part).
  """
  prompt, response = _split(pieces)
  P, R = _count(prompt), _count(response)
  spare, last = (_spare_tokens(prompt, name, tokenizer) for name in ('spare', 'last_spare'))
  fixed = P - sum(map(len, spare))
  most = seq_len - math.ceil(RESPONSE_SHARE * seq_len)
  least = min(P, max(fixed, math.ceil(PROMPT_SHARE * seq_len)), most)
  excess = P - max(seq_len - R, least)
  kept = _shortened(prompt, [*spare, *last], excess, tokenizer)
  room = seq_len - _count(kept)
  if room < seq_len - P + excess:
    return None, True
  return [*kept, *_beginning(response, room, tokenizer)], excess > 0


def _without_unlearned_end(record: Record) -> Record:
  """The record without the turns after the last answer that is learned, if any is."""
  learned = [i for i, turn in enumerate(record.turns) if turn.is_target]
  if not learned or learned[-1] == len(record.turns) - 1:
    return record
  turns = record.turns[: learned[-1] + 1]
  return dataclasses.replace(record, turns=turns)


def _without_oldest(record: Record, pairs: int) -> Record:
  """The record without the first questions and answers; their context is kept."""
  if not pairs:
    return record
  head = record.turns[: len(record.turns) - len(record.dialogue)]
  gone, rest = record.dialogue[: 2 * pairs], record.dialogue[2 * pairs :]
  contexts = [turn.context for turn in (*gone, rest[0]) if turn.context]
  first = dataclasses.replace(rest[0], context='\n\n'.join(contexts))
  return dataclasses.replace(record, turns=(*head, first, *rest[1:]))


def _split(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
  """What precedes the last answer, and that answer."""
  start = len(pieces)
  while start and pieces[start - 1].span.is_answer:
    start -= 1
  return list(pieces[:start]), list(pieces[start:])


def _spare_tokens(pieces: Sequence[Piece], name: str, tokenizer: Tokenizer) -> list[list[_Place]]:
  """The tokens that lie within the ranges of that name, by priority.

  Pieces of one parsed text have parts of the same ranges.
  """
  groups: list[list[_Place]] = []
  for index, (span, ids) in enumerate(pieces):
    ranges = getattr(span, name)
    if not ranges:
      continue
    ends = [0]
    for token_id in ids:
      ends.append(ends[-1] + len(tokenizer.token_bytes(token_id)))
    for priority, (first, last) in enumerate(ranges):
      low, high = (_num_bytes(span.text[:n]) for n in (first, last))
      if priority == len(groups):
        groups.append([])
      groups[priority] += [
        (index, i) for i in range(len(ids)) if low <= ends[i] and ends[i + 1] <= high
      ]
  return groups


def _num_bytes(text: str) -> int:
  """Bytes as tokens count them: U+2581 counts as a space."""
  return len(text.replace(SPACE, ' ').encode())


def _shortened(
  pieces: Sequence[Piece], spare: Sequence[list[_Place]], excess: int, tokenizer: Tokenizer
) -> list[Piece]:
  """Takes tokens out of the middle of each spare part, in their order.

  At least `excess` of them, or all.
  """
  gone: set[_Place] = set()
  starts = lambda place: _starts_character(pieces[place[0]], place[1], tokenizer)
  for places in spare:
    taken = min(excess, len(places))
    if not taken:
      continue
    first = math.ceil((len(places) - taken) / 2)
    while first and not starts(places[first]):
      first -= 1
    last = first + taken
    while last < len(places) and not starts(places[last]):
      last += 1
    gone.update(places[first:last])
    excess -= last - first
    excess = max(excess, 0)
  return [
    Piece(p.span, [t for j, t in enumerate(p.ids) if (i, j) not in gone])
    for i, p in enumerate(pieces)
  ]


def _beginning(pieces: Sequence[Piece], room: int, tokenizer: Tokenizer) -> list[Piece]:
  """The first `room` tokens, without a last character that would be cut in two."""
  kept = []
  for piece in pieces:
    end = min(room, len(piece.ids))
    if end < len(piece.ids):
      while end and not _starts_character(piece, end, tokenizer):
        end -= 1
    kept.append(Piece(piece.span, piece.ids[:end]))
    room = room - end if end == len(piece.ids) else 0
  return kept


def _starts_character(piece: Piece, index: int, tokenizer: Tokenizer) -> bool:
  """Whether a token does not continue a character of the token before."""
  first = tokenizer.token_bytes(piece.ids[index])[:1]
  return not first or first[0] & 0xC0 != 0x80


def _count(pieces: Sequence[Piece]) -> int:
  return sum(len(piece.ids) for piece in pieces)
