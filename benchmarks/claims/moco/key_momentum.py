"""MoCo, section 4.1: the momentum of the EMA encoder."""

from benchmarks.claims.statistics import Claim, better
from benchmarks.claims.trainings import MOCO

CLAIM = Claim(
  title='Momentum of the EMA encoder',
  source='MoCo, section 4.1, table on momentum',
  text='A slowly progressing EMA encoder is essential: training fails with momentum 0.',
  settings={
    'm = 0.99': MOCO,
    **{f'm = {m:g}': MOCO.but(key_momentum=m) for m in (0.0, 0.9, 0.999)},
  },
  expected=(
    better('m = 0.99', 'm = 0'),
    better('m = 0.99', 'm = 0.9'),
    better('m = 0.999', 'm = 0.99'),
  ),
  published='ImageNet, K = 4,096: 0 fails, 0.9 55.2 %, 0.99 57.8 %, 0.999 59.0 %',
  note='In 312 steps, an EMA encoder with momentum 0.999 moves a quarter of the way.',
)
