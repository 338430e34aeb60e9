"""What is wrong with a set of records, though each of them is well-formed.

A held-out record that is also in training measures memory. Two texts are alike if
they differ only in case, width, space and punctuation:

    'Where is the palace?'   'where  is the PALACE'   both 'whereisthepalace'
"""

from collections.abc import Sequence
import dataclasses
import itertools
import unicodedata

from absl import logging

from gemma_jax.data.record import Record

_MOST_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Audit:
  """Indices of records, in the order of their list.

  Attributes:
    empty_prompts: training records that ask nothing.
    repeated: training records that equal an earlier one.
    leaked: held-out records that are in training word for word.
    alike: further held-out records that are like one in training.
    asked: further held-out records whose question is in training, with another
      answer.
    num_train: training records.
    num_heldout: held-out records.
  """

  empty_prompts: tuple[int, ...]
  repeated: tuple[int, ...]
  leaked: tuple[int, ...]
  alike: tuple[int, ...]
  asked: tuple[int, ...]
  num_train: int
  num_heldout: int

  def log(self) -> None:
    """Logs a warning for each kind of problem."""
    for ids, total, what in (
      (self.empty_prompts, self.num_train, 'training records have no prompt'),
      (self.repeated, self.num_train, 'training records repeat another one'),
      (
        self.leaked,
        self.num_heldout,
        'held-out records are also in training, word for word; their loss measures memory',
      ),
      (
        self.alike,
        self.num_heldout,
        'further held-out records are in training except for case, space and punctuation',
      ),
      (self.asked, self.num_heldout, 'further held-out records ask what a training record asks'),
    ):
      if ids:
        more = ', ...' if len(ids) > _MOST_SHOWN else ''
        shown = ', '.join(map(str, ids[:_MOST_SHOWN])) + more
        logging.warning('%d of %d %s: %s', len(ids), total, what, shown)


def audit(train: Sequence[Record], heldout: Sequence[Record]) -> Audit:
  """Compares records with each other, in time linear in their text."""
  texts = [_texts(record) for record in train]
  exact, normal = set(), set()
  repeated = []
  for i, text in enumerate(texts):
    if text in exact:
      repeated.append(i)
    exact.add(text)
    normal.add(_normalize(text))
  measured = [_texts(record) for record in heldout]
  leaked = [i for i, text in enumerate(measured) if text in exact]
  alike = [i for i, text in enumerate(measured) if text not in exact and _normalize(text) in normal]
  questions = {_question(text) for text in texts} - {None}
  known = {*leaked, *alike}
  asked = [i for i, text in enumerate(measured) if _question(text) in questions and i not in known]
  empty = [i for i, text in enumerate(texts) if _asks_nothing(text)]
  return Audit(
    tuple(empty),
    tuple(repeated),
    tuple(leaked),
    tuple(alike),
    tuple(asked),
    len(train),
    len(heldout),
  )


def _texts(record: Record) -> tuple:
  """What is compared: all texts, the last answer behind the others, or ids."""
  if not record.is_text:
    return record.tokens, record.loss_mask
  said = [(turn.context, turn.text) for turn in record.dialogue]
  return (record.system or '', *itertools.chain.from_iterable(said))


def _question(texts: tuple) -> tuple | None:
  """What is asked, if it is a text."""
  is_text = isinstance(texts[-1], str)
  return None if not is_text or _asks_nothing(texts) else texts[:-1]


def _asks_nothing(texts: tuple) -> bool:
  return all(isinstance(text, str) and not text.strip() for text in texts[:-1])


def _normalize(texts: tuple) -> tuple:
  return tuple(_letters(text) if isinstance(text, str) else text for text in texts)


def _letters(text: str) -> str:
  folded = unicodedata.normalize('NFKC', text).casefold()
  return ''.join(c for c in folded if c.isalnum()) or text
