"""ResNets in the two variants that published contrastive weights come in."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax.models.layers import Conv
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
VARIANTS = ('simclr', 'torchvision')
# name -> (mean, standard deviation) of red, green, blue, in [0, 1]; besides, there is 'none'.
NORMALIZE = {
  'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  'cifar10': ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


class SelectiveKernel(nn.Module):
  """Mixes two streams of channels, with weights that the average image decides.

  Attributes:
    features: channels between the streams and their weights.
    conv, norm: layer constructors.

  Source: Li et al. 2019, with two 3x3 streams as SimCLR v2 has it.
  """

  features: int
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`x` `[n, height, width, 2c]`, one stream after the other -> `[n, height, width, c]`."""
    streams = jnp.stack(jnp.split(x, 2, axis=-1))
    y = jnp.mean(streams.sum(axis=0), axis=(1, 2), keepdims=True)
    y = self.conv(self.features, 1, 1, name='reduce')(y)
    y = nn.relu(self.norm(name='bn')(y, train))
    y = self.conv(x.shape[-1], 1, 1, name='expand')(y)
    weights = nn.softmax(jnp.stack(jnp.split(y, 2, axis=-1)), axis=0)
    return jnp.sum(streams * weights, axis=0)


class SqueezeExcite(nn.Module):
  """Multiplies every channel by a number in (0, 1) that the average image decides.

  Attributes:
    features: channels between the average and the factors.
    conv: layer constructor.

  Source: Hu et al. 2018.
  """

  features: int
  conv: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`x` `[n, height, width, c]` -> the same shape."""
    y = jnp.mean(x, axis=(1, 2), keepdims=True)
    y = nn.relu(self.conv(self.features, 1, 1, name='reduce', use_bias=True)(y))
    y = self.conv(x.shape[-1], 1, 1, name='expand', use_bias=True)(y)
    return x * nn.sigmoid(y)


class Block(nn.Module):
  """A residual block: two 3x3 convolutions, or the 1x1, 3x3, 1x1 bottleneck (v1.5: stride on 3x3).

  Attributes:
    filters: channels of the 3x3 convolutions; a bottleneck puts out four times as many.
    stride: of the block.
    bottleneck: which of the two kinds.
    project: whether the shortcut is a 1x1 convolution and not the identity.
    zero_init: start the last gamma at 0, so that the block starts as its shortcut.
    sk_ratio, se_ratio: as in `ResNet`.
    conv, norm: layer constructors.
  """

  filters: int
  stride: int
  bottleneck: bool
  project: bool
  zero_init: bool
  sk_ratio: float
  se_ratio: float
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    f, s = self.filters, self.stride
    selective = self.bottleneck and self.sk_ratio > 0
    kernels = [(f, 3, s), (f, 3, 1)]
    if self.bottleneck:
      kernels = [(f, 1, 1), (2 * f if selective else f, 3, s), (4 * f, 1, 1)]

    shortcut = x
    if self.project:
      if self.sk_ratio > 0:  # ResNet-D; TensorFlow's padding counts where the stride is 2 alone
        shortcut = nn.avg_pool(x, (2, 2), (s, s), [(0, 1), (0, 1)], count_include_pad=s > 1)
        s = 1
      shortcut = self.conv(kernels[-1][0], 1, s, name='proj_conv')(shortcut)
      shortcut = self.norm(name='proj_bn')(shortcut, train)

    for i, (features, size, stride) in enumerate(kernels, 1):
      x = self.conv(features, size, stride, name=f'conv{i}')(x)
      last = i == len(kernels)
      init = nn.initializers.zeros if last and self.zero_init else nn.initializers.ones
      x = self.norm(scale_init=init, name=f'bn{i}')(x, train)
      x = x if last else nn.relu(x)
      if selective and i == 2:
        x = SelectiveKernel(max(int(f * self.sk_ratio), 32), self.conv, self.norm, name='sk')(
          x, train
        )
    if self.se_ratio > 0:
      x = SqueezeExcite(max(int(f * self.se_ratio), 1), self.conv, name='se')(x)
    return nn.relu(x + shortcut)


class ResNet(nn.Module):
  """ResNet v1.5 without a classifier: images -> pooled features h.

  The two variants differ in five places:

  =================  ================================  ====================================
  .                  'simclr'                          'torchvision'
  =================  ================================  ====================================
  3x3/2 max-pool     pads bottom and right ('SAME')    pads one pixel on every side
  projection         first block of every group        where the shape changes
  convolution init   fan-in, truncated normal, gain 1  fan-out, normal, gain sqrt 2
  last gamma         0                                 1
  running variance   biased                            unbiased
  =================  ================================  ====================================

  Attributes:
    depth: a key of `DEPTHS`.
    width_multiplier: factor on all channel counts.
    stem: 'imagenet' (7x7 stride 2, max-pool), 'cifar' (3x3 stride 1), or between them, for images
      of 64 pixels and for laptops, 'strided' (3x3 stride 2).
    variant: 'simclr' or 'torchvision'.
    groups, layout: of the batch normalisation.
    sk_ratio: above 0, the SK networks of SimCLR v2 (0.0625 there): selective kernels in bottleneck
      blocks, average pooling in projections and three 3x3 convolutions for the 7x7 (ResNet-D).
    se_ratio: above 0, a squeeze-and-excitation layer at the end of every block.
    normalize: 'none', or a key of `NORMALIZE`: what is subtracted from images and divides them.
    dtype: of the convolutions; parameters and statistics stay float32.
    rematerialize: whether a block's activations are computed again for its gradient, and not kept.
    frozen: the stem and the groups up to this one normalise with their running statistics and leave
      them alone in training, too; 0: the stem only, -1: nothing.

  Source: He et al. 2016; Chen et al. 2020a, 2020b (SimCLR v1, v2) for the first variant; He et al.
  2019 for ResNet-D.
  """

  depth: int = 50
  width_multiplier: float = 1.0
  stem: str = 'imagenet'
  variant: str = 'simclr'
  groups: int = 1
  layout: str = 'contiguous'
  sk_ratio: float = 0.0
  se_ratio: float = 0.0
  normalize: str = 'none'
  dtype: Any = jnp.float32
  frozen: int = -1
  rematerialize: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`x` `[n, height, width, 3]` in [0, 1] -> h `[n, d]` float32, d = 512 or 2048 times width."""
    for name, value, allowed in (
      ('depth', self.depth, tuple(DEPTHS)),
      ('stem', self.stem, tuple(STEMS)),
      ('variant', self.variant, VARIANTS),
      ('normalize', self.normalize, ('none', *NORMALIZE)),
    ):
      if value not in allowed:
        raise ValueError(f'ResNet {name} {value!r} is not one of {allowed}')
    simclr = self.variant == 'simclr'
    blocks, bottleneck = DEPTHS[self.depth]
    norm = partial(
      BatchNorm, groups=self.groups, layout=self.layout, unbiased=not simclr, dtype=self.dtype
    )
    init = nn.initializers.lecun_normal()
    if not simclr:
      init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')

    def conv(features: int, size: int, stride: int, name: str, use_bias: bool = False) -> nn.Module:
      return Conv(features, size, stride, use_bias, init, self.dtype, name=name)

    if self.normalize != 'none':
      mean, std = NORMALIZE[self.normalize]
      x = (x - jnp.array(mean)) / jnp.array(std)
    x = x.astype(self.dtype)

    width = int(64 * self.width_multiplier)
    size, stride, pool = STEMS[self.stem]
    train_stem = train and self.frozen < 0
    if self.sk_ratio > 0 and self.stem == 'imagenet':  # ResNet-D
      for i in (1, 2):
        x = conv(width // 2, 3, stride if i == 1 else 1, name=f'stem_conv{i}')(x)
        x = nn.relu(norm(name=f'stem_bn{i}')(x, train_stem))
      size, stride = 3, 1
    x = conv(width, size, stride, name='stem_conv')(x)
    x = nn.relu(norm(name='stem_bn')(x, train_stem))
    if pool:
      x = nn.max_pool(x, (3, 3), (2, 2), 'SAME' if simclr else [(1, 1), (1, 1)])

    residual = nn.remat(Block, static_argnums=(2,)) if self.rematerialize else Block
    for group, count in enumerate(blocks):
      filters = width * 2**group
      for block in range(count):
        stride = 2 if group and not block else 1
        reshapes = stride > 1 or x.shape[-1] != filters * (4 if bottleneck else 1)
        x = residual(
          filters,
          stride,
          bottleneck,
          project=not block and (simclr or reshapes),
          zero_init=simclr,
          sk_ratio=self.sk_ratio,
          se_ratio=self.se_ratio,
          conv=conv,
          norm=norm,
          name=f'group{group + 1}_block{block + 1}',
        )(x, train and self.frozen <= group)
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def is_frozen(name: str, frozen: int) -> bool:
  """Whether a module of `ResNet`, such as 'group2_block1', is among those that `frozen` means."""
  return (0 if name.startswith('stem') else int(name[5])) <= frozen


def from_config(
  config: Any, dtype: Any = jnp.float32, frozen: int = -1, rematerialize: bool = False
) -> ResNet:
  """The network of a recipe's `model` part."""
  return ResNet(
    depth=config['depth'],
    width_multiplier=config['width_multiplier'],
    stem=config['stem'],
    variant=config['variant'],
    groups=config['bn_groups'],
    layout=config['bn_layout'],
    sk_ratio=config['sk_ratio'],
    se_ratio=config['se_ratio'],
    normalize=config['normalize'],
    frozen=frozen,
    dtype=dtype,
    rematerialize=rematerialize,
  )
