"""validate and summarise an image data set

Example:
  simclr-jax check-data --data=my_photographs --sheet=sheet.png

Decodes every image once and reports sizes, formats, classes, duplicates and corrupt files. Exit code 1 if any image is
corrupt.
"""

import argparse

from simclr_jax.commands import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.data(parser, required=True)
  parser.add_argument(
    '--sheet', type=options.path, metavar='FILE', help='write a contact sheet to this .png'
  )


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
  corrupt = 0
  for split in (s for s in ('train', 'test') if config[f'{s}_split']):
    dataset = data.load(config, split)
    print(f'{split}: {len(dataset):,} images', flush=True)
    corrupt += _summarise(dataset)
    if sheet and split == 'train':
      _contact_sheet(dataset, sheet)
      print(f'wrote {sheet}')
  return int(corrupt > 0)


def _summarise(dataset):
  """Prints the summary of one split; returns the number of corrupt images."""
  import hashlib

  import numpy as np

  from simclr_jax.data import Arrays, scan

  corrupt = 0
  if isinstance(dataset, Arrays):
    labels = dataset.labels
    _line('size', f'all {dataset.images.shape[2]} x {dataset.images.shape[1]}')
    digests = {hashlib.blake2b(x.tobytes()).digest() for x in dataset.images}
    _line('exact duplicates', f'{len(dataset) - len(digests):,}')
  else:
    result = scan.scan(dataset)
    labels, corrupt = result.label, len(result.bad)
    _summarise_files(dataset, result)
  if dataset.labelled:
    counts = np.bincount(labels, minlength=dataset.classes)
    _line('classes', f'{dataset.classes}, {counts.min():,}-{counts.max():,} images per class')
  return corrupt


def _summarise_files(dataset, result):
  """Prints the result of `scan.scan`."""
  import numpy as np

  if len(result.index):
    pixels = result.shape.prod(1)
    for name, i in (
      ('smallest', pixels.argmin()),
      ('median', np.argsort(pixels)[len(pixels) // 2]),
      ('largest', pixels.argmax()),
    ):
      h, w = result.shape[i]
      _line(name, f'{w} x {h}, {dataset.name(int(result.index[i]))}')
    _line('formats', ', '.join(f'{k} {n:,}' for k, n in result.kinds().items()))
    _line('EXIF-rotated', f'{result.rotated.sum():,}')
    _line('exact duplicates', f'{result.duplicates():,}')
  _line('corrupt', f'{len(result.bad):,}')
  for index in result.bad[:20]:
    print(f'    {dataset.find_problem([index])}')
  if len(result.bad) > 20:
    print(f'    and {len(result.bad) - 20:,} more')
  if result.bad:
    print(f'  to skip them: --config.data.skip_bad={len(result.bad)}')


def _line(name, text):
  print(f'  {name:20}{text}', flush=True)


def _contact_sheet(dataset, path, columns=8, rows=6, side=160):
  """Writes thumbnails of a sample of the images to a .png file."""
  import PIL.Image

  from simclr_jax.data import Arrays
  from simclr_jax.runtime import files

  sample = dataset.sample(columns * rows)
  if isinstance(sample, Arrays):
    images = list(sample.images)
  else:
    from simclr_jax.data import decode

    sized = decode.sized(sample.iterate_once(), sample.settings, skip=True)
    images = list(sized.map(decode.whole).ignore_errors().as_numpy_iterator())
  page = PIL.Image.new('RGB', (columns * side, rows * side), 'white')
  for i, image in enumerate(images):
    picture = PIL.Image.fromarray(image)
    picture.thumbnail((side - 6, side - 6))
    left, top = (i % columns) * side, i // columns * side
    page.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
  with files.atomic(path) as temporary:
    page.save(temporary)
