"""Encoders as Orbax checkpoints that need nothing of this project to be read.

An exported folder holds `variables/`, an Orbax checkpoint of `params` and `batch_stats`, and
`encoder.json`: the architecture, the preprocessing and where the weights come from.
"""

import json
import pathlib
from typing import Any

import jax

from simclr_jax import checkpoint, config as recipes, methods, optim, paths, train_state
from simclr_jax.data import augment
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate.features import Encoder
from simclr_jax.models import resnet


def load_encoder(folder: str | pathlib.Path) -> Encoder:
  """The encoder of a run's workdir (its newest readable checkpoint) or of an exported folder.

  Raises:
    ConfigError: `folder` is neither.
    CheckpointError: what it holds cannot be read or is damaged.
  """
  folder = paths.path(folder)
  card = folder / 'encoder.json'
  if card.is_file():
    try:
      description = json.loads(card.read_text())
      architecture, provenance = description['architecture'], description['provenance']
      resnet.from_config(architecture)
    except (ValueError, KeyError, TypeError) as error:
      raise checkpoint.CheckpointError(
        f'{card} is damaged, or was written by another version: {error}'
      ) from None
    variables, _ = checkpoint.load_tree(folder / 'variables')
    return Encoder(architecture, variables, provenance)
  if not (folder / 'config.json').is_file():
    raise ConfigError(
      f'{folder} is neither the workdir of a run (config.json) nor an exported encoder (encoder.json)'
    )
  return _from_run(folder)


def load_tower(folder: str | pathlib.Path, head: bool) -> dict[str, Any]:
  """What a training can begin with: `params` and `batch_stats` of 'encoder' and, with `head`, 'head'.

  Raises:
    ConfigError: `folder` is neither a run nor an exported encoder, or that lacks the head.
    CheckpointError: as of `load_encoder`.
  """
  folder = paths.path(folder)
  if (folder / 'config.json').is_file():
    _, _, state, _ = _restore(folder)
    params, stats = state.params, state.state['stats']
    frozen = state.state.get('frozen', {})
    found = {
      'params': {'encoder': {**frozen, **params['encoder']}, 'head': params['head']},
      'batch_stats': {'encoder': stats['encoder'], 'head': stats['head']},
    }
    return jax.device_get(found)
  if head:
    raise ConfigError(
      f'{folder} is not the workdir of a run, and only these hold the projection head: set head_layer=0'
    )
  variables = load_encoder(folder).variables
  return {key: {'encoder': part, 'head': {}} for key, part in variables.items()}


def load_classifier(workdir: str | pathlib.Path) -> Encoder:
  """The network of a run with a classifier: its `embed` gives logits `[n, classes]`.

  Raises:
    ConfigError: `workdir` holds no such run.
    CheckpointError: as of `load_encoder`.
  """
  workdir = paths.path(workdir)
  config, method, state, metadata = _restore(workdir)
  if not method.classifier:
    raise ConfigError(f'{workdir} has no classifier: it was trained with method={config.method}')
  return Encoder(
    recipes.architecture(config, classifier=True),
    method.classifier(state.params, state.state),
    _provenance(workdir, metadata),
  )


def _from_run(workdir):
  config, method, state, metadata = _restore(workdir)
  variables = method.encoder(state.params, state.state)
  return Encoder(recipes.architecture(config), variables, _provenance(workdir, metadata))


def _provenance(workdir, metadata):
  return {'workdir': str(workdir), **{k: metadata[k] for k in ('step', 'config', 'versions')}}


def _restore(workdir):
  """(recipe, method, state, metadata) of a run's newest readable checkpoint."""
  config = recipes.from_dict(recipes.read_run(workdir))
  method = methods.build(config)
  rate = optim.schedule(config, config.data.examples)

  def fresh():
    return train_state.create(method, optim.build(config, rate), config.seed, config.image_size)

  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), jax.eval_shape(fresh)
  )
  restored = checkpoint.restore(workdir / 'checkpoints', target)
  if restored is None:
    raise ConfigError(f'{workdir} has no checkpoint yet')
  return config, method, *restored


def export(encoder: Encoder, out: str | pathlib.Path) -> None:
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
  (out / 'encoder.json').write_text(json.dumps(description, indent=1) + '\n')


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
