"""What adapters look like inside: spectra, and the directions they share.

Seeds and ranks are compared by the input directions of their updates (after
section 7.2 of Hu et al. 2021, which takes those of A alone). Trials of one seed
start from nested factors, so they share directions from the first step on; the
similarity between seeds shows what was learnt.
"""

import numpy as np

from gemma_jax.formats import adapter
from gemma_jax.lora import spectrum
from gemma_jax.model.config import ModelConfig
from gemma_jax.sweep.results import Outcome

# How many of each update's strongest directions are compared.
DIRECTIONS = 4

Directions = dict[str, np.ndarray]


def effective_ranks(trial: Outcome) -> dict[int, float]:
  """Step → effective rank, mean over projections and layers."""
  return {
    step: float(
      np.mean([spectrum.effective_rank(values).mean() for values in trial.spectrum(step).values()])
    )
    for step in trial.losses
  }


def energies(trial: Outcome) -> dict[int, float]:
  """Step → |dW|_F^2, summed over projections and layers."""
  return {
    step: float(sum((v**2).sum() for v in trial.spectrum(step).values())) for step in trial.losses
  }


def directions(trial: Outcome, config: ModelConfig) -> Directions:
  """The strongest input directions of a trial's adapter, by projection."""
  every = spectrum.input_directions(adapter.read(trial.folder / 'adapter', config), config)
  return {path: u[..., :DIRECTIONS] for path, u in every.items()}


def between(trials: list[Directions]) -> np.ndarray:
  """Similarity [n, n] of adapters, mean over projections and layers.

  An entry compares as many directions as the smaller adapter has.
  """
  count = len(trials)
  similarity = np.eye(count)
  for i in range(count):
    for j in range(i):
      values = []
      for path in trials[i].keys() & trials[j].keys():
        first, second = trials[i][path], trials[j][path]
        k = min(first.shape[-1], second.shape[-1])
        values.append(spectrum.similarity(first[..., :k], second[..., :k]))
      similarity[i, j] = similarity[j, i] = np.mean(values)
  return similarity


def between_layers(trial: Directions, path: str) -> np.ndarray:
  """Similarity [L, L] of one projection's updates across layers."""
  u = trial[path]
  return spectrum.similarity(u[:, None], u[None])


def by_chance(trial: Directions) -> float:
  """The similarity of the same number of random directions, mean over projections."""
  return float(np.mean([u.shape[-1] / u.shape[-2] for u in trial.values()]))
