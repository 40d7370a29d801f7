"""What several commands do at their start: recipes, data, encoders."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from simclr_jax import config as recipes, data, encoder, runs
from simclr_jax.data import Dataset, discover
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed

Embed = Callable[[Dataset], tuple[np.ndarray, np.ndarray]]


def recipe_of_run(workdir: pathlib.Path, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The recipe of a run, of which only `data.*` may be overridden."""
  for field in overrides:
    if not field.startswith('data.'):
      raise ConfigError(
        f'--config.{field}: only data.* may be overridden; other fields are fixed by the run'
      )
  return recipes.of_run(workdir, overrides)


def recipe_with_data(
  spec: str, dataset: str | None, overrides: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """A recipe whose images are those of --data, if that was given."""
  found = discover.fields(dataset) if dataset else {}
  return recipes.load(spec, {**found, **overrides})


def labelled(config: ml_collections.ConfigDict) -> tuple[Dataset, Dataset]:
  """The training and test images of a recipe, all of them with labels."""

  def load():
    train, test = data.load(config.data, 'train'), data.load(config.data, 'test')
    if not (train.labelled and test.labelled):
      raise ConfigError('this evaluation needs labels, and the data of the run has none')
    return train, test

  train, test = distributed.run_on_all(load)
  data.check_same({'the training images': train, 'the test images': test})
  return train, test


def encoders(workdir: pathlib.Path, baselines: bool) -> dict[str, Encoder]:
  """The encoder of a run and, as a baseline, an untrained one of the same architecture."""
  pretrained = runs.load_encoder(workdir)
  untrained = {'untrained': encoder.untrained(pretrained.architecture)} if baselines else {}
  return {**untrained, 'pretrained': pretrained}


def features(found: Mapping[str, Encoder], baselines: bool) -> dict[str, Embed]:
  """The functions that compute features: of encoders and, as a baseline, raw pixels."""
  pixels = {'raw pixels': encoder.raw_pixels} if baselines else {}
  return {**pixels, **{name: encoder.embed for name, encoder in found.items()}}


def step_of(workdir: pathlib.Path) -> int:
  """The step of the newest readable checkpoint of a run."""
  return runs.load_encoder(workdir).provenance['step']
