"""One record, as everything behind `data/records.py` sees it.

    {"instruction": "Why?", "context": "Once.", "response": "So.", "id": 7}
    Record(turns=(Turn('user', 'Why?', context='Once.'),
                  Turn('model', 'So.', is_target=True)), unread=('id',), ...)

    {"tokens": [2, 10, 20, 1], "loss_mask": [0, 0, 1, 1]}
    Record(tokens=(2, 10, 20, 1), loss_mask=(0, 0, 1, 1), ...)

`forms` makes them from rows; templates, splits, audit, manifests and examples
know no other form.
"""

import dataclasses
import hashlib
import json
from typing import Any

SYSTEM, USER, MODEL = 'system', 'user', 'model'


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
  """What one side says.

  Attributes:
    role: system, user or model.
    text: as in the file.
    context: a text that a user's turn is about; may be empty.
    is_target: the model learns to say it; False for an answer of weight 0.
  """

  role: str
  text: str
  context: str = ''
  is_target: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """A text or a list of token ids, and what is known about it.

  Attributes:
    turns: at most one system turn, then user, model, user, ...; ends with a
      user where the answer is still to come; () for token ids.
    is_instruction: the user's text says what to do, and its context holds what
      to do it with; otherwise the text may be both in one.
    tokens: ids, or None for a text.
    loss_mask: 0 or 1 for each id; None counts every token from 1 on.
    category: for results by category; may be empty.
    key: of what precedes the last answer: records with equal keys go to the same
      side of a split.
    unread: names of the fields that nothing reads, such as `id` or
      `messages[].name`.
  """

  turns: tuple[Turn, ...] = ()
  is_instruction: bool = False
  tokens: tuple[int, ...] | None = None
  loss_mask: tuple[int, ...] | None = None
  category: str = ''
  key: bytes = b''
  unread: tuple[str, ...] = ()

  @property
  def is_text(self) -> bool:
    """Whether it needs a template and a tokenizer."""
    return self.tokens is None

  @property
  def system(self) -> str | None:
    """The text that holds for all turns; None if there is no system turn."""
    has_one = bool(self.turns) and self.turns[0].role == SYSTEM
    return self.turns[0].text if has_one else None

  @property
  def dialogue(self) -> tuple[Turn, ...]:
    """The turns without the system's: user, model, user, ..."""
    return self.turns if self.system is None else self.turns[1:]

  @property
  def context(self) -> str:
    """The contexts of all turns, as one text."""
    return '\n\n'.join(turn.context for turn in self.turns if turn.context)

  def unanswered(self) -> 'Record':
    """What generation starts from: the record without its last answer, if it has one.

    Of token ids, the answer is what counts at the end: [2, 10, 20, 1] with the loss
    mask [0, 0, 1, 1] asks with [2, 10]. Without a mask all of them ask.
    """
    if self.tokens is not None:
      mask = self.loss_mask or ()
      asked = [i for i, counts in enumerate(mask) if not counts]
      end = max(asked, default=0) + 1 if mask else len(self.tokens)
      return dataclasses.replace(self, tokens=self.tokens[:end], loss_mask=None)
    is_answered = bool(self.turns) and self.turns[-1].role == MODEL
    return dataclasses.replace(self, turns=self.turns[:-1]) if is_answered else self

  @property
  def question(self) -> str:
    """What precedes the last answer, for people; '' for token ids.

    Several turns are labelled with their roles.
    """
    asked = self.unanswered().turns
    if len(asked) == 1:
      return asked[0].text
    return '\n\n'.join(f'{turn.role}: {turn.text}' for turn in asked)


def asking(prompt: str) -> Record:
  """A record that waits for its answer: what generation starts from."""
  return Record(turns=(Turn(USER, prompt),))


def make_key(parts: Any) -> bytes:
  """SHA-256 of JSON-able parts."""
  return hashlib.sha256(json.dumps(parts).encode()).digest()
