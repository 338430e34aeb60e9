"""Continues prompts with a base, and with adapters on it side by side.

  python -m launch.generate --model=gemma3_270m --adapter=DIR/adapter \\
      --prompt='What should I do on a trip to Seoul?' --stream
  python -m launch.generate --adapter=A --adapter=B --prompt=Hi --format=json

With one adapter only its text is decoded; with several, the base's comes first
(`--adapter=base` names it). Standard output carries the text, in labelled blocks
if there are several, or with --format=json one line for each adapter, prompt and
sample:

  adapter            the folder, or base
  prompt             the text, or the token ids
  sample             which of --num_samples
  text               the continuation
  tokens             its ids, with the stop token if it ended with one
  tokens_per_second  of all prompts of this adapter together, after each one's
                     first token: without compilation and without the time to
                     read the prompts; null if nothing came after the first
"""

import dataclasses
import itertools

from absl import flags, logging

from gemma_jax import files
from gemma_jax.data import examples
from gemma_jax.data.tokenizer import StreamDecoder, Tokenizer
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
  prompts = [*_PROMPTS.value, *map(_parse_ids, _TOKENS.value)]
  if not prompts:
    app.fail('--prompt: missing, expected --prompt=TEXT or --tokens=2,5,7')
  names = _ADAPTERS.value or [adapter_lib.BASE]
  if len(names) > 1 and adapter_lib.BASE not in names:
    names = [adapter_lib.BASE, *names]
  folders = [name for name in names if name != adapter_lib.BASE]
  loaded = adapter_lib.load_adapters(folders, source.config)
  told = {'template': _TEMPLATE.value, 'parse_control_tokens': _PARSE_CONTROL_TOKENS.value}
  asked_with = trained_with.asked_with(
    names,
    {name: x.trained_with for name, x in loaded.items() if name != adapter_lib.BASE},
    told if _PROMPTS.value else {},
    source.read_trained_with(),
  )
  rows = {
    name: [
      _row(prompt, tokenizer, asked.template, asked.parse_control_tokens) for prompt in prompts
    ]
    for name, asked in asked_with.items()
  }
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


def _row(
  prompt: str | list[int], tokenizer: Tokenizer | None, template: str, parse_control_tokens: bool
) -> list[int]:
  if isinstance(prompt, list):
    return prompt
  if tokenizer is None:
    raise ValueError(
      f'--prompt: {_MODEL.value} has no tokenizer, expected one; set '
      '--tokenizer=PATH, or give ids with --tokens.'
    )
  return examples.prompt_tokens(tokenizer, template, prompt, parse_control_tokens)


if __name__ == '__main__':
  app.run(main)
