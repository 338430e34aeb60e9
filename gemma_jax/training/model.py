"""The transformer as a loss sees it: variables and a batch in, losses out.

A loss calls `token_losses`, which knows the soft cap, which rows of the
embedding are tokens, and how positions and vocabulary lie on the mesh; or
`apply` and `hidden`, to make something else of the hidden states.
"""

import dataclasses
from typing import Any

import jax

from gemma_jax.model.transformer import Transformer
from gemma_jax.training import losses

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Model:
  """A transformer and its tokens.

  Attributes:
    transformer: dtype, attention and shardings chosen.
    num_pieces: the tokenizer's pieces; later rows of the embedding are masked.
      None: all rows are tokens.
  """

  transformer: Transformer
  num_pieces: int | None = None

  @property
  def num_tokens(self) -> int:
    """Rows of the embedding that are tokens."""
    return self.num_pieces or self.transformer.config.vocab_size

  def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """`Transformer.apply`: e.g. tokens [B, T] → hidden states [B, T, D]."""
    return self.transformer.apply(variables, *args, **kwargs)

  def hidden(self, variables: Any, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
    """Hidden states [B, T, D] of a batch, after the final norm.

    Args:
      variables: {'params'} or {'params', 'lora'}, from `Lora.variables`.
      batch: `tokens`, int32 [B, T]; and, where rows are padded or packed,
        `segment_ids` and `positions`, see `Transformer`.
      dropout_key: switches the adapter's dropout on, if it has one.

    Raises:
      ValueError: the batch lacks tokens.
    """
    _check(batch, 'tokens')
    has_dropout = dropout_key is not None and self.transformer.dropout > 0
    return self.apply(
      variables,
      batch['tokens'],
      batch.get('segment_ids'),
      batch.get('positions'),
      rngs={'dropout': dropout_key} if has_dropout else None,
    )

  def logits(self, variables: Any, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
    """Logits over the tokens, float32 [B, T, num_tokens], with the model's soft cap.

    For losses that need whole distributions; `token_losses` needs far less memory.

    Args:
      variables: as in `hidden`.
      batch: as in `hidden`.
      dropout_key: as in `hidden`.
    """
    hidden = self.hidden(variables, batch, dropout_key)
    return self.apply(variables, hidden, method='logits')[..., : self.num_tokens]

  def token_losses(
    self, variables: Any, batch: Batch, dropout_key: jax.Array | None = None
  ) -> jax.Array:
    """Weight times next-token loss of every position: float32 [B, T], nats.

    Differentiable once, in reverse, in any part of the variables; a transformer
    with `plain_gradients` allows the rest (`jax.jvp`, second derivatives). Weights
    count as constants. Minus the sum over a row is the log-likelihood of its
    targets, where weights are 0 and 1.

    Args:
      variables: as in `hidden`.
      batch: as in `hidden`, with `targets` int32 [B, T] and `weights` float32
        [B, T]; positions of weight 0 are never computed.
      dropout_key: as in `hidden`.
    """
    _check(batch, 'tokens', 'targets', 'weights')
    return losses.token_cross_entropy(
      self.hidden(variables, batch, dropout_key),
      variables['params']['embedder']['input_embedding'],
      batch['targets'],
      batch['weights'],
      softcap=self.transformer.config.final_softcap,
      num_pieces=self.num_pieces,
      sharding=self.transformer.hidden_sharding,
      plain_gradients=self.transformer.plain_gradients,
    )


def _check(batch: Batch, *names: str) -> None:
  missing = [name for name in names if name not in batch]
  if missing:
    raise ValueError(
      f'batch: got {sorted(batch)}, expected also {missing}; data.examples.make_batch makes '
      'batches of records, and a loss_fn of your own takes any others.'
    )
