"""MoCo v2, table 1: linear accuracy does not always predict how well features transfer."""

import itertools

import numpy as np
import scipy.stats

from benchmarks.claims.moco import key_momentum, mechanisms, queue_length, shuffle_bn, v2
from benchmarks.claims.simclr import augmentations, global_batchnorm, projection_head, temperature
from benchmarks.claims.statistics import CONFIRMED, CONTRADICTED, UNDECIDED, Claim, Outcome
from benchmarks.claims.trainings import Training, finetune

MODULES = (
  augmentations, projection_head, temperature, global_batchnorm,
  queue_length, key_momentum, shuffle_bn, mechanisms, v2,
)  # fmt: skip
RUNS: dict[Training, None] = dict.fromkeys(
  training
  for module in MODULES
  for training in module.CLAIM.settings.values()
  if isinstance(training, Training) and training.kind == 'pretrain'
)
NAMES = {'knn': 'kNN', 'linear': 'linear', 'top1': 'fine-tuned with 10 % of the labels'}


def statistic(values) -> list[Outcome]:
  """Spearman's rank correlation of each pair of metrics over all trainings, means over their seeds.

  The interval is a bootstrap over the trainings. Confirmed: it is above 0.
  """
  rows = []
  for training in RUNS:
    own, tuned = values.get(training.key, {}), values.get(finetune(training, '10%').key, {})
    if own and tuned:
      rows.append([np.mean({**own, **tuned}[metric]) for metric in NAMES])
  if len(rows) < 8:
    return []
  table, outcomes = np.array(rows), []
  for a, b in itertools.combinations(range(len(NAMES)), 2):
    r = scipy.stats.spearmanr(table[:, a], table[:, b]).statistic
    rng = np.random.default_rng(0)
    draws = [
      scipy.stats.spearmanr(
        *table[rng.integers(len(table), size=len(table))][:, [a, b]].T
      ).statistic
      for _ in range(2000)
    ]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    verdict = CONFIRMED if low > 0 else CONTRADICTED if high < 0 else UNDECIDED
    first, second = list(NAMES.values())[a], list(NAMES.values())[b]
    text = f'{first} and {second} rank {len(table)} trainings alike'
    outcomes.append(Outcome(text, r, low, high, verdict, len(table), "Spearman's rho"))
  return outcomes


CLAIM = Claim(
  title='Do kNN, linear and fine-tuned accuracy agree?',
  source='MoCo v2, section 3; Wu et al. 2018',
  text='Rankings of trainings by kNN, linear and fine-tuned accuracy agree, but not fully.',
  settings={training.describe(): finetune(training, '10%') for training in RUNS},
  expected=(),
  seeds=1,
  metrics=('top1',),
  statistic=statistic,
)
