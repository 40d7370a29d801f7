"""SimCLR, section 2.2: BatchNorm over all devices."""

from benchmarks.claims.statistics import Claim, better
from benchmarks.claims.trainings import SIMCLR

CLAIM = Claim(
  title='Global BatchNorm',
  source='SimCLR, section 2.2',
  text='With BatchNorm statistics per device, the network finds positive pairs by their common statistics, '
  'which does not improve the features.',
  settings={
    'global': SIMCLR,
    '8 groups': SIMCLR.but(model__bn_groups=8, model__bn_layout='contiguous'),
  },
  expected=(
    better('global', '8 groups'),
    better(
      '8 groups', 'global', 'contrastive_acc', text='contrastive accuracy is higher in 8 groups'
    ),
  ),
  metrics=('linear', 'knn', 'contrastive_acc'),
  note='Both views of an image are in the same group, as on one device. The paper states no numbers.',
)
