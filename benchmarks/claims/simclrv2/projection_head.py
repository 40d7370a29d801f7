"""SimCLR v2, section 3.3 and figure 5: depth of the head, and the layer that fine-tuning starts from."""

from benchmarks.claims.statistics import Claim, better, larger_gap
from benchmarks.claims.trainings import SIMCLR, finetune

DEEP = SIMCLR.but(model__head_layers=3)

CLAIM = Claim(
  title='Deeper heads, fine-tuned from a middle layer',
  source='SimCLR v2, section 3.3, figure 5',
  text='A deeper projection head is better when fine-tuning starts from its first layer, above all with few labels.',
  settings={
    f'{layers}-layer head, layer {start}, {labels}': finetune(run, labels, head_layer=start)
    for layers, run in ((2, SIMCLR), (3, DEEP))
    for start in range(layers)
    for labels in ('1%', '10%')
  },
  expected=(
    better('3-layer head, layer 1, 1%', '3-layer head, layer 0, 1%', 'top1'),
    better('3-layer head, layer 1, 10%', '3-layer head, layer 0, 10%', 'top1'),
    better('3-layer head, layer 1, 1%', '2-layer head, layer 0, 1%', 'top1'),
    better('3-layer head, layer 1, 1%', '3-layer head, layer 2, 1%', 'top1'),
    larger_gap(
      ('3-layer head, layer 1, 1%', '3-layer head, layer 0, 1%'),
      ('3-layer head, layer 1, 10%', '3-layer head, layer 0, 10%'), 'top1',
      text='layer 1 helps more with 1% than with 10% of the labels',
    ),
  ),
  metrics=('top1',),
  published='ImageNet, figure 5: with 1 % of the labels, a 3-layer head fine-tuned from layer 1 is up to 14 % better '
  '(relatively) than a 2-layer head fine-tuned from layer 0',
)  # fmt: skip
