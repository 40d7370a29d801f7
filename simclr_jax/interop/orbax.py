"""Exports encoders as Orbax checkpoints that can be read without this package, and loads them.

An exported folder contains `variables/`, an Orbax checkpoint of `params` and `batch_stats`, and `encoder.json` with the
architecture, the preprocessing and the provenance of the weights; `head/`, if the projection head goes along.
"""

import json
import os
import pathlib
from typing import Any

import jax

from simclr_jax import run_config
from simclr_jax.data import augment
from simclr_jax.encoder import Encoder, head_shapes, shapes
from simclr_jax.errors import ConfigError
from simclr_jax.models import resnet
from simclr_jax.runtime import checkpoint, files, paths
from simclr_jax.runtime.checksum import crc32
from simclr_jax.validation import check_json

PyTree = Any

DESCRIPTION = {  # encoder.json, for `check_json`
  'architecture': {str: run_config.VALUE}, 'checksum?': int,
  'provenance': {
    'workdir?': str, 'weights?': str, 'step?': int, 'checksum?': (str, int), 'config?': run_config.RECIPE, 'versions?': {str: str},
  },
}  # fmt: skip


def is_export(folder: pathlib.Path) -> bool:
  """Whether the folder is an exported encoder."""
  return (folder / 'encoder.json').is_file()


def load(folder: pathlib.Path) -> Encoder:
  """Loads an exported encoder.

  Raises:
    CheckpointError: the weights are damaged.
    ConfigError: `encoder.json` is damaged or was edited, or a Python file that the encoder needs is missing or has
      changed.
  """
  path = folder / 'encoder.json'
  description = files.read_json(path)
  check_json(description, DESCRIPTION, f'{path} is damaged: it')
  checksum = description.pop('checksum', None)  # old exports have none
  if checksum not in (None, _checksum(description)):
    raise ConfigError(
      f'{path} was edited after the export, which changes the features: restore the file or export again'
    )
  try:
    architecture = run_config.upgraded_architecture(description['architecture'])
    target = shapes(architecture)
  except ConfigError as error:
    raise ConfigError(f'{path}: {error}') from None
  variables, _ = checkpoint.load_tree(folder / 'variables', target)
  return Encoder(architecture, variables, description['provenance'])


def load_head(folder: pathlib.Path, architecture: dict[str, Any]) -> PyTree | None:
  """The flax variables of the projection head of an exported encoder of this architecture; None without one.

  Raises:
    CheckpointError: the weights are damaged.
  """
  if not (folder / 'head').is_dir():
    return None
  return checkpoint.load_tree(folder / 'head', head_shapes(architecture))[0]


def export(encoder: Encoder, out: str | os.PathLike, head: PyTree | None = None) -> None:
  """Writes an encoder to the folder `out`, which must be new or empty; a failure leaves nothing behind.

  Args:
    encoder: the encoder.
    out: the folder.
    head: flax variables of its projection head, which goes along; None: it does not.

  Raises:
    ConfigError: `out` exists and is not an empty folder.
    OSError, CheckpointError: the folder cannot be written.
  """
  out = paths.path(out)
  check_out(out)
  description = {
    'architecture': encoder.architecture,
    'preprocessing': _preprocessing(encoder.architecture),
    'provenance': encoder.provenance,
  }
  with files.new_folder(out) as folder:
    try:
      checkpoint.save_tree(folder / 'variables', jax.device_get(encoder.variables), {})
      if head:
        checkpoint.save_tree(folder / 'head', jax.device_get(head), {})
    except checkpoint.CheckpointError as error:
      raise checkpoint.CheckpointError(str(error).replace(str(folder), str(out))) from error
    files.write_json(folder / 'encoder.json', {**description, 'checksum': _checksum(description)})


def check_out(out: pathlib.Path) -> None:
  """Raises ConfigError if `out` exists and is not an empty folder."""
  if (out.is_symlink() if not paths.is_remote(out) else False) or (
    out.exists() and (not out.is_dir() or any(out.iterdir()))
  ):
    raise ConfigError(f'--out={out} exists already: choose a new or empty folder')


def _checksum(description):
  return crc32(json.dumps(description, sort_keys=True))


def _preprocessing(architecture):
  """The preprocessing of images, as plain data for other programs."""
  size, view = architecture['image_size'], architecture['eval_view']
  mean, std = resnet.NORMALIZE.get(architecture['normalize'], ((0, 0, 0), (1, 1, 1)))
  return {
    'size': [size, size],
    'pipeline': augment.PIPELINES.get(view, view),  # for images of another size
    'range': [0, 1],  # of the input of the network, which computes (x - mean) / std
    'mean': list(mean),
    'std': list(std),
    'layout': 'NHWC, RGB',
  }
