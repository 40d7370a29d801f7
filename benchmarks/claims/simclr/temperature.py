"""SimCLR, section 5.1 and table 5: normalisation and temperature."""

from benchmarks.claims.statistics import Claim, better
from benchmarks.claims.trainings import SIMCLR


def unnormalised(temperature):
  """Dot products instead of cosines."""
  return SIMCLR.but(hidden_norm=False, temperature=temperature)


CLAIM = Claim(
  title='Normalisation and temperature',
  source='SimCLR, section 5.1, table 5',
  text='With cosine similarity and a suitable temperature, features are better than with dot products, although '
  'the contrastive accuracy is lower.',
  settings={
    'T = 0.05': SIMCLR.but(temperature=0.05),
    'T = 0.1': SIMCLR.but(temperature=0.1),
    'T = 0.5': SIMCLR,
    'T = 1': SIMCLR.but(temperature=1.0),
    'dot product, T = 10': unnormalised(10.0),
    'dot product, T = 100': unnormalised(100.0),
  },
  expected=(
    better('T = 0.5', 'dot product, T = 10'),
    better('T = 0.5', 'dot product, T = 100'),
    better('T = 0.1', 'T = 1'),
    better('T = 0.1', 'T = 0.05'),
  ),
  metrics=('linear', 'knn', 'contrastive_acc'),
  published='ImageNet: T = 0.05 59.7 %, 0.1 64.4 %, 0.5 60.7 %, 1 58.0 %; dot products 57.2 and 57.0 %',
)
