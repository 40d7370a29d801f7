"""Format MoCo: a checkpoint of facebookresearch/moco, with queue, key encoder and momentum, from which a training goes on.

Source: moco/builder.py and main_moco.py of facebookresearch/moco.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from simclr_jax.errors import ConfigError
from simclr_jax.interop import pickles, torch_files, torch_loader, torch_names
from simclr_jax.interop.model import Model

PyTree = Any
READER = torch_files.READER
FILE = 'model.pth.tar'
QUERY, KEY = 'module.encoder_q.', 'module.encoder_k.'


def training(config: ml_collections.ConfigDict, state: Any, rate: float) -> dict[str, Any]:
  """The state of a MoCo training, for `Model.training`, on the host.

  Args:
    config: the recipe.
    state: the `train_state.TrainState`.
    rate: the learning rate of the next step.

  Returns:
    `key`: variables like `Model.variables`; `queue` `[K, d]`, `pointer`; `momentum`: parameters -> PyTorch's
    `momentum_buffer`, empty without momentum; `epoch`: number of finished epochs; `group`: the settings of SGD.

  Raises:
    ConfigError: the run was not trained with MoCo, or not with SGD.
  """
  if config.method != 'moco':
    raise ConfigError(
      f'--to=moco needs a run of method=moco, and this one was trained with method={config.method}: '
      'use --to=safetensors'
    )
  if config.optimizer not in ('sgd', 'nesterov'):
    raise ConfigError(
      f'--to=moco needs optimizer=sgd, and this run was trained with {config.optimizer}: use --to=safetensors'
    )
  key = jax.device_get(state.state['key'])
  queue = jax.device_get(state.state['queue'])
  # optax keeps the sum of gradients without the learning rate, as PyTorch does.
  is_trace = lambda part: isinstance(part, optax.TraceState)  # noqa: E731
  traces = [x.trace for x in jax.tree.leaves(state.opt_state, is_leaf=is_trace) if is_trace(x)]
  batch, examples = config.batch_size, config.data.examples
  return {
    'key': {
      part: {'params': key['params'][part], 'batch_stats': key['stats'][part]}
      for part in ('encoder', 'head')
    },
    'queue': queue['rows'],
    'pointer': int(queue['pointer']),
    'momentum': jax.device_get(traces[0]) if traces else {},
    'epoch': ((int(state.step) + 1) * batch - 1) // examples,  # finished ones
    'group': {
      'lr': rate, 'momentum': config.momentum, 'dampening': 0, 'weight_decay': config.weight_decay,
      'nesterov': config.optimizer == 'nesterov',
    },
  }  # fmt: skip


def check(model: Model) -> None:
  """Raises ConfigError if facebookresearch/moco has no class that computes the network exactly."""
  torch_files.check_class(model, 'MoCo', torch_loader.TORCHVISION)
  a = model.architecture
  if (
    model.kept > 2
    or a['head_norm'] != 'none'
    or (model.kept == 2 and a['head_hidden'] not in (0, _features(model)))
  ):
    raise ConfigError(
      "MoCo's projection head has one or two linear layers without BatchNorm: use --to=safetensors --with=projector"
    )


def _features(model):
  return model.variables['head']['params']['dense1']['kernel'].shape[0]


def needs(model: Model) -> str:
  """What loads the file, in one line."""
  mlp = ' --mlp' * (model.kept == 2)
  return (
    f'main_moco.py --resume={FILE} --arch=resnet{model.architecture["depth"]}{mlp} goes on, main_lincls.py '
    f'--pretrained={FILE} evaluates; they need torch and torchvision'
  )


def write(model: Model, folder: pathlib.Path) -> bool:
  """Writes the files of a network into a folder; returns whether the network takes images of any size."""
  pickles.write(folder / FILE, _content(model))
  return True


def _content(model: Model) -> dict[str, Any]:
  """What `torch.load` returns."""
  assert model.training is not None
  t = model.training
  tensors = {
    'module.queue': np.ascontiguousarray(t['queue'].T),
    'module.queue_ptr': np.array([t['pointer']], np.int64),
  }
  names = {'encoder': torch_names.encoder(model.architecture), 'head': _head_names(model)}
  for prefix, variables in ((QUERY, model.variables), (KEY, t['key'])):
    for part, fc in (('encoder', ''), ('head', 'fc.')):
      tensors |= torch_names.to_torch(names[part], variables[part], prefix + fc)
  learned = [name for part in names.values() for name in part if name.path[0] == 'params']
  buffers = {}
  if t['momentum']:
    values: dict[str, np.ndarray] = {}
    for part, group in names.items():
      own = [name for name in group if name.path[0] == 'params']
      found = torch_names.to_torch(own, {'params': t['momentum'][part]}, f'{part} ')
      values |= found
    buffers = {i: {'momentum_buffer': x} for i, x in enumerate(values.values())}
  group = {**t['group'], 'params': list(range(2 * len(learned)))}
  return {
    'epoch': t['epoch'],
    'arch': f'resnet{model.architecture["depth"]}',
    'state_dict': tensors,
    'optimizer': {'state': buffers, 'param_groups': [group]},
  }


def _head_names(model):
  return torch_names.head(model.architecture, _features(model), model.kept)


def read(model: Model, folder: pathlib.Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """A function from images `[n, h, w, c]` in [0, 1] to the outputs, computed from the files by another library.

  Raises:
    ValueError: the file contains something else than was written.
  """
  found, wanted = pickles.read(folder / FILE), _content(model)
  paths = [jax.tree_util.tree_leaves_with_path(tree) for tree in (found, wanted)]
  for (path, x), (expected, y) in zip(*paths, strict=True):
    if path != expected or np.shape(x) != np.shape(y) or not np.array_equal(x, y):
      raise ValueError(f'{jax.tree_util.keystr(path)} was not written as it is')
  tensors = {
    name.removeprefix(QUERY): x for name, x in found['state_dict'].items() if name.startswith(QUERY)
  }
  return torch_files.reader(model, tensors)


def usage(model: Model) -> str:
  """A program in Python that loads the files."""
  return (
    f"import torch\n\ncheckpoint = torch.load('{FILE}', weights_only=True)\n"
    "weights = checkpoint['state_dict']  # module.encoder_q.*, module.encoder_k.*, module.queue\n"
  )


def limits(model: Model) -> list[str]:
  """Sentences about what goes wrong without an error."""
  return [
    "main_lincls.py drops module.encoder_q.fc.*, the projection head, as for MoCo's own checkpoints.",
    'main_moco.py starts at the last epoch that is complete, and takes learning rate, batch size and temperature from its '
    'command line, not from the file.',
  ]
