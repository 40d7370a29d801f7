"""Format safetensors: tensors with the names of torchvision, and `load_torch.py` where no class of torchvision is exact."""

import pathlib
from collections.abc import Callable

import numpy as np
from safetensors import numpy as safetensors

from simclr_jax.interop import torch_files, torch_loader
from simclr_jax.interop.model import Model, normalization
from simclr_jax.runtime import files

READER = torch_files.READER


def check(model: Model) -> None:
  """Raises ConfigError if the format has no names for the network."""
  model.tensors()


def needs(model: Model) -> str:
  """What loads the file, in one line."""
  if not torch_loader.is_needed(model):
    return f'torchvision.models.resnet{model.architecture["depth"]} loads the file as it is'
  return f'load_torch.py builds the network; it needs {torch_loader.needs(model.architecture)}'


def write(model: Model, folder: pathlib.Path) -> bool:
  """Writes the files of a network into a folder; returns whether the network takes images of any size."""
  torch_files.save(folder / torch_files.WEIGHTS, model.tensors(), torch_files.about(model))
  if torch_loader.is_needed(model):
    program = torch_loader.text(model, *normalization(model.architecture))
    files.write_text(folder / 'load_torch.py', program)
  return True


def read(model: Model, folder: pathlib.Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """A function from images `[n, h, w, c]` in [0, 1] to the outputs, computed from the files by another library."""
  return torch_files.reader(model, safetensors.load_file(folder / torch_files.WEIGHTS))


def usage(model: Model) -> str:
  """A program in Python that loads the files."""
  if torch_loader.is_needed(model):
    return 'from load_torch import load\n\nmodel = load()\n'
  options = f'num_classes={model.classes}' if model.classes else ''
  top = '' if model.classes else 'model.fc = torch.nn.Identity()\n'
  return (
    'import torch\nimport torchvision\nfrom safetensors.torch import load_file\n\n'
    f'model = torchvision.models.resnet{model.architecture["depth"]}({options})\n{top}'
    f"model.load_state_dict(load_file('{torch_files.WEIGHTS}'))\nmodel.eval()\n"
  )


def limits(model: Model) -> list[str]:
  """Sentences about what goes wrong without an error."""
  if not torch_loader.is_needed(model):
    return []
  sentences = [
    'With `strict=False`, PyTorch loads these weights into other classes without an error, and the features are wrong: '
    'load_torch.py loads them strictly.'
  ]
  a = model.architecture
  if a['variant'] != 'torchvision' and a['stem'] == 'imagenet':
    sentences.append(
      "torchvision's max-pooling pads one pixel on every side, this network as TensorFlow does: for even sizes the "
      'features of the torchvision class differ by about 1 %.'
    )
  return sentences
