"""Trials that are evaluated and not trained."""

from collections.abc import Callable
import os

from gemma_jax.config.train import TrainConfig
from gemma_jax.runs import prepare as prepare_lib
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.evaluate import Evaluation
from gemma_jax.runs.prepare import Run
from gemma_jax.runs.trainer import Trainer

Stop = Callable[[], bool]


def evaluate_base(
  config: TrainConfig,
  folder: str,
  should_stop: Stop = lambda: False,
  check_inputs: Callable[[dict[str, str]], None] = lambda fingerprints: None,
) -> None:
  """The cell of the base: an adapter before its first update is zero.

  Args:
    config: resolved.
    folder: of the cell.
    should_stop: asked before each batch.
    check_inputs: as `train.train` takes it.
  """
  run = prepare_lib.prepare(config)
  check_inputs(run.fingerprints())
  os.makedirs(folder, exist_ok=True)
  found = Trainer.of_run(run).evaluate(should_stop=should_stop)
  write_cell(folder, 0, run, found)


def write_cell(folder: str, step: int, run: Run, found: Evaluation) -> None:
  """Writes a cell that was evaluated and not trained."""
  os.makedirs(folder, exist_ok=True)
  workdir_lib.write_heldout(folder, step, run.data.heldout.record_ids, found.nll, found.tokens)
  result = {'steps': step, 'loss_adapted': found.nll_per_token}
  workdir_lib.write_json(folder, 'result.json', result)
