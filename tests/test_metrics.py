"""Classification metrics compared with scikit-learn and with their definitions."""

import numpy as np
import pytest
from sklearn import metrics as sk

from simclr_jax.evaluate import metrics

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(500, 7)).astype(np.float32)
LABELS = np.where(RNG.random(500) < 0.5, SCORES.argmax(1), RNG.integers(0, 7, 500))


@pytest.mark.parametrize('k', [1, 3, 6])
def test_top_k(k):
  """Breaks if the rank of the label is off by one."""
  expected = sk.top_k_accuracy_score(LABELS, SCORES, k=k, labels=np.arange(7))
  assert metrics.top_k(SCORES, LABELS, k) == pytest.approx(expected)


def test_ties_and_nan_are_misses():
  """Breaks if a network with equal scores for all classes, or with NaN scores, is correct for some
  images.
  """
  labels = np.array([0, 1, 2])
  assert metrics.top_k(np.zeros((3, 6)), labels) == metrics.top_k(np.zeros((3, 6)), labels, 5) == 0
  assert metrics.top_k(np.full((3, 6), np.nan), labels, 5) == 0
  tied = np.array([[5.0, 5, 1, 0], [3, 5, 5, 0], [2, 1, 2, 2]])
  assert metrics.top_k(tied, labels) == 0
  assert metrics.top_k(tied, labels, 2) == pytest.approx(2 / 3)
  assert metrics.top_k(tied, labels, 3) == 1


def test_confusion_matrix_and_mean_per_class():
  """Breaks if rows and columns of the confusion matrix are swapped, or classes without images
  change the mean.
  """
  np.testing.assert_array_equal(
    metrics.confusion(SCORES, LABELS), sk.confusion_matrix(LABELS, SCORES.argmax(1))
  )
  expected = sk.balanced_accuracy_score(LABELS, SCORES.argmax(1))
  assert metrics.mean_per_class(SCORES, LABELS) == pytest.approx(expected)
  wider = np.concatenate([SCORES, np.full((500, 2), -9.0)], 1)
  assert metrics.mean_per_class(wider, LABELS) == pytest.approx(expected)


def test_calibration_error():
  """Breaks if the bins, their weights or the softmax are wrong."""
  p = np.exp(np.float64(3 * SCORES))
  p /= p.sum(1, keepdims=True)
  error = 0.0
  for b in range(15):
    inside = (p.max(1) > b / 15) & (p.max(1) <= (b + 1) / 15)
    if inside.any():
      correct = (p.argmax(1) == LABELS)[inside]
      error += inside.mean() * abs(correct.mean() - p.max(1)[inside].mean())
  assert metrics.calibration_error(3 * SCORES, LABELS) == pytest.approx(error, abs=1e-6)
  assert metrics.calibration_error(1e4 * SCORES, SCORES.argmax(1)) < 1e-6


def loop_average_precision(scores, positive):
  """The 11-point average precision of VOC 2007, one threshold at a time."""
  precisions = []
  for i in range(11):
    reached = [0.0]
    for threshold in np.unique(scores):
      retrieved = scores >= threshold
      if 10 * positive[retrieved].sum() >= i * positive.sum():
        reached.append(positive[retrieved].mean())
    precisions.append(max(reached))
  return np.mean(precisions)


@pytest.mark.parametrize('positives', [1, 3, 10, 77])
def test_average_precision(positives):
  """Breaks if precision is not interpolated, rounding misses a recall level, or tied scores are
  separated.
  """
  rng = np.random.default_rng(positives)
  for levels in (4, 1000):
    scores = rng.integers(0, levels, 200) / 7
    positive = np.zeros(200, bool)
    positive[rng.permutation(200)[:positives]] = True
    expected = loop_average_precision(scores, positive)
    assert metrics.average_precision(scores, positive) == pytest.approx(expected)
  mean = metrics.mean_average_precision(
    np.stack([scores, -scores], 1), np.stack([positive, positive], 1)
  )
  negated = loop_average_precision(-scores, positive)
  assert mean == pytest.approx((expected + negated) / 2)
  assert metrics.average_precision(1.0 * positive, positive) == 1


def test_difficult_objects_are_ignored():
  """Breaks if an image with difficult objects only counts as a positive or as a negative of this class."""
  scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.9], [0.6, 0.3]])
  positive = np.array([[0, 0], [1, 0], [0, 1], [1, 0]], bool)
  ignored = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], bool)
  assert metrics.mean_average_precision(scores, positive, ignored) == 1
  as_negative = metrics.mean_average_precision(scores, positive)
  assert as_negative == pytest.approx(
    (0.5 + 1) / 2
  )  # precision 1/2 at all recalls of the first class
