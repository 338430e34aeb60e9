"""Collectives of a compiled program, read from its text.

XLA's own cost analysis counts the body of a loop once; here a scan over 18
layers counts 18 times. Its text looks like this (types and attributes
shortened):

    %body (p: (s32[], bf16[8,34])) -> (s32[], bf16[8,34]) {
      %g = bf16[34,46] all-gather(%x), channel_id=7, replica_groups=[1,8]<=[8]
    }
    ENTRY %main (...) -> ... {
      %w = (s32[], ...) while(%t), condition=%cond, body=%body
    }

A collective that the compiler spread over several fusions, to overlap it with
compute, appears in each of them under one channel_id, and counts once. Traffic to
another slice is a `send` to the runtime that joins them.
"""

from collections.abc import Sequence
import dataclasses
import math
import re

import numpy as np

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
  'send',
)

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
# name = type kind(operands), attributes. A type has no word before a bracket.
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ?\b([a-z][a-z0-9\-]*)\((.*)$')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|called_computations)=%?([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program, on one device.

  Attributes:
    kind: one of `KINDS`.
    result_bytes: of its result, one execution.
    count: executions in a step.
    groups: int [groups, size], devices that exchange with each other, by their
      place in the mesh; for a `send`, all of them.
  """

  kind: str
  result_bytes: int
  count: int
  groups: np.ndarray

  @property
  def sent_bytes(self) -> float:
    """What a device sends in all executions, in a ring of n devices.

    A ring passes each of n pieces on n - 1 times; an all-reduce is a
    reduce-scatter and an all-gather.
    """
    n = self.groups.shape[1]
    share = (n - 1) / n
    factor = {
      'all-gather': share,
      'all-reduce': 2 * share,
      'reduce-scatter': n - 1,  # its input is n results
      'all-to-all': share,
    }.get(self.kind, 1.0)
    return self.count * factor * self.result_bytes

  def crosses(self, slices: Sequence[int]) -> bool:
    """Whether a group reaches over slices, given the slice of each device."""
    if self.kind == 'send':
      return True
    in_groups = np.asarray(slices)[self.groups]
    return bool((in_groups != in_groups[:, :1]).any())


def collectives(text: str, num_devices: int) -> list[Collective]:
  """The collectives of a step, each with its number of executions.

  A conditional counts as the branch that sends most, and a loop whose number of
  iterations depends on its data counts once.

  Args:
    text: `compiled.as_text()`.
    num_devices: of the mesh.
  """
  computations, entry = _parse(text)

  def visit(name: str, times: int) -> dict[str, Collective]:
    by_place = {}
    for instruction, result, kind, rest in computations[name]:
      if kind == 'while':
        condition, body = (_first(rf'{part}=%?([\w.\-]+)', rest) for part in ('condition', 'body'))
        by_place |= visit(body, times * _trip_count(rest, computations[condition]))
      elif kind == 'conditional':
        branches = [visit(branch, times) for branch in _branches(rest)]
        by_place |= max(branches, key=_sent)
      elif (base := kind.removesuffix('-start')) in KINDS:
        channel = re.search(r'channel_id=(\d+)', rest)
        where = channel[1] if channel else f'{name}/{instruction}'
        by_place[f'{base} {where}'] = Collective(
          kind=base,
          result_bytes=_result_bytes(result, kind),
          count=times,
          groups=replica_groups(rest, num_devices),
        )
      else:
        for called in _CALLED.findall(rest):
          by_place |= visit(called, times)
    return by_place

  return list(visit(entry, 1).values())


def arrays(text: str) -> set[tuple[int, ...]]:
  """The shapes of all arrays in a program's text."""
  return {tuple(map(int, sizes.split(','))) if sizes else () for _, sizes in _ARRAY.findall(text)}


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
  """Groups of devices, int [groups, size], from an instruction's attributes.

  replica_groups={{0,1},{2,3}}
  replica_groups=[2,4]<=[4,2]T(1,0)       # iota, reshaped and transposed
  replica_groups=mesh['a'=2,'b'=4] {'b'}  # along named axes
  source_target_pairs={{0,1},{1,0}}
  """
  match = re.search(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}', attributes)
  if match:
    rows = re.findall(r'\{([\d,]+)\}', match[1])
    return np.array([[int(i) for i in row.split(',')] for row in rows])
  match = re.search(r'replica_groups=(\[[\d,]+\]<=\S*)', attributes)
  if match:
    return _iota(match[1])
  match = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}', attributes
  )
  if match:
    return _along_axes(*match.groups())
  return np.arange(num_devices)[None]  # none named: all of them


def _iota(text: str) -> np.ndarray:
  """'[2,4]<=[4,2]T(1,0)', or without its shape, → the array it stands for."""
  match = re.match(r'(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  assert match is not None, text  # XLA writes no other form
  numbers = lambda part: tuple(map(int, part.split(','))) if part else None
  shape, dims, order = numbers(match[1]), numbers(match[2]), numbers(match[3])
  assert dims is not None  # the one part that is always there
  ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
  return ids if shape is None else ids.reshape(shape)


def _along_axes(axes: str, device_ids: str | None, chosen: str) -> np.ndarray:
  """Groups of a named mesh: devices that differ only in the chosen axes.

  An axis of 8 may be chosen in part: 'a':(2)4 is the inner 4 of 2 x 4.
  """
  parts = dict(re.findall(r"'([^']+)'(?::(\(\d+\)\d+))?", chosen))
  sizes, moved = [], []
  for name, size in re.findall(r"'([^']+)'=(\d+)", axes):
    split = [int(size)]
    if parts.get(name):
      before, inner = map(int, re.findall(r'\d+', parts[name]))
      split = [before, inner, int(size) // (before * inner)]
    if name in parts:
      moved.append(len(sizes) + (len(split) == 3))
    sizes += split
  ids = np.arange(math.prod(sizes)) if device_ids is None else _iota(device_ids)
  kept = [i for i in range(len(sizes)) if i not in moved]
  ids = ids.reshape(sizes).transpose(kept + moved)
  return ids.reshape(-1, math.prod(sizes[i] for i in moved))


def _parse(text: str):
  """Instructions (name, type, kind, rest) by computation, and the entry."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(match.groups())
  return computations, entry


def _trip_count(attributes: str, condition) -> int:
  """Iterations of a loop: as annotated, or the one constant of its condition."""
  known = re.search(r'known_trip_count[^\d]*(\d+)', attributes)
  if known:
    return int(known[1])
  constants = {
    int(rest.split(')')[0])
    for _, result, kind, rest in condition
    if kind == 'constant' and result.startswith('s32[]')
  }
  return constants.pop() if len(constants) == 1 else 1


def _branches(attributes: str) -> list[str]:
  listed = re.search(r'branch_computations=\{([^}]*)\}', attributes)
  if listed:
    return [name.strip().lstrip('%') for name in listed[1].split(',')]
  return re.findall(r'(?:true|false)_computation=%?([\w.\-]+)', attributes)


def _result_bytes(result: str, kind: str) -> int:
  """Bytes of an instruction's type; for a start, of its eventual result."""
  sizes = [
    math.prod(map(int, dims.split(','))) * _dtype_bits(dtype) // 8
    for dtype, dims in _ARRAY.findall(result)
    if dims  # scalars are negligible, and a start has some of its own
  ]
  if kind == 'send':
    sizes = sizes[:1]
  if kind.endswith('-start') and kind != 'all-reduce-start':
    sizes = sizes[len(sizes) // 2 :]  # operands come first
  return sum(sizes)


def _dtype_bits(name: str) -> int:
  return 8 if name == 'pred' else int(_first(r'(\d+)', name))


def _first(pattern: str, text: str) -> str:
  """What the pattern's group matches first; XLA's text has it."""
  match = re.search(pattern, text)
  assert match is not None, f'{pattern} in {text}'
  return match[1]


def _sent(by_place: dict[str, Collective]) -> float:
  return sum(c.sent_bytes for c in by_place.values())
