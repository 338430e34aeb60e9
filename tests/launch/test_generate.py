"""launch.generate as a user calls it: both formats, adapters, bad input."""

import json
from pathlib import Path
import shutil
import subprocess
import sys

import pytest

from gemma_jax.config.train import LoraConfig
from gemma_jax.data import examples
from gemma_jax.data.record import asking
from gemma_jax.formats import adapter, open_base, peft
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.model import variants
from gemma_jax.sampling import weights
from gemma_jax.sampling.next_token import SamplingConfig
from gemma_jax.sampling.sampler import Sampler
from tests import toy

ROOT = Path(__file__).parents[2]
MODEL = 'random:tiny3'
QUESTION = 'Where is 서울?'
FLAGS = ('--max_new_tokens=23', '--temperature=0.7', '--top_k=50', '--seed=7')
SAMPLING = SamplingConfig(max_new_tokens=23, temperature=0.7, top_k=50, seed=7)


def call(*flags):
  """Runs launch.generate from the repository root."""
  return subprocess.run(
    [sys.executable, '-m', 'launch.generate', f'--model={MODEL}', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def output_of(*flags):
  done = call(*flags)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Two PEFT adapters, of rank 3 on q and v and of rank 2 on all.

  The first was trained with the template korean, of the other nobody knows.
  """
  root = tmp_path_factory.mktemp('adapters')
  paths = []
  for name, config, trained_with in (
    ('A', LoraConfig(rank=3), TrainedWith('korean')),
    ('B', LoraConfig(rank=2, targets='all'), None),
  ):
    factors = toy.factors(variants.get('tiny3'), config)
    peft.write_adapter(root / name, factors, config, MODEL, trained_with=trained_with)
    paths.append(str(root / name))
  return paths


@pytest.fixture(scope='module')
def expected(folders):
  """(tokenizer, {name: tokens of QUESTION and of 2,5,7}) from the library."""
  opened = open_base.open_base(MODEL)
  tokenizer = opened.tokenizer()
  sampler = Sampler(opened.config, tokenizer)
  loaded = adapter.load_adapters(folders, opened.config)
  variables = weights.for_adapters(opened.load_params(), loaded)
  by_name = {}
  for name, chosen in variables.items():
    template = 'dolly' if name == folders[1] else 'korean'
    asked = examples.prompt_tokens(tokenizer, template, asking(QUESTION))
    by_name[name] = sampler.generate(chosen, [asked, [2, 5, 7]], SAMPLING).tokens
  return tokenizer, by_name


@pytest.fixture(scope='module')
def adapter_flags(folders):
  return [f'--adapter={folder}' for folder in folders]


def test_json_has_a_line_for_each_adapter_and_prompt(folders, adapter_flags, expected):
  out = output_of(*FLAGS, *adapter_flags, f'--prompt={QUESTION}', '--tokens=2,5,7', '--format=json')
  lines = [json.loads(line) for line in out.splitlines()]
  tokenizer, tokens = expected
  names = ['base', *folders]
  assert len({str(tokens[name]) for name in names}) == 3
  pairs = [(name, i) for name in names for i in range(2)]
  for line, (name, i) in zip(lines, pairs, strict=True):
    assert line.pop('tokens_per_second') > 0
    assert line == {
      'adapter': name,
      'prompt': [QUESTION, [2, 5, 7]][i],
      'sample': 0,
      'text': tokenizer.decode(tokens[name][i]),
      'tokens': tokens[name][i],
    }


@pytest.mark.parametrize('stream', ['--stream', '--nostream'])
def test_text_shows_base_and_adapters_side_by_side(folders, adapter_flags, expected, stream):
  out = output_of(*FLAGS, *adapter_flags, f'--prompt={QUESTION}', '--tokens=2,5,7', stream)
  tokenizer, tokens = expected
  shown = ''
  for i, prompt in enumerate((QUESTION, [2, 5, 7])):
    shown += f'>>> {prompt}\n\n'
    for name in ('base', *folders):
      shown += f'[{name}]\n{tokenizer.decode(tokens[name][i])}\n\n'
  # Universal newlines read \r as \n, which random bytes may contain.
  assert out == shown.replace('\r\n', '\n').replace('\r', '\n')


def test_one_adapter_prints_its_text_alone(folders, expected):
  out = output_of(*FLAGS, f'--adapter={folders[0]}', f'--prompt={QUESTION}')
  tokenizer, tokens = expected
  text = tokenizer.decode(tokens[folders[0]][0]) + '\n'
  assert out == text.replace('\r\n', '\n').replace('\r', '\n')


def test_another_template_than_the_adapters_is_a_warning(folders, expected):
  done = call(
    *FLAGS, f'--adapter={folders[0]}', f'--prompt={QUESTION}', '--template=dolly', '--format=json'
  )
  assert json.loads(done.stdout)['tokens'] != expected[1][folders[0]][0]
  warning = f'--template=dolly: {folders[0]} was trained with kor'
  assert warning in done.stderr
  # Ids have no template.
  done = call(*FLAGS, f'--adapter={folders[0]}', '--tokens=2,5,7', '--template=dolly')
  assert done.returncode == 0
  assert warning not in done.stderr


def test_samples_are_labelled():
  flags = [*FLAGS, '--tokens=2,5,7', '--tokens=2,9', '--num_samples=2']
  out = output_of(*flags, '--format=json', '--weights=int8')
  lines = [json.loads(line) for line in out.splitlines()]
  labels = [(line['prompt'], line['sample']) for line in lines]
  assert labels == [([2, 5, 7], 0), ([2, 5, 7], 1), ([2, 9], 0), ([2, 9], 1)]
  assert len({str(line['tokens']) for line in lines}) == 4
  out = output_of(*flags, '--weights=int8')
  ends = [
    out.index(f'[base {n}]\n{line["text"]}'.replace('\r', '\n'))
    for n, line in zip((1, 2), lines[:2], strict=True)
  ]
  assert ends == sorted(ends)


def test_what_was_trained_can_be_asked(tmp_path):
  """Context, system text, messages and records, as their rendered text in `plain`."""
  turns = tmp_path / 'turns.json'
  turns.write_text(json.dumps([{'role': 'system', 'content': 'S 서울'}]), 'utf-8')
  record = {'instruction': 'Q', 'input': '맥락', 'output': 'not shown', 'category': 'c'}
  flags = ('--max_new_tokens=9', '--format=json', f'--record={json.dumps(record)}')
  flags += (f'--record={json.dumps({"tokens": [2, 5, 7, 9], "loss_mask": [0, 0, 0, 1]})}',)
  asked = (
    (('--prompt=Q', '--context=C', '--system=S'), 'S\n\nQ\n\nContext:\nC'),
    ((f'--messages={turns}', '--prompt=Q'), 'S 서울\n\nQ'),
  )
  for own, text in asked:
    lines = [json.loads(line) for line in output_of(*own, *flags).splitlines()]
    rendered = (
      f'--prompt=Instruction:\n{each}\n\nResponse:\n' for each in (text, 'Q\n\nContext:\n맥락')
    )
    plain = ('--template=plain', '--tokens=2,5,7', *flags[:2])
    want = [json.loads(line) for line in output_of(*rendered, *plain).splitlines()]
    assert [line['tokens'] for line in lines] == [line['tokens'] for line in want]
    assert lines[2]['prompt'] == [2, 5, 7] and lines[1]['prompt'] == 'Q'


def test_a_penalty_and_min_p_reach_the_choice(expected):
  flags = ('--tokens=2,5,7', '--max_new_tokens=23', '--format=json')
  opened = open_base.open_base(MODEL)
  made = Sampler(opened.config, expected[0])
  variables = weights.prepare({'params': opened.load_params()})
  seen = set()
  for own in (
    {'repetition_penalty': 1.7},
    {'temperature': 2.0, 'min_p': 0.3},
    {'temperature': 2.0},
  ):
    sampling = SamplingConfig(max_new_tokens=23, **own)
    want = made.generate(variables, [[2, 5, 7]], sampling).tokens[0]
    line = output_of(*flags, *(f'--{name}={value}' for name, value in own.items()))
    assert json.loads(line)['tokens'] == want
    seen.add(tuple(want))
  assert len(seen) == 3


def test_tokens_need_no_tokenizer(tmp_path):
  folder = Path(__file__).parents[1] / 'golden' / 'parity' / 'gemma2'
  flags = [f'--model={folder}', '--tokens=2,5', '--max_new_tokens=5']
  line = json.loads(output_of(*flags, '--format=json', '--weights=float32'))
  assert line['text'] is None
  opened = open_base.open_base(str(folder))
  params = {'params': opened.load_params('float32')}
  expected = Sampler(opened.config).generate(params, [[2, 5]], SamplingConfig(max_new_tokens=5))
  assert [line['tokens']] == expected.tokens
  ids = output_of(*flags, '--weights=bfloat16').split()
  assert len(list(map(int, ids))) <= 5
  # An answer ends where the base's folder says, too.
  shutil.copytree(folder, tmp_path / 'base')
  stop = expected.tokens[0][1]
  (tmp_path / 'base' / 'generation_config.json').write_text(json.dumps({'eos_token_id': [1, stop]}))
  out = output_of(*flags, f'--model={tmp_path / "base"}', '--format=json', '--weights=float32')
  until = expected.tokens[0].index(stop) + 1
  assert json.loads(out)['tokens'] == expected.tokens[0][:until]


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ((), '--prompt: missing, expected --prompt=TEXT, --record=JSON or --tokens=2,5,7'),
    (('--system=S', '--tokens=2,5'), '--system: got one without a question, expected --prompt'),
    (('--messages=no.json',), "--messages: got 'no.json', which is not a file, expected a JSON"),
    (('--messages=setup.py',), '--messages: setup.py: got invalid JSON'),
    (('--record={"prompt": "a", "prompt": "b"}',), '--record: got a field occurs twice'),
    (('--record=[1]',), '--record: got list, expected a JSON object of instruction+response'),
    (('--record={"question": "Q"}',), '--record: field "instruction" is missing'),
    (
      ('--record={"prompt": "Q", "history": [["a", "b"]]}',),
      "--template: got 'dolly' for a conversation of 3 turns, expected chat",
    ),
    (('--prompt=Q', '--context=C', '--template=en_ko'), 'expected only a sentence'),
    (('--prompt=Q', '--min_p=2'), 'min_p: got 2.0, expected a number in [0, 1]'),
    (('--prompt=Q', '--repetition_penalty=0'), '--repetition_penalty: got 0.0, expected'),
    (('--tokens=2,x',), "--tokens: got '2,x', expected ids separated by commas"),
    (('--tokens=2,261',), 'ids from 2 to 261, expected ids in [0, 260)'),
    (('--prompt=Hi', '--top_p=0'), 'top_p: got 0.0, expected a number in'),
    (('--prompt=Hi', '--template=chat'), "control token: got '<start_of_turn"),
    (('--prompt=Hi', '--stream', '--format=json'), '--stream: got --format=j'),
    (('--prompt=Hi', '--num_samples=3'), '--num_samples: got 3 with --temper'),
    (
      ('--prompt=Hi', '--num_samples=3', '--temperature=1', '--stream'),
      '--stream: got --num_samples=3, expected one sample',
    ),
  ],
)
def test_bad_input_is_one_line(flags, message):
  done = call(*flags)
  assert done.returncode == 1
  assert done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ')
  assert message in line


def test_help_explains_every_flag():
  done = call('--helpfull')
  for name in (
    'adapter',
    'prompt',
    'tokens',
    'template',
    'max_new_tokens',
    'temperature',
    'top_k',
    'top_p',
    'min_p',
    'repetition_penalty',
    'context',
    'system',
    'messages',
    'record',
    'seed',
    'stream',
    'format',
    'weights',
    'num_samples',
  ):
    assert f'--{name}:' in done.stdout or f'--[no]{name}:' in done.stdout, name
  assert 'Continues prompts with a base' in done.stdout
