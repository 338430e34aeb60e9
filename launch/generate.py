"""Continues prompts with a base, and with adapters on it side by side.

  python -m launch.generate --model=gemma3_270m --adapter=DIR/adapter \\
      --prompt='What should I do on a trip to Seoul?' --stream
  python -m launch.generate --adapter=A --adapter=B --prompt=Hi --format=json
  python -m launch.generate --adapter=A --system='Be brief.' --messages=FILE --prompt='And then?'
  python -m launch.generate --adapter=A --record='{"instruction": "Why?", "context": "Once."}'

What training reads can be asked: a prompt with a system text, a context and earlier
turns, or a record of any form; it is rendered as training renders it.

With one adapter only its text is decoded; with several, the base's comes first
(`--adapter=base` names it). Standard output carries the text, in labelled blocks
if there are several, or with --format=json one line for each adapter, prompt and
sample:

  adapter            the folder, or base
  prompt             the question, with its earlier turns, or the token ids
  sample             which of --num_samples
  text               the continuation
  tokens             its ids, with the stop token if it ended with one
  tokens_per_second  of all prompts of this adapter together, after each one's
                     first token: without compilation and without the time to
                     read the prompts; null if nothing came after the first
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

from absl import flags, logging

from gemma_jax import files
from gemma_jax.data import examples, forms, records
from gemma_jax.data.fields import BadRecord
from gemma_jax.data.record import Record
from gemma_jax.data.tokenizer import StreamDecoder
from launch import app

# Tokens of a continuation, if the base has that many positions left.
_DEFAULT_LENGTH = 128

_MODEL = flags.DEFINE_string('model', 'gemma3_270m', app.MODEL_HELP)
_TOKENIZER = flags.DEFINE_string('tokenizer', '', app.TOKENIZER_HELP)
_ADAPTERS = flags.DEFINE_multi_string(
  'adapter',
  [],
  f'{app.ADAPTER_HELP}; may be repeated. `base` names the base itself, which several '
  'adapters are always compared with.',
)
_PROMPTS = flags.DEFINE_multi_string('prompt', [], 'What to answer or continue; may be repeated.')
_CONTEXT = flags.DEFINE_string(
  'context', '', 'Text that the prompts are about; beside --messages, their first question.'
)
_SYSTEM = flags.DEFINE_string('system', '', 'Text that holds for the whole conversation.')
_MESSAGES = flags.DEFINE_string(
  'messages',
  '',
  'File with a JSON list of {"role", "content"}: the turns before each prompt. Without a '
  'prompt its last question is asked.',
)
_RECORDS = flags.DEFINE_multi_string(
  'record',
  [],
  'JSON object of any form that training reads, to be asked as it was trained; an answer '
  'that it holds is left out. May be repeated.',
)
_TOKENS = flags.DEFINE_multi_string(
  'tokens',
  [],
  'Token ids in place of a prompt, used unchanged (no BOS is added): 2,5,7; may be repeated.',
)
_TEMPLATE = flags.DEFINE_string(
  'template',
  None,
  'Text around each prompt: dolly, chat, plain (none), korean, en_ko or ko_en; '
  "default: each adapter's own, or dolly without an adapter. The base takes that of "
  'the adapter merged into it, else that of the first adapter.',
)
_PARSE_CONTROL_TOKENS = flags.DEFINE_bool(
  'parse_control_tokens',
  None,
  'Parse control tokens that a prompt spells; default: as each adapter was '
  'trained, or off without an adapter.',
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens',
  None,
  'Longest continuation, in tokens; default: 128, or as many as the base has positions for.',
  lower_bound=1,
)
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 is greedy; larger is more random.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw from the k most likely tokens; 0 is all.')
_TOP_P = flags.DEFINE_float(
  'top_p', 1.0, 'Draw from the most likely tokens whose probabilities together reach p.'
)
_MIN_P = flags.DEFINE_float(
  'min_p', 0.0, "Draw from tokens with at least this share of the likeliest one's probability."
)
_REPETITION_PENALTY = flags.DEFINE_float(
  'repetition_penalty',
  1.0,
  'Above 1, tokens of the prompt and of the answer so far are less likely; also when greedy.',
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the draws.')
_NUM_SAMPLES = flags.DEFINE_integer(
  'num_samples',
  1,
  'Continuations of each prompt, which is read once; needs a temperature above 0.',
  lower_bound=1,
)
_STREAM = flags.DEFINE_bool(
  'stream', False, 'Print text as it is decoded, one prompt after another.'
)
_FORMAT = flags.DEFINE_enum('format', 'text', ['text', 'json'], 'Of the output.')
_WEIGHTS = flags.DEFINE_enum(
  'weights',
  'auto',
  ['auto', 'float32', 'bfloat16', 'int8'],
  'Of the base in memory; auto is as in its file (dequantized: float32). int8 '
  'is the fastest, and rounds to 255 values for each output channel.',
)
_COMPILATION_CACHE = flags.DEFINE_string(
  'compilation_cache', '', 'Folder of compiled programs; off keeps none.'
)


def main() -> int:
  """Runs the command."""
  from gemma_jax.formats import adapter as adapter_lib
  from gemma_jax.formats import open_base, trained_with
  from gemma_jax.sampling import prompts as prompts_lib
  from gemma_jax.sampling import sampler as sampler_lib
  from gemma_jax.sampling import weights as weights_lib
  from gemma_jax.sampling.next_token import SamplingConfig

  sampling = SamplingConfig(
    max_new_tokens=_MAX_NEW_TOKENS.value or _DEFAULT_LENGTH,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    min_p=_MIN_P.value,
    repetition_penalty=_REPETITION_PENALTY.value,
    seed=_SEED.value,
  )
  sampling.check()
  num_samples = _NUM_SAMPLES.value
  if _STREAM.value and _FORMAT.value == 'json':
    app.fail('--stream: got --format=json, expected --format=text')
  if _STREAM.value and num_samples > 1:
    app.fail(f'--stream: got --num_samples={num_samples}, expected one sample')
  if num_samples > 1 and not sampling.temperature:
    app.fail(
      f'--num_samples: got {num_samples} with --temperature=0, expected a '
      'temperature above 0; greedy samples are all alike'
    )
  app.set_compilation_cache(_COMPILATION_CACHE.value)

  # Bad input is reported before the weights are read.
  source = open_base.open_base(_MODEL.value, _TOKENIZER.value)
  tokenizer = source.tokenizer()
  questions = _read_questions()
  if not questions:
    app.fail('--prompt: missing, expected --prompt=TEXT, --record=JSON or --tokens=2,5,7')
  names = _ADAPTERS.value or [adapter_lib.BASE]
  if len(names) > 1 and adapter_lib.BASE not in names:
    names = [adapter_lib.BASE, *names]
  folders = [name for name in names if name != adapter_lib.BASE]
  loaded = adapter_lib.load_adapters(folders, source.config)
  told = {'template': _TEMPLATE.value, 'parse_control_tokens': _PARSE_CONTROL_TOKENS.value}
  is_told = any('tokens' not in question.asked for question in questions)
  asked_with = trained_with.asked_with(
    names,
    {name: x.trained_with for name, x in loaded.items() if name != adapter_lib.BASE},
    told if is_told else {},
    source.read_trained_with(),
  )
  asked_records = {
    name: [forms.question(q.asked, asked.template, q.name) for q in questions]
    for name, asked in asked_with.items()
  }
  if tokenizer is None and any(record.is_text for record in asked_records[names[0]]):
    app.fail(
      f'--prompt: {_MODEL.value} has no tokenizer, expected one; set '
      '--tokenizer=PATH, or give ids with --tokens.'
    )
  rows = {
    name: [
      examples.prompt_tokens(tokenizer, asked.template, record, asked.parse_control_tokens)
      for record in asked_records[name]
    ]
    for name, asked in asked_with.items()
  }
  prompts = [_label(record) for record in asked_records[names[0]]]
  if _MAX_NEW_TOKENS.value is None:
    longest = max(map(len, itertools.chain.from_iterable(rows.values())))
    room = source.config.max_positions - longest
    sampling = dataclasses.replace(sampling, max_new_tokens=_default_length(room))
  for own in rows.values():
    prompts_lib.check(
      own,
      sampling.max_new_tokens,
      source.config,
      None if tokenizer is None else tokenizer.vocab_size,
    )
  sampler = sampler_lib.Sampler.of_base(source, tokenizer)
  weights = _WEIGHTS.value
  params = source.load_params(weights_lib.load_dtype(weights))
  variables = weights_lib.for_adapters(params, loaded, weights)
  del params  # frees what decoding does not use

  def generate(name, indices, on_tokens=None):
    generation = sampler.generate(
      variables[name],
      [rows[name][i] for i in indices],
      sampling,
      on_tokens,
      row_ids=[i * num_samples + s for i in indices for s in range(num_samples)],
      num_samples=num_samples,
    )
    speed = generation.tokens_per_second
    if speed is not None:
      logging.info('%s: %.1f tokens/s', name, speed)
    return generation

  everything = range(len(prompts))
  if _FORMAT.value == 'json':
    for name in names:
      _print_json(name, prompts, generate(name, everything), tokenizer)
    return 0
  label = len(names) * len(prompts) * num_samples > 1
  made = {}
  if not _STREAM.value:
    made = {name: generate(name, everything) for name in names}
  for i, prompt in enumerate(prompts):
    if label:
      print(f'>>> {prompt}\n')
    for name, sample_index in itertools.product(names, range(num_samples)):
      if label:
        number = f' {sample_index + 1}' if num_samples > 1 else ''
        print(f'[{name}{number}]')
      show = _Printer(tokenizer)
      if made:
        show(0, made[name].tokens[i * num_samples + sample_index])
      else:
        generate(name, [i], show)
      show.end()
      if label:
        print(flush=True)
  return 0


class _Printer:
  """Prints new tokens as text, or as ids if there is no tokenizer."""

  def __init__(self, tokenizer):
    self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)

  def __call__(self, row: int, ids: list[int]):
    del row
    if self._decoder is None:
      text = ''.join(f'{i} ' for i in ids)
    else:
      text = self._decoder.push(ids)
    print(text, end='', flush=True)

  def end(self):
    """Prints what is left of a character, and ends the line."""
    print('' if self._decoder is None else self._decoder.flush(), flush=True)


def _print_json(name, prompts, generation, tokenizer):
  num_samples = len(generation.tokens) // len(prompts)
  for row, ids in enumerate(generation.tokens):
    line = {
      'adapter': name,
      'prompt': prompts[row // num_samples],
      'sample': row % num_samples,
      'text': None if tokenizer is None else tokenizer.decode(ids),
      'tokens': ids,
      'tokens_per_second': generation.tokens_per_second,
    }
    text = files.to_json(line, ensure_ascii=False)
    print(text, flush=True)


class _Question(NamedTuple):
  """What is asked, and the flag that asks it."""

  asked: dict[str, Any]
  name: str


def _read_questions() -> list[_Question]:
  """All that the flags ask, as rows of a form of training."""
  around = {
    name: flag.value for name, flag in (('context', _CONTEXT), ('system', _SYSTEM)) if flag.value
  }
  prompts = _PROMPTS.value
  if around and not prompts and not _MESSAGES.value:
    app.fail(f'--{min(around)}: got one without a question, expected --prompt or --messages too')
  questions = []
  if _MESSAGES.value:
    turns = _read_messages(_MESSAGES.value)
    asked = [[*turns, {'role': 'user', 'content': prompt}] for prompt in prompts] or [turns]
    questions += [_Question({'messages': each, **around}, '--messages') for each in asked]
  else:
    questions += [_Question({'prompt': prompt, **around}, '--prompt') for prompt in prompts]
  for text in _RECORDS.value:
    row = _parse_json(text.encode(), dict, '--record', f'a JSON object of {forms.FORMS}')
    questions.append(_Question(row, '--record'))
  questions += [_Question({'tokens': _parse_ids(text)}, '--tokens') for text in _TOKENS.value]
  return questions


def _read_messages(path: str) -> list[Any]:
  expected = 'a JSON list of {"role", "content"}'
  file = files.path(path)
  if not file.is_file():
    app.fail(f'--messages: got {path!r}, which is not a file, expected {expected}')
  return _parse_json(file.read_bytes(), list, f'--messages: {path}', expected)


def _parse_json(text: bytes, kind: type, name: str, expected: str) -> Any:
  value = records.parse_json(text)
  if not isinstance(value, kind):
    got = value if isinstance(value, BadRecord) else type(value).__name__
    app.fail(f'{name}: got {got}, expected {expected}')
  return value


def _label(record: Record) -> str | list[int]:
  """A question for people."""
  return record.question if record.tokens is None else list(record.tokens)


def _parse_ids(text: str) -> list[int]:
  try:
    return [int(part) for part in text.split(',')]
  except ValueError:
    raise ValueError(f'--tokens: got {text!r}, expected ids separated by commas: 2,5,7.') from None


def _default_length(room: int) -> int:
  """Default length of continuations: 128 tokens, or as many as there is room for, if any."""
  if not 0 < room < _DEFAULT_LENGTH:
    return _DEFAULT_LENGTH
  logging.warning(
    'Continuations have at most %d tokens: %s has no more positions', room, _MODEL.value
  )
  return room


if __name__ == '__main__':
  app.run(main)
