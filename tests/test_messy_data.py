"""Folders of real-world images: all formats, EXIF-rotated, tiny, huge, oddly named, corrupt; against Pillow."""

import dataclasses
import io
import json
import logging
import os
import pathlib
import shutil
import struct
import zlib

import jax
import numpy as np
import pytest
from common import records
from conftest import TINY
from PIL import Image, ImageOps

from simclr_jax import cli, config, data, sharding
from simclr_jax.data import augment, crop, folder, headers, loader
from simclr_jax.encoder import preprocess
from simclr_jax.errors import ConfigError

tf = pytest.importorskip('tensorflow')
from simclr_jax.data import decode, examine, scan  # noqa: E402  (needs TensorFlow)

SIZE = 24  # of views; the canvas has 64
PIPELINES = ('simclr_crop(0.08, 1)', 'torch_crop(0.2, 1)')
resize = jax.jit(crop.crop_and_resize, static_argnums=(2, 3))


def picture(height, width, seed=0):
  """A smooth image, whose channels differ."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (2 + height // 40, 2 + width // 40, 3), dtype=np.uint8)
  return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def exif(orientation, order='<'):
  """An EXIF block with only the orientation tag; `order` is its byte order."""
  mark = b'II' if order == '<' else b'MM'
  entry = struct.pack(order + 'HHIHH', 0x0112, 3, 1, orientation, 0)
  return b'Exif\0\0' + mark + struct.pack(order + 'HIH', 42, 8, 1) + entry + struct.pack('I', 0)


def shown(contents):
  """An image as Pillow displays it: int `[h, w, 3]`."""
  image = Image.open(io.BytesIO(contents))
  if image.mode.startswith('I'):  # `settings` scales all 16 bits
    scaled = np.floor(np.float64(image) * 255 / 65535 + 0.5).astype(int)
    return np.repeat(scaled[..., None], 3, -1)
  image.load()
  rgba = np.float64(ImageOps.exif_transpose(image).convert('RGBA'))
  alpha = rgba[..., 3:] / 255
  return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(int)  # on white


def settings(root, **values):
  c = config.load('simclr_digits', TINY).data
  with c.unlocked():
    c.update({
      'source': 'folder', 'dir': str(root), 'train_split': '.', 'test_split': '',
      'range': (0.0, 65535.0), 'holdout': 0.0, **values,
    })  # fmt: skip
  return c


def fill(root, files):
  """Writes files, name -> bytes, and returns the folder."""
  for name, contents in files.items():
    path = os.path.join(os.fsencode(root), os.fsencode(name))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
      file.write(contents)
  return root


def sentence(call):
  with pytest.raises(ConfigError) as error:
    call()
  text = str(error.value)
  del error  # otherwise its traceback and this frame keep each other and a pipeline alive
  assert '\n' not in text and len(text) < 500 and '{{' not in text, text
  return text


def chunk(name, contents):
  body = name + contents
  return struct.pack('>I', len(contents)) + body + struct.pack('>I', zlib.crc32(body))


def deep_png(pixels):
  """A PNG with 16 bits per channel, which Pillow does not write in colour."""
  height, width = pixels.shape[:2]
  header = struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
  parts = [chunk(b'IHDR', header), chunk(b'IDAT', zlib.compress(rows)), chunk(b'IEND', b'')]
  return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def bmp(width, height, bits, rows, palette=b''):
  header = struct.pack('<IiiHHIIiiII', 40, width, height, 1, bits, 0, 0, 0, 0, len(palette) // 4, 0)
  start = 14 + len(header) + len(palette)
  return struct.pack('<2sIHHI', b'BM', start + len(rows), 0, 0, start) + header + palette + rows


RGB = picture(45, 67)
GRAY, ALPHA = RGB.convert('L'), RGB.copy()
ALPHA.putalpha(ImageOps.invert(GRAY))
DEEP = Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 257 - np.uint16(99))
OTHER = picture(45, 67, 1)
FORMATS = {
  'baseline.jpg': encoded(RGB, 'JPEG', quality=90),
  'full chroma.jpg': encoded(RGB, 'JPEG', quality=90, subsampling=0),
  'progressive.jpg': encoded(RGB, 'JPEG', quality=90, progressive=True),
  'gray.jpg': encoded(GRAY, 'JPEG', quality=90),
  'cmyk.jpg': encoded(RGB.convert('CMYK'), 'JPEG', quality=90),
  'rgb inside.jpg': encoded(RGB, 'JPEG', quality=90, keep_rgb=True),
  'two pictures.jpg': encoded(RGB, 'MPO', save_all=True, append_images=[OTHER]),
  'rgb.png': encoded(RGB, 'PNG'),
  'gray.png': encoded(GRAY, 'PNG'),
  'gray and alpha.png': encoded(ALPHA.convert('LA'), 'PNG'),
  'alpha.png': encoded(ALPHA, 'PNG'),
  'palette.png': encoded(RGB.quantize(60), 'PNG'),
  'small palette.png': encoded(RGB.quantize(5), 'PNG'),
  '16 bits.png': encoded(DEEP, 'PNG'),
  '16 bits, colour.png': deep_png(np.asarray(RGB).astype(int) * 257 // 2 + 99),
  '1 bit.png': encoded(GRAY.convert('1'), 'PNG'),
  'animated.png': encoded(RGB, 'PNG', save_all=True, append_images=[OTHER]),
  'still.gif': encoded(RGB, 'GIF'),
  'animated.gif': encoded(RGB, 'GIF', save_all=True, append_images=[OTHER]),
  'transparent.gif': encoded(ALPHA, 'GIF'),
  'rgb.bmp': encoded(RGB, 'BMP'),
  'gray.bmp': encoded(GRAY, 'BMP'),
  'alpha.bmp': encoded(ALPHA, 'BMP'),
  'top first.bmp': bmp(64, -32, 24, np.asarray(picture(32, 64))[..., ::-1].tobytes()),
  'lossy.webp': encoded(RGB, 'WEBP', quality=80),
  'lossless.webp': encoded(RGB, 'WEBP', lossless=True),
  'lossy alpha.webp': encoded(ALPHA, 'WEBP', quality=80),
  'lossless alpha.webp': encoded(ALPHA, 'WEBP', lossless=True, exact=True),
  'animated.webp': encoded(RGB, 'WEBP', lossless=True, save_all=True, append_images=[OTHER]),
  'tiff.jpg': encoded(RGB, 'TIFF'),
}
TURNED = {
  f'turned {o}{name}.jpg': encoded(picture(41, 67), 'JPEG', quality=90, exif=exif(o, order))
  for o in range(10)  # 0 and 9 are invalid
  for order, name in (('<', ' little'), ('>', ' big'))
}


def tolerance(contents):
  """Levels by which two decoders may differ: JPEG does not define rounding and chroma upsampling."""
  if contents == FORMATS['16 bits, colour.png']:
    return 1  # Pillow drops the lower 8 bits
  return 6 if contents[:2] == b'\xff\xd8' else 0


# Pixels.


@pytest.mark.parametrize('files', [FORMATS, TURNED], ids=['formats', 'turned'])
def test_decoded_images_equal_pillow(tmp_path, files):
  """Breaks if a format, orientation, palette, alpha channel or 16-bit image is decoded wrongly."""
  c = settings(fill(tmp_path, files), on_device='no', scaled_decoding=False)
  source = data.load(c, 'train')
  assert isinstance(source, folder.Files) and sorted(files, key=os.fsencode) == source.paths
  images = decode.sized(source.iterate_once(), source.settings).map(
    lambda e: (e['index'], e['shape'], decode.whole(e, c)[0])
  )
  for index, shape, image in images.as_numpy_iterator():
    name = source.paths[index]
    expected = shown(files[name])
    assert image.shape == expected.shape == (*shape, 3), name
    assert np.abs(image - expected).max() <= tolerance(files[name]), name
  pictures, _ = preprocess(source, 'center_crop(1)', 16)
  for i in (0, 9, len(source) - 1):
    theirs = shown(files[source.paths[i]])
    box = crop.tensorflow_center(*theirs.shape[:2], 1.0)
    ours = np.clip(resize(np.float32(theirs), box, 16, 'bicubic'), 0, 255) / 255
    np.testing.assert_allclose(
      pictures[i], ours, atol=(tolerance(files[source.paths[i]]) + 1) / 255
    )


@pytest.mark.parametrize('bits', [8, 4, 1])
def test_a_bmp_with_a_palette(tmp_path, bits):
  """Breaks if the indices of a palette are used as gray levels."""
  contents = encoded(RGB.quantize(200) if bits == 8 else GRAY.convert('1'), 'BMP')
  if bits == 4:  # Pillow does not write 4 bits: two pixels per byte, rows of 36 bytes
    rng = np.random.default_rng(0)
    contents = bmp(67, 45, 4, rng.bytes(45 * 36), palette=rng.bytes(16 * 4))
  expected = shown(contents)
  source = data.load(settings(fill(tmp_path, {'0.bmp': contents}), on_device='no'), 'train')
  views, _ = preprocess(source, 'resize', 45)
  theirs = resize(np.float32(expected), crop.whole(45, 67), 45, 'triangle')
  np.testing.assert_allclose(255 * views[0], theirs, atol=1)


@pytest.mark.parametrize('width, height', [(80, 60), (30, 20), (2000, 2000)])
def test_a_gif_whose_frame_has_another_size(tmp_path, width, height):
  """Breaks if a view has NaN or another scale where header and frame disagree."""
  gif = FORMATS['still.gif']
  gif = gif[:6] + struct.pack('<HH', width, height) + gif[10:]
  fill(tmp_path, {'0.gif': gif})
  expected = shown(gif)  # at least as large as the frame, 67 x 45
  assert expected.shape == (max(height, 45), max(width, 67), 3)
  views, _ = preprocess(data.load(settings(tmp_path, on_device='no'), 'train'), 'resize', 45)
  theirs = resize(np.float32(expected), crop.whole(*expected.shape[:2]), 45, 'triangle')
  np.testing.assert_allclose(255 * views[0], theirs, atol=1)


def canvases(contents, epochs=1, pipelines=PIPELINES, seed=0, **values):
  """The elements of `decode.canvases` for all images and epochs, and the crops of `augment.places`."""
  n = len(contents)
  epoch, position = np.divmod(np.arange(n * epochs, dtype=np.int32), n)
  elements = {'bytes': contents * epochs, 'epoch': epoch, 'position': position}
  dataset = decode.canvases(
    tf.data.Dataset.from_tensor_slices(elements), pipelines, SIZE, seed, settings('', **values)
  )
  height, width = np.array([shown(x).shape[:2] for x in contents * epochs], np.int32).T
  places = augment.places(height, width, epoch, position, pipelines=pipelines, seed=seed, size=SIZE)
  return list(dataset.as_numpy_iterator()), np.asarray(places)


def cut(image, box):
  top, left, height, width = np.round(box).astype(int)
  assert (
    top >= 0 and left >= 0 and top + height <= image.shape[0] and left + width <= image.shape[1]
  )
  return image[top : top + height, left : left + width].astype(int)


def all_kinds(height, width, seed):
  """An image of this size in every format and orientation that is cropped by other code."""
  image = picture(height, width, seed)
  upright = [encoded(image, 'PNG'), encoded(image, 'WEBP', quality=80), encoded(image, 'BMP')]
  turned = [
    encoded(image, 'JPEG', quality=90, exif=exif(o, '<>'[o % 2]), progressive=o % 3 == 0)
    for o in range(1, 9)
  ]
  return upright + turned


SHAPES = [(45, 67), (67, 45), (30, 20), (200, 150), (150, 200), (63, 64), (65, 64), (1, 1), (7, 13)]


def test_windows_equal_crops_of_the_whole_image():
  """Breaks if a window is shifted by a pixel, rotated or mirrored, in any format or orientation."""
  contents = sum((all_kinds(*shape, i) for i, shape in enumerate(SHAPES)), [])
  elements, places = canvases(contents, 4, scaled_decoding=False)
  assert len(elements) == 4 * len(contents)
  on_host = 0
  for i, (e, place) in enumerate(zip(elements, places)):
    whole, lossy = shown(contents[i % len(contents)]), tolerance(contents[i % len(contents)])
    assert e['images'].shape == (64, 64, 3) and e['images'].dtype == np.uint8
    if (e['crops'][:, 0] == [[0, 0, SIZE, SIZE], [0, SIZE, SIZE, SIZE]]).all():
      on_host += 1
      continue
    np.testing.assert_array_equal(e['crops'][..., 2:], place[..., 2:])
    for ours, theirs in zip(e['crops'][:, 1], place[:, 1]):
      off = np.abs(cut(e['images'], ours) - cut(whole, theirs))
      # At the border of a window, chroma upsampling lacks the neighbouring pixels.
      inside = off[1:-1, 1:-1] if min(off.shape[:2]) > 2 else off[:0]
      assert inside.max(initial=0) <= lossy and off.max() <= 4 * lossy, (i, off.max())
  assert 0.1 < on_host / len(elements) < 0.5  # windows that are larger than the canvas


@pytest.mark.parametrize('resize_on', ['device', 'host'])
def test_views_resized_on_the_host_equal_those_of_the_device(resize_on):
  """Breaks if the host rounds, clips or weights pixels differently, or an image does not fit."""
  shapes = [(200, 150), (33, 29)]
  contents = [encoded(picture(*shape, i), 'PNG') for i, shape in enumerate(shapes)]
  pipelines = ('simclr_crop(0.4, 1)', 'torch_crop(0.4, 1)')
  elements, places = canvases(contents, 4, pipelines, resize_on=resize_on)
  resized = 0
  for i, (e, place) in enumerate(zip(elements, places)):
    whole = np.float32(shown(contents[i % 2]))
    for v, kernel in enumerate(('bicubic', 'triangle')):
      if (e['crops'][v] != [0, v * SIZE, SIZE, SIZE]).any():
        assert resize_on == 'device' and (place[:, 1, 2:] <= 64).all()
        continue
      expected = np.clip(resize(whole, place[v], SIZE, kernel), 0, 255)
      off = cut(e['images'], e['crops'][v, 0]) - expected
      assert np.abs(off).max() < 0.53, i  # rounded to 8 bits
      resized += 1
  assert resized == 16 if resize_on == 'host' else 4 <= resized < 12


@pytest.mark.parametrize('orientation', [1, 6, 7])
def test_scaled_decoding_equals_pillow(orientation):
  """Breaks if a JPEG decoded at 1/2, 1/4 or 1/8 has another crop, or is smaller than the view."""
  shapes = [(400, 601), (230, 250), (130, 90), (1203, 811), (50, 50)]
  contents = [
    encoded(picture(*shape, i), 'JPEG', quality=90, exif=exif(orientation))
    for i, shape in enumerate(shapes)
  ]
  elements, places = canvases(contents, 4)
  unscaled, _ = canvases(contents, 4, scaled_decoding=False)
  ratios = []
  for i, (e, f, place) in enumerate(zip(elements, unscaled, places)):
    smallest = place[:, 0, 2:].min()
    ratio = next((r for r in (8, 4, 2) if smallest >= r * SIZE), 1)
    for v, kernel in enumerate(('bicubic', 'triangle')):
      if i % len(shapes) == 2:  # few shapes, few compilations
        views = (
          np.asarray(resize(np.float32(x['images']), x['crops'][v], SIZE, kernel)) for x in (e, f)
        )
        off = np.abs(np.subtract(*views))
        assert off.max() < 12 and off.mean() < 2
    if (e['crops'][:, 0] == [[0, 0, SIZE, SIZE], [0, SIZE, SIZE, SIZE]]).all():
      continue
    ratios.append(ratio)
    np.testing.assert_allclose(e['crops'][..., 2:], place[..., 2:] / ratio)
    image = Image.open(io.BytesIO(contents[i % len(shapes)]))
    if ratio > 1:  # Pillow can scale in the decoder, too
      image.draft('RGB', (image.width // ratio, image.height // ratio))
    reduced = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    low = np.floor((place[:, 1, :2] / ratio).min(0))
    for ours, theirs in zip(e['crops'][:, 1], place[:, 1] / ratio):
      np.testing.assert_allclose(ours[:2] + low, theirs[:2], atol=1e-4)
      inner = np.concatenate([np.ceil(ours[:2]) + 1, np.floor(ours[2:]) - 3])
      off = np.abs(cut(e['images'], inner) - cut(reduced, inner + [*low, 0, 0]))
      assert off.max() <= 6, (i, ratio)
  assert set(ratios) >= {1, 2, 4}


def test_extreme_shapes(tmp_path):
  """Breaks if a view of a single pixel or a strip is missing, has NaN or has a wrong size."""
  shapes = [(1, 1), (1, 2), (2, 1), (10, 20000), (20000, 10), (3, 500)]
  for i, shape in enumerate(shapes):
    for kind in ('png', 'jpg', 'webp'):
      if kind != 'webp' or max(shape) < 16384:
        picture(*shape, i).save(tmp_path / f'{i}.{kind}')
  source = data.load(settings(tmp_path), 'train')
  assert len(source) == 16
  for pipeline in ('simclr_eval', 'moco_eval'):
    views, _ = preprocess(source, pipeline, SIZE)
    assert np.isfinite(views).all() and views.min() >= 0 and views.max() <= 1
  for i, name in enumerate(source.paths):
    whole = shown((tmp_path / name).read_bytes()) / 255
    if whole.size == 3:
      np.testing.assert_allclose(views[i], np.broadcast_to(whole, (SIZE, SIZE, 3)), atol=0.01)
    assert whole.min() - 0.1 < views[i].min() and views[i].max() < whole.max() + 0.1


# Folders.


def names(source):
  return [os.fsencode(source.name(i)) for i in range(len(source))]


def contents_in_order(source):
  return [e['bytes'] for e in source.iterate_once().as_numpy_iterator()]


def test_unusual_file_names(tmp_path):
  """Breaks if a name is quoted, split, decoded or sorted differently in TensorFlow or in messages."""
  odd = [
    'plain.jpg', 'with space.jpg', 'quote\'s".png', '$(touch x); *.jpeg', 'new\nline.png', 'täglich.JPG',
    '写真.Png', '-leading.gif', 'two.dots.jpg', '{}%s\\n.bmp', b'latin\xe9.jpg', b'\xff\xfe/\xe9.png',
    'a/b/c/deep.jpg', ' ./spaces .webp', 'folder.jpg/x.png',
  ]  # fmt: skip
  kinds = {'jpg': 'JPEG', 'jpeg': 'JPEG', 'png': 'PNG', 'gif': 'GIF', 'bmp': 'BMP', 'webp': 'WEBP'}
  files = {
    name: encoded(picture(20 + i, 30, i), kinds[os.fsdecode(name).lower().rsplit('.')[-1]])
    for i, name in enumerate(odd)
  }
  fill(tmp_path, {**files, 'notes.txt': b'x', '.hidden.jpg': b'x', '.git/x.jpg': b'x'})
  source = data.load(settings(tmp_path), 'train')
  by_name = {os.path.join(os.fsencode(tmp_path), os.fsencode(k)): v for k, v in files.items()}
  assert names(source) == sorted(by_name) and not source.labelled
  assert contents_in_order(source) == [by_name[k] for k in sorted(by_name)]
  again = data.load(settings(str(tmp_path) + '/'), 'train')
  assert again.paths == source.paths
  assert len(preprocess(source, 'resize', 8)[0]) == len(odd)


@pytest.mark.parametrize('name', [b'caf\xe9', 'café', 'a b', "it's", 'x\ny'])
def test_unusual_class_names(tmp_path, name):
  """Breaks if a class whose name has arbitrary bytes is not found, or changes its label."""
  for split, classes in (('train', (name, 'zebra')), ('test', ('aardvark', 'zebra'))):
    for c in classes:
      path = os.path.join(os.fsencode(split), os.fsencode(c), b'0.png')
      fill(tmp_path, {path: encoded(picture(20, 20 + len(c), 0), 'PNG')})
  train = data.load(settings(tmp_path, train_split='train', test_split='test'), 'train')
  test = data.load(settings(tmp_path, train_split='train', test_split='test'), 'test')
  expected = sorted(['aardvark', os.fsdecode(name), 'zebra'])
  assert train.class_names == test.class_names == expected and train.classes == 3
  assert [train.class_names[i] for i in train.labels] == sorted([os.fsdecode(name), 'zebra'])
  assert [test.class_names[i] for i in test.labels] == ['aardvark', 'zebra']


def test_labels(tmp_path):
  """Breaks if labels come from a deeper folder, are made up, or differ between the splits."""
  x = [encoded(picture(20 + i, 20, i), 'PNG') for i in range(6)]
  fill(tmp_path / 'a', {'cat/0.png': x[0], 'cat/young/1.png': x[1], 'dog/2.png': x[2]})
  (tmp_path / 'a' / 'empty').mkdir()
  (tmp_path / 'a' / '.thumbs').mkdir()
  source = data.load(settings(tmp_path / 'a'), 'train')
  assert source.class_names == ['cat', 'dog'] and list(source.labels) == [0, 0, 1]
  assert [e['label'] for e in source.iterate_once().as_numpy_iterator()] == [0, 0, 1]
  # With an image outside the folders, or a single folder, the folders are not classes.
  fill(tmp_path / 'b', {'cat/0.png': x[0], 'dog/1.png': x[1], '2.png': x[2]})
  fill(tmp_path / 'c', {'all/0.png': x[0], 'all/1.png': x[1]})
  for name in 'bc':
    source = data.load(settings(tmp_path / name), 'train')
    assert not source.labelled and source.classes == 0 and (source.labels == -1).all()
  # Train has cat and dog, test dog and emu.
  fill(tmp_path / 'd' / 'train', {'cat/0.png': x[0], 'dog/1.png': x[1]})
  fill(tmp_path / 'd' / 'test', {'dog/2.png': x[2], 'emu/3.png': x[3], 'emu/4.png': x[4]})
  c = settings(tmp_path / 'd', train_split='train', test_split='test')
  train, test = data.load(c, 'train'), data.load(c, 'test')
  assert train.class_names == test.class_names == ['cat', 'dog', 'emu'] and test.classes == 3
  assert list(train.labels) == [0, 1] and list(test.labels) == [1, 2, 2]


def test_symbolic_links(tmp_path):
  """Breaks if a cycle of links is followed forever, or the target of a link is missed or read twice."""
  x = [encoded(picture(20 + i, 20, i), 'PNG') for i in range(4)]
  outside = fill(tmp_path / 'outside', {'2.png': x[2], 'sub/3.png': x[3]})
  root = fill(tmp_path / 'root', {'a/0.png': x[0], 'b/1.png': x[1]})
  (root / 'a' / 'up').symlink_to(root)
  (root / 'a' / 'self').symlink_to(root / 'a')
  (root / 'b' / 'again').symlink_to(root / 'a')
  (root / 'c').symlink_to(outside)
  (root / 'd.png').symlink_to(root / 'a' / '0.png')
  source = data.load(settings(root), 'train')
  assert source.paths == ['a/0.png', 'b/1.png', 'c/2.png', 'c/sub/3.png', 'd.png']
  assert contents_in_order(source) == [*x, x[0]]
  assert scan.scan(source).duplicates() == 1


def test_a_folder_is_listed_again_when_it_changes(tmp_path):
  """Breaks if a large folder is listed many times, or a file that came or went is missed."""
  fill(tmp_path, {'a/0.png': b'x', 'b/1.png': b'x'})
  for age, name in enumerate(('a', 'b', '.')):
    os.utime(tmp_path / name, (age, age))
  first = folder.list_images(str(tmp_path))
  assert folder.list_images(str(tmp_path)) is first
  fill(tmp_path, {'b/2.png': b'x'})
  assert folder.list_images(str(tmp_path)).paths == ['a/0.png', 'b/1.png', 'b/2.png']
  (tmp_path / 'a' / '0.png').unlink()  # within the same second
  assert folder.list_images(str(tmp_path)).paths == ['b/1.png', 'b/2.png']


def test_sizes_and_times_of_files(tmp_path):
  """Breaks if those of a subset are those of other files, or a file that changed is not named."""
  fill(tmp_path, {f'{i}.png': bytes(i) for i in range(6)})
  for i in range(6):
    os.utime(tmp_path / f'{i}.png', (100 + i, 100 + i))
  source = folder.Files(
    str(tmp_path), folder.list_images(str(tmp_path)).paths, np.zeros(6, np.int32), [], settings('')
  )
  part = source.subset(np.array([1, 4])).with_labels(np.zeros(2, np.int32))
  fresh = folder.Files(str(tmp_path), ['1.png', '4.png'], part.labels, [], settings(''))
  for files in (part, fresh):
    assert files.sizes.tolist() == [1, 4] and files.modified()[1] == 104
    assert files.newer_than(103) == ['4.png'] and files.modified() == part.modified()
  os.utime(tmp_path / '1.png', (50, 50))  # as a copy that keeps the time
  again = folder.Files(str(tmp_path), ['1.png', '4.png'], part.labels, [], settings(''))
  assert again.modified() != part.modified()


def test_missing_and_empty_folders(tmp_path):
  """Breaks if an empty, missing or wrong folder causes a traceback, or the message lacks what it contains."""
  text = sentence(lambda: data.load(settings(tmp_path / 'none'), 'train'))
  assert text.startswith(f'{tmp_path}/none does not exist')
  fill(tmp_path, {'file.jpg': b'x'})
  text = sentence(lambda: data.load(settings(tmp_path / 'file.jpg'), 'train'))
  assert text.startswith(f'{tmp_path}/file.jpg is not a folder')
  text = sentence(lambda: data.load(settings(tmp_path, train_split='train'), 'train'))
  assert text.startswith(f'{tmp_path}/train does not exist')
  fill(tmp_path / 'texts', {'a.txt': b'', 'b/c.txt': b'', 'README': b'', '.x.jpg': b''})
  text = sentence(lambda: data.load(settings(tmp_path / 'texts'), 'train'))
  assert text.startswith(f'{tmp_path}/texts has no images')
  assert 'only other files: 2 .txt, 1 without suffix' in text
  (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
  assert f'{tmp_path}/loop' in sentence(lambda: data.load(settings(tmp_path / 'loop'), 'train'))
  assert 'data.dir is empty' in sentence(lambda: data.load(settings(''), 'train'))


def test_a_folder_without_permission(tmp_path):
  """Breaks if a part of the images is silently missing from the run."""
  if os.geteuid() == 0:
    pytest.skip('root may read everything: run the tests as another user')
  fill(tmp_path, {'a.png': encoded(RGB, 'PNG'), 'closed/b.png': encoded(OTHER, 'PNG')})
  (tmp_path / 'closed').chmod(0)
  try:
    text = sentence(lambda: data.load(settings(tmp_path), 'train'))
  finally:
    (tmp_path / 'closed').chmod(0o755)
  assert text.startswith(f'{tmp_path}/closed cannot be listed')


# Images of one size.


@pytest.mark.parametrize('count', [7, 70])
def test_small_images_of_one_size_are_read_into_memory(tmp_path, count):
  """Breaks if the pixels, labels or their order differ from those of the files."""
  files = {}
  for i in range(count):
    image, kind = picture(20, 24, i), ('PNG', 'JPEG', 'BMP')[i % 3]
    if i == 4:  # EXIF-rotated
      image = picture(24, 20, i)
    options = {'exif': exif(6)} if i == 4 else {'quality': 90} if kind == 'JPEG' else {}
    files[f'{"cat" if i % 2 else "dog"}/{i:03d}.{kind.lower()}'] = encoded(image, kind, **options)
  source = data.load(settings(fill(tmp_path, files)), 'train')
  assert isinstance(source, data.Arrays) and source.images.shape == (count, 20, 24, 3)
  assert source.labelled and source.resident and source.class_names == ['cat', 'dog']
  for i, name in enumerate(sorted(files)):
    assert np.abs(source.images[i] - shown(files[name])).max() <= tolerance(files[name]), name
    assert source.labels[i] == name.startswith('dog')
  for values in (dict(on_device='no'), dict(max_pixels=10**6, on_device='no')):
    assert isinstance(data.load(settings(tmp_path, **values), 'train'), folder.Files)
  fill(tmp_path, {f'dog/{count // 2:03d}.png': encoded(picture(21, 24), 'PNG')})
  assert isinstance(data.load(settings(tmp_path), 'train'), folder.Files)


# Corrupt files.


def png_header(side):
  header = struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)


def jpeg_of(side):
  """A small JPEG whose header says that it is large."""
  at = FORMATS['baseline.jpg'].index(b'\xff\xc0') + 5
  return (
    FORMATS['baseline.jpg'][:at]
    + struct.pack('>HH', side, side)
    + FORMATS['baseline.jpg'][at + 4 :]
  )


BOMB = (
  png_header(12000)
  + chunk(b'IDAT', zlib.compress(bytes(12000 * (1 + 12000 // 8)), 9))
  + chunk(b'IEND', b'')
)
LARGE = {
  'zeros.png': (BOMB, '12,000 x 12,000'),
  'header alone.png': (png_header(60000), '60,000 x 60,000'),
  'liar.jpg': (jpeg_of(65500), '65,500 x 65,500'),
  'header alone.gif': (b'GIF89a' + struct.pack('<HHBBB', 65000, 65000, 0, 0, 0), '65,000 x 65,000'),
  'header alone.bmp': (
    struct.pack('<2sIHHIIiiHHI', b'BM', 54, 0, 0, 54, 40, 30000, -30000, 1, 24, 0), '30,000 x 30,000'
  ),
  'header alone.webp': (
    b'RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0' + b'\xff\xff\0' * 2 + bytes(16), '65,536 x 65,536'
  ),
}  # fmt: skip
PICTURES = [encoded(picture(24 + i % 5, 40, i), ('PNG', 'JPEG')[i % 2]) for i in range(40)]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
BROKEN = {
  'empty.jpg': (b'', 'is empty'),
  'cut.jpg': (encoded(NOISE, 'JPEG')[:-600], 'is a broken JPEG'),
  'cut.png': (encoded(NOISE, 'PNG')[:-600], 'is a broken PNG'),
  'cut.webp': (encoded(NOISE, 'WEBP')[:-600], 'is a broken WebP'),
  'cut.gif': (encoded(NOISE, 'GIF')[:-600], 'is a broken GIF'),
  'cut.bmp': (encoded(NOISE, 'BMP')[:-600], 'is a broken BMP'),
  'start.jpg': (encoded(NOISE, 'JPEG')[:100], 'is a broken JPEG'),
  'start.png': (encoded(NOISE, 'PNG')[:20], 'is a broken PNG'),
  'three bytes.jpg': (b'\xff\xd8\xff', 'is a broken JPEG'),
  'page.jpg': (b'<!DOCTYPE html>\n<html>404</html>', 'is not an image of a known format (JPEG, PNG, GIF, BMP, WebP, TIFF, PNM, JPEG 2000, AVIF, HEIC), but a page'),
  'text.jpg': (b'hello\n' * 50, 'is not an image of a known format'),
  'zeros.png': (png_header(0), 'is a broken PNG'),
}  # fmt: skip


def read_epoch(source):
  """Reads an epoch of the images, as a training does."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  batches = loader.for_training(source, 0, 8, PIPELINES, SIZE, mesh)
  try:
    for step in range(-(-len(source) // 8)):
      batches(step)
  finally:
    batches.close()


def test_too_large_images_are_refused_by_their_headers(tmp_path):
  """Breaks if an image is decoded before its size is known: it may not fit into memory."""
  fill(tmp_path, {name: contents for name, (contents, _) in LARGE.items()})
  source = data.load(settings(tmp_path), 'train')
  for i, name in enumerate(source.paths):
    expected = (
      f'{tmp_path}/{name} has {LARGE[name][1]} pixels, more than data.max_pixels=100,000,000'
    )
    assert source.find_problem([i]) == expected
  assert list(scan.scan(source).bad) == list(range(len(LARGE)))
  text = sentence(lambda: read_epoch(source))
  assert 'pixels, more than data.max_pixels=100,000,000' in text
  c = settings(fill(tmp_path / 'one', {'a.png': encoded(RGB, 'PNG')}), max_pixels=45 * 67 - 1)
  text = sentence(lambda: data.load(c, 'train'))
  assert text.startswith(
    f'{tmp_path}/one/a.png has 67 x 45 pixels, more than data.max_pixels=3,014'
  )


def test_every_corrupt_file_is_named(tmp_path):
  """Breaks if a corrupt file is read as an image, or the message lacks the reason."""
  fill(tmp_path, {name: contents for name, (contents, _) in BROKEN.items()})
  (tmp_path / 'broken link.png').symlink_to(tmp_path / 'nowhere')
  source = data.load(settings(tmp_path), 'train')
  for i, name in enumerate(source.paths):
    problem = source.find_problem([i])
    expected = BROKEN[name][1] if name in BROKEN else 'cannot be read: '
    assert problem.startswith(f'{tmp_path}/{name} {expected}'), problem
    assert '\n' not in problem and '{{' not in problem and len(problem) < 400
  assert list(scan.scan(source).bad) == list(range(len(source)))
  with pytest.raises(ConfigError, match='none|no image|cannot be decoded'):
    assert len(data.load(settings(tmp_path, skip_bad=100), 'train'))


@pytest.mark.parametrize('name', ['cut.png', 'empty.jpg', 'start.jpg', 'link.png'])
def test_training_stops_at_a_corrupt_file(tmp_path, name):
  """Breaks if a corrupt image is skipped by default, or the message names another image."""
  fill(tmp_path, {f'{i:02d}.jpg': x for i, x in enumerate(PICTURES[:20])})
  if name == 'link.png':
    (tmp_path / name).symlink_to(tmp_path / 'nowhere')
  else:
    fill(tmp_path, {name: BROKEN[name][0]})
  source = data.load(settings(tmp_path), 'train')
  text = sentence(lambda: read_epoch(source))
  assert text.startswith(f'{tmp_path}/{name} ') and '--config.data.skip_bad=N' in text
  if name == 'cut.png':
    text = sentence(lambda: preprocess(source, 'resize', 8))
    assert text.startswith(f'{tmp_path}/{name} is a broken PNG')


@pytest.mark.parametrize('name', ['cut.png', 'start.jpg', 'page.jpg', 'link.png'])
def test_one_corrupt_file_among_many_of_one_size(tmp_path, name):
  """Breaks if reading into memory loses a file, or the message does not name the file."""
  fill(tmp_path, {f'{i:02d}.png': encoded(picture(24, 24, i), 'PNG') for i in range(80)})
  # Only the headers of 32 files are read to see whether all images have one size.
  sampled = set(np.linspace(0, 79, folder.SAMPLE).astype(int))
  path = tmp_path / f'{next(i for i in range(40, 80) if i not in sampled):02d}.png'
  path.unlink()
  if name == 'link.png':
    path.symlink_to(tmp_path / 'nowhere')
  else:
    path.write_bytes(BROKEN[name][0])

  def load():
    source = data.load(settings(tmp_path), 'train')
    read_epoch(source)  # if the images were not read into memory

  assert sentence(load).startswith(f'{path} ')
  assert len(data.load(settings(tmp_path, skip_bad=1), 'train')) == 79


def test_skip_bad(tmp_path, caplog):
  """Breaks if skipped images are not named, or skipping them shifts labels or indices."""
  files = {f'{"ab"[i % 2]}/{i:02d}.jpg': x for i, x in enumerate(PICTURES[:12])}
  bad = {
    'a/03 cut.jpg': BROKEN['cut.jpg'][0],
    'b/empty.jpg': b'',
    'b/start.jpg': BROKEN['start.jpg'][0],
  }
  fill(tmp_path, {**files, **bad})
  text = sentence(lambda: data.load(settings(tmp_path, skip_bad=2), 'train'))
  assert text.startswith('3 of 15 images cannot be decoded, ') and 'data.skip_bad=2' in text
  assert f'; the first: {tmp_path}/a/03 cut.jpg is a broken JPEG' in text
  with caplog.at_level(logging.WARNING):
    source = data.load(settings(tmp_path, skip_bad=3), 'train')
  for name in bad:
    assert sum(f'skipped: {tmp_path}/{name} is ' in m for m in caplog.messages) == 1, (
      caplog.messages
    )
  assert '3 of 15 images are skipped' in caplog.messages
  assert len(source) == 12 and source.paths == sorted(files)
  assert list(source.labels) == [p.startswith('b') for p in source.paths]
  for e in source.iterate_once().as_numpy_iterator():
    assert e['bytes'] == files[source.paths[e['index']]]
    assert e['label'] == source.labels[e['index']]
  again = data.load(settings(tmp_path, skip_bad=100), 'train')
  assert again.paths == source.paths
  read_epoch(source)


def test_scan(tmp_path):
  """Breaks if sizes, formats, EXIF-rotated images, duplicates or corrupt files are counted wrongly."""
  files = {**FORMATS, **TURNED, 'copy.jpg': FORMATS['cmyk.jpg'], 'copy 2.jpg': FORMATS['cmyk.jpg']}
  fill(tmp_path, {**files, 'bad.jpg': b'x', 'wrong suffix.jpg': encoded(picture(9, 8), 'PNG')})
  source = data.load(settings(tmp_path), 'train')
  result = scan.scan(source)
  assert [source.paths[i] for i in result.bad] == ['bad.jpg']
  assert sorted([*result.index, *result.bad]) == list(range(len(source)))
  for i, shape in zip(result.index, result.shape):
    contents = pathlib.Path(source.name(i)).read_bytes()
    assert tuple(shape) == shown(contents).shape[:2]
  turned = {source.paths[i] for i in result.index[result.rotated]}
  assert turned == {name for name in TURNED if name[7] in '2345678'}
  contents = [pathlib.Path(source.name(i)).read_bytes() for i in result.index]
  assert result.duplicates() == len(contents) - len(set(contents)) == 2
  kinds = [Image.open(io.BytesIO(x)).format.replace('MPO', 'JPEG') for x in contents]
  expected = {k: kinds.count(k.upper()) for k in ('JPEG', 'PNG', 'GIF', 'BMP', 'WebP', 'TIFF')}
  assert result.kinds() == expected


def test_no_value_is_ever_nan(tmp_path):
  """Breaks if any image that can be decoded gives a view with NaN or values outside [0, 1]."""
  files = {**FORMATS, **TURNED}
  fill(tmp_path, {**files, **{name: contents for name, (contents, _) in BROKEN.items()}})
  for i, shape in enumerate([(1, 1), (2, 900), (900, 2), (301, 299)]):
    picture(*shape, i).save(tmp_path / f'shape {i}.jpg')
  source = data.load(settings(tmp_path, skip_bad=len(BROKEN)), 'train')
  assert len(source) == len(files) + 4
  pipelines = ('simclr_v2', 'moco_v2')
  mesh = sharding.make_mesh(jax.devices()[:1])
  batches = loader.for_training(source, 0, len(source), pipelines, SIZE, mesh)
  draw = jax.jit(
    lambda b: augment.views(b['images'], b['epoch'], b['position'], pipelines, 0, SIZE, b['crops'])
  )
  views = np.asarray(draw(batches(0)))
  batches.close()
  assert views.shape == (len(source), 2, SIZE, SIZE, 3)
  assert np.isfinite(views).all() and views.min() >= 0 and views.max() <= 1
  assert (views.std((1, 2, 3, 4)) > 0).all()
  pictures, _ = preprocess(source, 'simclr_eval', SIZE)
  assert np.isfinite(pictures).all() and pictures.min() >= 0 and pictures.max() <= 1


# The command line.


def command(images, workdir, **changes):
  values = {
    **TINY, 'batch_size': '16', 'steps': '6', 'checkpoint_every_steps': '2', 'keep_checkpoints': '3',
    'data.source': 'folder', 'data.dir': images, 'data.train_split': '.', 'data.test_split': '',
    'data.num_classes': '0', 'image_size': '24', 'augment.view1': 'simclr_crop(0.2, 1)', **changes,
  }  # fmt: skip
  fields = [f'--config.{k}={v}' for k, v in values.items()]
  return ['pretrain', '--config=simclr_digits', f'--workdir={workdir}', *fields]


def checksums(workdir, step):
  """CRC-32 of every array in a checkpoint."""
  path = workdir / 'checkpoints' / str(step) / '_CHECKPOINT_METADATA'
  return json.loads(path.read_text())['custom_metadata']['crc32']


def test_a_run_on_a_folder_with_one_corrupt_file(tmp_path, capfd):
  """Breaks if the run ends with a traceback, or a resumed run reads other images or pixels."""
  images = fill(tmp_path / 'images', {f'{i:02d}.jpg': x for i, x in enumerate(PICTURES)})
  fill(images, {'30 bad.jpg': BROKEN['cut.jpg'][0]})
  assert cli.main(command(images, tmp_path / 'stopped')) == 2
  errors = [
    s for s in capfd.readouterr().err.splitlines() if not s.startswith(('I0', 'W0', 'WARNING:'))
  ]
  assert errors[-1].startswith(f'simclr-jax: error: {images}/30 bad.jpg is a broken JPEG'), errors
  assert 'Traceback' not in '\n'.join(errors)
  assert sum('error' in s for s in errors) == 1

  run = tmp_path / 'run'
  assert cli.main(command(images, run, **{'data.skip_bad': '1'})) == 0
  assert '40 training images' in capfd.readouterr().out
  assert [r['step'] for r in records(run)] == list(range(1, 7))
  assert len({r['batch_hash'] for r in records(run)}) == 6

  # The same run, as if it had been killed at step 3.
  resumed = tmp_path / 'resumed'
  shutil.copytree(run, resumed)
  for step in (4, 6):
    shutil.rmtree(resumed / 'checkpoints' / str(step))
  assert cli.main(command(images, resumed, **{'data.skip_bad': '1'})) == 0
  assert 'from step 2 of 6' in capfd.readouterr().out
  assert records(resumed) == records(run)
  assert checksums(resumed, 6) == checksums(run, 6) and len(checksums(run, 6)) > 60


# Files that do harm.


def gif_with_a_larger_frame(side):
  """A GIF with a screen of 10 x 10 pixels and a frame of `side` x `side`."""
  frame = struct.pack('<BHHHHB', 0x2C, 0, 0, side, side, 0)
  head = b'GIF89a' + struct.pack('<HHBBB', 10, 10, 0x80, 0, 0) + b'\0\0\0\xff\xff\xff'
  return head + frame + b'\x02\x02\x44\x01\x00\x3b'


def test_what_is_decoded_is_what_was_measured(tmp_path):
  """Breaks if an image of another size than its header says is padded, cropped, or fills the memory."""
  scan_start = FORMATS['progressive.jpg'].rindex(b'\xff\xda')
  scans = FORMATS['progressive.jpg'][:scan_start] + FORMATS['progressive.jpg'][scan_start:-2] * 200
  files = {
    'canvas.webp': (webp_on_a_larger_canvas(), 'is a broken WebP'),
    'first.png': (png_with_two_headers(), 'is a broken PNG'),
    'frame.gif': (gif_with_a_larger_frame(16000), '16,000 x 16,000 pixels, more than data.max_pixels'),
    'scans.jpg': (scans, 'scans, more than 100'),
  }  # fmt: skip
  fill(tmp_path, {name: contents for name, (contents, _) in files.items()})
  fill(tmp_path, {'good.png': encoded(RGB, 'PNG')})
  source = data.load(settings(tmp_path), 'train')
  bad = scan.scan(source).bad
  assert [source.paths[i] for i in bad] == list(files)
  for i, problem in bad.items():
    assert files[source.paths[i]][1] in problem
  for name in files:
    one = dataclasses.replace(source, paths=[name] * 8, labels=np.full(8, -1, np.int32))
    assert files[name][1] in sentence(lambda one=one: read_epoch(one))


def webp_on_a_larger_canvas():
  """A WebP whose header says 3,000 x 3,000 and whose frame has 67 x 45 pixels."""
  frame = encoded(RGB, 'WEBP', quality=80)[12:]
  canvas = b'VP8X' + struct.pack('<IBBBB', 10, 0, 0, 0, 0) + (2999).to_bytes(3, 'little') * 2
  return b'RIFF' + struct.pack('<I', 4 + len(canvas) + len(frame)) + b'WEBP' + canvas + frame


def png_with_two_headers():
  """A PNG that starts with a small size, which is not the one of the image."""
  contents = encoded(RGB, 'PNG')
  return contents[:8] + chunk(b'iHDR', struct.pack('>IIBBBBB', 1, 1, 8, 2, 0, 0, 0)) + contents[8:]


def test_markers_outside_a_jpeg_are_no_scans(tmp_path):
  """Breaks if a photograph with a preview or a film in its file is refused."""
  jpeg = FORMATS['baseline.jpg']
  film = jpeg + b'\xff\xda\0\x0c' * 500
  preview = jpeg[:2] + b'\xff\xe2' + struct.pack('>H', 802) + b'\xff\xda' * 400 + jpeg[2:]
  fill(tmp_path, {'film.jpg': film, 'preview.jpg': preview})
  c = settings(tmp_path, on_device='no')
  source = data.load(c, 'train')
  assert not source.find_problem([0, 1])
  views, _ = preprocess(source, 'resize', 45)
  np.testing.assert_array_equal(views[0], views[1])
  progressive = FORMATS['progressive.jpg']
  assert [headers.scans(x) for x in (jpeg, film, preview, progressive)] == [1, 1, 1, 10]


def test_a_bmp_of_the_first_kind(tmp_path):
  """Breaks if the size of a BMP with a header of 12 bytes is read at the wrong place."""
  rows = np.pad(np.asarray(RGB)[::-1, :, ::-1].reshape(45, -1), ((0, 0), (0, 3))).tobytes()
  contents = struct.pack('<2sIHHIIHHHH', b'BM', 26 + len(rows), 0, 0, 26, 12, 67, 45, 1, 24) + rows
  fill(tmp_path, {'0.bmp': contents, '1.png': encoded(RGB, 'PNG')})
  views, _ = preprocess(data.load(settings(tmp_path, on_device='no'), 'train'), 'resize', 45)
  np.testing.assert_array_equal(views[0], views[1])


def test_only_regular_files_are_read(tmp_path):
  """Breaks if a pipe or a device with the name of an image blocks the program or fills the memory."""
  fill(tmp_path, {f'{i}.png': encoded(picture(20 + i, 20, i), 'PNG') for i in range(3)})
  os.mkfifo(tmp_path / 'pipe.jpg')
  (tmp_path / 'zero.jpg').symlink_to('/dev/zero')
  source = data.load(settings(tmp_path), 'train')
  assert source.paths == ['0.png', '1.png', '2.png']
  assert '2 that are no regular files, such as pipes or devices (pipe.jpg)' in source.remarks[0]


def test_files_that_are_too_long_are_not_read(tmp_path):
  """Breaks if a file of many gigabytes is read into memory."""
  fill(tmp_path, {f'{i}.png': encoded(picture(20 + i, 20, i), 'PNG') for i in range(3)})
  with (tmp_path / 'long.jpg').open('wb') as file:
    file.truncate(2**40)  # without blocks on the disk
  source = data.load(settings(tmp_path), 'train')
  assert list(scan.scan(source).bad.values()) == [
    f'{tmp_path}/long.jpg has 1,099,511,627,776 bytes, more than an image of data.max_pixels pixels can have (1,601,048,576)'
  ]
  with pytest.raises(ConfigError, match='long.jpg has 1,099,511,627,776 bytes'):
    read_epoch(source)


FAULT = """
import os, signal, time
from simclr_jax.data import decode
rgb = decode._rgb
def faulty(contents):
  def look(text):
    if b'crash' in text:
      os.kill(os.getpid(), signal.SIGSEGV)
    if b'sleep' in text:
      time.sleep(600)
    return text
  return rgb(decode.tf.ensure_shape(decode.tf.numpy_function(look, [contents], decode.tf.string), []))
decode._rgb = faulty
"""


@pytest.mark.parametrize(
  'fault, expected',
  [
    ('crash', 'crashes the decoder (SIGSEGV)'),
    pytest.param('sleep', 'cannot be decoded in 20 s', marks=pytest.mark.slow),
  ],
)
def test_a_decoder_that_crashes_costs_one_image(tmp_path, monkeypatch, fault, expected):
  """Breaks if an image that crashes the decoder ends the program, is not named, or takes others with it."""
  pictures = {f'{i:03d}.png': encoded(picture(20 + i % 5, 20, i), 'PNG') for i in range(40)}
  good = pictures['030.png']
  pictures['030.png'] = good[:-12] + chunk(b'faUl', fault.encode()) + good[-12:]
  fill(tmp_path, pictures)
  monkeypatch.setattr(examine, 'START', FAULT + examine.START)
  monkeypatch.setattr(examine, 'SECONDS', 20)
  examine._idle.clear()
  result = scan.scan(data.load(settings(tmp_path), 'train'))
  examine._idle.clear()
  assert result.bad == {30: f'{tmp_path}/030.png {expected}'}
  assert result.index.tolist() == [i for i in range(40) if i != 30]
