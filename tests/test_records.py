"""TFDS data sets written by the tests: order, several hosts, resuming, damaged files, evaluation."""

import functools
import gc
import hashlib
import io
import os
import pathlib
import struct
import sys

import jax
import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from simclr_jax import config, data, encoder as encoders, train
from simclr_jax.data import augment, folder, loader, order
from simclr_jax.data.shards import Shard, Shards
from simclr_jax.errors import ConfigError
from simclr_jax.models import classifier

tf = pytest.importorskip('tensorflow')
tfds = pytest.importorskip('tensorflow_datasets')
from simclr_jax.data import decode, stream  # noqa: E402  (needs TensorFlow)

SHARDS = (5, 3, 8, 1, 6)
CLASSES = 4


@functools.cache
def jpeg(i, height=0, width=0):
  """A smooth JPEG without chroma subsampling: decoding a window gives exactly the pixels of the whole image."""
  rng = np.random.default_rng(i)
  coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
  picture = coarse.resize((width or 40, height or 24 + i % 3), Image.Resampling.BICUBIC)
  file = io.BytesIO()
  picture.save(file, 'JPEG', quality=95, subsampling=0)
  return file.getvalue()


IMAGES = [jpeg(i) for i in range(sum(SHARDS))]
LABELS = [i * (i + 1) // 2 % CLASSES for i in range(len(IMAGES))]


def settings(dir, source='tfds', **values):  # noqa: A002
  c = config.load('simclr_digits', TINY).data
  with c.unlocked():
    c.update({'source': source, 'dir': str(dir), **values})
  return c


def write(
  directory, images=IMAGES, shards=SHARDS, kind='tfrecord', shape=(None, None, 3), labels=LABELS
):
  """Writes a prepared data set; the records are serialized here, not by TFDS."""
  directory.mkdir(parents=True)
  records = []
  for image, label in zip(images, labels):
    feature = {
      'image': tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
      'label': tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    }
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    records.append(example.SerializeToString())
  ends = np.cumsum([0, *shards])
  assert ends[-1] == len(records)
  for i, (start, end) in enumerate(zip(ends, ends[1:])):
    path = str(directory / f'mine-train.{kind}-{i:05d}-of-{len(shards):05d}')
    if kind == 'array_record':
      module = pytest.importorskip('array_record.python.array_record_module')
      writer = module.ArrayRecordWriter(path, 'group_size:1,uncompressed')
    else:
      writer = tf.io.TFRecordWriter(path)
    for record in records[start:end]:
      writer.write(record)
    writer.close()
  tfds.folder_dataset.write_metadata(
    data_dir=directory,
    features=tfds.features.FeaturesDict({
      'image': tfds.features.Image(shape=shape, encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(num_classes=CLASSES),
    }),
    split_infos=[
      tfds.core.SplitInfo(name='train', shard_lengths=list(shards), num_bytes=sum(map(len, records)))
    ],
    filename_template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    check_data=False,
  )  # fmt: skip
  return directory


def write_with_tfds(root, name, features, examples, kind='tfrecord'):
  """Writes a data set with TFDS itself, four examples per file."""
  directory = root / name / '1.2.0'
  directory.mkdir(parents=True)
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=name, version=tfds.core.Version('1.2.0'), data_dir=str(directory), module_name=''
  )
  info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
  writer = tfds.core.SequentialWriter(info, 4, file_format=kind)
  writer.initialize_splits(list(examples))
  writer.add_examples(examples)
  writer.close_all()
  return directory


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """The same images as TFRecord, as ArrayRecord and as image files, each in a sub-folder."""
  root = tmp_path_factory.mktemp('records')
  write(root / 'tfrecord')
  write(root / 'array_record', kind='array_record')
  for i, (image, label) in enumerate(zip(IMAGES, LABELS)):
    path = root / 'files' / 'train' / f'class{label}' / f'{i:02d}.jpg'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
  return root


@pytest.fixture(scope='module')
def load(folders):
  """A function that loads a data set of `folders`."""

  @functools.cache
  def load_kind(kind):
    if kind == 'files':
      return data.load(settings(folders / kind, 'folder'), 'train')
    return data.load(settings(folders / kind), 'train')

  return load_kind


def image_number(source, element):
  """The index of an element in IMAGES, after checking that its index and label agree."""
  i = IMAGES.index(element['bytes'])
  assert element['label'] == LABELS[i]
  if isinstance(source, folder.Files):
    assert pathlib.Path(source.name(element['index'])).stem == f'{i:02d}'
  else:
    assert element['index'] == i
  return i


def take(source, count, batch_size=4, first=0, local=None, seed=0):
  """The `count` elements from step `first` on that a host with the rows `local` of each batch reads."""
  local = np.arange(batch_size) if local is None else local
  examples = source.train_iterator(seed, batch_size, first, local).take(count)
  return list(stream.with_threads(examples, source.settings).as_numpy_iterator())


def positions(elements):
  return [(e['epoch'], e['position'], e['index']) for e in elements]


def hosts(batch_size, count):
  return np.split(np.arange(batch_size), count)


# Contents.


@pytest.mark.parametrize('kind', ['tfrecord', 'array_record'])
def test_data_sets_written_by_tfds(tmp_path, kind):
  """Breaks if names, versions, other features, shards or the order are read differently than by TFDS."""
  if kind == 'array_record':
    pytest.importorskip('array_record')
  pictures = [np.array(Image.open(io.BytesIO(x))) for x in IMAGES[:9]]
  examples = [
    {'id': f'{i}', 'image': x, 'label': LABELS[i], 'box': {'area': i}}
    for i, x in enumerate(pictures)
  ]
  directory = write_with_tfds(
    tmp_path, 'own',
    {
      'id': tfds.features.Text(),
      'image': tfds.features.Image(encoding_format='png'),
      'label': tfds.features.ClassLabel(names=[f'class {i}' for i in range(CLASSES)]),
      'box': {'area': np.int64},
    },
    {'train': examples, 'test': examples[:3]}, kind,
  )  # fmt: skip
  assert len(list(directory.glob('own-train.*'))) == 3
  for name, split, start, end in (
    ('own', 'train', 0, 9), ('own:1.2.0', 'train[2:7]', 2, 7), ('', 'test', 0, 3),
  ):  # fmt: skip
    source = data.load(
      settings(tmp_path if name else directory, name=name, train_split=split), 'train'
    )
    elements = list(source.iterate_once().as_numpy_iterator())
    assert len(source) == len(elements) == end - start
    assert source.labelled and source.classes == CLASSES and source.class_names[1] == 'class 1'
    for i, e in enumerate(elements):
      np.testing.assert_array_equal(Image.open(io.BytesIO(e['bytes'])), pictures[start + i])
      assert e['label'] == LABELS[start + i]
      assert e['index'] == e['position'] == i and e['epoch'] == 0


def test_gray_images_of_one_size_are_read_into_memory(tmp_path):
  """Breaks if a gray data set, such as MNIST, has other channels, another order or made-up labels."""
  pictures = np.random.default_rng(0).integers(0, 256, (11, 12, 10, 1), dtype=np.uint8)
  features = {'image': tfds.features.Image(shape=(12, 10, 1))}
  write_with_tfds(tmp_path, 'gray', features, {'train': [{'image': x} for x in pictures]})
  arrays = data.load(settings(tmp_path, name='gray'), 'train')
  assert isinstance(arrays, data.Arrays) and not arrays.labelled and (arrays.labels == -1).all()
  np.testing.assert_array_equal(arrays.images, np.repeat(pictures, 3, -1))


@pytest.mark.parametrize('kind', ['tfrecord', 'array_record'])
@pytest.mark.parametrize(
  'split, start, end',
  [('train[:50%]', 0, 12), ('train[4:17]', 4, 17), ('train[-3:]', 20, 23), ('train[5:8]', 5, 8)],
)
def test_a_part_of_a_split(folders, kind, split, start, end):
  """Breaks if a slice that starts or ends inside a shard has other images or names."""
  source = data.load(settings(folders / kind, train_split=split), 'train')
  elements = list(source.iterate_once().as_numpy_iterator())
  assert [e['bytes'] for e in elements] == IMAGES[start:end]
  assert [e['index'] for e in elements] == list(range(end - start))
  epoch = take(source, end - start)
  assert sorted(e['bytes'] for e in epoch) == sorted(IMAGES[start:end])
  assert all(e['bytes'] == IMAGES[start + e['index']] for e in epoch)
  for index in (0, end - start - 1):
    name = source.name(index)
    if kind == 'array_record':
      assert name.startswith('record ') and str(folders / kind) in name
      continue
    _, number, _, path = name.split()
    record = list(tf.data.TFRecordDataset(path))[int(number)].numpy()
    assert IMAGES[start + index] in record


def test_subset_and_sample(load):
  """Breaks if the images of a subset or sample have other indices, labels or names."""
  for kind in ('tfrecord', 'array_record', 'files'):
    source = load(kind)
    everything = list(source.iterate_once().as_numpy_iterator())
    keep = np.array([0, 4, 5, 7, 16, 22])
    for part, indices in ((source.subset(keep), keep), (source.sample(100), range(len(source)))):
      elements = list(part.iterate_once().as_numpy_iterator())
      assert [e['bytes'] for e in elements] == [everything[i]['bytes'] for i in indices]
      assert [e['label'] for e in elements] == [everything[i]['label'] for i in indices]
      assert [e['index'] for e in elements] == list(range(len(part)))
      assert [part.name(i) for i in range(len(part))] == [source.name(i) for i in indices]
    few = source.subset(keep).sample(3)
    assert len(few) == 3 and few.labelled and few.classes == CLASSES
    assert {e['bytes'] for e in few.iterate_once().as_numpy_iterator()} < {
      everything[i]['bytes'] for i in keep
    }
    assert sorted(e['index'] for e in take(few, 3, batch_size=1)) == [0, 1, 2]


@pytest.mark.parametrize('kind', ['tfrecord', 'array_record', 'files'])
def test_fingerprints(load, kind):
  """Breaks if data sets with different images or labels have one fingerprint, or equal data sets two."""
  source = load(kind)
  assert source.fingerprint() == load(kind).fingerprint()
  keep = np.arange(6)
  others = [source.subset(keep), source.subset(keep + 1), source.with_labels(source.labels[::-1])]
  assert len({s.fingerprint() for s in (source, *others)}) == 4


def test_shards_equal_lists():
  """Breaks if indices, subsets or parts of records are computed differently than on a list of all records."""
  files = [Shard('a', 2, 5, 9), Shard('b', 0, 1, 1), Shard('c', 3, 4, 7)]
  records = [(f.path, i) for f in files for i in range(f.skip, f.skip + f.take)]

  def located(shards):
    places = [shards.locate(i) for i in range(len(shards))]
    return [(shard.path, number) for shard, number in places]

  def in_spans(spans):
    """(path, number in the file, number of the record) of the records that are read."""
    rows = zip(*spans[:-1])
    return [
      (path.decode(), skip + i, first + i) for path, skip, take, first in rows for i in range(take)
    ]

  shards = Shards(files)
  assert located(shards) == records
  some = shards.subset(np.array([0, 2, 3, 7, 9]))
  expected = [records[i] for i in (0, 2, 3, 7, 9)]
  assert located(some) == expected and some.numbers.tolist() == [0, 2, 3, 7, 9]
  assert some.indices().tolist() == [0, -1, 1, 2, -1, -1, -1, 3, -1, 4]
  assert located(some.subset(np.array([1, 4]))) == [expected[1], expected[4]]
  first = some.first(3)
  assert located(first) == expected[:3] and [f.take for f in first.files] == [4]
  assert located(some.first(4)) == expected[:4] and located(some.first(99)) == expected
  order_of_files = np.array([2, 0, 1])
  shuffled = [(*records[i], i) for i in (6, 7, 8, 9, 0, 1, 2, 3, 4, 5)]
  for parts in (1, 2, 3, 4):
    spans = [some.spans(order_of_files, part, parts) for part in range(parts)]
    assert sum(map(in_spans, spans), []) == shuffled
    assert [s.position for s in spans] == [len(shuffled) * part // parts for part in range(parts)]
    read = [[i for _, _, i in in_spans(s) if i in some.numbers] for s in spans]
    assert [some.count(s) for s in spans] == [len(indices) for indices in read]


# Order: epochs, seeds, resuming, hosts.


@pytest.mark.parametrize('count', [1, 2, 4])
def test_hosts_read_every_record_once_per_epoch(load, count):
  """Breaks if two hosts read one record, a record is skipped, or hosts read different epochs."""
  source, epochs = load('tfrecord'), 4
  of_hosts = [take(source, 24 * epochs // count, local=rows) for rows in hosts(4, count)]
  elements = [(e['epoch'], e['position'], image_number(source, e)) for h in of_hosts for e in h]
  orders = []
  for epoch in range(epochs - 1):
    of_epoch = sorted((p, i) for e, p, i in elements if e == epoch)
    assert [p for p, _ in of_epoch] == list(range(len(IMAGES)))
    assert sorted(i for _, i in of_epoch) == list(range(len(IMAGES)))
    orders.append([i for _, i in of_epoch])
  assert orders[0] != orders[1] != orders[2] != list(range(len(IMAGES)))
  if count > 1:  # a host reads other files in the next epoch
    first = [[image_number(source, e) for e in of_hosts[0] if e['epoch'] == k] for k in range(2)]
    assert set(first[0]) != set(first[1])


@pytest.mark.parametrize('kind', ['tfrecord', 'array_record', 'files'])
def test_resuming_at_any_step(load, kind):
  """Breaks if the images after a restart depend on the step of the restart, or two seeds have one order."""
  source, rows = load(kind), np.arange(2, 4)
  uninterrupted = take(source, 80, local=rows)
  assert all(image_number(source, e) < len(IMAGES) for e in uninterrupted)
  # An epoch of this host has 11 or 12 images, that is, 5 1/2 or 6 steps.
  for first in (1, 5, 6, 11, 12, 13, 30):
    resumed = take(source, 80 - 2 * first, first=first, local=rows)
    assert positions(resumed) == positions(uninterrupted[2 * first :]), first
    assert [e['bytes'] for e in resumed] == [e['bytes'] for e in uninterrupted[2 * first :]]
  other = take(source, 24, local=rows, seed=1)
  assert positions(other) != positions(uninterrupted[:24])
  index = [e['index'] for e in uninterrupted]
  assert index[:12] != index[12:24]


def test_the_order_of_records_is_shuffled(folders):
  """Breaks if neighbours in a file stay neighbours, or a small shuffle buffer loses records."""
  for buffer in (1000, 4, 1):
    source = data.load(settings(folders / 'tfrecord', shuffle_buffer=buffer), 'train')
    for seed in (0, 2**32 - 1):
      index = np.array([e['index'] for e in take(source, len(IMAGES), batch_size=1, seed=seed)])
      assert sorted(index) == list(range(len(IMAGES)))
      assert (np.diff(index) != 1).sum() > {1000: 15, 4: 8, 1: 0}[buffer]


@pytest.mark.parametrize('kind', ['array_record', 'files'])
@pytest.mark.parametrize('count', [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_hosts(load, kind, count):
  """Breaks if the rows of all hosts together are not the batches of `order.rows`."""
  source, size, steps = load(kind), 8, 7
  parts = [take(source, steps * size // count, size, 3, rows, 5) for rows in hosts(size, count)]
  for step in range(steps):
    n = size // count
    batch = [e for part in parts for e in part[step * n : (step + 1) * n]]
    expected = order.rows(5, 3 + step, size, len(IMAGES))
    for key in ('index', 'epoch', 'position'):
      np.testing.assert_array_equal([e[key] for e in batch], expected[key])
    for e in batch:
      image_number(source, e)


def test_pixels_do_not_depend_on_the_number_of_hosts(load):
  """Breaks if decoded pixels or crops depend on the block, the host or the position in a batch."""
  source, size, steps = load('files'), 32, 4
  pipelines = ('simclr_crop(0.08, 1)', 'torch_crop(0.2, 1)')

  def digests(rows, first):
    encoded = source.train_iterator(7, size, first, rows)
    canvases = decode.canvases(encoded, pipelines, 16, 7, source.settings).batch(len(rows))
    batches = stream.with_threads(canvases.take(steps - first), source.settings)
    return [
      [hashlib.sha256(x.tobytes() + c.tobytes()).hexdigest() for x, c in zip(b['images'], b['crops'])]
      for b in batches.as_numpy_iterator()
    ]  # fmt: skip

  alone = digests(np.arange(size), 0)
  assert len({d for batch in alone for d in batch}) > size * steps * 0.9
  assert digests(np.arange(size), 2) == alone[2:]
  for count in (2, 4):
    parts = [digests(rows, 0) for rows in hosts(size, count)]
    assert [sum(batch, []) for batch in zip(*parts)] == alone


# Damaged files.


def read(source):
  """Reads batches for training until every image was read."""
  if isinstance(source, data.Arrays):
    return
  mesh = jax.make_mesh((1,), ('data',), devices=jax.devices()[:1])
  batches = loader.for_training(source, 0, 8, ('resize', 'resize'), 16, mesh)
  try:
    for step in range(2 * len(source) // 8):
      batches(step)
  finally:
    batches.close()


def sentence(call):
  with pytest.raises(ConfigError) as error:
    call()
  text = str(error.value)
  del error  # otherwise its traceback and this frame keep each other and a pipeline alive
  assert '\n' not in text and len(text) < 500 and '{{' not in text, text
  return text


def offset_of_record(content, number):
  """Offset of a record in a TFRecord file: a record is its length (8 bytes), a CRC, the bytes, a CRC."""
  at = 0
  for _ in range(number):
    at += 8 + 4 + struct.unpack('<Q', content[at : at + 8])[0] + 4
  return at


def damage(path, how):
  content = path.read_bytes()
  if how == 'flipped':
    at = offset_of_record(content, 1) + 60
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
  elif how == 'missing':
    path.unlink()
  else:
    cut = {'between': 0, 'header': 7, 'middle': 100}
    content = content[: offset_of_record(content, 2) + cut[how]] if how in cut else b''
    path.write_bytes(b'<!DOCTYPE html><html>404</html>' if how == 'page' else content)


TFRECORD = [
  ('flipped', 'is damaged after 1 of its 3 records: corrupted record'),
  ('between', 'has 2 of its 3 records'),
  ('header', 'has 2 of its 3 records'),
  ('middle', 'is damaged after 2 of its 3 records: truncated record'),
  ('empty', 'has 0 of its 3 records'),
  ('page', 'is damaged after 0 of its 3 records'),
  ('missing', 'is missing: prepare'),
]


@pytest.mark.parametrize('size', [0, 24], ids=['stream', 'memory'])
@pytest.mark.parametrize('how, expected', TFRECORD)
def test_a_damaged_tfrecord_file_is_named(tmp_path, how, expected, size):
  """Breaks if records are lost without an error, or the message does not name the file."""
  images = [jpeg(i, size, size) for i in range(8)]
  directory = write(
    tmp_path / 'mine', images, (5, 3), shape=(size or None, size or None, 3), labels=LABELS[:8]
  )
  bad = directory / 'mine-train.tfrecord-00001-of-00002'
  damage(bad, how)
  text = sentence(lambda: read(data.load(settings(directory), 'train')))
  assert text.startswith(f'{bad} {expected}'), text


def masked_crc(data):
  """The checksum that TFRecord files use: CRC-32C, rotated and shifted."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 0xFFFFFFFF
  return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@pytest.mark.parametrize('length', [2**40, 2**63, 2**31 + 1])
def test_a_length_beyond_the_file(tmp_path, length):
  """Breaks if TensorFlow sees a record that says that it is huge, which ends the process."""
  directory = write(tmp_path / 'mine', IMAGES[:8], (5, 3), labels=LABELS[:8])
  bad = directory / 'mine-train.tfrecord-00001-of-00002'
  header = struct.pack('<Q', length)
  good = bad.read_bytes()
  (first,) = struct.unpack('<Q', good[:8])
  assert good[8:12] == masked_crc(good[:8])
  bad.write_bytes(good[: 12 + first + 4] + header + masked_crc(header) + bytes(50))
  text = sentence(lambda: read(data.load(settings(directory), 'train')))
  expected = f'is damaged after 1 of its 3 records: truncated record of {length:,} bytes'
  assert text.startswith(f'{bad} {expected}'), text


# In the file, replace the first by the second: the expected sentence.
METADATA = {
  'huge shard': ('dataset_info.json', '"5",', f'"{2**50}",', 'has 5 of its 1,125,899,906,842,624 records'),
  'negative shard': ('dataset_info.json', '"5",', '"-5",', 'is damaged'),
  'shard of words': ('dataset_info.json', '"5",', '"five",', 'is damaged'),
  'no splits': ('dataset_info.json', '"splits"', '"spits"', ''),
  'a list': ('dataset_info.json', '{', '[{', 'is damaged'),
  'many classes': ('features.json', '"numClasses": "4"', f'"numClasses": "{2**40}"', '1,099,511,627,776 classes'),
  'a module': ('features.json', 'tensorflow_datasets.core.features.image_feature', 'antigravity', "'antigravity.Image'"),
  'a broken class': ('features.json', 'image_feature', 'no_feature', 'is damaged'),
  'a wrong kind': ('features.json', '"image": {\n                "image"', '"image": {\n                "text"', 'is damaged'),
  'no image': ('features.json', '            "image": {', '            "imago": {', 'has no images'),
  'other bytes': ('features.json', '{', '{\udcff', 'is damaged'),
}  # fmt: skip


@pytest.mark.parametrize('kind', ['tfrecord', 'array_record'])
@pytest.mark.parametrize('how', METADATA)
def test_metadata_that_do_harm(tmp_path, how, kind):
  """Breaks if metadata end in a traceback, take all memory, or import a module that they name."""
  directory = write(tmp_path / 'mine', IMAGES[:8], (5, 3), kind, labels=LABELS[:8])
  name, old, new, expected = METADATA[how]
  path = directory / name
  text = path.read_text()
  assert old in text
  path.write_bytes(text.replace(old, new, 1).encode('utf-8', 'surrogateescape'))
  text = sentence(lambda: data.load(settings(directory), 'train'))
  assert expected in text or 'of its' in expected and 'array_record' in text, text
  assert 'antigravity' not in sys.modules


def test_metadata_that_are_no_regular_files(tmp_path):
  """Breaks if a pipe or a device blocks the program or fills the memory."""
  for name in ('dataset_info.json', 'features.json', 'label.labels.txt'):
    directory = write(tmp_path / name / 'mine', IMAGES[:8], (5, 3), labels=LABELS[:8])
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    text = sentence(lambda w=directory: data.load(settings(w), 'train'))
    assert text == f'{directory}/{name} is no regular file'


@pytest.mark.parametrize('kind', ['tfrecord', 'array_record'])
def test_records_with_other_features(tmp_path, kind, monkeypatch):
  """Breaks if a record of another type ends in a traceback, or others are skipped with it."""
  int64_list = tf.train.Int64List
  twice = {99: [99, 99]}
  monkeypatch.setattr(tf.train, 'Int64List', lambda value: int64_list(value=twice.get(value[0], value)))  # fmt: skip
  labels = [0, 1, 99, 3, 0, 1, 2, 3]
  directory = write(tmp_path / 'mine', IMAGES[:8], (5, 3), kind, labels=labels)
  name = f'record 2 of {"the split in" if kind == "array_record" else directory}'
  text = sentence(lambda: read(data.load(settings(directory), 'train')))
  assert text.startswith(name) and 'has other features than features.json says' in text, text
  kept = data.load(settings(directory, skip_bad=1), 'train')
  assert kept.labels.tolist() == [0, 1, 3, 0, 1, 2, 3]


def test_a_label_that_is_no_class(tmp_path):
  """Breaks if a label beyond the classes becomes another class, memory, or a traceback."""
  labels = [0, 1, 2, 3, 0, 1, 10**9, 2]
  directory = write(tmp_path / 'mine', IMAGES[:8], (5, 3), labels=labels)
  text = sentence(lambda: data.load(settings(directory), 'train').labels)
  assert (
    'record 1 of' in text and 'has the label 1,000,000,000, which is none of the 4 classes' in text
  )


ARRAY_RECORD = [
  ('flipped', 'cannot be read'),
  ('middle', 'has 0 of its 3 records'),
  ('empty', 'has 0 of its 3 records'),
  ('page', 'has 0 of its 3 records'),
  ('missing', 'is missing: prepare'),
]


def damage_array_record(path, how):
  content = path.read_bytes()
  if how == 'flipped':
    at = content.index(IMAGES[6]) + 40
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
  elif how == 'middle':
    path.write_bytes(content[: len(content) // 2])
  else:
    damage(path, how)


@pytest.mark.parametrize('how, expected', ARRAY_RECORD)
def test_a_damaged_array_record_file_is_an_error(tmp_path, how, expected):
  """Breaks if a truncated, empty or missing ArrayRecord file causes a traceback, or images are lost."""
  directory = write(tmp_path / 'mine', IMAGES[:8], (5, 3), 'array_record', labels=LABELS[:8])
  damage_array_record(directory / 'mine-train.array_record-00001-of-00002', how)
  text = sentence(lambda: read(data.load(settings(directory), 'train')))
  assert str(directory) in text and expected in text, text


@pytest.mark.parametrize('skip_bad', [1, 100])
@pytest.mark.parametrize(
  'kind, how',
  [('tfrecord', 'flipped'), ('tfrecord', 'between'), ('array_record', 'flipped')],
)
def test_skip_bad_does_not_skip_damaged_files(tmp_path, kind, how, skip_bad):
  """Breaks if `data.skip_bad` skips intact images because the file that contains them is damaged."""
  directory = write(tmp_path / 'mine', IMAGES[:8], (5, 3), kind, labels=LABELS[:8])
  bad = directory / f'mine-train.{kind}-00001-of-00002'
  (damage if kind == 'tfrecord' else damage_array_record)(bad, how)
  text = sentence(lambda: len(data.load(settings(directory, skip_bad=skip_bad), 'train')))
  assert str(bad if kind == 'tfrecord' else directory) in text and '8 of 8' not in text, text


BAD = {
  2: (b'', 'is empty'),
  6: (
    b'<html>404</html>',
    'is not an image of a known format (JPEG, PNG, GIF, BMP, WebP, TIFF, PNM, JPEG 2000, AVIF, HEIC), but a page of HTML or XML',
  ),
  9: (IMAGES[9][: len(IMAGES[9]) // 2], 'is a broken JPEG'),
}


@pytest.mark.parametrize('kind', ['tfrecord', 'array_record'])
def test_corrupt_images_in_intact_records(tmp_path, kind):
  """Breaks if the message names another record, or skipping images shifts labels or indices."""
  images = [BAD[i][0] if i in BAD else IMAGES[i] for i in range(12)]
  directory = write(tmp_path / 'mine', images, (5, 7), kind, labels=LABELS[:12])
  source = data.load(settings(directory), 'train')
  sentences = []
  for i, (_, problem) in BAD.items():
    file = directory / f'mine-train.tfrecord-0000{i // 5}-of-00002'
    number = i - 5 if i > 5 else i
    name = f'record {number} of {file}'
    if kind == 'array_record':
      name = f'record {i} of the split in {directory}'
    assert source.name(i) == name
    sentences.append(f'{name} {problem}')
    assert source.find_problem([i]).startswith(sentences[-1])
  text = sentence(lambda: read(source))
  assert text.startswith(tuple(sentences)) and '--config.data.skip_bad=N' in text, text

  intact = data.load(settings(directory, skip_bad=3), 'train')
  numbers = [i for i in range(12) if i not in BAD]
  assert len(intact) == 9
  assert [intact.name(i) for i in range(9)] == [source.name(i) for i in numbers]
  elements = list(intact.iterate_once().as_numpy_iterator())
  assert [e['bytes'] for e in elements] == [IMAGES[i] for i in numbers]
  assert [e['index'] for e in elements] == list(range(9))
  of_hosts = [take(intact, 24, local=rows) for rows in hosts(4, 2)]
  both = [e for h in of_hosts for e in h]
  for epoch in range(3):
    assert sorted(e['index'] for e in both if e['epoch'] == epoch) == list(range(9))
  for e in elements + both:
    i = numbers[e['index']]
    assert e['bytes'] == IMAGES[i] and e['label'] == LABELS[i]
  assert positions(take(intact, 24 - 14, first=7, local=np.arange(2))) == positions(
    of_hosts[0][14:]
  )
  read(intact)


@pytest.mark.parametrize('kind', ['tfrecord', 'array_record'])
def test_more_corrupt_images_than_allowed(tmp_path, kind):
  """Breaks if the limit is ignored, or the message lacks the number or the first of the corrupt images."""
  images = [*IMAGES[:3], b'x', *IMAGES[4:7], b'']
  directory = write(tmp_path / 'mine', images, (5, 3), kind, labels=LABELS[:8])
  text = sentence(lambda: data.load(settings(directory, skip_bad=1), 'train'))
  assert text.startswith('2 of 8 images cannot be decoded, ')
  assert 'data.skip_bad=1' in text and 'record 3' in text
  assert len(data.load(settings(directory, skip_bad=2), 'train')) == 6


@pytest.mark.parametrize('contents', [b'<html>404</html>'], ids=['page'])
def test_a_corrupt_image_in_a_data_set_of_one_size(tmp_path, contents):
  """Breaks if the message for an image that does not have the declared size lacks the name of the image."""
  images = [contents if i == 6 else jpeg(i, 24, 24) for i in range(8)]
  directory = write(tmp_path / 'mine', images, (5, 3), shape=(24, 24, 3), labels=LABELS[:8])
  text = sentence(lambda: data.load(settings(directory), 'train'))
  assert text.startswith(f'record 1 of {directory}/mine-train.tfrecord-00001-of-00002 '), text


def test_exif_orientation_in_memory_and_streamed(tmp_path):
  """Breaks if the EXIF orientation is applied to streamed images, but not to images in memory."""
  exif = Image.Exif()
  exif[0x0112] = 6
  images = []
  for i in range(8):
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg(i, 24, 24))).save(file, 'JPEG', quality=95, exif=exif)
    images.append(file.getvalue())
  directory = write(tmp_path / 'mine', images, (5, 3), shape=(24, 24, 3), labels=LABELS[:8])
  in_memory, streamed = (
    encoders.preprocess(data.load(settings(directory, on_device=x), 'train'), 'resize', 24)[0]
    for x in ('yes', 'no')
  )
  np.testing.assert_allclose(in_memory, streamed, atol=1e-6)


def test_no_intact_image_is_an_error(tmp_path):
  """Breaks if a large `data.skip_bad` skips all images, and the training waits forever."""
  directory = write(tmp_path / 'mine', [b'x'] * 8, (5, 3), labels=LABELS[:8])
  text = sentence(lambda: len(data.load(settings(directory, skip_bad=100), 'train')))
  assert str(directory) in text


@pytest.mark.parametrize('how', ['corrupt image', 'flipped'])
@pytest.mark.parametrize('kind', ['tfrecord', 'array_record'])
def test_failed_reading_frees_its_pipeline(tmp_path, kind, how):
  """Breaks if a pipeline is freed only by the garbage collector, which may deadlock in another thread."""
  images = [*IMAGES[:6], b'x' if how == 'corrupt image' else IMAGES[6], IMAGES[7]]
  directory = write(tmp_path / 'mine', images, (5, 3), kind, labels=LABELS[:8])
  if how == 'flipped':
    file = directory / f'mine-train.{kind}-00001-of-00002'
    (damage if kind == 'tfrecord' else damage_array_record)(file, how)
  source = data.load(settings(directory), 'train')

  def pipelines():
    return {id(x) for x in gc.get_objects() if type(x).__name__ == 'OwnedIterator'}

  before = pipelines()
  gc.disable()
  try:
    sentence(lambda: read(source))
    assert not pipelines() - before
  finally:
    gc.enable()


# Wrong arguments.


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """A `data_dir` of TFDS with one data set."""
  root = tmp_path_factory.mktemp('named')
  write(root / 'mine' / '1.0.0')
  (root / 'a space').mkdir()
  return root


@pytest.mark.parametrize(
  'values, split, expected',
  [
    (dict(name='cifar1'), 'train', "data.name='cifar1' is not a TFDS data set, did you mean cifar10"),
    (dict(name='qwertzuiop'), 'train', "data.name='qwertzuiop' is not a TFDS data set"),
    (dict(name='mnist'), 'train', 'prepare it: tfds build mnist --data_dir={dir}'),
    (dict(name='mnist:9.9.9'), 'train', "data.name='mnist:9.9.9': TFDS has no such version or config of it"),
    (dict(name='mine'), 'valid', "mine has no split 'valid', only train"),
    (dict(name='mine'), '', 'no train split: put images into the sub-folders train/ and test/, or name the split'),
    (dict(name='mine'), 'train[5:', "mine has no split 'train[5:'"),
    (dict(name='mine'), 'train[:1000%]', "mine has no split 'train[:1000%]'"),
    (dict(name='mine'), 'train[9:5]', "mine has no images in 'train[9:5]'"),
    (dict(name='', dir=''), 'train', 'data.name and data.dir are empty'),
    (dict(name=''), 'train', '{dir} is not the folder of a prepared data set'),
    (dict(name='', dir='/nowhere'), 'train', '/nowhere is not the folder of a prepared data set'),
  ],
)  # fmt: skip
def test_wrong_arguments_are_one_sentence(data_dir, values, split, expected):
  """Breaks if a typing error causes a traceback or a list of all of TFDS, or the message lacks the fix."""
  c = settings(**{'dir': data_dir, 'train_split': split, **values})
  text = sentence(lambda: data.load(c, 'train'))
  assert expected.format(dir=data_dir) in text, text


def test_the_printed_tfds_build_command_is_quoted(data_dir):
  """Breaks if a folder with a space in its name becomes two arguments of the printed command."""
  text = sentence(lambda: data.load(settings(data_dir / 'a space', name='mnist'), 'train'))
  assert text.endswith(f"tfds build mnist --data_dir='{data_dir / 'a space'}'"), text


def test_a_data_set_without_images(tmp_path):
  """Breaks if a data set of texts fails later, or with a traceback."""
  write_with_tfds(tmp_path, 'texts', {'text': tfds.features.Text()}, {'train': [{'text': 'a'}]})
  text = sentence(lambda: data.load(settings(tmp_path, name='texts'), 'train'))
  assert 'texts has no images, only text' in text


def test_other_file_formats_are_refused(tmp_path):
  """Breaks if Riegeli or Parquet is read as if it were TFRecord."""
  directory = write(tmp_path / 'mine')
  info = directory / 'dataset_info.json'
  info.write_text(info.read_text().replace('"tfrecord"', '"riegeli"'))
  for path in directory.glob('*.tfrecord-*'):
    path.rename(str(path).replace('tfrecord', 'riegeli'))
  text = sentence(lambda: read(data.load(settings(directory), 'train')))
  assert 'riegeli' in text and 'damaged' not in text, text


def test_a_truncated_dataset_info(tmp_path):
  """Breaks if a truncated dataset_info.json or features.json causes a traceback."""
  for name in ('dataset_info.json', 'features.json'):
    directory = write(tmp_path / name / 'mine')
    path = directory / name
    path.write_text(path.read_text()[:100])
    assert str(directory) in sentence(lambda w=directory: data.load(settings(w), 'train'))


def test_a_batch_larger_than_the_data_set(folders, tmp_path):
  """Breaks if a batch has the same image twice, or the training waits for a batch forever."""
  recipe = config.load(
    'simclr_digits',
    {**TINY, 'data.source': 'tfds', 'data.dir': str(folders / 'tfrecord'), 'data.num_classes': '0'},
  )
  text = sentence(lambda: train.pretrain(recipe, tmp_path / 'run'))
  assert 'batch_size=32 is larger than the data set, 23 images' in text


# Evaluation.


@pytest.fixture(scope='module')
def encoder():
  recipe = config.load('simclr_digits', TINY)
  return encoders.untrained(config.architecture(recipe))


@pytest.fixture(scope='module')
def one_by_one(encoder):
  """Features of each of IMAGES, each image decoded and embedded by itself."""
  forward = jax.jit(classifier.forward(encoder.architecture))
  view = functools.partial(augment.eval_view, pipeline=encoder.architecture['eval_view'], size=32)
  pixels = [tf.io.decode_jpeg(x, 3).numpy() for x in IMAGES]
  return np.concatenate([forward(encoder.variables, view(x)[None]) for x in pixels])


@pytest.mark.parametrize('kind', ['tfrecord', 'array_record', 'files'])
def test_every_image_is_embedded_once_and_in_order(load, encoder, one_by_one, kind):
  """Breaks if the last, partial batch on eight devices is dropped or repeated, or padding gets features."""
  source = load(kind)
  of_index = [image_number(source, e) for e in source.iterate_once().as_numpy_iterator()]
  assert sorted(of_index) == list(range(len(IMAGES)))
  for size in (16, 1):  # 23 images: batches of 16 and 7, or of 8
    done = []
    h, labels = encoder.embed(source, size, done.append)
    np.testing.assert_allclose(h, one_by_one[of_index], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(labels, np.array(LABELS)[of_index])
    assert done[-1] == len(IMAGES)
  three = source.subset(np.array([1, 9, 22]))
  h, labels = encoder.embed(three, 64)
  np.testing.assert_allclose(h, one_by_one[of_index][[1, 9, 22]], rtol=0, atol=1e-5)
  np.testing.assert_array_equal(labels, np.array(LABELS)[of_index][[1, 9, 22]])


def test_arrays_are_embedded_once_and_in_order(encoder):
  """Breaks if features of images in memory have another order, or include the padding of the last batch."""
  images = np.random.default_rng(0).integers(0, 256, (19, 32, 32, 3), dtype=np.uint8)
  labels = np.arange(19, dtype=np.int32) % 3
  forward = jax.jit(classifier.forward(encoder.architecture))
  alone = [forward(encoder.variables, x[None] / np.float32(255)) for x in images]
  for size in (8, 16, 256):
    h, returned_labels = encoder.embed(data.Arrays(images, labels), size)
    np.testing.assert_allclose(h, np.concatenate(alone), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(returned_labels, labels)
  with pytest.raises(ValueError, match='no images'):
    encoder.embed(data.Arrays(images[:0], labels[:0]))


def test_images_that_disappear_before_an_evaluation(tmp_path, encoder):
  """Breaks if an evaluation silently uses fewer images than the data set has."""
  directory = write(tmp_path / 'mine', IMAGES[:8], (5, 3), labels=LABELS[:8])
  source = data.load(settings(directory), 'train')
  bad = directory / 'mine-train.tfrecord-00001-of-00002'
  damage(bad, 'between')
  assert f'{bad} has 2 of its 3 records' in sentence(lambda: encoder.embed(source))

  for i in range(5):
    (tmp_path / 'files').mkdir(exist_ok=True)
    (tmp_path / 'files' / f'{i}.jpg').write_bytes(IMAGES[i])
  source = data.load(settings(tmp_path / 'files', 'folder', train_split='.'), 'train')
  (tmp_path / 'files' / '3.jpg').unlink()
  assert sentence(lambda: encoder.embed(source)).startswith(
    f'{tmp_path}/files/3.jpg cannot be read'
  )


def test_parts_of_an_evaluation_cover_every_image_once(load):
  """Breaks if no host, or two hosts, evaluate an image."""
  for kind in ('tfrecord', 'array_record', 'files'):
    source = load(kind)
    for parts in (2, 3, 8):
      indices = [
        [e['index'] for e in source.iterate_once(p, parts).as_numpy_iterator()]
        for p in range(parts)
      ]
      assert sum(indices, []) == list(range(len(IMAGES)))
      assert max(map(len, indices)) - min(map(len, indices)) <= 1
