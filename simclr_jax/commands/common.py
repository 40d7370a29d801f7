"""Recipes, data and encoders of commands."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from simclr_jax import config as recipes, data, encoder, run_config, runs
from simclr_jax.data import Dataset, discover
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed

Embed = Callable[[Dataset], tuple[np.ndarray, np.ndarray]]


def recipe_of_run(workdir: pathlib.Path, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The recipe of a run with overridden `data.*` fields.

  Raises:
    ConfigError: `workdir` is not a run directory, or another field is overridden.
  """
  for field in overrides:
    if not field.startswith('data.'):
      raise ConfigError(
        f'--config.{field}: only data.* may be overridden; other fields are fixed by the run'
      )
  return run_config.load(workdir, overrides)


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
  data_fields = discover.fields(dataset) if dataset else {}
  return recipes.load(spec, {**data_fields, **overrides})


def labelled(config: ml_collections.ConfigDict) -> tuple[Dataset, Dataset]:
  """The training and test images of a recipe.

  Raises:
    ConfigError: a split is missing or has no labels, or the processes of a run have different images.
  """

  def load():
    train, test = data.load(config.data, 'train'), data.load(config.data, 'test')
    if not (train.labelled and test.labelled):
      raise ConfigError('this command needs labels, but not all images of the data set have one')
    return train, test

  train, test = distributed.run_on_all(load)
  data.check_same({'checksum of the training images': train, 'checksum of the test images': test})
  return train, test


def encoders(workdir: pathlib.Path, baselines: bool) -> dict[str, Encoder]:
  """The encoder of a run, as 'pretrained', and with `baselines`, one with random weights, as 'untrained'."""
  pretrained = runs.load_encoder(workdir)
  untrained = {'untrained': encoder.untrained(pretrained.architecture)} if baselines else {}
  return {**untrained, 'pretrained': pretrained}


def features(encoders: Mapping[str, Encoder], baselines: bool) -> dict[str, Embed]:
  """Functions from a data set to (features, labels): of each encoder, and with `baselines`, of 'raw pixels'."""
  pixels = {'raw pixels': encoder.raw_pixels} if baselines else {}
  return {**pixels, **{name: e.embed for name, e in encoders.items()}}


def step_of(workdir: pathlib.Path) -> int:
  """The step of the newest readable checkpoint of a run."""
  return runs.load_encoder(workdir).provenance['step']
