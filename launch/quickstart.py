"""Trains the quickstart's adapter and shows what it changed.

  bash launch/quickstart.sh

Prints the parameter table, the base's and the adapted answer to one question, and
the held-out loss before and after. Answers are drawn with a fixed seed;
greedy ones (`--greedy`) of so small a model go round in circles. The last line is
the result of launch.train with `answer_base`, `answer_adapted` and
`difference_interval`, the paired 95 % interval of the held-out difference (adapted
minus base, nats per token, bootstrap over records; null with fewer than 10). It
holds for this one adapter: another seed would train a different one.
"""

import os
import shlex
import textwrap

from absl import flags, logging
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from gemma_jax import files
from launch import app

with app.errors_of_flags():
  _CONFIG = config_flags.DEFINE_config_file(
    'config', 'experiments/quickstart.py', 'Experiment file with get_config().'
  )
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/quickstart', 'Folder for checkpoints, adapters and metrics.'
)
_PROMPT = flags.DEFINE_string(
  'prompt', 'What should I do on a trip to Seoul?', 'Asked before and after.'
)
_GREEDY = flags.DEFINE_bool('greedy', False, 'Answer with the most likely tokens, not with draws.')
_MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 120, 'Longest answer, in tokens.')

# How answers are drawn, unless they are greedy.
_DRAWN = {'temperature': 0.7, 'top_p': 0.9, 'seed': 0}


def main() -> int:
  """Runs the command."""
  from gemma_jax.config.train import TrainConfig
  from gemma_jax.formats import open_base
  from gemma_jax.runs import summary, train

  workdir = os.path.expanduser(_WORKDIR.value)
  config = app.config_of(TrainConfig, _CONFIG.value).resolve()
  app.set_compilation_cache(config.compilation_cache)
  source = open_base.open_base(config.model.path, config.model.tokenizer)
  dtype = config.model.dtype
  dtype = source.stored_dtype if dtype == 'auto' else jnp.dtype(dtype)
  print(summary.summarize(config, source.config, dtype).table())
  print(flush=True)
  try:
    with app.stop_on_signal() as should_stop:
      result = train.train(config, workdir, should_stop, log_to=app.log_to)
  except train.Stopped:
    logging.warning('Run the same command again to resume.')
    return app.EXIT_RESUMABLE

  answers = _answers(config, source, result['adapter'])
  interval, over = _interval(workdir, result['steps'])
  drawn = ', '.join(f'{name} {value}' for name, value in _DRAWN.items())
  print(f'answers, {"greedy" if _GREEDY.value else f"drawn with {drawn}"}:\n')
  for name, answer in zip(('base', 'adapted'), answers, strict=True):
    print(f'{name}: {_PROMPT.value}')
    print(textwrap.indent(textwrap.fill(answer.strip(), 76), '  ') + '\n')
  base, adapted = result['loss_base'], result['loss_adapted']
  print(
    f'held-out loss, nats per token: {base:.4f} before, {adapted:.4f} after '
    f'({100 * (adapted / base - 1):+.1f} %); {over}'
  )
  result |= {
    'answer_base': answers[0],
    'answer_adapted': answers[1],
    'difference_interval': interval,
  }
  print(files.to_json(result, ensure_ascii=False), flush=True)
  logging.info(
    'Ask it something else, or train on records of your own:\n'
    "  %(python)s -m launch.generate --model=%(model)s --adapter=%(adapter)s --prompt='...'\n"
    '  %(python)s -m launch.train --config=experiments/dolly_lora.py --workdir=runs/mine '
    '--config.data.path=my_records.jsonl',
    {
      'python': app.python(),
      'model': shlex.quote(config.model.path),
      'adapter': shlex.quote(result['adapter']),
    },
  )
  return 0


def _answers(config, source, adapter: str) -> list[str]:
  """Answers of the base and of the adapter, by one compilation."""
  from gemma_jax.data import examples
  from gemma_jax.data.record import asking
  from gemma_jax.formats import adapter as adapter_lib
  from gemma_jax.sampling import sampler as sampler_lib
  from gemma_jax.sampling import weights
  from gemma_jax.sampling.next_token import SamplingConfig

  tokenizer = source.tokenizer()
  prompt = examples.prompt_tokens(
    tokenizer, config.data.template, asking(_PROMPT.value), config.data.parse_control_tokens
  )
  variables = weights.for_adapters(
    source.load_params(config.model.dtype), adapter_lib.load_adapters([adapter], source.config)
  )
  sampler = sampler_lib.Sampler.of_base(source, tokenizer)
  drawn = {} if _GREEDY.value else _DRAWN
  sampling = SamplingConfig(max_new_tokens=_MAX_NEW_TOKENS.value, **drawn)
  texts = []
  for name in (adapter_lib.BASE, adapter):
    made = sampler.generate(variables[name], [prompt], sampling)
    texts.append(tokenizer.decode(made.tokens[0]))
  return texts


def _interval(workdir: str, step: int) -> tuple[list[float] | None, str]:
  """The interval of the difference from the base's loss, and the same in words."""
  from gemma_jax.runs import evaluate
  from gemma_jax.runs import workdir as workdir_lib

  base, adapted = (workdir_lib.read_heldout(workdir, s) for s in (0, step))
  column = lambda rows, name: np.array([row[name] for row in rows])
  interval = evaluate.paired_interval(
    column(adapted, 'nll') - column(base, 'nll'), column(base, 'tokens')
  )
  if interval is None:
    fewest = evaluate.FEWEST_RECORDS
    return None, f'{len(base)} held-out records, no interval with fewer than {fewest}'
  low, high = interval
  return [low, high], (
    f'one seed, so over the {len(base)} records alone: 95 % interval of the '
    f'difference [{low:.4f}, {high:.4f}]'
  )


if __name__ == '__main__':
  app.run(main)
