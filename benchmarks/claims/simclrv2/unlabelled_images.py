"""SimCLR v2, section 3.4: the share of unlabelled images that a student sees."""

from benchmarks.claims.simclrv2.distillation import STUDENT
from benchmarks.claims.statistics import Claim, better
from benchmarks.claims.trainings import Training

SHARES = (0.1, 0.3, 1.0)


def with_share(share: float) -> Training:
  """A student of this share of the images; the tenth with labels comes first."""
  return STUDENT.but(**{'share of the images': share}) if share < 1 else STUDENT


CLAIM = Claim(
  title='Unlabelled images help distillation',
  source='SimCLR v2, section 3.4, table 2',
  text='The more unlabelled images a student sees, the better.',
  settings={f'{share:.0%} of the images': with_share(share) for share in SHARES},
  expected=(
    better('30% of the images', '10% of the images', 'top1'),
    better('100% of the images', '30% of the images', 'top1'),
  ),
  metrics=('top1',),
  note='Equally many steps; no labels. The teacher was fine-tuned with labels of the first tenth.',
)
