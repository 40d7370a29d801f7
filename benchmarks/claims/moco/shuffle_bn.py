"""MoCo, section 3.3 and appendix A.9: ShuffleBN."""

from benchmarks.claims.statistics import Claim, better
from benchmarks.claims.trainings import MOCO

CLAIM = Claim(
  title='ShuffleBN',
  source='MoCo, section 3.3, appendix A.9',
  text='Without shuffling, the network finds the key of a query by its BatchNorm group: '
  'the contrastive accuracy rises, and the features become worse.',
  settings={'shuffled': MOCO, 'not shuffled': MOCO.but(shuffle='none')},
  expected=(
    better('shuffled', 'not shuffled'),
    better(
      'not shuffled',
      'shuffled',
      'contrastive_acc',
      text='contrastive accuracy is higher without shuffling',
    ),
  ),
  metrics=('linear', 'knn', 'contrastive_acc'),
  published='ImageNet: the contrastive accuracy exceeds 99.9 % without shuffling, and the kNN accuracy drops',
)
