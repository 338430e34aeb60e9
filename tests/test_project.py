"""What stands around the code says what is there: versions, files, rooms."""

import ast
from pathlib import Path
import re
import subprocess
import sys

import pytest
import yaml  # flax needs it too

import gemma_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'gemma_jax'

# Imports point down this list only; the package's own front door is above it.
ROOMS = (
  *('sweep', 'tpu', 'export', 'runs', 'sampling', 'formats', 'training'),
  *('lora', 'model', 'data', 'config', 'pytree', 'files', 'temporary'),
)

# Those that still point up. None comes in; one that is mended leaves.
UPWARD = {
  ('lora/lora.py', 'formats'),  # Lora.load and Lora.save, where people look for them
}

TOP = {
  *('gemma_jax', 'experiments', 'launch', 'tests', 'setup.py', 'pyproject.toml', 'LICENSE'),
  *('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'CITATION.cff'),
}


def read(name):
  return (ROOT / name).read_text('utf-8')


def imported(source):
  """What of gemma_jax and its neighbours a module imports, anywhere in it.

  'from gemma_jax.model import rope'  gemma_jax.model.rope
  """
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'line {node.lineno}: a relative import'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    for name in names:
      if name.split('.')[0] in ('gemma_jax', 'launch', 'experiments', 'tests'):
        yield name


def upward(path, source):
  """The rooms above its own from which the module at a path imports."""
  floor = ROOMS.index(path.split('/')[0].removesuffix('.py'))
  for name in imported(source):
    package, *rest = name.split('.')
    room = rest[0] if rest else ''
    inside = package == 'gemma_jax' and room in ROOMS
    if not inside or ROOMS.index(room) < floor:
      yield room if inside else name


@pytest.mark.parametrize(
  'path, source, expected',
  [
    ('model/rope.py', 'from gemma_jax import files, pytree', []),
    ('model/rope.py', 'from gemma_jax.model import layers', []),
    ('model/rope.py', 'from gemma_jax import lora', ['lora']),
    ('model/rope.py', 'def f():\n  import gemma_jax.runs.train as train', ['runs']),
    ('files.py', 'from gemma_jax.pytree import items', ['pytree']),
    ('sweep/grid.py', 'import gemma_jax', ['gemma_jax']),
    ('sweep/grid.py', 'from gemma_jax import Trainer', ['gemma_jax.Trainer']),
    ('sweep/grid.py', 'from launch import app', ['launch.app']),
  ],
)
def test_an_import_that_points_up_is_seen(path, source, expected):
  assert list(upward(path, source)) == expected


def test_imports_point_down():
  paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob('*.py')}
  del paths['__init__.py']
  assert {path.split('/')[0].removesuffix('.py') for path in paths} == set(ROOMS)
  got = {
    (name, room) for name, path in paths.items() for room in upward(name, path.read_text('utf-8'))
  }
  assert got == UPWARD


def test_the_rooms_are_those_that_are_written_down():
  assert f'    {" → ".join(ROOMS)}\n' in read('CONTRIBUTING.md')
  for path, _ in UPWARD:
    assert f'`{path}`' in read('CONTRIBUTING.md')


def test_the_package_is_built_whole_and_has_one_version(tmp_path):
  command = [sys.executable, 'setup.py', '--quiet', 'build_py', '--build-lib', tmp_path]
  command += ['egg_info', '--egg-base', tmp_path]
  subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
  built = {path.relative_to(tmp_path) for path in (tmp_path / 'gemma_jax').rglob('*.*')}
  there = {path.relative_to(ROOT) for path in PACKAGE.rglob('*.*') if path.suffix != '.pyc'}
  assert built == there
  assert Path('gemma_jax/py.typed') in built
  info = (tmp_path / 'gemma_jax.egg-info' / 'PKG-INFO').read_text('utf-8')
  assert f'\nVersion: {gemma_jax.__version__}\n' in info
  assert yaml.safe_load(read('CITATION.cff'))['version'] == gemma_jax.__version__


def test_importing_the_package_loads_neither_jax_nor_flax():
  program = 'import sys, gemma_jax; print("jax" in sys.modules, "flax" in sys.modules)'
  command = [sys.executable, '-c', program]
  ran = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
  assert ran.stdout.split() == ['False', 'False']


# A path in backticks, and behind a colon a name in that file.
_PATH = r'`([\w./]+/[\w./]*|\w+\.(?:py|md))(?::(\w+))?`'


def defined(path):
  """Names of a Python file: of its top level, and of its classes' bodies."""
  tree = ast.parse(path.read_text('utf-8'))
  inner = [node for each in tree.body if isinstance(each, ast.ClassDef) for node in each.body]
  for node in (*tree.body, *inner):
    if isinstance(node, ast.Assign | ast.AnnAssign):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      yield from (target.id for target in targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
      yield node.name


def place(name):
  """Where a path of CONTRIBUTING.md is: in the repository, or in the package."""
  return PACKAGE / name if (PACKAGE / name).exists() else ROOT / name


def test_paths_that_contributing_names_are_there():
  paths = re.findall(_PATH, read('CONTRIBUTING.md'))
  assert len(paths) > 40
  for name, inside in paths:
    path = place(str(Path(name).parent) if 'NAME' in name else name)
    assert path.exists(), name
    assert not inside or inside in defined(path), f'{name}:{inside}'


def test_recipes_have_five_steps_and_their_names_are_there():
  """A bare name stands in one of the files that its recipe names."""
  _, *recipes = re.split(
    r'^\*\*An? ', read('CONTRIBUTING.md').split('## How to add\n')[1], flags=re.M
  )
  assert len(recipes) == 6
  for recipe in recipes:
    assert re.findall(r'^(\d)\. ', recipe, re.M) == list('12345')
    assert 'Test: ' in recipe
    files = [name for name, _ in re.findall(_PATH, recipe) if 'NAME' not in name]
    texts = [place(name).read_text('utf-8') for name in files if name.endswith('.py')]
    for word in re.findall(r'`(\w+)`', recipe):
      assert any(re.search(rf'\b{word}\b', text) for text in texts), word


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'])
def test_links_lead_somewhere(name):
  for target in re.findall(r'\]\(([^)#\s]+)', read(name)):
    assert '://' in target or (ROOT / target).exists(), target


def test_the_table_of_the_code_names_files_that_are_there():
  table = read('README.md').split('## The code\n')[1].split('\n## ')[0]
  rows = re.findall(r'^\| (?:`(\w+)/`|\(top\)) \| (.*) \|$', table, re.MULTILINE)
  for folder, text in rows:
    for name in re.findall(r'`(\w+)`', text):
      assert (PACKAGE / folder / f'{name}.py').is_file(), f'{folder}/{name}'
  folders = {path.parent.name for path in PACKAGE.glob('*/__init__.py')}
  assert {folder for folder, _ in rows} == folders | {''}


def test_citation():
  citation = yaml.safe_load(read('CITATION.cff'))
  assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys()
  assert citation['cff-version'] == '1.2.0'
  assert citation['authors'] == [{'name': 'gemma_jax developers'}]


def test_the_workflow_only_calls_what_any_machine_can_run():
  workflow = yaml.safe_load(read('.github/workflows/ci.yml'))
  assert workflow['permissions'] == {'contents': 'read'}
  assert set(workflow[True]) == {'push', 'pull_request'}  # YAML 1.1 reads "on" so
  (job,) = workflow['jobs'].values()
  assert [step['run'] for step in job['steps'] if 'run' in step] == ['bash .ci/run']
  for step in job['steps']:
    assert 'run' in step or re.fullmatch(r'actions/[\w-]+@v\d+', step['uses'])


def test_hooks_are_local_and_installed_by_the_tests():
  (repo,) = yaml.safe_load(read('.pre-commit-config.yaml'))['repos']
  assert repo['repo'] == 'local'
  for hook in repo['hooks']:
    assert hook['language'] == 'system'
    assert hook['entry'].startswith(('.venv/bin/ruff ', '.venv/bin/basedpyright '))


def test_nothing_else_stands_at_the_top():
  listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
  if listed.returncode:
    pytest.skip('this is not a git checkout')
  names = {line.split('/')[0] for line in listed.stdout.splitlines()}
  assert {name for name in names if not name.startswith('.')} == TOP
