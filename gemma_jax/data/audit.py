"""What is wrong with a set of records, though each of them is well-formed.

A held-out record that also stands in training measures memory. Two texts are
alike if they differ in case, width, space and punctuation only:

    'Where is the palace?'   'where  is the PALACE'   both 'whereisthepalace'
"""

from collections.abc import Sequence
import dataclasses
import unicodedata

from absl import logging

from gemma_jax.data import records as records_lib
from gemma_jax.data import templates

_MOST_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Audit:
  """Indices of records, in the order of their list.

  Attributes:
    empty_prompts: training records that ask nothing.
    repeated: training records that equal an earlier one.
    leaked: held-out records that stand in training word for word.
    alike: further held-out records that are alike one in training.
    num_train: training records.
    num_heldout: held-out records.
  """

  empty_prompts: tuple[int, ...]
  repeated: tuple[int, ...]
  leaked: tuple[int, ...]
  alike: tuple[int, ...]
  num_train: int
  num_heldout: int

  def log(self) -> None:
    """A warning for each kind that was found."""
    for ids, total, what in (
      (self.empty_prompts, self.num_train, 'training records have no prompt'),
      (self.repeated, self.num_train, 'training records repeat another one'),
      (
        self.leaked,
        self.num_heldout,
        'held-out records also stand in training, word for word; their loss '
        'measures memory',
      ),
      (
        self.alike,
        self.num_heldout,
        'further held-out records also stand in training but for case, space '
        'and punctuation',
      ),
    ):
      if ids:
        more = ', ...' if len(ids) > _MOST_SHOWN else ''
        shown = ', '.join(map(str, ids[:_MOST_SHOWN])) + more
        logging.warning('%d of %d %s: %s', len(ids), total, what, shown)


def audit(
  train: Sequence[records_lib.Record],
  heldout: Sequence[records_lib.Record],
  template: str,
) -> Audit:
  """Compares records with each other; linear in their text.

  Args:
    train: that `records.check_record` accepts.
    heldout: likewise.
    template: decides the direction of a pair of sentences.
  """
  texts = [_texts(record, template) for record in train]
  exact, normal = set(), set()
  repeated = []
  for i, text in enumerate(texts):
    if text in exact:
      repeated.append(i)
    exact.add(text)
    normal.add(_normalize(text))
  asked = [_texts(record, template) for record in heldout]
  leaked = [i for i, text in enumerate(asked) if text in exact]
  alike = [
    i
    for i, text in enumerate(asked)
    if text not in exact and _normalize(text) in normal
  ]
  empty = [i for i, text in enumerate(texts) if _asks_nothing(text)]
  return Audit(
    tuple(empty),
    tuple(repeated),
    tuple(leaked),
    tuple(alike),
    len(train),
    len(heldout),
  )


def _texts(record: records_lib.Record, template: str) -> tuple:
  """What is compared: the texts up to the last response, or the ids."""
  if 'tokens' in record:
    mask = record.get('loss_mask')
    return tuple(record['tokens']), None if mask is None else tuple(mask)
  chat = templates.conversation(record, template)
  return (chat.system, chat.context, *chat.turns)


def _asks_nothing(texts: tuple) -> bool:
  return all(isinstance(text, str) and not text.strip() for text in texts[:-1])


def _normalize(texts: tuple) -> tuple:
  return tuple(
    _letters(text) if isinstance(text, str) else text for text in texts
  )


def _letters(text: str) -> str:
  folded = unicodedata.normalize('NFKC', text).casefold()
  return ''.join(c for c in folded if c.isalnum()) or text
