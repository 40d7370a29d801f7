"""What a claim is, and the verdict on it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.stats

from benchmarks.claims.trainings import Setting

CONFIRMED, CONTRADICTED = 'confirmed', 'contradicted'
UNDECIDED = 'not distinguishable at this size'
TOO_FEW = 'too few seeds'
# Setting -> metric -> one value per seed.
Values = Mapping[str, Mapping[str, Sequence[float]]]


@dataclasses.dataclass(frozen=True)
class Term:
  """A summand of a contrast: `weight` times the mean over the seeds of a metric of a setting."""

  setting: str
  metric: str
  weight: float


@dataclasses.dataclass(frozen=True)
class Expected:
  """What a claim predicts: that a sum of means is positive, or within some distance of 0.

  Attributes:
    text: the prediction, as a sentence of the table.
    terms: the sum.
    within: None: the sum is positive; otherwise its absolute value is at most this.
    unit: of the sum.
  """

  text: str
  terms: tuple[Term, ...]
  within: float | None = None
  unit: str = 'points'


def better(a: str, b: str, metric: str = 'linear', text: str = '', b_metric: str = '') -> Expected:
  """The metric of setting a is higher than that of b (or than `b_metric` of b)."""
  text = text or f'{a} > {b}'
  return Expected(text, (Term(a, metric, 1), Term(b, b_metric or metric, -1)))


def lower(a: str, b: str, metric: str, unit: str, text: str = '') -> Expected:
  """The metric of setting a is lower than that of b."""
  return Expected(text or f'{a} < {b}', (Term(a, metric, -1), Term(b, metric, 1)), unit=unit)


def similar(a: str, b: str, within: float, metric: str = 'linear', text: str = '') -> Expected:
  """The metrics of a and b differ by at most `within`."""
  text = text or f'{a} = {b}, within {within:g} points'
  return Expected(text, (Term(a, metric, 1), Term(b, metric, -1)), within)


def larger_gap(
  first: tuple[str, str], second: tuple[str, str], metric: str = 'linear', text: str = ''
) -> Expected:
  """The difference of the first two settings is larger than that of the second two."""
  text = text or f'({first[0]} - {first[1]}) > ({second[0]} - {second[1]})'
  pairs = [(first[0], 1), (first[1], -1), (second[0], -1), (second[1], 1)]
  return Expected(text, tuple(Term(setting, metric, weight) for setting, weight in pairs))


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim of a paper.

  Attributes:
    title: short, a heading of the page.
    source: paper, table or figure.
    text: the claim, in a sentence.
    settings: name -> training.
    expected: the predictions, each with its own verdict.
    seeds: number of seeds.
    metrics: the metrics of the table and the plot, the first one is plotted.
    published: the paper's numbers.
    note: what the reader should know about the comparison.
    statistic: for a claim that is no comparison of means: from all values of all claims to an `Outcome`.
  """

  title: str
  source: str
  text: str
  settings: Mapping[str, Setting]
  expected: tuple[Expected, ...]
  seeds: int = 3
  metrics: tuple[str, ...] = ('linear', 'knn')
  published: str = ''
  note: str = ''
  statistic: 'Callable[[Values], list[Outcome]] | None' = None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The result of a prediction: the sum, its 95 % interval, the verdict and the number of seeds of each setting."""

  text: str
  value: float
  low: float
  high: float
  verdict: str
  seeds: int
  unit: str = 'points'


def outcome(expected: Expected, values: Values) -> Outcome | None:
  """Compares a prediction with the results.

  The terms of one setting are added seed by seed, so that two metrics of the same trainings are compared in pairs.
  Different settings are independent: the interval is that of Welch's t-test, with the degrees of freedom of
  Satterthwaite's approximation.

  Args:
    expected: the prediction.
    values: the results.

  Returns:
    The outcome; None if a setting has no result yet.
  """
  terms: dict[str, list[Term]] = {}
  for term in expected.terms:
    terms.setdefault(term.setting, []).append(term)
  samples = []
  for setting, summands in terms.items():
    columns = [values.get(setting, {}).get(term.metric, ()) for term in summands]
    seeds = min(map(len, columns))
    if not seeds:
      return None
    samples.append(sum(t.weight * np.array(c[:seeds]) for t, c in zip(summands, columns)))
  value, half = _interval(samples)
  low, high, seeds = value - half, value + half, min(map(len, samples))
  verdict = _verdict(low, high, expected.within) if seeds > 1 else TOO_FEW
  return Outcome(expected.text, value, low, high, verdict, seeds, expected.unit)


def _interval(samples: list[np.ndarray]) -> tuple[float, float]:
  """The sum of the means of independent samples, and half the width of its 95 % interval."""
  value = float(sum(x.mean() for x in samples))
  if min(map(len, samples)) < 2:
    return value, float('inf')
  squares = [x.var(ddof=1) / len(x) for x in samples]  # of the standard errors
  if not sum(squares):
    return value, 0.0
  degrees = sum(squares) ** 2 / sum(s**2 / (len(x) - 1) for s, x in zip(squares, samples))
  return value, float(scipy.stats.t.ppf(0.975, degrees) * np.sqrt(sum(squares)))


def _verdict(low: float, high: float, within: float | None) -> str:
  if within is None:
    return CONFIRMED if low > 0 else CONTRADICTED if high < 0 else UNDECIDED
  if -within <= low and high <= within:
    return CONFIRMED
  return CONTRADICTED if low > within or high < -within else UNDECIDED
