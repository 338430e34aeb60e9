"""The notebooks run from top to bottom, and say what is true.

On a tiny model with random weights, in a kernel of their own as Jupyter starts
it; what a notebook prints is compared where its text promises something.
"""

import json
import math
import os
from pathlib import Path
import re
import sys

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import optax
import pytest

from gemma_jax.config.lora import LoraConfig
from gemma_jax.config.train import BaseConfig, MeshConfig
from gemma_jax.data import examples
from gemma_jax.runs.base import Base
from gemma_jax.runs.program import Program
from gemma_jax.training import optimizer, state

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'experiments' / 'notebooks'
NAMES = sorted(path.stem for path in FOLDER.glob('*.ipynb'))


def read(name):
  return nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)


@pytest.fixture(scope='module')
def kernels(tmp_path_factory):
  """A folder of kernels that has this Python and nobody else's."""
  folder = tmp_path_factory.mktemp('jupyter')
  spec = folder / 'kernels' / 'python3' / 'kernel.json'
  spec.parent.mkdir(parents=True)
  argv = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
  spec.write_text(json.dumps({'argv': argv, 'display_name': 'Python 3', 'language': 'python'}))
  return folder


def run(name, kernels, **environ):
  """(everything it prints, the kinds of output it shows)."""
  own = {
    'JUPYTER_PATH': str(kernels),
    'JUPYTER_RUNTIME_DIR': str(kernels / 'runtime'),
    'IPYTHONDIR': str(kernels / 'ipython'),
    'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
    'JAX_PLATFORMS': 'cpu',
    **environ,
  }
  with pytest.MonkeyPatch.context() as patch:
    for key, value in own.items():
      patch.setenv(key, value)
    notebook = read(name)
    nbclient.NotebookClient(
      notebook, timeout=900, kernel_name='python3', resources={'metadata': {'path': str(kernels)}}
    ).execute()
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
  # Warnings go to stderr: a user would see them.
  printed = ''.join(x.text for x in outputs if x.output_type == 'stream' and x.name == 'stdout')
  return printed, [x for x in outputs if 'image/png' in x.get('data', {})]


TINY = {'MODEL': 'random:tiny3', 'STEPS': '12', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}


@pytest.mark.parametrize('name', NAMES)
def test_is_kept_clean(name):
  """Valid, without outputs or counts, and its parameters are in the first cell of code."""
  notebook = read(name)
  nbformat.validate(notebook)
  assert (notebook.nbformat, notebook.cells[0].cell_type) == (4, 'markdown')
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert all(not cell.outputs and cell.execution_count is None for cell in code)
  assert "os.environ.get('MODEL', 'gemma3_270m')" in code[0].source
  assert "os.environ.get('STEPS'," in code[0].source


def test_first_steps(kernels):
  printed, images = run('first_steps', kernels, **TINY)
  assert re.search(r'adapter +\d[\d,]+ ', printed)
  before, after = map(float, re.search(r'loss: ([\d.]+) before, ([\d.]+) after', printed).groups())
  assert after < before
  assert 'step 12: loss' in printed
  assert float(re.search(r'difference from merge: (\S+)', printed)[1]) < 1e-6
  assert printed.endswith("'adapter_model.safetensors', 'gemma_jax.json']\nTrue\n")
  assert len(images) == 1


def test_a_loss_of_your_own(kernels):
  printed, images = run('a_loss_of_your_own', kernels, **TINY)
  numbers = {
    name: (float(before), float(after))
    for name, before, after in re.findall(r'held-out (\w+) +(\S+) before +(\S+) after', printed)
  }
  assert abs(numbers['margin'][0]) < 1e-3 < 0.1 < numbers['margin'][1]
  assert np.isclose(numbers['loss'][0], np.log(2), atol=1e-4)
  assert numbers['loss'][1] < np.log(2)
  assert numbers['accuracy'][1] > max(0.9, numbers['accuracy'][0])
  assert len(images) == 1


def test_inside_an_adapter(kernels):
  printed, images = run('inside_an_adapter', kernels, **TINY)
  ranks = [float(x) for x in re.findall(r'effective rank ([\d.]+) of 8', printed)]
  assert len(ranks) == 7 and all(1 <= rank <= 8 for rank in ranks)
  whole = re.search(r'cut to 8: ([\d.]+), as trained: ([\d.]+)', printed).groups()
  assert np.isclose(*map(float, whole), rtol=1e-5)
  assert len(images) == 3


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_runs_on_the_real_model(name, kernels):
  printed, images = run(name, kernels, MODEL='gemma3_270m', STEPS='3')
  assert images and not re.search(r'\bnan\b', printed)


def loss_cell():
  """The notebook's cell that defines loss and batches."""
  (cell,) = (cell for cell in read('a_loss_of_your_own').cells if 'def dpo(' in cell.source)
  assert 'def batches(' in cell.source
  return cell.source


def test_preferences_take_25_lines():
  """The loss and its batches together; empty lines are not counted."""
  assert len([line for line in loss_cell().splitlines() if line.strip()]) <= 25


def step_text(loss_fn, rows, length):
  """The compiled step of the 270M, from shapes alone."""
  mesh = MeshConfig(fsdp=1)
  base = Base.open(BaseConfig(path='random:gemma3_270m'), mesh, jax.devices()[:1])
  variables = state.abstract_variables(base.config, LoraConfig(targets='all'), base.dtype)
  tx = optax.adamw(1e-3)
  make_optimizer = lambda rate: (optimizer.freeze(tx, ('lora/',)), None)
  program = Program(base.model, base.mesh, variables, ('lora/',), loss_fn, make_optimizer)
  row = examples.empty_row(length)
  batch = {k: jax.ShapeDtypeStruct((rows, length), x.dtype) for k, x in row.items()}
  return program.compile_train_step(program.abstract_batch(batch)).as_text(), base.config


def logits_in(text, config, rows, length):
  """Arrays of a compiled program that hold [T, V], or are as large as [B, T, V]."""
  V = config.vocab_size
  for shape in set(re.findall(r'\b(?:f32|bf16|f16|s32)\[([\d,]+)\]', text)):
    sizes = list(map(int, shape.split(',')))
    if math.prod(sizes) >= rows * length * V or (V in sizes and length in sizes):
      yield sizes


def test_preferences_make_no_logits():
  names = {'jax': jax, 'jnp': jnp, 'BETA': 0.1}
  exec(loss_cell(), names)
  assert not list(logits_in(*step_text(names['dpo'], 8, 192), 8, 192))


def test_logits_are_seen():
  """A loss that makes them is caught by the same search."""

  def naive(model, variables, batch, key):
    hidden = model.hidden(variables, batch, key)
    logits = hidden @ variables['params']['embedder']['input_embedding'].T
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch['targets'][..., None], -1)
    return -picked.sum(), batch['weights'].sum(), {}

  assert list(logits_in(*step_text(naive, 8, 192), 8, 192))
