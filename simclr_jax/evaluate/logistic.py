"""Multinomial logistic regression on frozen features with few labels, by scikit-learn."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from simclr_jax.data import labels as subsets
from simclr_jax.evaluate import metrics
from simclr_jax.evaluate.results import mean_and_std
from simclr_jax.runtime import preemption

REGULARIZATION = 0.01  # L2 strength per feature: the weight of ||W||^2 / 2 is 0.01 d


def standardize(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
  """Standardises features `[n, d]` with the mean and standard deviation of `train`; `train` comes first.

  Features that are constant in `train` become 0 everywhere.
  """
  mean, inverse = metrics.scaling(train)
  return [(x - mean) * inverse for x in (train, *others)]


def fit(x: np.ndarray, labels: np.ndarray, weight: float, **options: Any) -> LogisticRegression:
  """Fits a logistic regression by L-BFGS; the objective is the summed cross entropy + weight ||W||^2 / 2.

  Args:
    x: features `[n, d]`.
    labels: classes, int `[n]`.
    weight: L2 strength; the bias is not regularised.
    options: further arguments of scikit-learn's LogisticRegression.
  """
  model = LogisticRegression(C=1 / weight, max_iter=1000, **options)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', ConvergenceWarning)  # `score` returns it
    return model.fit(x, labels)


def check_labels(labels: np.ndarray, labels_per_class: list[int]) -> None:
  """Raises ValueError if a class of the training images has fewer images than `labels_per_class`."""
  fewest = np.unique(labels, return_counts=True)[1].min()
  if max(labels_per_class) > fewest:
    raise ValueError(f'a class has {fewest} images, fewer than {max(labels_per_class)}')


def accuracy(
  x: np.ndarray,
  labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  regularization: float = REGULARIZATION,
) -> float:
  """Accuracy on test images of a logistic regression; arguments as for `score`."""
  return score(x, labels, test, test_labels, regularization)[0]


def score(
  x: np.ndarray,
  labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  regularization: float = REGULARIZATION,
) -> tuple[float, bool]:
  """Fits a logistic regression and tests it.

  Args:
    x, test: features `[n, d]` of training and test images.
    labels, test_labels: their classes, int `[n]`.
    regularization: L2 strength per feature: the weight of ||W||^2 / 2 is `regularization` d.

  Returns:
    Accuracy on the test images, 0 to 1, and whether the fit converged.
  """
  weight = regularization * x.shape[1]
  if len(x) < x.shape[1]:
    # The solution W is a linear combination of the rows of x, so the fit in an orthonormal basis of these rows is
    # the same, and much faster.
    basis = np.linalg.qr(x.T)[0]  # [d, n]
    x, test = x @ basis, test @ basis
  # A smaller tolerance triples the time and does not change the accuracy.
  model = fit(x, labels, weight, tol=1e-2)
  return float(model.score(test, test_labels)), int(model.n_iter_.max()) < model.max_iter


def label_efficiency(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  labels_per_class: list[int],
  draws: int = 5,
  regularization: float = REGULARIZATION,
  progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
  """Test accuracy of logistic regression on standardised features, by the number of labels.

  Draw i selects the same images for all features.

  Args:
    train, test: features `[n, d]` of training and test images.
    train_labels, test_labels: their classes, int `[n]`.
    labels_per_class: numbers of labels per class.
    draws: number of random subsets for each number of labels.
    regularization: as for `score`.
    progress: called after each fit with the number of fits.

  Returns:
    For each number of labels: `labels_per_class`; `mean` and `std` (n - 1) of the accuracy over the draws;
    `unfinished`, the number of fits that stopped before convergence.

  Raises:
    ValueError: a class has too few images.
    Stopped: a signal arrived.
  """
  train, test = standardize(train, test)
  check_labels(train_labels, labels_per_class)
  rows: list[dict[str, Any]] = []
  for count in labels_per_class:
    scores = []
    for draw in range(draws):
      preemption.check()
      subset = subsets.balanced_subset(train_labels, count, draw)
      scores.append(score(train[subset], train_labels[subset], test, test_labels, regularization))
      if progress:
        progress(len(rows) * draws + draw + 1)
    mean, std = mean_and_std([accuracy for accuracy, _ in scores])
    unfinished = sum(not converged for _, converged in scores)
    rows.append(
      {'labels_per_class': count, 'mean': mean, 'std': std or 0.0, 'unfinished': unfinished}
    )
  return rows
