"""Metrics of classification. Scores are `[n, C]`, labels int `[n]` from 0 to C - 1."""

import numpy as np


def top_k(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
  """Share of the images whose label is among the k highest scores.

  A tie is a miss: at most k - 1 other classes may score as high as the label or higher. So equal scores
  for all classes, or NaN, are misses.
  """
  own = scores[np.arange(len(labels)), labels]
  not_below = (~(scores < own[:, None])).sum(1)  # the label itself is one of them
  return float(np.mean(not_below <= k))


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Counts int64 `[C, C]`: true class by row, highest score by column (of equal ones the first)."""
  classes = scores.shape[1]
  pairs = labels.astype(np.int64) * classes + scores.argmax(1)
  return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def mean_per_class(scores: np.ndarray, labels: np.ndarray) -> float:
  """Top-1 accuracy of each class that occurs, averaged over the classes."""
  counts = confusion(scores, labels)
  occurs = counts.sum(1) > 0
  return float(np.mean(counts.diagonal()[occurs] / counts.sum(1)[occurs]))


def calibration_error(scores: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
  """Expected calibration error of the softmax of `scores` (Guo et al. 2017).

  Predictions are binned by their probability, in bins of equal width; the difference between accuracy and mean
  probability of each bin is averaged, weighted by its number of predictions.
  """
  shifted = np.float64(scores) - scores.max(1, keepdims=True)
  probability = 1 / np.exp(shifted).sum(1)  # of the highest
  hit = scores.argmax(1) == labels
  which = np.minimum((probability * bins).astype(int), bins - 1)
  gaps = [(hit[which == b] - probability[which == b]).sum() for b in range(bins)]
  return float(np.abs(gaps).sum() / len(labels))


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
  """11-point interpolated average precision of one class, as VOC 2007 defines it.

  Args:
    scores: `[n]`; images of equal scores form one group.
    positive: bool `[n]`, at least one true.

  Returns:
    The mean over recalls 0, 0.1, ..., 1 of the highest precision at that recall or a higher one.
  """
  order = np.argsort(-scores, kind='stable')
  last = np.append(np.diff(scores[order]) != 0, True)  # of a group of equal scores
  hits = np.cumsum(positive[order])[last]
  precision = hits / (np.flatnonzero(last) + 1)
  # Integers, because 3 / 10 positives must reach a recall of 0.3.
  reached = [10 * hits >= i * positive.sum() for i in range(11)]
  return float(np.mean([precision[r].max() for r in reached]))


def mean_average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
  """`average_precision` averaged over the classes that occur; `positive` is bool `[n, C]`."""
  classes = [(s, p) for s, p in zip(scores.T, positive.T) if p.any()]
  return float(np.mean([average_precision(s, p) for s, p in classes]))


def classification(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """`top1`, `top5` (with more than five classes), `mean_per_class`, `calibration_error`, `images`."""
  top5 = {'top5': top_k(scores, labels, 5)} if scores.shape[1] > 5 else {}
  return {
    'top1': top_k(scores, labels),
    **top5,
    'mean_per_class': mean_per_class(scores, labels),
    'calibration_error': calibration_error(scores, labels),
    'images': len(labels),
  }
