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
import itertools
from typing import NamedTuple

import numpy as np

from gemma_jax.data import records as records_lib
from gemma_jax.data import templates
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


@dataclasses.dataclass(frozen=True)
class ExampleStats:
  """What became of the records.

  Attributes:
    records: read.
    examples: records that are left.
    tokens: in the examples, BOS and EOS included.
    supervised_tokens: of them, those that count in the loss.
    truncated: examples that lost tokens to fit seq_len.
    dropped: records without a supervised token.
    duplicates: examples that equal an earlier one (they are kept).
  """

  records: int
  examples: int
  tokens: int
  supervised_tokens: int
  truncated: int
  dropped: int
  duplicates: int

  def line(self, name: str) -> str:
    """'training: 355 records, 81,250 tokens, ...' of the records `name`."""
    return (
      f'{name}: {self.examples:,} records, {self.tokens:,} tokens, '
      f'{self.supervised_tokens:,} supervised, {self.truncated:,} truncated to '
      f'seq_len, {self.dropped:,} dropped (no supervised token), '
      f'{self.duplicates:,} duplicates'
    )


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

  def __init__(
    self,
    examples: Sequence[Example],
    record_ids: Sequence[int],
    stats: ExampleStats,
  ):
    empty = np.zeros(0, np.int32)
    lengths = [len(example.tokens) for example in examples]
    self.offsets = np.cumsum([0, *lengths], dtype=np.int64)
    self.tokens = np.concatenate([empty, *(e.tokens for e in examples)])
    self.loss_mask = np.concatenate(
      [empty, *(e.loss_mask for e in examples)]
    ).astype(np.int8)
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
    """int64 [N]: the places each example takes in a row, n - 1."""
    return np.diff(self.offsets) - 1


def make_examples(
  records: Sequence[records_lib.Record],
  tokenizer: Tokenizer | None,
  template: str = 'dolly',
  loss_on: str = 'response',
  seq_len: int = 512,
  vocab_size: int | None = None,
) -> Examples:
  """Tokenizes records.

  A text record becomes BOS + prompt + response + EOS, each span tokenized by
  itself; EOS is a target. A token record is taken as it is.

  Args:
    records: that `records.check_record` accepts.
    tokenizer: may be None if all records are token records.
    template: for text records.
    loss_on: 'response', or 'all' for every token but the first. The loss mask
      of a token record wins over it; without one every token from 1 on counts.
    seq_len: longest document in tokens; see `truncate`.
    vocab_size: tokens there are, which bounds the ids of token records: those
      of the model's tokenizer, or, if it has none, the rows of its embedding.

  Returns:
    The examples with at least one supervised token.

  Raises:
    ValueError: a token id outside the vocabulary, a text record without a
      tokenizer, or no example left.
  """
  kept, record_ids, seen = [], [], set()
  truncated = 0
  documents = _documents(records, tokenizer, template, vocab_size)
  for record_id, (full, is_text) in enumerate(documents):
    example = truncate(full, seq_len) if is_text else _cut(full, seq_len)
    if is_text and loss_on == 'all':
      example.loss_mask[1:] = 1
    if not example.loss_mask.any():
      continue
    truncated += len(example.tokens) < len(full.tokens)
    seen.add((example.tokens.tobytes(), example.loss_mask.tobytes()))
    kept.append(example)
    record_ids.append(record_id)
  if not kept:
    raise ValueError(
      f'data: none of {len(records)} records has a supervised token within '
      f'data.seq_len={seq_len}; expected at least one. Is every loss_mask 0?'
    )
  stats = ExampleStats(
    records=len(records),
    examples=len(kept),
    tokens=sum(len(e.tokens) for e in kept),
    supervised_tokens=int(sum(e.loss_mask.sum() for e in kept)),
    truncated=truncated,
    dropped=len(records) - len(kept),
    duplicates=len(kept) - len(seen),
  )
  return Examples(kept, record_ids, stats)


def prompt_tokens(
  tokenizer: Tokenizer, template: str, prompt: str
) -> list[int]:
  """BOS and the ids before the response: what generation starts from."""
  spans = templates.render_prompt(template, prompt)
  (example,) = _encode([spans], tokenizer)
  return example.tokens.tolist()


def truncate(example: Example, seq_len: int) -> Example:
  """Shortens BOS + prompt + response + EOS to seq_len tokens.

  The prompt is cut from its left, where the oldest turns are; BOS stays. Once
  it is used up, the response is cut from its right, EOS first, so that the
  model does not learn to stop there.

      tokens       [2, 10, 11, 12, 20, 21, 1]     seq_len
                   [2, 12, 20, 21, 1]             5
                   [2, 20, 21]                    3

  Args:
    example: its last run of targets is the response.
    seq_len: at least 2.
  """
  tokens, mask = example
  excess = len(tokens) - seq_len
  if excess <= 0:
    return example
  response_start = np.flatnonzero(mask == 0)[-1] + 1
  first = 1 + min(excess, response_start - 1)
  keep = np.r_[0, first : first + seq_len - 1]
  return Example(tokens[keep], mask[keep])


def empty_row(seq_len: int) -> Batch:
  """A row of padding: the arrays of `make_row`, all zero."""
  row = {
    name: np.zeros(seq_len, np.int32)
    for name in ('tokens', 'targets', 'segment_ids', 'positions')
  }
  return {**row, 'weights': np.zeros(seq_len, np.float32)}


def make_row(
  examples: Examples, example_ids: Sequence[int], seq_len: int
) -> Batch:
  """Lays documents side by side; the module's docstring shows a row.

  Args:
    examples: where the documents are.
    example_ids: which of them, in this order; none makes an empty row.
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


def make_batch(
  examples: Examples, rows: Iterable[Sequence[int]], seq_len: int
) -> Batch:
  """Stacks `make_row` of each row: the same names, [B, T]."""
  made = [make_row(examples, row, seq_len) for row in rows]
  return {name: np.stack([row[name] for row in made]) for name in made[0]}


def _documents(
  records: Sequence[records_lib.Record],
  tokenizer: Tokenizer | None,
  template: str,
  vocab_size: int | None,
) -> Iterable[tuple[Example, bool]]:
  """Yields (whole document, is it text) of each record."""
  for start in range(0, len(records), _CHUNK):
    chunk = records[start : start + _CHUNK]
    rendered = [
      templates.render(template, r) for r in chunk if 'tokens' not in r
    ]
    if rendered and tokenizer is None:
      raise ValueError(
        'model.tokenizer: got none, but there are text records; expected a '
        'tokenizer.model. Set --config.model.tokenizer=PATH.'
      )
    texts = iter(_encode(rendered, tokenizer))
    for i, record in enumerate(chunk, start):
      if 'tokens' in record:
        yield _token_example(record, i, vocab_size), False
      else:
        tokens, mask = next(texts)
        eos = np.array([tokenizer.eos_id], np.int32)
        one = np.ones(1, np.int32)
        yield Example(np.r_[tokens, eos], np.r_[mask, one]), True


def _encode(
  documents: Sequence[Sequence[templates.Span]], tokenizer: Tokenizer
) -> list[Example]:
  """BOS and the ids of each document's spans; the mask marks target spans."""
  spans = list(itertools.chain.from_iterable(documents))
  if not spans:
    return []
  texts = iter(
    tokenizer.encode_all([s.text for s in spans if not s.is_control])
  )
  examples = []
  for document in documents:
    tokens, mask = [tokenizer.bos_id], [0]
    for span in document:
      ids = (
        [tokenizer.control_id(span.text)] if span.is_control else next(texts)
      )
      tokens += ids
      mask += [int(span.is_target)] * len(ids)
    examples.append(
      Example(np.array(tokens, np.int32), np.array(mask, np.int32))
    )
  return examples


def _token_example(
  record: records_lib.Record, record_id: int, vocab_size: int | None
) -> Example:
  """A token record; its first token never counts."""
  tokens = np.array(record['tokens'], np.int32)
  if vocab_size is not None and tokens.max() >= vocab_size:
    raise ValueError(
      f'data: record {record_id}: got token id {tokens.max()}, expected ids '
      f"below {vocab_size}, the number of the model's tokens; ids of added "
      'tokens need the folder that names them (added_tokens.json).'
    )
  mask = record.get('loss_mask')
  mask = np.ones_like(tokens) if mask is None else np.array(mask, np.int32)
  mask[0] = 0
  return Example(tokens, mask)


def _cut(example: Example, seq_len: int) -> Example:
  return Example(example.tokens[:seq_len], example.loss_mask[:seq_len])
