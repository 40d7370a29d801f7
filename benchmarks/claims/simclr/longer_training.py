"""SimCLR, figure 9: longer training."""

from benchmarks.claims.statistics import Claim, better
from benchmarks.claims.trainings import SIMCLR, UNTRAINED

CLAIM = Claim(
  title='Longer training',
  source='SimCLR, section 5.2, figure 9',
  text='Longer training is better.',
  settings={
    'untrained': UNTRAINED,
    'epochs x 0.5': SIMCLR.but(epochs_x=0.5),
    'epochs x 1': SIMCLR,
    'epochs x 4': SIMCLR.but(epochs_x=4),
  },
  expected=(
    better('epochs x 0.5', 'untrained'),
    better('epochs x 1', 'epochs x 0.5'),
    better('epochs x 4', 'epochs x 1'),
  ),
  published='ImageNet, batch 4,096: 64.6 % after 100 epochs, 66.5 % after 200, 68.2 % after 400, 68.9 % after 800',
)
