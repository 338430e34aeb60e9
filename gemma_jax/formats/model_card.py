"""The model card of an adapter, or of a model that one was merged into: README.md.

It says what its writer knows, and nothing else: what is missing stays out.
"""

from collections.abc import Sequence
import os
from pathlib import Path

from gemma_jax.config.lora import LoraConfig
from gemma_jax.data import templates
from gemma_jax.data.record import asking
from gemma_jax.formats import peft_config
from gemma_jax.formats.trained_with import TrainedWith

NAME = 'README.md'


def write(
  folder: Path,
  reference: str,
  config: LoraConfig,
  trained_with: TrainedWith | None,
  results: Sequence[str] = (),
  *,
  trained_base: bool = False,
  merged_to: str = '',
):
  """Writes README.md.

  Args:
    folder: of the adapter, or of the merged model.
    reference: of the base, as `open_base` takes it; '' if unknown. Of a path only the
      last part is told.
    config: the adapter's.
    trained_with: how its records were rendered, None if unknown.
    results: sentences about data and losses, without a full stop.
    trained_base: whether leaves of the base were trained with the adapter.
    merged_to: 'hf' or 'flax' for a merged model, '' for an adapter.
  """
  on_hub = peft_config.hub_name(reference)
  base = on_hub or os.path.basename(reference.rstrip('/')) or 'unknown'
  reference = reference if on_hub else 'PATH'
  what = 'LoRA adapter merged into its base' if merged_to else 'LoRA adapter'
  facts = [
    f'base: `{base}`',
    f'rank {config.rank}{" (some modules have their own)" if config.ranks else ""}, '
    f'scale {config.scale:g}, on {", ".join(config.target_names)}'
    f'{", with DoRA" if config.dora else ""}',
  ]
  if trained_with is not None:
    facts.append(f'template `{trained_with.template}`, loss on: {trained_with.loss_on}')
  facts += results
  header = ['---', *([f'base_model: {on_hub}'] if on_hub else [])]
  header += [f'library_name: {"transformers" if merged_to else "peft"}'] * (merged_to != 'flax')
  parts = ['\n'.join([*header, 'pipeline_tag: text-generation', 'tags: [lora, gemma_jax]', '---'])]
  parts += [f'# {what}', '\n'.join(f'- {fact}' for fact in facts)]
  if trained_base and not merged_to:
    parts.append(_TRAINED_BASE)
  parts.append(_LICENCE)
  if trained_with is not None:
    spans = templates.render(trained_with.template, asking('QUESTION'))
    prompt = ''.join(span.text for span in spans)
    parts.append(f'It was trained to continue this text, after `<bos>`:\n\n```\n{prompt}\n```')
  if merged_to:
    use = (_TRANSFORMERS if merged_to == 'hf' else '') + _MERGED
  else:
    use = _PEFT.format(reference=reference) + _ADAPTER.format(reference=reference)
  parts.append(f'FOLDER is the one that holds this file.\n{use}')
  (folder / NAME).write_text('\n\n'.join(parts), 'utf-8')


_LICENCE = """\
The licence of the base holds for what is made of it (Gemma's: https://ai.google.dev/gemma/terms),
and the data may have one of their own. Whoever passes this on has to keep both."""

_TRAINED_BASE = """\
Parameters of the base were trained too. They are in `trained_base.safetensors`, by their paths in
gemma_jax. Other tools do not read that file: with only the adapter they do not compute the trained
model. `python -m launch.convert --adapter=FOLDER --to=hf` merges all of it."""

_TRANSFORMERS = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained('FOLDER')
model = AutoModelForCausalLM.from_pretrained('FOLDER')
```
"""

_PEFT = """\
BASE is its base as transformers reads it; from gemma_jax:

```sh
python -m launch.convert --model={reference} --to=hf --output=BASE
```

```python
import peft
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained('BASE')
model = AutoModelForCausalLM.from_pretrained('BASE')
model = peft.PeftModel.from_pretrained(model, 'FOLDER')
```
"""

_MERGED = """
```sh
python -m launch.generate --model=FOLDER --prompt='QUESTION'
```
"""

_ADAPTER = """
```sh
python -m launch.generate --model={reference} --adapter=FOLDER --prompt='QUESTION'
```
"""
