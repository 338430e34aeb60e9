"""What a sweep's folder holds, and who may go on with it.

manifest.json     config, fingerprints, cells and jobs; made once, then kept
heldout.jsonl     a line a held-out record: index, part, category, prompt
leases/           who works on which job (`leases`)
cells/NAME/       of a cell: heldout/, spectrum/, metrics.jsonl, adapter/ and
                  result.json, or failed.json, without which it is tried again
jobs/NAME/        checkpoints of a gang that is being trained
samples.jsonl     answers of the base and of each rank, side by side

Held-out records are validation or test by a hash of their prompt: rates are
chosen on the former, losses reported on the latter.
"""

import os
from pathlib import Path
import shutil
from typing import Any, NamedTuple

from absl import logging

from gemma_jax import files
from gemma_jax.config import train as config_lib
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
from gemma_jax.sweep.grid import Cell, SweepConfig, make_cells

NAME = 'manifest.json'
SAMPLES = 'samples.jsonl'


def check_same_sweep(workdir: str, config: SweepConfig) -> bool:
  """Whether the folder has a manifest; ValueError if it is of another sweep."""
  saved = workdir_lib.read_json(workdir, NAME)
  if saved is None:
    if any(Path(workdir).glob('run.json')):
      raise ValueError(
        f'workdir {workdir}: is of a single run, expected an empty folder or '
        'one of this sweep. Use another workdir.'
      )
    if any(Path(workdir).glob('cells/*/result.json')):
      raise ValueError(
        f'workdir {workdir}: has cells but no {NAME}, which says on what they '
        'were trained. Put it back, or use another workdir.'
      )
    return False
  resume.check_fields(
    workdir,
    saved['config'],
    config_lib.to_dict(config),
    SweepConfig(),
    # All cells of a table have as many steps.
    resume.FREE_FIELDS + resume.PATH_FIELDS,
  )
  return True


class Checked(NamedTuple):
  """A sweep's cells.

  Attributes:
    cells: all of them.
    resolved: configs of those that can run, by name.
    refused: why the others cannot, by name.
  """

  cells: list[Cell]
  resolved: dict[str, TrainConfig]
  refused: dict[str, str]

  @property
  def adapters(self) -> dict[str, TrainConfig]:
    """Of `resolved`, those that train an adapter."""
    return {
      cell.name: self.resolved[cell.name]
      for cell in self.cells
      if cell.kind == 'lora' and cell.name in self.resolved
    }


class Draft(NamedTuple):
  """A sweep before anything is written.

  Attributes:
    checked: its cells.
    run: one of the cells, prepared: its base and its records.
    heldout: lines of heldout.jsonl.
  """

  checked: Checked
  run: run_lib.Run
  heldout: list[dict[str, Any]]


def draft(config: SweepConfig) -> Draft:
  """Makes the cells and reads the records.

  Raises:
    ValueError: nothing of the sweep can run.
  """
  source = open_base.open_base(config.model.path, config.model.tokenizer)
  checked = check_cells(config, source.config)
  run = run_lib.prepare(next(iter(checked.resolved.values())))
  for line in describe.describe_data(run):
    logging.info('%s', line)
  return Draft(checked, run, _heldout(config, run))


def check_cells(config: SweepConfig, model_config: ModelConfig) -> Checked:
  """Makes the cells and resolves those that can be.

  Raises:
    ValueError: none of them can.
  """
  cells = make_cells(config, model_config)
  refused, resolved = {}, {}
  for cell in cells:
    try:
      each = cell.config.resolve()
      factors.check_rank(model_config, each.lora)
      resolved[cell.name] = each
    except ValueError as e:
      refused[cell.name] = str(e)
      logging.warning('The cell %s is refused: %s', cell.name, e)
  adapters = [cell for cell in cells if cell.kind != 'base']
  if all(cell.name in refused for cell in adapters):
    raise ValueError(
      f'grid: got {len(adapters)} cells and all of them are refused, the first '
      f'because: {next(iter(refused.values()))}'
    )
  return Checked(cells, resolved, refused)


def make(config: SweepConfig, workdir: str, made: Draft) -> None:
  """Plans the jobs of a drafted sweep and writes the manifest, last."""
  cells, _, refused = made.checked
  jobs = _jobs(config, made.checked)
  for name, error in refused.items():
    folder = cell_folder(workdir, name)
    os.makedirs(folder, exist_ok=True)
    workdir_lib.write_json(folder, 'failed.json', {'error': error})
  files.write_json_lines(f'{workdir}/heldout.jsonl', made.heldout)
  source = made.run.base.source
  workdir_lib.write_json(
    workdir,
    NAME,
    {
      'config': config_lib.to_dict(config),
      'fingerprints': made.run.fingerprints(),
      'records': describe.describe_data(made.run),
      'base': source.reference,
      'steps': made.run.steps,
      'cells': [_entry(cell, source.config, refused) for cell in cells],
      'jobs': jobs,
    },
  )


def cell_folder(workdir: str, name: str) -> str:
  """Of a cell."""
  return os.path.join(workdir, 'cells', name)


def reopen(workdir: str) -> None:
  """Removes what finalizing made of cells, one of which is going to change."""
  folder = Path(workdir)
  for name in ('closed.json', SAMPLES):
    (folder / name).unlink(missing_ok=True)
  for path in folder.glob('cells/*/truncated.json'):
    shutil.rmtree(path.parent)


def has_ended(workdir: str, names: list[str]) -> bool:
  """Whether every cell has a result or a failure."""
  return all(
    any(
      os.path.exists(os.path.join(cell_folder(workdir, name), file))
      for file in ('result.json', 'failed.json')
    )
    for name in names
  )


def _entry(cell: Cell, model_config, refused) -> dict[str, Any]:
  """A cell as the manifest shows it."""
  entry = {'name': cell.name, 'kind': cell.kind, 'axes': cell.axes}
  if cell.kind == 'base' or cell.name in refused:
    return {**entry, 'trainable_parameters': 0}
  config = cell.config.resolve()
  counts = summary.summarize(config, model_config).counts
  entry['trainable_parameters'] = counts['trainable']
  entry['rate'] = config.optimizer.learning_rate
  if cell.kind == 'lora':
    entry['scale'] = config.lora.scale
  return entry


def _jobs(config: SweepConfig, checked: Checked) -> list[dict[str, Any]]:
  """Base and full cells alone, the others in gangs that fit in memory."""
  cells, resolved, _ = checked
  jobs = [
    {'name': cell.name, 'kind': cell.kind, 'cells': [cell.name]}
    for cell in cells
    if cell.kind != 'lora' and cell.name in resolved
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
  """What is known of each held-out record, beside the sweep's results."""
  records = sources.load_records(config.data).heldout
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
      f'data: the {len(rows)} held-out records are all of one part '
      f'({parts.pop()}), expected some of validation and some of test. Hold '
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
