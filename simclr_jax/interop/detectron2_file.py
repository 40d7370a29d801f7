"""Format detectron2: a pickle of numpy arrays with the names of detectron2's ResNet."""

import pathlib
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from simclr_jax.errors import ConfigError
from simclr_jax.interop import torch_files, torch_loader
from simclr_jax.interop.model import Model, normalization
from simclr_jax.runtime import files

READER = torch_files.READER
FILE = 'model.pkl'


def check(model: Model) -> None:
  """Raises ConfigError if detectron2 has no class that computes the network exactly."""
  # detectron2's ResNet-18 and 34 have 64 channels in the first group.
  wide = model.architecture['depth'] >= 50
  torch_files.check_class(model, 'detectron2', torch_loader.TORCHVISION, wide)
  if model.top:
    raise ConfigError('detectron2 loads the encoder only: leave out --with')


def needs(model: Model) -> str:
  """What loads the file, in one line."""
  return 'detectron2 loads model.pkl with the keys in README.md'


def write(model: Model, folder: pathlib.Path) -> bool:
  """Writes the files of a network into a folder; returns whether the network takes images of any size."""
  tensors = {_renamed(name): x for name, x in model.tensors().items()}
  content = {'model': tensors, '__author__': 'simclr_jax', 'matching_heuristics': True}
  with files.atomic(folder / FILE) as file:
    pickler = pickle.Pickler(file, protocol=5)
    # By default, numpy 2 names a module that numpy 1 does not have.
    pickler.dispatch_table = {
      np.ndarray: lambda x: (np.ndarray, (x.shape, x.dtype.str, bytearray(x.tobytes())))
    }
    pickler.dump(content)
  return True


def _renamed(name: str) -> str:
  """torchvision's name of a tensor -> detectron2's."""
  if not name.startswith('layer'):
    name = f'stem.{name}'
  name = re.sub(r'^layer(\d)', lambda match: f'res{int(match[1]) + 1}', name)
  name = re.sub(r'\bbn(\d)\b', r'conv\1.norm', name)
  return name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')


class _Unpickler(pickle.Unpickler):
  """Reads a pickle in which nothing but `numpy.ndarray` is called."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) != ('numpy', 'ndarray'):
      raise pickle.UnpicklingError(f'{module}.{name}')
    return np.ndarray


def read(model: Model, folder: pathlib.Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """A function from images `[n, h, w, c]` in [0, 1] to the outputs, computed from the files by another library."""
  with files.open_to_read(folder / FILE) as file:
    found = _Unpickler(file).load()['model']
  tensors = {}
  for name, x in found.items():
    name = name.removeprefix('stem.')
    name = name.replace('shortcut.norm', 'downsample.1').replace('shortcut', 'downsample.0')
    name = re.sub(r'conv(\d)\.norm', r'bn\1', name)
    tensors[re.sub(r'^res(\d)', lambda match: f'layer{int(match[1]) - 1}', name)] = x
  return torch_files.reader(model, tensors)


def usage(model: Model) -> str:
  """The keys of the configuration that load the file."""
  a = model.architecture
  mean, std = ([round(255 * x, 3) for x in values] for values in normalization(a))
  width = int(64 * a['width_multiplier'])
  out = width * (4 if a['depth'] >= 50 else 1)
  return (
    f'MODEL:\n  WEIGHTS: {FILE}\n  PIXEL_MEAN: {mean}\n  PIXEL_STD: {std}\n  RESNETS:\n    DEPTH: {a["depth"]}\n'
    f'    STRIDE_IN_1X1: False\n    STEM_OUT_CHANNELS: {width}\n    RES2_OUT_CHANNELS: {out}\n'
    f'    WIDTH_PER_GROUP: {width}\nINPUT:\n  FORMAT: RGB\n'
  )


def limits(model: Model) -> list[str]:
  """Sentences about what goes wrong without an error."""
  return [
    "detectron2's default of MODEL.RESNETS.NORM is FrozenBN, and its default of MODEL.BACKBONE.FREEZE_AT is 2: the "
    'published transfer results of MoCo train all BatchNorm layers, synchronised over the GPUs.',
    "With detectron2's default STRIDE_IN_1X1: True, the weights load without an error and the features are wrong.",
  ]
