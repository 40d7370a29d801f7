"""Flax variables from the tensors of a file, which must be exactly those of a network."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.errors import ConfigError
from simclr_jax.models import resnet
from simclr_jax.runtime.text import printable

PyTree = Any
SHOWN = 4  # problems in an error


class Tensor(NamedTuple):
  """A tensor of a file.

  Attributes:
    name: in the file.
    path: of the flax variable: collection, modules, leaf.
    value: numbers of any dtype, in the shape and layout of flax.
  """

  name: str
  path: tuple[str, ...]
  value: np.ndarray


def variables(
  net: nn.Module, shape: tuple[int, ...], tensors: Iterable[Tensor], what: str
) -> PyTree:
  """The variables of a flax module, float32.

  Args:
    net: called as `net(x, train=False)`.
    shape: of x.
    tensors: of the file.
    what: the file and the network, for errors.

  Raises:
    ConfigError: tensors are missing, left over, have another shape or no finite numbers.
  """
  wanted = jax.eval_shape(lambda k: net.init(k, jnp.zeros(shape), train=False), jax.random.key(0))
  shapes = {
    tuple(key.key for key in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)
  }
  found = {tensor.path: tensor for tensor in tensors}
  names = {path: tensor.name for path, tensor in found.items()}
  wanted_names = {names.get(path, '/'.join(path)): shape for path, shape in shapes.items()}
  check({name: value for name, _, value in found.values()}, wanted_names, what)
  return tree({path: found[path].value for path in shapes})


def check(
  found: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], what: str
) -> None:
  """Checks that the tensors of a file are exactly those of a network.

  Args:
    found: the tensors by name.
    shapes: name -> shape of those of the network.
    what: the file and the network, for errors.

  Raises:
    ConfigError: tensors are missing, left over, have another shape or no finite numbers.
  """
  problems = []
  if missing := [name for name in shapes if name not in found]:
    problems.append(f'lacks {listed([*map(printable, missing)])}')
  if extra := [name for name in found if name not in shapes]:
    problems.append(f'also has {listed([*map(printable, extra)])}')
  for name in (name for name in shapes if name in found):
    if found[name].shape != shapes[name]:
      problems.append(f'{printable(name)} is {found[name].shape} instead of {shapes[name]}')
    elif not np.isfinite(found[name].astype(np.float32)).all():
      problems.append(f'{printable(name)} has values that are not finite')
  if problems:
    raise ConfigError(f'{what}: the file {listed(problems, "; ")}')


def tree(values: Mapping[tuple[str, ...], np.ndarray]) -> PyTree:
  """Nested dicts of float32 arrays, by the path of each."""
  result: dict[str, Any] = {}
  for path, value in values.items():
    place = result
    for key in path[:-1]:
      place = place.setdefault(key, {})
    place[path[-1]] = np.ascontiguousarray(value, np.float32)
  return result


def architecture(model: Mapping[str, Any]) -> dict[str, Any]:
  """An architecture, see `config.architecture`, with these `model.*` fields."""
  return {
    'encoder': '', 'bn_groups': 1, 'bn_layout': 'contiguous', 'normalize': 'none', 'image_size': 32, 'channels': 3, **model,
  }  # fmt: skip


def features(model: Mapping[str, Any]) -> int:
  """The number of features of a ResNet, by its `model.*` fields."""
  blocks, bottleneck = resnet.DEPTHS[model['depth']]
  width = int(64 * model['width_multiplier']) * 2 ** (len(blocks) - 1)
  return width * 4 if bottleneck else width


def classifier(
  tensors: Mapping[str, np.ndarray], names: tuple[str, str], sizes: set[int], what: str
) -> PyTree:
  """The linear classifier `{'kernel': [d, classes], 'bias': [classes]}`, float32.

  Args:
    tensors: all tensors of the classifier in the file, by their names.
    names: of kernel and bias.
    sizes: the values that d may have.
    what: the classifier, for errors.

  Raises:
    ConfigError: tensors are missing, left over, have another shape or no finite numbers.
  """
  if tensors.keys() != set(names):
    found = listed([*map(printable, tensors)])
    raise ConfigError(f'{what} has the variables {found} instead of {" and ".join(names)}')
  kernel, bias = (np.ascontiguousarray(tensors[name], np.float32) for name in names)
  if kernel.ndim != 2 or kernel.shape[0] not in sizes or bias.shape != kernel.shape[1:]:
    wanted = ' or '.join(map(str, sorted(sizes)))
    raise ConfigError(
      f'{what} has shapes {kernel.shape} and {bias.shape}, not of {wanted} features'
    )
  if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
    raise ConfigError(f'{what} has values that are not finite')
  return {'kernel': kernel, 'bias': bias}


def listed(items: Sequence[str], separator: str = ', ') -> str:
  """The first items, and the number of the others."""
  more = f' and {len(items) - SHOWN:,} more' if len(items) > SHOWN else ''
  return separator.join(items[:SHOWN]) + more
