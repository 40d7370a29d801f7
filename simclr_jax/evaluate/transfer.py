"""Transfer: what the features of one data set are worth on others (SimCLR, section 6.3 and appendix B.8).

Logistic regression (`logistic.swept`) on frozen features, images resized to the encoder's size by their
shorter side and cut to the central square; and fine-tuning with all labels.
"""

import dataclasses
import pathlib
from typing import Any

import ml_collections
import numpy as np

from simclr_jax import config as recipes, data
from simclr_jax.data import discover
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import features, finetune, logistic, metrics

# Data sets of the paper that are not measured by top-1. VOC 2007, by mAP, has several labels an image,
# which cannot be read.
METRICS = {
  'oxford_iiit_pet': 'mean per class',
  'oxford_flowers102': 'mean per class',
  'caltech101': 'mean per class',
  'fgvc_aircraft': 'mean per class',
}
HELD_OUT = 0.2  # of a data set without a test split


def metric(what: str) -> str:
  """How a data set is measured: 'top-1' or, as the paper does for some, 'mean per class'."""
  return METRICS.get(what.split('/')[0].split(':')[0], 'top-1')


def load(what: str, folder: str = ''):
  """(training set, test set, data part of a recipe) of what `--data` would take.

  Without a test split, a fifth of the training images is the test set.

  Args:
    what: as of `discover.fields`.
    folder: TFDS's `data_dir`.

  Raises:
    ConfigError: it is missing, or has no labels.
  """
  found = discover.fields(what)
  if found['data.name'] and folder:
    found |= _splits(what, folder)
  config = recipes.load('simclr_images', found).data
  train = data.load(config, 'train')
  if not train.labelled:
    raise ConfigError(f'{what} has no labels')
  if config.test_split:
    test = data.load(config, 'test')
    if not test.labelled:
      raise ConfigError(f'the test images of {what} have no labels')
    return train, test, found
  order = np.random.default_rng(0).permutation(len(train))
  cut = round(HELD_OUT * len(train))
  return train.only(np.sort(order[cut:])), train.only(np.sort(order[:cut])), found


def _splits(what, folder):
  from simclr_jax.data import tfds  # needs TensorFlow

  prepared = tfds.split_names(what, folder)
  test = next((name for name in discover.TEST if name in prepared), '')
  return {'data.dir': folder, 'data.test_split': test}


def linear(encoders: dict[str, features.Encoder], train, test, how: str) -> dict[str, float]:
  """`metric` of logistic regression on the features of each encoder; None: raw pixels."""
  found = {}
  for name, encoder in encoders.items():
    embed = _whole(encoder).embed if encoder else features.raw_pixels
    (x, labels), (test_x, test_labels) = embed(train), embed(test)
    if not encoder:
      x, test_x = logistic.standardize(x, test_x)
    scores, _ = logistic.swept(x, labels, test_x)
    unseen = max(0, test_labels.max() + 1 - scores.shape[1])  # classes of the test images alone
    scores = np.pad(scores, ((0, 0), (0, unseen)), constant_values=-np.inf)
    measure = metrics.mean_per_class if how == 'mean per class' else metrics.top_k
    found[name] = measure(scores, test_labels)
  return found


def _whole(encoder):
  view = {**encoder.architecture, 'eval_view': 'center_crop(1)'}
  return dataclasses.replace(encoder, architecture=view)


def tuned(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  spec: str,
  overrides: dict[str, str],
  what: str,
  place: dict[str, str],
  train,
  test,
  command: str,
) -> float:
  """`metric` after fine-tuning the run `workdir` with all labels; the training is in workdir/transfer/."""
  recipe = finetune.recipe(spec, config, {**place, 'data.test_split': '', **overrides})
  chosen, images = finetune.with_labels(recipe, train, '100%', 0)
  with chosen.unlocked():
    chosen.init_from = str(workdir.resolve())
  folder = workdir / 'transfer' / pathlib.PurePosixPath(what.rstrip('/')).name.replace(':', '-')
  finetune.run(chosen, images, folder, command)
  result, _ = finetune.test(folder, test)
  return result['mean_per_class' if metric(what) == 'mean per class' else 'top1']


def table(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  encoders: dict[str, features.Encoder],
  to: list[str],
  folder: str,
  spec: str,
  overrides: dict[str, str],
  fine_tune: bool,
  command: str,
) -> dict[str, Any]:
  """All data sets `to`: a result to be kept. One that is missing has a row that says so."""
  columns = list(encoders) + ['fine-tuned'] * fine_tune
  rows, notes, sizes = {}, {}, {}
  for what in to:
    how = metric(what)
    name = f'{pathlib.PurePosixPath(what.rstrip("/")).name} ({how})'
    print(f'\n{what}', flush=True)
    try:
      train, test, place = load(what, folder)
    except ConfigError as error:
      rows[name], notes[name] = [[None, None]] * len(columns), f'missing: {error}'
      print(notes[name], flush=True)
      continue
    sizes[name] = [len(train), len(test)]
    found = linear(encoders, train, test, how)
    if fine_tune:
      found['fine-tuned'] = tuned(
        workdir, config, spec, overrides, what, place, train, test, command
      )
    rows[name] = [[100 * found[c], None] for c in columns]
    print('  '.join(f'{c} {100 * found[c]:.1f}' for c in columns), flush=True)
  return {
    'title': 'Transfer: logistic regression on frozen features, %',
    'columns': columns,
    'rows': rows,
    'notes': notes,
    'settings': {'images': sizes},
  }
