"""Extracts features of a data set to a file, in parts: an interruption loses one part at most, and memory holds one."""

import contextlib
import csv
import functools
import importlib.util
import io
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from simclr_jax.data import Dataset, npy
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed, files, paths, preemption
from simclr_jax.runtime.progress import Bar

SUFFIXES = ('.npz', '.npy', '.csv', '.parquet')
PART = 16_384  # images per part; data sets without random access have at most 8 parts
ABOUT = 'about.json'  # in the folder of the parts: what they are parts of
LOCK = '.lock'  # in the folder of the parts: locked by the command that uses it


def check(out: pathlib.Path) -> None:
  """Raises ConfigError if the features cannot be written to the file `out`, or if `out` is another kind of file."""
  if out.suffix not in SUFFIXES:
    raise ConfigError(f'--out={out}: the name must end in {", ".join(SUFFIXES)}')
  if paths.is_remote(out):
    raise ConfigError(f'--out={out}: name a local file and copy it to the bucket afterwards')
  if not out.parent.is_dir():
    raise ConfigError(f'--out={out}: the folder {out.parent} does not exist')
  if out.suffix == '.parquet' and not importlib.util.find_spec('pyarrow'):
    raise ConfigError(f'--out={out}: Parquet needs pyarrow: pip install pyarrow')
  if out.exists() and not _is_features(out):
    raise ConfigError(
      f'--out={out} exists and is no file of features: delete it or choose another name'
    )
  _Parts(out).check()


def embed(encoder: Encoder, dataset: Dataset, out: pathlib.Path, raw_names: bool = False) -> None:
  """Writes the features of all images to a file, in the order of the data set.

  The format depends on the suffix. .npz: arrays `features`, float32 `[N, d]`, `names` `[N]`, and if all labels are
  known, `labels`, int32 `[N]`, and `class_names` `[C]`, so that `class_names[labels]` are the classes. .npy: features
  only. .csv and .parquet: one row per image with name, label, with labels also class, the name of the class, and
  features. Names are paths relative to the folder of the images, or indices.

  Finished parts are saved in the folder OUT.parts; the same call resumes after them.

  Args:
    encoder: the encoder.
    dataset: N images.
    out: a local file. Earlier features are replaced.
    raw_names: whether names in .csv that begin with =, +, -, @, a tab or a carriage return are written as they are.
      Spreadsheet programs execute these; otherwise they get an apostrophe in front.

  Raises:
    ConfigError: an image cannot be read, `out` cannot be written, or another process is writing it.
    Stopped: a signal arrived.
  """
  check(out)
  size = max(PART, -(-len(dataset) // 8)) if getattr(dataset, 'sequential', False) else PART
  parts = _Parts(out, len(dataset), size)
  inputs: dict[str, str | int] = {
    'program': 'simclr-jax embed',
    'encoder': encoder.digest(),
    'size': size,
    'images': len(dataset),
    'of': dataset.fingerprint(),
    'in': str(getattr(getattr(dataset, 'settings', None), 'dir', '')),
  }
  with contextlib.ExitStack() as stack:
    main = distributed.is_main_process()
    distributed.run_on_all(lambda: main and stack.enter_context(parts.prepared(inputs)))
    _compute(encoder, dataset, parts)
    if main:
      _write(dataset, out, parts, raw_names)


def _compute(encoder, dataset, parts):
  """Computes the parts that are not finished."""
  finished = distributed.gather(parts.finished())[0]  # only process 0 writes parts
  with Bar(len(dataset), 'features') as bar:
    for start, end in parts.spans:
      if start not in finished:
        part = dataset.subset(np.arange(start, end))
        h, labels = encoder.embed(part, progress=functools.partial(_show, bar, start))
        if distributed.is_main_process():
          with files.atomic(parts.file(start)) as file:
            np.savez(file, features=h, labels=labels)
      bar.to(end)


def _write(dataset, out, parts, raw_names):
  """Writes the file from the parts, and deletes these."""
  names = dataset.names()
  if names is None:
    names = [str(i) for i in range(len(dataset))]
  labels = np.concatenate([labels for _, labels in parts.read()])
  shape = (len(dataset), next(parts.read())[0].shape[1])
  rows = _Rows(parts, shape, _printable(names), labels, _printable(dataset.class_names))
  with files.atomic(out) as file:
    _WRITERS[out.suffix](file, rows, raw_names)
  parts.delete()
  print(f'wrote {out}: features {list(shape)} float32')


def _show(bar, start, count):
  """Moves the progress bar to `count` images after `start`."""
  bar.to(start + count)


def _printable(names):
  """Names that UTF-8 can represent."""
  return [name.encode('utf-8', 'replace').decode() for name in names]


# Parts.


class _Parts:
  """The folder OUT.parts: `START.npz` with features and labels of the images from START on, and `about.json`."""

  def __init__(self, out: pathlib.Path, images: int = 0, size: int = PART):
    self._folder = out.with_name(out.name + '.parts')
    self.spans = [(start, min(start + size, images)) for start in range(0, images, size)]

  def file(self, start: int) -> pathlib.Path:
    return self._folder / f'{start}.npz'

  def check(self) -> None:
    """Raises ConfigError if the folder is not one of this command."""
    if self._folder.is_symlink() or (self._folder.exists() and self._about() is None):
      raise ConfigError(
        f'{self._folder} exists and is not a folder of this command: move it, or choose another --out'
      )

  @contextlib.contextmanager
  def prepared(self, inputs: dict[str, str | int]) -> Iterator[None]:
    """A context manager that creates the folder and locks it.

    Finished parts are deleted if they were computed with another encoder or other images.

    Raises:
      ConfigError: another process uses the folder.
      OSError: it cannot be written; one sentence.
    """
    self._folder.mkdir(exist_ok=True)
    with files.locked(self._folder / LOCK, wait=False) as ours:
      if not ours:
        raise ConfigError(
          f'another process is writing {self._folder.with_suffix("")}: wait for its end, or choose another --out'
        )
      if self._about() != inputs:
        self._delete_parts()
        files.write_json(self._folder / ABOUT, inputs)
      yield

  def _about(self) -> dict[str, str | int] | None:
    """What the parts were computed with; {} in a new folder, None in the folder of somebody else."""
    try:
      about = files.read_json(self._folder / ABOUT)
    except (FileNotFoundError, ConfigError):
      # A process that was killed may have left a lock, or a file with a temporary name, which the next writer removes.
      names = os.listdir(self._folder) if self._folder.is_dir() else [ABOUT]
      return None if [n for n in names if n != LOCK and not n.startswith(files.PREFIX)] else {}
    return about if isinstance(about, dict) and about.get('program') == 'simclr-jax embed' else None

  def finished(self) -> list[int]:
    """The starts of the parts that can be read; the others are computed again."""
    return [start for start, end in self.spans if _read_part(self.file(start), end - start)]

  def read(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features, float32 `[n, d]`, and labels, int32 `[n]`, of each part."""
    for start, end in self.spans:
      preemption.heartbeat()
      part = _read_part(self.file(start), end - start)
      if part is None:
        raise ConfigError(f'{self.file(start)} is damaged: run the same command again')
      yield part

  def delete(self) -> None:
    """Deletes the parts and the folder; what is not of this command stays."""
    self._delete_parts()
    for name in (ABOUT, LOCK):  # last, because a folder of parts without `about.json` seems foreign
      (self._folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
      self._folder.rmdir()

  def _delete_parts(self):
    for path in self._folder.glob('*.npz'):
      if path.stem.isdecimal():
        path.unlink(missing_ok=True)


def _read_part(path, images) -> tuple[np.ndarray, np.ndarray] | None:
  """Features and labels of a part; None if it does not exist or is damaged."""
  try:
    with npy.Npz(path) as arrays:
      h, labels = arrays['features'], arrays['labels']
  except (ConfigError, KeyError):
    return None
  fits = h.dtype == np.float32 and h.ndim == 2 and labels.dtype == np.int32
  return (h, labels) if fits and len(h) == images and labels.shape == (images,) else None


# Formats.


class _Rows(NamedTuple):
  """All features, [N, d]: `parts` one after the other, and of all images `names`, `labels`, and names of classes."""

  parts: _Parts
  shape: tuple[int, int]
  names: list[str]
  labels: np.ndarray
  class_names: list[str]

  @property
  def labelled(self) -> bool:
    return bool(((self.labels >= 0) & (self.labels < len(self.class_names))).all())

  def blocks(self) -> Iterator[tuple[np.ndarray, list[str], np.ndarray]]:
    """Features, names and labels, part by part."""
    for (start, end), (h, labels) in zip(self.parts.spans, self.parts.read()):
      yield h, self.names[start:end], labels

  def classes(self, labels) -> list[str]:
    return [self.class_names[label] for label in labels]


def _write_npy(file: BinaryIO, rows: _Rows, _raw) -> None:
  header = {'descr': '<f4', 'fortran_order': False, 'shape': rows.shape}
  np.lib.format.write_array_header_1_0(file, header)
  for h, _, _ in rows.blocks():
    file.write(h.astype('<f4').tobytes())


def _write_npz(file: BinaryIO, rows: _Rows, raw) -> None:
  known = {'labels': rows.labels, 'class_names': np.array(rows.class_names)}
  with zipfile.ZipFile(file, 'w') as archive:
    with archive.open('features.npy', 'w', force_zip64=True) as member:
      _write_npy(member, rows, raw)  # type: ignore[arg-type]
    for name, array in {'names': np.array(rows.names), **(known if rows.labelled else {})}.items():
      with archive.open(f'{name}.npy', 'w', force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _write_csv(file: BinaryIO, rows: _Rows, raw) -> None:
  text = io.TextIOWrapper(file, encoding='utf-8', newline='', write_through=True)
  writer = csv.writer(text)
  name = str if raw else _without_formula
  header = ['name', 'label', *(['class'] if rows.labelled else [])]
  writer.writerow([*header, *(f'f{i}' for i in range(rows.shape[1]))])
  for h, names, labels in rows.blocks():
    classes = rows.classes(labels) if rows.labelled else []
    for i, (label, x) in enumerate(zip(labels, h)):
      known = [label if label >= 0 else '', *([name(classes[i])] if classes else [])]
      writer.writerow([name(names[i]), *known, *(f'{v:.8g}' for v in x)])
  text.detach()


def _without_formula(name):
  """A name that no spreadsheet program takes for a formula."""
  return f"'{name}" if name.startswith(('=', '+', '-', '@', '\t', '\r')) else name


def _write_parquet(file: BinaryIO, rows: _Rows, _raw) -> None:
  import pyarrow as pa
  import pyarrow.parquet

  columns = {'name': pa.string(), 'label': pa.int32()}
  columns |= {'class': pa.string()} if rows.labelled else {}
  schema = pa.schema({**columns, 'features': pa.list_(pa.float32(), rows.shape[1])})
  with pa.parquet.ParquetWriter(file, schema) as writer:
    for h, names, labels in rows.blocks():
      values = {'name': names, 'label': pa.array(labels, mask=labels < 0)}
      values |= {'class': rows.classes(labels)} if rows.labelled else {}
      features = pa.FixedSizeListArray.from_arrays(pa.array(h.reshape(-1)), h.shape[1])
      writer.write_table(pa.table({**values, 'features': features}, schema=schema))


_WRITERS: dict[str, Callable[[BinaryIO, _Rows, bool], None]] = {
  '.npz': _write_npz, '.npy': _write_npy, '.csv': _write_csv, '.parquet': _write_parquet,
}  # fmt: skip


def _is_features(path) -> bool:
  """Whether an existing file may be replaced: it looks like what this command writes."""
  try:
    if path.suffix == '.npz':
      with npy.Npz(path) as arrays:
        return {'features', 'names'} <= set(arrays.files)
    if path.suffix == '.npy':
      array = npy.load(path, mmap=True)
      return array.ndim == 2 and array.dtype == np.float32
    with files.open_to_read(path) as file:
      if path.suffix == '.csv':
        return file.readline(20).startswith(b'name,label,')
      import pyarrow.parquet

      return {'name', 'features'} <= set(pyarrow.parquet.read_schema(file).names)
  except (
    OSError,
    ValueError,
    zipfile.BadZipFile,
  ):  # ConfigError and pyarrow's errors are ValueErrors
    return False
