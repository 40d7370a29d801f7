"""Reads the weights of google-research/simclr: checkpoints of TensorFlow 1, and SavedModels without running them.

The variables of the encoder are numbered in the order in which the layers were created, convolutions and BatchNorm
layers separately: `base_model/conv2d/kernel`, `base_model/conv2d_1/kernel`, ... A training with an EMA also has
`ema_model/base_model/...`. `head_contrastive` is the projection head, `head_supervised` a linear classifier.
"""

import glob
import itertools
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import google.protobuf.message
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from simclr_jax.errors import ConfigError
from simclr_jax.interop import assemble, pickles
from simclr_jax.interop.weights import Network
from simclr_jax.models import mlp, resnet
from simclr_jax.runtime import files
from simclr_jax.runtime.text import printable

PyTree = Any
Tensors = dict[str, np.ndarray]

SUFFIX = re.compile(r'(?<=.)\.(index|meta|data-\d{5}-of-\d{5})$')  # of the files of a checkpoint
ATTRIBUTE = '/.ATTRIBUTES/VARIABLE_VALUE'  # end of a key in a checkpoint of TensorFlow 2
EMA = 'ema_model/'
SCOPES = ('base_model', 'head_contrastive', 'head_supervised')
LEAVES = {
  'kernel': ('params', 'kernel'), 'bias': ('params', 'bias'), 'gamma': ('params', 'scale'), 'beta': ('params', 'bias'),
  'moving_mean': ('batch_stats', 'mean'), 'moving_variance': ('batch_stats', 'var'),
}  # fmt: skip
SK_RATIO = 0.0625  # of SimCLR v2
LAYERS = 4  # of a projection head, see `model.head_layers`


def networks(path: pathlib.Path, given: Mapping[str, Any]) -> list[Network]:
  """The networks of a file: one, or 'base' and 'ema'.

  Args:
    path: a folder with a checkpoint or a SavedModel; a checkpoint such as `model.ckpt-225206`, or one of its files.
    given: not needed: the file determines all fields.

  Raises:
    ConfigError: files are missing or damaged, or contain another network; one sentence.
  """
  prefix, notes = _prefix(path)
  tensors, trained, left_out = _read(prefix)
  if left_out:
    notes.append(f'left out, because it is no part of the network: {assemble.listed(left_out)}')
  parts = {
    'base': {name: x for name, x in tensors.items() if not name.startswith(EMA)},
    'ema': {name.removeprefix(EMA): x for name, x in tensors.items() if name.startswith(EMA)},
  }
  found = [name for name, part in parts.items() if part]
  if not found:
    raise ConfigError(
      f'{prefix} contains no network of SimCLR, whose variables begin with base_model/, only '
      f'{assemble.listed(left_out) or "variables of another kind"}'
    )
  return [
    _network(
      name if len(found) > 1 else '', parts[name], trained, notes, f'{prefix} ({name} network)'
    )
    for name in found
  ]


# Files.


def _prefix(path: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
  """The path of a checkpoint without the endings of its files, and sentences about its choice."""
  if path.name == 'saved_model.pb':
    path = path.parent
  if not path.is_dir():
    return path.with_name(SUFFIX.sub('', path.name)), []
  if (path / 'saved_model.pb').exists() or (path / 'variables').is_dir():
    return path / 'variables' / 'variables', []
  found = sorted(file.name.removesuffix('.index') for file in path.glob('*.index'))
  if not found:
    raise ConfigError(f'{path} contains no checkpoint of TensorFlow: no file ends in .index')
  try:
    text = files.read_text(path / 'checkpoint')
  except FileNotFoundError:
    text = ''
  match = re.search(r'^model_checkpoint_path: "([^"\n]*)"', text, re.MULTILINE)
  chosen = pathlib.PurePath(match[1]).name if match else ''
  if chosen in found:
    return path / chosen, [f'the checkpoint is {chosen}, which the file checkpoint names']
  chosen = max(found, key=lambda name: (_step(name), (path / f'{name}.index').stat().st_mtime))
  return path / chosen, [f'the checkpoint is {chosen}, the newest in the folder']


def _step(name):
  match = re.search(r'-(\d+)$', name)
  return int(match[1]) if match else -1


def _read(prefix: pathlib.Path) -> tuple[Tensors, set[str], list[str]]:
  """The tensors of a checkpoint.

  Returns:
    The tensors of the networks, by their names in TensorFlow 1; those of `SCOPES` with variables that the optimizer
    trained; the names of all other variables.
  """
  data = sorted(prefix.parent.glob(f'{glob.escape(prefix.name)}.data-*-of-*'))
  for file in (prefix.with_name(f'{prefix.name}.index'), *data):
    pickles.open_checked(file).close()
  if not data:
    raise ConfigError(
      f'{prefix}.data-00000-of-00001 does not exist: copy all files of a checkpoint'
    )
  try:
    reader = tf.train.load_checkpoint(str(prefix))
    shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
  except Exception as error:  # TensorFlow raises many types
    raise _damaged(prefix, error) from None
  names = _names(prefix, list(shapes))
  slots = {name for name in names if name.endswith('/Momentum')}
  own = {n: key for n, key in names.items() if n not in slots and _scope(n) in SCOPES}
  if wrong := [name for name, key in own.items() if not dtypes[key].is_floating]:
    raise ConfigError(f'{prefix}: {printable(wrong[0])} has no floating-point numbers')
  size = sum(math.prod(shapes[key]) * dtypes[key].size for key in own.values())
  if size > sum(file.stat().st_size for file in data):
    raise ConfigError(
      f'{prefix} is damaged: its data is shorter than the {size:,} bytes of its variables'
    )
  try:
    tensors = {name: reader.get_tensor(key) for name, key in own.items()}
  except Exception as error:
    raise _damaged(prefix, error) from None
  left_out = sorted(names.keys() - own.keys() - slots - {'global_step'})
  return tensors, {_scope(name) for name in slots}, [printable(name) for name in left_out]


def _scope(name):
  return name.removeprefix(EMA).split('/')[0]


def _damaged(prefix, error):
  reason = printable(error)[:200] or type(error).__name__
  return ConfigError(f'{prefix} is damaged: {reason}')


# Names.


def _names(prefix: pathlib.Path, keys: list[str]) -> dict[str, str]:
  """Name of a variable in TensorFlow 1 -> key in the checkpoint.

  Raises:
    ConfigError: the names are not known, or two variables have the same.
  """
  model = prefix.parent.parent / 'saved_model.pb'
  if not any(key.endswith(ATTRIBUTE) for key in keys):
    return {key: key for key in keys}
  keys = [key for key in keys if key.endswith(ATTRIBUTE)]
  if prefix.name != 'variables' or not model.exists():
    raise ConfigError(
      f'{prefix} is a checkpoint of TensorFlow 2 without the names of its variables: give the folder of the '
      'SavedModel, with saved_model.pb'
    )
  names: dict[str, str] = {}
  for key, name in zip(keys, _saved_names(model, keys), strict=True):
    if names.setdefault(name, key) != key:
      raise ConfigError(
        f'{model} contains several variables {printable(name)}: only one network is expected'
      )
  return names


def _saved_names(model: pathlib.Path, keys: list[str]) -> Iterator[str]:
  """The names of variables in a SavedModel, by the graph of its objects, which is read as data.

  A key is a path in this graph, such as `model/layers/0/kernel`, followed by `ATTRIBUTE`.
  """
  saved = saved_model_pb2.SavedModel()
  try:
    with pickles.open_checked(model) as file:
      saved.ParseFromString(file.read())
    nodes = saved.meta_graphs[0].object_graph_def.nodes
    children = [{child.local_name: child.node_id for child in node.children} for node in nodes]
    for key in keys:
      node = 0
      for part in key.removesuffix(ATTRIBUTE).split('/'):
        node = children[node][re.sub(r'\.([.S])', lambda m: '/' if m[1] == 'S' else '.', part)]
      yield _tf1_name(nodes[node].variable.name)
  except (google.protobuf.message.DecodeError, LookupError):
    raise ConfigError(f'{model} is damaged, or does not fit to the variables beside it') from None


def _tf1_name(name: str) -> str:
  """The name in TensorFlow 1 of a variable that has a name in TensorFlow 2, such as `.../conv2d_3/kernel:0`."""
  parts = name.split(':')[0].split('/')
  layer, leaf = '/'.join(parts[-2:-1]).removeprefix('sync_'), parts[-1]
  kind = re.sub(r'_\d+$', '', layer)
  if 'head_supervised' in parts:
    return f'head_supervised/linear_layer/{kind}/{leaf}'
  if any(part.startswith('projection_head') for part in parts):
    index = next((part for part in parts if re.fullmatch(r'n?l_\d+', part)), '')
    return f'head_contrastive/{index}/{kind}/{leaf}'
  if kind in ('conv2d', 'batch_normalization'):
    return f'base_model/{layer}/{leaf}'
  return '/'.join(parts)


# Networks.


def _network(
  name: str, tensors: Tensors, trained: set[str], notes: list[str], what: str
) -> Network:
  """The network of the tensors of one network, by their names after `ema_model/`."""
  model, encoder = _encoder(tensors, what)
  d = assemble.features(model)
  fields, head = _head(tensors, d, what)
  classifier = _classifier(tensors, {d, fields.get('head_hidden') or d}, what)
  notes = list(notes)
  if classifier and 'head_contrastive' in trained:
    notes.append(
      'head_supervised is the linear classifier of the features that was trained during pretraining'
    )
  elif classifier and head:
    notes.append(
      'the input of the classifier head_supervised, which the file does not say: the first layer of the projection '
      'head after fine-tuning with 1 % or 10 % of the labels, the features otherwise'
    )
  return Network(name, model | fields, encoder, head, classifier, 'none', tuple(notes))


def _encoder(tensors: Tensors, what: str) -> tuple[dict[str, Any], PyTree]:
  """The `model.*` fields of the encoder, and its variables."""
  layers: dict[str, dict[int, list[tuple[str, str]]]] = {'conv2d': {}, 'batch_normalization': {}}
  for name in (name for name in tensors if name.startswith('base_model/')):
    match = re.fullmatch(r'base_model/(conv2d|batch_normalization)(?:_(\d+))?/(\w+)', name)
    if not match or match[3] not in LEAVES:
      raise ConfigError(f'{what}: {printable(name)} is no variable of a ResNet of SimCLR')
    layers[match[1]].setdefault(int(match[2] or 0), []).append((match[3], name))
  convs, norms = ([numbered[i] for i in sorted(numbered)] for numbered in layers.values())
  kernels = [tensors[name].shape for conv in convs for leaf, name in conv if leaf == 'kernel']
  if (
    len(kernels) != len(convs)
    or len(convs) < 3
    or any(len(shape) != 4 or 0 in shape for shape in kernels)
  ):
    raise ConfigError(f'{what}: the kernels of its convolutions are missing or have other shapes')
  biases = any(leaf == 'bias' for conv in convs for leaf, _ in conv)
  model, paths = _architecture(kernels, biases, len(norms), what)
  found = [
    assemble.Tensor(name, (LEAVES[leaf][0], *path, LEAVES[leaf][1]), tensors[name])
    for path, layer in zip(itertools.chain(*paths), convs + norms, strict=True)
    for leaf, name in layer
  ]
  net = resnet.ResNet(**model)
  return model, assemble.variables(net, (1, 32, 32, 3), found, what)


def _architecture(kernels, biases, norms, what):
  """The `model.*` fields of an encoder, and the modules of its convolutions and BatchNorm layers in their order.

  Args:
    kernels: shapes of the kernels.
    biases: whether convolutions have biases.
    norms: number of BatchNorm layers.
    what: for errors.
  """
  deep = kernels[1][0] == 3  # a stem of three convolutions
  filters = kernels[2 if deep else 0][-1]
  for depth, sk in itertools.product(resnet.DEPTHS, (True,) if deep else (False, True)):
    paths = _order(depth, deep, sk, biases)
    if [len(kernels), norms] == [len(part) for part in paths]:
      sizes = dict(zip(paths[0], kernels, strict=True))
      model = {
        'depth': depth, 'width_multiplier': filters / 64, 'variant': 'simclr',
        'stem': 'imagenet' if deep or kernels[0][0] == 7 else 'cifar',
        'sk_ratio': _ratio(sizes, filters, 'sk', 32) if sk else 0.0,
        'se_ratio': _ratio(sizes, filters, 'se', 1) if biases else 0.0,
      }  # fmt: skip
      return model, paths
  raise ConfigError(
    f'{what}: {len(kernels)} convolutions and {norms} BatchNorm layers are no ResNet of SimCLR: the file is damaged or '
    'contains another network'
  )


def _order(depth: int, deep: bool, sk: bool, se: bool) -> tuple[list, list]:
  """The modules of convolutions and of BatchNorm layers, in the order in which TensorFlow created them.

  Args:
    depth: a key of `resnet.DEPTHS`.
    deep: whether the stem has three convolutions.
    sk, se: whether the blocks have selective kernels, squeeze and excitation.
  """
  blocks, bottleneck = resnet.DEPTHS[depth]
  stem = ('1', '2', '') if deep else ('',)
  convs: list[tuple[str, ...]] = [(f'stem_conv{i}',) for i in stem]
  norms: list[tuple[str, ...]] = [(f'stem_bn{i}',) for i in stem]
  for group, count in enumerate(blocks, 1):
    for block in range(1, count + 1):
      name = f'group{group}_block{block}'
      if block == 1:
        convs.append((name, 'proj_conv'))
        norms.append((name, 'proj_bn'))
      for i in (1, 2, 3) if bottleneck else (1, 2):
        convs.append((name, f'conv{i}'))
        norms.append((name, f'bn{i}'))
        if sk and bottleneck and i == 2:
          convs += [(name, 'sk', 'reduce'), (name, 'sk', 'expand')]
          norms.append((name, 'sk', 'bn'))
      if se:
        convs += [(name, 'se', 'reduce'), (name, 'se', 'expand')]
  return convs, norms


def _ratio(sizes, filters, module, least):
  """`sk_ratio` or `se_ratio`, of which several give the same shapes.

  Args:
    sizes: modules of convolutions -> shapes of their kernels.
    filters: number of channels of the first group.
    module: 'sk' or 'se'.
    least: number of channels that the module has at least.
  """
  pairs = [
    (filters * 2 ** (int(path[0][5]) - 1), shape[-1])
    for path, shape in sizes.items()
    if path[1:] == (module, 'reduce')
  ]
  if not pairs:  # basic blocks have no selective kernels
    return SK_RATIO
  f, c = pairs[-1]
  ratios = (SK_RATIO, c / f, (c + 0.5) / f)
  fitting = [r for r in ratios if all(max(int(f * r), least) == c for f, c in pairs)]
  return (*fitting, c / f)[0]


def _head(tensors: Tensors, d: int, what: str) -> tuple[dict[str, Any], PyTree | None]:
  """The `model.*` fields of the projection head above d features, and its variables; ({}, None) without one."""
  found, widths = [], {}
  own = [name for name in tensors if name.startswith('head_contrastive/')]
  for name in own:
    match = re.fullmatch(
      r'head_contrastive/(n?l)_(\d+)/(dense|batch_normalization)(?:_\d+)?/(\w+)', name
    )
    if not match or match[4] not in LEAVES:
      raise ConfigError(f'{what}: {printable(name)} is no variable of a projection head of SimCLR')
    collection, leaf = LEAVES[match[4]]
    module = f'{"dense" if match[3] == "dense" else "bn"}{int(match[2]) + 1}'
    found.append(assemble.Tensor(name, (collection, module, leaf), tensors[name]))
    if match[4] == 'kernel' and tensors[name].ndim == 2:
      widths[int(match[2])] = tensors[name].shape[1]
  if not own:
    return {}, None
  if sorted(widths) != list(range(len(widths))) or not 1 <= len(widths) <= LAYERS:
    raise ConfigError(
      f'{what}: layers of the projection head head_contrastive are missing, or it has more than {LAYERS}'
    )
  hidden = widths[0] if len(widths) > 1 and widths[0] != d else 0
  model = {
    'head': 'linear' if own[0].startswith('head_contrastive/l_') else 'mlp', 'head_layers': len(widths),
    'head_hidden': hidden, 'head_dim': widths[len(widths) - 1], 'head_norm': 'all',
  }  # fmt: skip
  net = mlp.MLP(len(widths), model['head_dim'], hidden, 'all')
  return model, assemble.variables(net, (1, d), found, what)


def _classifier(tensors: Tensors, sizes: set[int], what: str) -> PyTree | None:
  """Kernel and bias of the classifier, whose input has one of the sizes; None without one."""
  scope = 'head_supervised/'
  own = {name.removeprefix(scope): x for name, x in tensors.items() if name.startswith(scope)}
  if not own:
    return None
  names = ('linear_layer/dense/kernel', 'linear_layer/dense/bias')
  return assemble.classifier(own, names, sizes, f'{what}: head_supervised')
