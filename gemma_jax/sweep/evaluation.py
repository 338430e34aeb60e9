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
  """Evaluates the base, whose trial equals any adapter before its first update.

  Args:
    config: resolved.
    folder: of the trial.
    should_stop: called before each batch.
    check_inputs: as in `train.train`.
  """
  run = prepare_lib.prepare(config)
  check_inputs(run.fingerprints())
  os.makedirs(folder, exist_ok=True)
  write_trial(folder, 0, run, Trainer.of_run(run).evaluate(should_stop=should_stop))


def write_trial(folder: str, step: int, run: Run, evaluation: Evaluation) -> None:
  """Writes the result of a trial that was evaluated and not trained."""
  os.makedirs(folder, exist_ok=True)
  record_ids = run.data.heldout.record_ids
  workdir_lib.write_heldout(folder, step, record_ids, evaluation.nll, evaluation.tokens)
  result = {'steps': step, 'loss_adapted': evaluation.nll_per_token}
  workdir_lib.write_json(folder, 'result.json', result)
