"""What adapters look like inside: spectra, and the directions they share.

Seeds and ranks are compared by the input directions of their updates (after
section 7.2 of Hu et al. 2021, which takes those of A alone). Cells of one seed
start from nested factors, so they share directions from the first step on; the
similarity between seeds shows what was learnt.
"""

import numpy as np

from gemma_jax.formats import adapter
from gemma_jax.lora import spectrum
from gemma_jax.model.config import ModelConfig
from gemma_jax.sweep.results import Outcome

# Of each update, the strongest directions that are compared.
DIRECTIONS = 4

Directions = dict[str, np.ndarray]


def effective_ranks(cell: Outcome) -> dict[int, float]:
  """Step → effective rank, mean over projections and layers."""
  return {
    step: float(
      np.mean([spectrum.effective_rank(values).mean() for values in cell.spectrum(step).values()])
    )
    for step in cell.losses
  }


def energies(cell: Outcome) -> dict[int, float]:
  """Step → |dW|_F^2, summed over projections and layers."""
  return {
    step: float(sum((v**2).sum() for v in cell.spectrum(step).values())) for step in cell.losses
  }


def directions(cell: Outcome, config: ModelConfig) -> Directions:
  """The strongest input directions of a cell's adapter, by projection."""
  found = spectrum.input_directions(adapter.read(cell.folder / 'adapter', config), config)
  return {path: u[..., :DIRECTIONS] for path, u in found.items()}


def between(cells: list[Directions]) -> np.ndarray:
  """Similarity [n, n] of adapters, mean over projections and layers.

  An entry compares as many directions as the smaller adapter has.
  """
  count = len(cells)
  found = np.eye(count)
  for i in range(count):
    for j in range(i):
      values = []
      for path in cells[i].keys() & cells[j].keys():
        first, second = cells[i][path], cells[j][path]
        k = min(first.shape[-1], second.shape[-1])
        values.append(spectrum.similarity(first[..., :k], second[..., :k]))
      found[i, j] = found[j, i] = np.mean(values)
  return found


def between_layers(cell: Directions, path: str) -> np.ndarray:
  """Similarity [L, L] of one projection's updates across layers."""
  u = cell[path]
  return spectrum.similarity(u[:, None], u[None])


def by_chance(cell: Directions) -> float:
  """The similarity of as many random directions, mean over projections."""
  return float(np.mean([u.shape[-1] / u.shape[-2] for u in cell.values()]))
