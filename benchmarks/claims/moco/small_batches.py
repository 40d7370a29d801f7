"""MoCo v2, table 2: small batches with a queue against SimCLR."""

from benchmarks.claims.simclr.batch_size import batch
from benchmarks.claims.statistics import Claim, better
from benchmarks.claims.trainings import MOCO_V2, SIMCLR, best

CLAIM = Claim(
  title='MoCo v2 with small batches against SimCLR',
  source='MoCo v2, table 2',
  text='MoCo v2 with a small batch is better than SimCLR with that batch, and than SimCLR with a large one.',
  settings={
    'MoCo v2, batch 32': best(MOCO_V2.but(batch_size_x=0.25), learning_rate=(0.03, 0.06)),
    'MoCo v2, batch 64': best(MOCO_V2.but(batch_size_x=0.5), learning_rate=(0.03, 0.06)),
    'SimCLR, batch 32': batch(1 / 4),
    'SimCLR, batch 128': SIMCLR,
    'SimCLR, batch 1,024': batch(8),
  },
  expected=(
    better('MoCo v2, batch 32', 'SimCLR, batch 32'),
    better('MoCo v2, batch 32', 'SimCLR, batch 1,024'),
    better('MoCo v2, batch 64', 'SimCLR, batch 128'),
  ),
  published='ImageNet, 200 epochs: MoCo v2 with batch 256 67.5 %, SimCLR with batch 256 61.9 %, with batch 8,192 66.6 %',
  note='Augmentation and the width of the MLP head are those of SimCLR.',
)
