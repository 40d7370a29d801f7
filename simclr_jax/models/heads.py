"""What sits on the encoder: SimCLR's projection head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax.models.norm import BatchNorm

MODES = ('none', 'linear', 'mlp')


class ProjectionHead(nn.Module):
  """g(h) of SimCLR: `layers` dense layers, each with batch normalisation and without a bias.

  All but the last keep the width of h and end in a ReLU; the last one maps to `dim` and its batch
  normalisation has no beta. SimCLR v1 has 2 layers, v2 has 3.

  Attributes:
    mode: 'mlp'; 'linear', which is one layer; 'none', the identity.
    layers: number of dense layers of the 'mlp', 1 to 4.
    dim: size of the output z.
    groups: groups of the batch normalisation.
    dtype: of the matrix products.
  """

  mode: str = 'mlp'
  layers: int = 2
  dim: int = 128
  groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h: jax.Array, train: bool) -> list[jax.Array]:
    """`h` `[n, d]` -> `[h, hidden 1, ..., z]`, hidden layers after their ReLU, z `[n, dim]`."""
    if self.mode not in MODES:
      raise ValueError(f'head {self.mode!r} is not one of {MODES}')
    layers = {'none': 0, 'linear': 1, 'mlp': self.layers}[self.mode]
    hiddens = [h]
    for i in range(1, layers + 1):
      last = i == layers
      x = nn.Dense(
        self.dim if last else h.shape[-1],
        use_bias=False,
        kernel_init=nn.initializers.normal(0.01),
        dtype=self.dtype,
        name=f'dense{i}',
      )(hiddens[-1])
      x = BatchNorm(self.groups, use_bias=not last, dtype=self.dtype, name=f'bn{i}')(x, train)
      hiddens.append(x if last else nn.relu(x))
    return hiddens
