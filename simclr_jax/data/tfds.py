"""TensorFlow Datasets, prepared as TFRecord or ArrayRecord, by name or as a folder."""

import difflib
import posixpath
import shlex

import ml_collections
import numpy as np

from simclr_jax.data import decode, scan, stream
from simclr_jax.data.dataset import Arrays, fits_on_device
from simclr_jax.data.records import IndexedRecords, Records, Shard
from simclr_jax.data.stream import tf
from simclr_jax.errors import ConfigError

try:
  import tensorflow_datasets as tfds
except ImportError as error:
  raise ConfigError(
    f'data.source=tfds needs TensorFlow Datasets ({error}): pip install tensorflow-datasets'
  ) from None


def load(config: ml_collections.ConfigDict, split: str) -> Arrays | Records | IndexedRecords:
  """A prepared data set; small images of one size are read into memory.

  Args:
    config: `name` as TFDS knows it, such as `imagenet2012_subset/1pct`; empty if `dir` is itself the
      folder of one data set's version. `dir`: TFDS's `data_dir`, empty for its default.
    split: in TFDS's syntax, such as `train[:10%]`.

  Raises:
    ConfigError: the data set, split or files are missing or broken.
  """
  builder = _builder(config)
  info = builder.info
  what, features = config.name or str(builder.data_dir), dict(info.features)
  try:
    chosen = info.splits[split]
  except (KeyError, ValueError, AssertionError):
    raise ConfigError(f'{what} has no split {split!r}, only {", ".join(info.splits)}') from None
  if not isinstance(features.get('image'), tfds.features.Image):
    raise ConfigError(f'{what} has no images, only {", ".join(features)}')
  label = features.get('label')
  labelled = isinstance(label, tfds.features.ClassLabel)
  class_names = label.names if labelled else []
  parse = _parser(labelled)
  formats = tfds.core.FileFormat
  if info.file_format not in (formats.TFRECORD, formats.ARRAY_RECORD):
    raise ConfigError(
      f'{what} is stored as {info.file_format.value}, and only tfrecord and array_record can be read'
    )
  missing = next((f for f in _files(chosen) if not tf.io.gfile.exists(f)), None)
  if missing:
    raise ConfigError(f'{missing} is missing: prepare {what} again')
  shards = [
    Shard(str(f.filename), f.skip, f.take if f.take >= 0 else f.examples_in_shard - f.skip,
          f.examples_in_shard)
    for f in chosen.file_instructions
  ]  # fmt: skip
  if info.file_format == formats.ARRAY_RECORD:
    _check_lengths(chosen)
    source = builder.as_data_source(split).data_source
    places = np.arange(len(source), dtype=np.int64)
    found = IndexedRecords(
      source, places, parse, labelled, class_names, config, str(builder.data_dir), shards
    )
  else:
    found = Records(shards, parse, labelled, class_names, config)
  if not len(found):
    raise ConfigError(f'{what} has no images in {split!r}')
  if config.skip_bad:
    found = scan.without_bad(found)
  h, w, _ = features['image'].shape
  if h and w and fits_on_device(config, len(found) * h * w * 3):
    return decode.read_all(found, h, w) or found
  return found


def _files(split):
  return [str(f.filename) for f in split.file_instructions]


def _check_lengths(split):
  """ArrayRecord gives empty records, and no error, for those that a file was cut off before."""
  # TFDS does without it on some platforms.
  from array_record.python import array_record_module

  for path, f in zip(_files(split), split.file_instructions):
    try:
      count = array_record_module.ArrayRecordReader(path).num_records()
    except Exception as error:  # whatever the reader raises
      raise ConfigError(f'{path} cannot be read: {str(error).splitlines()[0]}') from None
    if count != f.examples_in_shard:
      raise ConfigError(f'{path} has {count:,} of its {f.examples_in_shard:,} records')


def _builder(config):
  folder = stream.expand(config.dir) or None
  if not config.name:
    return _from_directory(folder)
  try:
    builder = tfds.builder(config.name, data_dir=folder)
  except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError, AssertionError):
    if known(config.name):
      raise ConfigError(
        f'data.name={config.name!r}: TFDS has no such version or config of it'
      ) from None
    raise ConfigError(
      f'data.name={config.name!r} is not a TFDS data set{did_you_mean(config.name)}'
    ) from None
  if not builder.is_prepared():
    prepare = f'tfds build {config.name}' + (f' --data_dir={shlex.quote(folder)}' if folder else '')
    raise ConfigError(f'{config.name} is not prepared in {builder.data_dir}; prepare it: {prepare}')
  return builder


def _from_directory(folder):
  if not folder:
    raise ConfigError('data.name and data.dir are empty: one of them says which data set')
  if not tf.io.gfile.exists(posixpath.join(folder, 'dataset_info.json')):
    raise ConfigError(
      f'{folder} is not the folder of a prepared data set: it has no dataset_info.json'
    )
  try:
    return tfds.builder_from_directory(folder)
  except Exception as error:  # of JSON, protocol buffers and more
    reason = str(error).splitlines()[0]
    raise ConfigError(
      f'dataset_info.json or features.json in {folder} is damaged: {reason}'
    ) from None


def multilabels(config: ml_collections.ConfigDict, split: str) -> np.ndarray | None:
  """The classes of each image of a data set with several labels per image, such as VOC 2007.

  Returns:
    bool `[N, C]` in the order of `load`; None without a feature `labels` that is a sequence of classes.
  """
  builder = _builder(config)
  labels = dict(builder.info.features).get('labels')
  classes = getattr(labels, 'feature', None)
  if not isinstance(classes, tfds.features.ClassLabel):
    return None
  examples = builder.as_dataset(
    split=split,
    decoders=tfds.decode.PartialDecoding({'labels': True}),
    read_config=tfds.ReadConfig(interleave_cycle_length=1),  # file after file
  )
  found = [np.isin(np.arange(classes.num_classes), e['labels']) for e in tfds.as_numpy(examples)]
  return np.array(found)


def split_names(name: str, folder: str) -> list[str]:
  """Of a prepared data set, by its name or its folder; otherwise the usual ones."""
  try:
    place = stream.expand(folder) or None
    builder = tfds.builder(name, data_dir=place) if name else tfds.builder_from_directory(place)
    return list(builder.info.splits) or ['train', 'test']
  except Exception:  # whatever is wrong will be said when it is loaded
    return ['train', 'test']


def known(name: str) -> bool:
  """Whether TFDS has a data set of this name, which may be followed by `/config` and `:version`."""
  return name.split('/')[0].split(':')[0] in tfds.list_builders()


def did_you_mean(name: str) -> str:
  """A question with the names that are nearly this one, or nothing."""
  close = difflib.get_close_matches(name.split('/')[0], tfds.list_builders(), 3)
  return f', did you mean {" or ".join(close)}?' if close else ''


def _parser(labelled):
  """Serialized record -> (encoded image, label), as TFDS writes an `Image` and a `ClassLabel`."""
  spec = {'image': tf.io.FixedLenFeature([], tf.string)}
  if labelled:
    spec['label'] = tf.io.FixedLenFeature([], tf.int64)

  def parse(serialized):
    e = tf.io.parse_single_example(serialized, spec)
    return e['image'], tf.cast(e.get('label', -1), tf.int32)

  return parse
