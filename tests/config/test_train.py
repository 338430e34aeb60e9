"""Every bad field is refused, in one line that names it."""

import copy
import dataclasses
import json

import pytest

from gemma_jax.config import train as config_lib
from gemma_jax.config.train import TrainConfig


def with_field(path: str, value) -> TrainConfig:
  """The default config with one field set, as an override would."""
  config = TrainConfig()
  *parents, name = path.split('.')
  node = config
  for parent in parents:
    node = getattr(node, parent)
  assert hasattr(node, name)
  setattr(node, name, value)
  return config


BAD = [
  ('seed', -1),
  ('seed', 2**32),
  ('profile_steps', (3, -1)),
  ('lora.rank', 0),
  ('lora.rank', -3),
  ('lora.rank', 2.5),
  ('lora.alpha', 0.0),
  ('lora.alpha', float('nan')),
  ('lora.alpha', float('inf')),
  ('optimizer.learning_rate', float('inf')),
  ('lora.scale_rule', 'alpha'),
  ('lora.targets', 'query'),
  ('lora.targets', 'q|('),
  ('lora.targets', ''),
  ('lora.factorization', 'tucker'),
  ('lora.init', 'zeros'),
  ('lora.dropout', 1.0),
  ('lora.dropout', -0.1),
  ('model.path', ''),
  ('model.dtype', 'float16'),
  ('model.dtype', 'int8'),
  ('model.activation_dtype', 'float16'),
  ('model.attention', 'flash'),
  ('optimizer.learning_rate', 0.0),
  ('optimizer.learning_rate', float('nan')),
  ('optimizer.schedule', 'exponential'),
  ('optimizer.warmup_steps', -1),
  ('optimizer.weight_decay', -0.1),
  ('optimizer.clip_norm', -1.0),
  ('optimizer.b1', 1.0),
  ('optimizer.b2', 1.5),
  ('optimizer.eps', 0.0),
  ('optimizer.accumulate_steps', 0),
  ('mesh.data', 0),
  ('mesh.tensor', -2),
  ('data.path', ''),
  ('data.loss_on', 'prompt'),
  ('data.seq_len', 1),
  ('data.global_batch_size', 0),
  ('data.max_records', -1),
  ('data.max_eval_records', -1),
  ('seed', -1),
  ('steps', -1),
  ('eval_every_steps', -1),
  ('checkpoint_every_steps', -1),
  ('early_stopping_evals', -1),
  ('early_stopping_evals', 2),  # without eval_every_steps it would never stop
  ('log_every_steps', 0),
  ('epochs', 0.0),
  ('trainable', ()),
  ('trainable', ('lora/', 'params/(')),
  # A lone string would be taken letter by letter: 'p' is the whole base.
  ('trainable', 'params/layer_1/attn/v'),
  # Whole numbers only.
  ('steps', 1.5),
  ('data.seq_len', 2.5),
  ('data.global_batch_size', 4.0),
  ('optimizer.accumulate_steps', 2.0),
  ('mesh.data', 1.0),
]


@pytest.mark.parametrize(('path', 'value'), BAD, ids=str)
def test_a_bad_field_is_refused_by_name_in_one_line(path, value):
  with pytest.raises(ValueError) as caught:
    with_field(path, value).resolve()
  message = str(caught.value)
  assert message.startswith(f'{path}: ')
  assert '\n' not in message
  if value not in ((), ('lora/', 'params/(')):
    assert repr(value) in message
  assert path == 'trainable' or 'expected' in message


def test_resolved_is_an_equal_copy_that_does_not_change():
  config = TrainConfig()
  resolved = config.resolve()
  assert resolved == config == resolved.resolve()
  config.lora.rank = 99
  assert resolved.lora.rank == 8
  for part, name in ((resolved, 'steps'), (resolved.lora, 'rank')):
    with pytest.raises(dataclasses.FrozenInstanceError, match=name):
      setattr(part, name, 5)
  assert dataclasses.replace(resolved, steps=5).steps == 5


def test_float16_is_refused_with_the_reason():
  with pytest.raises(ValueError, match='float16 overflows'):
    with_field('model.dtype', 'float16').resolve()


def test_only_one_axis_of_the_mesh_may_take_the_rest():
  config = with_field('mesh.data', -1)
  with pytest.raises(ValueError, match=r'mesh: got \(-1, -1, 1\)'):
    config.resolve()


def test_a_batch_divides_into_its_parts():
  config = with_field('optimizer.accumulate_steps', 3)
  with pytest.raises(ValueError, match=r'a multiple of optimizer\.accumulate'):
    config.resolve()


def test_steps_win_over_epochs():
  config = with_field('epochs', 0.0)
  config.steps = 7
  assert config.resolve().steps == 7


def test_to_dict_survives_json():
  config = TrainConfig(profile_steps=(3, 4))
  plain = config_lib.to_dict(config)
  assert json.loads(json.dumps(plain)) == plain
  assert plain['profile_steps'] == [3, 4]
  assert plain['lora']['rank'] == config.lora.rank
  assert plain.keys() == {f.name for f in dataclasses.fields(TrainConfig)}


def test_from_dict_undoes_to_dict():
  config = TrainConfig(profile_steps=(3, 4), trainable=('lora/', 'params/x'))
  config.data.path, config.mesh.data = 'a.jsonl', 5
  plain = json.loads(json.dumps(config_lib.to_dict(config)))
  assert config_lib.from_dict(plain) == config


@pytest.mark.parametrize(
  ('tree', 'message'),
  [
    ({'rnk': 1}, "config: got the field 'rnk', expected one of"),
    ({'lora': {'rnk': 1}}, "lora: got the field 'rnk', expected one of"),
    ({'lora': {'rank': '1'}}, r"lora\.rank: got '1', expected .* type int"),
    ({'lora': {'rank': True}}, r'lora\.rank: got True, expected .* type int'),
    ({'lora': 3}, r'lora: got 3, expected an object'),
    ({'steps': {}}, r'steps: got {}, expected a value of type int'),
    ([], r'config: got \[\], expected an object'),
  ],
)
def test_from_dict_refuses_what_is_no_config(tree, message):
  with pytest.raises(ValueError, match=message):
    config_lib.from_dict(tree)


def test_a_pattern_that_is_no_text_is_refused():
  with pytest.raises(ValueError, match=r'trainable: got 3, expected a regex'):
    with_field('trainable', (3,)).resolve()


def test_configs_do_not_share_their_parts():
  first, second = TrainConfig(), TrainConfig()
  before = copy.deepcopy(second)
  first.lora.rank = 64
  assert second == before
