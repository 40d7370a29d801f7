"""Features of a whole data set, to a file: in parts, so that a stop costs one part."""

import csv
import importlib.util
import json
import pathlib
import shutil

import numpy as np
from tqdm import tqdm

from simclr_jax import distributed, paths, stopping
from simclr_jax.data import Arrays
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import features

SUFFIXES = ('.npz', '.npy', '.csv', '.parquet')
PART = 16_384  # images; files that can only be read from front to back have few, larger parts


def check(out: pathlib.Path) -> None:
  """Raises ConfigError if nothing can be written to `out`."""
  if out.suffix not in SUFFIXES:
    raise ConfigError(f'--out={out}: the name must end in {", ".join(SUFFIXES)}')
  if paths.remote(out):
    raise ConfigError(f'--out={out}: write to this machine, and copy the file')
  if not out.parent.is_dir():
    raise ConfigError(f'--out={out}: the folder {out.parent} does not exist')
  if out.suffix == '.parquet' and not importlib.util.find_spec('pyarrow'):
    raise ConfigError(f'--out={out}: Parquet needs pyarrow: pip install pyarrow')


def embed(encoder: features.Encoder, dataset, out: pathlib.Path) -> None:
  """Writes the features of all images, in their order.

  .npz has `features` float32 `[N, d]`, `labels` int32 `[N]` if all are known, and `names` `[N]`; .npy the
  features alone; .csv and .parquet a row an image: name, label, features. Names are paths below the folder,
  or numbers. Finished parts wait in `out`.parts; the same call goes on after them.

  Raises:
    ConfigError: an image cannot be read, or `out` cannot be written.
  """
  check(out)
  size = max(PART, -(-len(dataset) // 8)) if getattr(dataset, 'sequential', False) else PART
  called = names(dataset)
  about = {
    'encoder': encoder.digest(),
    'size': size,
    'images': len(dataset),
    'of': dataset.fingerprint(),
    'in': str(getattr(getattr(dataset, 'settings', None), 'dir', '')),
  }
  folder = out.with_name(out.name + '.parts')
  if distributed.leader():
    _keep_if(folder, about)
  starts = range(0, len(dataset), size)
  there = [start for start in starts if (folder / f'{start}.npz').exists()]
  there = distributed.gather(there)[0]  # one of several processes decides, and writes
  with tqdm(total=len(dataset), unit='image') as bar:
    for start in starts:
      if start not in there:
        part = dataset.only(np.arange(start, min(start + size, len(dataset))))

        h, labels = encoder.embed(
          part, progress=lambda done, at=start: bar.update(at + done - bar.n)
        )
        if distributed.leader():
          new = folder / f'{start}.new'
          with new.open('wb') as file:
            np.savez(file, features=h, labels=labels)
          new.replace(folder / f'{start}.npz')
      bar.update(min(start + size, len(dataset)) - bar.n)
  if not distributed.leader():
    return
  parts = [dict(np.load(folder / f'{start}.npz')) for start in starts]
  h, labels = (np.concatenate([p[k] for p in parts]) for k in ('features', 'labels'))
  new = out.with_name(f'{out.stem}.new{out.suffix}')
  _write(new, h, labels, called)
  new.rename(out)
  shutil.rmtree(folder)
  print(f'wrote {out}: features {list(h.shape)} float32')


def names(dataset) -> list[str]:
  """What each image is called: its path below the folder, its record, or its number."""
  if isinstance(dataset, Arrays):
    called = dataset.names
  else:
    called = getattr(dataset, 'paths', None)
  if called is None:
    return [str(i) for i in range(len(dataset))]
  return [name.encode('utf-8', 'replace').decode() for name in called]


def _keep_if(folder, about):
  """Empties the folder of the finished parts if they are of something else."""
  card = folder / 'about.json'
  if not card.exists() or card.read_text() != json.dumps(about):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    card.write_text(json.dumps(about))


def _write(path, h, labels, called):
  known = {'labels': labels} if (labels >= 0).all() else {}
  if path.suffix == '.npy':
    np.save(path, h)
  elif path.suffix == '.npz':
    np.savez(path, features=h, names=np.array(called), **known)
  elif path.suffix == '.csv':
    with path.open('w', newline='') as file:
      writer = csv.writer(file)
      writer.writerow(['name', 'label', *(f'f{i}' for i in range(h.shape[1]))])
      for name, label, row in zip(called, labels, h):
        stopping.alive()
        writer.writerow([name, label if label >= 0 else '', *(f'{x:.8g}' for x in row)])
  else:
    import pyarrow as pa
    import pyarrow.parquet

    rows = pa.FixedSizeListArray.from_arrays(pa.array(h.reshape(-1)), h.shape[1])
    label = pa.array(labels, mask=labels < 0)
    pa.parquet.write_table(pa.table({'name': called, 'label': label, 'features': rows}), path)
