"""The names of our variables in PyTorch: torchvision's, and timm's where torchvision lacks the layer.

A PyTorch file is a dict of tensors, such as `layer1.0.conv1.weight`, in the layout of PyTorch: convolutions
`[out, in, height, width]`, linear layers `[out, in]`. The flax variables of an encoder are nested dicts, such as
`params/group1_block1/conv1/kernel`, in the layout `[height, width, in, out]`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import encoder as encoders
from simclr_jax.errors import ConfigError
from simclr_jax.interop import assemble
from simclr_jax.models import mlp

PyTree = Any
Tensors = Mapping[str, np.ndarray]

LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}  # fmt: skip


class Tensor(NamedTuple):
  """A tensor of a PyTorch file.

  Attributes:
    name: in the file, without a prefix.
    path: of the flax variable: collection, modules, leaf; empty if flax has no variable, because the values are 0.
    shape: in PyTorch.
    part: (i, n): the i-th of n equal parts of the last axis of the flax variable, which are several tensors.
  """

  name: str
  path: tuple[str, ...]
  shape: tuple[int, ...]
  part: tuple[int, int] = (0, 1)


def encoder(architecture: Mapping[str, Any]) -> list[Tensor]:
  """The tensors of the encoder of an architecture (`config.architecture`), in the order of PyTorch's modules.

  Raises:
    ConfigError: the encoder is not a ResNet of this package.
  """
  if architecture['encoder']:
    raise ConfigError(
      f'{architecture["encoder"]} is an encoder of your own, and PyTorch has no names for its variables: '
      'export it as orbax, stablehlo or savedmodel'
    )
  leaves = list(_leaves(encoders.shapes(dict(architecture))))
  modules = {module for path, _ in leaves for module in path[1:-1]}
  found = []
  for path, shape in leaves:
    names = _names(path[1:-1], modules, pooled=architecture['sk_ratio'] > 0)
    part = _torch_shape((*shape[:-1], shape[-1] // len(names)))
    for i, name in enumerate(names):
      found.append(Tensor(f'{name}.{LEAVES[path[-1]]}', path, part, (i, len(names))))
  return sorted(found, key=lambda tensor: _position(tensor.name))


def head(architecture: Mapping[str, Any], features: int, layers: int | None = None) -> list[Tensor]:
  """The tensors of the projection head, as those of a `torch.nn.Sequential` of Linear, BatchNorm1d and ReLU.

  The names begin with the index of the layer. A head of a single linear layer has the names `weight` and `bias`.

  Args:
    architecture: see `config.architecture`.
    features: number of features of the encoder.
    layers: number of layers that are kept, from the first; None: all.
  """
  net = mlp.head(architecture, keep=layers)
  h = jnp.zeros((1, features))
  shapes = jax.eval_shape(lambda key: net.init(key, h, train=False), jax.random.key(0))
  found: list[Tensor] = []
  index, leaves = 0, list(_leaves(shapes))
  for i in range(1, 1 + (mlp.depth(architecture) if layers is None else layers)):
    for module in (f'dense{i}', f'bn{i}'):
      own = [(path, shape) for path, shape in leaves if path[1] == module]
      name = '' if len({path[1] for path, _ in leaves}) == 1 else f'{index}.'
      for path, shape in own:
        found.append(Tensor(f'{name}{LEAVES[path[-1]]}', path, _torch_shape(shape)))
      if {path[-1] for path, _ in own} == {'scale', 'mean', 'var'}:  # the last BatchNorm of SimCLR
        found.append(Tensor(f'{name}bias', (), own[0][1]))
      index += bool(own)
    index += 1  # ReLU
  return sorted(found, key=lambda tensor: _position(tensor.name))


def to_torch(
  tensors: Iterable[Tensor], variables: PyTree, prefix: str = ''
) -> dict[str, np.ndarray]:
  """The tensors of a PyTorch file, float32 and contiguous; `num_batches_tracked` of BatchNorm, int64, is 0.

  Args:
    tensors: of `encoder` or `head`.
    variables: flax variables.
    prefix: of all names.
  """
  result = {}
  for name, path, shape, (i, n) in tensors:
    if path:
      values = np.split(np.asarray(_get(variables, path), np.float32), n, axis=-1)[i]
      result[prefix + name] = np.ascontiguousarray(_transposed(values))
    else:
      result[prefix + name] = np.zeros(shape, np.float32)
    if name.endswith('running_var'):
      result[f'{prefix}{name.removesuffix("running_var")}num_batches_tracked'] = np.zeros(
        (), np.int64
      )
  return result


def from_torch(tensors: Sequence[Tensor], found: Tensors, what: str) -> PyTree:
  """Flax variables from the tensors of a PyTorch file, which must have exactly these names and shapes.

  Args:
    tensors: of `encoder` or `head`.
    found: the tensors without their prefix; `num_batches_tracked` is ignored.
    what: the file and the network, for errors.

  Raises:
    ConfigError: tensors are missing, left over, have another shape or no finite numbers.
  """
  found = {name: x for name, x in found.items() if name.split('.')[-1] != 'num_batches_tracked'}
  assemble.check(found, {tensor.name: tensor.shape for tensor in tensors}, what)
  for tensor in tensors:
    if not tensor.path and found[tensor.name].any():
      raise ConfigError(f'{what}: the file {tensor.name} is not 0, as it is in SimCLR')
  parts: dict[tuple[str, ...], list[np.ndarray]] = {}
  for name, path, _, _ in sorted(tensors, key=lambda tensor: tensor.part):
    if path:
      parts.setdefault(path, []).append(_transposed(found[name].astype(np.float32), back=True))
  return assemble.tree({path: np.concatenate(values, axis=-1) for path, values in parts.items()})


def _leaves(shapes):
  """(path, shape) of every leaf."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    yield tuple(key.key for key in path), leaf.shape


def _get(variables, path):
  for key in path:
    variables = variables[key]
  return variables


def _names(path: tuple[str, ...], modules: set[str], pooled: bool) -> list[str]:
  """The names of a layer, one for each of its equal parts.

  Args:
    path: the modules of the layer.
    modules: all modules of the network.
    pooled: whether average pooling precedes the convolution of a projection.
  """
  if path[0].startswith('stem'):
    deep = {'stem_conv1': 'conv1.0', 'stem_bn1': 'conv1.1', 'stem_conv2': 'conv1.3', 'stem_bn2': 'conv1.4'}  # fmt: skip
    last = 'conv1.6' if 'stem_conv1' in modules else 'conv1'
    return [{**deep, 'stem_conv': last, 'stem_bn': 'bn1'}[path[0]]]
  group, block = path[0].removeprefix('group').split('_block')
  names = {
    'proj_conv': ['downsample.1' if pooled else 'downsample.0'],
    'proj_bn': ['downsample.2' if pooled else 'downsample.1'],
    'se.reduce': ['se.fc1'],
    'se.expand': ['se.fc2'],
  }
  if 'sk' in modules:
    names |= {
      'conv1': ['conv1.conv'], 'bn1': ['conv1.bn'], 'conv3': ['conv3.conv'], 'bn3': ['conv3.bn'],
      'conv2': ['conv2.paths.0.conv', 'conv2.paths.1.conv'],
      'bn2': ['conv2.paths.0.bn', 'conv2.paths.1.bn'],
      'sk.reduce': ['conv2.attn.fc_reduce'], 'sk.bn': ['conv2.attn.bn'], 'sk.expand': ['conv2.attn.fc_select'],
    }  # fmt: skip
  inner = '.'.join(path[1:])
  return [f'layer{group}.{int(block) - 1}.{name}' for name in names.get(inner, [inner])]


def _position(name):
  """A key that sorts tensors as PyTorch does."""
  order = ('conv1', 'bn1', 'conv2', 'bn2', 'conv3', 'bn3', 'se', 'downsample')
  leaves = ('weight', 'bias', 'running_mean', 'running_var')
  key = []
  for part in name.split('.'):
    if part.isdigit():
      key.append((0, int(part), ''))
    elif part in leaves:
      key.append((2, leaves.index(part), ''))
    else:
      key.append((1, order.index(part) if part in order else len(order), part))
  return key


def _torch_shape(shape):
  return tuple(shape[i] for i in (3, 2, 0, 1)) if len(shape) == 4 else tuple(reversed(shape))


def _transposed(x, back=False):
  if x.ndim == 4:
    return x.transpose((2, 3, 1, 0) if back else (3, 2, 0, 1))
  return x.T
