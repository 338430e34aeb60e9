"""What is measured: each suite's cases, and the job of every contestant.

A job is a dict that any program here understands, whichever library it drives:

  kind      'train' or 'decode'
  model     a Hugging Face folder, the same weights for all
  records   token records (JSON Lines); batch_size of them make an update, each
            is used once, all padded to the longest of their batch, or packed
            into rows of `row_tokens`
  steps     most updates; 0 is all records
  dtype     of the base
  prompt    ids to continue greedily by new_tokens
  weights   of the base while decoding
"""

from collections.abc import Callable
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

OURS = 'gemma_jax'
HF = 'HF + PEFT'
KERAS_HUB = 'KerasHub'
LLAMA_CPP = 'llama.cpp'


@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison.

  Attributes:
    name: title of its table.
    metric: which field of a result is compared.
    larger_is_better: whether it is.
    jobs: (label, program, job) of each contestant, in the order in which a
      round runs them.
  """

  name: str
  metric: str
  larger_is_better: bool
  jobs: tuple[tuple[str, str, dict[str, Any]], ...]


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What the cases are made from.

  Attributes:
    model: Hugging Face folder.
    gguf: 4-bit file for llama.cpp, or ''.
    records: token records, or ''.
    folder: where generated records go.
    vocab_size: ids that generated records are drawn from.
    lengths: rows x length of the full-row cases.
    steps: updates of a full-row run.
    max_records: use only this many of the first records; 0 is all.
    new_tokens: to decode.
  """

  model: str
  gguf: str
  records: str
  folder: str
  vocab_size: int
  lengths: tuple[tuple[int, int], ...] = ((1, 512), (4, 256))
  steps: int = 6
  max_records: int = 0
  new_tokens: int = 128


def train_suite(inputs: Inputs) -> list[Case]:
  """Full rows with every token in the loss; real records, responses only."""
  cases = [
    Case(
      f'full rows, {rows} x {length}',
      'tokens_per_second',
      True,
      _everybody(_full_rows(inputs, rows, length)),
    )
    for rows, length in inputs.lengths
  ]
  if inputs.records:
    cases.append(_records_case(inputs))
  return cases


def _records_case(inputs: Inputs) -> Case:
  """Packs rows so that we make as many updates as the peers' batches do."""
  lines = Path(inputs.records).read_text('utf-8').rstrip('\n').split('\n')
  lines = lines[: inputs.max_records or None]
  path = Path(inputs.folder) / f'records_{len(lines)}.jsonl'
  path.write_text('\n'.join(lines) + '\n', 'utf-8')
  lengths = [len(json.loads(line)['tokens']) for line in lines]
  batch_size = 4
  updates = -(-len(lines) // batch_size)
  job = {
    'kind': 'train',
    'model': inputs.model,
    'records': str(path),
    'dtype': 'float32',
    'steps': 0,
    'batch_size': batch_size,
  }
  # A document fills one slot less than it has tokens; packing leaves some empty.
  row = max(-(-(sum(lengths) - len(lines)) // updates), max(lengths))
  packed = {**job, 'batch_size': 1, 'row_tokens': -(-row // 32) * 32}
  return Case(
    f'{len(lines)} records, responses only',
    'records_per_second',
    True,
    ((OURS, 'ours', packed), (HF, 'hf', job), (KERAS_HUB, 'keras_hub', job)),
  )


def memory_suite(inputs: Inputs) -> list[Case]:
  """Peak resident memory of a process that trains the largest full rows."""
  rows, length = inputs.lengths[-1]
  job = {**_full_rows(inputs, rows, length), 'steps': 3}
  return [Case(f'peak memory, full rows, {rows} x {length}', 'peak_gib', False, _everybody(job))]


def compile_suite(inputs: Inputs) -> list[Case]:
  """From the start of the process to the end of its first update."""
  job = {**_full_rows(inputs, *inputs.lengths[0]), 'steps': 1}
  cold = {**job, 'cache': 'cold'}
  warm = {**job, 'cache': 'warm'}
  return [
    Case(
      'time to the first finished step, 1 x 512',
      'first_step_seconds',
      False,
      (
        (f'{OURS}, no cache', 'ours', cold),
        (f'{OURS}, warm cache', 'ours', warm),
        (HF, 'hf', job),
        (KERAS_HUB, 'keras_hub', job),
      ),
    )
  ]


def decode_suite(inputs: Inputs) -> list[Case]:
  """Greedy continuation of one prompt; reading the prompt is not timed."""
  rng = np.random.default_rng(0)
  prompt = [2, *rng.integers(4, inputs.vocab_size, 17).tolist()]
  job = {'kind': 'decode', 'model': inputs.model, 'prompt': prompt, 'new_tokens': inputs.new_tokens}
  ours = tuple(
    (f'{OURS}, {weights}', 'ours', {**job, 'weights': weights})
    for weights in ('float32', 'bfloat16', 'int8')
  )
  peers = ((HF, 'hf', job),)
  if inputs.gguf:
    llama = {**job, 'model': inputs.gguf}
    peers = (*peers, (f'{LLAMA_CPP}, 4 bits', 'llama_cpp', llama))
  return [Case('greedy decode, 1 prompt', 'tokens_per_second', True, (*ours, *peers))]


def large_suite(inputs: Inputs) -> list[Case]:
  """One step of a large base in bfloat16, 1 x 128; peers that can load it."""
  job = {**_full_rows(inputs, 1, 128), 'dtype': 'bfloat16', 'steps': 3}
  contestants = ((OURS, 'ours', job), (KERAS_HUB, 'keras_hub', job))
  return [Case('bfloat16 base, 1 x 128', 'step_seconds', False, contestants)]


SUITES: dict[str, Callable[[Inputs], list[Case]]] = {
  'train': train_suite,
  'decode': decode_suite,
  'memory': memory_suite,
  'compile': compile_suite,
  'large': large_suite,
}


def _everybody(job):
  return ((OURS, 'ours', job), (HF, 'hf', job), (KERAS_HUB, 'keras_hub', job))


def _full_rows(inputs: Inputs, rows: int, length: int) -> dict[str, Any]:
  """Random records of one length, every token a target."""
  path = Path(inputs.folder) / f'rows_{rows}x{length}.jsonl'
  rng = np.random.default_rng(0)
  with path.open('w', encoding='utf-8') as f:
    for _ in range(rows * inputs.steps):
      ids = [2, *rng.integers(4, inputs.vocab_size, length - 1).tolist()]
      f.write(json.dumps({'tokens': ids}) + '\n')
  return {
    'kind': 'train',
    'model': inputs.model,
    'records': str(path),
    'dtype': 'float32',
    'steps': inputs.steps,
    'batch_size': rows,
    'row_tokens': length,
  }
