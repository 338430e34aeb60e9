"""Measures gemma_jax beside the tools that people use today.

  python -m experiments.benchmarks.run --suite=decode --model=HF_FOLDER \\
      --hf_python=ENV/bin/python --keras_hub_python=ENV/bin/python \\
      --node_modules=DIR --gguf=F.gguf --output=DIR

Each contestant runs in a fresh process, in alternation (A B C A B C ...), so
that other load on the machine affects all of them alike. A peer whose interpreter
is not given is left out. Prints a table for each case, with medians and their
ratios to the best peer, and writes results.json, table.md and plot.png after
every run; a second call with the same --output adds its rounds to the first's.

The peers' environments: see README.md beside this file.
"""

import datetime
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile

from absl import flags, logging

from experiments.benchmarks import flops, jobs, table
from launch import app

_SUITE = flags.DEFINE_enum('suite', None, list(jobs.SUITES), 'What to measure.')
_MODEL = flags.DEFINE_string(
  'model', None, 'Hugging Face folder with the weights (launch.convert).'
)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the results.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Runs of each contestant.', 1)
_CASE = flags.DEFINE_string('case', '', 'Only cases with this text in their name.')
_RECORDS = flags.DEFINE_string(
  'records', '', 'Token records for the case of real records; if unset, the case is left out.'
)
_MAX_RECORDS = flags.DEFINE_integer(
  'max_records', 0, 'Use only this many of the first --records; 0 is all.'
)
_STEPS = flags.DEFINE_integer('steps', 6, 'Updates of a run of full rows.', 1)
_NEW_TOKENS = flags.DEFINE_integer('new_tokens', 128, 'To decode.', 1)
_HF_PYTHON = flags.DEFINE_string('hf_python', '', 'Interpreter with torch, transformers and peft.')
_KERAS_HUB_PYTHON = flags.DEFINE_string(
  'keras_hub_python', '', 'Interpreter with keras_hub and jax.'
)
_NODE_MODULES = flags.DEFINE_string('node_modules', '', 'node_modules folder with node-llama-cpp.')
_GGUF = flags.DEFINE_string('gguf', '', '4-bit file for llama.cpp.')

_HERE = Path(__file__).parent


def main() -> int:
  """Runs the command."""
  from gemma_jax.formats import open_base

  suite, model, folder = (_given(flag) for flag in (_SUITE, _MODEL, _OUTPUT))
  config = open_base.open_base(model).config
  output = Path(folder).expanduser()
  output.mkdir(parents=True, exist_ok=True)
  programs = _programs()
  with tempfile.TemporaryDirectory() as folder:
    inputs = jobs.Inputs(
      model=str(Path(model).expanduser().resolve()),
      gguf=_GGUF.value,
      records=_RECORDS.value,
      folder=folder,
      vocab_size=config.vocab_size,
      steps=_STEPS.value,
      max_records=_MAX_RECORDS.value,
      new_tokens=_NEW_TOKENS.value,
    )
    cases = [case for case in jobs.SUITES[suite](inputs) if _CASE.value in case.name]
    measured = [(case, _earlier(output, case)) for case in cases]
    facts = {
      'command': ' '.join(sys.argv),
      'commit': _commit(),
      'started': datetime.datetime.now().isoformat(timespec='seconds'),
      'cores': os.cpu_count(),
      'gemm_flops_per_second': [],
    }
    failed = []
    for _ in range(_ROUNDS.value):
      facts['gemm_flops_per_second'].append(flops.gemm_rate())
      for case, results in measured:
        for label, program, job in case.jobs:
          if program not in programs:
            continue
          try:
            result = _run(programs[program], job)
          except ValueError as e:  # the others are still worth measuring
            logging.error('%s, %s: %s', case.name, label, e)
            failed.append(label)
            continue
          rate = max(facts['gemm_flops_per_second'])
          result |= _share(config, job, result, rate)
          result['commit'] = facts['commit']
          results.setdefault(label, []).append(result)
          logging.info('%s, %s: %.4g %s', case.name, label, result[case.metric], case.metric)
          table.write(output, facts, measured)
  print((output / 'table.md').read_text('utf-8'))
  rate = max(facts['gemm_flops_per_second'])
  print(f'float32 GEMM of this machine: {rate / 1e9:.0f} GFLOP/s')
  return 1 if failed else 0


def _given(flag: flags.FlagHolder[str | None]) -> str:
  return flag.value or app.fail(f'--{flag.name}: missing, expected a value; see --help')


def _programs() -> dict[str, tuple[list[str], dict[str, str]]]:
  """Command and environment of every contestant that can run here."""
  ours = [sys.executable, '-m', 'experiments.benchmarks.ours']
  programs = {'ours': (ours, {})}
  for name, python in (('hf', _HF_PYTHON.value), ('keras_hub', _KERAS_HUB_PYTHON.value)):
    if python:
      programs[name] = ([python, str(_HERE / f'peer_{name}.py')], {})
  if _NODE_MODULES.value:
    script = str(_HERE / 'peer_llama_cpp.mjs')
    modules = str(Path(_NODE_MODULES.value).expanduser().resolve())
    programs['llama_cpp'] = (['node', script], {'NODE_MODULES': modules})
  return programs


def _run(program, job) -> dict:
  """A contestant's result, from a fresh process.

  Raises:
    ValueError: it failed; the message has the end of its output.
  """
  command, environment = program
  done = subprocess.run(
    [*command, json.dumps(job)],
    env={**os.environ, **environment},
    capture_output=True,
    encoding='utf-8',
    check=False,
  )
  if done.returncode != 0:
    end = done.stderr.strip().splitlines()[-3:]
    raise ValueError(
      f'{" ".join(command)}: got exit code {done.returncode}, expected 0: ' + ' | '.join(end)
    )
  return json.loads(done.stdout.strip().splitlines()[-1])


def _share(config, job, result, rate: float) -> dict[str, float]:
  """Share of the GEMM rate that full rows reached; {} for other jobs."""
  if job['kind'] != 'train' or not job['steps']:
    return {}
  supervised = result['supervised_tokens'] / result['updates']
  work = flops.train_flops(config, job['batch_size'], job['row_tokens'], supervised)
  return {'share': work / result['step_seconds'] / rate}


def _earlier(output: Path, case: jobs.Case) -> dict[str, list]:
  """Results of the same case that an earlier call left."""
  path = output / 'results.json'
  if path.is_file():
    for earlier in json.loads(path.read_text('utf-8'))['cases']:
      if earlier['name'] == case.name:
        return earlier['results']
  return {}


def _commit() -> str:
  done = subprocess.run(
    ['git', 'rev-parse', '--short', 'HEAD'],
    cwd=_HERE,
    capture_output=True,
    encoding='utf-8',
    check=False,
  )
  return done.stdout.strip() or 'unknown'


if __name__ == '__main__':
  app.run(main)
