"""SimCLR, MoCo, memory bank and end-to-end on CIFAR-10: a small comparison on a CPU.

    python benchmarks/mechanisms.py --data=TFDS_DIR [--steps=300] [--out=runs/mechanisms]
    python benchmarks/mechanisms.py --data=TFDS_DIR --ablations

All have the same images, views, network, batch size and number of steps. SimCLR has its recipe's temperature and LARS,
the others SGD and the temperature of moco_cifar10. Prints for each: final loss and chance level, contrastive accuracy,
kNN accuracy (10,000 training images, 2,000 test images), seconds per step and memory of the compiled step. Timed steps
of all methods alternate, so that a busy machine slows all; the median is printed. Writes loss, contrastive and kNN
accuracy by step as one figure. The same command resumes. `--ablations` compares MoCo without momentum and without
ShuffleBN.
"""

import argparse
import pathlib
import time
from typing import Any

import jax
import matplotlib.figure
import ml_collections
import numpy as np

from simclr_jax import config, data, train, train_state
from simclr_jax.runtime import logs

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
# Fields that depend on the size of the data set, as in moco_cifar10.
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
  parser.add_argument('--data', required=True, help='the TFDS folder with CIFAR-10')
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--rounds', type=int, default=5, help='timed steps of each method')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/mechanisms'))
  parser.add_argument('--figure', type=pathlib.Path, help='(default: OUT/mechanisms.png)')
  parser.add_argument('--ablations', action='store_true')
  parser.add_argument(
    '--set', action='append', default=[], metavar='FIELD=VALUE', help='a recipe field'
  )
  args = parser.parse_args()
  common = {
    **NETWORK,
    'data.dir': args.data,
    'steps': str(args.steps),
    'knn_every_epochs': '1',
    **dict(pair.split('=', 1) for pair in args.set),
  }
  recipes = {
    name: config.load(spec, {**common, **own})
    for name, (spec, own) in (ABLATIONS if args.ablations else COMPARISON).items()
  }
  images = data.load(next(iter(recipes.values())).data, 'train')
  assert isinstance(images, data.Arrays)
  seconds, memory = costs(recipes, images, args.rounds)
  records = {}
  for name, recipe in recipes.items():
    workdir = args.out / name.replace(', ', '_').replace(' ', '_')
    if train.pretrain(recipe, workdir, f'benchmarks/mechanisms.py ({name})'):
      raise SystemExit('interrupted; rerun the same command to resume')
    records[name] = logs.read(workdir)
  base = 'MoCo'
  print(f'{"":16}  loss  chance  contrastive %  kNN %   s/step  x {base}   MiB  x {base}')
  for name in recipes:
    last = {k: v for r in records[name] for k, v in r.items()}
    print(
      f'{name:16} {last["loss"]:5.2f} {last["chance_loss"]:7.2f} {100 * last["contrastive_acc"]:14.1f} '
      f'{100 * last["knn_acc"]:6.1f} {seconds[name]:8.2f} {seconds[name] / seconds[base]:7.2f} '
      f'{memory[name]:5.0f} {memory[name] / memory[base]:7.2f}'
    )
  draw(records, args.figure or args.out / 'mechanisms.png')


def costs(
  recipes: dict[str, ml_collections.ConfigDict], images: data.Arrays, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
  """By recipe, the median seconds per step, and the MiB that the compiled step needs in memory."""
  steps: dict[str, Any] = {}
  memory: dict[str, float] = {}
  times: dict[str, list[float]] = {name: [] for name in recipes}
  for name, recipe in recipes.items():
    state: Any
    step: Any
    state, step = train_state.build(recipe, images)
    memory[name] = mib_of_step(step, state, images)
    steps[name] = step, step(state, 0)[0]
  for i in range(1, rounds + 1):
    for name, (step, state) in steps.items():
      start = time.monotonic()
      state, metrics = step(state, i)
      jax.block_until_ready((state, metrics))
      times[name].append(time.monotonic() - start)
      steps[name] = step, state
  return {name: float(np.median(t)) for name, t in times.items()}, memory


def mib_of_step(step: Any, state: Any, images: data.Arrays) -> float:
  """The MiB that a compiled step needs in memory, besides the images of the data set."""
  analysis = step.lower(state, 0).compile().memory_analysis()
  dataset = images.images.nbytes + 4 * len(images)  # is an argument, too
  size = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
  return (size + analysis.temp_size_in_bytes - analysis.alias_size_in_bytes - dataset) / 2**20


def draw(records, path):
  """Writes a figure: loss relative to chance, contrastive accuracy and kNN accuracy by step."""
  figure = matplotlib.figure.Figure(figsize=(12, 3.4), layout='constrained')
  loss, accuracy, knn = figure.subplots(1, 3)
  for color, (name, metrics) in zip(COLORS, records.items()):
    for axes, points in (
      (loss, [(r['step'], r['loss'] / r['chance_loss']) for r in metrics if 'loss' in r]),
      (accuracy, [(r['step'], 100 * r['contrastive_acc']) for r in metrics if 'loss' in r]),
      (knn, [(r['step'], 100 * r['knn_acc']) for r in metrics if 'knn_acc' in r]),
    ):
      axes.plot(*np.array(points).T, color=color, label=name, marker='o' if axes is knn else None)
  loss.axhline(1, color='#9ca3af', lw=1, ls='--')
  loss.set_title('loss / chance level', loc='left')
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
