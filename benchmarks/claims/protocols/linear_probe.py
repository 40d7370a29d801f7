"""MoCo, section 4.1, and SimCLR, appendix B.6: the learning rate of the linear probe."""

from benchmarks.claims.statistics import Claim, better, similar
from benchmarks.claims.trainings import MOCO, SIMCLR, probe

CLAIM = Claim(
  title='Learning rate of the linear probe',
  source='MoCo, section 4.1; SimCLR, appendix B.6',
  text="MoCo's features need the unusual learning rate of 30; SimCLR's protocol has 0.1.",
  settings={
    f'{run}, {protocol}': probe(training, recipe)
    for run, training in (('MoCo', MOCO), ('SimCLR', SIMCLR))
    for protocol, recipe in (('rate 30', 'moco'), ('rate 0.1', 'simclr'), ('sweep', 'sgd'))
  },
  expected=(
    better('MoCo, rate 30', 'MoCo, rate 0.1'),
    similar('MoCo, sweep', 'MoCo, rate 30', within=2),
    similar('SimCLR, sweep', 'SimCLR, rate 0.1', within=2),
  ),
  metrics=('linear',),
  note='Features are computed once, without augmentation. The sweep is that of `simclr-jax probe`: standardised '
  'features, the best of 11 learning rates on held-out training images.',
)
