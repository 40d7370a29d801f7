"""Reads the pickles of BYOL, whose networks are written in Haiku, without Haiku and without executing anything.

Source: byol_experiment.py and utils/ of deepmind-research/byol; names of variables as in dm-haiku.
"""

import math
import mmap
import pathlib
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from simclr_jax.errors import ConfigError
from simclr_jax.interop import assemble, pickles, weights
from simclr_jax.models import mlp, resnet
from simclr_jax.runtime.text import printable

PyTree = Any
Arrays = dict[str, np.ndarray]

DTYPES = ('f8', 'f4', 'f2', 'i8', 'i4', 'i2', 'i1', 'u8', 'u4', 'u2', 'u1', 'b1')
STEM = '/~/initial_conv/w'
# Haiku's name of a variable of a layer -> collection and leaf
CONV = {'w': ('params', 'kernel'), 'b': ('params', 'bias')}
NORM = {
  'scale': ('params', 'scale'), 'offset': ('params', 'bias'),
  '~/mean_ema/average': ('batch_stats', 'mean'), '~/var_ema/average': ('batch_stats', 'var'),
}  # fmt: skip


def networks(path: pathlib.Path, given: Mapping[str, Any]) -> list[weights.Network]:
  """The networks of a pickle: 'online' and 'target' of BYOL, or a single one, saved as a dict of `params` and `state`.

  Args:
    path: the file, such as `pretrain_res50x1.pkl`.
    given: not needed: the file determines all fields.

  Raises:
    ConfigError: the file is damaged, contains other objects or another network; one sentence.
  """
  tree = _unpickle(path)
  if isinstance(tree, dict):
    tree = tree.get('experiment_state', tree)
  parts: dict[str, tuple[Any, Any]] = {}
  if isinstance(tree, tuple) and len(tree) == 5:  # _ByolExperimentState
    parts = {'online': (tree[0], tree[2]), 'target': (tree[1], tree[3])}
  elif isinstance(tree, dict) and {'params', 'state'} <= tree.keys():
    parts = {'': (tree['params'], tree['state'])}
  if not parts:
    raise ConfigError(
      f'{path} contains no networks of BYOL: neither experiment_state nor params and state'
    )
  return [
    _network(
      name, _arrays(params, path), _arrays(state, path), f'{path} ({name or "only"} network)'
    )
    for name, (params, state) in parts.items()
  ]


# The pickle.


class _Refused(Exception):
  """What a pickle contains that is not read."""


class _Dtype:
  """A dtype of numpy, whose byte order follows."""

  def __init__(self, code: Any, *_: Any):
    if code not in DTYPES:
      raise _Refused(f'an array of the dtype {code}')
    self.code = code

  def __setstate__(self, state: tuple) -> None:
    if state[1] not in ('<', '|'):
      raise ValueError('its numbers are not little-endian')


class _Array:
  """An array of numpy, whose shape and values follow."""

  value: np.ndarray | None = None

  def __setstate__(self, state: tuple) -> None:
    _, shape, dtype, fortran, data = state
    if math.prod(shape) * np.dtype(dtype.code).itemsize != len(data):
      raise ValueError(f'an array of the shape {shape} has {len(data):,} bytes')
    self.value = np.frombuffer(data, dtype.code).reshape(shape, order='F' if fortran else 'C')


def _named_tuple() -> type:
  """A new class of tuples, whose fields have no names."""
  new: Callable[..., Any] = lambda cls, *values: tuple.__new__(cls, values)  # noqa: E731
  return type('NamedTuple', (tuple,), {'__slots__': (), '__new__': new})


def _array(state: tuple) -> _Array:
  array = _Array()
  array.__setstate__(state)
  return array


def _encode(text: str, encoding: str) -> bytes:
  if encoding != 'latin1':
    raise ValueError(f'bytes are encoded as {encoding}')
  return text.encode('latin1')


class _Unpickler(pickle._Unpickler):
  """Reads a pickle in which only functions and classes of this file are called; none is imported by its name.

  The implementation of pickle in Python reads no more bytes than a file has, whatever sizes the file declares.
  """

  def load_bytearray8(self) -> None:
    """Reads bytes; the method of the base class first allocates as many as the file declares."""
    size = int.from_bytes(self.read(8), 'little')  # type: ignore[attr-defined]
    self.append(self.read(size))  # type: ignore[attr-defined]

  dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}  # type: ignore[dict-item]

  def find_class(self, module: str, name: str) -> Any:
    """What stands for a global: a new object each time, because a pickle can change its attributes."""
    if module.split('.')[0] in ('jax', 'jaxlib'):
      raise _Refused(f'arrays of JAX ({module}.{name}): save jax.device_get(...) of the variables')
    if name.endswith('State'):  # named tuples of BYOL and optax
      return _named_tuple()
    allowed: dict[str, dict[str, Callable[..., Any]]] = {
      'numpy': {'dtype': lambda *args: _Dtype(*args), 'ndarray': lambda: None},
      'numpy.core.multiarray': {
        '_reconstruct': lambda *_: _Array(),
        'scalar': lambda dtype, data: np.frombuffer(data, dtype.code, 1)[0],
      },
      'numpy.core.numeric': {
        '_frombuffer': lambda data, dtype, shape, order: _array((1, shape, dtype, order == 'F', data))
      },
      'dill._dill': {  # how dill saves classes of named tuples, and arrays
        '_create_namedtuple': lambda *_: _named_tuple(),
        '_create_array': lambda make, args, state, *_: _array(state),
      },
      'haiku._src.data_structures': {
        'FlatMapping': lambda items=(): dict(items),
        'frozendict': lambda items=(): dict(items),
      },
      'collections': {'OrderedDict': lambda items=(): dict(items)},
      '_codecs': {'encode': lambda text, encoding: _encode(text, encoding)},
    }  # fmt: skip
    place = module.replace('numpy._core', 'numpy.core').replace('dill.dill', 'dill._dill')
    if name not in allowed.get(place, {}):
      raise _Refused(f'{module}.{name}, which is not called, because that might execute code')
    return allowed[place][name]


def _unpickle(path: pathlib.Path) -> Any:
  """The object in a pickle: dicts, lists, tuples, numbers, text and `_Array`."""
  try:
    with (
      pickles.open_checked(path) as file,
      mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
      if data[-1:] != pickle.STOP:
        raise ValueError('its end is missing')
      return _Unpickler(data).load()
  except _Refused as error:
    raise ConfigError(f'{path} contains {printable(error)[:200]}') from None
  except OSError as error:
    raise ConfigError(f'{path} cannot be read: {error.strerror or error}') from None
  except (pickle.UnpicklingError, *pickles.DAMAGES) as error:
    reason = printable(error)[:200] or type(error).__name__
    if isinstance(error, (TypeError, AttributeError)):  # their messages are about our functions
      reason = 'its objects are not those of Haiku and numpy'
    raise ConfigError(f'{path} is damaged or no pickle of BYOL: {reason}') from None


def _arrays(tree: Any, path: pathlib.Path) -> Arrays:
  """The arrays of Haiku's parameters or state, by their names: module/variable."""
  found = {}
  for module, variables in tree.items() if isinstance(tree, dict) else [('', None)]:
    if not isinstance(module, str) or not isinstance(variables, dict):
      raise ConfigError(f'{path}: its variables are no dict of a dict for each module, as in Haiku')
    for name, x in variables.items():
      if not isinstance(x, _Array) or x.value is None or not x.value.size:
        raise ConfigError(
          f'{path}: {printable(f"{module}/{name}")} is no array of numpy with values'
        )
      found[f'{module}/{name}'] = x.value
  return found


# Networks.


def _network(name: str, params: Arrays, state: Arrays, what: str) -> weights.Network:
  """A network of Haiku's parameters and state."""
  roots = [key.removesuffix(STEM) for key in params if key.endswith(STEM)]
  if len(roots) != 1:
    raise ConfigError(
      f'{what}: {len(roots)} modules instead of one are ResNets of Haiku, with {STEM}'
    )
  root = f'{roots[0]}/~/'
  scopes = (f'{root}logits/', root, 'projector/', 'classifier/', '')
  parts: dict[str, Arrays] = {scope: {} for scope in scopes}
  for key, x in (params | state).items():
    if not key.endswith(('/hidden', '/counter')):  # from both, Haiku computes `average`
      prefix = next(prefix for prefix in parts if key.startswith(prefix))
      parts[prefix][key.removeprefix(prefix)] = x
  logits, encoder, head, classifier, others = parts.values()
  model, variables = _encoder(encoder, what)
  d = assemble.features(model)
  fields, head_variables, notes = _head(head, d, what)
  if modules := sorted({printable(key.split('/')[0]) for key in others}):
    notes.append(f'left out, because it is no part of encoder and head: {assemble.listed(modules)}')
  normalize = 'imagenet' if name else None  # BYOL's own files
  linear = None
  if classifier or logits:
    linear = assemble.classifier(classifier or logits, ('w', 'b'), {d}, f'{what}: classifier')
  return weights.Network(
    name, model | fields, variables, head_variables, linear, normalize, tuple(notes)
  )


def _encoder(arrays: Arrays, what: str) -> tuple[dict[str, Any], PyTree]:
  """The `model.*` fields of the encoder, and its variables."""
  found = []
  for name, x in arrays.items():
    match = re.fullmatch(
      r'(?:initial_|block_group_(\d)/~/block_(\d{1,2})/~/(shortcut_)?)(conv|batchnorm)(?:_(\d))?/(.+)', name
    )  # fmt: skip
    leaves = CONV if match and match[4] == 'conv' else NORM
    if not match or match[6] not in leaves:
      raise ConfigError(f'{what}: {printable(name)} is no variable of a ResNet v1 of Haiku')
    layer = 'conv' if match[4] == 'conv' else 'bn'
    path: tuple[str, ...] = (f'stem_{layer}',)
    if match[1]:
      inner = f'proj_{layer}' if match[3] else f'{layer}{int(match[5] or 0) + 1}'
      path = (f'group{int(match[1]) + 1}_block{int(match[2]) + 1}', inner)
    found.append(_tensor(name, path, leaves[match[6]], x))
  blocks = {tensor.path[1] for tensor in found if len(tensor.path) == 4}
  counts = tuple(sum(name.startswith(f'group{i}_') for name in blocks) for i in (1, 2, 3, 4))
  bottleneck = any(tensor.path[-2] == 'conv3' for tensor in found)
  depths = [depth for depth, kind in resnet.DEPTHS.items() if kind == (counts, bottleneck)]
  kernel = arrays[STEM.removeprefix('/~/')].shape
  if not depths or len(kernel) != 4 or not kernel[3]:
    raise ConfigError(f'{what}: {counts} blocks are no ResNet of this package')
  model = {
    'depth': depths[0],
    'width_multiplier': kernel[3] / 64,
    'stem': 'imagenet',
    'variant': 'haiku',
  }
  return model, assemble.variables(resnet.ResNet(**model), (1, 32, 32, 3), found, what)


def _tensor(name, path, leaf, x):
  """An `assemble.Tensor`; Haiku's values of BatchNorm have the shape `[1, ..., 1, c]`."""
  if name.split('/')[-1] not in CONV and x.ndim and x.size == x.shape[-1]:
    x = x.reshape(-1)
  return assemble.Tensor(name, (leaf[0], *path, leaf[1]), x)


def _head(arrays: Arrays, d: int, what: str) -> tuple[dict[str, Any], PyTree | None, list[str]]:
  """The `model.*` fields of the projector above d features, its variables, and sentences about what was changed.

  The first layer has a bias before its BatchNorm, which `mlp.MLP` does not. The bias is subtracted from the mean.
  """
  modules = {'linear': 'dense1', 'batch_norm': 'bn1', 'linear_1': 'dense2'}
  if {name.split('/')[0] for name in arrays} != modules.keys():
    notes = ['left out: the projector, which is no MLP of two layers as in BYOL']
    return {}, None, notes if arrays else []
  hidden, dim = (
    np.atleast_1d(arrays.get(f'{name}/w', np.zeros(1))).shape[-1] for name in ('linear', 'linear_1')
  )
  arrays = {'linear/b': np.zeros(hidden), 'linear_1/b': np.zeros(dim)} | arrays
  bias, mean = arrays.pop('linear/b'), 'batch_norm/~/mean_ema/average'
  if bias.shape != (hidden,) or arrays.get(mean, bias).size != hidden:
    raise ConfigError(f'{what}: the layers of the projector have different numbers of channels')
  if mean in arrays:
    arrays[mean] = arrays[mean] - bias
  found = []
  for name, x in arrays.items():
    module, leaf = name.split('/', 1)
    leaves = NORM if module == 'batch_norm' else CONV
    if leaf not in leaves:
      raise ConfigError(f'{what}: projector/{printable(name)} is no variable of an MLP of BYOL')
    found.append(_tensor(f'projector/{name}', (modules[module],), leaves[leaf], x))
  fields = {
    'head': 'mlp', 'head_layers': 2, 'head_hidden': hidden, 'head_dim': dim, 'head_norm': 'hidden',
  }  # fmt: skip
  net = mlp.MLP(2, dim, hidden, 'hidden')
  note = (
    'the first bias of the projector was subtracted from the running mean of its BatchNorm, '
    'which gives the same outputs'
  )
  return fields, assemble.variables(net, (1, d), found, what), [note]
