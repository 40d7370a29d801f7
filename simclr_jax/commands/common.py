"""Recipes, data and encoders of commands."""

import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from simclr_jax import config as recipes, data, encoder, run_config, runs
from simclr_jax.data import Dataset, discover
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed
from simclr_jax.runtime.progress import Bar, duration

Embed = Callable[[Dataset], tuple[np.ndarray, np.ndarray]]
MAX_PIXELS = 4 * 2**30  # bytes of raw pixels, as features in memory
# Fields of the data that only a training uses.
TRAINING_ONLY = ('data.num_classes', 'data.examples', 'data.shuffle_buffer')


def recipe_of_run(
  workdir: pathlib.Path, overrides: Mapping[str, Any], dataset: str | None = None
) -> ml_collections.ConfigDict:
  """The recipe of a run or of an exported encoder with overridden `data.*` fields.

  Args:
    workdir: the run or the encoder.
    overrides: fields that the user set; they have priority.
    dataset: the value of --data; None: the images of the run.

  Raises:
    ConfigError: `workdir` is neither, or a field that has no effect is overridden, or there are no images.
  """
  check_overrides(overrides)
  return recipe_with_images(workdir, overrides, dataset)


def recipe_with_images(
  workdir: pathlib.Path, overrides: Mapping[str, Any], dataset: str | None
) -> ml_collections.ConfigDict:
  """`recipe_of_run` without the check of fields that have no effect."""
  fields = {'data.labels': '', **discover.fields(dataset, overrides)} if dataset else {}
  config = run_config.load(workdir, {**fields, **overrides})
  if config.data.source == 'folder' and not config.data.dir:
    raise ConfigError(f'{workdir} is of imported weights, which have no images: add --data=DATASET')
  return config


def check_overrides(overrides: Mapping[str, Any]) -> None:
  """Raises ConfigError if a field that has no effect on an evaluation is overridden."""
  for field in overrides:
    if not field.startswith('data.'):
      raise ConfigError(
        f'--config.{field}: only data.* may be overridden; other fields are fixed by the run'
      )
    if field in TRAINING_ONLY:
      raise ConfigError(f'--config.{field} has no effect on this command')


def recipe_with_data(
  spec: str, dataset: str | None, overrides: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """A recipe for the data set of --data.

  Args:
    spec: a recipe, see `config.load`.
    dataset: the value of --data; None: the data set of the recipe.
    overrides: fields that the user set; they have priority.

  Raises:
    ConfigError: the data set does not exist, or as for `config.load`.
  """
  data_fields = discover.fields(dataset, overrides) if dataset else {}
  return recipes.load(spec, {**data_fields, **overrides})


def labelled(config: ml_collections.ConfigDict) -> tuple[Dataset, Dataset]:
  """The training and test images of a recipe, whose description is printed.

  Raises:
    ConfigError: a split is missing or has no labels, or the processes of a run have different images.
  """

  def load():
    train, test = data.load_splits(config.data)
    if test is None:
      test = data.load(config.data, 'test')  # explains what is missing
    for split, images in (('training', train), ('test', test)):
      if not len(images):
        raise ConfigError(f'there are no {split} images')
      if not images.labelled:
        raise ConfigError(
          f'this command needs labels, but not all {split} images of the data set have one'
        )
    if train.classes < 2:
      raise ConfigError(
        f'this command needs at least two classes, these images have {train.classes}: one sub-folder per class'
      )
    return train, test

  train, test = distributed.run_on_all(load)
  data.check_same({'checksum of the training images': train, 'checksum of the test images': test})
  describe(config, train, test)
  return train, test


def describe(config: ml_collections.ConfigDict, train: Dataset, test: Dataset | None) -> None:
  """Prints the description of the images of a recipe."""
  for line in data.summary(config.data, train, test):
    print(line, flush=True)


def about(
  config: ml_collections.ConfigDict, encoder: Encoder, train: Dataset, test: Dataset
) -> dict[str, Any]:
  """What a result is about, for `results.save`: the checkpoint and the images.

  Args:
    config: the recipe whose images were used.
    encoder: the encoder that was evaluated.
    train, test: the images.
  """
  return {**checkpoint(encoder), 'data': images(config.data, train, test)}


def checkpoint(encoder: Encoder) -> dict[str, int]:
  """`step` and checksum, `checkpoint`, of the checkpoint of an encoder."""
  provenance = encoder.provenance
  checksum = provenance.get('checksum')
  return {
    'step': provenance.get('step', 0),
    'checkpoint': encoder.digest() if checksum is None else checksum,
  }


def images(config: ml_collections.ConfigDict, train: Dataset, test: Dataset) -> dict[str, Any]:
  """`data` of a result; `config`: the `data` part of the recipe."""
  place = config.dir or config.name or config.source
  held_out = '' if config.test_split else f'held-out {config.holdout:.0%}'
  splits = {'train': (train, config.train_split), 'test': (test, config.test_split or held_out)}
  return {
    name: {
      'fingerprint': dataset.fingerprint(),
      'images': len(dataset),
      'split': split,
      'dir': place,
    }
    for name, (dataset, split) in splits.items()
  }


def encoders(workdir: pathlib.Path, baselines: bool) -> dict[str, Encoder]:
  """The encoder of a run, as 'pretrained', and with `baselines`, one with random weights, as 'untrained'."""
  pretrained = runs.load_encoder(workdir)
  untrained = {'untrained': encoder.untrained(pretrained.architecture)} if baselines else {}
  return {**untrained, 'pretrained': pretrained}


def features(
  encoders: Mapping[str, Encoder], baselines: bool, *datasets: Dataset
) -> dict[str, Embed]:
  """Functions from a data set to (features, labels): of each encoder, and with `baselines`, of 'raw pixels'.

  Raw pixels of `datasets` that would need too much memory are left out, with a message.
  """
  embeds = {name: _with_bar(name, e) for name, e in encoders.items()}
  size = sum(len(dataset) * pixel_count(dataset) * 4 for dataset in datasets)
  if baselines and size > MAX_PIXELS:
    print(f'without the row raw pixels: they would need {size / 2**30:.0f} GiB')
    return embeds
  return {**({'raw pixels': encoder.raw_pixels} if baselines else {}), **embeds}


def pixel_count(dataset: Dataset) -> int:
  """The number of features of `encoder.raw_pixels`."""
  return dataset.images[0].size if isinstance(dataset, data.Arrays) else 32 * 32 * 3


def _with_bar(name, encoder):
  def embed(dataset):
    with Bar(len(dataset), f'features of the {name} encoder') as bar:
      return encoder.embed(dataset, progress=bar.to)

  return embed


def embedding_seconds(encoders: Mapping[str, Encoder], *datasets: Dataset) -> float:
  """About how long it takes to compute the features of data sets with each encoder; measured on two batches."""
  images = sum(map(len, datasets))
  if images < 2000:
    return 0.0
  batch, e = datasets[0].sample(256), next(iter(encoders.values()))
  e.embed(batch)  # compiles
  start = time.monotonic()
  e.embed(batch)
  return len(encoders) * images * (time.monotonic() - start) / len(batch)


def announce(text: str, seconds: float) -> None:
  """Prints what is going to be done and about how long it takes."""
  print(f'{text}, {duration(seconds)}', flush=True)
