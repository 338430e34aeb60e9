"""Small valid inputs of each format, and the readers that are to be fuzzed."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import gzip
import importlib.util
import json
import lzma
from pathlib import Path
import shutil

import numpy as np

from gemma_jax.config import train as config_lib
from gemma_jax.config.train import LoraConfig, TrainConfig
from gemma_jax.data import records, tokenizer
from gemma_jax.formats import adapter, base_source, hf_safetensors, hf_tokenizer, open_base, peft
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.model.config import ModelConfig
from gemma_jax.runs import checksums
from gemma_jax.runs.checkpoint import Checkpoints
from tests import data_toy, gguf_toy, hf_toy, peft_toy

TINY = ModelConfig(
  vocab_size=61,
  embed_dim=6,
  hidden_dim=11,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  max_positions=509,
  layer_is_local=(True, False),
  window_size=8,
  use_qk_norm=True,
  use_post_norms=True,
)


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A format.

  Attributes:
    write: makes a valid input in an empty folder.
    read: reads it whole, as a command would.
    patterns: globs of the files that are mutated.
  """

  write: Callable[[Path], object]
  read: Callable[[Path], object]
  patterns: Sequence[str] = ('**/*',)

  def files(self, folder: Path) -> list[Path]:
    """The files that are mutated, in order."""
    found = {p for each in self.patterns for p in folder.glob(each) if p.is_file()}
    return sorted(found)


def _read_base(path: Path) -> None:
  opened = open_base.open_base(str(path))
  opened.load_params('float32')
  opened.fingerprint()
  pieces = opened.tokenizer()
  if pieces is not None:
    _use(pieces)


def _use(pieces: tokenizer.Tokenizer) -> None:
  pieces.decode(pieces.encode('Hi  <eos> user 가'))
  for token_id in range(pieces.vocab_size):
    pieces.token_bytes(token_id)


def _write_gguf(folder: Path) -> None:
  config = dataclasses.replace(
    gguf_toy.GEMMA3,
    vocab_size=307,
    embed_dim=32,
    hidden_dim=64,
    num_layers=2,
    layer_is_local=(True, True),
  )
  pieces, scores, types = data_toy.vocabulary()
  gguf_toy.write(
    folder / 'base.gguf',
    'gemma3',
    config,
    gguf_toy.make_tensors(config),
    {'blk.0.ffn_up.weight': gguf_toy.Q8_0},
    model=('tokenizer.ggml.model', 'llama', gguf_toy.gguf_package.GGUFValueType.STRING),
    tokenizer__ggml__tokens=pieces,
    tokenizer__ggml__scores=scores,
    tokenizer__ggml__token_type=types,
  )


def _tensors() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  shapes = base_source.stored_shapes(TINY)
  names = hf_safetensors.tensor_names(TINY)
  return {names[path]: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}


def _write_hf(folder: Path) -> None:
  """Two shards and their index."""
  tensors = _tensors()
  half = len(tensors) // 2
  weight_map = {}
  for i, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
    file = f'model-{i}.safetensors'
    hf_toy.save_file({n: tensors[n] for n in names}, folder / file)
    weight_map |= dict.fromkeys(names, file)
  (folder / hf_safetensors.INDEX_NAME).write_text(json.dumps({'weight_map': weight_map}))
  sizes = {
    'vocab_size': TINY.vocab_size,
    'hidden_size': TINY.embed_dim,
    'intermediate_size': TINY.hidden_dim,
    'num_attention_heads': TINY.num_heads,
    'num_key_value_heads': TINY.num_kv_heads,
    'head_dim': TINY.head_dim,
    'max_position_embeddings': TINY.max_positions,
    'num_hidden_layers': TINY.num_layers,
    'sliding_window_pattern': 2,
  }
  config = hf_toy.OLD['gemma3'] | sizes
  (folder / 'config.json').write_text(json.dumps(config))


_LORA = LoraConfig(rank=3, targets='all')


def _write_adapter(folder: Path) -> None:
  peft.write_adapter(
    folder / 'adapter',
    peft_toy.make_lora(peft_toy.MODEL, _LORA),
    _LORA,
    'base',
    {'final_norm': {'scale': np.ones(11, np.float32)}},
    TrainedWith(),
  )


def _read_adapter(folder: Path) -> None:
  adapter.read(folder, peft_toy.MODEL)
  adapter.read_trained_with(folder)


def _write_keras(folder: Path) -> None:
  golden = Path(__file__).parent.parent / 'golden' / 'keras'
  shutil.copy(golden / 'gemma2.lora.h5', folder / 'a.lora.h5')


def _read_keras(folder: Path) -> None:
  from tests.formats import test_keras

  adapter.read(folder / 'a.lora.h5', test_keras.CONFIGS['gemma2'])


def _write_tokenizer(folder: Path) -> None:
  proto = tokenizer.build_model_proto(*data_toy.vocabulary())
  (folder / 'tokenizer.model').write_bytes(proto)


def _write_added(folder: Path) -> None:
  _write_tokenizer(folder)
  added = {'id': 283, 'content': '<tool>', 'special': False, 'lstrip': False}
  contents = {
    'added_tokens': {'<tool>': 283},
    'special_tokens_map': {'additional_special_tokens': ['<x>', '<y>']},
    'tokenizer': {'added_tokens': [added]},
    'tokenizer_config': {
      'added_tokens_decoder': {'284': {'content': '<x>', 'special': True}},
      'chat_template': [{'name': 'default', 'template': '{{ messages }}'}],
    },
  }
  for name, content in contents.items():
    (folder / f'{name}.json').write_text(json.dumps(content))


def _read_added(folder: Path) -> None:
  hf_tokenizer.chat_template(folder)
  pieces = hf_tokenizer.read(folder, 400)
  if pieces is not None:
    _use(pieces)


def _write_flax(folder: Path) -> None:
  from tests.formats import test_flax_release

  config = test_flax_release.CONFIGS['gemma1']
  params = test_flax_release.params_of(config, scan_layers=False)
  tree = test_flax_release.release_tree(config, params)
  test_flax_release.save(folder / 'flax', test_flax_release.nest(tree))


def _write_checkpoint(folder: Path) -> None:
  """Without checksums, so that what is damaged is read all the same."""
  from tests.runs import test_checkpoint

  state = test_checkpoint.make_state()
  with contextlib.closing(Checkpoints(str(folder))) as checkpoints:
    checkpoints.save(state, {'found': {'tokens': 11}})
  (folder / 'checkpoints' / '4' / checksums.CHECKSUMS).unlink()


def _read_checkpoint(folder: Path) -> None:
  with contextlib.closing(Checkpoints(str(folder), read_only=True)) as found:
    step = found.latest_step()
    if step is not None:
      found.read_notes(step)
      found.read_leaves(step)


_ROWS = (
  {'instruction': 'Where?', 'context': 'Here.', 'response': 'There.'},
  {'prompt': '1 + 1 =', 'response': '2'},
  {'Instruction': 'To French.', 'input': 'hat', 'output': 'chapeau', 'id': 3},
  {'system': 'Brief.', 'history': [['a', 'b']], 'prompt': 'c', 'response': 'd'},
  {
    'messages': [
      {'role': 'system', 'content': ''},
      {'role': 'user', 'content': '안녕'},
      {'role': 'assistant', 'content': 'Hi', 'weight': 0, 'tool_calls': []},
      {'role': 'user', 'content': '<bos>', 'name': 'me'},
      {'role': 'model', 'content': 'Hi', 'weight': 1},
    ],
    'tools': None,
    'weight': 1,
  },
  {'tokens': [2, 11, 13, 1], 'loss_mask': [0, 0, 1, 1]},
)
_LINES = ''.join(json.dumps(row) + '\n' for row in _ROWS).encode()


def _write_records(folder: Path) -> None:
  (folder / 'a.jsonl').write_bytes(_LINES)
  (folder / 'a.jsonl.gz').write_bytes(gzip.compress(_LINES, mtime=0))
  (folder / 'a.jsonl.xz').write_bytes(lzma.compress(_LINES))


def _read_records(folder: Path) -> None:
  failed = None
  for path in sorted(folder.iterdir()):
    try:
      records.usable(records.read_jsonl(str(path)), 'chat', source=str(path))
    except ValueError as e:
      failed = e
  if failed:
    raise failed


def _write_config(folder: Path) -> None:
  (folder / 'run.json').write_text(json.dumps(config_lib.to_dict(TrainConfig(profile_steps=(3,)))))


def _read_config(folder: Path) -> None:
  tree = hf_safetensors.read_json(folder / 'run.json')
  config_lib.from_dict(tree).resolve()


CORPORA = {
  'gguf': Corpus(_write_gguf, lambda f: _read_base(f / 'base.gguf')),
  'safetensors': Corpus(_write_hf, _read_base),
  'adapter': Corpus(_write_adapter, lambda f: _read_adapter(f / 'adapter')),
  'tokenizer': Corpus(
    _write_tokenizer,
    lambda f: _use(tokenizer.SentencePieceTokenizer.from_file(str(f / 'tokenizer.model'))),
  ),
  'added_tokens': Corpus(_write_added, _read_added),
  'flax': Corpus(_write_flax, lambda f: _read_base(f / 'flax')),
  'checkpoint': Corpus(_write_checkpoint, _read_checkpoint),
  'records': Corpus(_write_records, _read_records),
  'config': Corpus(_write_config, _read_config),
}
if importlib.util.find_spec('h5py'):  # of the extra `keras`
  CORPORA['keras'] = Corpus(_write_keras, _read_keras)
