"""SimCLR, section 3.1 and figure 5: the composition of augmentations."""

from benchmarks.claims.statistics import Claim, better
from benchmarks.claims.trainings import SIMCLR

CROP = 'simclr_crop(0.08, 1) | flip'
COLOR = 'simclr_jitter(0.5, "additive", p=0.8) | grayscale(p=0.2)'
OTHERS = {
  'blur': 'simclr_blur(p=0.5)',
  'noise': 'noise(0.1, p=0.5)',
  'cutout': 'cutout(0.5, p=0.5)',
  'rotation': 'rotate',
  'Sobel': 'sobel(p=0.5)',
}

CLAIM = Claim(
  title='Composition of augmentations',
  source='SimCLR, section 3.1, figure 5',
  text='No single augmentation suffices; random crops with colour distortion stand out.',
  settings={
    'crop + colour': SIMCLR,
    'neither': SIMCLR.but(augment__view1='resize'),
    'crop': SIMCLR.but(augment__view1=CROP),
    'colour': SIMCLR.but(augment__view1=f'resize | {COLOR}'),
    **{
      f'crop + {name}': SIMCLR.but(augment__view1=f'{CROP} | {op}') for name, op in OTHERS.items()
    },
    'crop + colour + blur': SIMCLR.but(augment__view1=f'{CROP} | {COLOR} | {OTHERS["blur"]}'),
  },
  expected=(
    better('crop + colour', 'crop'),
    better('crop + colour', 'colour'),
    *(better('crop + colour', f'crop + {name}') for name in OTHERS),
    better('crop', 'neither'),
    better('colour', 'neither'),
  ),
  seeds=5,
  published='ImageNet, figure 5: crop + colour 55.8 %, the best of all pairs',
  note='Both views are augmented; the paper augments one view beside the crop of both.',
)
