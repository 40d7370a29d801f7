"""Subsets of the training labels and of the training images."""

import re
from collections.abc import Sequence

import ml_collections
import numpy as np

from simclr_jax.data.dataset import Dataset
from simclr_jax.errors import ConfigError
from simclr_jax.runtime.checksum import crc32


def per_class(text: str, examples: int, classes: int) -> int:
  """The number of labels per class that `data.labels` specifies.

  Args:
    text: a number of labels per class, or a fraction of all images, such as '1%'.
    examples, classes: number of images and classes of the training set.

  Raises:
    ConfigError: the text is neither, or is less than one label per class.
  """
  match = re.fullmatch(r'(\d{1,18})|(\d{1,18}\.?\d{0,18}|\.\d{1,18}) ?%', text)
  if not match:
    raise ConfigError(
      f'data.labels={text!r} is neither a number of labels per class, such as 25, nor a fraction, such as 10%'
    )
  if match[1]:
    count = int(match[1])
  else:
    percent = float(match[2])
    if percent > 100:
      raise ConfigError(f'data.labels={text} is more than 100 %')
    count = round(percent / 100 * examples / classes)
  if not count:
    raise ConfigError(
      f'data.labels={text} of {examples:,} images of {classes:,} classes is less than one label per class'
    )
  return count


def balanced_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
  """`count` random images of every class; a smaller subset of the same seed is part of a larger one.

  Args:
    labels: int `[N]`; images with -1 are not chosen.
    count: images per class; all images of a class that has fewer.
    seed: of the choice.

  Returns:
    int `[n]`, indices of the images, ascending.
  """
  order = np.random.default_rng(seed).permutation(len(labels))
  chosen = [order[labels[order] == c][:count] for c in np.unique(labels[labels >= 0])]
  return np.sort(np.concatenate(chosen))


def select(dataset: Dataset, config: ml_collections.ConfigDict) -> Dataset:
  """The training set with only the labels that `data.labels`, `data.label_seed` and `data.unlabelled` select.

  Raises:
    ConfigError: the images have no labels, or a class has too few images.
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
  chosen_labels = np.full(len(labels), -1, np.int32)
  chosen_labels[chosen] = labels[chosen]
  return dataset.with_labels(chosen_labels)


def hold_out(
  count: int, share: float, seed: int = 0, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Splits a training set for validation.

  Args:
    count: number of images.
    share: fraction of the images that is held out, from 0 to 1.
    seed: of the choice.
    labels: int `[count]`; if present, this fraction of every class is held out.

  Returns:
    Indices of the remaining and of the held-out images, both ascending.

  Raises:
    ConfigError: no image would be held out.
  """
  order = np.random.default_rng(seed).permutation(count)
  groups = [order] if labels is None else [order[labels[order] == c] for c in np.unique(labels)]
  held_out = np.concatenate([group[: round(share * len(group))] for group in groups])
  if not len(held_out):
    raise ConfigError(f'{count} images are too few to hold out {share:.0%} of them')
  return np.setdiff1d(order, held_out), np.sort(held_out)


def held_out_split(
  labels: np.ndarray, class_names: Sequence[str], share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Holds out the test split of a data set without one: always the same images of each class.

  Args:
    labels: int `[N]`; images with -1, an unknown label, are never held out.
    class_names: names of the classes; the choice depends on the name, so that other classes do not change it.
    share: fraction of each class, above 0 and below 1; at least one image of a class of two or more, and never all.
    seed: of the choice.

  Returns:
    Indices of the remaining and of the held-out images, both ascending.
  """
  held_out = []
  for label in np.unique(labels[labels >= 0]):
    members = np.flatnonzero(labels == label)
    count = min(max(round(share * len(members)), 1), len(members) - 1)
    rng = np.random.default_rng([seed, crc32(class_names[label])])
    held_out.append(rng.permutation(members)[:count])
  indices = np.sort(np.concatenate(held_out))
  return np.setdiff1d(np.arange(len(labels)), indices), indices
