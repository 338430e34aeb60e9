"""The README's recipe "use your adapter elsewhere", on the real Gemma 3 270M.

An adapter is merged and written for transformers, and is loaded by PEFT on the
base that was written for transformers: all three continue prompts alike.
"""

import jax
import numpy as np
import pytest

from gemma_jax import adapters, convert, lora, sample
from gemma_jax.choice import SamplingConfig
from gemma_jax.config import LoraConfig
from gemma_jax.formats import peft, source

MODEL = 'gemma3_270m'
PROMPTS = (
  'Instruction:\nWhat should I do on a trip to Seoul?\n\nResponse:\n',
  '서울에서 가볼 만한 곳은',
)
NEW_TOKENS = 24


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """An adapter, and for transformers the base and the merged model."""
  pytest.importorskip('transformers')  # before the work, not after it
  path = tmp_path_factory.mktemp('recipe')
  base = source.open_base(MODEL)
  config = LoraConfig(rank=4, alpha=8.0, targets='all')
  factors = lora.init(jax.random.key(0), base.config, config)
  # As after some training: B is no longer zero.
  rng = np.random.default_rng(0)
  factors = jax.tree_util.tree_map_with_path(
    lambda p, x: (
      x
      if p[-1].key == 'lora_a'
      else 0.02 * rng.standard_normal(x.shape, np.float32)
    ),
    factors,
  )
  peft.write_adapter(path / 'adapter', factors, config, MODEL)
  convert.convert(MODEL, str(path / 'base'), 'hf', verify=False)
  convert.convert(MODEL, str(path / 'merged'), 'hf', str(path / 'adapter'))
  return path


@pytest.fixture(scope='module')
def ours(folder):
  """Greedy texts of the base and of the base with the adapter."""
  base = source.open_base(MODEL)
  tokenizer = base.tokenizer()
  prompts = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in PROMPTS]
  params = base.load_params()
  sampler = sample.Sampler(base.config, tokenizer)
  texts = []
  for adapter in adapters.load_adapters([str(folder / 'adapter')], base.config):
    made = sampler.generate(
      adapter.variables(params),
      prompts,
      SamplingConfig(max_new_tokens=NEW_TOKENS),
    )
    texts.append([tokenizer.decode(row) for row in made.tokens])
  plain, adapted = texts
  assert plain != adapted
  return adapted


def continue_prompts(model, path):
  """Greedy texts of a transformers model with the folder's own tokenizer."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  ours = source.open_base(MODEL).tokenizer()
  texts = []
  for prompt in PROMPTS:
    inputs = tokenizer(prompt, return_tensors='pt')
    ids = inputs['input_ids'][0].tolist()
    assert ids == [ours.bos_id, *ours.encode(prompt)]
    with torch.no_grad():
      made = model.generate(
        **inputs, do_sample=False, max_new_tokens=NEW_TOKENS
      )
    texts.append(
      tokenizer.decode(made[0][len(ids) :], skip_special_tokens=True)
    )
  return texts


@pytest.mark.real
@pytest.mark.parity
@pytest.mark.slow
def test_merged_model_in_transformers(folder, ours):
  transformers = pytest.importorskip('transformers')
  model = transformers.AutoModelForCausalLM.from_pretrained(folder / 'merged')
  assert continue_prompts(model, folder / 'merged') == ours


@pytest.mark.real
@pytest.mark.parity
@pytest.mark.slow
def test_peft_folder_on_the_base_in_transformers(folder, ours):
  transformers = pytest.importorskip('transformers')
  peft_package = pytest.importorskip('peft')
  base = transformers.AutoModelForCausalLM.from_pretrained(folder / 'base')
  model = peft_package.PeftModel.from_pretrained(base, folder / 'adapter')
  assert continue_prompts(model, folder / 'base') == ours
