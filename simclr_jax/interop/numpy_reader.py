"""A forward pass in numpy of the tensors of a PyTorch file, with the semantics of PyTorch's layers.

It shares no code with the networks of `models`: exports are checked with it. The structure of the blocks follows from
the names of the tensors. Computed in float64.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import expit

EPSILON = 1e-5  # of BatchNorm


@dataclasses.dataclass(frozen=True)
class Layout:
  """What the tensors of a network do not say.

  Attributes:
    stride: of the first convolution.
    pool: whether max-pooling follows the stem.
    same_pool: whether max-pooling pads as TensorFlow does; False: one pixel on every side.
    same_conv: whether convolutions pad as TensorFlow does; False: (size - 1) / 2 pixels on every side.
    mean, std: of each channel.
  """

  stride: int
  pool: bool
  same_pool: bool
  same_conv: bool
  mean: list[float]
  std: list[float]


def outputs(
  tensors: Mapping[str, np.ndarray], layout: Layout, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
  """Features `[n, d]` of images x `[n, h, w, c]` in [0, 1], and what the tensors `fc.*` make of the features.

  Args:
    tensors: with the names of torchvision or timm.
    layout: the rest of the network.
    x: the images.
  """
  net = _Network(tensors, layout)
  h = net.features((x.astype(np.float64) - layout.mean) / layout.std)
  return h, net.top(h) if any(name.startswith('fc.') for name in tensors) else None


class _Network:
  def __init__(self, tensors, layout):
    self.t, self.layout = tensors, layout

  def features(self, x):
    """x `[n, h, w, c]` -> `[n, d]`."""
    stride = self.layout.stride
    if 'conv1.0.weight' in self.t:  # three convolutions
      x = relu(self.norm(self.conv(x, 'conv1.0', stride), 'conv1.1'))
      x = relu(self.norm(self.conv(x, 'conv1.3'), 'conv1.4'))
      x = self.conv(x, 'conv1.6')
    else:
      x = self.conv(x, 'conv1', stride)
    x = relu(self.norm(x, 'bn1'))
    if self.layout.pool:
      x = max_pool(x, self.layout.same_pool)
    blocks = dict.fromkeys('.'.join(n.split('.')[:2]) for n in self.t if n.startswith('layer'))
    for name in blocks:
      x = self.block(x, name, 2 if name.endswith('.0') and not name.startswith('layer1') else 1)
    return x.mean((1, 2))

  def block(self, x, name, stride):
    """A residual block."""
    y = x
    if f'{name}.conv2.paths.0.conv.weight' in self.t:  # selective kernels
      y = relu(self.conv_norm(y, f'{name}.conv1.conv', f'{name}.conv1.bn'))
      y = self.conv_norm(
        self.select(y, f'{name}.conv2', stride), f'{name}.conv3.conv', f'{name}.conv3.bn'
      )
    elif f'{name}.conv3.weight' in self.t:
      y = relu(self.conv_norm(y, f'{name}.conv1', f'{name}.bn1'))
      y = relu(self.conv_norm(y, f'{name}.conv2', f'{name}.bn2', stride))
      y = self.conv_norm(y, f'{name}.conv3', f'{name}.bn3')
    else:
      y = relu(self.conv_norm(y, f'{name}.conv1', f'{name}.bn1', stride))
      y = self.conv_norm(y, f'{name}.conv2', f'{name}.bn2')
    if f'{name}.se.fc1.weight' in self.t:
      mean = relu(self.conv(y.mean((1, 2), keepdims=True), f'{name}.se.fc1'))
      y = y * expit(self.conv(mean, f'{name}.se.fc2'))
    return relu(y + self.shortcut(x, f'{name}.downsample', stride))

  def shortcut(self, x, name, stride):
    """The other branch of a block: the identity or a projection."""
    if f'{name}.2.weight' in self.t:  # average pooling, a convolution, BatchNorm
      return self.conv_norm(average_pool(x, stride), f'{name}.1', f'{name}.2')
    if f'{name}.0.weight' in self.t:
      return self.conv_norm(x, f'{name}.0', f'{name}.1', stride)
    return x

  def select(self, x, name, stride):
    """Selective kernels of two streams."""
    streams = [
      relu(self.conv_norm(x, f'{name}.paths.{i}.conv', f'{name}.paths.{i}.bn', stride))
      for i in (0, 1)
    ]
    mean = sum(streams).mean((1, 2), keepdims=True)
    mean = relu(self.conv_norm(mean, f'{name}.attn.fc_reduce', f'{name}.attn.bn'))
    a, b = np.split(self.conv(mean, f'{name}.attn.fc_select'), 2, axis=-1)
    return expit(a - b) * streams[0] + expit(b - a) * streams[1]  # the softmax of two

  def top(self, h):
    """The layers `fc.*` of features h `[n, d]`: a linear layer, or layers with ReLU where an index is left out."""
    if 'fc.weight' in self.t:
      return self.linear(h, 'fc')
    places = sorted({int(name.split('.')[1]) for name in self.t if name.startswith('fc.')})
    for i in range(places[-1] + 1):
      if i not in places:
        h = relu(h)
      elif f'fc.{i}.running_mean' in self.t:
        h = self.norm(h, f'fc.{i}')
      else:
        h = self.linear(h, f'fc.{i}')
    return h

  def linear(self, x, name):
    """x `[n, c]` -> `[n, d]`."""
    return x @ self.get(name, 'weight').T + self.get(name, 'bias', 0)

  def conv_norm(self, x, conv, norm, stride=1):
    """A convolution and BatchNorm."""
    return self.norm(self.conv(x, conv, stride), norm)

  def norm(self, x, name):
    """BatchNorm with the running averages."""
    factor = self.get(name, 'weight', 1) / np.sqrt(self.get(name, 'running_var') + EPSILON)
    return (x - self.get(name, 'running_mean')) * factor + self.get(name, 'bias', 0)

  def conv(self, x, name, stride=1):
    """A convolution of x `[n, h, w, c]`."""
    w = self.get(name, 'weight')  # [d, c, k, k]
    size = w.shape[-1]
    if size == 1:
      y = x[:, ::stride, ::stride] @ w[:, :, 0, 0].T
    else:
      sides = [
        same(n, size, stride) if self.layout.same_conv else (size // 2,) * 2 for n in x.shape[1:3]
      ]
      windows = sliding_window_view(np.pad(x, ((0, 0), *sides, (0, 0))), (size, size), axis=(1, 2))
      y = np.tensordot(windows[:, ::stride, ::stride], w, axes=((3, 4, 5), (1, 2, 3)))
    return y + self.get(name, 'bias', 0)

  def get(self, name, leaf, default=None):
    """A tensor in float64."""
    x = self.t.get(f'{name}.{leaf}', default)
    return x if x is default else np.asarray(x, np.float64)


def relu(x):
  """max(x, 0)."""
  return np.maximum(x, 0)


def same(length, size, stride):
  """TensorFlow's padding 'SAME' of one side: (before, after)."""
  total = max((-(-length // stride) - 1) * stride + size - length, 0)
  return total // 2, total - total // 2


def max_pool(x, same_pool):
  """3x3, stride 2."""
  sides = [same(n, 3, 2) if same_pool else (1, 1) for n in x.shape[1:3]]
  x = np.pad(x, ((0, 0), *sides, (0, 0)), constant_values=-np.inf)
  return sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-2, -1))


def average_pool(x, stride):
  """2x2, padded at the end: with the last pixels for stride 1, so that they do not count, with zeros for stride 2."""
  x = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), mode='edge' if stride == 1 else 'constant')
  return sliding_window_view(x, (2, 2), axis=(1, 2))[:, ::stride, ::stride].mean((-2, -1))
