"""Images and boxes in the layout of VOC: Annotations/ID.xml, JPEGImages/ID.jpg and ImageSets/Main/SPLIT.txt."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = ('.jpg', '.jpeg', '.png', '.JPG', '.JPEG', '.PNG')
LIMIT = 10_000_000  # bytes of an annotation or a list
TURNED = 5  # orientations in EXIF from this one on exchange width and height


class Problem(Exception):
  """Something that the user can fix; the message is one sentence."""


class Images:
  """A data set: `images[index, flip]` is a dict.

  `image` uint8 [height, width, 3]; `boxes` float32 [n, 4], as in `average_precision`; `labels` int64 [n], from 1;
  `difficult` bool [n]. With `flip`, left and right are exchanged.

  Attributes:
    classes: the names of the labels 1, 2, ...
    records: one `annotation` per image.
  """

  def __init__(self, records: Sequence[dict[str, Any]], classes: Sequence[str]):
    self.classes, self.records = list(classes), list(records)
    numbers = {name: i for i, name in enumerate(classes, 1)}
    for record in records:
      for name in record['names']:
        if name not in numbers:
          raise Problem(
            f'{record["source"]} has the class {name!r}, which is none of {", ".join(classes)}'
          )
      record['labels'] = np.array([numbers[name] for name in record['names']], np.int64)

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, key: tuple[int, bool]) -> dict[str, Any] | Problem:
    """The image, or a `Problem`, which a worker process cannot raise without a traceback."""
    index, flip = key
    record = self.records[index]
    try:
      image = pixels(record['path'])
    except Problem as problem:
      return problem
    boxes = record['boxes']
    if flip:
      image = image[:, ::-1]
      boxes = boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [image.shape[1], 0, image.shape[1], 0]
    part = {name: record[name] for name in ('labels', 'difficult')}
    return {'image': np.array(image), 'boxes': np.float32(boxes), **part}


def read(folder: pathlib.Path, splits: str) -> list[dict[str, Any]]:
  """The annotations of splits, such as 'VOC2007/trainval,VOC2012/trainval' or, without years, 'train'.

  Raises:
    Problem: a file is missing or damaged.
  """
  if (folder / 'VOCdevkit').is_dir():
    folder = folder / 'VOCdevkit'
  if not folder.is_dir():
    raise Problem(
      f'{folder} is no folder: --data is the folder VOCdevkit, or one of your own in the same layout'
    )
  records: list[dict[str, Any]] = []
  for split in splits.split(','):
    year, _, name = split.strip().rpartition('/')
    path = folder / year / 'ImageSets' / 'Main' / f'{name}.txt'
    lines = [line.strip() for line in text(path).split('\n') if line.strip()]
    if not lines:
      raise Problem(f'{path} lists no image')
    records += [annotation(folder / year, line) for line in lines]
  return records


def annotation(folder: pathlib.Path, name: str) -> dict[str, Any]:
  """The annotation of an image: `source` and `path` of the files, `names`, `boxes` float64 [n, 4], `difficult`.

  Raises:
    Problem: the image or its annotation is missing or damaged, or a box is not inside of the image.
  """
  source = folder / 'Annotations' / f'{name}.xml'
  try:
    root = ElementTree.fromstring(text(source))
  except (ElementTree.ParseError, ValueError) as error:
    raise Problem(f'{source} is no XML: {error}') from None
  candidates = [folder / 'JPEGImages' / f'{name}{suffix}' for suffix in SUFFIXES]
  path = next((path for path in candidates if path.is_file()), None)
  if path is None:
    raise Problem(f'{candidates[0]} is missing')
  width, height = size(path)
  names, boxes, difficult = [], [], []
  for thing in root.iter('object'):
    label = (thing.findtext('name') or '').strip()
    if not label:
      raise Problem(f'{source} has an object without a name')
    try:
      x0, y0, x1, y1 = (float(thing.findtext(f'bndbox/{k}')) for k in ('xmin', 'ymin', 'xmax', 'ymax'))  # fmt: skip
    except (TypeError, ValueError):
      raise Problem(f'{source}: a box of {label!r} is not four numbers') from None
    # VOC counts pixels from 1. Programs that count from 0 also write 0.
    box = [max(x0 - 1, 0), max(y0 - 1, 0), x1, y1]
    inside = min(x0, y0) >= 0 and x1 <= width and y1 <= height and box[0] < x1 and box[1] < y1
    if not (inside and all(map(math.isfinite, box))):
      raise Problem(
        f'{source}: the box {x0:g}, {y0:g}, {x1:g}, {y1:g} of {label!r} is not inside of the image, which has '
        f'{width} x {height} pixels'
      )
    names.append(label)
    boxes.append(box)
    difficult.append((thing.findtext('difficult') or '0').strip() == '1')
  return {
    'source': source, 'path': path, 'names': names, 'boxes': np.array(boxes).reshape(-1, 4),
    'difficult': np.array(difficult, bool),
  }  # fmt: skip


def text(path: pathlib.Path) -> str:
  """A text file; raises Problem if it cannot be read."""
  if not path.is_file():
    raise Problem(f'{path} is missing')
  if path.stat().st_size > LIMIT:
    raise Problem(f'{path} is larger than {LIMIT:,} bytes')
  try:
    return path.read_text('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    raise Problem(f'{path} cannot be read: {error}') from None


def size(path: pathlib.Path) -> tuple[int, int]:
  """Width and height of an image as it is shown; only the header is read."""
  try:
    with Image.open(path) as image:
      turned = image.getexif().get(0x0112, 1) >= TURNED
      return image.size[::-1] if turned else image.size
  except Exception as error:  # Pillow raises many types
    raise Problem(f'{path} is no image: {type(error).__name__}: {error}') from None


def pixels(path: pathlib.Path) -> np.ndarray:
  """An image as it is shown, uint8 [height, width, 3]."""
  try:
    with Image.open(path) as image:
      return np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
  except Exception as error:  # Pillow raises many types
    raise Problem(f'{path} cannot be decoded: {type(error).__name__}: {error}') from None
