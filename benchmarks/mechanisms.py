"""SimCLR, MoCo, memory bank and end-to-end side by side on CIFAR-10, on a CPU, in small.

    python benchmarks/mechanisms.py --data=TFDS_DIR [--steps=300] [--out=runs/mechanisms]
    python benchmarks/mechanisms.py --data=TFDS_DIR --ablations

Same images, views, network, batch and number of steps for all. SimCLR has its recipe's temperature and LARS, the
others SGD and the temperature of moco_cifar10. Prints for each: loss at the end and by chance, contrastive accuracy, kNN accuracy (10,000 training images, 2,000 test
images), seconds a step (median of rounds in which all take turns, so that a busy machine is fair to
them) and what the compiled step needs in memory. Writes the loss curves and kNN as one figure.
`--ablations` does the same for MoCo without momentum and without ShuffleBN.
"""

import argparse
import pathlib
import time

import jax
import matplotlib.figure
import numpy as np

from simclr_jax import config, data, logs, train, train_state

NETWORK = {
  'augment.view1': 'moco_cifar10',
  'augment.eval': 'moco_eval',
  'batch_size': '256',
  'data.name': 'cifar10',
  'data.num_classes': '10',
  'data.test_split': 'test',
  'dtype': 'float32',
  'image_size': '32',
  'model.depth': '8',
  'model.variant': 'torchvision',
  'model.normalize': 'cifar10',
  'model.stem': 'strided',
  'model.width_multiplier': '0.5',
  'warmup_epochs': '0',
  'tensorboard': 'false',
  'log_every_steps': '5',
}
# What the ImageNet recipes leave to the size of the data: as in moco_cifar10.
SGD = {
  'learning_rate': '0.06',
  'learning_rate_scaling': 'none',
  'schedule': 'cosine',
  'weight_decay': '5e-4',
  'temperature': '0.1',
}
MOCO = ('moco_cifar10', {**SGD, 'model.bn_layout': 'contiguous'})
COMPARISON = {
  'SimCLR': ('simclr_cifar10', {}),
  'MoCo': MOCO,
  'MoCo, symmetric': ('moco_cifar10:symmetric', MOCO[1]),
  'memory bank': ('memory_bank_imagenet', {**SGD, 'negatives': '4096'}),
  'end-to-end': ('end_to_end_imagenet', SGD),
}
ABLATIONS = {
  'MoCo': MOCO,
  'momentum 0': (MOCO[0], {**MOCO[1], 'key_momentum': '0'}),
  'no shuffle': (MOCO[0], {**MOCO[1], 'shuffle': 'none'}),
}
COLORS = ('#2563eb', '#d97706', '#059669', '#7c3aed', '#dc2626')


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--data', required=True, help='the TFDS folder')
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--rounds', type=int, default=5, help='of timing')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/mechanisms'))
  parser.add_argument('--figure', type=pathlib.Path, help='(OUT/mechanisms.png)')
  parser.add_argument('--ablations', action='store_true')
  parser.add_argument('--set', action='append', default=[], metavar='FIELD=VALUE')
  args = parser.parse_args()
  common = {
    **NETWORK,
    'data.dir': args.data,
    'steps': str(args.steps),
    'knn_every_epochs': '1',
    **dict(pair.split('=', 1) for pair in args.set),
  }
  runs = {
    name: config.load(spec, {**common, **own})
    for name, (spec, own) in (ABLATIONS if args.ablations else COMPARISON).items()
  }
  images = data.load(next(iter(runs.values())).data, 'train')
  seconds, memory = costs(runs, images, args.rounds)
  records = {}
  for name, recipe in runs.items():
    workdir = args.out / name.replace(', ', '_').replace(' ', '_')
    if train.pretrain(recipe, workdir, f'benchmarks/mechanisms.py ({name})'):
      raise SystemExit('interrupted; run it again to go on')
    records[name] = logs.read(workdir)
  base = 'MoCo'
  print(f'{"":16}  loss  chance  contrastive %  kNN %   s/step  x {base}   MiB  x {base}')
  for name, found in records.items():
    last = {k: v for r in found for k, v in r.items()}
    print(
      f'{name:16} {last["loss"]:5.2f} {last["chance_loss"]:7.2f} {100 * last["contrastive_acc"]:14.1f} '
      f'{100 * last["knn_acc"]:6.1f} {seconds[name]:8.2f} {seconds[name] / seconds[base]:7.2f} '
      f'{memory[name]:5.0f} {memory[name] / memory[base]:7.2f}'
    )
  draw(records, args.figure or args.out / 'mechanisms.png')


def costs(runs, images, rounds):
  """Median seconds of a step, and MiB of arguments, results and temporaries of the compiled one."""
  steps, memory, times = {}, {}, {name: [] for name in runs}
  for name, recipe in runs.items():
    state, step = train_state.build(recipe, images)
    analysis = step.lower(state, 0).compile().memory_analysis()
    dataset = images.images.nbytes + 4 * len(images)  # it is an argument too
    memory[name] = (
      analysis.argument_size_in_bytes
      + analysis.output_size_in_bytes
      + analysis.temp_size_in_bytes
      - analysis.alias_size_in_bytes
      - dataset
    ) / 2**20
    steps[name] = step, step(state, 0)[0]
  for i in range(1, rounds + 1):
    for name, (step, state) in steps.items():
      start = time.monotonic()
      state, metrics = step(state, i)
      jax.block_until_ready((state, metrics))
      times[name].append(time.monotonic() - start)
      steps[name] = step, state
  return {name: float(np.median(t)) for name, t in times.items()}, memory


def draw(records, path):
  """Loss above chance level, contrastive accuracy and kNN accuracy against the step."""
  figure = matplotlib.figure.Figure(figsize=(12, 3.4), layout='constrained')
  loss, accuracy, knn = figure.subplots(1, 3)
  for color, (name, found) in zip(COLORS, records.items()):
    for axes, points in (
      (loss, [(r['step'], r['loss'] / r['chance_loss']) for r in found if 'loss' in r]),
      (accuracy, [(r['step'], 100 * r['contrastive_acc']) for r in found if 'loss' in r]),
      (knn, [(r['step'], 100 * r['knn_acc']) for r in found if 'knn_acc' in r]),
    ):
      axes.plot(*np.array(points).T, color=color, label=name, marker='o' if axes is knn else None)
  loss.axhline(1, color='#9ca3af', lw=1, ls='--')
  loss.set_title('loss / loss of guessing', loc='left')
  accuracy.set_title('contrastive accuracy, %', loc='left')
  knn.set_title('kNN accuracy on CIFAR-10, %', loc='left')
  for axes in (loss, accuracy, knn):
    axes.set_xlabel('step')
    axes.spines[['top', 'right']].set_visible(False)
  knn.legend(frameon=False, loc='lower right')
  figure.savefig(path, dpi=110)
  print(f'wrote {path}')


if __name__ == '__main__':
  main()
