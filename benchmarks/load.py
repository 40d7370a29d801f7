"""Time and memory of large inputs: a folder of many files, one of many classes, many embeddings, a long run.

    python benchmarks/load.py files|classes|embed|report [--count=N] [--folder=FOLDER]

Each makes its input in a temporary folder, measures in a process of its own, and prints seconds and the peak of memory
without those of the imports. The images are a few photographs of several sizes under many names, as hard links.
"""

import argparse
import io
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('input', choices=LOADS)
  parser.add_argument('--count', type=int, help='files, classes, images or records')
  parser.add_argument(
    '--folder', type=pathlib.Path, help='for the inputs (default: a temporary one)'
  )
  parser.add_argument('--measure', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  count, make, measure = LOADS[args.input]
  if args.measure:
    _report(measure, args.folder)
    return
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    make(pathlib.Path(folder), args.count or count)
    command = [sys.executable, __file__, args.input, '--measure', f'--folder={folder}']
    subprocess.run(command, check=True)


def _report(measure, folder):
  """Prints what a measurement took, beyond the imports."""
  from simclr_jax import api, data  # noqa: F401
  from simclr_jax.data import folder as _  # noqa: F401

  before, start = _peak(), time.perf_counter()
  text = measure(folder)
  seconds = time.perf_counter() - start
  print(f'{text}: {seconds:.1f} s, {_peak():,.0f} MB ({_peak() - before:,.0f} MB beyond imports)')


def _peak():
  """The most memory that this process has had, in MB."""
  unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss, in bytes
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def make_folder(folder, files, classes):
  """Writes `files` images into `classes` sub-folders."""
  import PIL.Image

  originals = []
  for i in range(8):
    pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).resize((64 + 8 * i, 64)).save(file, 'JPEG')
    originals.append(file.getvalue())
  for c in range(classes):
    place = folder / f'class{c:05d}'
    place.mkdir(parents=True)
    paths = [place / f'{j:07d}.jpg' for j in range(c, files, classes)]
    for j, path in enumerate(paths):
      if j < len(originals):
        path.write_bytes(originals[(c + j) % len(originals)])
      else:
        os.link(paths[j % len(originals)], path)


def start(folder):
  """Loads a folder as a command does before its first batch."""
  from simclr_jax import data
  from simclr_jax.commands import common

  config = common.recipe_with_data('simclr_images', str(folder), {}).data
  train, test = data.load_splits(config)
  lines = data.summary(config, train, test)
  train.fingerprint()
  return f'{len(train) + len(test):,} images, {train.classes:,} classes, {len(lines)} lines'


def make_run(folder):
  """Trains a small network for a few steps; the run is `folder`/run."""
  fields = {
    'steps': 4, 'log_every_steps': 1, 'batch_size': 64, 'model.depth': 8, 'model.width_multiplier': 0.25,
    'knn_every_epochs': 0, 'warmup_epochs': 0,
  }  # fmt: skip
  arguments = [f'--config.{name}={value}' for name, value in fields.items()]
  data = ['--config=simclr_digits', '--data=digits', f'--workdir={folder / "run"}']
  # In a process of its own: the peak of memory of a process includes that of its parent.
  subprocess.run([sys.executable, '-m', 'simclr_jax', 'pretrain', *data, *arguments], check=True)


def make_images_and_run(folder, images):
  """Writes images, and a run whose encoder embeds them."""
  make_folder(folder / 'images', images, 2)
  make_run(folder)


def embed(folder):
  """Embeds all images."""
  from simclr_jax import data, runs
  from simclr_jax.commands import common
  from simclr_jax.evaluate import embed

  fields = {'data.train_split': '.', 'data.test_split': '', 'data.holdout': 0.0}
  config = common.recipe_with_data('simclr_images', str(folder / 'images'), fields).data
  images, _ = data.load_splits(config)
  embed.embed(runs.load_encoder(folder / 'run'), images, folder / 'features.npy')
  return f'{len(images):,} images embedded'


def make_long_run(folder, records):
  """A run with as many records of metrics as one of `records` logged steps."""
  make_run(folder)
  path = folder / 'run/metrics.jsonl'
  lines = path.read_text().splitlines()
  step = next(line for line in lines if '"loss"' in line)
  long = [step.replace('"step": 1,', f'"step": {i},', 1) for i in range(1, records + 1)]
  path.write_text('\n'.join([lines[0], *long, *lines[-1:], '']))


def report(folder):
  """Writes the report."""
  from simclr_jax import run_config
  from simclr_jax.report import page

  page.write(folder / 'run', run_config.load(folder / 'run'), folder / 'report.html')
  records = sum(1 for _ in (folder / 'run/metrics.jsonl').open())
  return f'report of {records:,} records'


# Input -> default count, function that makes it in a folder, and what is measured.
LOADS = {
  'files': (200_000, lambda folder, n: make_folder(folder, n, 2), start),
  'embed': (20_000, make_images_and_run, embed),
  'report': (200_000, make_long_run, report),
  'classes': (1_000, lambda folder, n: make_folder(folder, 20 * n, n), start),
}

if __name__ == '__main__':
  main()
