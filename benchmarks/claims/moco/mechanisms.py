"""MoCo, section 4.1 and figure 3: end-to-end, memory bank and MoCo at equal K."""

from benchmarks.claims.statistics import Claim, better, similar
from benchmarks.claims.trainings import END_TO_END, MEMORY_BANK, MOCO

CLAIM = Claim(
  title='End-to-end, memory bank, MoCo',
  source='MoCo, section 4.1, figure 3',
  text='With equally many negatives, MoCo is as good as end-to-end and better than a memory bank.',
  settings={
    'MoCo, K = 128': MOCO.but(queue_size=128),
    'end-to-end, K = 127': END_TO_END,
    'memory bank, K = 128': MEMORY_BANK.but(negatives=128),
    'MoCo, K = 4,096': MOCO,
    'memory bank, K = 4,096': MEMORY_BANK,
  },
  expected=(
    similar('MoCo, K = 128', 'end-to-end, K = 127', within=2),
    better('MoCo, K = 128', 'memory bank, K = 128'),
    better('MoCo, K = 4,096', 'memory bank, K = 4,096'),
  ),
  seeds=5,
  published='ImageNet, K = 1,024: MoCo 57.5 %, end-to-end 57.3 %, memory bank 54.1 %; '
  'K = 65,536: MoCo 60.6 %, memory bank 58.0 %',
  note='An image is seen four times, and a row of the memory bank is up to an epoch old, as on ImageNet.',
)
