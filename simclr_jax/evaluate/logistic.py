"""Multinomial logistic regression on frozen features: with few labels, and as transfer is measured."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from simclr_jax.data import labels as subsets

REGULARIZATION = 0.01  # times the number of features: the weight of ||W||^2 / 2 for few labels
SWEEP = np.logspace(-6, 5, 45)  # that weight, as the transfer protocol tries it


def standardize(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
  """Features less their mean, divided by their standard deviation, both over `train`; no labels needed."""
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
      chosen = subsets.subset(train_labels, count, draw)
      scores.append(
        accuracy(train[chosen], train_labels[chosen], test, test_labels, regularization)
      )
    spread = float(np.std(scores, ddof=1)) if draws > 1 else 0.0
    rows.append({'labels_per_class': count, 'mean': float(np.mean(scores)), 'std': spread})
  return rows


def swept(
  train: np.ndarray, labels: np.ndarray, test: np.ndarray, validation: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, float]:
  """The transfer protocol of SimCLR (appendix B.8): the regularisation is chosen on held-out training images.

  Of each class a part is held out; the weight of `SWEEP` that classifies it best (of several, the
  strongest) is used to fit all of the training set again.

  Args:
    train, test: features `[n, d]`, taken as they are.
    labels: classes `[n]`.
    validation: the share that is held out.
    seed: of the choice.

  Returns:
    Decision scores of `test`, `[n, C]` with a column for each class up to the highest, and the weight.
  """
  order = np.random.default_rng(seed).permutation(len(labels))
  held = [
    (of_class := order[labels[order] == c])[: round(validation * len(of_class))]
    for c in np.unique(labels)
  ]
  held = np.concatenate(held)
  rest = np.setdiff1d(np.arange(len(labels)), held)
  if not len(held):
    return _scores(fit(train, labels, 1.0), test, labels.max() + 1), 1.0
  found, coef = [], None
  for weight in SWEEP[::-1]:  # from the strongest, each begins where the last one ended
    model = LogisticRegression(C=1 / weight, max_iter=200, warm_start=True)
    if coef:
      model.coef_, model.intercept_ = coef
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', ConvergenceWarning)
      model.fit(train[rest], labels[rest])
    coef = model.coef_, model.intercept_
    found.append(model.score(train[held], labels[held]))
  weight = float(SWEEP[::-1][int(np.argmax(found))])
  return _scores(fit(train, labels, weight), test, labels.max() + 1), weight


def _scores(model, test, classes):
  decided = model.decision_function(test)
  if decided.ndim == 1:  # of two classes, scikit-learn gives the second alone
    decided = np.stack([-decided, decided], 1)
  scores = np.full((len(test), classes), -np.inf)
  scores[:, model.classes_] = decided
  return scores
