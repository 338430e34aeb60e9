"""Answers of a base, or of an adapter on it."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, cast, overload

from gemma_jax.config import checks
from gemma_jax.data import examples, forms
from gemma_jax.data.forms import Question
from gemma_jax.data.record import Record
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.lora import factors
from gemma_jax.lora.lora import Lora
from gemma_jax.runs.base import Base
from gemma_jax.sampling import weights as weights_lib
from gemma_jax.sampling.next_token import SamplingConfig

_DEFAULT_NEW_TOKENS = SamplingConfig.max_new_tokens


@overload
def generate(
  base: Base,
  prompts: str | Mapping[str, Any] | Record,
  *,
  lora: Lora | None = ...,
  **settings: Any,
) -> str: ...
@overload
def generate(
  base: Base, prompts: Sequence[str], *, lora: Lora | None = ..., **settings: Any
) -> list[str]: ...
@overload
def generate(
  base: Base, prompts: Sequence[Question], *, lora: Lora | None = ..., **settings: Any
) -> str | list[str]: ...
def generate(
  base: Base,
  prompts: Question | Sequence[Question],
  *,
  lora: Lora | None = None,
  template: str | None = None,
  weights: str = 'auto',
  **settings: Any,
) -> str | list[str]:
  """Answers a prompt, or several at once.

      generate(base, 'What should I do on a trip to Seoul?', lora=trainer.lora)
      generate(base, ['1 + 1 =', '2 + 2 ='], template='plain', temperature=0.7, seed=1)
      generate(base, {'instruction': 'Why?', 'context': 'Once.'}, repetition_penalty=1.2)
      generate(base, [{'role': 'user', 'content': 'Why?'}], template='chat')

  Args:
    base: loaded.
    prompts: a question, or several: each a text, a record of any form that training
      reads (with or without its answer), or a list of messages.
    lora: of the base; None asks the base.
    template: how a question is put; default: as the adapter was trained, or
      else as the model in the base's folder was, or else 'dolly'.
    weights: 'int8' rounds the base's; see `sampling.weights`.
    **settings: of `SamplingConfig`: max_new_tokens, temperature (0 is greedy),
      top_k, top_p, min_p, repetition_penalty, seed.

  Returns:
    The answer to one question, else a list of answers.

  Raises:
    ValueError: a base without a tokenizer, a question of no known form or one that
      the template cannot hold or that leaves no room, an adapter of another base,
      or a setting that makes no sense.
    FloatingPointError: logits that are not finite.
  """
  checks.instance('base', base, Base, 'a loaded base, gemma_jax.load(...)')
  kinds = (str, Mapping, Record, Sequence)
  checks.instance('prompts', prompts, kinds, 'a question, or a list of questions')
  checks.instance('lora', lora, Lora | None, 'a Lora, e.g. Lora.load(PATH, base)')
  base = base.load()
  if base.tokenizer is None:
    raise ValueError(
      f'base: {base.reference} has no tokenizer, expected one; gemma_jax.load(..., tokenizer=PATH).'
    )
  is_one = _is_one(prompts)
  several = cast(Sequence[Question], [prompts] if is_one else prompts)
  trained_with = (lora and lora.trained_with) or base.source.read_trained_with() or TrainedWith()
  rendered_with = template or trained_with.template
  rows = [
    examples.prompt_tokens(
      base.tokenizer,
      rendered_with,
      forms.question(each, rendered_with, f'prompt {i}'),
      trained_with.parse_control_tokens,
    )
    for i, each in enumerate(several)
  ]
  sampling = SamplingConfig(**settings)
  if 'max_new_tokens' not in settings and rows:
    room = base.config.max_positions - max(map(len, rows))
    if 0 < room < _DEFAULT_NEW_TOKENS:
      sampling = dataclasses.replace(sampling, max_new_tokens=room)
  variables = {'params': base.params}
  if lora is not None:
    factors.check_fit(base.config, lora.shapes(), base.scan_layers)
    variables = lora.variables(base.params)
  made = base.sampler.generate(weights_lib.prepare(variables, weights), rows, sampling)
  answers = [base.tokenizer.decode(tokens) for tokens in made.tokens]
  return answers[0] if is_one else answers


def _is_one(prompts: Question | Sequence[Question]) -> bool:
  """Whether this is a single question; a list is one if it holds messages."""
  if isinstance(prompts, str | Mapping | Record):
    return True
  return len(prompts) > 0 and all(
    isinstance(each, Mapping) and {'role', 'content'} <= {str(name).lower() for name in each}
    for each in prompts
  )
