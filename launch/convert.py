"""Converts a model to another format, merging an adapter if one is given.

  python -m launch.convert --model=gemma3_270m --adapter=DIR/adapter \\
      --to=hf --output=my_gemma

Before the folder appears, the output is read back and its weights and logits are
compared. One JSON line on standard output: output, files, bytes, parameters,
dtype, largest_logit_difference, and for a merged adapter update_kept and
logit_update_kept: how much of its update survived rounding, in the weights and
in the logits of the check. Less than 90 % is a warning.
"""

from absl import flags

from launch import app

_MODEL = flags.DEFINE_string('model', 'gemma3_270m', app.MODEL_HELP)
_TOKENIZER = flags.DEFINE_string('tokenizer', '', app.TOKENIZER_HELP)
_ADAPTER = flags.DEFINE_string(
  'adapter',
  '',
  f'{app.ADAPTER_HELP}, to merge into the base (with --to=peft: to write as a PEFT folder).',
)
_TO = flags.DEFINE_enum(
  'to', 'hf', ['hf', 'flax', 'peft'], 'Hugging Face folder, Flax release (Orbax), or PEFT adapter.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'New or empty folder.')
_DTYPE = flags.DEFINE_enum(
  'dtype',
  'auto',
  ['auto', 'float32', 'bfloat16'],
  "Of the weights written; auto is the base's own.",
)
_VERIFY = flags.DEFINE_enum(
  'verify',
  'on',
  ['on', 'off'],
  'Read the output back and compare weights '
  'and logits. off is for huge models; merged weights are compared anyway.',
)
_MAX_SHARD_BYTES = flags.DEFINE_integer(
  'max_shard_bytes',
  5_000_000_000,
  'Size of the largest weight file, in bytes (--to=hf).',
  lower_bound=1,
)
_NESTED = flags.DEFINE_bool(
  'nested',
  False,
  'Store array names as nested dicts, as some readers expect, '
  'rather than flat as in the release (--to=flax).',
)


def main() -> int:
  """Runs the command."""
  from gemma_jax import files
  from gemma_jax.export import convert

  if not _OUTPUT.value:
    app.fail('--output: missing, expected a new or empty folder')
  app.set_compilation_cache('')
  result = convert.convert(
    _MODEL.value,
    _OUTPUT.value,
    _TO.value,
    adapter=_ADAPTER.value,
    dtype=_DTYPE.value,
    tokenizer=_TOKENIZER.value,
    verify=_VERIFY.value == 'on',
    max_shard_bytes=_MAX_SHARD_BYTES.value,
    nested=_NESTED.value,
  )
  print(files.to_json(result), flush=True)
  return 0


if __name__ == '__main__':
  app.run(main)
