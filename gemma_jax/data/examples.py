"""Records to token ids and loss masks, and those to rows. NumPy only.

A document of n tokens fills n - 1 slots of a row, one for each token that is
predicted from those before it. Documents that share a row are told apart by
`segment_ids`, and `positions` restart in each:

    document a     [2, 10, 11, 20, 1]      # BOS, prompt 10 11, response 20, EOS
    its loss_mask  [0,  0,  0,  1, 1]
    document b     [2, 12, 21, 22, 1]      # BOS, prompt 12, response 21 22, EOS
    its loss_mask  [0,  0,  1,  1, 1]

    tokens         [ 2, 10, 11, 20,  2, 12, 21, 22,  0,  0]
    targets        [10, 11, 20,  1, 12, 21, 22,  1,  0,  0]
    weights        [ 0,  0,  1,  1,  0,  1,  1,  1,  0,  0]
    segment_ids    [ 1,  1,  1,  1,  2,  2,  2,  2,  0,  0]
    positions      [ 0,  1,  2,  3,  0,  1,  2,  3,  0,  0]
"""

from collections.abc import Iterable, Sequence
import dataclasses
from typing import NamedTuple

from absl import logging
import numpy as np

from gemma_jax.data import encoding, templates, truncation
from gemma_jax.data.record import Record
from gemma_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]

# Records tokenized at a time: enough to keep all cores busy.
_CHUNK = 4096


class Example(NamedTuple):
  """A document.

  Attributes:
    tokens: int32 [n].
    loss_mask: int32 [n], 1 where the token is a target that counts; the first
      never is, since nothing precedes it.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray


# Shares of the records above which losses to seq_len give a warning.
_MOST_LOST_PROMPTS = 0.01
_MOST_TRUNCATED = 0.05

_PARSE = 'data.parse_control_tokens=True'
_RAISE = 'Raise data.seq_len=N, if the base has more positions'


@dataclasses.dataclass(frozen=True)
class ExampleStats:
  """What became of the records.

  Attributes:
    records: number of records read.
    examples: records that are left.
    tokens: in the examples, BOS and EOS included.
    supervised_tokens: of them, those that count in the loss.
    truncated: examples that lost tokens to fit seq_len.
    lost_prompts: of them, those that lost part of what precedes the response.
    lost_supervised_tokens: those that would count in a long enough row.
    unlearnable: records left out because nothing in them counts.
    too_long: records left out because seq_len leaves no room for their question,
      or for anything that counts.
    duplicates: examples that equal an earlier one (they are kept).
    spelling_controls: records whose text spells a control token.
    parsed_controls: whether these became control tokens.
    seq_len: as given.
    template: as given.
  """

  records: int
  examples: int
  tokens: int
  supervised_tokens: int
  truncated: int = 0
  lost_prompts: int = 0
  lost_supervised_tokens: int = 0
  unlearnable: int = 0
  too_long: int = 0
  duplicates: int = 0
  spelling_controls: int = 0
  parsed_controls: bool = False
  seq_len: int = 0
  template: str = ''

  def line(self, name: str) -> str:
    """'training: 355 records, 81,250 tokens, ...' of the records `name`."""
    return (
      f'{name}: {self.examples:,} records, {self.tokens:,} tokens, '
      f'{self.supervised_tokens:,} supervised, {self.truncated:,} truncated to '
      f'seq_len ({self.lost_prompts:,} lost part of their prompt), '
      f'{self.unlearnable + self.too_long:,} left out ({self.unlearnable:,} '
      f'without a target, {self.too_long:,} too long), {self.duplicates:,} '
      'duplicates'
    )

  def warnings(self, name: str) -> list[str]:
    """What a user should know about the records `name` before training."""
    lines = []
    if self.truncated > _MOST_TRUNCATED * self.records:
      total = self.supervised_tokens + self.lost_supervised_tokens
      lines.append(
        f'{self.truncated:,} of {self.records:,} records are truncated to '
        f'seq_len={self.seq_len}; {self.lost_supervised_tokens / total:.0%} of '
        f'the supervised tokens are lost. {_RAISE}'
      )
    for count, most, fate in (
      (self.lost_prompts, _MOST_LOST_PROMPTS, 'lost part of their prompt to'),
      (self.too_long, 0, 'are left out: what has to stay does not fit into'),
    ):
      if count > most * self.records:
        lines.append(
          f'{count:,} of {self.records:,} records {fate} seq_len={self.seq_len}. {_RAISE}'
        )
    if self.unlearnable:
      lines.append(
        f'{self.unlearnable:,} of {self.records:,} records are left out: '
        'nothing in them counts in the loss (loss_mask or weights of 0)'
      )
    if self.spelling_controls and not self.parsed_controls:
      lines.append(
        f'{self.spelling_controls:,} records spell control tokens, which are '
        f'read as plain text. {_advice(self.template)}'
      )
    return [f'{name}: {line}' for line in lines]

  def log_warnings(self, name: str) -> None:
    """Logs them."""
    for line in self.warnings(name):
      logging.warning('%s', line)


class Examples(Sequence[Example]):
  """Many examples in three flat arrays.

  Attributes:
    tokens: int32 [total].
    loss_mask: int8 [total].
    offsets: int64 [N + 1]; example i is at offsets[i]:offsets[i + 1].
    record_ids: int32 [N], the index of the record that example i came from
      (dropped records leave gaps).
    stats: an `ExampleStats`.
  """

  def __init__(self, examples: Sequence[Example], record_ids: Sequence[int], stats: ExampleStats):
    empty = np.zeros(0, np.int32)
    lengths = [len(example.tokens) for example in examples]
    self.offsets = np.cumsum([0, *lengths], dtype=np.int64)
    self.tokens = np.concatenate([empty, *(e.tokens for e in examples)])
    self.loss_mask = np.concatenate([empty, *(e.loss_mask for e in examples)]).astype(np.int8)
    self.record_ids = np.asarray(record_ids, np.int32)
    self.stats = stats

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(index)
    where = slice(self.offsets[index], self.offsets[index + 1])
    return Example(self.tokens[where], self.loss_mask[where].astype(np.int32))

  @property
  def slots(self) -> np.ndarray:
    """int64 [N]: the slots that each example takes in a row, n - 1."""
    return np.diff(self.offsets) - 1


def make_examples(
  records: Sequence[Record],
  tokenizer: Tokenizer | None,
  template: str = 'dolly',
  loss_on: str = 'response',
  seq_len: int = 512,
  vocab_size: int | None = None,
  parse_control_tokens: bool = False,
) -> Examples:
  """Tokenizes records.

  A text record becomes BOS + prompt + response + EOS, each span tokenized by
  itself; EOS is a target. A token record is used unchanged.

  Args:
    records: to be tokenized.
    tokenizer: may be None if all records are token records.
    template: for text records.
    loss_on: 'response', or 'all' for every token except the first. The loss mask
      of a token record overrides it; without one every token from 1 on counts.
    seq_len: longest document in tokens; see `truncation` for texts. Token
      records are cut at their end.
    vocab_size: number of tokens, which bounds the ids of token records: that of
      the model's tokenizer or, if it has none, the rows of its embedding.
    parse_control_tokens: turn control tokens that a text spells into their ids.

  Returns:
    The examples with at least one supervised token.

  Raises:
    ValueError: a token id outside the vocabulary, a text record without a
      tokenizer, or no example left.
  """
  kept, record_ids, seen = [], [], set()
  counts = dict.fromkeys(
    (
      'truncated',
      'lost_prompts',
      'lost_supervised_tokens',
      'unlearnable',
      'too_long',
      'spelling_controls',
    ),
    0,
  )
  whole_documents = _documents(
    records, tokenizer, template, loss_on, seq_len, vocab_size, parse_control_tokens
  )
  for record_id, made in enumerate(whole_documents):
    example = made.example
    counts['spelling_controls'] += made.spells_controls
    counts['lost_supervised_tokens'] += made.lost_supervised_tokens
    if example is None or not example.loss_mask.any():
      is_cut = made.lost_supervised_tokens > 0
      counts['too_long' if is_cut else 'unlearnable'] += 1
      continue
    counts['truncated'] += made.is_truncated
    counts['lost_prompts'] += made.lost_prompt
    seen.add((example.tokens.tobytes(), example.loss_mask.tobytes()))
    kept.append(example)
    record_ids.append(record_id)
  if not kept:
    raise ValueError(
      f'data: none of {len(records)} records has a supervised token within '
      f'data.seq_len={seq_len} ({counts["too_long"]} are too long for it, '
      f'{counts["unlearnable"]} have a loss_mask or weights of only 0); '
      'expected at least one.'
    )
  stats = ExampleStats(
    records=len(records),
    examples=len(kept),
    tokens=sum(len(e.tokens) for e in kept),
    supervised_tokens=int(sum(e.loss_mask.sum() for e in kept)),
    duplicates=len(kept) - len(seen),
    parsed_controls=parse_control_tokens,
    seq_len=seq_len,
    template=template,
    **counts,
  )
  return Examples(kept, record_ids, stats)


def prompt_tokens(
  tokenizer: Tokenizer | None, template: str, question: Record, parse_control_tokens: bool = False
) -> list[int]:
  """The ids that generation starts from: those before the answer in training.

  Args:
    tokenizer: may be None for token ids.
    template: for texts.
    question: a record that waits for its answer.
    parse_control_tokens: as in `make_examples`.

  Raises:
    ValueError: a text without a tokenizer, or one that the template cannot hold.
  """
  if question.tokens is not None:
    return list(question.tokens)
  if tokenizer is None:
    raise ValueError('model.tokenizer: got none, but there is a text to answer; expected one.')
  spans = templates.render(template, question)
  (document,) = encoding.encode([spans], tokenizer, parse_control_tokens)
  if document.spells_controls and not parse_control_tokens:
    logging.warning(
      'The prompt %.40r spells control tokens, which are read as plain text. %s',
      question.question,
      _advice(template),
    )
  return document.arrays('response')[0].tolist()


def _advice(template: str) -> str:
  """What to do about control tokens that a text spells."""
  if template == 'chat':  # renders the turns itself
    return f'Use {_PARSE} if they are meant as control tokens, and give texts without turns'
  return f'Use data.template=chat on texts that are not rendered yet, or {_PARSE}'


def empty_row(seq_len: int) -> Batch:
  """A row of padding: the arrays of `make_row`, all zero."""
  row = {
    name: np.zeros(seq_len, np.int32) for name in ('tokens', 'targets', 'segment_ids', 'positions')
  }
  return {**row, 'weights': np.zeros(seq_len, np.float32)}


def make_row(examples: Examples, example_ids: Sequence[int], seq_len: int) -> Batch:
  """Lays documents side by side; the module's docstring shows a row.

  Args:
    examples: holds the documents.
    example_ids: which of them, in this order; none gives an empty row.
    seq_len: T.

  Returns:
    tokens, targets int32 [T]; weights float32 [T]; segment_ids int32 [T], from
    1, 0 at padding; positions int32 [T].

  Raises:
    ValueError: the documents need more than T slots.
  """
  row = empty_row(seq_len)
  start = 0
  for segment, example_id in enumerate(example_ids, 1):
    tokens, mask = examples[example_id]
    end = start + len(tokens) - 1
    if end > seq_len:
      raise ValueError(
        f'row: examples {tuple(example_ids)} need more slots than '
        f'seq_len={seq_len}; expected a plan made for this seq_len.'
      )
    row['tokens'][start:end] = tokens[:-1]
    row['targets'][start:end] = tokens[1:]
    row['weights'][start:end] = mask[1:]
    row['segment_ids'][start:end] = segment
    row['positions'][start:end] = np.arange(end - start)
    start = end
  return row


def make_batch(examples: Examples, rows: Iterable[Sequence[int]], seq_len: int) -> Batch:
  """Stacks `make_row` of each row; the same names, [B, T]."""
  made = [make_row(examples, row, seq_len) for row in rows]
  return {name: np.stack([row[name] for row in made]) for name in made[0]}


class _Made(NamedTuple):
  """What a record became.

  Attributes:
    example: None if what has to stay does not fit.
    is_truncated: tokens were lost.
    lost_prompt: some of them precede the response.
    lost_supervised_tokens: how many of them would count.
    spells_controls: its text spells a control token.
  """

  example: Example | None
  is_truncated: bool = False
  lost_prompt: bool = False
  lost_supervised_tokens: int = 0
  spells_controls: bool = False


def _documents(
  records: Sequence[Record],
  tokenizer: Tokenizer | None,
  template: str,
  loss_on: str,
  seq_len: int,
  vocab_size: int | None,
  parse_controls: bool,
) -> Iterable[_Made]:
  """Yields what each record becomes."""

  def encode(*chosen: Record) -> list[encoding.Document]:
    assert tokenizer is not None  # text records are refused without one, below
    rendered = [templates.render(template, record) for record in chosen]
    return encoding.encode(rendered, tokenizer, parse_controls)

  def make(record: Record, document: encoding.Document) -> _Made:
    assert tokenizer is not None  # it made the document
    fitted = truncation.fit(record, document, seq_len, lambda r: encode(r)[0], tokenizer)
    whole = Example(*document.arrays(loss_on))
    example, kept = None, 0
    if fitted.document is document:
      example, kept = whole, whole.loss_mask.sum()
    elif fitted.document is not None:
      example = Example(*fitted.document.arrays(loss_on))
      kept = example.loss_mask.sum()
    return _Made(
      example,
      is_truncated=example is not whole,
      lost_prompt=fitted.lost_prompt,
      lost_supervised_tokens=int(whole.loss_mask.sum() - kept),
      spells_controls=document.spells_controls,
    )

  for start in range(0, len(records), _CHUNK):
    chunk = records[start : start + _CHUNK]
    texts = [record for record in chunk if record.is_text]
    if texts and tokenizer is None:
      raise ValueError(
        'model.tokenizer: got none, but there are text records; expected a '
        'tokenizer.model. Set model.tokenizer=PATH.'
      )
    documents = iter(encode(*texts) if texts else ())
    for i, record in enumerate(chunk, start):
      if record.is_text:
        yield make(record, next(documents))
      else:
        yield _cut(_token_example(record, i, vocab_size), seq_len)


def _token_example(record: Record, record_id: int, vocab_size: int | None) -> Example:
  """A token record; its first token never counts."""
  tokens = np.array(record.tokens, np.int32)
  if vocab_size is not None and tokens.max() >= vocab_size:
    raise ValueError(
      f'data: record {record_id}: got token id {tokens.max()}, expected ids '
      f"below {vocab_size}, the number of the model's tokens; ids of added "
      'tokens need the folder that names them (added_tokens.json).'
    )
  mask = record.loss_mask
  mask = np.ones_like(tokens) if mask is None else np.array(mask, np.int32)
  mask[0] = 0
  return Example(tokens, mask)


def _cut(example: Example, seq_len: int) -> _Made:
  """The first seq_len tokens."""
  tokens, mask = example
  return _Made(
    Example(tokens[:seq_len], mask[:seq_len]),
    is_truncated=len(tokens) > seq_len,
    lost_supervised_tokens=int(mask[seq_len:].sum()),
  )
