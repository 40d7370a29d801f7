"""ResNets in the two dialects that published contrastive weights come in."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax.models.norm import BatchNorm

# depth -> (blocks in each group, bottleneck blocks?). 8 is the shallowest network of He et al.'s
# CIFAR family, 6n + 2 layers in three groups: for laptops and tests.
DEPTHS = {
  8: ((1, 1, 1), False),
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
  200: ((3, 24, 36, 3), True),
}
# stem -> (kernel, stride, max-pool?)
STEMS = {'imagenet': (7, 2, True), 'strided': (3, 2, False), 'cifar': (3, 1, False)}
DIALECTS = ('simclr', 'torchvision')


class Block(nn.Module):
  """A residual block: two 3x3 convolutions, or the 1x1, 3x3, 1x1 bottleneck (v1.5: stride on 3x3).

  Attributes:
    filters: channels of the 3x3 convolutions; a bottleneck puts out four times as many.
    stride: of the block.
    bottleneck: which of the two kinds.
    project: whether the shortcut is a 1x1 convolution and not the identity.
    zero_init: start the last gamma at 0, so that the block starts as its shortcut.
    conv, norm: layer constructors.
  """

  filters: int
  stride: int
  bottleneck: bool
  project: bool
  zero_init: bool
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    f, s = self.filters, self.stride
    kernels = [(f, 1, 1), (f, 3, s), (4 * f, 1, 1)] if self.bottleneck else [(f, 3, s), (f, 3, 1)]
    shortcut = x
    if self.project:
      shortcut = self.conv(kernels[-1][0], 1, s, name='proj_conv')(x)
      shortcut = self.norm(name='proj_bn')(shortcut, train)
    for i, (features, size, stride) in enumerate(kernels, 1):
      x = self.conv(features, size, stride, name=f'conv{i}')(x)
      last = i == len(kernels)
      init = nn.initializers.zeros if last and self.zero_init else nn.initializers.ones
      x = self.norm(scale_init=init, name=f'bn{i}')(x, train)
      x = x if last else nn.relu(x)
    return nn.relu(x + shortcut)


class ResNet(nn.Module):
  """ResNet v1.5 without a classifier: images -> pooled features h.

  The two dialects differ in four places:

  =================  ================================  ====================================
  .                  'simclr'                          'torchvision'
  =================  ================================  ====================================
  3x3/2 max-pool     pads bottom and right ('SAME')    pads one pixel on every side
  projection         first block of every group        where the shape changes
  convolution init   fan-in, truncated normal, gain 1  fan-out, normal, gain sqrt 2
  last gamma         0                                 1
  =================  ================================  ====================================

  Attributes:
    depth: a key of `DEPTHS`.
    width_multiplier: factor on all channel counts.
    stem: 'imagenet' (7x7 stride 2, max-pool), 'cifar' (3x3 stride 1), or between them, for images
      of 64 pixels and for laptops, 'strided' (3x3 stride 2).
    dialect: 'simclr' or 'torchvision'.
    groups: groups of the batch normalisation.
    dtype: of the convolutions; parameters and statistics stay float32.

  Source: He et al. 2016; Chen et al. 2020 (SimCLR) for the first dialect.
  """

  depth: int = 50
  width_multiplier: float = 1.0
  stem: str = 'imagenet'
  dialect: str = 'simclr'
  groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`x` `[n, height, width, 3]` in [0, 1] -> h `[n, d]` float32, d = 512 or 2048 times width."""
    for name, value, allowed in (
      ('depth', self.depth, tuple(DEPTHS)),
      ('stem', self.stem, tuple(STEMS)),
      ('dialect', self.dialect, DIALECTS),
    ):
      if value not in allowed:
        raise ValueError(f'ResNet {name} {value!r} is not one of {allowed}')
    simclr = self.dialect == 'simclr'
    blocks, bottleneck = DEPTHS[self.depth]
    norm = partial(BatchNorm, groups=self.groups, dtype=self.dtype)
    init = nn.initializers.lecun_normal()
    if not simclr:
      init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')

    def conv(features: int, size: int, stride: int, name: str) -> nn.Module:
      pad = (size - 1) // 2
      return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=[(pad, size - 1 - pad)] * 2,
        use_bias=False,
        kernel_init=init,
        dtype=self.dtype,
        name=name,
      )

    width = int(64 * self.width_multiplier)
    size, stride, pool = STEMS[self.stem]
    x = conv(width, size, stride, name='stem_conv')(x.astype(self.dtype))
    x = nn.relu(norm(name='stem_bn')(x, train))
    if pool:
      x = nn.max_pool(x, (3, 3), (2, 2), 'SAME' if simclr else [(1, 1), (1, 1)])

    for group, count in enumerate(blocks):
      filters = width * 2**group
      for block in range(count):
        stride = 2 if group and not block else 1
        reshapes = stride > 1 or x.shape[-1] != filters * (4 if bottleneck else 1)
        x = Block(
          filters,
          stride,
          bottleneck,
          project=not block and (simclr or reshapes),
          zero_init=simclr,
          conv=conv,
          norm=norm,
          name=f'group{group + 1}_block{block + 1}',
        )(x, train)
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def compute_dtype(name: str) -> Any:
  """'float32', 'bfloat16', or 'auto': bfloat16 on accelerators and float32 on CPUs."""
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def from_config(config: Any, dtype: Any = jnp.float32) -> ResNet:
  """The network of a recipe's `model` part."""
  return ResNet(
    depth=config['depth'],
    width_multiplier=config['width_multiplier'],
    stem=config['stem'],
    dialect=config['dialect'],
    dtype=dtype,
  )
