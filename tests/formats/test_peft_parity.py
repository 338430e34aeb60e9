"""Adapters that we write, as PEFT itself applies them on transformers."""

import jax
import numpy as np
import pytest

from gemma_jax.config.train import LoraConfig
from gemma_jax.formats import open_base, peft
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.lora.lora import Lora
from tests import hf_toy, logits_toy, peft_toy, toy

torch = pytest.importorskip('torch')
peft_package = pytest.importorskip('peft')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(4, 512, (2, 13))


def write(folder, family, **kwargs):
  """Random factors; ranks differ by layer on q, as PEFT's patterns allow."""
  base = open_base.open_base(str(hf_toy.PARITY / family))
  config = LoraConfig(rank=3, alpha=6.0, ranks={'layer_0/attn/q': 2}, **kwargs)
  factors = jax.tree.map(lambda x: x * np.float32(0.1), peft_toy.make_lora(base.config, config))
  q = factors['layers']['attn']['q']
  q['lora_a'][0, ..., 2:] = q['lora_b'][0, 2:] = 0
  peft.write_adapter(folder, factors, config, family, trained_with=TrainedWith())
  return base, config, factors


def load(family, folder):
  base = transformers.AutoModelForCausalLM.from_pretrained(hf_toy.PARITY / family)
  return peft_package.PeftModel.from_pretrained(base, folder)


def torch_logits(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.numpy()


CASES = pytest.mark.parametrize(
  'options',
  [
    {'targets': 'qv'},
    {'targets': 'all', 'scale_rule': 'alpha_over_sqrt_r'},
    {'targets': 'attention', 'scale_rule': 'constant'},
    {'targets': 'qv', 'factorization': 'keras'},
    {'targets': 'all', 'factorization': 'keras', 'scale_rule': 'alpha_over_sqrt_r'},
    {'targets': 'all', 'dora': True},
    {'targets': 'qv', 'factorization': 'keras', 'dora': True},
  ],
  ids=lambda options: '-'.join(map(str, options.values())),
)


@CASES
@pytest.mark.parametrize('family', hf_toy.FAMILIES)
def test_updates_are_equal(family, options, tmp_path):
  base, config, factors = write(tmp_path / 'a', family, **options)
  model = load(family, tmp_path / 'a')
  got = {
    name.removeprefix('base_model.model.'): module.get_delta_weight('default').detach().numpy()
    for name, module in model.named_modules()
    if hasattr(module, 'get_delta_weight')
  }
  want = peft_toy.our_updates(factors, config, base.config)
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, 1e-5, 1e-5, err_msg=name)


@CASES
@pytest.mark.parametrize('family', hf_toy.FAMILIES)
def test_logits_are_equal_active_and_merged(family, options, tmp_path):
  base, config, factors = write(tmp_path / 'a', family, **options)
  params = base.load_params()
  lora = Lora(factors, np.float32(config.scale), config)
  want = logits_toy.logits(base.config, params, TOKENS, lora)
  plain = logits_toy.logits(base.config, params, TOKENS)
  assert np.abs(want - plain).max() > 0.01
  model = load(family, tmp_path / 'a')
  toy.assert_close(torch_logits(model), want, 1e-4, 'active')
  merged = model.merge_and_unload()
  toy.assert_close(torch_logits(merged), want, 1e-4, 'merged')


@pytest.mark.parametrize('dora', [False, True])
def test_adapter_on_some_layers_there_and_back(dora, tmp_path):
  """As PEFT makes it with layers_to_transform, and as we write it again."""
  folder = hf_toy.PARITY / 'gemma3'
  model = peft_package.get_peft_model(
    transformers.AutoModelForCausalLM.from_pretrained(folder),
    peft_package.LoraConfig(
      r=3,
      lora_alpha=6,
      target_modules=['q_proj', 'down_proj'],
      layers_to_transform=[0, 2],
      layers_pattern='layers',
      use_dora=dora,
    ),
  )
  torch.manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      if '.lora_B.' in name:
        x.normal_(std=0.1)
      elif 'lora_magnitude' in name:
        x *= 1.3
  model.save_pretrained(tmp_path / 'a')
  want = torch_logits(model)
  base = open_base.open_base(str(folder))
  params = base.load_params()
  config, factors = peft.read_adapter(tmp_path / 'a', base.config)
  assert not factors['layers']['attn']['q']['lora_a'][1].any()
  lora = Lora(factors, np.float32(config.scale), config)
  got = logits_toy.logits(base.config, params, TOKENS, lora)
  toy.assert_close(got, want, 1e-4, 'ours')
  peft.write_adapter(tmp_path / 'b', factors, config, str(folder))
  again = load('gemma3', tmp_path / 'b')
  toy.assert_close(torch_logits(again), want, 1e-4, 'theirs')
  adapted = {
    name.split('layers.')[1].split('.')[0]
    for name, module in again.named_modules()
    if hasattr(module, 'get_delta_weight')
  }
  assert adapted == {'0', '2'}
