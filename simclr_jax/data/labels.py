"""Subsets of the training labels, and of the training images."""

import re

import ml_collections
import numpy as np

from simclr_jax.data.dataset import Dataset
from simclr_jax.errors import ConfigError


def per_class(text: str, examples: int, classes: int) -> int:
  """How many labels per class `data.labels` asks for.

  Args:
    text: a number, or a share of all images, such as '1%'.
    examples, classes: of the whole training set.

  Raises:
    ConfigError: it is neither, or less than one label per class.
  """
  found = re.fullmatch(r'(\d+)|(\d+\.?\d*|\.\d+) ?%', text)
  if not found:
    raise ConfigError(
      f'data.labels={text!r} is neither a number of labels per class, such as 25, nor a share, such as 10%'
    )
  if found[1]:
    count = int(found[1])
  else:
    share = float(found[2])
    if share > 100:
      raise ConfigError(f'data.labels={text} is more than 100 %')
    count = round(share / 100 * examples / classes)
  if not count:
    raise ConfigError(
      f'data.labels={text} of {examples:,} images of {classes:,} classes is less than one label per class'
    )
  return count


def balanced_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
  """`count` images of every class, drawn by `seed`; a smaller subset is a part of a larger one.

  Args:
    labels: int `[N]`; -1 is none.
    count: of each class; of a class that has fewer, all.
    seed: of the draw.

  Returns:
    Their indices, ascending.
  """
  order = np.random.default_rng(seed).permutation(len(labels))
  chosen = [order[labels[order] == c][:count] for c in np.unique(labels[labels >= 0])]
  return np.sort(np.concatenate(chosen))


def select(dataset: Dataset, config: ml_collections.ConfigDict) -> Dataset:
  """The training set as `data.labels`, `data.label_seed` and `data.unlabelled` define it.

  Raises:
    ConfigError: the images have no labels, or a class has too few.
  """
  if not dataset.labelled:
    raise ConfigError(f'data.labels={config.labels}, but not all training images have a label')
  labels = dataset.labels
  counts = np.bincount(labels, minlength=1)
  counts = counts[counts > 0]
  count = per_class(config.labels, len(labels), len(counts))
  if '%' not in config.labels and count > counts.min():
    raise ConfigError(f'data.labels={count}, but a class has only {counts.min():,} images')
  if '%' in config.labels and float(config.labels.rstrip(' %')) == 100:
    return dataset
  chosen = balanced_subset(labels, count, config.label_seed)
  if config.unlabelled == 'drop':
    return dataset.subset(chosen)
  known = np.full(len(labels), -1, np.int32)
  known[chosen] = labels[chosen]
  return dataset.with_labels(known)


def hold_out(
  count: int, share: float, seed: int = 0, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Splits a training set for validation.

  Args:
    count: of the images.
    share: of the images that are held out, from 0 to 1.
    seed: of the choice.
    labels: int `[count]`: the share is that of every class.

  Returns:
    Indices of the rest and of the held-out images, ascending.

  Raises:
    ConfigError: there are too few images to hold one out.
  """
  order = np.random.default_rng(seed).permutation(count)
  groups = [order] if labels is None else [order[labels[order] == c] for c in np.unique(labels)]
  held_out = np.concatenate([group[: round(share * len(group))] for group in groups])
  if not len(held_out):
    raise ConfigError(f'{count} images are too few to hold out {share:.0%} of them')
  return np.setdiff1d(order, held_out), np.sort(held_out)
