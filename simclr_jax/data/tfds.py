"""TensorFlow Datasets, prepared as TFRecord or ArrayRecord, by name or as a folder."""

import dataclasses
import difflib
import posixpath
import shlex
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from simclr_jax.data import decode, records, scan, stream
from simclr_jax.data.dataset import MAX_CLASSES, Arrays, fits_on_device
from simclr_jax.data.records import IndexedRecords, Records
from simclr_jax.data.shards import Shard, Shards
from simclr_jax.data.stream import tf
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import files, paths

try:
  import tensorflow_datasets as tfds
except ImportError as error:
  raise ConfigError(
    f'data.source=tfds needs TensorFlow Datasets ({error}): pip install tensorflow-datasets'
  ) from None
FileFormat = tfds.core.FileFormat
METADATA = 64 * 2**20  # most bytes of a file with metadata


def load(config: ml_collections.ConfigDict, split: str) -> Arrays | Records | IndexedRecords:
  """A prepared data set; small images of one size are read into memory.

  Args:
    config: the `data` part of a recipe. `name`: the TFDS name, such as `imagenet2012_subset/1pct`; empty if
      `dir` is the folder of one version of a data set. `dir`: the `data_dir` of TFDS, empty for its default.
    split: in the syntax of TFDS, such as `train[:10%]`.

  Raises:
    ConfigError: the data set, the split or a file is missing or damaged.
  """
  builder = _builder(config)
  name = config.name or str(builder.data_dir)
  shards = _shards(builder, split, name)
  features = dict(builder.info.features)
  if not isinstance(features.get('image'), tfds.features.Image):
    raise ConfigError(f'{name} has no images, only {", ".join(features)}')
  file_format = builder.info.file_format
  if file_format not in (FileFormat.TFRECORD, FileFormat.ARRAY_RECORD):
    raise ConfigError(
      f'{name} is stored as {file_format and file_format.value}, and only tfrecord and array_record can be read'
    )
  missing = next((s.path for s in shards if not tf.io.gfile.exists(s.path)), None)
  if missing:
    raise ConfigError(f'{missing} is missing: prepare {name} again')
  images = _records(config, builder, split)
  if not len(images):
    raise ConfigError(f'{name} has no images in {split!r}')
  if features['image'].dtype != np.uint8:
    images = scan.with_range(images, lambda: _records(config, builder, config.train_split))
  if config.skip_bad:
    images = scan.without_bad(images)
  h, w = (features['image'].shape or ())[:2] or (None, None)
  if h and w and h > 0 and w > 0 and fits_on_device(config, len(images) * h * w * config.channels):
    return decode.read_all(images, h, w) or images
  return images


def _shards(builder, split, name) -> list[Shard]:
  """The files of a split."""
  try:
    instructions = builder.info.splits[split].file_instructions
    return [
      Shard(str(f.filename), f.skip, f.take if f.take >= 0 else f.examples_in_shard - f.skip,
            f.examples_in_shard)
      for f in instructions
    ]  # fmt: skip
  except (KeyError, ValueError, AssertionError) as error:
    if split in builder.info.splits:
      raise ConfigError(
        f'dataset_info.json of {name} is damaged: {records.reason(error)}'
      ) from None
    names = ', '.join(builder.info.splits)
    raise ConfigError(f'{name} has no split {split!r}, only {names}') from None


def _records(config, builder, split) -> Records | IndexedRecords:
  name = config.name or str(builder.data_dir)
  label = dict(builder.info.features).get('label')
  classes = isinstance(label, tfds.features.ClassLabel) and label.num_classes or 0
  if not 0 <= classes <= MAX_CLASSES:
    raise ConfigError(f'{name} has {classes:,} classes, more than {MAX_CLASSES:,}')
  shards = _shards(builder, split, name)
  common: dict[str, Any] = {
    'parse': _Parser(classes > 0),
    'labelled': classes > 0,
    'class_names': label.names if label and classes else [],
    'settings': config,
  }
  if builder.info.file_format == FileFormat.TFRECORD:
    for shard in shards:
      records.check_total(shard)
    return Records(shards=Shards(shards), **common)
  _check_lengths(shards)
  source = builder.as_data_source(split).data_source
  numbers = np.arange(len(source), dtype=np.int64)
  return IndexedRecords(
    source=source, numbers=numbers, files=shards, folder=str(builder.data_dir), **common
  )


def _check_lengths(shards):
  """Raises ConfigError for a truncated ArrayRecord file: reading it gives empty records and no error."""
  # On some platforms TFDS has no array_record.
  from array_record.python import array_record_module

  for file in shards:
    try:
      count = array_record_module.ArrayRecordReader(file.path).num_records()
    except Exception as error:  # whatever the reader raises
      raise ConfigError(f'{file.path} cannot be read: {records.reason(error)}') from None
    if count != file.total:
      raise ConfigError(f'{file.path} has {count:,} of its {file.total:,} records')


def _builder(config):
  folder = stream.expand(config.dir) or None
  if not config.name:
    return _from_directory(folder)
  try:
    builder = tfds.builder(config.name, data_dir=folder)
  except Exception as error:  # also of the metadata, if the data set is prepared
    if not exists(config.name):
      raise ConfigError(
        f'data.name={config.name!r} is not a TFDS data set{did_you_mean(config.name)}'
      ) from None
    if isinstance(error, tfds.core.DatasetNotFoundError | FileNotFoundError | ValueError | AssertionError):  # fmt: skip
      raise ConfigError(
        f'data.name={config.name!r}: TFDS has no such version or config of it'
      ) from None
    raise ConfigError(f'{config.name} cannot be opened: {records.reason(error)}') from None
  if not builder.is_prepared():
    prepare = f'tfds build {config.name}' + (f' --data_dir={shlex.quote(folder)}' if folder else '')
    raise ConfigError(f'{config.name} is not prepared in {builder.data_dir}; prepare it: {prepare}')
  return builder


def _from_directory(folder):
  if not folder:
    raise ConfigError(
      'data.name and data.dir are empty: name the data set with --data or --config.data.name'
    )
  if not tf.io.gfile.exists(posixpath.join(folder, 'dataset_info.json')):
    raise ConfigError(
      f'{folder} is not the folder of a prepared data set: it has no dataset_info.json'
    )
  _check_metadata(paths.path(folder))
  try:
    return tfds.builder_from_directory(folder)
  except Exception as error:  # of JSON, protocol buffers and more
    raise ConfigError(
      f'dataset_info.json or features.json in {folder} is damaged: {records.reason(error)}'
    ) from None


def _check_metadata(folder):
  """Raises ConfigError if a file with metadata cannot be read, or names a class that TFDS would import.

  The classes of features are named in features.json, and TFDS imports whatever module is named.
  """
  for path in sorted(folder.iterdir()):
    if path.name.endswith('.labels.txt'):
      files.read_text(path, METADATA)
    elif path.name in ('dataset_info.json', 'features.json'):
      for name in _class_names_in(files.read_json(path, METADATA)):
        if not name.startswith('tensorflow_datasets.'):
          raise ConfigError(f'{path} has features of {name!r}, and only those of TFDS are read')


def _class_names_in(value) -> Iterator[str]:
  """The names of Python classes in a value of features.json."""
  if isinstance(value, list):
    for item in value:
      yield from _class_names_in(item)
  elif isinstance(value, dict):
    for key, item in value.items():
      if key in ('pythonClassName', 'python_class_name', 'type') and isinstance(item, str):
        yield item
      yield from _class_names_in(item)


def multilabels(config: ml_collections.ConfigDict, split: str) -> np.ndarray | None:
  """The classes of each image of a data set with several labels per image, such as VOC 2007.

  Objects that VOC marks as difficult are no positives: the feature `labels_no_difficult` is used if there is one.

  Returns:
    bool `[N, C]` in the order of `load`; None without a feature `labels` that is a sequence of classes.
  """
  name = 'labels_no_difficult' if has_difficult(config) else 'labels'
  return _classes_of(config, split, name)


def has_difficult(config: ml_collections.ConfigDict) -> bool:
  """Whether a data set marks objects as difficult, as VOC does."""
  return 'labels_no_difficult' in dict(_builder(config).info.features)


def difficult(config: ml_collections.ConfigDict, split: str) -> np.ndarray | None:
  """The classes of which an image shows difficult objects only: VOC's metric ignores the image for these classes.

  Returns:
    bool `[N, C]` in the order of `load`; None if the data set does not mark objects as difficult.
  """
  if not has_difficult(config):
    return None
  shown, clear = _classes_of(config, split, 'labels'), multilabels(config, split)
  return None if shown is None or clear is None else shown & ~clear


def _classes_of(config, split, name) -> np.ndarray | None:
  builder = _builder(config)
  labels = dict(builder.info.features).get(name)
  if not isinstance(labels, tfds.features.Sequence):
    return None
  classes = labels.feature
  if not isinstance(classes, tfds.features.ClassLabel):
    return None
  for shard in _shards(builder, split, config.name or str(builder.data_dir)):
    records.check(shard)
  examples = builder.as_dataset(
    split=split,
    decoders=tfds.decode.PartialDecoding({name: True}),
    read_config=tfds.ReadConfig(interleave_cycle_length=1),  # in the order of the files
  )
  return np.array(
    [np.isin(np.arange(classes.num_classes), e[name]) for e in tfds.as_numpy(examples)]
  )


def split_names(name: str, folder: str) -> list[str]:
  """The splits of a prepared data set, by its name or folder; train and test if they are not known."""
  try:
    data_dir = stream.expand(folder) or None
    builder = tfds.builder(name, data_dir=data_dir) if name else _from_directory(data_dir)
    return list(builder.info.splits) or ['train', 'test']
  except Exception:  # `load` reports whatever is wrong
    return ['train', 'test']


def exists(name: str) -> bool:
  """Whether TFDS has a data set of this name, which may be followed by `/config` and `:version`."""
  return name.split('/')[0].split(':')[0] in tfds.list_builders()


def did_you_mean(name: str) -> str:
  """A question with the three most similar names of TFDS data sets, or an empty string."""
  close = difflib.get_close_matches(name.split('/')[0], tfds.list_builders(), 3)
  return f', did you mean {" or ".join(close)}?' if close else ''


@dataclasses.dataclass(frozen=True)
class _Parser:
  """Serialized record -> (encoded image, label), as TFDS writes an `Image` and a `ClassLabel`.

  Attributes:
    labelled: whether records have labels.
  """

  labelled: bool

  def __call__(self, serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    spec = {'image': tf.io.FixedLenFeature([], tf.string)}
    if not self.labelled:
      return tf.io.parse_single_example(serialized, spec)['image'], tf.constant(-1, tf.int32)
    e = tf.io.parse_single_example(
      serialized, {**spec, 'label': tf.io.FixedLenFeature([], tf.int64)}
    )
    return e['image'], tf.cast(e['label'], tf.int32)
