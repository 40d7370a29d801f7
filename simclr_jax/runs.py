"""Loads the encoder, the projection head or the classifier of a run."""

import json
import os
import pathlib
from typing import Any

import jax
import ml_collections
from absl import logging

from simclr_jax import config as recipes, methods, optim, run_config, train_state
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.interop import orbax, weights
from simclr_jax.runtime import checkpoint, paths

PyTree = Any


def load_encoder(folder: str | os.PathLike) -> Encoder:
  """The encoder of a run, from its newest readable checkpoint, or an exported encoder.

  Args:
    folder: a run directory, or a folder that `simclr-jax export` wrote; local or gs://.

  Raises:
    ConfigError: `folder` is neither, or the run has no checkpoint yet.
    CheckpointError: the checkpoints or the exported files are damaged.
  """
  folder = paths.path(folder)
  if orbax.is_export(folder):
    return orbax.load(folder)
  if not run_config.is_run(folder):
    raise ConfigError(
      f'{folder} is neither a run directory (config.json) nor an exported encoder (encoder.json)'
    )
  config, method, state, metadata = _restore(folder)
  variables = method.encoder(state.params, state.state)
  return Encoder(recipes.architecture(config), variables, _provenance(folder, metadata))


def load_projection(workdir: str | os.PathLike) -> Encoder:
  """Encoder and projection head of a run.

  Returns:
    An `Encoder` whose features are z, float32 `[n, d]`, the output of the projection head, not normalised.

  Raises:
    ConfigError: `workdir` is not a run directory, or its run has no projection head or no checkpoint yet.
    CheckpointError: the checkpoints are damaged.
  """
  workdir = paths.path(workdir)
  config, _, state, metadata = _restore(workdir)
  return Encoder(
    recipes.architecture(config) | {'features': 'z'},
    methods.projection(config, state.params, state.state),
    _provenance(workdir, metadata),
  )


def load_classifier(workdir: str | os.PathLike) -> Encoder:
  """The network of a fine-tuned, distilled or supervised run, classifier included.

  Returns:
    An `Encoder` whose features are logits, float32 `[n, classes]`.

  Raises:
    ConfigError: `workdir` is not a run directory, or its run has no classifier or no checkpoint yet.
    CheckpointError: the checkpoints are damaged.
  """
  workdir = paths.path(workdir)
  config, method, state, metadata = _restore(workdir)
  if not method.classifier:
    raise ConfigError(
      f'{workdir} has no classifier, because it was trained with method={config.method}: fine-tune it first'
    )
  return Encoder(
    recipes.architecture(config, classifier=True),
    method.classifier(state.params, state.state),
    _provenance(workdir, metadata),
  )


def load_state(
  workdir: str | os.PathLike,
) -> tuple[ml_collections.ConfigDict, train_state.TrainState]:
  """The recipe and the whole state of a training, from its newest readable checkpoint.

  Raises:
    ConfigError: `workdir` is not a run directory, or its run has no checkpoint yet.
    CheckpointError: the checkpoints are damaged.
  """
  config, _, state, _ = _restore(paths.path(workdir))
  return config, state


def load_pretrained(config: ml_collections.ConfigDict) -> PyTree | None:
  """The weights of the run, the exported encoder or the file of another program that `init_from` of a recipe names.

  Args:
    config: a recipe.

  Returns:
    `params` and `batch_stats`, each with the keys 'encoder' and 'head', on the host; with `init_state`, also `training`,
    the state of the training of a MoCo checkpoint, see `layouts.moco_state`. None without `init_from`.

  Raises:
    ConfigError: `init_from` is none of these, or lacks the head that `head_layer` keeps, or the state of a training.
    CheckpointError: the weights are damaged.
  """
  if not config.get('init_from'):
    return None
  folder = paths.path(config.init_from)
  if weights.is_foreign(folder):
    return _foreign(config, folder)
  if config.get('init_state'):
    raise ConfigError(
      f'init_state=true: {folder} is no checkpoint of MoCo in PyTorch; a run of simclr_jax is resumed by its --workdir'
    )
  if run_config.is_run(folder) and not orbax.is_export(folder):
    old, _, state, _ = _restore(folder)
    _check_fits(config, old.model, old.model.normalize, folder)
    params, stats = state.params, state.state['stats']
    frozen = state.state.get('frozen', {})
    pretrained = {
      'params': {'encoder': {**frozen, **params['encoder']}, 'head': params['head']},
      'batch_stats': {'encoder': stats['encoder'], 'head': stats['head']},
    }
    return jax.device_get(pretrained)
  encoder = load_encoder(folder)
  _check_fits(config, encoder.architecture, encoder.architecture['normalize'], folder)
  head = orbax.load_head(folder, encoder.architecture) if orbax.is_export(folder) else None
  return _pretrained(config, folder, encoder.variables, head)


def _foreign(config, path):
  """`load_pretrained` from a file of another program; the recipe decides what its shapes do not."""
  given = {'stem': config.model.stem}
  network = weights.load(path, given, config.get('init_network', ''))
  _check_fits(config, network.model, network.normalize, path)
  for note in network.notes:
    logging.warning('%s: %s', path, note)
  pretrained = _pretrained(config, path, network.encoder, network.head)
  if config.get('init_state'):
    pretrained['training'] = weights.moco_state(path, given)
  return pretrained


def _check_fits(config, model, normalize, path):
  """Refuses weights of a network that differs from that of the recipe in what shapes do not show."""
  for name in ('variant', 'stem'):
    if model[name] != config.model[name]:
      raise ConfigError(
        f'init_from={path} is of another network: its model.{name} is {model[name]}, that of the recipe {config.model[name]}: '
        f'set --config.model.{name}={model[name]}; simclr-jax import --{name} corrects what a file does not say'
      )
  if normalize and normalize != config.model.normalize:
    logging.warning(
      'init_from=%s was trained with model.normalize=%s, this recipe has %s',
      path,
      normalize,
      config.model.normalize,
    )


def _pretrained(config, path, encoder, head):
  if config.get('head_layer') and not head:
    raise ConfigError(f'{path} contains no projection head: set head_layer=0')
  parts = {'encoder': encoder, 'head': head or {}}
  return {
    key: {part: tree.get(key, {}) for part, tree in parts.items()}
    for key in ('params', 'batch_stats')
  }


def load_teacher(config: ml_collections.ConfigDict) -> methods.Teacher | None:
  """The teacher of a recipe for distillation; None if the method needs no teacher.

  Raises:
    ConfigError: `teacher` is empty, is not a run with a classifier, or has another number of classes.
    CheckpointError: the checkpoints of the teacher are damaged.
  """
  if not methods.build(config).needs_teacher:
    return None
  if not config.teacher:
    raise ConfigError('teacher is empty: set it to the directory of a fine-tuned run')
  classifier = load_classifier(config.teacher)
  classes = classifier.architecture['classes']
  if classes != config.data.num_classes:
    raise ConfigError(
      f'data.num_classes={config.data.num_classes}, but the teacher {config.teacher} has {classes} '
      'classes'
    )
  return methods.Teacher(classifier.variables, json.dumps(classifier.architecture))


def _provenance(workdir, metadata):
  keys = ('step', 'config', 'versions', 'images')  # runs of old versions have no `images`
  about = {k: metadata[k] for k in keys if k in metadata}
  return {'workdir': str(workdir), 'checksum': checkpoint.checksum(metadata), **about}


def _restore(
  workdir: pathlib.Path,
) -> tuple[ml_collections.ConfigDict, methods.Method, train_state.TrainState, dict[str, Any]]:
  """Recipe, method, state and metadata of the newest readable checkpoint of a run."""
  config = run_config.load(workdir)
  method = methods.build(config)
  optimizer = optim.build(
    config, optim.schedule(config, config.data.examples), method.optimizer_groups
  )

  def init():
    return train_state.create(
      method, optimizer, config.seed, config.image_size, config.data.channels
    )

  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), jax.eval_shape(init)
  )
  restored = checkpoint.restore(workdir / 'checkpoints', target)
  if restored is None:
    raise ConfigError(f'{workdir} has no checkpoint yet: wait until the run has saved one')
  state, metadata = restored
  return config, method, state, metadata
