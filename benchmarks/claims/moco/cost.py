"""MoCo v2, table 3: memory and time of MoCo and end-to-end."""

from benchmarks.claims.statistics import Claim, lower
from benchmarks.claims.trainings import END_TO_END, MOCO, SIMCLR, cost

CLAIM = Claim(
  title='Memory and time',
  source='MoCo v2, table 3',
  text='At equal batch size, a step of MoCo needs less memory and less time than an end-to-end step, '
  'since keys need no backward pass.',
  settings={
    'MoCo': cost(MOCO),
    'end-to-end': cost(END_TO_END),
    'end-to-end, batch 1,024': cost(END_TO_END.but(batch_size_x=8)),
    'SimCLR': cost(SIMCLR),
  },
  expected=(
    lower('MoCo', 'end-to-end', 'seconds', 's', text='MoCo needs less time than end-to-end'),
    lower('MoCo', 'end-to-end', 'mib', 'MiB', text='MoCo needs less memory than end-to-end'),
    lower(
      'MoCo', 'end-to-end, batch 1,024', 'mib', 'MiB', text='and than end-to-end with batch 1,024'
    ),
  ),
  metrics=('seconds', 'mib'),
  published='8 V100, batch 256: MoCo 5.0 GB and 53 hours, end-to-end 7.4 GB and 65 hours; end-to-end, '
  'batch 4,096: 93.0 GB (estimated)',
  note='CPU time per step, memory of the compiled step without the images. Seeds are repeated measurements.',
)
