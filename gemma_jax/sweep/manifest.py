"""What a sweep's folder holds, and which sweep may continue in it.

manifest.json     config, fingerprints, trials and jobs; written once, then kept
heldout.jsonl     one line per held-out record: index, part, category, prompt
leases/           which machine works on which job (`leases`)
cells/NAME/       of a trial: heldout/, spectrum/, metrics.jsonl, adapter/ and
                  result.json or failed.json; with neither, it is tried again
jobs/NAME/        checkpoints of a batch of adapters that is being trained
samples.jsonl     answers of the base and of each rank, side by side
closed.json       written once the sweep is finalized

Names on disk and flags are promised, so they keep older words: `cells` are
trials, a `gang` (`max_gang`, `gang_size`, `gang_step_secs`) is a batch of
adapters, and the job `closing` finalizes the sweep.

Held-out records are validation or test by a hash of their prompt: rates are
chosen on the former, losses reported on the latter.
"""

import os
from pathlib import Path
import shutil
from typing import Any, NamedTuple

from absl import logging

from gemma_jax import files
from gemma_jax.config.sweep import SweepConfig
from gemma_jax.config.train import TrainConfig
from gemma_jax.data import sources
from gemma_jax.data.examples import Example
from gemma_jax.formats import open_base
from gemma_jax.lora import factors
from gemma_jax.model.config import ModelConfig
from gemma_jax.runs import describe, resume, summary
from gemma_jax.runs import prepare as run_lib
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.sweep import plan
from gemma_jax.sweep.grid import Trial, make_trials

NAME = 'manifest.json'
SAMPLES = 'samples.jsonl'


def check_same_sweep(workdir: str, config: SweepConfig) -> bool:
  """Whether the folder has a manifest.

  Raises:
    ValueError: the folder belongs to a single run or to another sweep.
  """
  saved = workdir_lib.read_json(workdir, NAME)
  if saved is None:
    if any(Path(workdir).glob('run.json')):
      raise ValueError(
        f'workdir {workdir}: belongs to a single run, expected an empty folder or '
        'one of this sweep. Use another workdir.'
      )
    if any(Path(workdir).glob('cells/*/result.json')):
      raise ValueError(
        f'workdir {workdir}: has trials but no {NAME}, which says what they were '
        'trained on. Put it back, or use another workdir.'
      )
    return False
  resume.check_fields(
    workdir,
    saved['config'],
    config.to_dict(),
    SweepConfig().to_dict(),
    # All trials of a table have the same number of steps.
    resume.FREE_FIELDS + resume.PATH_FIELDS,
  )
  return True


class Checked(NamedTuple):
  """A sweep's trials.

  Attributes:
    trials: all of them.
    resolved: configs of those that can run, by name.
    unsupported_reasons: why the others cannot, by name.
  """

  trials: list[Trial]
  resolved: dict[str, TrainConfig]
  unsupported_reasons: dict[str, str]

  @property
  def adapters(self) -> dict[str, TrainConfig]:
    """The configs in `resolved` that train an adapter."""
    return {
      trial.name: self.resolved[trial.name]
      for trial in self.trials
      if trial.kind == 'lora' and trial.name in self.resolved
    }


class Draft(NamedTuple):
  """A sweep before anything is written.

  Attributes:
    checked: its trials.
    run: one of the trials, prepared, with its base and its records.
    heldout: the lines of heldout.jsonl.
  """

  checked: Checked
  run: run_lib.Run
  heldout: list[dict[str, Any]]


def draft(config: SweepConfig) -> Draft:
  """Makes the trials and reads the records.

  Raises:
    ValueError: no trial of the sweep can run.
  """
  source = open_base.open_base(config.base.model.path, config.base.model.tokenizer)
  checked = check_trials(config, source.config)
  run = run_lib.prepare(next(iter(checked.resolved.values())))
  for line in describe.describe_data(run):
    logging.info('%s', line)
  return Draft(checked, run, _heldout(config, run))


def check_trials(config: SweepConfig, model_config: ModelConfig) -> Checked:
  """Makes the trials and resolves those that can run.

  Raises:
    ValueError: none of them can.
  """
  trials = make_trials(config, model_config)
  reasons, resolved = {}, {}
  for trial in trials:
    try:
      each = trial.config.resolve()
      factors.check_rank(model_config, each.lora)
      resolved[trial.name] = each
    except ValueError as e:
      reasons[trial.name] = str(e)
      logging.warning('Trial %s cannot run: %s', trial.name, e)
  adapters = [trial for trial in trials if trial.kind != 'base']
  if all(trial.name in reasons for trial in adapters):
    raise ValueError(
      f'grid: got {len(adapters)} trials, none of which can run, the first '
      f'because: {next(iter(reasons.values()))}'
    )
  return Checked(trials, resolved, reasons)


def make(config: SweepConfig, workdir: str, made: Draft) -> None:
  """Plans the jobs of a drafted sweep and writes the manifest, last."""
  trials, _, reasons = made.checked
  jobs = _jobs(config, made.checked)
  for name, error in reasons.items():
    folder = trial_folder(workdir, name)
    os.makedirs(folder, exist_ok=True)
    workdir_lib.write_json(folder, 'failed.json', {'error': error})
  files.write_json_lines(f'{workdir}/heldout.jsonl', made.heldout)
  source = made.run.base.source
  workdir_lib.write_json(
    workdir,
    NAME,
    {
      'config': config.to_dict(),
      'fingerprints': made.run.fingerprints(),
      'records': describe.describe_data(made.run),
      'base': source.reference,
      'steps': made.run.steps,
      'cells': [_entry(trial, source.config, reasons) for trial in trials],
      'jobs': jobs,
    },
  )


def trial_folder(workdir: str, name: str) -> str:
  """Returns the folder of a trial."""
  return os.path.join(workdir, 'cells', name)


def reopen(workdir: str) -> None:
  """Removes what finalizing wrote, since a trial is about to change."""
  folder = Path(workdir)
  for name in ('closed.json', SAMPLES):
    (folder / name).unlink(missing_ok=True)
  for path in folder.glob('cells/*/truncated.json'):
    shutil.rmtree(path.parent)


def has_ended(workdir: str, names: list[str]) -> bool:
  """Whether every trial has a result or a failure."""
  return all(
    any(
      os.path.exists(os.path.join(trial_folder(workdir, name), file))
      for file in ('result.json', 'failed.json')
    )
    for name in names
  )


def _entry(trial: Trial, model_config, reasons) -> dict[str, Any]:
  """A trial as it appears in the manifest."""
  entry = {'name': trial.name, 'kind': trial.kind, 'axes': trial.axes}
  if trial.kind == 'base' or trial.name in reasons:
    return {**entry, 'trainable_parameters': 0}
  config = trial.config.resolve()
  counts = summary.summarize(config, model_config).counts
  entry['trainable_parameters'] = counts['trainable']
  entry['rate'] = config.optimizer.learning_rate
  if trial.kind == 'lora':
    entry['scale'] = config.lora.scale
  return entry


def _jobs(config: SweepConfig, checked: Checked) -> list[dict[str, Any]]:
  """Base and full trials alone, the others in batches that fit in memory."""
  trials, resolved, _ = checked
  jobs = [
    {'name': trial.name, 'kind': trial.kind, 'cells': [trial.name]}
    for trial in trials
    if trial.kind != 'lora' and trial.name in resolved
  ]
  sizes: dict[tuple[Any, ...], list[list[int]]] = {}
  for names in plan.groups(checked.adapters):
    configs = [resolved[name] for name in names]
    key = plan.shape_key(configs)
    if key not in sizes:
      sizes[key] = plan.split(configs, config.grid.max_gang, int(config.grid.memory_gib * 2**30))
    for part in sizes[key]:
      jobs.append({'name': f'gang-{len(jobs)}', 'kind': 'gang', 'cells': [names[i] for i in part]})
  return jobs


def _heldout(config: SweepConfig, run: run_lib.Run) -> list[dict[str, Any]]:
  """What is known of each held-out record, apart from the sweep's results."""
  records = sources.load_records(config.base.data).heldout
  rows = []
  for index, example in zip(run.data.heldout.record_ids.tolist(), run.data.heldout, strict=True):
    record = records[index]
    rows.append(
      {
        'index': index,
        'part': sources.heldout_part(record),
        'category': record.category,
        'prompt': record.question or _asked(run, example),
        'context': record.context,
      }
    )
  parts = {row['part'] for row in rows}
  if len(parts) < 2:
    raise ValueError(
      f'data: the {len(rows)} held-out records are all in one part '
      f'({parts.pop()}), expected some in validation and some in test. Hold '
      'out more records, or raise data.max_eval_records.'
    )
  return rows


def _asked(run: run_lib.Run, example: Example) -> str:
  """The tokens before the first target, as text where there is a tokenizer."""
  start = int(example.loss_mask.argmax())
  asked = example.tokens[:start].tolist()
  if run.base.tokenizer is None:
    return ' '.join(map(str, asked))
  return run.base.tokenizer.decode(asked)
