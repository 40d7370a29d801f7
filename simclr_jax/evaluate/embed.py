"""Extracts features of a data set to a file, in parts, so that an interruption loses one part at most."""

import csv
import functools
import importlib.util
import json
import pathlib
import shutil

import numpy as np
from tqdm import tqdm

from simclr_jax.data import Dataset
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed, files, paths, preemption

SUFFIXES = ('.npz', '.npy', '.csv', '.parquet')
PART = 16_384  # images per part; data sets without random access have at most 8 parts


def check(out: pathlib.Path) -> None:
  """Raises ConfigError if the features cannot be written to the file `out`."""
  if out.suffix not in SUFFIXES:
    raise ConfigError(f'--out={out}: the name must end in {", ".join(SUFFIXES)}')
  if paths.is_remote(out):
    raise ConfigError(f'--out={out}: name a local file and copy it to the bucket afterwards')
  if not out.parent.is_dir():
    raise ConfigError(f'--out={out}: the folder {out.parent} does not exist')
  if out.suffix == '.parquet' and not importlib.util.find_spec('pyarrow'):
    raise ConfigError(f'--out={out}: Parquet needs pyarrow: pip install pyarrow')


def embed(encoder: Encoder, dataset: Dataset, out: pathlib.Path) -> None:
  """Writes the features of all images to a file, in the order of the data set.

  The format depends on the suffix. .npz: arrays `features`, float32 `[N, d]`, `names` `[N]`, and if all labels are
  known, `labels`, int32 `[N]`. .npy: features only. .csv and .parquet: one row per image with name, label and features.
  Names are paths relative to the folder of the images, or indices.

  Finished parts are saved in the folder OUT.parts; the same call resumes after them.

  Args:
    encoder: the encoder.
    dataset: N images.
    out: a local file.

  Raises:
    ConfigError: an image cannot be read, or `out` cannot be written.
    Stopped: a signal arrived.
  """
  check(out)
  size = max(PART, -(-len(dataset) // 8)) if getattr(dataset, 'sequential', False) else PART
  image_names = dataset.names()
  if image_names is None:
    image_names = [str(i) for i in range(len(dataset))]
  inputs = {
    'encoder': encoder.digest(),
    'size': size,
    'images': len(dataset),
    'of': dataset.fingerprint(),
    'in': str(getattr(getattr(dataset, 'settings', None), 'dir', '')),
  }
  folder = out.with_name(out.name + '.parts')
  if distributed.is_main_process():
    _prepare(folder, inputs)
  starts = range(0, len(dataset), size)
  finished = [start for start in starts if (folder / f'{start}.npz').exists()]
  finished = distributed.gather(finished)[0]  # only process 0 writes parts
  with tqdm(total=len(dataset), unit='image') as bar:
    for start in starts:
      end = min(start + size, len(dataset))
      if start not in finished:
        part = dataset.subset(np.arange(start, end))
        h, labels = encoder.embed(part, progress=functools.partial(_show, bar, start))
        if distributed.is_main_process():
          with files.atomic(folder / f'{start}.npz') as temporary:
            np.savez(temporary, features=h, labels=labels)
      bar.update(end - bar.n)
  if not distributed.is_main_process():
    return
  parts = [dict(np.load(folder / f'{start}.npz')) for start in starts]
  h, labels = (np.concatenate([p[k] for p in parts]) for k in ('features', 'labels'))
  with files.atomic(out) as temporary:
    _write(temporary, h, labels, [n.encode('utf-8', 'replace').decode() for n in image_names])
  shutil.rmtree(folder)
  print(f'wrote {out}: features {list(h.shape)} float32')


def _show(bar, start, count):
  """Moves the progress bar to `count` images after `start`."""
  bar.update(start + count - bar.n)


def _prepare(folder, inputs):
  """Deletes finished parts if they were computed with another encoder or other images."""
  file = folder / 'about.json'
  if not file.exists() or file.read_text() != json.dumps(inputs):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    file.write_text(json.dumps(inputs))


def _write(path, h, labels, names):
  all_labels = {'labels': labels} if (labels >= 0).all() else {}
  if path.suffix == '.npy':
    np.save(path, h)
  elif path.suffix == '.npz':
    np.savez(path, features=h, names=np.array(names), **all_labels)
  elif path.suffix == '.csv':
    with path.open('w', newline='') as file:
      writer = csv.writer(file)
      writer.writerow(['name', 'label', *(f'f{i}' for i in range(h.shape[1]))])
      for name, label, row in zip(names, labels, h):
        preemption.heartbeat()
        writer.writerow([name, label if label >= 0 else '', *(f'{x:.8g}' for x in row)])
  else:
    import pyarrow as pa
    import pyarrow.parquet

    rows = pa.FixedSizeListArray.from_arrays(pa.array(h.reshape(-1)), h.shape[1])
    label = pa.array(labels, mask=labels < 0)
    pa.parquet.write_table(pa.table({'name': names, 'label': label, 'features': rows}), path)
