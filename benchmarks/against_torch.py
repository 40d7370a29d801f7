"""Trainings of simclr_jax against trainings in plain PyTorch: loss curves, kNN accuracy and time, on one CPU core.

    python benchmarks/against_torch.py --data=TFDS_DIR [--seeds=3] [--epochs=5] [--rate=1]

SimCLR (recipe simclr_cifar10) and MoCo (moco_cifar10), ResNet-8 with 16, 32 and 64 channels, 10,000 images of CIFAR-10,
batch size 128. The PyTorch side, torch_training.py, was written from the papers and shares nothing with simclr_jax:
not the code, not the initial weights, not the order of the images, not the random numbers of the augmentations. So the two
can only agree in distribution: for every metric, the means over the seeds are compared by Welch's t-test.

kNN (k = 200, T = 0.1, by one NumPy function for both): 2,000 test images among the training images, on h for SimCLR and
on z for MoCo, as in its demo. Seconds per step: short sections of both sides alternate on the same core. Every finished run
is saved in --results, the same command continues after it. Also writes the loss curves as a figure.
"""

import argparse
import functools
import os
import pathlib
import time

import jax
import matplotlib
import matplotlib.figure
import numpy as np
import scipy.stats

from simclr_jax import config, data, runs, train, train_state
from simclr_jax.runtime import files, logs

try:
  import torch
  import torch_training
except ImportError:
  torch = None

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMON = {
  'batch_size': 128,
  'data.name': 'cifar10',
  'data.num_classes': 0,  # no online probe
  'data.test_split': 'test[:2000]',
  'data.train_split': 'train[:10000]',
  'dtype': 'float32',
  'keep_checkpoints': 1,
  'knn_every_epochs': 0,
  'log_every_steps': 1,
  'model.depth': 8,
  'model.stem': 'strided',
  'model.width_multiplier': 0.25,
  'tensorboard': False,
}
TITLES = {'simclr': 'SimCLR', 'moco': 'MoCo'}
CHANCE = {
  'simclr': np.log(2 * 128 - 1),
  'moco': np.log(1 + 4096),
}  # loss if all similarities are equal
SIDES = {'simclr_jax': '#2563eb', 'torch': '#d97706'}  # and the colours of their curves
NAMES = {'simclr_jax': 'simclr_jax', 'torch': 'PyTorch'}
EVERY = 20  # steps whose losses are averaged for a point of the curve
METRICS = [f'loss, fifth {i} of the steps' for i in range(1, 6)] + ['loss, last 20 steps', 'kNN %']


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--data', required=True, help='the TFDS folder with CIFAR-10')
  parser.add_argument('--data-note', default='', help='a sentence on the images, for the results')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--epochs', type=int, default=5)
  parser.add_argument(
    '--rate', type=float, default=1.0, help='learning rate of SimCLR, per 256 images'
  )
  parser.add_argument('--moco-rate', type=float, default=0.06, help='learning rate of MoCo')
  parser.add_argument('--rounds', type=int, default=5, help='timed sections of each side')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/against_torch'))
  parser.add_argument(
    '--results', type=pathlib.Path, default=ROOT / 'benchmarks/against_torch.json'
  )
  parser.add_argument('--figure', type=pathlib.Path, default=ROOT / 'docs/claims/against_torch.svg')
  args = parser.parse_args()
  if torch is None:
    raise SystemExit('PyTorch is not installed: .venv/bin/pip install torch torchvision')
  if hasattr(os, 'sched_setaffinity'):  # not on macOS
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  torch.set_num_threads(1)
  jax.config.update('jax_platforms', 'cpu')

  settings = {'epochs': args.epochs, 'simclr rate': args.rate, 'moco rate': args.moco_rate}
  results = files.read_json(args.results) if args.results.exists() else {'settings': settings}
  if results['settings'] != settings:
    raise SystemExit(
      f'{args.results} has the settings {results["settings"]}: choose another --results'
    )
  results = {'runs': {}, 'seconds': {}, **results, 'images': args.data_note}
  for method in TITLES:
    load = functools.partial(data.load, recipe(args, method).data)
    images = load('train'), load('test')
    for seed in range(args.seeds):
      for side, run in (('simclr_jax', run_jax), ('torch', run_torch)):
        name = f'{method} {side} {seed}'
        if name not in results['runs']:
          results['runs'][name] = run(args, method, seed, *images)
          files.write_json(args.results, results)
          print(f'{name}: kNN {results["runs"][name]["kNN %"]:.1f} %', flush=True)
    if method not in results['seconds']:
      results['seconds'][method] = seconds(args, method, images[0])
  results['comparison'] = {method: compare(results['runs'], method) for method in TITLES}
  files.write_json(args.results, results)
  report(results, len(images[1]))
  draw(results['runs'], args.figure)


def recipe(args, method, seed=0, **fields):
  """The recipe of the method; `__` in the name of a field is a dot."""
  rate = args.rate if method == 'simclr' else args.moco_rate
  own = {'data.dir': args.data, 'epochs': args.epochs, 'learning_rate': rate, 'seed': seed}
  own |= {name.replace('__', '.'): value for name, value in fields.items()}
  return config.load(f'{method}_cifar10', {k: str(v) for k, v in {**COMMON, **own}.items()})


def run_jax(args, method, seed, images, test):
  """Trains with simclr_jax; returns a `summary`."""
  workdir = args.out / f'{method}_{args.epochs}_epochs_seed{seed}'
  command = 'benchmarks/against_torch.py'
  if train.pretrain(recipe(args, method, seed), workdir, command, quiet=True, progress=False):
    raise SystemExit('interrupted; rerun the same command to resume')
  encoder = runs.load_encoder(workdir) if method == 'simclr' else runs.load_projection(workdir)
  losses = [r['loss'] for r in logs.read(workdir) if 'loss' in r]
  return summary(losses, **{'kNN %': knn(*encoder.embed(images), *encoder.embed(test))})


def torch_training_of(args, method, seed, images):
  rate = args.rate if method == 'simclr' else args.moco_rate
  kind = torch_training.METHODS[method]
  return kind(images.images, seed, COMMON['batch_size'], args.epochs, rate)


def run_torch(args, method, seed, images, test):
  """Trains with PyTorch; as `run_jax`, with the kNN accuracy of the untrained network."""
  training = torch_training_of(args, method, seed, images)

  def accuracy():
    bank, queries = training.features(images.images), training.features(test.images)
    return knn(bank, images.labels, queries, test.labels)

  untrained = accuracy()
  losses = [training.step(i) for i in range(training.steps)]
  return summary(losses, **{'kNN %': accuracy(), 'untrained kNN %': untrained})


def knn(bank, labels, queries, query_labels, k=200, temperature=0.1):
  """Accuracy in percent of a vote of the k nearest rows of the bank, with weights exp(cosine / temperature)."""
  bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
  similarity = queries @ bank.T
  nearest = np.argpartition(-similarity, k, axis=1)[:, :k]
  weights = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
  votes = [(weights * (labels[nearest] == c)).sum(1) for c in range(labels.max() + 1)]
  return 100 * float(np.mean(np.argmax(votes, axis=0) == query_labels))


def seconds(args, method, images, steps=10):
  """Seconds per step of each program: one number for each round, whose sections of `steps` steps alternate."""
  sections = {}
  for name, fields in (('', {}), (' without augmentation', {'augment__view1': 'resize'})):
    sections['simclr_jax' + name] = jax_section(recipe(args, method, **fields), images, steps)
    training = torch_training_of(args, method, 0, images)
    training.augments = not name
    sections['torch' + name] = lambda first, t=training: [t.step(first + i) for i in range(steps)]
  times = {name: [] for name in sections}
  for i in range(args.rounds + 1):
    for name, section in sections.items():
      start = time.perf_counter()
      section(steps * i)
      if i:  # the first round compiles and warms up
        times[name].append((time.perf_counter() - start) / steps)
  return times


def jax_section(recipe, images, steps):
  state, step = train_state.build(recipe, images)

  def section(first):
    nonlocal state
    for i in range(first, first + steps):
      state, metrics = step(state, i)
    jax.block_until_ready((state, metrics))

  return section


def summary(losses, **accuracies):
  """What is saved of a run: what is compared, and the loss curve, the mean of every 20 steps."""
  ends = range(EVERY, len(losses) + 1, EVERY)
  means = [np.mean(part) for part in (*np.array_split(losses, 5), losses[-EVERY:])]
  return {
    **{name: float(mean) for name, mean in zip(METRICS, means)},
    **accuracies,
    'curve': [round(float(np.mean(losses[end - EVERY : end])), 4) for end in ends],
  }


def compare(results, method):
  """Metric -> values by seed of both sides, difference of the means with its 95 % interval, verdict."""
  rows = {}
  for name in METRICS:
    ours, theirs = (
      [run[name] for key, run in results.items() if key.startswith(f'{method} {side} ')]
      for side in SIDES
    )
    test = scipy.stats.ttest_ind(ours, theirs, equal_var=False)
    interval = [float(x) for x in test.confidence_interval(0.95)]
    inside = interval[0] <= 0 <= interval[1]
    rows[name] = {
      'simclr_jax': ours, 'torch': theirs, 'difference': float(np.mean(ours) - np.mean(theirs)),
      'interval': interval, 'p': float(test.pvalue),
      'verdict': 'within the spread of seeds' if inside else 'differ',
    }  # fmt: skip
  return rows


def report(results, test_images):
  """Prints the tables."""
  print(
    f'\n{results["settings"]}; kNN: {test_images:,} test images, k = 200, T = 0.1, chance 10 %. {results["images"]}'
  )
  for method, rows in results['comparison'].items():
    untrained = [
      r['untrained kNN %'] for n, r in results['runs'].items() if n.startswith(f'{method} torch')
    ]
    print(
      f'\n{TITLES[method]}: chance loss {CHANCE[method]:.2f}; kNN of the untrained network (PyTorch) '
      f'{np.mean(untrained):.1f} %; {len(untrained)} seeds'
    )
    print(f'{"metric":27} simclr_jax        PyTorch           difference [95 % interval]')
    for name, row in rows.items():
      ours, theirs = (
        f'{np.mean(row[side]):6.3f} +- {np.std(row[side], ddof=1):.3f}' for side in SIDES
      )
      low, high = row['interval']
      print(
        f'{name:27} {ours:17} {theirs:17} {row["difference"]:+.3f} [{low:+.3f}, {high:+.3f}]  {row["verdict"]}'
      )
    times = results['seconds'][method]
    for name in ('', ' without augmentation'):
      ours, theirs = (np.array(times[side + name]) for side in SIDES)
      ratio = ours / theirs
      print(
        f'seconds per step{name}: {np.median(ours):.3f}, {np.median(theirs):.3f}; simclr_jax / PyTorch: '
        f'median {np.median(ratio):.2f} ({ratio.min():.2f}-{ratio.max():.2f})'
      )
  verdicts = [row['verdict'] for rows in results['comparison'].values() for row in rows.values()]
  differ = verdicts.count('differ')
  print(
    f'\n{len(verdicts) - differ} of {len(verdicts)} metrics are within the spread of seeds; at 95 %, '
    f'{0.05 * len(verdicts):.1f} outside are expected by chance'
  )


def draw(results, path):
  """Writes the figure: a thin line for every run, a point for the mean loss of every 20 steps."""
  matplotlib.rcParams['svg.hashsalt'] = path.stem  # the same file for the same results
  figure = matplotlib.figure.Figure(figsize=(9, 3.4), layout='constrained')
  for axes, (method, title) in zip(figure.subplots(1, 2), TITLES.items()):
    for side, color in SIDES.items():
      curves = [r['curve'] for key, r in results.items() if key.startswith(f'{method} {side} ')]
      for i, curve in enumerate(curves):
        steps = EVERY * np.arange(1, 1 + len(curve))
        axes.plot(steps, curve, color=color, lw=0.8, label='' if i else NAMES[side])
    axes.axhline(CHANCE[method], color='#9ca3af', lw=1, ls='--', label='chance')
    axes.set_title(f'{title}: loss', loc='left')
    axes.set_xlabel('step')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, metadata={'Date': None})
  print(f'wrote {path}')


if __name__ == '__main__':
  main()
