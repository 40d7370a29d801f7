"""Multinomial logistic regression on frozen features with few labels, by scikit-learn."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from simclr_jax.data import labels as subsets
from simclr_jax.evaluate.results import mean_and_std
from simclr_jax.runtime import preemption

REGULARIZATION = 0.01  # times the number of features: the weight of ||W||^2 / 2 for few labels


def standardize(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
  """Features minus the mean of `train`, divided by the standard deviation of `train`."""
  mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
  return [(x - mean) / std for x in (train, *others)]


def fit(x: np.ndarray, labels: np.ndarray, weight: float, **options) -> LogisticRegression:
  """scikit-learn's L-BFGS fit to x `[n, d]`: summed cross entropy + weight ||W||^2 / 2, the bias free."""
  model = LogisticRegression(C=1 / weight, max_iter=1000, **options)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', ConvergenceWarning)  # at 1,000 iterations the accuracy stands
    return model.fit(x, labels)


def accuracy(
  x: np.ndarray,
  labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  regularization: float = REGULARIZATION,
) -> float:
  """Accuracy on `test` of `fit` to x `[n, d]`, with weight `regularization` times d."""
  weight = regularization * x.shape[1]
  if len(x) < x.shape[1]:
    # The best W is a combination of the examples, so the fit is the same, and much faster, in
    # orthonormal coordinates of their span.
    span = np.linalg.qr(x.T)[0]  # [d, n]
    x, test = x @ span, test @ span
  # The accuracy does not move below this tolerance, and the time triples.
  return fit(x, labels, weight, tol=1e-2).score(test, test_labels)


def label_efficiency(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  labels_per_class: list[int],
  draws: int = 5,
  regularization: float = REGULARIZATION,
) -> list[dict[str, float]]:
  """Test accuracy against the number of labels, on standardised features.

  The same draws are used for every feature set.

  Args:
    train, test: features `[n, d]`.
    train_labels, test_labels: classes `[n]`.
    labels_per_class: the numbers to try.
    draws: random subsets for each number.
    regularization: times d, the weight of ||W||^2 / 2; so the same for any number of features.

  Returns:
    For each number: `labels_per_class`, `mean` and `std` (over the draws, n - 1) of the accuracy.

  Raises:
    ValueError: a class has fewer labels.
  """
  train, test = standardize(train, test)
  fewest = np.unique(train_labels, return_counts=True)[1].min()
  if max(labels_per_class) > fewest:
    raise ValueError(f'a class has {fewest} images, fewer than {max(labels_per_class)}')
  rows = []
  for count in labels_per_class:
    scores = []
    for draw in range(draws):
      preemption.check()
      chosen = subsets.balanced_subset(train_labels, count, draw)
      scores.append(
        accuracy(train[chosen], train_labels[chosen], test, test_labels, regularization)
      )
    mean, std = mean_and_std(scores)
    rows.append({'labels_per_class': count, 'mean': mean, 'std': std or 0.0})
  return rows
