"""Transfer: the features of one data set evaluated on others (SimCLR, section 6.3 and appendix B.8).

Logistic regression (`lbfgs.sweep_l2`) on frozen features of images whose shorter side is resized to the size of
the encoder, and which are cropped to the central square.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from simclr_jax import config as recipes, data
from simclr_jax.data import Dataset, discover
from simclr_jax.data.labels import hold_out
from simclr_jax.encoder import Encoder, raw_pixels
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import lbfgs, logistic, metrics

MAP = '11-point mAP'
# Data sets of the paper whose metric is not top-1.
METRICS = {
  'oxford_iiit_pet': 'mean per class',
  'oxford_flowers102': 'mean per class',
  'caltech101': 'mean per class',
  'fgvc_aircraft': 'mean per class',
  'voc': MAP,
}
HELD_OUT = 0.2  # share of the images that is the test set of a data set without one


@dataclasses.dataclass(frozen=True)
class Task:
  """A data set to transfer to.

  Attributes:
    train, test: its images.
    location: the fields of a recipe that name the data set.
    metric: 'top-1', 'mean per class' or, with several labels per image, `MAP`.
    truth: the labels of train and of test, int `[n]` or, with several per image, bool `[n, C]`.
  """

  train: Dataset
  test: Dataset
  location: dict[str, str]
  metric: str
  truth: tuple[np.ndarray, np.ndarray]


def metric(what: str) -> str:
  """The metric of the paper for a data set of this name; 'top-1' for others."""
  return METRICS.get(what.split('/')[0].split(':')[0], 'top-1')


def load(what: str, folder: str = '') -> Task:
  """The task of a data set, named as for `--data`.

  With a validation and a test split in TFDS, training uses train+validation. Without a test split, a
  fifth of the training images is the test set.

  Args:
    what: as of `discover.fields`.
    folder: TFDS's `data_dir`.

  Raises:
    ConfigError: the data set is missing, or has no labels.
  """
  location = discover.fields(what)
  if location['data.source'] == 'tfds':
    location |= _splits(location['data.name'], location['data.dir'] or folder)
  config = recipes.load('simclr_images', location).data
  train = data.load(config, 'train')
  test = data.load(config, 'test') if config.test_split else None
  if config.source == 'tfds' and not train.labelled:
    from simclr_jax.data import tfds  # needs TensorFlow

    truth = tfds.multilabels(config, config.train_split)
    if test and truth is not None:
      return Task(train, test, location, MAP, (truth, tfds.multilabels(config, config.test_split)))
  if not train.labelled:
    raise ConfigError(f'{what} has no labels')
  if not test:
    rest, held_out = hold_out(len(train), HELD_OUT)
    train, test = train.subset(rest), train.subset(held_out)
  if not test.labelled:
    raise ConfigError(f'the test images of {what} have no labels')
  return Task(train, test, location, metric(what), (train.labels, test.labels))


def _splits(name, folder):
  from simclr_jax.data import tfds  # needs TensorFlow

  prepared = tfds.split_names(name, folder)
  test = next((split for split in discover.TEST if split in prepared), '')
  train = 'train+validation' if {'train', 'validation', 'test'} <= set(prepared) else 'train'
  return {'data.dir': folder, 'data.train_split': train, 'data.test_split': test}


def linear(encoders: Mapping[str, Encoder | None], task: Task) -> dict[str, float]:
  """The metric of logistic regression on the features of each encoder; None: raw pixels."""
  measure = {MAP: metrics.mean_average_precision, 'mean per class': metrics.mean_per_class}
  measure = measure.get(task.metric, metrics.top_k)
  train_labels, truth = task.truth
  results = {}
  for name, encoder in encoders.items():
    embed = _whole_image(encoder).embed if encoder else raw_pixels
    x, test = (embed(part)[0] for part in (task.train, task.test))
    if not encoder:
      x, test = logistic.standardize(x, test)
    scores, _ = lbfgs.sweep_l2(x, train_labels, test)
    if truth.ndim == 1:  # classes that only test images have
      unseen = max(0, truth.max() + 1 - scores.shape[1])
      scores = np.pad(scores, ((0, 0), (0, unseen)), constant_values=-np.inf)
    results[name] = measure(scores, truth)
  return results


def _whole_image(encoder):
  architecture = {**encoder.architecture, 'eval_view': 'center_crop(1)'}
  return dataclasses.replace(encoder, architecture=architecture)
