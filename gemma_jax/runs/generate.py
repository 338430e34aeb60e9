"""Answers of a base, or of an adapter on it."""

from collections.abc import Sequence
import dataclasses
from typing import Any, overload

from gemma_jax.config import checks
from gemma_jax.data import examples
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.lora import factors
from gemma_jax.lora.lora import Lora
from gemma_jax.runs.base import Base
from gemma_jax.sampling import weights as weights_lib
from gemma_jax.sampling.next_token import SamplingConfig

_DEFAULT_NEW_TOKENS = SamplingConfig.max_new_tokens


@overload
def generate(base: Base, prompts: str, *, lora: Lora | None = ..., **settings: Any) -> str: ...
@overload
def generate(
  base: Base, prompts: Sequence[str], *, lora: Lora | None = ..., **settings: Any
) -> list[str]: ...
def generate(
  base: Base,
  prompts: str | Sequence[str],
  *,
  lora: Lora | None = None,
  template: str | None = None,
  weights: str = 'auto',
  **settings: Any,
) -> str | list[str]:
  """Answers a prompt, or several at once.

      generate(base, 'What should I do on a trip to Seoul?', lora=trainer.lora)
      generate(base, ['1 + 1 =', '2 + 2 ='], template='plain', temperature=0.7, seed=1)

  Args:
    base: loaded.
    prompts: text of a question, or of several.
    lora: of the base; None asks the base.
    template: how a question is put; default: as the adapter was trained, or
      else as the model in the base's folder was, or else 'dolly'.
    weights: 'int8' rounds the base's; see `sampling.weights`.
    **settings: of `SamplingConfig`: max_new_tokens, temperature (0 is greedy),
      top_k, top_p, seed.

  Returns:
    The answer to a prompt that is a string, else a list of answers.

  Raises:
    ValueError: a base without a tokenizer, a prompt that leaves no room, an
      adapter of another base, or a setting that makes no sense.
    FloatingPointError: logits that are not finite.
  """
  checks.instance('base', base, Base, 'a loaded base, gemma_jax.load(...)')
  checks.instance('lora', lora, Lora | None, 'a Lora, e.g. Lora.load(PATH, base)')
  base = base.load()
  if base.tokenizer is None:
    raise ValueError(
      f'base: {base.reference} has no tokenizer, expected one; gemma_jax.load(..., tokenizer=PATH).'
    )
  several = [prompts] if isinstance(prompts, str) else list(prompts)
  trained_with = (lora and lora.trained_with) or base.source.read_trained_with() or TrainedWith()
  rows = [
    examples.prompt_tokens(
      base.tokenizer, template or trained_with.template, prompt, trained_with.parse_control_tokens
    )
    for prompt in several
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
  return answers[0] if isinstance(prompts, str) else answers
