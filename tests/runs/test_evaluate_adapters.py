"""Base and adapters on the same records, from one compilation."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_jax.data import dataset
from gemma_jax.formats.base_source import BaseSource
from gemma_jax.model.transformer import Transformer
from gemma_jax.runs import evaluate_adapters, train
from tests import data_toy, run_toy


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(config, result) of a run whose held-out records are a file."""
  folder = tmp_path_factory.mktemp('run')
  config = run_toy.config(run_toy.write_records(folder))
  held = folder / 'held'
  held.mkdir()
  config.data.eval_path = run_toy.write_records(held, 9)
  return config, train.train(config.resolve(), str(folder / 'workdir'))


def evaluate(config, names):
  config = run_toy.config(config.data.eval_path).resolve()
  return list(evaluate_adapters.evaluate_adapters(config, names))


def test_gives_the_losses_of_training(trained):
  config, result = trained
  base, adapted = evaluate(config, ['base', result['adapter']])
  np.testing.assert_allclose(base[2].nll_per_token, result['loss_base'], rtol=1e-6)
  np.testing.assert_allclose(adapted[2].nll_per_token, result['loss_adapted'], rtol=1e-6)
  assert len(base[2].nll) == 9


def test_a_second_adapter_costs_no_compilation(trained, monkeypatch):
  config, result = trained
  traces = []
  original = Transformer.__call__

  def counting(self, *arguments, **options):
    traces.append(1)
    return original(self, *arguments, **options)

  monkeypatch.setattr(Transformer, '__call__', counting)
  evaluate(config, ['base'])
  alone = len(traces)
  traces.clear()
  evaluate(config, ['base', result['adapter']])
  assert len(traces) == alone


def test_packing_does_not_change_a_record(trained):
  config, _ = trained
  packed = evaluate(config, ['base'])[0][2]
  config = run_toy.config(config.data.eval_path)
  config.data.packing = False
  ((_, _, padded),) = evaluate_adapters.evaluate_adapters(config.resolve(), ['base'])
  np.testing.assert_allclose(packed.nll, padded.nll, rtol=1e-5)
  np.testing.assert_array_equal(packed.tokens, padded.tokens)


def test_records_are_scored_whole_unless_a_length_is_given(trained, tmp_path, monkeypatch, caplog):
  """Long ones in longer rows; the sums are those of one long row."""
  rows = [{'prompt': f'Q{i}', 'response': 'abcdefg ' * (1 + 11 * (i % 5))} for i in range(11)]
  path = data_toy.write_jsonl(tmp_path / 'long.jsonl', rows)

  def score(seq_len, rows=512):
    monkeypatch.setattr(dataset, 'DEFAULT_SEQ_LEN', rows)
    config = run_toy.config(path)
    config.data.seq_len = seq_len
    config.data.global_batch_size = 4
    caplog.clear()
    return next(evaluate_adapters.evaluate_adapters(config.resolve(), ['base']))

  _, examples, whole = score(0)
  _, _, short_rows = score(0, rows=96)
  assert examples.stats.truncated == 0
  np.testing.assert_array_equal(short_rows.tokens, whole.tokens)
  np.testing.assert_allclose(short_rows.nll, whole.nll, rtol=1e-5)
  assert 'truncated to seq_len=' not in caplog.text
  _, _, cut = score(96)
  assert cut.tokens.sum() < whole.tokens.sum()
  assert '8 of 11 records are truncated to seq_len=96' in caplog.text


def test_an_adapter_that_is_not_there(trained):
  config, _ = trained
  with pytest.raises(ValueError, match='nowhere'):
    evaluate(config, ['nowhere'])


def test_a_loss_that_is_not_finite_names_its_record(trained, tmp_path):
  """Factors that are finite, and overflow in the product."""
  config, result = trained
  shutil.copytree(result['adapter'], tmp_path / 'a')
  path = tmp_path / 'a' / 'adapter_model.safetensors'
  save_file({n: x * 1e25 + 1e25 for n, x in load_file(path).items()}, path)
  message = rf'{tmp_path}/a: the loss of record 0 is .*\(9 of 9 records.*the adapter diverged'
  with pytest.raises(FloatingPointError, match=message):
    evaluate(config, ['base', str(tmp_path / 'a')])


def test_a_base_is_not_blamed_on_an_adapter(trained, monkeypatch):
  config, _ = trained
  load = BaseSource.load_params

  def broken(self, *arguments, **options):
    return jax.tree.map(lambda x: x * np.nan, load(self, *arguments, **options))

  monkeypatch.setattr(BaseSource, 'load_params', broken)
  with pytest.raises(FloatingPointError, match=r'base: the loss .* the base itself overflows'):
    evaluate(config, ['base'])
