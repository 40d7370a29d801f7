"""SimCLR, section 2.2: LARS for large batches."""

from benchmarks.claims.statistics import Claim, larger_gap, similar
from benchmarks.claims.trainings import SIMCLR, best

LARGE = SIMCLR.but(batch_size_x=8)
SGD = {'optimizer': 'sgd', 'learning_rate_scaling': 'none', 'weight_decay': 1e-4}

CLAIM = Claim(
  title='LARS against SGD',
  source='SimCLR, section 2.2',
  text='With large batches and a linearly scaled learning rate, SGD is unstable; LARS is not.',
  settings={
    'LARS, batch 128': best(SIMCLR, learning_rate=(2.0, 8.0), itself=True),
    'SGD, batch 128': best(SIMCLR.but(**SGD), learning_rate=(0.05, 0.2, 0.8)),
    'LARS, batch 1,024': best(LARGE, learning_rate=(1.0, 2.0, 4.0)),
    'SGD, batch 1,024': best(LARGE.but(**SGD), learning_rate=(0.2, 0.8, 3.2)),
  },
  expected=(
    similar('LARS, batch 128', 'SGD, batch 128', within=2),
    larger_gap(
      ('LARS, batch 1,024', 'SGD, batch 1,024'),
      ('LARS, batch 128', 'SGD, batch 128'),
      text='the advantage of LARS is larger with batch 1,024',
    ),
  ),  # fmt: skip
  note='The learning rate of each is the best of three on validation images. The paper states no numbers.',
)
