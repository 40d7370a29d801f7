"""Format timm, which is that of the Hugging Face Hub: a folder that `timm.create_model('local-dir:FOLDER')` loads."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

from simclr_jax.errors import ConfigError
from simclr_jax.interop import torch_files, torch_loader
from simclr_jax.interop.model import Model, normalization, view
from simclr_jax.runtime import files

READER = torch_files.READER
DEPTHS = (*torch_loader.TORCHVISION, 200)


def check(model: Model) -> None:
  """Raises ConfigError if timm has no class that computes the network exactly."""
  torch_files.check_class(model, 'timm', DEPTHS)
  if model.kept:
    raise ConfigError(
      "timm's classes have no projection head: use --to=safetensors, or leave out --with"
    )


def needs(model: Model) -> str:
  """What loads the folder, in one line."""
  return "timm.create_model('local-dir:FOLDER', pretrained=True) loads the folder; it needs torch and timm"


def write(model: Model, folder: pathlib.Path) -> bool:
  """Writes the files of a network into a folder; returns whether the network takes images of any size."""
  torch_files.save(folder / torch_files.WEIGHTS, model.tensors(), torch_files.about(model))
  files.write_json(folder / 'config.json', _config(model))
  return True


def _config(model: Model) -> dict[str, Any]:
  a = model.architecture
  mean, std = normalization(a)
  size = a['image_size']
  features = len(model.tensors()['layer4.0.bn1.weight']) * (4 if a['depth'] >= 50 else 1)
  return {
    'architecture': f'resnet{a["depth"]}',
    'num_classes': model.classes,
    'num_features': features,
    'pretrained_cfg': {
      'tag': 'simclr_jax',
      'input_size': [3, size, size],
      'fixed_input_size': False,
      **(view(a) or {'crop_pct': 1.0, 'crop_mode': 'center', 'interpolation': 'bicubic'}),
      'mean': mean,
      'std': std,
      'num_classes': model.classes,
      'pool_size': [math.ceil(size / 32)] * 2,
      'first_conv': 'conv1',
      'classifier': 'fc',
    },
  }


def read(model: Model, folder: pathlib.Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """A function from images `[n, h, w, c]` in [0, 1] to the outputs, computed from the files by another library."""
  return torch_files.reader(model, safetensors.load_file(folder / torch_files.WEIGHTS))


def usage(model: Model) -> str:
  """A program in Python that loads the files."""
  return (
    "import timm\n\nmodel = timm.create_model('local-dir:.', pretrained=True).eval()\n"
    'view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n'
  )


def limits(model: Model) -> list[str]:
  """Sentences about what goes wrong without an error."""
  return [] if model.classes else [
    'Another number of classes than 0 adds a classifier with random weights: train it first.'
  ]  # fmt: skip
