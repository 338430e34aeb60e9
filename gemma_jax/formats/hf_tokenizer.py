"""The tokenizer of a Hugging Face folder: tokenizer.model and added tokens.

A fine-tuned model may have tokens after the pieces of tokenizer.model, in rows
added by resizing its embedding. Where they are named depends on what saved the
folder:

    tokenizer.json          added_tokens          [{id, content, special}]
    tokenizer_config.json   added_tokens_decoder  {id: {content, special}}
    added_tokens.json       {content: id}

All are read, and must agree. A token is special if one of them says so.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
import re
from typing import Any, TypeGuard

from gemma_jax import files
from gemma_jax.data import tokenizer as tokenizer_lib
from gemma_jax.data.tokenizer import AddedToken, SentencePieceTokenizer
from gemma_jax.formats import hf_safetensors

CONFIG_NAME = 'tokenizer_config.json'
GENERATION_NAME = 'generation_config.json'
_SPECIAL_LISTS = ('additional_special_tokens', 'extra_special_tokens')
# How transformers may match a token in text other than by its spelling.
_MATCHING = ('lstrip', 'rstrip', 'single_word')


def read(folder: Path, num_rows: int) -> SentencePieceTokenizer | None:
  """The tokenizer of a folder, or None if it has no tokenizer.model.

  Args:
    folder: of the base.
    num_rows: of its embedding.

  Raises:
    ValueError: a file is broken, or the files contradict each other; names the
      file and the token.
  """
  path = folder / 'tokenizer.model'
  if not path.is_file():
    return None
  return SentencePieceTokenizer.from_file(str(path), added_tokens(folder, num_rows))


def added_tokens(folder: Path, num_rows: int) -> list[AddedToken]:
  """The tokens that a folder names beside tokenizer.model, by id.

  A special token without a row is left out: Gemma 3's releases name
  <image_soft_token> beside text models too.

  Args:
    folder: of the base.
    num_rows: of its embedding.

  Raises:
    ValueError: as `read`.
  """
  special = _special_contents(folder)
  by_id: dict[int, AddedToken] = {}
  origins: dict[int, str] = {}
  for where, entry in _entries(folder):
    token = _parse(where, entry, special)
    known = by_id.setdefault(token.id, token)
    origins.setdefault(token.id, where)
    if _spelled(known.content) != _spelled(token.content):
      raise ValueError(
        f'{where}: token {token.id} is {token.content!r:.80}, but '
        f'{origins[token.id]} says {known.content!r:.80}; expected one spelling.'
      )
    by_id[token.id] = known._replace(special=known.special or token.special)
  for token in by_id.values():
    if token.id >= num_rows and not token.special:
      raise ValueError(
        f'{origins[token.id]}: added token {token.content!r:.80} has id '
        f'{token.id}, expected one below {num_rows}, the rows of the '
        'embedding; resize the embedding, or remove the token.'
      )
  return sorted(token for token in by_id.values() if token.id < num_rows)


def chat_template(folder: Path) -> str | None:
  """The folder's own chat template, wherever it is kept; None if it has none."""
  path = folder / 'chat_template.jinja'
  if path.is_file():
    try:
      return path.read_text('utf-8')
    except UnicodeDecodeError as e:
      raise ValueError(f'{path}: expected UTF-8 ({e}).') from None
  for name in (CONFIG_NAME, 'chat_template.json'):
    template = read_object(folder / name).get('chat_template')
    if isinstance(template, list):  # several, by their names
      named = [x for x in template if isinstance(x, dict)]
      default = [x for x in named if x.get('name') == 'default']
      template = default[0].get('template') if default else None
    if isinstance(template, str):
      return template
  return None


def stop_ids(folder: Path) -> tuple[int, ...]:
  """The tokens that end an answer, as generation_config.json or config.json says.

  Raises:
    ValueError: the value is something other than ids.
  """
  for name in (GENERATION_NAME, 'config.json'):
    if ids := parse_stop_ids(read_object(folder / name), folder / name):
      return ids
  return ()


def parse_stop_ids(config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
  """`eos_token_id` of a JSON object: an id, or several of them.

  Args:
    config: the object.
    path: of its file, for the message.

  Raises:
    ValueError: as `stop_ids`.
  """
  value = config.get('eos_token_id')
  ids = value if isinstance(value, list) else [] if value is None else [value]
  if not all(type(i) is int for i in ids):
    raise ValueError(f'{path}: got eos_token_id={value!r:.80}, expected an id or a list of ids.')
  return tuple(ids)


def _entries(folder: Path) -> Iterator[tuple[str, Any]]:
  """Yields (file, {id, content, ...}) of each token named, file by file."""
  path = folder / 'tokenizer.json'
  for entry in _first_list(path, b'added_tokens'):
    yield str(path), entry
  path = folder / CONFIG_NAME
  for token_id, entry in _field(path, 'added_tokens_decoder', dict).items():
    is_number = token_id.isascii() and token_id.isdigit()
    fields = entry if isinstance(entry, dict) else {}
    yield str(path), {**fields, 'id': int(token_id) if is_number else token_id}
  path = folder / 'added_tokens.json'
  for content, token_id in read_object(path).items():
    # It has no flag, so a known name is the best evidence.
    special = tokenizer_lib.is_control_name(content)
    yield (str(path), {'content': content, 'id': token_id, 'special': special})


def _parse(where: str, entry: Any, special: set[str]) -> AddedToken:
  fields = entry if isinstance(entry, dict) else {}
  token_id, content = fields.get('id'), fields.get('content')
  # No more rows than an int32 can count, whatever a file says.
  if type(token_id) is not int or not 0 <= token_id < 2**31 or not _is_text(content):
    raise ValueError(f'{where}: got added token {entry!r:.80}, expected an id and a content.')
  is_special = fields.get('special') is True or content in special
  odd = next((name for name in _MATCHING if fields.get(name)), None)
  if odd and not (is_special or tokenizer_lib.is_control_name(content)):
    raise ValueError(
      f'{where}: added token {content!r:.80} has {odd}, expected a token that is '
      'matched exactly as spelled; others are not supported.'
    )
  return AddedToken(token_id, content, is_special)


def _special_contents(folder: Path) -> set[str]:
  """The contents that the folder's files list as special, without ids."""
  contents = set()
  for name in (CONFIG_NAME, 'special_tokens_map.json'):
    raw = read_object(folder / name)
    listed = [value for key, value in raw.items() if key.endswith('_token')]
    for key in _SPECIAL_LISTS:
      value = raw.get(key)
      value = list(value.values()) if isinstance(value, dict) else value
      listed += value if isinstance(value, list) else []
    for value in listed:
      content = value.get('content') if isinstance(value, dict) else value
      if isinstance(content, str):
        contents.add(content)
  return contents


def read_object(path: Path) -> dict[str, Any]:
  """The JSON object in a file; {} if the file does not exist."""
  if not path.is_file():
    return {}
  raw = hf_safetensors.read_json(path)
  if not isinstance(raw, dict):
    raise ValueError(f'{path}: got a {type(raw).__name__}, expected a JSON object.')
  return raw


def _field(path: Path, name: str, kind: type) -> Any:
  value = read_object(path).get(name)
  value = kind() if value is None else value
  if not isinstance(value, kind):
    raise ValueError(
      f'{path}: {name} is a {type(value).__name__}, expected a '
      f'{"list" if kind is list else "JSON object"}.'
    )
  return value


# A string (what follows a backslash does not end it), or where an array or object begins or ends.
_AFTER_KEY = re.compile(rb'\s*:\s*(\[|null)?')
_JSON_MARK = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[][{}]', re.DOTALL)


def _first_list(path: Path, name: bytes) -> list[Any]:
  """A list at the top level of a JSON object; [] without the file or the list.

  The rest of it is passed over: the vocabulary and merges of Gemma's tokenizer.json
  take 33 MB there, and ten times that in memory.
  """
  if not path.is_file():
    return []
  content = path.read_bytes()
  if content[:64].lstrip()[:1] != b'{' or content[-64:].rstrip()[-1:] != b'}':
    raise ValueError(f'{path}: cannot be read as JSON (expected a whole object; is it cut?).')
  depth, start = 0, None
  for mark in _JSON_MARK.finditer(content):
    depth += {b'{': 1, b'[': 1, b'}': -1, b']': -1}.get(mark[0], 0)
    if start is not None and depth == 1:
      try:
        value = files.parse_json(content[start : mark.end()])
      except ValueError as e:
        raise ValueError(f'{path}: {name.decode()} cannot be read as JSON ({e}).') from None
      return value
    if depth == 1 and mark[0] == b'"%b"' % name:
      follows = _AFTER_KEY.match(content, mark.end())
      if follows is None:  # a string
        continue
      if follows[1] is None:
        raise ValueError(f'{path}: {name.decode()} is something else, expected a list.')
      if follows[1] == b'null':
        return []
      start = follows.start(1)
  return []


def _is_text(content: Any) -> TypeGuard[str]:
  """Whether it is a string of at least one character, and valid Unicode."""
  try:
    return isinstance(content, str) and len(content.encode()) > 0
  except UnicodeEncodeError:  # a lone surrogate
    return False


def _spelled(content: str) -> str:
  return content.replace(' ', tokenizer_lib.SPACE)
