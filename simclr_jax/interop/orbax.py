"""Exports encoders as Orbax checkpoints that can be read without this package, and loads them.

An exported folder contains `variables/`, an Orbax checkpoint of `params` and `batch_stats`, and `encoder.json` with the
architecture, the preprocessing and the provenance of the weights.
"""

import json
import os
import pathlib

import jax

from simclr_jax.data import augment
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.models import encoders, resnet
from simclr_jax.run_config import upgraded_architecture
from simclr_jax.runtime import checkpoint, files, paths
from simclr_jax.runtime.checksum import crc32


def is_export(folder: pathlib.Path) -> bool:
  """Whether the folder is an exported encoder."""
  return (folder / 'encoder.json').is_file()


def load(folder: pathlib.Path) -> Encoder:
  """Loads an exported encoder.

  Raises:
    CheckpointError: `encoder.json` or the weights are damaged.
    ConfigError: a Python file that the encoder needs is missing or has changed.
  """
  path = folder / 'encoder.json'
  try:
    description = json.loads(path.read_text())
    checksum = description.pop('checksum', None)  # old exports have none
    if checksum not in (None, _checksum(description)):
      raise ConfigError(
        f'{path} was edited after the export, which changes the features: restore the file or export again'
      )
    architecture = upgraded_architecture(description['architecture'])
    provenance = description['provenance']
    encoders.build(architecture)
  except ConfigError:
    raise
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise checkpoint.CheckpointError(
      f'{path} is damaged, or was written by another version: {error}'
    ) from None
  variables, _ = checkpoint.load_tree(folder / 'variables')
  return Encoder(architecture, variables, provenance)


def export(encoder: Encoder, out: str | os.PathLike) -> None:
  """Writes an encoder to the folder `out`, which must be new or empty.

  Raises:
    ConfigError: `out` exists and is not an empty folder.
  """
  out = paths.path(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ConfigError(f'--out={out} exists already: choose a new or empty folder')
  out.mkdir(parents=True, exist_ok=True)
  checkpoint.save_tree(out / 'variables', jax.device_get(encoder.variables), {})
  description = {
    'architecture': encoder.architecture,
    'preprocessing': _preprocessing(encoder.architecture),
    'provenance': encoder.provenance,
  }
  files.write_json(out / 'encoder.json', {**description, 'checksum': _checksum(description)})


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
