"""SimCLR, section 4.2 and figure 8: the projection head."""

from benchmarks.claims.statistics import Claim, better
from benchmarks.claims.trainings import SIMCLR

CLAIM = Claim(
  title='Projection head',
  source='SimCLR, section 4.2, figure 8',
  text='A non-linear projection head is better than a linear one, which is better than none; '
  'the features before the head, h, are better than its output, z.',
  settings={
    'non-linear head': SIMCLR,
    'linear head': SIMCLR.but(model__head='linear'),
    'no head': SIMCLR.but(model__head='none'),
  },
  expected=(
    better('non-linear head', 'linear head'),
    better('linear head', 'no head'),
    better('non-linear head', 'no head'),
    better('non-linear head', 'non-linear head', b_metric='linear_z', text='h > z'),
  ),
  seeds=5,
  metrics=('linear', 'knn', 'linear_z'),
  published='ImageNet: non-linear 3 points above linear, more than 10 above none; h more than 10 points above z',
)
