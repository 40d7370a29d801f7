"""SimCLR, section 5.1 and table 4: NT-Xent against other losses."""

from benchmarks.claims.statistics import Claim, better
from benchmarks.claims.trainings import SIMCLR, best

OTHER = SIMCLR.but(loss_scale=1.0)
LOGISTIC = OTHER.but(loss='nt_logistic')
TRIPLET = OTHER.but(loss='margin_triplet')
TEMPERATURES, MARGINS = (0.1, 0.2, 0.5, 1.0), (0.4, 0.8, 1.6)  # appendix B.10

CLAIM = Claim(
  title='Loss functions',
  source='SimCLR, section 5.1, table 4',
  text='NT-Xent is better than the logistic and margin losses, even with semi-hard negatives.',
  settings={
    'NT-Xent': best(SIMCLR, temperature=TEMPERATURES[:2], itself=True),
    'NT-Logistic': best(LOGISTIC, temperature=TEMPERATURES[1:]),
    'NT-Logistic, semi-hard': best(LOGISTIC.but(semi_hard=True), temperature=TEMPERATURES[1:]),
    'margin triplet': best(TRIPLET, margin=MARGINS),
    'margin triplet, semi-hard': best(TRIPLET.but(semi_hard=True), margin=MARGINS),
    'pairwise margin': best(OTHER.but(loss='pairwise_margin'), margin=MARGINS),
  },
  expected=(
    better('NT-Xent', 'NT-Logistic'),
    better('NT-Xent', 'NT-Logistic, semi-hard'),
    better('NT-Xent', 'margin triplet'),
    better('NT-Xent', 'margin triplet, semi-hard'),
    better('NT-Xent', 'pairwise margin'),
    better('NT-Logistic, semi-hard', 'NT-Logistic'),
    better('margin triplet, semi-hard', 'margin triplet'),
  ),
  published='ImageNet: NT-Xent 63.9 %, NT-Logistic 51.6 %, semi-hard 57.9 %, margin triplet 50.9 %, semi-hard 57.5 %',
  note='Temperature or margin of each loss: the best of three values of appendix B.10 on validation images. As in '
  'the paper, other losses have the n - 1 negatives of the other view, NT-Xent 2n - 2.',
)
