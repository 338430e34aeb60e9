"""Our templates in Jinja, as transformers and llama.cpp read them.

Each renders a conversation to the text that `data.templates` renders it to, so
that a merged model is asked as its adapter was trained:

    messages   [{'role': 'user', 'content': 'Hi'}], add_generation_prompt
    dolly      <bos>Instruction:\\nHi\\n\\nResponse:\\n
    korean     <bos>질문:\\nHi\\n\\n답변:\\n

A conversation that a template cannot express is an error there too. All text is
inside expressions and every tag strips the white space around it, so the results
do not depend on a renderer's `trim_blocks`.
"""

from absl import logging

from gemma_jax.data import templates
from gemma_jax.data.record import asking
from gemma_jax.data.tokenizer import START_OF_TURN, Tokenizer

# What begins a turn of Gemma 1 to 3, and of Gemma 4.
_TURNS = (START_OF_TURN, '<|turn>')

# A message's text: a string, or transformers' list of parts.
_TEXT = """\
{%- macro text(message) -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] != 'text' -%}
{{- raise_exception('This template takes text alone.') -}}
{%- endif -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

# Sets `system` (or leaves it undefined) and `turns`.
_SYSTEM = """\
{{- bos_token -}}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = text(messages[0]) -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set turns = messages -%}
{%- endif -%}
"""

# The system's text goes before the first user's, as in Gemma's release: with an
# empty line between them, whatever it is. Every other text is trimmed.
_CHAT = """\
{%- for turn in turns -%}
{%- set is_user = loop.index0 % 2 == 0 -%}
{%- if is_user != (turn['role'] == 'user') or \
turn['role'] not in ['user', 'assistant', 'model'] -%}
{{- raise_exception('Turns must alternate: user, assistant, user, ...') -}}
{%- endif -%}
{{- '<start_of_turn>' ~ ('user' if is_user else 'model') ~ '\\n' -}}
{%- if loop.first and system is defined -%}
{{- system ~ '\\n\\n' -}}
{%- endif -%}
{{- (text(turn) | trim) ~ '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

_NO_SYSTEM = """\
{%- if system is defined and system -%}
{{- raise_exception('This template takes no system text.') -}}
{%- endif -%}
"""

# One question, and its answer if there is one.
_SINGLE = """\
{%- if (turns | length) not in [1, 2] or turns[0]['role'] != 'user' or \
((turns | length) == 2 and turns[1]['role'] not in ['assistant', 'model']) -%}
{{- raise_exception('Expected one question, and its answer or none.') -}}
{%- endif -%}
{{- BEFORE -}}
{%- if system is defined and system -%}{{- system ~ '\\n\\n' -}}{%- endif -%}
{{- text(turns[0]) -}}
{{- AFTER -}}
{%- if (turns | length) == 2 -%}
{{- ANSWER ~ text(turns[1]) ~ '<eos>' -}}
{%- elif add_generation_prompt -%}
{{- ANSWER -}}
{%- endif -%}
"""


def jinja(template: str) -> str:
  """The Jinja form of one of our templates.

  Raises:
    ValueError: there is no template with that name.
  """
  templates.check_name(template)
  if template == 'chat':
    return _TEXT + _SYSTEM + _CHAT
  before, after, answer = _parts(template)
  single = _SINGLE.replace('BEFORE', _quoted(before))
  single = single.replace('AFTER', _quoted(after))
  single = single.replace('ANSWER', _quoted(answer))
  no_system = _NO_SYSTEM if template in templates.TRANSLATIONS else ''
  return _TEXT + _SYSTEM + no_system + single


def of_export(trained_on: str | None, own: str | None, tokenizer: Tokenizer | None) -> str | None:
  """The chat template that an exported model should carry.

  Args:
    trained_on: template of the adapter that was merged; None if there was none or
      it is not known.
    own: the base's chat template, if it has one; with an adapter trained on
      Gemma's turns it is kept if it renders them.
    tokenizer: of the base.

  Returns:
    Jinja, or None for a tokenizer without turns, which has no chats.
  """
  if trained_on not in (None, 'chat'):
    return jinja(trained_on)
  if own is not None:
    if trained_on is None or any(turn in own for turn in _TURNS):
      return own
    logging.warning(
      "The base's chat template has no Gemma turns, on which its adapter was "
      'trained; the output gets one that has them'
    )
    return jinja('chat')
  has_turns = tokenizer is not None and tokenizer.end_of_turn_id is not None
  return jinja('chat') if has_turns else None


def _parts(template: str) -> tuple[str, str, str]:
  """The text before a question, after it, and before the answer."""
  mark = '\x00'
  (span,) = templates.render(template, asking(mark))
  before, after = span.text.split(mark)
  # The last line asks for the answer: 'Response:\n'.
  end = after.rfind('\n\n') + 2 if '\n\n' in after else 0
  return before, after[:end], after[end:]


def _quoted(text: str) -> str:
  """A Jinja string; our templates contain no quotes."""
  return "'" + text.replace('\n', '\\n') + "'"
