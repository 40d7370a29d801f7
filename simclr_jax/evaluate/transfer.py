"""Transfer: evaluates an encoder on other data sets (SimCLR, section 6.3 and appendix B.8).

Logistic regression (`lbfgs.sweep_l2`) on frozen features. The shorter side of an image is resized to the image size of
the encoder, then the image is cropped to its central square.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from simclr_jax import config as recipes, data
from simclr_jax.data import Dataset, discover, layout
from simclr_jax.encoder import Encoder, raw_pixels
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import lbfgs, logistic, metrics

MAP = '11-point mAP'
# The metrics of the paper; of all other data sets, top-1.
METRICS = {
  'oxford_iiit_pet': 'mean per class',
  'oxford_flowers102': 'mean per class',
  'caltech101': 'mean per class',
  'fgvc_aircraft': 'mean per class',
  'voc': MAP,
}

# Raw pixels are thousands of standardised features: every fourth L2 strength, a factor of 10 apart, saves hours.
PIXEL_SWEEP = 4


@dataclasses.dataclass(frozen=True)
class Task:
  """A data set to transfer to.

  Attributes:
    train, test: the images.
    location: the recipe fields that select the data set.
    metric: 'top-1', 'mean per class', or for several labels per image, `MAP`.
    truth: labels of train and of test: int `[n]`, or for several labels per image, bool `[n, C]`.
    ignored: with several labels per image, the classes for which a test image is ignored, bool `[n, C]`.
  """

  train: Dataset
  test: Dataset
  location: dict[str, str]
  metric: str
  truth: tuple[np.ndarray, np.ndarray]
  ignored: np.ndarray | None = None


def metric(name: str) -> str:
  """The metric of the paper for a data set, by its TFDS name; 'top-1' for data sets that are not in the paper."""
  return METRICS.get(name.split('/')[0].split(':')[0], 'top-1')


def load(name: str, folder: str = '', channels: int = 3) -> Task:
  """Loads a data set to transfer to.

  A TFDS data set with a validation and a test split is trained on train+validation. Of a data set without a test
  split, a fifth of each class is held out, as for all commands.

  Args:
    name: the data set, as for `--data`, see `discover.fields`.
    folder: `data_dir` of TFDS; '': the default of TFDS.
    channels: of the images that the encoder takes, `data.channels`.

  Raises:
    ConfigError: the data set is missing, or has no labels.
  """
  location = discover.fields(name)
  if location['data.source'] == 'tfds':
    location |= _splits(location['data.name'], location['data.dir'] or folder)
  location |= {'data.channels': str(channels)} if channels != 3 else {}
  config = recipes.load('simclr_images', location).data
  train, test = data.load_splits(config)
  if config.source == 'tfds' and not train.labelled:
    from simclr_jax.data import tfds  # needs TensorFlow

    train_labels = tfds.multilabels(config, config.train_split)
    test_labels = tfds.multilabels(config, config.test_split) if test else None
    if test and train_labels is not None and test_labels is not None:
      ignored = tfds.difficult(config, config.test_split)
      return Task(train, test, location, MAP, (train_labels, test_labels), ignored)
  if not train.labelled:
    raise ConfigError(f'{name} has no labels')
  if train.classes < 2:
    raise ConfigError(f'{name} has only one class')
  if test is None:
    test = data.load(config, 'test')  # explains what is missing
  if not test.labelled:
    raise ConfigError(f'the test images of {name} have no labels')
  return Task(train, test, location, metric(name), (train.labels, test.labels))


def _splits(name, folder):
  """The fields that select the splits of a prepared TFDS data set."""
  from simclr_jax.data import tfds  # needs TensorFlow

  prepared = tfds.split_names(name, folder)
  test = layout.splits(sorted(prepared))[1]
  train = 'train+validation' if {'train', 'validation', 'test'} <= set(prepared) else 'train'
  return {'data.dir': folder, 'data.train_split': train, 'data.test_split': test}


def linear(
  encoders: Mapping[str, Encoder | None],
  task: Task,
  progress: Callable[[str, int], None] | None = None,
  unfinished: dict[str, int] | None = None,
) -> dict[str, float]:
  """Evaluates encoders on a data set by logistic regression on their features.

  Args:
    encoders: name -> encoder; None: raw pixels.
    task: the data set.
    progress: called after each fit with the name and the number of fits, of which there are at most twice as many as
      values in `lbfgs.SWEEP`.
    unfinished: gets the names whose last fit, which is tested, stopped before convergence, with the number of its
      L-BFGS steps.

  Returns:
    Name -> the metric of the task, 0 to 1.

  Raises:
    ConfigError: an image cannot be read, or there are too few images for a validation split.
    Stopped: a signal arrived.
  """
  average_precision = functools.partial(metrics.mean_average_precision, ignored=task.ignored)
  functions: dict[str, Callable[..., float]] = {
    MAP: average_precision,
    'mean per class': metrics.mean_per_class,
  }
  function = functions.get(task.metric, metrics.top_k)
  train_labels, test_labels = task.truth
  results = {}
  for name, encoder in encoders.items():
    embed = _without_cropping(encoder).embed if encoder else raw_pixels
    x, test = (embed(part)[0] for part in (task.train, task.test))
    if not encoder:
      x, test = logistic.standardize(x, test)
    converged = True

    def fitted(count, done, name=name):
      nonlocal converged
      converged = done
      if progress:
        progress(name, count)

    scores, _ = lbfgs.sweep_l2(
      x, train_labels, test, fitted=fitted, every=1 if encoder else PIXEL_SWEEP
    )
    if unfinished is not None and not converged:
      unfinished[name] = lbfgs.STEPS
    if test_labels.ndim == 1:  # classes that no training image has are never predicted
      missing = max(0, test_labels.max() + 1 - scores.shape[1])
      scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
    results[name] = function(scores, test_labels)
  return results


def _without_cropping(encoder):
  """The encoder with another preprocessing: the largest central square of an image."""
  architecture = {**encoder.architecture, 'eval_view': 'center_crop(1)'}
  return dataclasses.replace(encoder, architecture=architecture)
