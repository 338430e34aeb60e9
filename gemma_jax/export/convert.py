"""Converts a base, or a base with an adapter in it, and verifies the result.

The order is the contract:
  1. the expected logits are computed: of the base, or of the base with the adapter;
  2. the output is written under a temporary name;
  3. it is read back: its tokens must be the base's; its weights the intended ones
     (`export.weight_check`), and different from the base's if an adapter was
     merged; its logits the expected ones;
  4. the measurements are written to `conversion.json`, and the output appears.
A conversion that fails leaves nothing behind.
"""

import dataclasses
import itertools
import os
from pathlib import Path
import re
from typing import Any

from absl import logging
from etils import epath
import jax.numpy as jnp
import numpy as np

from gemma_jax import files, pytree
from gemma_jax.config import checks
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.export import merged, streamed, weight_check
from gemma_jax.formats import adapter as adapter_lib
from gemma_jax.formats import (
  atomic_folder,
  base_source,
  flax_config,
  flax_writer,
  hf_writer,
  model_card,
  open_base,
)
from gemma_jax.formats.base_source import BaseSource
from gemma_jax.lora.lora import Lora

FORMS = ('hf', 'flax', 'peft')

# Largest |got - want| of a logit, relative to the largest logit at its position
# (or to 1). On the real 270M with a merged adapter it is 5e-6 in float32, and
# 0.015 in bfloat16, which keeps 8 bits of each weight.
TOLERANCES = {'float32': 1e-4, 'bfloat16': 0.1}

# If less than this of an adapter survives the rounding of its merge, the result is
# not what was trained, and a warning says so.
_LEAST_KEPT = 0.9

# The fixed batch: ids drawn uniformly, seed 0.
_BATCH_SHAPE = (2, 16)


def convert(
  model: str,
  output: str,
  to: str,
  adapter: str = '',
  dtype: str = 'auto',
  tokenizer: str = '',
  verify: bool = True,
  max_shard_bytes: int = hf_writer.MAX_SHARD_BYTES,
  nested: bool = False,
) -> dict[str, Any]:
  """Converts, merging an adapter if one is given.

  Args:
    model: reference of the base, as `open_base` takes it.
    output: folder to be made, here or in gs://; new or empty.
    to: 'hf' or 'flax' (a model), or 'peft' (the adapter alone).
    adapter: PEFT folder or .lora.h5 file; '' converts the base itself.
    dtype: of the weights written: auto (the base's own), float32, bfloat16.
    tokenizer: path of a tokenizer.model that replaces the base's own.
    verify: re-read the output, compare weights and logits. Merged weights are
      compared in any case.
    max_shard_bytes: of a file of weights ('hf').
    nested: store array names as nested dicts rather than flat ('flax').

  Returns:
    output; files and folders in it; bytes and parameters written; their
    dtype; largest_logit_difference, absolute, None without verification; and
    update_kept and logit_update_kept, the shares of a merged adapter's update
    that survived rounding, in the weights and in the logits of the check. Further
    measurements are in the output's conversion.json.

  Raises:
    ValueError: the arguments do not fit together, or the output does not compute
      what it should; nothing is left behind.
  """
  checks.instance('model', model, str, 'a model reference; that of a Base is base.reference')
  checks.instance('adapter', adapter, str | os.PathLike, 'a folder; lora.save(FOLDER) writes one')
  folder = files.path(output)
  _check_arguments(folder, to, adapter, dtype)
  source = open_base.open_base(model, tokenizer)
  loaded = None
  if adapter:
    loaded = adapter_lib.read(adapter, source.config)
    if not any(np.any(x) for x in _effects(loaded)):
      raise ValueError(
        f'adapter: {adapter} changes nothing (lora_b is all zero), so '
        'there is nothing to convert; train it first.'
      )
  record = {
    'model': model,
    'adapter': adapter or None,
    'to': to,
    'base_fingerprint': source.fingerprint(),
  }

  if to == 'peft':
    assert loaded is not None  # `_check_arguments` asks for an adapter
    named = dataclasses.replace(loaded, reference=model)

    def write(new: Path) -> dict[str, Any]:
      adapter_lib.write(new, named)
      return {'parameters': pytree.num_params(named.factors)}

  else:
    result, trained_with = source, source.read_trained_with()
    trained_on = None
    if loaded is not None:
      trained_with = loaded.trained_with
      result = merged.merge(source, loaded)
    if trained_with is not None and (loaded is not None or not source.read_chat_template()):
      trained_on = trained_with.template

    def write(new: Path) -> dict[str, Any]:
      if trained_with is not None:
        trained_with.write(new)
      if loaded is not None:
        model_card.write(new, model, loaded.config, trained_with, merged_to=to)
      return _write_model(new, result, to, dtype, max_shard_bytes, nested, trained_on)

  tokens = _batch(source)
  want = _logits(source, tokens, loaded) if verify else None
  of_base = None
  if verify and loaded is not None and to != 'peft':
    of_base = _logits_of_base(source, tokens, base_source.weight_dtype(source, dtype))

  sizes: dict[str, int] = {}

  def fill(new: Path):
    record.update(write(new))
    if to != 'peft' and (verify or loaded is not None):
      logging.info('Reading it back, comparing tokens and weights')
      _verify_tokenizer(source.tokenizer(), _reopen(new).tokenizer(), to)
      record.update(_verify_weights(source, _reopen(new), loaded, record))
    measured = None
    if want is not None:
      logging.info('Reading it back, comparing logits')
      measured = _verify_logits(new, source, loaded, to, tokens, want, of_base, record)
    record['largest_logit_difference'] = measured
    _warn_of_rounding(record)
    text = files.to_json(record, flax_config.RECORD_NAME, indent=2, sort_keys=True) + '\n'
    (new / flax_config.RECORD_NAME).write_text(text, 'utf-8')
    written = sorted(p for p in new.rglob('*') if p.is_file())
    sizes.update({str(p.relative_to(new)): p.stat().st_size for p in written})
    _check_free(folder)  # another conversion may have finished meanwhile

  atomic_folder.replace(folder, fill)
  return {
    'output': output,
    'files': sorted({re.sub('/.*', '/', name) for name in sizes}),
    'bytes': sum(sizes.values()),
    'parameters': record['parameters'],
    'dtype': record.get('dtype', 'float32'),
    'largest_logit_difference': record['largest_logit_difference'],
    'update_kept': record.get('update_kept'),
    'logit_update_kept': record.get('logit_update_kept'),
  }


def _check_arguments(folder: epath.Path, to: str, adapter: str, dtype: str):
  if to not in FORMS:
    raise ValueError(f'to: got {to!r}, expected one of {", ".join(FORMS)}.')
  if to == 'peft' and not adapter:
    raise ValueError('adapter: missing; --to=peft writes an adapter, give one.')
  if to == 'peft' and dtype != 'auto':
    raise ValueError(f'dtype: got {dtype!r}, expected auto; factors are written as float32.')
  _check_free(folder)


def _check_free(folder: epath.Path):
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f'output: {folder} already exists, expected a new or empty folder.')


def _effects(loaded: Lora) -> list[np.ndarray]:
  """Leaves of which at least one must be nonzero if the adapter changes anything."""
  leaves = [
    x for name, x in pytree.items(loaded.factors) if name.endswith(('lora_b', 'lora_magnitude'))
  ]
  return leaves + [x for _, x in pytree.items(loaded.trained_base)]


def _write_model(
  new: Path,
  source: BaseSource,
  to: str,
  dtype: str,
  max_shard_bytes: int,
  nested: bool,
  trained_on: str | None,
) -> dict[str, Any]:
  if to == 'hf':
    hf_writer.write_folder(new, source, dtype, max_shard_bytes, trained_on)
    config = hf_writer.exported_config(source)
  else:
    flax_writer.write_folder(new, source, dtype, nested)
    config = flax_writer.exported_config(source.config)
  shapes = base_source.stored_shapes(config).values()
  record = {
    'dtype': base_source.weight_dtype(source, dtype).name,
    'parameters': sum(int(np.prod(shape)) for shape in shapes),
    'model_config': dataclasses.asdict(config),
  }
  text = files.to_json(record, flax_config.RECORD_NAME, indent=2, sort_keys=True) + '\n'
  (new / flax_config.RECORD_NAME).write_text(text, 'utf-8')
  return record


def _verify_tokenizer(want: Tokenizer | None, got: Tokenizer | None, to: str):
  """Raises ValueError unless the written tokenizer is the intended one."""
  if want is None or want.model_proto is None:
    return
  if got is None:
    raise ValueError("output: it has no tokenizer, expected the base's; nothing was written.")
  advice = ' Use --to=hf, which names each token.' if to == 'flax' else ''
  if got.vocab_size != want.vocab_size:
    raise ValueError(
      f'output: its tokenizer has {got.vocab_size} tokens, expected '
      f'{want.vocab_size}, as in the base; nothing was written.{advice}'
    )
  for ours, theirs in itertools.zip_longest(want.named_pieces, got.named_pieces):
    if ours != theirs:
      raise ValueError(
        f'output: its tokenizer has {theirs}, expected {ours}, as in the base; '
        f'nothing was written.{advice}'
      )
  if got.fingerprint() != want.fingerprint():
    raise ValueError(
      f'output: its tokenizer is {got.fingerprint()}, expected '
      f'{want.fingerprint()}, that of the base; nothing was written.{advice}'
    )


def _verify_weights(
  source: BaseSource, result: BaseSource, loaded: Lora | None, record: dict[str, Any]
) -> dict[str, Any]:
  """Measures the weights; raises ValueError unless they are the intended ones."""
  dtype = np.dtype(jnp.dtype(record['dtype']))
  comparison = weight_check.compare(source, result, dtype, loaded)
  if loaded is not None and not comparison.num_changed:
    reason = 'it is lost in rounding, use --dtype=float32'
    if dtype == np.float32:
      reason = 'the adapter changes nothing, train it first'
    raise ValueError(
      f'output: the merged weights equal the base in {dtype.name}, expected '
      f"the adapter's update to be visible; {reason}. Nothing was written."
    )
  return {
    'largest_weight_difference': comparison.largest_difference,
    'changed_tensors': comparison.num_changed,
    'update_kept': comparison.update_kept,
  }


def _verify_logits(
  new: Path,
  source: BaseSource,
  loaded: Lora | None,
  to: str,
  tokens: np.ndarray,
  want: np.ndarray,
  of_base: tuple[np.ndarray, np.ndarray] | None,
  record: dict[str, Any],
) -> float:
  """Raises ValueError unless the output computes what it should.

  If the base's logits are given, both exact and with its weights rounded, records
  which share of the update is in the logits:

      kept = <got - rounded base, want - base> / |want - base|^2

  as `weight_check` does for the weights. What the base itself loses by rounding is
  on both sides and cancels in each difference.

  Returns:
    Largest absolute difference of a logit.
  """
  if to == 'peft':
    again = adapter_lib.read(new, source.config)
    got = _logits(source, tokens, again)
    dtype = 'float32'
  else:
    dtype = record['dtype']
    got = _logits(_reopen(new), tokens, None)
  rows = min(got.shape[-1], want.shape[-1])  # leaves out rows that pad the Flax release
  got, want = got[..., :rows], want[..., :rows]
  difference = np.abs(got - want)
  relative = difference / np.maximum(1.0, np.abs(want).max(-1, keepdims=True))
  tolerance = TOLERANCES[dtype]
  # Not `max() > tolerance`, which a NaN would pass.
  if not relative.max() <= tolerance:
    advice = ' Use --dtype=float32.' if dtype == 'bfloat16' else ''
    raise ValueError(
      f'output: its logits differ from those of {record["model"]}'
      f'{" with the adapter" if loaded else ""} by {difference.max():.3g}, '
      f'{relative.max():.3g} of the largest, expected at most {tolerance} in '
      f'{dtype}; nothing was written.{advice}'
    )
  record['largest_relative_logit_difference'] = float(relative.max())
  if of_base is not None:
    base, rounded = (x[..., :rows] for x in of_base)
    update = (want - base).astype(np.float64)
    if square := np.vdot(update, update):
      record['logit_update_kept'] = float(np.vdot(got - rounded, update) / square)
  return float(difference.max())


def _warn_of_rounding(record: dict[str, Any]):
  """Logs how much of a merged adapter is left; warns if that is too little."""
  names = {'update_kept': 'weights', 'logit_update_kept': "check's logits"}
  kept = {where: record[name] for name, where in names.items() if record.get(name) is not None}
  if not kept:
    return
  # A rounding step may be larger than the update, or point the other way.
  shares = ', '.join(f'{min(max(x, 0), 1):.1%} in the {where}' for where, x in kept.items())
  if min(kept.values()) >= _LEAST_KEPT:
    logging.info("Kept of the adapter's update: %s", shares)
    return
  advice = 'The update is very small; is the adapter trained?'
  if record['dtype'] != 'float32':
    advice = 'Use --dtype=float32.'
  logging.warning(
    "Rounding to %s keeps this of the adapter's update: %s; expected at least %.0f %%. %s",
    *(record['dtype'], shares, 100 * _LEAST_KEPT, advice),
  )


def _reopen(folder: Path) -> BaseSource:
  return open_base.open_base(str(folder))


def _batch(source: BaseSource) -> np.ndarray:
  """int32 [B, T]: rows that begin with BOS, followed by any tokens."""
  rows = hf_writer.exported_config(source).vocab_size
  if (tokenizer := source.tokenizer()) is not None:
    rows = min(rows, tokenizer.vocab_size)
  low = min(4, rows - 1)
  tokens = np.random.default_rng(0).integers(low, rows, _BATCH_SHAPE)
  tokens[:, 0] = min(2, rows - 1)
  return tokens.astype(np.int32)


def _logits_of_base(
  source: BaseSource, tokens: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
  """Logits of the base as it is, and with its weights rounded to a dtype."""
  exact = _logits(source, tokens, None)
  if dtype in (np.float32, source.stored_dtype):
    return exact, exact
  tensors = {
    path: dataclasses.replace(x, read=lambda i, j, x=x: x.read(i, j).astype(dtype))
    for path, x in source.tensors.items()
  }
  return exact, _logits(dataclasses.replace(source, tensors=tensors), tokens, None)


def _logits(source: BaseSource, tokens: np.ndarray, loaded: Lora | None) -> np.ndarray:
  """Logits float32 [B, T, V] of the base, with the adapter if one is given."""
  if loaded is None:
    return streamed.logits(source, tokens)
  if loaded.trained_base:
    source = merged.merge(source, dataclasses.replace(loaded, factors={}))
  return streamed.logits(source, tokens, loaded)
