"""Held-out losses of many adapters in one pass over the records."""

from collections.abc import Callable
import os
from typing import Any

import jax

from gemma_jax import pytree
from gemma_jax.config.train import TrainConfig
from gemma_jax.data import pipeline
from gemma_jax.runs import batched, evaluate
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.evaluate import Evaluation
from gemma_jax.runs.prepare import Run
from gemma_jax.training import compiler, sharding, state

Stop = Callable[[], bool]


def load_base(run: Run) -> Any:
  """The base's parameters where the mesh wants them."""
  return run.source.load_params(
    run.dtype,
    run.config.model.scan_layers,
    jax.tree.map(lambda x: x.sharding, run.abstract[1]['params']),
  )


def evaluate_members(
  eval_step: Callable[[Any], jax.Array], run: Run, size: int, should_stop: Stop = lambda: False
) -> list[Evaluation]:
  """Sums every member's losses by record.

  Args:
    eval_step: batch on the mesh → losses [K, B, T].
    run: gives the records and the form of the batches.
    size: K.
    should_stop: asked before each batch.

  Raises:
    Stopped: should_stop said so.
  """
  data = run.config.data
  found = evaluate.evaluate(
    lambda batch: eval_step(sharding.put_batch(batch, run.mesh)),
    pipeline.eval_batches(run.heldout, data.seq_len, data.global_batch_size, data.packing),
    len(run.heldout),
    should_stop,
    members=(size,),
  )
  return [Evaluation(row, found.tokens) for row in found.nll]


def evaluate_adapters(
  members: batched.Gang, params: Any, adapters: pytree.Tree, should_stop: Stop = lambda: False
) -> list[Evaluation]:
  """Evaluates adapters that no training is at work on.

  Args:
    members: give scales and shapes.
    params: from `load_base`.
    adapters: of the members, leaves [K, ...].
    should_stop: asked before each batch.
  """
  trainable, frozen = state.split(
    {'params': params, 'lora': adapters}, members.run.config.trainable
  )
  trainable = jax.device_put(trainable, sharding.replicated(members.run.mesh))
  step = compiler.ByLength(members.compile_eval_step, members.run.config.data.seq_len)
  return evaluate_members(
    lambda batch: step(trainable, members.members, frozen, batch),
    members.run,
    len(members),
    should_stop,
  )


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
  members = batched.Gang([config])
  check_inputs(members.run.fingerprints())
  os.makedirs(folder, exist_ok=True)
  params = load_base(members.run)
  (found,) = evaluate_adapters(members, params, members.init_adapters(params), should_stop)
  write_cell(folder, 0, members.run, found)


def write_cell(folder: str, step: int, run: Run, found: Evaluation) -> None:
  """Writes a cell that was evaluated and not trained."""
  os.makedirs(folder, exist_ok=True)
  workdir_lib.write_heldout(folder, step, run.heldout.record_ids, found.nll, found.tokens)
  result = {'steps': step, 'loss_adapted': found.nll_per_token}
  workdir_lib.write_json(folder, 'result.json', result)
