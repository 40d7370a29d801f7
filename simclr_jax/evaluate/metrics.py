"""Metrics of classification. `scores` are `[n, C]`; `labels` are int `[n]`, from 0 to C - 1."""

import numpy as np


def top_k(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
  """Top-k accuracy, 0 to 1: the fraction of images whose label is among the k highest scores.

  Ties are errors: at most k - 1 other classes may have a score at least as high as the label. So equal scores of all
  classes, or NaN, are errors.
  """
  label_score = scores[np.arange(len(labels)), labels]
  not_below = (~(scores < label_score[:, None])).sum(1)  # includes the label itself
  return float(np.mean(not_below <= k))


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Confusion matrix, int64 `[C, C]`: rows are true classes, columns predictions (the first of equal scores)."""
  classes = scores.shape[1]
  pairs = labels.astype(np.int64) * classes + scores.argmax(1)
  return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def mean_per_class(scores: np.ndarray, labels: np.ndarray) -> float:
  """Mean accuracy per class, 0 to 1, over the classes that occur in `labels`."""
  # A confusion matrix of many classes would need too much memory.
  counts = np.bincount(labels)
  hits = np.bincount(labels, scores.argmax(1) == labels)
  return float(np.mean(hits[counts > 0] / counts[counts > 0]))


def effective_images(labels: np.ndarray) -> float:
  """The number of images whose mean has the same variance as the mean per class: n if all classes are equally large."""
  counts = np.unique(labels, return_counts=True)[1]
  return float(len(counts) ** 2 / np.sum(1 / counts))


def calibration_error(scores: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
  """Expected calibration error of the softmax of `scores`, 0 to 1 (Guo et al. 2017).

  Predictions are binned by their probability in `bins` bins of equal width. The result is the absolute difference
  between accuracy and mean probability, averaged over the bins, weighted by their number of predictions.
  """
  shifted = np.float64(scores) - scores.max(1, keepdims=True)
  probability = 1 / np.exp(shifted).sum(1)  # of the prediction
  hit = scores.argmax(1) == labels
  bin_index = np.minimum((probability * bins).astype(int), bins - 1)
  gaps = [(hit[bin_index == b] - probability[bin_index == b]).sum() for b in range(bins)]
  return float(np.abs(gaps).sum() / len(labels))


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
  """11-point interpolated average precision of one class, as in VOC 2007.

  Args:
    scores: `[n]`; images with equal scores have the same rank.
    positive: whether the image has the class, bool `[n]`; at least one does.

  Returns:
    The mean over the recalls 0, 0.1, ..., 1 of the highest precision at this or a higher recall, 0 to 1.
  """
  order = np.argsort(-scores, kind='stable')
  last = np.append(
    np.diff(scores[order]) != 0, True
  )  # the last image of each group of equal scores
  hits = np.cumsum(positive[order])[last]
  precision = hits / (np.flatnonzero(last) + 1)
  # In integers, so that 3 of 10 positives reach a recall of 0.3.
  reached = [10 * hits >= i * positive.sum() for i in range(11)]
  return float(np.mean([precision[r].max() for r in reached]))


def mean_average_precision(
  scores: np.ndarray, positive: np.ndarray, ignored: np.ndarray | None = None
) -> float:
  """Mean of `average_precision` over the classes that occur.

  Args:
    scores: `[n, C]`.
    positive: bool `[n, C]`.
    ignored: bool `[n, C]`: whether the image is ignored for this class, as VOC ignores difficult objects.
  """
  kept = np.ones_like(positive) if ignored is None else ~ignored
  classes = [(s[k], p[k]) for s, p, k in zip(scores.T, positive.T, kept.T) if p[k].any()]
  return float(np.mean([average_precision(s, p) for s, p in classes]))


def classification(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Metrics by name: `top1`, `mean_per_class`, `calibration_error`, with more than five classes `top5`; `images`, n."""
  top5 = {'top5': top_k(scores, labels, 5)} if scores.shape[1] > 5 else {}
  return {
    'top1': top_k(scores, labels),
    **top5,
    'mean_per_class': mean_per_class(scores, labels),
    'calibration_error': calibration_error(scores, labels),
    'images': len(labels),
  }


def scaling(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and 1 / standard deviation of features `[n, d]`, each float32 `[d]`.

  A feature that is constant, up to rounding, has 0 instead of 1 / standard deviation: classifiers do not use it.
  """
  mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
  alive = std > 1e-6 * np.abs(mean) + 1e-30
  inverse = np.where(alive, 1 / np.where(alive, std, 1), 0)
  return mean.astype(np.float32), inverse.astype(np.float32)
