"""The claims of the papers: every comparison is possible, and the intervals are those of scipy."""

import numpy as np
import pytest
import scipy.stats

from benchmarks.claims import plan, statistics, trainings
from simclr_jax import config

CLAIMS = plan.claims()


@pytest.mark.parametrize('name', CLAIMS)
def test_predictions_are_about_settings_of_the_claim(name):
  claim = CLAIMS[name]
  assert claim.expected or claim.statistic
  for expected in claim.expected:
    assert {term.setting for term in expected.terms} <= set(claim.settings)
    assert sum(term.weight for term in expected.terms) == 0


@pytest.mark.parametrize('size', trainings.SIZES)
def test_recipes_are_valid(size):
  wanted = [t for t, _ in plan.jobs(CLAIMS, {}, 1) if t.kind in ('pretrain', 'cost')]
  assert len(wanted) > 50
  for training in wanted:
    config.load(training.recipe, trainings.fields_at(size, training))


def test_trainings_that_differ_have_different_keys():
  everything = {t for t, _ in plan.jobs(CLAIMS, {}, 1)}
  assert len({t.key for t in everything}) == len(everything)


def test_interval_of_a_difference_is_welchs():
  a, b = [40.0, 41.5, 40.2], [38.0, 39.5, 37.1, 38.4]
  found = statistics.outcome(statistics.better('a', 'b'), {'a': {'linear': a}, 'b': {'linear': b}})
  interval = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
  np.testing.assert_allclose((found.low, found.high), (interval.low, interval.high), rtol=1e-12)
  assert found.verdict == statistics.CONFIRMED


def test_two_metrics_of_one_training_are_compared_in_pairs():
  h, z = [40.0, 45.0, 50.0], [39.0, 44.2, 48.9]
  found = statistics.outcome(
    statistics.better('a', 'a', b_metric='linear_z'), {'a': {'linear': h, 'linear_z': z}}
  )
  interval = scipy.stats.ttest_rel(h, z).confidence_interval(0.95)
  np.testing.assert_allclose((found.low, found.high), (interval.low, interval.high), rtol=1e-12)


@pytest.mark.parametrize(
  'a,within,verdict',
  [
    ([39.9, 40.0, 40.1], None, statistics.CONFIRMED),
    ([19.9, 20.0, 20.1], None, statistics.CONTRADICTED),
    ([10.0, 30.0, 50.0], None, statistics.UNDECIDED),
    ([40.0], None, statistics.TOO_FEW),
    ([30.4, 30.5, 30.6], 2, statistics.CONFIRMED),
    ([39.9, 40.0, 40.1], 2, statistics.CONTRADICTED),
    ([28.0, 30.0, 34.0], 2, statistics.UNDECIDED),
  ],
)
def test_verdicts(a, within, verdict):
  values = {'a': {'linear': a}, 'b': {'linear': [29.9, 30.0, 30.1]}}
  expected = statistics.better('a', 'b') if within is None else statistics.similar('a', 'b', within)
  assert statistics.outcome(expected, values).verdict == verdict


def test_a_choice_is_made_on_validation_images_and_repeated_with_more_seeds():
  choice = trainings.best(trainings.SIMCLR, temperature=(0.1, 0.2))
  claim = statistics.Claim('', '', '', {'a': choice}, (statistics.better('a', 'a'),))
  first, second = choice.candidates
  assert plan.jobs({'c': claim}, {}, 3) == [(first, 0), (second, 0)]
  results = {
    (t.key, 0): {'metrics': {'linear_validation': score, 'linear': -score}}
    for t, score in ((first, 30.0), (second, 31.0))
  }
  assert plan.chosen(choice, results) == second
  assert plan.jobs({'c': claim}, results, 2)[2:] == [(second, 1)]
