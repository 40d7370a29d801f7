"""Learning with few labels: which images keep theirs."""

import re

import ml_collections
import numpy as np

from simclr_jax.errors import ConfigError


def per_class(text: str, examples: int, classes: int) -> int:
  """How many labels of each class `data.labels` asks for.

  Args:
    text: a number, or a share of all images, such as '1%'.
    examples, classes: of the whole training set.

  Raises:
    ConfigError: it is neither, or too little.
  """
  found = re.fullmatch(r'(\d+)|(\d+\.?\d*|\.\d+) ?%', text)
  if not found:
    raise ConfigError(f'data.labels={text!r} is not a number of labels a class, such as 25, or 10%')
  if found[1]:
    count = int(found[1])
  else:
    share = float(found[2])
    if share > 100:
      raise ConfigError(f'data.labels={text} is more than 100 %')
    count = round(share / 100 * examples / classes)
  if not count:
    raise ConfigError(
      f'data.labels={text} of {examples:,} images of {classes:,} classes is not one a class'
    )
  return count


def subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
  """`count` images of every class, drawn by `seed`; of a smaller number, the smaller is a part of the larger.

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


def keep(dataset, config: ml_collections.ConfigDict):
  """The training set as `data.labels`, `data.label_seed` and `data.unlabelled` want it.

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
  chosen = subset(labels, count, config.label_seed)
  if config.unlabelled == 'drop':
    return dataset.only(chosen)
  known = np.full(len(labels), -1, np.int32)
  known[chosen] = labels[chosen]
  return dataset.with_labels(known)
