"""Tables of images: CSV, TSV or text files with the columns path, label and split, of which the last two are optional."""

import csv
import dataclasses
import io
import os
import pathlib
import re
from collections import Counter

from simclr_jax.data import headers, layout
from simclr_jax.data.dataset import natural
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import files

SUFFIXES = ('.csv', '.tsv', '.txt')
# Names of the columns, without separators and in lower case; the first that a table has is used.
PATH = (
  'path', 'filepath', 'imagepath', 'imgpath', 'file', 'filename', 'image', 'img', 'imagefile', 'imagename', 'imageid',
  'imgid', 'images', 'name', 'id', 'photo', 'picture', 'url',
)  # fmt: skip
LABEL = (
  'label', 'labels', 'class', 'classname', 'classes', 'category', 'categories', 'target', 'targets', 'species', 'breed',
  'y', 'tag', 'classid', 'labelid', 'categoryid', 'categoryname', 'labelname', 'diagnosis', 'dx',
)  # fmt: skip
SPLIT = (
  'split',
  'splits',
  'set',
  'subset',
  'fold',
  'partition',
  'usage',
  'dataset',
  'phase',
  'mode',
)
LIMIT = files.TEXT_LIMIT  # bytes of a table
PROBE = 50  # rows by which the folder of the images is found


@dataclasses.dataclass(frozen=True)
class Table:
  """The rows of a table.

  Attributes:
    path: the file.
    images: paths of the image files, absolute.
    labels: as text; None where unknown.
    splits: as text; None without a column for splits.
    remarks: what was decided, a sentence each.
  """

  path: pathlib.Path
  images: list[str]
  labels: list[str | None]
  splits: list[str] | None
  remarks: tuple[str, ...]

  def of_split(self, split: str) -> tuple[str, list[str], list[str | None], tuple[str, ...], bool]:
    """The arguments of `folder.Listing` for a split; '.' is the entire table.

    Raises:
      ConfigError: the table has no such split.
    """
    rows = range(len(self.images))
    if self.splits is not None and split != '.':
      rows = [i for i in rows if self.splits[i] == split]  # type: ignore[assignment]
      if not rows:
        names = ', '.join(sorted(set(self.splits), key=natural)[:10])
        raise ConfigError(f'{self.path} has no rows of the split {split!r}, only of {names}')
    elif self.splits is None and layout.role(split) in (layout.TEST, layout.VALIDATION):
      raise ConfigError(
        f'{self.path} has no column for splits, so there is no split {split!r}: add a column split, or set '
        '--config.data.test_split= to hold out a part'
      )
    labels = {self.images[i]: self.labels[i] for i in rows}
    root = str(os.path.commonpath([os.path.dirname(path) for path in labels]))
    images = sorted(labels, key=os.fsencode)
    relative = [os.path.relpath(image, root) for image in images]
    return root, relative, [labels[image] for image in images], self.remarks, False

  def split_names(self) -> tuple[str, str]:
    """The training and the test split: '.' and '' without a column for splits.

    Raises:
      ConfigError: no value of the column is the name of a training split.
    """
    if self.splits is None:
      return '.', ''
    names = sorted(set(self.splits), key=natural)
    train, test = layout.splits(names)
    if not train:
      raise ConfigError(
        f'{self.path}: the column for splits has the values {", ".join(names[:10])}, none of which means train: '
        'name them with --config.data.train_split and --config.data.test_split'
      )
    return train, test


def read(file: str | os.PathLike, folder: str = '') -> Table:
  """Reads a table.

  A header is recognised by its names, such as `path,label,split` or `filename;category`. Without a header, the columns
  are path, label and split, in this order. Paths are absolute or relative to `folder`, to the folder of the table or to
  one of its sub-folders; the suffix of the image files may be missing.

  Args:
    file: the table; delimiters are commas, semicolons, tabs or |; in lists, also spaces before an integer label.
    folder: a folder of images; '': that of the table.

  Raises:
    ConfigError: the file cannot be read, images are missing, or an image has two labels.
  """
  path = pathlib.Path(file).expanduser()
  rows = _rows(path)
  find = _Finder(path, folder)
  columns = _columns(path, rows, find)
  body = rows[columns.first :]
  images = find.all([row[columns.path] if columns.path < len(row) else '' for row in body])
  labels = [_cell(row, columns.label) or None for row in body]
  splits = None if columns.split is None else [_cell(row, columns.split) for row in body]
  seen: dict[str, str | None] = {}
  split_of: dict[str, str] = {}
  for i, (image, label) in enumerate(zip(images, labels)):
    if seen.setdefault(image, label) != label:
      raise ConfigError(f'{path}: {image} has two labels, {seen[image]!r} and {label!r}')
    if splits and split_of.setdefault(image, splits[i]) != splits[i]:
      raise ConfigError(f'{path}: {image} is in two splits, {split_of[image]!r} and {splits[i]!r}')
  remarks = list(columns.remarks)
  if len(seen) < len(images):
    remarks.append(f'{path}: {len(images) - len(seen):,} rows repeat an image and are ignored')
  unknown = sum(label is None for label in labels)
  if columns.label is not None and unknown:
    remarks.append(f'{path}: {unknown:,} of {len(labels):,} rows have no label')
  return Table(path, images, labels, splits, tuple(remarks))


def _rows(path) -> list[list[str]]:
  try:
    with files.open_to_read(path) as file:
      data = file.read(LIMIT + 1)
  except OSError as error:
    raise ConfigError(f'{path} cannot be read: {error.strerror}') from None
  if len(data) > LIMIT:
    raise ConfigError(f'{path} is larger than {LIMIT // 2**20:,} MB')
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError:
    text = data.decode('latin-1')
  lines = [line for line in text.splitlines() if line.strip()]
  if not lines:
    raise ConfigError(f'{path} is empty')
  if '\0' in text:
    raise ConfigError(f'{path} is no text file')
  sample = lines[:PROBE]
  delimiter = max(
    ',;\t|', key=lambda d: (min(line.count(d) for line in sample), sample[0].count(d))
  )
  if all(delimiter in line for line in sample):
    rows = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    try:
      return [[cell.strip() for cell in row] for row in rows if row]
    except csv.Error as error:
      raise ConfigError(f'{path} is damaged in line {rows.line_num:,}: {error}') from None
  if all(re.fullmatch(r'.*\S\s+-?\d+', line) for line in sample):  # PATH LABEL
    return [line.rsplit(None, 1) for line in lines]
  return [[line.strip()] for line in lines]


@dataclasses.dataclass(frozen=True)
class _Columns:
  path: int
  label: int | None
  split: int | None
  first: int  # row after the header
  remarks: tuple[str, ...] = ()


def _columns(path, rows, find) -> _Columns:
  names = [re.sub(r'[^a-z0-9]', '', cell.lower()) for cell in rows[0]]
  known = {c for c in names if c in (*PATH, *LABEL, *SPLIT)}
  is_header = bool(known) or (len(rows) > 1 and not find.one(rows[0][0]) and find.one(rows[1][0]))
  if not is_header or find.one(rows[0][0]):
    return _Columns(0, 1 if len(rows[0]) > 1 else None, 2 if len(rows[0]) > 2 else None, 0)
  if len(rows) < 2:
    raise ConfigError(f'{path} has a header and no rows')

  def column(candidates):
    return next((names.index(c) for c in candidates if c in names), None)

  image = column(PATH) or 0
  label, split = column(LABEL), column(SPLIT)
  others = [i for i in range(len(names)) if i not in (image, split)]
  if label is None and len(others) == 1:
    label = others[0]
  remarks = [f'{path}: images are in the column {rows[0][image]!r}' + (f', labels in {rows[0][label]!r}' if label is not None else '') + (f', splits in {rows[0][split]!r}' if split is not None else '')]  # fmt: skip
  if label is None and others:
    remarks.append(
      f'{path}: no labels are used; none of the columns {", ".join(rows[0][i] for i in others[:8])} is called label'
    )
  return _Columns(image, label, split, 1, tuple(remarks))


def _cell(row, column) -> str:
  return row[column] if column is not None and column < len(row) else ''


class _Finder:
  """Finds the files that the rows of a table name."""

  def __init__(self, path, folder):
    self._path = path
    parent = path.parent
    places = [pathlib.Path(folder)] if folder else []
    places += [
      parent,
      *sorted(p for p in parent.iterdir() if p.is_dir() and not layout.is_system(p.name)),
    ]
    self._bases = list(dict.fromkeys(os.path.abspath(p) for p in places))
    self._hits: Counter[tuple[str, str]] = Counter()

  def one(self, text: str) -> str:
    """The file that a cell names; '' if there is none."""
    text = text.strip().replace('\\', '/')
    if not text:
      return ''
    if os.path.isabs(text):
      return text if os.path.isfile(text) else ''
    for base, suffix in dict.fromkeys(
      [k for k, _ in self._hits.most_common(3)] + self._choices(text)
    ):
      candidate = os.path.normpath(os.path.join(base, text + suffix))
      if os.path.isfile(candidate):
        self._hits[base, suffix] += 1
        return candidate
    return ''

  def _choices(self, text):
    suffixes = ('', *headers.SUFFIXES) if os.path.splitext(text)[1].lower() not in headers.SUFFIXES else ('',)  # fmt: skip
    return [(base, suffix) for base in self._bases for suffix in suffixes]

  def all(self, cells: list[str]) -> list[str]:
    """The files that cells name.

    Raises:
      ConfigError: some do not exist.
    """
    found = [self.one(cell) for cell in cells]
    missing = [cell for cell, image in zip(cells, found) if not image]
    if missing:
      raise ConfigError(
        f'{self._path}: {len(missing):,} of {len(cells):,} images do not exist, the first: {missing[0]!r}; searched in '
        f'{", ".join(self._bases[:3])}'
      )
    return found
