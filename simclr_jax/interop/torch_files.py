"""Files of PyTorch's tensors: what the formats safetensors, timm, detectron2 and MoCo share."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

from simclr_jax.errors import ConfigError
from simclr_jax.interop import numpy_reader
from simclr_jax.interop.model import Model, check_weights, normalization, view
from simclr_jax.interop.torch_loader import obstacle
from simclr_jax.models import resnet
from simclr_jax.runtime import files

Tensors = Mapping[str, np.ndarray]
WEIGHTS = 'model.safetensors'
READER = 'numpy, with the layers of PyTorch'


def check_class(model: Model, target: str, depths: tuple[int, ...], wide: bool = False) -> None:
  """Checks that a class of a target computes a network exactly; the arguments as for `torch_loader.obstacle`.

  Raises:
    ConfigError: it does not, with the format that works.
  """
  reason = obstacle(model.architecture, depths, wide)
  if reason:
    works = 'stablehlo' if model.architecture['encoder'] else 'safetensors'
    how = 'which' if model.architecture['encoder'] else 'whose load_torch.py'
    raise ConfigError(
      f'{target} has no class that computes {reason}: use --to={works}, {how} is exact'
    )


def save(path: pathlib.Path, tensors: Tensors, about: Mapping[str, Any]) -> None:
  """Writes a safetensors file; `about`: plain data, for its metadata."""
  metadata = {'format': 'pt', 'simclr_jax': json.dumps(about, sort_keys=True)}
  with files.atomic(path) as file:
    file.write(safetensors.save(dict(tensors), metadata))


def about(model: Model) -> dict[str, Any]:
  """Architecture, preprocessing and provenance of a network, short."""
  mean, std = normalization(model.architecture)
  keys = ('step', 'checksum', 'network', 'versions')
  return {
    'architecture': model.architecture,
    'preprocessing': {'range': [0, 1], 'mean': mean, 'std': std, **view(model.architecture)},
    'provenance': {k: model.provenance[k] for k in keys if k in model.provenance},
  }


def reader(model: Model, tensors: Tensors) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """A function from images `[n, h, w, c]` in [0, 1] to the outputs, computed from tensors with torchvision's names.

  It computes what the class of the target or `load_torch.py` does.

  Raises:
    ValueError: the tensors are not those of the network.
  """
  check_weights(tensors, model.tensors())
  a = model.architecture
  _, stride, pool = resnet.STEMS[a['stem']]
  mean, std = normalization(a)
  layout = numpy_reader.Layout(
    stride, pool, a['variant'] != 'torchvision', a['variant'] == 'haiku', mean, std
  )

  def run(x):
    h, top = numpy_reader.outputs(tensors, layout, x)
    return {'features': h} if top is None else {'features': h, model.top: top}

  return run
