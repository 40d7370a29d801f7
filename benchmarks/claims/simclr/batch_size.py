"""SimCLR, section 5.2 and figure 9, appendix B.1: batch size at equal epochs."""

from benchmarks.claims.statistics import Claim, better, larger_gap
from benchmarks.claims.trainings import SIMCLR, Best

# Base rates that are equal at the batch size 128.
LINEAR, SQUARE_ROOT = {'learning_rate': 4.0}, {'learning_rate': 2 / 128**0.5}
SQUARE_ROOT['learning_rate_scaling'] = 'sqrt'


def batch(factor):
  """The better of the two scaling rules of the learning rate."""
  run = SIMCLR.but(batch_size_x=factor)
  return Best((run.but(**LINEAR), run.but(**SQUARE_ROOT))) if factor != 1 else SIMCLR


CLAIM = Claim(
  title='Batch size',
  source='SimCLR, section 5.2, figure 9; appendix B.1',
  text='At equal epochs, large batches are better, above all if training is short.',
  settings={
    **{f'batch {round(128 * factor):,}': batch(factor) for factor in (1 / 4, 1, 4, 8)},
    'batch 128, epochs x 4': SIMCLR.but(epochs_x=4),
    'batch 512, epochs x 4': SIMCLR.but(epochs_x=4, batch_size_x=4, **LINEAR),
  },
  expected=(
    better('batch 128', 'batch 32'),
    better('batch 512', 'batch 32'),
    better('batch 1,024', 'batch 32'),
    larger_gap(
      ('batch 512', 'batch 128'),
      ('batch 512, epochs x 4', 'batch 128, epochs x 4'),
      text='the advantage of batch 512 over 128 is smaller with epochs x 4',
    ),
  ),  # fmt: skip
  published='ImageNet, 100 epochs: batch 256 57.5 % (with square root 62.8 %), batch 4,096 64.6 % (64.5 %)',
  note='Learning rate by linear or square-root scaling, whichever is better on validation images. With 10,000 images, '
  'batch 1,024 has 39 steps in all, batch 32 1,250.',
)
