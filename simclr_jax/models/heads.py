"""What sits on the encoder: the projection heads of SimCLR and MoCo."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax.models.layers import Dense
from simclr_jax.models.norm import BatchNorm

MODES = ('none', 'linear', 'mlp')


class ProjectionHead(nn.Module):
  """The head g(h): `layers` dense layers; all but the last keep the width of h and end in a ReLU.

  With `norm`, SimCLR's: no biases, batch normalisation after every layer, without beta after the
  last. v1 has 2 layers, v2 has 3. Source: Chen et al. 2020a, 2020b.

  Without, MoCo's: biases and no normalisation, initialised as torch.nn.Linear is. v1 is 'linear',
  v2 is an 'mlp' with 2 layers. Source: He et al. 2020; Chen et al. 2020c.

  Attributes:
    mode: 'mlp'; 'linear', which is one layer; 'none', the identity.
    layers: number of dense layers of the 'mlp', 1 to 4.
    dim: size of the output z.
    norm: SimCLR's head or MoCo's.
    groups, layout: of the batch normalisation.
    dtype: of the matrix products.
    keep: how many of the layers there are, from the first; None: all.
  """

  mode: str = 'mlp'
  layers: int = 2
  dim: int = 128
  norm: bool = True
  groups: int = 1
  layout: str = 'contiguous'
  dtype: Any = jnp.float32
  keep: int | None = None

  @nn.compact
  def __call__(self, h: jax.Array, train: bool) -> list[jax.Array]:
    """`h` `[n, d]` -> `[h, hidden 1, ..., z]`, hidden layers after their ReLU, z `[n, dim]`."""
    if self.mode not in MODES:
      raise ValueError(f'head {self.mode!r} is not one of {MODES}')
    width = h.shape[-1]

    def torch_linear(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, -(width**-0.5), width**-0.5)

    layers = count(self.mode, self.layers)
    hiddens = [h]
    for i in range(1, 1 + (layers if self.keep is None else self.keep)):
      last = i == layers
      x = Dense(
        self.dim if last else width,
        use_bias=not self.norm,
        kernel_init=nn.initializers.normal(0.01) if self.norm else torch_linear,
        bias_init=torch_linear,
        dtype=self.dtype,
        name=f'dense{i}',
      )(hiddens[-1])
      if self.norm:
        norm = BatchNorm(
          self.groups, self.layout, use_bias=not last, dtype=self.dtype, name=f'bn{i}'
        )
        x = norm(x, train)
      hiddens.append(x if last else nn.relu(x))
    return hiddens


def count(mode: str, layers: int) -> int:
  """The number of dense layers."""
  return {'none': 0, 'linear': 1, 'mlp': layers}[mode]


def from_config(config: Any, dtype: Any = jnp.float32, keep: int | None = None) -> ProjectionHead:
  """The head of a recipe's `model` part."""
  return ProjectionHead(
    mode=config['head'],
    layers=config['head_layers'],
    dim=config['head_dim'],
    norm=config['head_norm'],
    groups=config['bn_groups'],
    layout=config['bn_layout'],
    keep=keep,
    dtype=dtype,
  )
