"""SimCLR v2, section 2: the memory."""

from benchmarks.claims.statistics import Claim, better, similar
from benchmarks.claims.trainings import SIMCLR

MEMORY = {'queue_size': 4096, 'key_momentum': 0.99}
SMALL, LARGE = (
  SIMCLR.but(batch_size_x=1 / 4, learning_rate=4.0),
  SIMCLR.but(batch_size_x=8, learning_rate=4.0),
)

CLAIM = Claim(
  title='Memory of SimCLR v2',
  source='SimCLR v2, section 2, appendix D',
  text='A memory of negatives helps a little if the batch is small, and hardly if it is large.',
  settings={
    'batch 32': SMALL,
    'batch 32, memory': SMALL.but(**MEMORY),
    'batch 1,024': LARGE,
    'batch 1,024, memory': LARGE.but(**MEMORY),
  },
  expected=(
    better('batch 32, memory', 'batch 32'),
    similar('batch 1,024, memory', 'batch 1,024', within=2),
  ),
  published='ImageNet, batch 4,096: about 1 % better linear accuracy with a memory of 65,536',
)
