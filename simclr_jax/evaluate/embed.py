"""Extracts features of a data set to a file, in parts, so that an interruption loses one part at most."""

import csv
import functools
import importlib.util
import json
import pathlib
import shutil

import numpy as np

from simclr_jax.data import Dataset
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed, files, paths, preemption
from simclr_jax.runtime.progress import Bar

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
  known, `labels`, int32 `[N]`, and `class_names` `[C]`, so that `class_names[labels]` are the classes. .npy: features
  only. .csv and .parquet: one row per image with name, label, with labels also class, the name of the class, and
  features. Names are paths relative to the folder of the images, or indices.

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
  with Bar(len(dataset), 'features') as bar:
    for start in starts:
      end = min(start + size, len(dataset))
      if start not in finished:
        part = dataset.subset(np.arange(start, end))
        h, labels = encoder.embed(part, progress=functools.partial(_show, bar, start))
        if distributed.is_main_process():
          with files.atomic(folder / f'{start}.npz') as temporary:
            np.savez(temporary, features=h, labels=labels)
      bar.to(end)
  if not distributed.is_main_process():
    return
  parts = [dict(np.load(folder / f'{start}.npz')) for start in starts]
  h, labels = (np.concatenate([p[k] for p in parts]) for k in ('features', 'labels'))
  with files.atomic(out) as temporary:
    _write(temporary, h, labels, *map(_printable, (image_names, dataset.class_names)))
  shutil.rmtree(folder)
  print(f'wrote {out}: features {list(h.shape)} float32')


def _show(bar, start, count):
  """Moves the progress bar to `count` images after `start`."""
  bar.to(start + count)


def _printable(names):
  """Names that UTF-8 can represent."""
  return [name.encode('utf-8', 'replace').decode() for name in names]


def _prepare(folder, inputs):
  """Deletes finished parts if they were computed with another encoder or other images."""
  file = folder / 'about.json'
  if not file.exists() or file.read_text() != json.dumps(inputs):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    file.write_text(json.dumps(inputs))


def _write(path, h, labels, names, class_names):
  """Writes features, labels, names of the images and of the classes in the format of the suffix."""
  labelled = len(class_names) > 0 and (labels >= 0).all()
  classes = [class_names[label] for label in labels] if labelled else []
  if path.suffix == '.npy':
    np.save(path, h)
  elif path.suffix == '.npz':
    known = {'labels': labels, 'class_names': np.array(class_names)} if labelled else {}
    np.savez(path, features=h, names=np.array(names), **known)
  elif path.suffix == '.csv':
    _write_csv(path, h, labels, names, classes)
  else:
    import pyarrow as pa
    import pyarrow.parquet

    rows = pa.FixedSizeListArray.from_arrays(pa.array(h.reshape(-1)), h.shape[1])
    columns = {'name': names, 'label': pa.array(labels, mask=labels < 0)}
    columns |= {'class': classes} if labelled else {}
    pa.parquet.write_table(pa.table({**columns, 'features': rows}), path)


def _write_csv(path, h, labels, names, classes):
  with path.open('w', newline='') as file:
    writer = csv.writer(file)
    header = ['name', 'label', *(['class'] if classes else [])]
    writer.writerow([*header, *(f'f{i}' for i in range(h.shape[1]))])
    for i, (name, label, row) in enumerate(zip(names, labels, h)):
      preemption.heartbeat()
      known = [label if label >= 0 else '', *([classes[i]] if classes else [])]
      writer.writerow([name, *known, *(f'{x:.8g}' for x in row)])
