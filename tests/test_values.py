"""Formats that TensorFlow cannot read, transparency, 16-bit and float values: files against Pillow and float64."""

import importlib
import io
import lzma
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from simclr_jax import cli, config, data
from simclr_jax.data import values

tf = pytest.importorskip('tensorflow')
from simclr_jax.data import decode, scan, special  # noqa: E402  (needs TensorFlow)

RNG = np.random.default_rng(0)
COARSE = RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8)
RGB = Image.fromarray(COARSE).resize((40, 30), Image.Resampling.BICUBIC)
ALPHA = Image.merge('RGBA', (*RGB.split(), Image.fromarray(COARSE[..., 0]).resize((40, 30))))
DEEP = np.linspace(100, 4095, 30 * 40).reshape(30, 40).astype(np.uint16)


def encoded(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def settings(root, **changes):
  c = config.load('simclr_digits', TINY).data
  with c.unlocked():
    c.update(
      {'source': 'folder', 'dir': str(root), 'train_split': '.', 'test_split': '', 'holdout': 0.0,
       'on_device': 'no', **changes}
    )  # fmt: skip
  return c


def shown(tmp_path, files, **changes):
  """The images that a network sees, by name."""
  for name, contents in files.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
  source = data.load(settings(tmp_path, **changes), 'train')
  images = decode.sized(source.iterate_once(), source.settings).map(
    lambda e: (e['index'], decode.whole(e, source.settings)[0])
  )
  return {source.paths[i]: x for i, x in images.as_numpy_iterator()}


def on(background, rgba):
  """An independent derivation: RGBA, 0 to 255, on a background, rounded."""
  x = np.float64(rgba)
  alpha = x[..., 3:] / 255
  return np.round(x[..., :3] * alpha + background * (1 - alpha))


# Formats.

TIFF = {
  'plain.tif': (encoded(RGB, 'TIFF'), RGB),
  'lzw.tiff': (encoded(RGB, 'TIFF', compression='tiff_lzw'), RGB),
  'gray.tif': (encoded(RGB.convert('L'), 'TIFF'), RGB.convert('L')),
  'two pages.tif': (encoded(RGB, 'TIFF', save_all=True, append_images=[RGB.rotate(90)]), RGB),
  'cmyk.tif': (encoded(RGB.convert('CMYK'), 'TIFF'), RGB.convert('CMYK')),
  'bilevel.tif': (encoded(RGB.convert('1'), 'TIFF'), RGB.convert('1')),
  'colour.ppm': (encoded(RGB, 'PPM'), RGB),
  'gray.pgm': (encoded(RGB.convert('L'), 'PPM'), RGB.convert('L')),
  'bilevel.pbm': (encoded(RGB.convert('1'), 'PPM'), RGB.convert('1')),
  'palette.bmp': (encoded(RGB.quantize(50), 'BMP'), RGB.quantize(50)),
  'lossless.jp2': (encoded(RGB, 'JPEG2000', irreversible=False), RGB),
  'moving.webp': (
    encoded(RGB, 'WEBP', lossless=True, save_all=True, append_images=[RGB.rotate(180)]), RGB
  ),
  'still.gif': (encoded(RGB.quantize(50), 'GIF'), RGB.quantize(50)),
  'short name.jpe': (encoded(RGB, 'PNG'), RGB),
  'other name.jfif': (encoded(RGB, 'BMP'), RGB),
}  # fmt: skip


def test_formats_that_tensorflow_cannot_read(tmp_path):
  """Breaks if a file with one of these endings is passed over, or decoded differently from Pillow."""
  ours = shown(tmp_path, {name: contents for name, (contents, _) in TIFF.items()})
  assert ours.keys() == TIFF.keys()
  for name, (_, image) in TIFF.items():
    np.testing.assert_array_equal(ours[name], np.asarray(image.convert('RGB')), name)
  result = scan.scan(data.load(settings(tmp_path), 'train'))
  assert not result.bad and result.kinds()['TIFF'] == 6 and result.kinds()['PNM'] == 3
  assert result.slow.sum() == len(TIFF) - 2


def test_avif(tmp_path):
  """Breaks if an AVIF file is not read where Pillow can."""
  if not Image.registered_extensions().get('.avif') or 'AVIF' not in Image.SAVE:
    pytest.skip('this Pillow cannot write AVIF')
  x = shown(tmp_path, {'a.avif': encoded(RGB, 'AVIF', quality=95)})['a.avif']
  assert np.abs(x.astype(int) - np.asarray(RGB)).mean() < 4


@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_of_formats_that_tensorflow_cannot_read(tmp_path, orientation):
  """Breaks if a rotated TIFF, PNG or WebP is shown as stored, or its size is that of the stored image."""
  exif = Image.Exif()
  exif[0x0112] = orientation
  files = {
    'a.tif': encoded(RGB, 'TIFF', tiffinfo={274: orientation}),
    'b.png': encoded(RGB, 'PNG', exif=exif),
    'c.webp': encoded(RGB, 'WEBP', lossless=True, exif=exif),
  }
  x = np.asarray(RGB)
  turned = {
    1: x, 2: x[:, ::-1], 3: x[::-1, ::-1], 4: x[::-1], 5: x.swapaxes(0, 1),
    6: np.rot90(x, -1), 7: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90(x),
  }[orientation]  # fmt: skip
  for name, image in shown(tmp_path, files).items():
    np.testing.assert_array_equal(image, turned, name)


def test_heic_names_the_plugin(tmp_path, monkeypatch):
  """Breaks if a photograph of a telephone causes a traceback, or the message does not say how to read it."""
  heic = b'\0\0\0\x18ftypheic\0\0\0\0heicmif1' + bytes(100)
  (tmp_path / 'a.heic').write_bytes(heic)
  original = importlib.import_module

  def missing(name, *args):
    if name == 'pillow_heif':
      raise ImportError(name)
    return original(name, *args)

  special._register_heif.cache_clear()
  monkeypatch.setattr(special.importlib, 'import_module', missing)
  source = data.load(settings(tmp_path), 'train')
  assert source.find_problem([0]) == (
    f'{tmp_path}/a.heic is a HEIC image: pip install pillow-heif, or convert it to JPEG'
  )
  special._register_heif.cache_clear()


def test_large_images_of_pillow_are_refused_by_their_headers(tmp_path):
  """Breaks if Pillow decodes an image before its size is known, warns, or keeps a limit of its own."""
  tiff = encoded(Image.new('1', (20000, 10000)), 'TIFF', compression='group4')
  gif = encoded(Image.new('L', (10, 10)), 'GIF')
  at = gif.index(b',') + 5  # the frame is larger than the screen
  files = {'a.tif': tiff, 'b.gif': gif[:at] + struct.pack('<HH', 16000, 16000) + gif[at + 4 :]}
  for name, contents in files.items():
    (tmp_path / name).write_bytes(contents)
  source = data.load(settings(tmp_path), 'train')
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert 'has 20,000 x 10,000 pixels, more than data.max_pixels' in source.find_problem([0])
    assert 'has 16,000 x 16,000 pixels, more than data.max_pixels' in source.find_problem([1])
    larger = data.load(settings(tmp_path, max_pixels=2**31 - 1), 'train')
    assert not larger.find_problem([0])
  assert Image.MAX_IMAGE_PIXELS is not None


@pytest.mark.parametrize('name', ['a.tif', 'b.ppm', 'c.jp2', 'd.gif', 'e.png', 'f.webp'])
def test_broken_images_of_pillow_are_named(tmp_path, name):
  """Breaks if a truncated file of these formats is read as an image or causes a traceback."""
  noise = Image.fromarray(RNG.integers(0, 256, (60, 60, 4), dtype=np.uint8))
  kind = {
    'tif': 'TIFF',
    'ppm': 'PPM',
    'jp2': 'JPEG2000',
    'gif': 'GIF',
    'png': 'PNG',
    'webp': 'WEBP',
  }
  image = noise.convert('RGB') if name[-3:] in ('ppm', 'gif', 'jp2') else noise
  contents = encoded(image, kind[name.split('.')[1]])
  (tmp_path / name).write_bytes(contents[: len(contents) // 2])
  source = data.load(settings(tmp_path), 'train')
  problem = source.find_problem([0])
  assert problem.startswith(f'{tmp_path}/{name} is a broken ') and '\n' not in problem
  assert list(scan.scan(source).bad) == [0]


def tiff(values, **tags):
  """A TIFF of 10 x 10 values of 32 bits in one strip or tile; `tags` replace others: bits, samples, compression, ..."""
  codes = {
    'width': 256, 'height': 257, 'bits': 258, 'compression': 259, 'photometric': 262, 'start': 273,
    'samples': 277, 'rows': 278, 'count': 279, 'tile_width': 322, 'tile_height': 323,
    'tile_start': 324, 'tile_count': 325, 'depth': 32997,
  }  # fmt: skip
  tags = {'width': 10, 'height': 10, 'bits': 32, 'compression': 1, 'photometric': 1, 'samples': 1, **tags}  # fmt: skip
  kind = 'tile_' if 'tile_width' in tags else ''
  start = 8 + 2 + 12 * (len(tags) + 2) + 4
  tags |= {kind + 'start': start, kind + 'count': len(values)}
  entries = [struct.pack('<HHII', codes[k], 4, 1, v) for k, v in sorted(tags.items(), key=lambda t: codes[t[0]])]  # fmt: skip
  return b'II*\0' + struct.pack('<IH', 8, len(tags)) + b''.join(entries) + bytes(4) + values


ZEROS = bytes(3 * 10**7)
EXPANDING = {
  'deflate.tif': (tiff(zlib.compress(ZEROS), compression=8), 'more values than its header says'),
  'lzma.tif': (tiff(lzma.compress(ZEROS), compression=34925), 'more values than its header says'),
  'samples.tif': (tiff(ZEROS[:400], bits=8, samples=60000, width=5000, height=5000), 'bytes of memory'),
  'depth.tif': (tiff(ZEROS[:400], depth=10**8), 'bytes of memory'),
  'tile.tif': (tiff(ZEROS[:400], tile_width=65520, tile_height=65520), 'bytes of memory'),
  'comment.ppm': (b'P6\n#' + bytes(10**6) + b'\n10 10\n255\n' + bytes(300), 'no size in its first'),
}  # fmt: skip


@pytest.mark.parametrize('name', EXPANDING)
def test_images_that_expand(tmp_path, name, capfd):
  """Breaks if a small file takes more memory than its header says, or very long, or a decoder prints its own errors."""
  if name.endswith('tif'):
    pytest.importorskip('tifffile')
  (tmp_path / name).write_bytes(EXPANDING[name][0])
  source = data.load(settings(tmp_path, range=(0.0, 1.0)), 'train')
  tracemalloc.start()
  problem = source.find_problem([0])
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert EXPANDING[name][1] in problem and peak < len(ZEROS) / 2
  assert not capfd.readouterr().err


# Transparency.

TRANSPARENT = {
  'rgba.png': encoded(ALPHA, 'PNG'),
  'gray and alpha.png': encoded(ALPHA.convert('LA'), 'PNG'),
  'lossless.webp': encoded(ALPHA, 'WEBP', lossless=True, exact=True),
  'rgba.tif': encoded(ALPHA, 'TIFF'),
  'palette.png': encoded(RGB.quantize(20), 'PNG', transparency=3),
  'colour.png': encoded(RGB.quantize(20).convert('RGB'), 'PNG', transparency=tuple(RGB.quantize(20).getpalette()[9:12])),
  'drawing.gif': encoded(RGB.quantize(20), 'GIF', transparency=3),
}  # fmt: skip


@pytest.mark.parametrize('alpha, background', [('white', 255), ('black', 0), ('gray', 128)])
def test_transparent_images_are_composited(tmp_path, alpha, background):
  """Breaks if alpha is discarded in a format, rounded differently, or put on another background."""
  ours = shown(tmp_path, TRANSPARENT, alpha=alpha)
  assert ours.keys() == TRANSPARENT.keys()
  for name, contents in TRANSPARENT.items():
    rgba = np.asarray(Image.open(io.BytesIO(contents)).convert('RGBA'))
    assert rgba[..., 3].min() < 255, name
    np.testing.assert_array_equal(ours[name], on(background, rgba), name)


def test_alpha_can_be_ignored(tmp_path):
  """Breaks if data.alpha=ignore changes a colour."""
  ours = shown(tmp_path, {'rgba.png': TRANSPARENT['rgba.png']}, alpha='ignore')
  np.testing.assert_array_equal(ours['rgba.png'], np.asarray(ALPHA)[..., :3])


def test_rounding_of_every_value():
  """Breaks if a composited value is not the nearest integer, for any colour and alpha."""
  colour, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
  pixels = values.Pixels(colour[..., None], alpha)
  for name, background in values.BACKGROUND.items():
    ours = values.finish(pixels, values.Settings(1, name))[..., 0]
    exact = (
      2 * (1 * colour.astype(int) * alpha + background * (255 - alpha.astype(int))) + 255
    ) // 510
    np.testing.assert_array_equal(ours, exact)


# 16 bits and floats.


def test_sixteen_bits_are_scaled_by_the_values_of_the_training_images(tmp_path):
  """Breaks if 12 bits in 16 become nearly black, or train and test are scaled differently."""
  files = {
    'train/a.png': encoded(Image.fromarray(DEEP), 'PNG'),
    'train/b.tif': encoded(Image.fromarray(DEEP[::-1]), 'TIFF'),
    'train/8 bits.png': encoded(RGB, 'PNG'),
    'test/c.png': encoded(Image.fromarray(DEEP // 2), 'PNG'),
  }
  splits = {'train_split': 'train', 'test_split': 'test'}
  train = shown(tmp_path, files, **splits)
  expected = np.round((np.float64(DEEP) - 100) * 255 / (4095 - 100))
  np.testing.assert_array_equal(train['a.png'], np.repeat(expected[..., None], 3, -1))
  np.testing.assert_array_equal(train['b.tif'][::-1], train['a.png'])
  np.testing.assert_array_equal(train['8 bits.png'], np.asarray(RGB))  # never rescaled
  test = data.load(settings(tmp_path, **splits), 'test')
  assert data.value_range(test) == (100, 4095)
  result = scan.scan(test)
  assert result.deep.all() and result.clipped.sum() == 0 + (DEEP // 2 < 100).sum()
  fixed = shown(tmp_path, files, range=(0.0, 65535.0), **splits)
  np.testing.assert_array_equal(fixed['a.png'][..., 0], np.round(np.float64(DEEP) * 255 / 65535))


def test_floats(tmp_path):
  """Breaks if floats in [0, 1] are stretched, others are clipped, or NaN becomes a pixel."""
  unit = RNG.random((20, 30)).astype(np.float32) / 2
  ours = shown(tmp_path / 'unit', {'a.tif': encoded(Image.fromarray(unit), 'TIFF')})
  np.testing.assert_array_equal(ours['a.tif'][..., 0], np.floor(np.float64(unit) * 255 + 0.5))
  depth = np.linspace(-3, 7, 600, dtype=np.float32).reshape(20, 30)
  ours = shown(tmp_path / 'depth', {'a.tif': encoded(Image.fromarray(depth), 'TIFF')})
  assert ours['a.tif'].min() == 0 and ours['a.tif'].max() == 255
  depth[3, 4] = np.nan
  (tmp_path / 'nan').mkdir()
  Image.fromarray(depth).save(tmp_path / 'nan' / 'a.tif')
  source = data.load(settings(tmp_path / 'nan'), 'train')
  assert source.find_problem([0]) == f'{tmp_path}/nan/a.tif has NaN or infinite values'


# Channels.


def many_channels(count):
  return RNG.integers(0, 256, (20, 30, count), dtype=np.uint8)


@pytest.mark.parametrize('layout', ['samples', 'planes', 'pages'])
def test_tiff_of_many_channels(tmp_path, layout):
  """Breaks if channels are dropped, mixed with rows, or a file of another number of channels is read."""
  tifffile = pytest.importorskip('tifffile')
  x = many_channels(5)
  if layout == 'samples':
    tifffile.imwrite(tmp_path / 'a.tif', x, photometric='minisblack', planarconfig='contig')
  else:
    planes = np.moveaxis(x, -1, 0)
    kind = {'planarconfig': 'separate'} if layout == 'planes' else {}
    tifffile.imwrite(tmp_path / 'a.tif', planes, photometric='minisblack', **kind)
  ours = shown(tmp_path, {}, channels=5)
  np.testing.assert_array_equal(ours['a.tif'], x)
  source = data.load(settings(tmp_path, channels=4), 'train')
  assert 'not data.channels=4' in source.find_problem([0])


def test_deep_colours_of_tiff(tmp_path):
  """Breaks if a TIFF of 16 bits per colour is reduced to 8 bits before it is scaled."""
  tifffile = pytest.importorskip('tifffile')
  x = RNG.integers(0, 1000, (20, 30, 3)).astype(np.uint16)
  x[0, 0], x[0, 1] = 0, 1000
  tifffile.imwrite(tmp_path / 'a.tif', x, photometric='rgb')
  ours = shown(tmp_path, {})
  np.testing.assert_array_equal(ours['a.tif'], np.floor(np.float64(x) * 255 / 1000 + 0.5))


@pytest.mark.parametrize('channels', [1, 4])
def test_other_channels_of_files(tmp_path, channels):
  """Breaks if one channel is not the luma of Pillow, or four are not the colours and alpha as stored."""
  files = {'a.png': encoded(ALPHA, 'PNG')}
  if channels == 1:
    files = {'a.png': encoded(RGB, 'PNG'), 'b.tif': encoded(RGB, 'TIFF')}
  expected = np.asarray(ALPHA) if channels == 4 else np.asarray(RGB.convert('L'))[..., None]
  for x in shown(tmp_path, files, channels=channels).values():
    assert np.abs(x.astype(int) - expected).max() <= (channels == 1)  # Pillow rounds its weights


@pytest.mark.parametrize('resize_on', ['device', 'host'])
def test_canvases_of_every_kind_are_those_of_png(tmp_path, resize_on):
  """Breaks if training or evaluation crops an image of Pillow differently, or not at all."""
  pipelines = ('simclr_crop(0.08, 1)', 'torch_crop(0.2, 1)')
  contents = [encoded(RGB, kind) for kind in ('PNG', 'TIFF', 'PPM')]
  contents.append(encoded(RGB, 'JPEG2000', irreversible=False))
  elements = {
    'bytes': contents, 'epoch': np.zeros(4, np.int32), 'position': np.full(4, 3, np.int32)
  }  # fmt: skip
  canvases = decode.canvases(
    tf.data.Dataset.from_tensor_slices(elements), pipelines, 16, 0,
    settings('', resize_on=resize_on),
  )  # fmt: skip
  png, *others = canvases.as_numpy_iterator()
  for other in others:
    np.testing.assert_array_equal(other['images'], png['images'])
    np.testing.assert_array_equal(other['crops'], png['crops'])


# check-data.


def check(capsys, *arguments):
  code = cli.main(['check-data', *map(str, arguments)])
  return code, capsys.readouterr().out


def test_check_data_reports_what_shows_nothing(tmp_path, capsys):
  """Breaks if black drawings, empty or nearly black images, or 16 bits are not mentioned."""
  drawing = np.zeros((24, 24, 4), np.uint8)
  drawing[4:9, 4:9, 3] = 255
  Image.fromarray(drawing).save(tmp_path / 'drawing.png')
  Image.new('RGB', (30, 20), 'red').save(tmp_path / 'red.png')
  dark = RNG.integers(0, 20, (20, 30, 3), dtype=np.uint8)
  Image.fromarray(dark).save(tmp_path / 'dark.png')
  Image.fromarray(DEEP).save(tmp_path / 'ct.png')
  RGB.save(tmp_path / 'scan.tif')
  code, out = check(capsys, f'--data={tmp_path}')
  assert code == 0
  assert 'one colour          1 images\n    red.png' in out
  assert (
    'nearly one colour   1 images use less than an eighth of the range of values\n    dark.png'
    in out
  )
  assert 'PNG 1: the values 100 to 4,095 become black to white' in out
  assert (
    'transparent         1 images, put on white' in out and '1 TIFF' in out and 'by Pillow' in out
  )
  _, out = check(capsys, f'--data={tmp_path}', '--config.data.alpha=black')
  assert '1 images are one colour only on black: try --config.data.alpha=gray' in out


def test_check_data_names_copies_within_and_across_splits(tmp_path, capsys):
  """Breaks if a test image that is a training image is not named, or contradicting labels are not."""
  for split, label, name, seed in [
    ('train', 'cat', 'a', 0), ('train', 'cat', 'b', 1), ('train', 'dog', 'c', 1), ('train', 'dog', 'd', 2),
    ('test', 'cat', 'e', 0), ('test', 'dog', 'f', 3), ('test', 'cat', 'g', 2),
  ]:  # fmt: skip
    path = tmp_path / split / label / f'{name}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(
      path
    )
  code, out = check(capsys, f'--data={tmp_path}')
  assert code == 0 and 'cat 2, dog 2' in out
  assert 'dog/c.png = cat/b.png, labels dog and cat' in out
  assert '2 test images are training images, too' in out
  assert 'cat/e.png = cat/a.png\n' in out and 'cat/g.png = dog/d.png, labels cat and dog' in out
  assert '1 of them have different labels' in out


def test_check_data_of_arrays(tmp_path, capsys):
  """Breaks if arrays get fewer checks than files."""
  x = RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8)
  x[1], x[2] = x[0], 7
  np.savez(tmp_path / 'train.npz', images=x, labels=np.array([[3], [5], [3], [3], [5], [10]]))
  np.savez(tmp_path / 'test.npz', images=x[3:5], labels=np.array([3, 5]))
  code, out = check(capsys, f'--data={tmp_path}', f'--sheet={tmp_path}/sheet.png')
  assert code == 0 and '3 3, 5 2, 10 1' in out
  assert 'image 1 = image 0, labels 5 and 3' in out and 'image 2' in out
  assert '2 test images are training images, too' in out
  assert (tmp_path / 'sheet.png').stat().st_size > 1000
