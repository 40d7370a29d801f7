"""Every format with five networks: the relative difference of the features, and the seconds of an export.

Prints the table of docs/weights.md. Needs the packages of `make test-interop`, a quarter of an hour on two cores, and
2 GB of memory. The weights are random: the numbers are about the files, not about accuracy.
"""

import argparse
import pathlib
import shutil
import tempfile
import time

import torch  # isort: skip  (TensorFlow and PyTorch work in one process only in this order)

import jax
import numpy as np
import torchvision
from sklearn.datasets import load_sample_images

from simclr_jax import config as recipes, encoder
from simclr_jax.data import objects
from simclr_jax.errors import ConfigError
from simclr_jax.interop import export, model as models, torch_loader

NETWORKS = {
  'ResNet-18, CIFAR stem': {'depth': 18, 'stem': 'cifar'},
  'ResNet-50': {'depth': 50},
  'ResNet-50, selective kernels': {'depth': 50, 'sk_ratio': 0.0625},
  'ResNet-18, squeeze and excitation': {'depth': 18, 'se_ratio': 0.0625},
  'ResNet-50, variant torchvision': {'depth': 50, 'variant': 'torchvision', 'normalize': 'imagenet'},
}  # fmt: skip
FORMATS = ('safetensors', 'timm', 'detectron2', 'onnx', 'stablehlo', 'savedmodel')


def main() -> None:
  """Prints a line for every network and format."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--networks', nargs='*', default=list(NETWORKS), choices=NETWORKS)
  parser.add_argument('--formats', nargs='*', default=FORMATS, choices=FORMATS)
  args = parser.parse_args()
  photos = objects.dataset(load_sample_images()['images'])
  print(
    '| network | format | read by | even sizes | odd sizes | seconds |\n|---|---|---|---|---|---|'
  )
  for name in args.networks:
    fields = {'stem': 'imagenet', **NETWORKS[name]}
    config = recipes.load('simclr_images', {f'model.{k}': v for k, v in fields.items()})
    a = recipes.architecture(config)
    model = models.of(encoder.Encoder(a, _weights(encoder.shapes(a))))
    for fmt in args.formats:
      print(f'| {name} | {fmt} | {_row(model, fmt, photos)} |', flush=True)
    if 'safetensors' in args.formats:
      print(f'| {name} | safetensors | {_torch_row(model)} |', flush=True)


def _row(model, name, photos):
  """Reader, differences and seconds of an export, or why it is refused."""
  folder = pathlib.Path(tempfile.mkdtemp())
  try:
    verified = export.write(model, name, folder / 'out', photos, 'two photographs')
  except ConfigError as error:
    return f'refused: {str(error).split(":")[0]} | | |'
  finally:
    shutil.rmtree(folder)
  even, odd = (f'{values["features"]:.1e}' for values in verified['difference'].values())
  return f'{verified["reader"]} | {even} | {odd} | {verified["seconds"]:.1f}'


def _torch_row(model):
  """The same for PyTorch with the program `load_torch.py`, or torchvision's class."""
  start, folder = time.monotonic(), pathlib.Path(tempfile.mkdtemp())
  export.module('safetensors').write(model, folder)
  if torch_loader.is_needed(model):
    scope = {'__file__': str(folder / 'load_torch.py')}
    exec((folder / 'load_torch.py').read_text(), scope)
    net, by = scope['load'](), f'torch {torch.__version__}, load_torch.py'
  else:
    net = torchvision.models.resnet50()
    net.fc = torch.nn.Identity()
    net.load_state_dict({k: torch.from_numpy(x.copy()) for k, x in model.tensors().items()})
    net, by = net.eval(), f'torchvision {torchvision.__version__}'
  shutil.rmtree(folder)
  mean, std = (np.float32(x) for x in models.normalization(model.architecture))
  differences = []
  for h, w in export.SIZES[model.architecture['stem']]:
    x = np.random.default_rng(0).random((export.IMAGES, h, w, 3), np.float32)
    with torch.no_grad():
      y = net(torch.from_numpy(((x - mean) / std).transpose(0, 3, 1, 2))).numpy()
    wanted = model.outputs(x)['features']
    differences.append(f'{np.abs(y - wanted).max() / np.abs(wanted).max():.1e}')
  return f'{by} | {" | ".join(differences)} | {time.monotonic() - start:.1f}'


def _weights(shapes):
  """Random weights with which activations keep their size."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    leaf = path[-1].key
    if leaf == 'kernel':
      return rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape).astype(np.float32)
    if leaf in ('scale', 'var'):
      return rng.uniform(0.5, 1.0, x.shape).astype(np.float32)
    return rng.normal(0, 0.1, x.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


if __name__ == '__main__':
  main()
