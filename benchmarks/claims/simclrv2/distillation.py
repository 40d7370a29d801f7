"""SimCLR v2, section 3.4 and table 2, figure 6: distillation with unlabelled images."""

from benchmarks.claims.statistics import Claim, better, similar
from benchmarks.claims.trainings import SIMCLR, distill, finetune

LARGE = SIMCLR.but(model__width_multiplier_x=2)
TEACHER, SMALL = finetune(LARGE, '10%'), finetune(SIMCLR, '10%')
STUDENT = distill(TEACHER, model__width_multiplier_x=0.5)  # the network of SMALL
LABELLED = {'share of the images': 0.1, 'alpha': 0.5}

CLAIM = Claim(
  title='Distillation',
  source='SimCLR v2, section 3.4, table 2, figure 6',
  text='Distillation on unlabelled images improves a fine-tuned network, also into the same or a smaller one; '
  'labels are hardly needed for it, unlabelled images are.',
  settings={
    'teacher, width x 2': TEACHER,
    'fine-tuned': SMALL,
    'from scratch': finetune(SIMCLR, '10%', init_from=''),
    'student': STUDENT,
    'student, labelled images only': STUDENT.but(**LABELLED),
    'student, with labels': STUDENT.but(alpha=0.5),
    'student, T = 0.1': STUDENT.but(temperature=0.1),
    'student, T = 4': STUDENT.but(temperature=4.0),
    'self-distilled, width x 2': distill(TEACHER),
    'self-distilled': distill(SMALL),
  },
  expected=(
    better('student', 'fine-tuned', 'top1'),
    better('student', 'from scratch', 'top1'),
    better('student', 'student, labelled images only', 'top1'),
    similar('student', 'student, with labels', 2, 'top1'),
    better('self-distilled', 'fine-tuned', 'top1'),
    better('self-distilled, width x 2', 'teacher, width x 2', 'top1'),
  ),
  seeds=5,
  metrics=('top1',),
  published='ImageNet, 10 % of the labels, ResNet-50 student: 52.0 % labels only, 66.2 % with distillation on labelled '
  'images, 75.1 % on all, 74.3 % on all without labels',
  note='The student has the network of the row "fine-tuned" and random initial weights.',
)
