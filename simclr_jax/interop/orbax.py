"""Encoders as Orbax checkpoints that can be read without this package.

An exported folder holds `variables/`, an Orbax checkpoint of `params` and `batch_stats`, and
`encoder.json`: the architecture, the preprocessing and the provenance of the weights.
"""

import json
import os
import pathlib

import jax

from simclr_jax.config import upgraded_architecture
from simclr_jax.data import augment
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.models import encoders, resnet
from simclr_jax.runtime import checkpoint, files, paths


def is_export(folder: pathlib.Path) -> bool:
  """Whether `export` wrote the folder."""
  return (folder / 'encoder.json').is_file()


def load(folder: pathlib.Path) -> Encoder:
  """The encoder of an exported folder.

  Raises:
    CheckpointError: `encoder.json` or the weights are damaged.
    ConfigError: a file of the user's own that the encoder needs is missing or has changed.
  """
  card = folder / 'encoder.json'
  try:
    description = json.loads(card.read_text())
    architecture = upgraded_architecture(description['architecture'])
    provenance = description['provenance']
    encoders.build(architecture)
  except ConfigError:
    raise
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise checkpoint.CheckpointError(
      f'{card} is damaged, or was written by another version: {error}'
    ) from None
  variables, _ = checkpoint.load_tree(folder / 'variables')
  return Encoder(architecture, variables, provenance)


def export(encoder: Encoder, out: str | os.PathLike) -> None:
  """Writes `encoder` to the new folder `out`.

  Raises:
    ConfigError: `out` exists and is not an empty folder.
  """
  out = paths.path(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ConfigError(f'--out={out} exists already: name a new folder')
  out.mkdir(parents=True, exist_ok=True)
  checkpoint.save_tree(out / 'variables', jax.device_get(encoder.variables), {})
  description = {
    'architecture': encoder.architecture,
    'preprocessing': _preprocessing(encoder.architecture),
    'provenance': encoder.provenance,
  }
  files.write_json(out / 'encoder.json', description)


def _preprocessing(architecture):
  """What happens to an image before the first convolution."""
  size, view = architecture['image_size'], architecture['eval_view']
  mean, std = resnet.NORMALIZE.get(architecture['normalize'], ((0, 0, 0), (1, 1, 1)))
  return {
    'size': [size, size],
    'pipeline': augment.PIPELINES.get(view, view),  # an image of that size is not cropped
    'range': [0, 1],  # then, inside the network: (x - mean) / std
    'mean': list(mean),
    'std': list(std),
    'layout': 'NHWC, RGB',
  }
