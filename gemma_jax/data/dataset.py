"""Records as tokens: what a run learns from and what it is measured on."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
from typing import Any, Protocol, runtime_checkable

from absl import logging
import numpy as np

from gemma_jax.config import checks
from gemma_jax.config.train import DataConfig
from gemma_jax.data import audit, examples, pipeline, row_plan, sources
from gemma_jax.data.examples import Batch, Examples
from gemma_jax.data.tokenizer import Tokenizer

# Positions in a row if `seq_len` is 0 and the base has that many.
DEFAULT_SEQ_LEN = 512


@runtime_checkable
class Base(Protocol):
  """What records have to know about a base.

  Attributes:
    reference: where it came from.
    tokenizer: None if all records are token ids.
    config: the architecture: `vocab_size`, `max_positions`.
  """

  @property
  def reference(self) -> str: ...
  @property
  def tokenizer(self) -> Tokenizer | None: ...
  @property
  def config(self) -> Any: ...


def row_length(seq_len: int, base: Base) -> int:
  """Returns the positions in a row; 0 becomes 512, or as many as the base has.

  Raises:
    ValueError: a row is longer than the base's positions.
  """
  most = base.config.max_positions
  if seq_len > most:
    raise ValueError(
      f'data.seq_len: got {seq_len}, expected at most {most}, the positions of {base.reference}.'
    )
  if seq_len:
    return seq_len
  if most < DEFAULT_SEQ_LEN:
    logging.warning(
      'Rows have %d positions, as many as %s has (data.seq_len=0 is %d elsewhere)',
      most,
      base.reference,
      DEFAULT_SEQ_LEN,
    )
  return min(DEFAULT_SEQ_LEN, most)


class Dataset:
  """Training and held-out examples, and how they become rows.

      data = Dataset('sample:seoul_travel', base, seq_len=256)
      data = Dataset([{'prompt': '1 + 1 =', 'response': '2'}, ...], base)

  Attributes:
    train: training examples.
    heldout: held-out examples.
    notes: which records were skipped and which fields were not read, for people.
    config: a checked `DataConfig`; its `seq_len` is a number of positions.
  """

  train: Examples
  heldout: Examples
  notes: tuple[str, ...]
  config: DataConfig

  def __init__(
    self,
    records: str | Sequence[Mapping[str, Any]] | DataConfig,
    base: Base,
    *,
    heldout: Sequence[Mapping[str, Any]] | None = None,
    **fields: Any,
  ):
    """Reads, checks, splits and tokenizes.

    Args:
      records: a source as `DataConfig.path` names it, rows as dicts in any form
        that such a source may have, or a whole `DataConfig`.
      base: gives the tokenizer and the number of positions.
      heldout: rows to measure on, if `records` are rows; default: part of them,
        chosen by a hash of their prompts.
      **fields: of `DataConfig`: seq_len, template, loss_on, packing, ...

    Raises:
      ValueError: a missing source or a bad record, with its place; a length
        that the base does not have.
    """
    checks.instance('base', base, Base, 'a loaded base, gemma_jax.load(...)')
    kinds = (str, Sequence, DataConfig)
    checks.instance('records', records, kinds, 'the name of a source, or rows as dicts')
    is_path = isinstance(records, str)
    if isinstance(records, DataConfig):
      config = dataclasses.replace(records, **fields)
    else:
      config = DataConfig(**({'path': records} if is_path else {'path': 'records'}), **fields)
    config.check()
    config = dataclasses.replace(config, seq_len=row_length(config.seq_len, base))
    config.freeze()
    if is_path or isinstance(records, DataConfig):
      if heldout is not None:
        raise ValueError('heldout: got rows, expected eval_path=FILE beside a named source.')
      parts = sources.load_records(config)
    else:
      parts = sources.of_rows(records, heldout, config)
    audit.audit(parts.train, parts.heldout).log()
    self.config = config
    self.notes = tuple(parts.lines())
    self.train, self.heldout = (
      examples.make_examples(
        part,
        base.tokenizer,
        config.template,
        config.loss_on,
        config.seq_len,
        base.config.vocab_size if base.tokenizer is None else base.tokenizer.vocab_size,
        config.parse_control_tokens,
      )
      for part in (parts.train, parts.heldout)
    )
    self.train.stats.log_warnings('training')
    self.heldout.stats.log_warnings('held-out')

  def fingerprint(self) -> str:
    """Hex sha256 of all examples, training and held-out."""
    digest = hashlib.sha256()
    for part in (self.train, self.heldout):
      for array in (part.tokens, part.loss_mask, part.offsets):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

  def plan(self, seed: int, batch_size: int = 0) -> row_plan.RowPlan:
    """The rows of every update.

    Args:
      seed: of their order, unless `order_seed` is set.
      batch_size: rows in an update; 0 is `global_batch_size`.
    """
    config = self.config
    return row_plan.RowPlan(
      self.train.slots,
      config.seq_len,
      batch_size or config.global_batch_size,
      seed if config.order_seed < 0 else config.order_seed,
      config.packing,
    )

  def eval_batches(
    self, batch_size: int = 0, rows_multiple: int = 1
  ) -> Iterator[tuple[Batch, np.ndarray]]:
    """The held-out examples, as `pipeline.eval_batches` yields them."""
    config = self.config
    size = batch_size or config.global_batch_size
    return pipeline.eval_batches(self.heldout, config.seq_len, size, config.packing, rows_multiple)
