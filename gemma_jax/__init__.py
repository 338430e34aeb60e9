"""LoRA fine-tuning of Gemma in JAX and Flax.

    import gemma_jax as gj

    base = gj.load('gemma3_270m')
    lora = gj.Lora.init(base, rank=8, targets='all')
    data = gj.Dataset('sample:seoul_travel', base, seq_len=256)
    trainer = gj.Trainer(base, lora, data, learning_rate=1e-3, batch_size=4)
    for metrics in trainer.run(steps=20):
      print(metrics.step, metrics.loss)
    print(gj.generate(base, 'What should I do on a trip to Seoul?', lora=trainer.lora))
    print(gj.evaluate(base, data.heldout, lora=trainer.lora).nll_per_token)
    trainer.lora.save('my_adapter')

These names are looked up when they are first used, so that importing the
package costs no time; JAX is imported with the first of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from gemma_jax.config.lora import LoraConfig as LoraConfig
  from gemma_jax.config.train import MeshConfig as MeshConfig
  from gemma_jax.config.train import OptimizerConfig as OptimizerConfig
  from gemma_jax.data.dataset import Dataset as Dataset
  from gemma_jax.export.convert import convert as convert
  from gemma_jax.lora.lora import Lora as Lora
  from gemma_jax.runs.base import Base as Base
  from gemma_jax.runs.base import load as load
  from gemma_jax.runs.evaluate_adapters import evaluate as evaluate
  from gemma_jax.runs.generate import generate as generate
  from gemma_jax.runs.trainer import Trainer as Trainer
  from gemma_jax.training.step import token_loss as token_loss

__version__ = '0.1.0'

# Where each name is defined. None of them is the name of a folder: importing a
# submodule sets its name on the package.
_DOORS = {
  'Base': 'gemma_jax.runs.base',
  'Dataset': 'gemma_jax.data.dataset',
  'Lora': 'gemma_jax.lora.lora',
  'LoraConfig': 'gemma_jax.config.lora',
  'MeshConfig': 'gemma_jax.config.train',
  'OptimizerConfig': 'gemma_jax.config.train',
  'Trainer': 'gemma_jax.runs.trainer',
  'convert': 'gemma_jax.export.convert',
  'evaluate': 'gemma_jax.runs.evaluate_adapters',
  'generate': 'gemma_jax.runs.generate',
  'load': 'gemma_jax.runs.base',
  'token_loss': 'gemma_jax.training.step',
}

__all__ = ['__version__', *_DOORS]  # pyright: ignore[reportUnsupportedDunderAll]: imported above


def __getattr__(name: str) -> Any:
  if name not in _DOORS:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  # Kept, so that it is looked up once, and is there for those who read `__dict__`.
  value = globals()[name] = getattr(importlib.import_module(_DOORS[name]), name)
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_DOORS})
