"""MoCo, figure 3: the number of negatives."""

from benchmarks.claims.statistics import Claim, better
from benchmarks.claims.trainings import MOCO

CLAIM = Claim(
  title='Queue length',
  source='MoCo, section 4.1, figure 3',
  text='More negatives in the queue are better.',
  settings={
    'K = 4,096': MOCO,
    **{f'K = {size:,}': MOCO.but(queue_size=size) for size in (128, 512, 8192)},
  },
  expected=(
    better('K = 512', 'K = 128'),
    better('K = 4,096', 'K = 512'),
    better('K = 8,192', 'K = 512'),
  ),
  published='ImageNet: 54.9 % with K = 256, 59.0 % with 4,096, 60.6 % with 65,536',
)
