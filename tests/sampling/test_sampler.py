"""Decoding with a cache: what it must equal, and what must not change it."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig, MeshConfig
from gemma_jax.data.tokenizer import ByteTokenizer
from gemma_jax.formats import open_base
from gemma_jax.lora import align
from gemma_jax.lora.lora import Lora
from gemma_jax.model import layout, variants
from gemma_jax.model.transformer import Transformer
from gemma_jax.sampling import next_token as next_token_lib
from gemma_jax.sampling import prompts as prompts_lib
from gemma_jax.sampling import sampler as sampler_lib
from gemma_jax.sampling import weights as weights_lib
from gemma_jax.sampling.next_token import SamplingConfig, Settings
from gemma_jax.sampling.sampler import Sampler
from gemma_jax.training import sharding
from tests import hf_toy, logits_toy, toy

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]

# Longer and shorter than the window of 7, and far apart in length.
PROMPTS = [[2, 50, 51, 52, 60], [2], [2, *range(97, 116)]]
NEW = sampler_lib.DECODE_TOKENS + 7  # two calls of `decode`
GREEDY = SamplingConfig(max_new_tokens=NEW)
WARM = SamplingConfig(max_new_tokens=NEW, temperature=0.2, top_k=60, top_p=0.95)
ORACLE = Path(__file__).parents[1] / 'golden' / 'oracle_gemma3_270m.json'


@pytest.fixture
def as_users_compile():
  """With all of XLA's passes, where `quick_compile` would matter."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@functools.cache
def base(name='tiny3'):
  """Random weights; a small embedding, so that the layers have a say."""
  params = toy.base(variants.get(name))
  params['embedder']['input_embedding'] *= 0.05
  return {'params': params}


@functools.cache
def ready(name='tiny3', weights='auto'):
  """The same for decoding."""
  return weights_lib.prepare(base(name), weights)


@functools.cache
def sampler(name='tiny3'):
  """Compiled once for all tests; rows end at max_new_tokens only."""
  return Sampler(variants.get(name), stop_ids=())


@functools.cache
def generated(sampling, name='tiny3'):
  """All prompts in one batch."""
  return sampler(name).generate(ready(name), PROMPTS, sampling).tokens


@functools.cache
def make_adapters():
  """The base, one of rank 2 on q and v, one of rank 3 on all projections."""
  config = variants.get('tiny3')
  trained = {'final_norm': {'scale': np.full(34, 0.7, np.float32)}}
  loras = [
    Lora({}, np.float32(1), LoraConfig()),
    toy.lora(config, LoraConfig(rank=2), trained_base=trained),
    toy.lora(config, LoraConfig(rank=3, targets='all')),
  ]
  return dict(zip(('base', 'A', 'B'), align.align(loras), strict=True))


def traces_during(function):
  """How many functions JAX traced meanwhile."""
  events = []

  def listen(event, duration, **_):
    del duration
    events.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    function()
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  return sum('jaxpr_trace' in event for event in events)


@pytest.mark.parametrize('name', [name for name in variants.VARIANTS if name.startswith('tiny')])
def test_cached_decoding_equals_full_forward_passes(name):
  model = Transformer(variants.get(name), remat='none')
  variables = base(name)

  @jax.jit
  def next_token(tokens, length, settings, step):
    hidden = model.apply(variables, tokens)
    last = jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1, axis=1)
    logits = model.apply(variables, last, method='logits')
    return next_token_lib.choose_tokens(logits[0], settings, step)[0]

  for sampling in (GREEDY, WARM):
    for row, prompt in enumerate(PROMPTS):
      settings = Settings.of(sampling, [row])
      tokens = np.zeros((1, len(PROMPTS[2]) + NEW), np.int32)
      tokens[0, : len(prompt)] = prompt
      for step in range(NEW):
        length = np.int32(len(prompt) + step)
        tokens[0, length] = next_token(tokens, length, settings, step)
      expected = tokens[0, len(prompt) :][:NEW].tolist()
      assert generated(sampling, name)[row] == expected
      assert sampling is GREEDY or len(set(expected)) > 20


@pytest.mark.parametrize('sampling', [GREEDY, WARM], ids=['greedy', 'warm'])
def test_a_penalty_is_for_the_prompt_and_what_was_said(sampling):
  """Two samples of each prompt against forward passes over all there is, penalized by loops."""
  model = Transformer(variants.get('tiny3'), remat='none')
  variables, penalty, new = base(), np.float32(1.4), 19
  choose = jax.jit(next_token_lib.choose_tokens)

  @jax.jit
  def logits_of(tokens):
    hidden = model.apply(variables, tokens)
    return model.apply(variables, hidden, method='logits')[0]

  sampling = dataclasses.replace(sampling, max_new_tokens=new)
  with_penalty = dataclasses.replace(sampling, repetition_penalty=float(penalty))
  got = sampler().generate(ready(), PROMPTS, with_penalty, num_samples=2).tokens
  for row, answer in enumerate(got):
    tokens, start = np.zeros((1, len(PROMPTS[2]) + new), np.int32), len(PROMPTS[row // 2])
    tokens[0, :start] = PROMPTS[row // 2]
    for step in range(new):
      length = start + step
      logits = np.array(logits_of(tokens)[length - 1])
      for token in set(tokens[0, :length].tolist()):
        is_positive = logits[token] > 0
        logits[token] = logits[token] / penalty if is_positive else logits[token] * penalty
      settings = Settings.of(sampling, [row])
      tokens[0, length] = choose(logits[None], settings, np.int32(step))[0]
    assert answer == tokens[0, start : start + new].tolist()
  without = sampler().generate(ready(), PROMPTS, sampling, num_samples=2).tokens
  assert all(a != b for a, b in zip(got, without, strict=True))


def test_tokens_seen_are_kept_only_for_a_penalty():
  tokens, segment_ids = prompts_lib.pad(PROMPTS)
  texts = []
  for sampling in (WARM, dataclasses.replace(WARM, repetition_penalty=1.4)):
    settings = Settings.of(sampling, range(3))
    prefill = sampler().prefill.lower(ready(), tokens, segment_ids, settings, cache_length=48)
    assert (prefill.out_info.seen is None) == (sampling is WARM)
    decode = sampler().decode.lower(ready(), prefill.out_info, settings, np.int32(1))
    texts.append(prefill.as_text() + decode.as_text())
  assert ['scatter' in text for text in texts] == [False, True]


@pytest.mark.parametrize('family', hf_toy.FAMILIES)
def test_greedy_tokens_equal_transformers(family):
  folder = hf_toy.PARITY / family
  golden = load_file(folder / 'ref_base.safetensors')['base.greedy'][0].tolist()
  prompt, expected = golden[:10], golden[10:]
  found = open_base.open_base(str(folder))
  made = Sampler(found.config, stop_ids=()).generate(
    weights_lib.prepare({'params': found.load_params('float32')}),
    [prompt],
    SamplingConfig(max_new_tokens=len(expected)),
  )
  assert made.tokens == [expected]


@pytest.mark.parametrize('sampling', [GREEDY, WARM], ids=['greedy', 'warm'])
@pytest.mark.parametrize('row', [0, 1])
def test_a_row_does_not_depend_on_its_neighbours(row, sampling):
  alone = sampler().generate(ready(), [PROMPTS[row]], sampling, row_ids=[row])
  assert alone.tokens == [generated(sampling)[row]]


def test_a_prompt_read_in_parts_continues_alike(monkeypatch):
  monkeypatch.setattr(prompts_lib, 'PREFILL_TOKENS', 16)
  assert prompts_lib.pad(PROMPTS)[0].shape == (3, 32)
  parts = Sampler(variants.get('tiny3'), stop_ids=())
  assert parts.generate(ready(), PROMPTS, WARM).tokens == generated(WARM)


def test_the_seed_decides():
  again = sampler().generate(ready(), PROMPTS, WARM).tokens
  assert again == generated(WARM)
  assert again != generated(dataclasses.replace(WARM, seed=1))
  # Equal prompts in a batch are drawn apart.
  thrice = sampler().generate(ready(), [PROMPTS[2]] * 3, WARM).tokens
  assert thrice[0] != thrice[1] != thrice[2] != thrice[0]


def test_top_k_of_one_is_greedy():
  assert generated(dataclasses.replace(WARM, top_k=1)) == generated(GREEDY)


def test_samples_of_a_prompt_are_drawn_as_rows_of_a_batch():
  twice = [prompt for prompt in PROMPTS for _ in range(2)]
  want = sampler().generate(ready(), twice, WARM).tokens
  got = sampler().generate(ready(), PROMPTS, WARM, num_samples=2).tokens
  assert got == want
  assert got[0] != got[1]


def test_streaming_gives_the_same_tokens():
  calls = []
  streamed = sampler().generate(
    ready(), PROMPTS, WARM, on_tokens=lambda row, ids: calls.append((row, ids))
  )
  assert streamed.tokens == generated(WARM)
  for row, expected in enumerate(streamed.tokens):
    parts = [ids for r, ids in calls if r == row]
    assert list(itertools.chain(*parts)) == expected
    assert {len(ids) for ids in parts} == {1}
  # All rows get a token before one of them gets the next.
  assert [row for row, _ in calls] == [0, 1, 2] * NEW


def test_a_row_ends_with_a_stop_token():
  full = generated(WARM)
  row = full[0]  # it ends with what it says for the first time after a while
  stop = next(t for i, t in enumerate(row[4:], 4) if t not in row[:i])
  others = Sampler(variants.get('tiny3'), stop_ids=(stop,))
  calls = []
  made = others.generate(ready(), PROMPTS, WARM, lambda row, ids: calls.append((row, ids)))
  for i, (new, all_of_it) in enumerate(zip(made.tokens, full, strict=True)):
    ends = all_of_it.index(stop) + 1 if stop in all_of_it else NEW
    assert new == all_of_it[:ends]
    assert list(itertools.chain(*(t for r, t in calls if r == i))) == new
  assert 4 < len(made.tokens[0]) < max(map(len, made.tokens))
  assert made.decoded_tokens == sum(map(len, made.tokens)) - len(PROMPTS)

  # Three rows that draw alike end together, and then the loop does.
  tokens, segment_ids = prompts_lib.pad([PROMPTS[0], PROMPTS[0], PROMPTS[2]])
  tokens[2], segment_ids[2] = tokens[0], segment_ids[0]
  settings = Settings.of(WARM, [0, 0, 0])
  state = others.prefill(ready(), tokens, segment_ids, settings, cache_length=112)
  state, _, count = others.decode(ready(), state, settings, np.int32(sampler_lib.DECODE_TOKENS))
  assert count + 1 == len(made.tokens[0]) == state.step
  assert state.done.all()


def test_logits_that_are_not_finite_stop_it():
  broken = jax.tree.map(lambda x: x, ready())
  scale = broken['params']['final_norm']['scale']
  broken['params']['final_norm']['scale'] = scale.at[3].set(jnp.nan)
  made = toy.lora(variants.get('tiny3'), LoraConfig(rank=2))
  lora = made.variables(base()['params'])['lora']
  nothing = jax.tree.map(jnp.zeros_like, lora)
  # A base among adapters has one of zeros, and is not to be blamed for theirs.
  for with_, blamed in (
    ({'lora': lora}, 'the adapter diverged'),
    ({'lora': nothing}, 'the base itself overflows'),
    ({}, 'the base itself overflows'),
  ):
    with pytest.raises(FloatingPointError, match=f'prompt 0: got logits .*NaN.*{blamed}'):
      sampler().generate({**broken, **with_}, PROMPTS, WARM)


def test_stop_ids_come_from_the_tokenizer():
  config = variants.get('tiny3')
  proto = logits_toy.tokenizer_proto()
  with_turns = logits_toy.tokenizer_lib.SentencePieceTokenizer(proto)
  assert Sampler(config, with_turns).stop_ids == {1, 5}
  assert with_turns.control_id('<end_of_turn>') == 5
  assert Sampler(config, ByteTokenizer()).stop_ids == {1}
  assert Sampler(config).stop_ids == {1}


def test_stop_ids_of_the_base_come_with_them(caplog):
  source = open_base.open_base('random:tiny3')
  tokenizer = source.tokenizer()
  own = dataclasses.replace(source, read_stop_ids=lambda: (7, 259))
  assert Sampler.of_base(own, tokenizer).stop_ids == {1, 7, 259}
  assert not caplog.text
  own = dataclasses.replace(source, read_stop_ids=lambda: (7, -1, 260))
  assert Sampler.of_base(own, tokenizer).stop_ids == {1, 7}
  assert 'Stop tokens -1, 260 of random:tiny3 are not among its 260 tokens' in caplog.text


def test_rows_beyond_the_tokenizer_are_never_chosen():
  pieces = ByteTokenizer.vocab_size
  config = variants.get('tiny3')
  params = dict(base()['params'])
  params['embedder'] = jax.tree.map(lambda x: x.at[pieces:].multiply(30.0), params['embedder'])
  variables = weights_lib.prepare({'params': params})
  masked = Sampler(config, ByteTokenizer(), stop_ids=())
  for sampling in (GREEDY, dataclasses.replace(WARM, top_k=0)):
    free, kept = (s.generate(variables, PROMPTS, sampling).tokens for s in (sampler(), masked))
    assert max(map(max, free)) >= pieces > max(map(max, kept))


def test_adapters_are_switched_without_a_trace():
  made = make_adapters()
  variables = weights_lib.for_adapters(base()['params'], made)
  other_prompts = [[2, 7, 9], [2, 11], [2, *range(60, 82)]]

  def generate(name, prompts=PROMPTS, sampling=GREEDY):
    return sampler().generate(variables[name], prompts, sampling).tokens

  for name in ('base', 'A'):
    generate(name)
  tokens = {}

  def switch():
    tokens.update({name: generate(name) for name in made})
    # Nor does it take one to read prompts of similar length, or to draw.
    tokens['other'] = generate('B', other_prompts, WARM)

  assert traces_during(switch) == 0
  assert tokens['base'] == generated(GREEDY)
  assert len({str(t) for t in tokens.values()}) == 4


def test_an_adapter_equals_its_merged_base():
  adapter = make_adapters()['B']
  params = base()['params']
  merged = {'params': adapter.merge(params)}
  got, want = (
    sampler().generate(weights_lib.prepare(variables), PROMPTS, WARM).tokens
    for variables in (adapter.variables(params), merged)
  )
  assert got == want != generated(WARM)


def test_the_adapter_of_zeros_changes_no_bit():
  tokens, segment_ids = prompts_lib.pad(PROMPTS)
  settings = Settings.of(WARM, range(len(PROMPTS)))
  states = []
  zeros = {**ready(), 'lora': make_adapters()['base'].factors}
  for variables in (ready(), zeros):
    state = sampler().prefill(variables, tokens, segment_ids, settings, cache_length=112)
    state, _, _ = sampler().decode(variables, state, settings, np.int32(sampler_lib.DECODE_TOKENS))
    states.append(state)
  for before, after in zip(*map(jax.tree.leaves, states), strict=True):
    np.testing.assert_array_equal(before, after)
  assert np.abs(states[0].cache.v).max() > 0.1


def test_variables_of_training_decode_alike():
  got = sampler().generate(base(), PROMPTS, WARM).tokens
  assert got == generated(WARM)


def test_bfloat16_weights_decode_as_their_values_do():
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ready())
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
  got, want = (sampler().generate(v, PROMPTS, WARM).tokens for v in (narrow, wide))
  assert got == want != generated(WARM)


@pytest.mark.usefixtures('as_users_compile')
@pytest.mark.parametrize('rows', [1, 3])
@pytest.mark.parametrize('weights', ['float32', 'bfloat16', 'int8'])
def test_no_weight_is_copied_or_widened_for_a_token(weights, rows):
  config = dataclasses.replace(
    variants.get('tiny3'), vocab_size=100_003, hidden_dim=4099, num_layers=7, layer_is_local=None
  )
  params = layout.abstract_params(config, 'float32' if weights == 'float32' else 'bfloat16')
  variables = jax.eval_shape(
    lambda params: weights_lib.prepare({'params': params}, weights), params
  )
  made = Sampler(config)
  settings = Settings.of(WARM, range(rows))
  prompt = [jax.ShapeDtypeStruct((rows, 16), jnp.int32)] * 2
  prefill = made.prefill.lower(variables, *prompt, settings, cache_length=32)
  decode = made.decode.lower(variables, prefill.out_info, settings, np.int32(1))
  # Prefill has one layer's weights at a time; decode no more than its logits,
  # a row of them for the choice of the token thrice over.
  temporary_bytes = [
    lowered.compile().memory_analysis().temp_size_in_bytes for lowered in (prefill, decode)
  ]
  assert temporary_bytes[0] < 0.5 * pytree.num_bytes(params)
  assert temporary_bytes[1] < 6 * 4 * rows * config.vocab_size


def test_unrolled_layers_decode_alike():
  params = layout.unstack_layers(base()['params'])
  unrolled = Sampler(variants.get('tiny3'), scan_layers=False, stop_ids=())
  variables = weights_lib.prepare({'params': params})
  made = unrolled.generate(variables, PROMPTS, WARM)
  assert made.tokens == generated(WARM)


def test_sharded_weights_decode_alike():
  config = toy.DIVISIBLE
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  variables = {'params': toy.base(config)}
  placed = jax.device_put(variables, sharding.tree_shardings(variables, config, mesh))
  prompts = [[2, 50, 51, 52], [2], [2, *range(20, 43)]]
  made = Sampler(config, stop_ids=())
  got, want = (made.generate(v, prompts, WARM).tokens for v in (placed, variables))
  assert got == want


def test_the_longest_prompt_and_the_shortest_continuation():
  made = sampler().generate(ready(), [[2] * 511], SamplingConfig(max_new_tokens=1))
  assert [len(row) for row in made.tokens] == [1]
  assert made.tokens_per_second is None


@pytest.mark.real
@pytest.mark.usefixtures('as_users_compile')
def test_real_greedy_continuations_equal_transformers():
  found = open_base.open_base(open_base.REAL_270M)
  made = Sampler(found.config, found.tokenizer(), stop_ids=())
  params = found.load_params('float32')
  variables = weights_lib.prepare({'params': params})
  golden = json.loads(ORACLE.read_text('utf-8'))['greedy']
  prompts = [case['prompt_ids'] for case in golden]
  expected = [
    case['output_ids'][len(prompt) :] for case, prompt in zip(golden, prompts, strict=True)
  ]
  sampling = SamplingConfig(max_new_tokens=len(expected[0]))
  for group in (range(len(golden)), [0], [3]):
    chosen = [prompts[i] for i in group]
    out = made.generate(variables, chosen, sampling)
    assert out.tokens == [expected[i] for i in group]
