"""Writes a network in the format of another tool, and proves that the tool computes the same.

A format is a module with

  READER           the name of the library that reads the files back
  check(model)     raises ConfigError if the format cannot contain the network exactly
  write(model, folder)   writes the files; returns whether the network takes images of any size
  read(model, folder)    a function from images to outputs, computed from the files by another library
  needs(model)     what loads the files, in one line
  usage(model)     a program that loads the files
  limits(model)    sentences about what goes wrong without an error
"""

import importlib
import pathlib
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from simclr_jax.data import Dataset
from simclr_jax.encoder import preprocess
from simclr_jax.errors import ConfigError
from simclr_jax.interop import card, orbax
from simclr_jax.interop.model import Model
from simclr_jax.runtime import files, paths
from simclr_jax.runtime.text import printable

MODULES = {
  'safetensors': 'safetensors_file', 'timm': 'timm_folder', 'huggingface': 'timm_folder', 'detectron2': 'detectron2_file',
  'moco': 'moco_checkpoint', 'onnx': 'onnx_model', 'stablehlo': 'stablehlo', 'savedmodel': 'savedmodel',
}  # fmt: skip
# Stem -> sizes of the images (height, width) of the check: all maps that are strided are even for the first, and odd for
# the second, so that wrong padding shows.
SIZES = {
  'imagenet': ((96, 96), (97, 65)),
  'strided': ((64, 64), (65, 33)),
  'cifar': ((32, 32), (33, 17)),
}
IMAGES = 4
TOLERANCE = 1e-5  # relative difference of the outputs


def module(name: str) -> ModuleType:
  """The module of a format, a key of `MODULES`."""
  return importlib.import_module(f'simclr_jax.interop.{MODULES[name]}')


def check(model: Model, name: str, out: pathlib.Path) -> None:
  """Checks that a network can be exported.

  Raises:
    ConfigError: the format cannot contain it exactly, or `out` is not a new local folder.
  """
  if paths.is_remote(out):
    raise ConfigError(
      f'--out={out}: --to={name} writes local folders only, copy the folder afterwards'
    )
  orbax.check_out(out)
  module(name).check(model)


def write(
  model: Model,
  name: str,
  out: pathlib.Path,
  dataset: Dataset,
  images: str,
  license: str = '',
  results: Sequence[str] = (),
) -> dict[str, Any]:
  """Writes a network to the new folder `out` and reads it back; a failure leaves nothing behind.

  Args:
    model: the network; see `check`.
    name: the format.
    out: the folder.
    dataset: images on which the outputs are compared.
    images: their description.
    license: of the weights, for the model card.
    results: tables of evaluations as text, for the model card.

  Returns:
    What `verified.json` contains: `format`, `reader`, `images`, `seconds`, `tolerance`, and `difference`: size of the
    images -> output -> the largest difference, relative to the largest value.

  Raises:
    ConfigError: see `check`.
    OSError: the folder cannot be written, or its outputs are not those of the network; one sentence.
  """
  check(model, name, out)
  start, target = time.monotonic(), module(name)
  with files.new_folder(out) as folder:
    any_size = target.write(model, folder)
    verified = {
      'format': name,
      'reader': target.READER,
      'images': images,
      'tolerance': TOLERANCE,
      'difference': _differences(model, target, folder, dataset, any_size, out),
      'seconds': round(time.monotonic() - start, 1),
    }
    files.write_json(folder / 'verified.json', verified)
    text = card.text(model, name, target, verified, license, list(results))
    files.write_text(folder / 'README.md', text)
  return verified


def _differences(model, target, folder, dataset, any_size, out) -> dict[str, dict[str, float]]:
  """`difference` of `verified.json`; raises OSError if one is above the tolerance."""
  a = model.architecture
  sizes = (
    SIZES[a['stem']] if not a['encoder'] else ((a['image_size'],) * 2, (a['image_size'] + 1,) * 2)
  )
  inputs = {
    f'{h}x{w}': _views(dataset, h, w, a.get('channels', 3)) for h, w in sizes[: 1 + any_size]
  }
  try:
    run = target.read(model, folder)
    found = {size: run(x) for size, x in inputs.items()}
  except ConfigError:
    raise
  except Exception as error:  # the libraries raise many types
    reason = printable(f'{type(error).__name__}: {error}')[:200]
    raise OSError(
      f'{out} was not written: {target.READER} cannot read it back: {reason}'
    ) from error
  result = {
    size: {name: _difference(found[size][name], y) for name, y in model.outputs(x).items()}
    for size, x in inputs.items()
  }
  for size, values in result.items():
    for name, value in values.items():
      if not value <= TOLERANCE:
        raise OSError(
          f'{out} was not written: the {name} that {target.READER} computes from it differ by {value:.1e} at {size} '
          f'pixels, more than {TOLERANCE:.0e}'
        )
  return result


def _difference(found, wanted) -> float:
  """The largest difference, relative to the largest value; infinite for other shapes."""
  if found.shape != wanted.shape:
    return float('inf')
  return float(np.abs(found - wanted).max() / (np.abs(wanted).max() or 1))


def _views(dataset, height, width, channels):
  """Images, float32 `[n, height, width, channels]` in [0, 1]; missing channels are repeated."""
  x, _ = preprocess(dataset.sample(IMAGES), 'center_crop(1)', max(height, width))
  return np.ascontiguousarray(x[:, :height, :width, np.arange(channels) % x.shape[-1]])
