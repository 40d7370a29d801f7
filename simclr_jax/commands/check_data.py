"""validate and summarise an image data set

Example:
  simclr-jax check-data --data=my_photographs --sheet=sheet.png

Every image is decoded once: formats, sizes, classes, duplicates, corrupt files. Exit code 1 if any image is corrupt.
"""

from simclr_jax.commands import options


def add_arguments(parser):
  """Declares the arguments."""
  options.data(parser, required=True)
  parser.add_argument(
    '--sheet', type=options.path, metavar='FILE', help='write a contact sheet to this .png'
  )


def run(args) -> int:
  """Prints the summary of all splits."""
  from simclr_jax import data
  from simclr_jax.commands import common
  from simclr_jax.errors import ConfigError

  sheet = args.sheet
  if sheet and (sheet.suffix != '.png' or not sheet.parent.is_dir()):
    raise ConfigError(f'--sheet={sheet} is not the name of a .png file in a folder that exists')
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
    found = scan.scan(dataset)
    labels, corrupt = found.label, len(found.bad)
    _summarise_files(dataset, found)
  if dataset.labelled:
    counts = np.bincount(labels, minlength=dataset.classes)
    _line('classes', f'{dataset.classes}, {counts.min():,}-{counts.max():,} images per class')
  return corrupt


def _summarise_files(dataset, found):
  import numpy as np

  if len(found.index):
    pixels = found.shape.prod(1)
    for name, i in (
      ('smallest', pixels.argmin()),
      ('median', np.argsort(pixels)[len(pixels) // 2]),
      ('largest', pixels.argmax()),
    ):
      h, w = found.shape[i]
      _line(name, f'{w} x {h}, {dataset.name(int(found.index[i]))}')
    _line('formats', ', '.join(f'{k} {n:,}' for k, n in found.kinds().items()))
    _line('EXIF-rotated', f'{found.rotated.sum():,}')
    _line('exact duplicates', f'{found.duplicates():,}')
  _line('corrupt', f'{len(found.bad):,}')
  for index in found.bad[:20]:
    print(f'    {dataset.find_problem([index])}')
  if len(found.bad) > 20:
    print(f'    and {len(found.bad) - 20:,} more')
  if found.bad:
    print(f'  to skip them: --config.data.skip_bad={len(found.bad)}')


def _line(name, text):
  print(f'  {name:20}{text}', flush=True)


def _contact_sheet(dataset, path, columns=8, rows=6, side=160):
  """Some images, whole, on one page."""
  import PIL.Image

  from simclr_jax.data import Arrays
  from simclr_jax.runtime import files

  few = dataset.sample(columns * rows)
  if isinstance(few, Arrays):
    images = few.images
  else:
    from simclr_jax.data import decode

    sized = decode.sized(few.iterate_once(), few.settings, skip=True)
    images = list(sized.map(decode.whole).ignore_errors().as_numpy_iterator())
  page = PIL.Image.new('RGB', (columns * side, rows * side), 'white')
  for i, image in enumerate(images):
    picture = PIL.Image.fromarray(image)
    picture.thumbnail((side - 6, side - 6))
    left, top = (i % columns) * side, i // columns * side
    page.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
  with files.atomic(path) as temporary:
    page.save(temporary)
