"""The Gemma transformer in flax.linen.

Axis letters, used in every shape comment and every einsum of the project:

    B  batch (rows)        N  query heads              L  layers
    T  query length        K  key and value heads      V  vocabulary rows
    S  key length          G  queries per kv head,     F  MLP hidden width
    D  embedding width        N / K                    R  LoRA rank
                           H  head width

Array arguments of functions carry their shape, `[B, T, D]`.
"""
