"""Encoders as Orbax checkpoints that need nothing of this project to be read.

An exported folder holds `variables/`, an Orbax checkpoint of `params` and `batch_stats`, and
`encoder.json`: the architecture, the preprocessing and where the weights come from.
"""

import json
import pathlib

import jax

from simclr_jax import checkpoint, config as recipes, methods, optim, train_state
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
  folder = pathlib.Path(folder)
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


def _from_run(workdir):
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
  state, metadata = restored
  provenance = {'workdir': str(workdir), **{k: metadata[k] for k in ('step', 'config', 'versions')}}
  return Encoder(
    recipes.architecture(config), method.encoder(state.params, state.state), provenance
  )


def export(encoder: Encoder, out: str | pathlib.Path) -> None:
  """Writes `encoder` to the new folder `out`.

  Raises:
    ConfigError: `out` exists and is not an empty folder.
  """
  out = pathlib.Path(out)
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
