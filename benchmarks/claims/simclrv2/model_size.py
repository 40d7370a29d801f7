"""SimCLR v2, section 3.2 and figures 1 and 4: bigger models are more label-efficient."""

from benchmarks.claims.statistics import Claim, better, larger_gap
from benchmarks.claims.trainings import SIMCLR, finetune

WIDTHS, LABELS = (0.5, 1, 2), ('1%', '10%', '100%')


def name(width, labels):
  """The name of a setting."""
  return f'width x {width:g}, {labels}'


CLAIM = Claim(
  title='Bigger models are more label-efficient',
  source='SimCLR v2, section 3.2, figures 1 and 4',
  text='Bigger models are better when fine-tuned, and gain more the fewer labels there are.',
  settings={
    name(width, labels): finetune(SIMCLR.but(model__width_multiplier_x=width) if width != 1 else SIMCLR, labels)
    for width in WIDTHS
    for labels in LABELS
  },
  expected=(
    *(better(name(2, labels), name(0.5, labels), 'top1') for labels in LABELS),
    larger_gap(
      (name(2, '1%'), name(0.5, '1%')), (name(2, '100%'), name(0.5, '100%')), 'top1',
      text='the gain is larger with 1% than with 100% of the labels',
    ),
  ),
  metrics=('top1',),
  published='ImageNet, from ResNet-50 to ResNet-152 3x with selective kernels: 57.9 to 74.9 % with 1 % of the labels, '
  '76.3 to 83.1 % with all',
)  # fmt: skip
