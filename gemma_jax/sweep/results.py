"""Reads what a sweep wrote, and chooses each rank's learning rate.

An arm is a cell without its seed and rate: what is compared. Each arm is
measured at its own best rate, the one with the least mean loss over seeds on
the validation records; what is reported is the loss on the test records.
"""

from collections.abc import Iterable
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax import files
from gemma_jax.runs import metrics
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.sweep import manifest as manifest_lib

Arm = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A cell and what became of it.

  Attributes:
    name: of the cell.
    kind: base, lora, full or truncated.
    axes: as `grid.Cell.axes`.
    folder: of the cell.
    entry: its line in the manifest.
    result: what `result.json` holds, or None.
    error: why it failed, or None.
  """

  name: str
  kind: str
  axes: dict[str, Any]
  folder: Path
  entry: dict[str, Any]
  result: dict[str, Any] | None
  error: str | None

  @property
  def arm(self) -> Arm:
    """What it shares with cells of another seed or rate."""
    own = ('seed', 'learning_rate')
    return tuple((k, v) for k, v in sorted(self.axes.items()) if k not in own)

  @property
  def has_ended(self) -> bool:
    """Whether it has a result or has failed."""
    return self.result is not None or self.error is not None

  @property
  def seconds(self) -> float:
    """Of training, if it has a result."""
    assert self.result is not None
    return self.result['seconds']

  @functools.cached_property
  def losses(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Step → nll [N] in nats and supervised tokens [N], by held-out record."""
    found = {}
    for path in self.folder.glob('heldout/step_*.jsonl'):
      step = int(path.stem.removeprefix('step_'))
      rows = workdir_lib.read_heldout(str(self.folder), step)
      found[step] = tuple(np.array([row[name] for row in rows]) for name in ('nll', 'tokens'))
    return dict(sorted(found.items()))

  @property
  def last(self) -> tuple[np.ndarray, np.ndarray]:
    """(nll [N], tokens [N]) after the last update."""
    return self.losses[max(self.losses)]

  def loss(self, which: np.ndarray, step: int | None = None) -> float:
    """Nats per token where `which` [N] is true, after a step (the last)."""
    nll, tokens = self.last if step is None else self.losses[step]
    return float(nll[which].sum() / max(tokens[which].sum(), 1))

  def clipped(self, clip_norm: float) -> float | None:
    """Share of its updates whose gradient norm was above clip_norm.

    None where nothing is clipped (clip_norm 0), or no update was made.
    """
    if not clip_norm:
      return None
    rows = metrics.read(self.folder / 'metrics.jsonl')
    norms = [row['grad_norm'] for row in rows if 'grad_norm' in row]
    return float(np.mean(np.array(norms) > clip_norm)) if norms else None

  def spectrum(self, step: int | None = None) -> dict[str, np.ndarray]:
    """Path → singular values [L, R] of the update after a step (the last)."""
    if step is None:
      step = max(self.losses)
    saved = workdir_lib.read_json(str(self.folder / 'spectrum'), f'step_{step}.json')
    return {name: np.array(x) for name, x in (saved or {}).items()}


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A sweep's folder.

  Attributes:
    folder: of the sweep.
    manifest: what it planned.
    cells: outcomes, truncated adapters included.
    heldout: a line a held-out record (`manifest`).
  """

  folder: Path
  manifest: dict[str, Any]
  cells: list[Outcome]
  heldout: list[dict[str, Any]]

  def part(self, name: str) -> np.ndarray:
    """bool [N]: the records of 'validation' or 'test'."""
    return np.array([row['part'] == name for row in self.heldout])

  def finished(self, kind: str) -> list[Outcome]:
    """Cells of a kind that have a result."""
    return [c for c in self.cells if c.kind == kind and c.result is not None]

  def has_ended(self, arm: Arm) -> bool:
    """Whether every cell that trains an arm has."""
    return all(cell.has_ended for cell in self.cells if cell.kind == 'lora' and cell.arm == arm)

  def chosen(self, kind: str = 'lora') -> dict[Arm, list[Outcome]]:
    """Arm → its cells at the rate that validation chose, by seed.

    A rate that some seed lacks (it diverged there) is no candidate while
    another has them all.
    """
    by_arm: dict[Arm, dict[float, list[Outcome]]] = {}
    for cell in self.finished(kind):
      rates = by_arm.setdefault(cell.arm, {})
      rates.setdefault(cell.axes['learning_rate'], []).append(cell)
    validation = self.part('validation')
    found = {}
    for arm, rates in by_arm.items():
      most = max(len(cells) for cells in rates.values())
      best = min(
        (cells for cells in rates.values() if len(cells) == most),
        key=lambda cells: _mean([c.loss(validation) for c in cells]),
      )
      found[arm] = sorted(best, key=lambda cell: cell.axes['seed'])
    return found


def read(workdir: str) -> Sweep:
  """Reads a sweep's folder; ValueError if it is none."""
  folder = Path(workdir)
  manifest = workdir_lib.read_json(workdir, manifest_lib.NAME)
  if manifest is None:
    raise ValueError(
      f'{workdir}: holds no {manifest_lib.NAME}, expected the workdir of launch.sweep.'
    )
  entries = list(manifest['cells'])
  for path in sorted(folder.glob('cells/*/truncated.json')):
    entries.append(workdir_lib.read_json(str(path.parent), path.name))
  return Sweep(
    folder=folder,
    manifest=manifest,
    cells=list(_outcomes(workdir, entries)),
    heldout=files.read_json_lines(folder / 'heldout.jsonl'),
  )


def table(sweep: Sweep) -> str:
  """All cells with their effective scale and rate, and what became of them."""
  header = (
    f'{"cell":<34}{"parameters":>12}{"scale":>9}{"rate":>10}'
    f'{"validation":>12}{"test":>9}{"seconds":>9}  state'
  )
  lines = [header]
  parts = [sweep.part(name) for name in ('validation', 'test')]
  for cell in sweep.cells:
    losses, seconds, state = ('-', '-'), '-', 'waiting'
    if cell.result is not None:
      losses = tuple(f'{cell.loss(part):.4f}' for part in parts)
      if 'seconds' in cell.result:
        seconds = f'{cell.result["seconds"]:.1f}'
      state = 'finished'
    elif cell.error is not None:
      state = f'failed: {cell.error}'
    scale, rate = (
      f'{cell.entry[name]:.4g}' if name in cell.entry else '-' for name in ('scale', 'rate')
    )
    lines.append(
      f'{cell.name:<34}{cell.entry["trainable_parameters"]:>12,}{scale:>9}'
      f'{rate:>10}{losses[0]:>12}{losses[1]:>9}{seconds:>9}  {state}'
    )
  return '\n'.join(lines)


def _mean(losses: list[float]) -> float:
  """inf where one is not a number, so that it is never the least."""
  return float(np.mean(losses)) if np.isfinite(losses).all() else np.inf


def _outcomes(workdir: str, entries: list[dict]) -> Iterable[Outcome]:
  for entry in entries:
    folder = manifest_lib.cell_folder(workdir, entry['name'])
    failed = workdir_lib.read_json(folder, 'failed.json')
    yield Outcome(
      name=entry['name'],
      kind=entry['kind'],
      axes=entry['axes'],
      folder=Path(folder),
      entry=entry,
      result=workdir_lib.read_json(folder, 'result.json'),
      error=None if failed is None else failed['error'],
    )
