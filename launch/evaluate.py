"""Token-weighted loss of a base and of adapters on it, on the same records.

  python -m launch.evaluate --model=gemma3_270m --adapter=DIR/adapter \\
      --data=sample:seoul_travel

One JSON line on standard output for the base (without --adapter) or for each
adapter: adapter, nll (sum, nats), tokens, nll_per_token, perplexity, examples,
and the template and loss_on that it was measured with.
"""

from absl import flags, logging

from launch import app

_MODEL = flags.DEFINE_string('model', 'gemma3_270m', app.MODEL_HELP)
_TOKENIZER = flags.DEFINE_string('tokenizer', '', app.TOKENIZER_HELP)
_ADAPTERS = flags.DEFINE_multi_string(
  'adapter', [], f'{app.ADAPTER_HELP}; may be repeated. `base` names the base itself.'
)
_DATA = flags.DEFINE_string(
  'data',
  None,
  'JSON Lines file, sample:NAME (its held-out records) or tfds:NAME (its validation split).',
)
_TEMPLATE = flags.DEFINE_string(
  'template', None, "For text records; default: the adapters' own, or dolly without an adapter."
)
_LOSS_ON = flags.DEFINE_enum(
  'loss_on',
  None,
  ['response', 'all'],
  "Tokens that count; default: the adapters' own, or response without an adapter.",
)
_PARSE_CONTROL_TOKENS = flags.DEFINE_bool(
  'parse_control_tokens',
  None,
  'Parse control tokens that a text spells; default: as the adapters were '
  'trained, or off without an adapter.',
)
_SEQ_LEN = flags.DEFINE_integer(
  'seq_len',
  None,
  'Cut records to this many tokens; default: score them whole, as far as the base has positions.',
)
_SKIP_BAD_RECORDS = flags.DEFINE_bool('skip_bad_records', False, 'Drop and count unusable records.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 4, 'Rows at a time.')
_MAX_RECORDS = flags.DEFINE_integer(
  'max_records', 0, 'Use only this many of the first records; 0 is all.'
)
_PER_EXAMPLE = flags.DEFINE_string(
  'per_example',
  '',
  'Write adapter, index, nll and tokens of every record '
  "to this JSON Lines file, in the data's order.",
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'auto', ['auto', 'bfloat16', 'float32'], 'Of the base in memory.'
)


def main() -> int:
  """Runs the command."""
  from gemma_jax import files
  from gemma_jax.config.train import TrainConfig
  from gemma_jax.formats import adapter, open_base, trained_with
  from gemma_jax.runs import evaluate_adapters

  if not _DATA.value:
    app.fail('--data: missing, expected a JSON Lines file of records')
  per_example = files.absolute(_PER_EXAMPLE.value)
  is_there = files.is_remote(per_example) or per_example.parent.is_dir()
  if _PER_EXAMPLE.value and not is_there:
    app.fail(f'--per_example: {per_example.parent} is not a folder, expected one')
  app.set_compilation_cache('')
  names = _ADAPTERS.value or [adapter.BASE]
  source = open_base.open_base(_MODEL.value, _TOKENIZER.value)
  by_name = {name: adapter.read_trained_with(name) for name in names if name != adapter.BASE}
  of_base = source.read_trained_with()
  if adapter.BASE in names and of_base is not None:
    by_name[adapter.BASE] = of_base
  chosen = trained_with.choose(
    by_name,
    {
      'template': _TEMPLATE.value,
      'loss_on': _LOSS_ON.value,
      'parse_control_tokens': _PARSE_CONTROL_TOKENS.value,
      'seq_len': _SEQ_LEN.value,
    },
  )
  logging.info(
    'Measured with template=%s, loss_on=%s, parse_control_tokens=%s',
    *(chosen.template, chosen.loss_on, chosen.parse_control_tokens),
  )
  config = TrainConfig()
  config.model.path = _MODEL.value
  config.model.tokenizer = _TOKENIZER.value
  config.model.dtype = _DTYPE.value
  config.data.path = _DATA.value
  config.data.template = chosen.template
  config.data.loss_on = chosen.loss_on
  config.data.parse_control_tokens = chosen.parse_control_tokens
  config.data.seq_len = chosen.seq_len
  config.data.skip_bad_records = _SKIP_BAD_RECORDS.value
  config.data.global_batch_size = _BATCH_SIZE.value
  config.data.max_eval_records = _MAX_RECORDS.value
  rows = []
  for name, examples, result in evaluate_adapters.evaluate_adapters(
    config.resolve(), names, source
  ):
    logging.info('%s: %.4f nats/token', name, result.nll_per_token)
    told = {'template': chosen.template, 'loss_on': chosen.loss_on}
    line = {'adapter': name, **result.line(), **told}
    print(files.to_json(line), flush=True)
    for index, nll, tokens in zip(examples.record_ids, result.nll, result.tokens, strict=True):
      rows.append({'adapter': name, 'index': int(index), 'nll': float(nll), 'tokens': int(tokens)})
  if _PER_EXAMPLE.value:
    files.write_json_lines(per_example, rows)
  return 0


if __name__ == '__main__':
  app.run(main)
