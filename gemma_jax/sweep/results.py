"""Reads what a sweep wrote, and chooses each rank's learning rate.

An arm is a trial without its seed and rate, and arms are what is compared. Each
arm is measured at its own best rate, the one with the lowest mean loss over seeds
on the validation records; the loss reported is that on the test records.
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
  """A trial and what became of it.

  Attributes:
    name: of the trial.
    kind: base, lora, full or truncated.
    axes: as `grid.Trial.axes`.
    folder: of the trial.
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
    """The axes that it shares with trials of another seed or rate."""
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
    by_step = {}
    for path in self.folder.glob('heldout/step_*.jsonl'):
      step = int(path.stem.removeprefix('step_'))
      rows = workdir_lib.read_heldout(str(self.folder), step)
      by_step[step] = tuple(np.array([row[name] for row in rows]) for name in ('nll', 'tokens'))
    return dict(sorted(by_step.items()))

  @property
  def last(self) -> tuple[np.ndarray, np.ndarray]:
    """(nll [N], tokens [N]) after the last update."""
    return self.losses[max(self.losses)]

  def loss(self, which: np.ndarray, step: int | None = None) -> float:
    """Nats per token where `which` [N] is true, after a step (by default the last)."""
    nll, tokens = self.last if step is None else self.losses[step]
    return float(nll[which].sum() / max(tokens[which].sum(), 1))

  def clipped(self, clip_norm: float) -> float | None:
    """Share of its updates whose gradient norm was above clip_norm.

    None if nothing is clipped (clip_norm 0) or no update was made.
    """
    if not clip_norm:
      return None
    rows = metrics.read(self.folder / 'metrics.jsonl')
    norms = [row['grad_norm'] for row in rows if 'grad_norm' in row]
    return float(np.mean(np.array(norms) > clip_norm)) if norms else None

  def spectrum(self, step: int | None = None) -> dict[str, np.ndarray]:
    """Path → singular values [L, R] of the update after a step (by default the last)."""
    if step is None:
      step = max(self.losses)
    saved = workdir_lib.read_json(str(self.folder / 'spectrum'), f'step_{step}.json')
    return {name: np.array(x) for name, x in (saved or {}).items()}


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A sweep's folder.

  Attributes:
    folder: of the sweep.
    manifest: what was planned.
    trials: outcomes, truncated adapters included.
    heldout: one line per held-out record (`manifest`).
  """

  folder: Path
  manifest: dict[str, Any]
  trials: list[Outcome]
  heldout: list[dict[str, Any]]

  def part(self, name: str) -> np.ndarray:
    """bool [N]: which records are in 'validation' or 'test'."""
    return np.array([row['part'] == name for row in self.heldout])

  def finished(self, kind: str) -> list[Outcome]:
    """The trials of one kind that have a result."""
    return [trial for trial in self.trials if trial.kind == kind and trial.result is not None]

  def has_ended(self, arm: Arm) -> bool:
    """Whether every trial that trains the arm has a result or has failed."""
    return all(
      trial.has_ended for trial in self.trials if trial.kind == 'lora' and trial.arm == arm
    )

  def chosen(self, kind: str = 'lora') -> dict[Arm, list[Outcome]]:
    """Arm → its trials at the rate that validation chose, by seed.

    A rate that lacks a seed (which diverged there) is not a candidate while
    another rate has all of them.
    """
    by_arm: dict[Arm, dict[float, list[Outcome]]] = {}
    for trial in self.finished(kind):
      rates = by_arm.setdefault(trial.arm, {})
      rates.setdefault(trial.axes['learning_rate'], []).append(trial)
    validation = self.part('validation')
    chosen = {}
    for arm, rates in by_arm.items():
      most = max(len(trials) for trials in rates.values())
      best = min(
        (trials for trials in rates.values() if len(trials) == most),
        key=lambda trials: _mean([trial.loss(validation) for trial in trials]),
      )
      chosen[arm] = sorted(best, key=lambda trial: trial.axes['seed'])
    return chosen


def read(workdir: str) -> Sweep:
  """Reads a sweep's folder; ValueError if it is not one."""
  folder = Path(workdir)
  manifest = workdir_lib.read_json(workdir, manifest_lib.NAME)
  if manifest is None:
    raise ValueError(
      f'{workdir}: has no {manifest_lib.NAME}, expected the workdir of launch.sweep.'
    )
  entries = list(manifest['cells'])
  for path in sorted(folder.glob('cells/*/truncated.json')):
    entries.append(workdir_lib.read_json(str(path.parent), path.name))
  return Sweep(
    folder=folder,
    manifest=manifest,
    trials=list(_outcomes(workdir, entries)),
    heldout=files.read_json_lines(folder / 'heldout.jsonl'),
  )


def table(sweep: Sweep) -> str:
  """Lists all trials with their effective scale and rate, and what became of them."""
  header = (
    f'{"trial":<34}{"parameters":>12}{"scale":>9}{"rate":>10}'
    f'{"validation":>12}{"test":>9}{"seconds":>9}  state'
  )
  lines = [header]
  parts = [sweep.part(name) for name in ('validation', 'test')]
  for trial in sweep.trials:
    losses, seconds, state = ('-', '-'), '-', 'waiting'
    if trial.result is not None:
      losses = tuple(f'{trial.loss(part):.4f}' for part in parts)
      if 'seconds' in trial.result:
        seconds = f'{trial.result["seconds"]:.1f}'
      state = 'finished'
    elif trial.error is not None:
      state = f'failed: {trial.error}'
    scale, rate = (
      f'{trial.entry[name]:.4g}' if name in trial.entry else '-' for name in ('scale', 'rate')
    )
    lines.append(
      f'{trial.name:<34}{trial.entry["trainable_parameters"]:>12,}{scale:>9}'
      f'{rate:>10}{losses[0]:>12}{losses[1]:>9}{seconds:>9}  {state}'
    )
  return '\n'.join(lines)


def _mean(losses: list[float]) -> float:
  """The mean; inf if a loss is not finite, so that it is never the lowest."""
  return float(np.mean(losses)) if np.isfinite(losses).all() else np.inf


def _outcomes(workdir: str, entries: list[dict]) -> Iterable[Outcome]:
  for entry in entries:
    folder = manifest_lib.trial_folder(workdir, entry['name'])
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
