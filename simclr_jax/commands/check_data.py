"""validate and summarise an image data set

Example:
  simclr-jax check-data --data=my_photographs --sheet=sheet.png

Decodes every image once and reports sizes, formats, classes, corrupt files, duplicates within and across the splits,
images that show nothing, transparency and 16-bit values. Exit code 1 if any image is corrupt.
"""

import argparse

from simclr_jax.commands import options
from simclr_jax.runtime.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.data(parser, required=True)
  parser.add_argument(
    '--sheet', type=options.path, metavar='FILE', help='write a contact sheet to this .png'
  )


NAMED = 10  # images that are named for each finding
CLASSES = 200  # classes that are listed


def run(args: argparse.Namespace) -> int:
  """Prints the summary of all splits."""
  from simclr_jax import data
  from simclr_jax.commands import common
  from simclr_jax.errors import ConfigError

  sheet = args.sheet
  if sheet and (sheet.suffix != '.png' or not sheet.parent.is_dir()):
    raise ConfigError(f'--sheet={sheet}: name a .png file in an existing folder')
  overrides = {'data.on_device': 'no', **args.overrides}
  config = common.recipe_with_data('simclr_images', args.data, overrides).data
  train, test = data.load_splits(config)
  print('\n'.join(data.summary(config, train, test)), flush=True)
  splits = {'train': train} | ({} if test is None else {'test': test})
  scans = {name: _check(name, dataset) for name, dataset in splits.items()}
  if test is not None:
    _compare(train, test, scans['train'], scans['test'])
  if sheet:
    good = scans['train'].index  # a bad image may crash the decoder
    _contact_sheet(train.subset(good) if scans['train'].bad else train, sheet)
    print(f'wrote {sheet}')
  return int(any(result.bad for result in scans.values()))


def _check(split, dataset):
  """Prints the summary of one split; returns its `scan.Scan`."""
  from simclr_jax.data import Arrays, scan

  print(f'{split}: {len(dataset):,} images', flush=True)
  if isinstance(dataset, Arrays):
    result = scan.scan_arrays(dataset)
    _line('size', f'all {dataset.images.shape[2]} x {dataset.images.shape[1]}')
    for remark in dataset.remarks:
      _line('read as', remark)
  else:
    result = scan.scan(dataset)
    _sizes_and_formats(dataset, result)
  _classes(dataset, result)
  _values(dataset, result)
  _line('exact duplicates', f'{result.duplicates():,}')
  _pairs(dataset, dataset, result, result, result.copies())
  if not isinstance(dataset, Arrays):
    _corrupt(dataset, result)
  return result


def _sizes_and_formats(dataset, result):
  import numpy as np

  from simclr_jax.data import headers

  if not len(result.index):
    return
  pixels = result.shape.astype(np.int64).prod(1)
  for name, i in (
    ('smallest', pixels.argmin()),
    ('median', np.argsort(pixels)[len(pixels) // 2]),
    ('largest', pixels.argmax()),
  ):
    h, w = result.shape[i]
    _line(name, f'{w} x {h}, {printable(dataset.name(int(result.index[i])))}')
  _line('formats', ', '.join(f'{k} {n:,}' for k, n in result.kinds().items()))
  by_pillow = result.slow & ~((result.kind == headers.PNG) & result.deep)
  if by_pillow.any():
    kinds = ', '.join(f'{n:,} {k}' for k, n in result.kinds(by_pillow).items())
    _line('', f'{kinds} images are decoded by Pillow, more slowly')
  _line('EXIF-rotated', f'{result.rotated.sum():,}')


def _classes(dataset, result):
  """The classes with their names and numbers of images."""
  import numpy as np

  if not dataset.classes:
    return
  counts = np.bincount(result.label[result.label >= 0], minlength=dataset.classes)
  text = f'{dataset.classes:,}, {counts.min():,}-{counts.max():,} images per class'
  missing = int((result.label < 0).sum())
  _line('classes', text + (f'; {missing:,} images have no label' if missing else ''))
  shown = [f'{printable(n)} {c:,}' for n, c in zip(dataset.class_names[:CLASSES], counts)]
  if dataset.classes > CLASSES:
    shown.append(f'and {dataset.classes - CLASSES:,} more')
  _wrapped(', '.join(shown))


def _values(dataset, result):
  """16-bit values, transparency, and images that show nothing."""
  from simclr_jax import data
  from simclr_jax.data import Arrays, values

  streamed = not isinstance(dataset, Arrays)
  if streamed and result.deep.any():
    low_to_high = values.describe(data.value_range(dataset))
    kinds = ', '.join(f'{k} {n:,}' for k, n in result.kinds(result.deep).items())
    clipped = int(result.clipped.sum(dtype='int64'))
    _line(
      '16 bits or floats',
      f'{kinds}: the values {low_to_high} become black to white'
      + (f', {clipped:,} values outside are clipped' if clipped else '')
      + '; others: --config.data.range=LOW,HIGH',
    )
  alpha = dataset.settings.alpha if streamed else ''
  if result.transparent.any():
    ground = 'whose alpha channel is ignored' if alpha == 'ignore' else f'put on {alpha}'
    _line('transparent', f'{result.transparent.sum():,} images, {ground} (--config.data.alpha)')
  for name, rows in (('one colour', result.one_colour), ('nearly one colour', result.faint())):
    if rows.any():
      hint = (
        '' if name == 'one colour' else ' images use less than an eighth of the range of values'
      )
      _line(name, f'{rows.sum():,}{hint or " images"}')
      _list([_name(dataset, result, i) for i in rows.nonzero()[0][:NAMED]], int(rows.sum()))
  if result.hides.any():
    other = 'gray' if alpha in ('white', 'black') else 'white'
    _line('hidden', f'{result.hides.sum():,} images are one colour only {"without their alpha channel" if alpha == "ignore" else "on " + alpha}: '
                    f'try --config.data.alpha={other}')  # fmt: skip


def _compare(train, test, in_train, in_test):
  """Prints which test images are training images."""
  copies = in_test.copies(in_train)
  if copies:
    print(f'{len(copies):,} test images are training images, too: accuracies will be too high')
    _pairs(test, train, in_test, in_train, copies)
  else:
    print('no test image is a training image, too')


def _pairs(dataset, other, result, in_other, copies):
  """Names copies and what they are copies of."""
  lines = []
  for i, first in copies[:NAMED]:
    text = f'{_name(dataset, result, i)} = {_name(other, in_other, first)}'
    a, b = int(result.label[i]), int(in_other.label[first])
    if a >= 0 and b >= 0 and a != b:
      text += f', labels {printable(dataset.class_names[a])} and {printable(other.class_names[b])}'
    lines.append(text)
  _list(lines, len(copies))
  different = sum(
    result.label[i] != in_other.label[first] and result.label[i] >= 0 and in_other.label[first] >= 0
    for i, first in copies
  )
  if different:
    print(f'    {different:,} of them have different labels')


def _corrupt(dataset, result):
  _line('corrupt', f'{len(result.bad):,}')
  for problem in list(result.bad.values())[:20]:
    print(f'    {printable(problem)}')
  if len(result.bad) > 20:
    print(f'    and {len(result.bad) - 20:,} more')
  if result.bad:
    print(f'  to skip them: --config.data.skip_bad={len(result.bad)}')


def _name(dataset, result, row):
  """The name of an image, or its number."""
  index = int(result.index[row])
  names = dataset.names()
  return printable(names[index]) if names else f'image {index:,}'


def _list(lines, count):
  for line in lines:
    print(f'    {line}')
  if count > len(lines):
    print(f'    and {count - len(lines):,} more', flush=True)


def _line(name, text):
  print(f'  {name:20}{text}', flush=True)


def _wrapped(text):
  import textwrap

  print(textwrap.fill(text, 100, initial_indent=' ' * 22, subsequent_indent=' ' * 22))


def _contact_sheet(dataset, path, columns=8, rows=6, side=160):
  """Writes thumbnails of a sample of the images, as the network sees them, to a .png file."""
  import PIL.Image

  from simclr_jax.data import pixels
  from simclr_jax.runtime import files

  page = PIL.Image.new('RGB', (columns * side, rows * side), 'white')
  for i, image in enumerate(_images(dataset.sample(columns * rows), side)):
    picture = PIL.Image.fromarray(pixels.to_rgb(image))
    picture.thumbnail((side - 6, side - 6))
    left, top = (i % columns) * side, i // columns * side
    page.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
  with files.atomic(path) as temporary:
    page.save(temporary)


def _images(dataset, side):
  """The images of a data set one after the other, at least `side` pixels: uint8 `[h, w, channels]`.

  Only small copies are kept, because images may be large and a pipeline holds several. Corrupt images are skipped.
  """
  from simclr_jax.data import Arrays

  if isinstance(dataset, Arrays):
    return iter(dataset.images)
  from simclr_jax.data import decode
  from simclr_jax.data.stream import tf

  def thumbnail(e):
    image = decode.whole(e, dataset.settings)[0]
    step = tf.maximum(tf.reduce_min(tf.shape(image)[:2]) // (4 * side), 1)
    return image[::step, ::step]

  sized = decode.sized(dataset.iterate_once(), dataset.settings, skip=True)
  return sized.map(thumbnail).ignore_errors().as_numpy_iterator()
