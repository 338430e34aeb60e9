"""A Gemma architecture as a frozen value; no flag changes it."""

import dataclasses

from gemma_jax.config.checks import require


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Gemma architecture. Letters as in `gemma_jax.model`.

  Attributes:
    vocab_size: V, rows of the embedding (may exceed the tokenizer's pieces).
    embed_dim: D.
    hidden_dim: F, width of each of gate and up.
    num_layers: L.
    num_heads: N, query heads.
    num_kv_heads: K, key and value heads; divides N.
    head_dim: H.
    query_scale: factor on the queries; None means H ** -0.5.
    layer_is_local: for each layer, whether it attends within `window_size`
      only; None means that all layers are global.
    window_size: number of positions a local layer sees, itself included.
    rope_theta: RoPE base of global layers.
    rope_local_theta: RoPE base of local layers; None means `rope_theta`.
    rope_scale: positions of global layers are divided by it (linear scaling).
    use_qk_norm: RMSNorm on each query and key head before RoPE (Gemma 3).
    use_post_norms: RMSNorm after attention and after the MLP (Gemma 2, 3).
    attention_softcap: cap * tanh(score / cap) on attention scores, or None.
    final_softcap: the same on the output logits, or None.
    norm_eps: epsilon of every RMSNorm.
    max_positions: longest sequence the model was made for, in tokens.
  """

  vocab_size: int
  embed_dim: int
  hidden_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  query_scale: float | None = None
  layer_is_local: tuple[bool, ...] | None = None
  window_size: int | None = None
  rope_theta: float = 10_000.0
  rope_local_theta: float | None = None
  rope_scale: float = 1.0
  use_qk_norm: bool = False
  use_post_norms: bool = False
  attention_softcap: float | None = None
  final_softcap: float | None = None
  norm_eps: float = 1e-6
  max_positions: int = 8192

  def __post_init__(self):
    for field in (
      'vocab_size',
      'embed_dim',
      'hidden_dim',
      'num_layers',
      'num_heads',
      'num_kv_heads',
      'head_dim',
      'max_positions',
    ):
      value = getattr(self, field)
      require(isinstance(value, int) and value > 0, field, value, 'an integer > 0')
    require(
      self.num_heads % self.num_kv_heads == 0,
      'num_kv_heads',
      self.num_kv_heads,
      f'a divisor of num_heads={self.num_heads}',
    )
    require(self.head_dim % 2 == 0, 'head_dim', self.head_dim, 'an even number')
    if self.layer_is_local is not None:
      require(
        len(self.layer_is_local) == self.num_layers,
        'layer_is_local',
        len(self.layer_is_local),
        f'one flag for each of {self.num_layers} layers',
      )
      if any(self.layer_is_local):
        require(
          isinstance(self.window_size, int) and self.window_size > 0,
          'window_size',
          self.window_size,
          'an integer > 0, since some layers are local',
        )
