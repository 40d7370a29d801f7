"""Multinomial logistic regression on frozen features, with few labels (SimCLRv2's question)."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression


def balanced_subset(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
  """Indices of `per_class` examples of every class, drawn without replacement.

  Raises:
    ValueError: a class has fewer.
  """
  chosen = []
  for c in np.unique(labels):
    members = np.flatnonzero(labels == c)
    if len(members) < per_class:
      raise ValueError(f'class {c} has {len(members)} examples, fewer than {per_class}')
    chosen.append(rng.choice(members, per_class, replace=False))
  return np.concatenate(chosen)


def accuracy(
  x: np.ndarray,
  labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  regularization: float,
) -> float:
  """Accuracy on `test` of scikit-learn's L-BFGS fit to x `[n, d]`.

  The objective is the summed cross entropy plus `regularization` times ||W||^2 / 2, the bias free.
  """
  if len(x) < x.shape[1]:
    # The best W is a combination of the examples, so the fit is the same, and much faster, in
    # orthonormal coordinates of their span.
    span = np.linalg.qr(x.T)[0]  # [d, n]
    x, test = x @ span, test @ span
  # The accuracy does not move below this tolerance, and the time triples.
  model = LogisticRegression(C=1 / regularization, max_iter=1000, tol=1e-2)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', ConvergenceWarning)  # at 1,000 iterations the accuracy stands
    return model.fit(x, labels).score(test, test_labels)


def label_efficiency(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  labels_per_class: list[int],
  draws: int = 5,
  seed: int = 0,
  regularization: float = 0.01,
) -> list[dict[str, float]]:
  """Test accuracy against the number of labels.

  Features are standardised by the mean and standard deviation of all training features, which need no
  labels. The same draws are used for every feature set given the same seed.

  Args:
    train, test: features `[n, d]`.
    train_labels, test_labels: classes `[n]`.
    labels_per_class: the numbers to try.
    draws: random subsets for each number.
    seed: of the subsets.
    regularization: times d, the weight of ||W||^2 / 2; so the same for any number of features.

  Returns:
    For each number: `labels_per_class`, `mean` and `std` (over the draws, n - 1) of the accuracy.
  """
  mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
  train, test = (train - mean) / std, (test - mean) / std
  rows, weight = [], regularization * train.shape[1]
  for per_class in labels_per_class:
    scores = []
    for draw in range(draws):
      subset = balanced_subset(
        train_labels, per_class, np.random.default_rng([seed, per_class, draw])
      )
      scores.append(accuracy(train[subset], train_labels[subset], test, test_labels, weight))
    spread = float(np.std(scores, ddof=1)) if draws > 1 else 0.0
    rows.append({'labels_per_class': per_class, 'mean': float(np.mean(scores)), 'std': spread})
  return rows
