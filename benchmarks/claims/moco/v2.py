"""MoCo v2, table 1 and its table on the temperature."""

from benchmarks.claims.statistics import Claim, better
from benchmarks.claims.trainings import MOCO

V1 = MOCO.but(augment__view1='moco_v1', schedule='multistep', temperature=0.07)
MLP = {'model__head': 'mlp', 'temperature': 0.2}
AUG = {'augment__view1': 'moco_v2'}

CLAIM = Claim(
  title="MoCo v2's changes",
  source='MoCo v2, table 1, and table on the temperature',
  text='An MLP head with T = 0.2, stronger augmentation and a cosine schedule each improve MoCo.',
  settings={
    'v1': V1,
    'MLP, T = 0.07': V1.but(model__head='mlp'),
    'MLP, T = 0.2': V1.but(**MLP),
    'aug+': V1.but(**AUG),
    'MLP, aug+': V1.but(**MLP, **AUG),
    'MLP, aug+, cosine': V1.but(**MLP, **AUG, schedule='cosine'),
  },
  expected=(
    better('MLP, T = 0.2', 'v1'),
    better('MLP, T = 0.2', 'MLP, T = 0.07'),
    better('aug+', 'v1'),
    better('MLP, aug+', 'MLP, T = 0.2'),
    better('MLP, aug+, cosine', 'MLP, aug+'),
    better('MLP, aug+, cosine', 'v1'),
  ),
  published='ImageNet: v1 60.6 %, MLP 62.9 % with T = 0.07 and 66.2 % with T = 0.2, aug+ 63.4 %, '
  'MLP and aug+ 67.3 %, with cosine 67.5 %',
)
