"""ResNets in three variants: SimCLR's, torchvision's as in MoCo, and Haiku's as in BYOL."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax.models import by_parts
from simclr_jax.models.layers import Conv, relu
from simclr_jax.models.norm import BatchNorm

# depth -> (number of blocks in each group, whether they are bottleneck blocks). Depth 8, for laptops and tests, is the
# shallowest CIFAR network of He et al., which have 6n + 2 layers in three groups.
DEPTHS = {
  8: ((1, 1, 1), False),
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
  200: ((3, 24, 36, 3), True),
}
# stem -> (size of the kernel, stride, whether max-pooling follows)
STEMS = {'imagenet': (7, 2, True), 'strided': (3, 2, False), 'cifar': (3, 1, False)}
VARIANTS = ('simclr', 'torchvision', 'haiku')
# name -> (mean, standard deviation) of red, green and blue in [0, 1]; 'none' is also allowed
NORMALIZE = {
  'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  'cifar10': ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


class SelectiveKernel(nn.Module):
  """Selective kernels: a weighted sum of two streams, with weights that depend on their global average pooling.

  Attributes:
    features: number of channels of the bottleneck that computes the weights.
    conv, norm: constructors of layers.

  Source: Li et al. 2019, with two 3x3 streams as in SimCLR v2.
  """

  features: int
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: by_parts.Array, train: bool) -> by_parts.Array:
    """x `[n, height, width, 2c]`, the two streams concatenated -> `[n, height, width, c]`."""

    def pooled(x):
      return jnp.mean(_streams(x).sum(axis=0), axis=(1, 2), keepdims=True)

    def selected(x, y):
      return jnp.sum(_streams(x) * nn.softmax(_streams(y), axis=0), axis=0)

    y = self.conv(self.features, 1, 1, name='reduce')(by_parts.apply(pooled, x))
    y = by_parts.apply(nn.relu, self.norm(name='bn')(y, train))
    y = self.conv(x.shape[-1], 1, 1, name='expand')(y)
    return by_parts.apply(selected, x, y)


def _streams(x):
  return jnp.stack(jnp.split(x, 2, axis=-1))


class SqueezeExcite(nn.Module):
  """Squeeze and excitation: scales every channel by a factor in (0, 1) that depends on global average pooling.

  Attributes:
    features: number of channels of the bottleneck that computes the factors.
    conv: constructor of convolutions.

  Source: Hu et al. 2018.
  """

  features: int
  conv: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: by_parts.Array) -> by_parts.Array:
    """x `[n, height, width, c]` -> the same shape."""
    y = by_parts.apply(lambda x: jnp.mean(x, axis=(1, 2), keepdims=True), x)
    y = by_parts.apply(nn.relu, self.conv(self.features, 1, 1, name='reduce', use_bias=True)(y))
    y = self.conv(x.shape[-1], 1, 1, name='expand', use_bias=True)(y)
    return by_parts.apply(lambda x, y: x * nn.sigmoid(y), x, y)


class Block(nn.Module):
  """A residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1 (v1.5: stride in the 3x3).

  Attributes:
    filters: number of channels of the 3x3 convolutions; a bottleneck has four times as many output channels.
    stride: stride of the block.
    bottleneck: whether the block is a bottleneck.
    project: whether the shortcut is a 1x1 convolution instead of the identity.
    zero_init: whether the last gamma is initialised with 0, so that the block is initially its shortcut.
    sk_ratio, se_ratio: as for `ResNet`.
    in_parts: whether the block is computed on parts of the batch, see `models.by_parts`.
    conv, norm: constructors of layers.
  """

  filters: int
  stride: int
  bottleneck: bool
  project: bool
  zero_init: bool
  sk_ratio: float
  se_ratio: float
  in_parts: bool
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: by_parts.Array, train: bool) -> jax.Array:
    f, s = self.filters, self.stride
    selective = self.bottleneck and self.sk_ratio > 0
    kernels = [(f, 3, s), (f, 3, 1)]
    if self.bottleneck:
      kernels = [(f, 1, 1), (2 * f if selective else f, 3, s), (4 * f, 1, 1)]

    if self.in_parts:
      x = by_parts.delay(x)
    shortcut = x
    if self.project:
      if self.sk_ratio > 0:  # ResNet-D
        # As in TensorFlow, padding is included in the average only if the stride is 2.
        def pool(x, s=s):
          return nn.avg_pool(x, (2, 2), (s, s), [(0, 1), (0, 1)], count_include_pad=s > 1)

        shortcut, s = by_parts.apply(pool, x), 1
      shortcut = self.conv(kernels[-1][0], 1, s, name='proj_conv')(shortcut)
      shortcut = self.norm(name='proj_bn')(shortcut, train)

    for i, (features, size, stride) in enumerate(kernels, 1):
      x = self.conv(features, size, stride, name=f'conv{i}')(x)
      last = i == len(kernels)
      init = nn.initializers.zeros if last and self.zero_init else nn.initializers.ones
      x = self.norm(scale_init=init, name=f'bn{i}')(x, train)
      x = x if last else by_parts.apply(nn.relu, x)
      if selective and i == 2:
        x = SelectiveKernel(max(int(f * self.sk_ratio), 32), self.conv, self.norm, name='sk')(
          x, train
        )
    if self.se_ratio > 0:
      x = SqueezeExcite(max(int(f * self.se_ratio), 1), self.conv, name='se')(x)
    return by_parts.evaluate(by_parts.apply(lambda x, y: relu(x + y), x, shortcut))


class ResNet(nn.Module):
  """ResNet v1.5 without a classifier: images -> pooled features h.

  The variants differ in six places:

  |                      | 'simclr'                         | 'torchvision'                | 'haiku'       |
  |----------------------|----------------------------------|------------------------------|---------------|
  | strided convolutions | pad all sides ('symmetric')      | as 'simclr'                  | pad as 'same' |
  | 3x3/2 max-pool       | pads as 'same'                   | pads one pixel on every side | as 'simclr'   |
  | projection           | first block of every group       | where the shape changes      | as 'simclr'   |
  | convolution init     | fan-in, truncated normal, gain 1 | fan-out, normal, gain sqrt 2 | as 'simclr'   |
  | last gamma           | 0                                | 1                            | as 'simclr'   |
  | running variance     | biased                           | unbiased                     | as 'simclr'   |

  'same' pads images of an even size more at the bottom and on the right than at the top and on the left, see `Conv`.

  Attributes:
    depth: a key of `DEPTHS`.
    width_multiplier: factor on all channel counts.
    stem: 'imagenet' (7x7, stride 2, max-pool), 'cifar' (3x3, stride 1), or for images of 64 pixels 'strided' (3x3,
      stride 2).
    variant: 'simclr', 'torchvision' or 'haiku', see above.
    groups: as for `norm.BatchNorm`.
    layout: as for `norm.BatchNorm`.
    sk_ratio: above 0: the SK networks of SimCLR v2, where it is 0.0625: selective kernels in bottleneck blocks,
      and as in ResNet-D, average pooling in projections and a stem of three 3x3 convolutions.
    se_ratio: above 0: squeeze and excitation at the end of every block.
    normalize: 'none', or a key of `NORMALIZE`: mean and standard deviation that normalise the images.
    dtype: dtype of the convolutions; parameters and BatchNorm statistics are float32.
    rematerialize: 'true': the activations of a block are recomputed in the backward pass. 'parts': also, in training
      a block is computed on parts of the batch, see `models.by_parts`. 'false': neither.
    frozen: the stem and the groups up to this one use the running averages of BatchNorm in training, too, and do not
      update them; 0: the stem only; -1: nothing is frozen.

  Source: He et al. 2016; Chen et al. 2020a, 2020b (SimCLR v1, v2) for 'simclr'; dm-haiku and Grill et al.
    2020 (BYOL) for 'haiku'; He et al. 2019 for ResNet-D.
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
  rematerialize: str = 'false'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Images x `[n, height, width, c]` in [0, 1] -> features h, float32 `[n, channels of the last block]`."""
    for name, value, allowed in (
      ('depth', self.depth, tuple(DEPTHS)),
      ('stem', self.stem, tuple(STEMS)),
      ('variant', self.variant, VARIANTS),
      ('normalize', self.normalize, ('none', *NORMALIZE)),
    ):
      if value not in allowed:
        raise ValueError(f'ResNet {name} {value!r} is not one of {allowed}')
    torch, padding = (
      self.variant == 'torchvision',
      'same' if self.variant == 'haiku' else 'symmetric',
    )
    blocks, bottleneck = DEPTHS[self.depth]
    norm = partial(
      BatchNorm, groups=self.groups, layout=self.layout, unbiased=torch, dtype=self.dtype
    )
    init = nn.initializers.lecun_normal()
    if torch:
      init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')

    def conv(features: int, size: int, stride: int, name: str, use_bias: bool = False) -> nn.Module:
      return Conv(features, size, stride, use_bias, init, self.dtype, padding, name=name)

    if self.normalize != 'none':
      mean, std = NORMALIZE[self.normalize]
      x = (x - jnp.array(mean)) / jnp.array(std)
    x = x.astype(self.dtype)
    width = int(64 * self.width_multiplier)
    parts = self.rematerialize == 'parts' and train and not self.is_initializing()

    def stem(module, x):
      size, stride, pool = STEMS[self.stem]
      train_stem = train and self.frozen < 0
      x = by_parts.delay(x) if parts else x
      if self.sk_ratio > 0 and self.stem == 'imagenet':  # ResNet-D
        for i in (1, 2):
          x = conv(width // 2, 3, stride if i == 1 else 1, name=f'stem_conv{i}')(x)
          x = by_parts.apply(nn.relu, norm(name=f'stem_bn{i}')(x, train_stem))
        size, stride = 3, 1
      x = conv(width, size, stride, name='stem_conv')(x)
      x = by_parts.apply(nn.relu, norm(name='stem_bn')(x, train_stem))
      if pool:
        pads = [(1, 1), (1, 1)] if torch else 'SAME'
        x = by_parts.apply(lambda x: nn.max_pool(x, (3, 3), (2, 2), pads), x)
      return by_parts.evaluate(x)

    x = nn.remat(stem)(self, x) if parts else stem(self, x)
    recompute = self.rematerialize != 'false'
    residual = nn.remat(Block, static_argnums=(2,)) if recompute else Block
    for group, count in enumerate(blocks):
      filters = width * 2**group
      for block in range(count):
        stride = 2 if group and not block else 1
        reshapes = stride > 1 or x.shape[-1] != filters * (4 if bottleneck else 1)
        x = residual(
          filters,
          stride,
          bottleneck,
          project=not block and (not torch or reshapes),
          zero_init=not torch,
          sk_ratio=self.sk_ratio,
          se_ratio=self.se_ratio,
          in_parts=parts,
          conv=conv,
          norm=norm,
          name=f'group{group + 1}_block{block + 1}',
        )(x, train and self.frozen <= group)
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def is_frozen(name: str, frozen: int) -> bool:
  """Whether a module of `ResNet`, such as 'group2_block1', is frozen; `frozen` as for `ResNet`."""
  return (0 if name.startswith('stem') else int(name[5])) <= frozen


def from_config(
  config: Any, dtype: Any = jnp.float32, frozen: int = -1, rematerialize: str = 'false'
) -> ResNet:
  """The ResNet of a recipe's `model` part; the other arguments as for `ResNet`."""
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
