"""Folders of images, tables and lists of folders: splits, classes, and the images that are held out."""

import logging
import os
import pathlib

import numpy as np
import PIL.Image
import pytest
from conftest import fails

from simclr_jax import config, data
from simclr_jax.data import discover, layout
from simclr_jax.errors import ConfigError


def write(root, *paths, side=8):
  """Writes a small random image for each path, of varying width."""
  for k, path in enumerate(paths):
    file = pathlib.Path(root, path)
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([len(str(path)), k])
    pixels = rng.integers(0, 256, (side, side + k % 3, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file)
  return root


def numbered(folder, count, suffix='.png'):
  """Names of images in a folder."""
  return [f'{folder}/{i}{suffix}' for i in range(count)]


def load(dataset, **overrides):
  """Training and test images of --data=DATASET, and the lines that describe them."""
  recipe = config.load('simclr_images', {**discover.fields(str(dataset)), **overrides})
  train, test = data.load_splits(recipe.data)
  return train, test, data.summary(recipe.data, train, test)


@pytest.mark.parametrize(
  'train, test',
  [
    ('train', 'test'), ('Training', 'Testing'), ('TRAIN', 'Val'), ('training_set', 'test_set'), ('train', 'eval'),
    ('train', 'dev'), ('trainset', 'testset'), ('seg_train/seg_train', 'seg_test/seg_test'), ('train2017', 'val2017'),
    ('dogs-train', 'dogs-test'), ('train_images', 'test_images'), ('trainData', 'validData'), ('Train', 'holdout'),
  ],
)  # fmt: skip
def test_names_of_splits(tmp_path, train, test):
  """Breaks if common names of splits are read as classes, or one split is lost."""
  for split, count in ((train, 4), (test, 2)):
    write(tmp_path, *numbered(f'{split}/cat', count), *numbered(f'{split}/dog', count))
  first, second, lines = load(tmp_path)
  assert (len(first), len(second)) == (8, 4)
  assert list(first.class_names) == list(second.class_names) == ['cat', 'dog']
  assert '8 training and 4 test images' in lines[0] and '2 classes: cat 4, dog 4' in lines[0]


@pytest.mark.parametrize('name', ['train', 'test', 'Val', 'evaluation'])
def test_class_folders_called_like_splits(tmp_path, caplog, name):
  """Breaks if one class that is called like a split makes all other classes disappear."""
  classes = ['bicycle', 'bus', 'car', name]
  write(tmp_path, *(path for c in classes for path in numbered(c, 5)))
  train, test, _ = load(tmp_path)
  assert len(train) + len(test) == 20 and set(train.class_names) == set(classes)
  assert f'{name} included' in caplog.text and '--config.data.train_split=' in caplog.text


def test_splits_beside_other_folders(tmp_path, caplog):
  """Breaks if a folder beside train and test is ignored without a word."""
  write(
    tmp_path,
    *numbered('train/a', 3),
    *numbered('train/b', 3),
    *numbered('test/a', 2),
    *numbered('docs', 2),
  )
  write(tmp_path, *numbered('val/a', 1))
  train, test, _ = load(tmp_path)
  assert (len(train), len(test)) == (6, 2)
  assert 'docs not used' in caplog.text and '--config.data.train_split=.' in caplog.text
  assert 'val not used' in caplog.text and '--config.data.test_split=val' in caplog.text


@pytest.mark.parametrize('wrapper', ['archive', 'a/b/c', 'images', 'test'])
def test_a_folder_in_a_folder(tmp_path, caplog, wrapper):
  """Breaks if the folder that an archive unpacks to hides the classes."""
  write(tmp_path, *numbered(f'{wrapper}/cat', 5), *numbered(f'{wrapper}/dog', 5))
  (tmp_path / wrapper / 'readme.txt').write_text('x')
  train, test, lines = load(tmp_path)
  assert list(train.class_names) == ['cat', 'dog'] and len(train) + len(test) == 10
  assert wrapper in caplog.text and any('1 .txt' in line for line in lines)


def test_splits_inside_classes(tmp_path):
  """Breaks if cat/train, cat/test, dog/train, dog/test are read as two classes without splits."""
  write(
    tmp_path,
    *(p for c in ('cat', 'dog') for p in (*numbered(f'{c}/train', 3), *numbered(f'{c}/test', 2))),
  )
  train, test, _ = load(tmp_path)
  assert (len(train), len(test)) == (6, 4)
  assert list(train.class_names) == ['cat', 'dog'] and train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_nested_classes(tmp_path, caplog):
  """Breaks if sub-folders of classes change the classes, or nobody is told."""
  write(
    tmp_path, *numbered('dog/beagle', 3), *numbered('dog/husky', 3), *numbered('cat/siamese', 3)
  )
  train, test, _ = load(tmp_path)
  assert list(train.class_names) == ['cat', 'dog'] and len(train) + len(test) == 9
  assert 'no classes of their own' in caplog.text


def test_system_and_empty_folders_are_no_classes(tmp_path):
  """Breaks if a folder of an unpacker or an empty folder becomes a class, in either split."""
  write(tmp_path, *numbered('train/cat', 4), *numbered('train/dog', 4), *numbered('test/cat', 2), *numbered('test/dog', 2))  # fmt: skip
  write(
    tmp_path,
    'train/__MACOSX/x.png',
    'train/@eaDir/x.png',
    'train/.hidden/x.png',
    'train/cat/._1.png',
  )
  (tmp_path / 'test' / 'empty').mkdir()
  (tmp_path / 'train' / 'Thumbs.db').write_text('x')
  train, test, lines = load(tmp_path)
  assert (len(train), len(test), list(train.class_names)) == (8, 4, ['cat', 'dog'])
  text = '\n'.join(lines)
  assert '__MACOSX' in text and 'empty' in text


def test_classes_are_in_natural_order(tmp_path):
  """Breaks if the classes 1, 2, 10 are sorted as 1, 10, 2."""
  write(tmp_path, *(p for c in ('1', '2', '10') for p in numbered(c, 2)))
  assert list(load(tmp_path)[0].class_names) == ['1', '2', '10']


def test_the_held_out_images(tmp_path):
  """Breaks if commands hold out other images, a class is missing, or training and test images overlap."""
  write(tmp_path, *numbered('a', 10), *numbered('b', 5), *numbered('c', 1))
  train, test, lines = load(tmp_path)
  assert 'held out: 20% of each class, seed 0' in lines[0]
  assert np.bincount(test.labels, minlength=3).tolist() == [2, 1, 0]
  assert sorted([*train.names(), *test.names()]) == sorted(
    [*numbered('a', 10), *numbered('b', 5), *numbered('c', 1)]
  )
  recipe = config.load('simclr_images', discover.fields(str(tmp_path))).data
  assert data.load(recipe, 'test').names() == test.names()
  assert data.load(recipe, 'train').names() == train.names()
  write(tmp_path, *numbered('d', 10))  # another class does not change the choice in this one
  assert [n for n in load(tmp_path)[1].names() if n[0] != 'd'] == test.names()
  other = load(tmp_path, **{'data.holdout_seed': 2**31 + 5})[1]
  assert other.names() != load(tmp_path)[1].names()
  everything, none, _ = load(tmp_path, **{'data.holdout': 0})
  assert len(everything) == 26 and none is None


def test_unlabelled_images_are_all_trained_on(tmp_path):
  """Breaks if images without labels are held out for evaluations that need labels."""
  write(tmp_path, *numbered('.', 10))
  train, test, lines = load(tmp_path)
  assert len(train) == 10 and test is None and 'no labels' in lines[0]


def test_a_test_split_without_labels(tmp_path):
  """Breaks if an unlabelled test folder, as in competitions, makes evaluations impossible."""
  write(tmp_path, *numbered('train/cat', 10), *numbered('train/dog', 10), *numbered('test', 5))
  train, test, lines = load(tmp_path)
  assert (len(train), len(test)) == (16, 4) and test.labelled
  assert 'test has no labels' in lines[0]


def test_lists_of_folders(tmp_path, caplog):
  """Breaks if several folders are not read as one data set with common classes."""
  write(tmp_path / 'one', *numbered('cat', 5), *numbered('dog', 5))
  write(tmp_path / 'two', *numbered('cat', 5), *numbered('bird', 5))
  train, test, _ = load(f'{tmp_path / "one"},{tmp_path / "two"}')
  assert len(train) + len(test) == 20 and list(train.class_names) == ['bird', 'cat', 'dog']
  write(tmp_path / 'three', *numbered('train/cat', 2), *numbered('test/cat', 2))
  with pytest.raises(ConfigError, match='must have one layout'):
    discover.fields(f'{tmp_path / "one"},{tmp_path / "three"}')
  with pytest.raises(ConfigError, match='nowhere is not a folder'):
    discover.fields(f'{tmp_path / "one"},nowhere')
  write(tmp_path / 'a,b', *numbered('cat', 2))
  assert len(load(tmp_path / 'a,b')[0]) == 2


def table(path, rows, delimiter=','):
  path.write_text('\n'.join(delimiter.join(row) for row in rows) + '\n')
  return path


@pytest.mark.parametrize('delimiter', [',', ';', '\t', '|'])
@pytest.mark.parametrize(
  'header', [('path', 'label'), ('Image_ID', 'Breed'), ('file name', 'class'), None]
)
def test_tables(tmp_path, header, delimiter):
  """Breaks if a table of paths and labels is not read, whatever its header and delimiter."""
  write(tmp_path / 'images', *(f'{i}.jpg' for i in range(10)))
  rows = [(f'images/{i}.jpg', 'yes' if i % 2 else 'no') for i in range(10)]
  file = table(tmp_path / 'labels.csv', [header, *rows] if header else rows, delimiter)
  train, test, _ = load(file)
  assert (len(train), len(test)) == (8, 2) and list(train.class_names) == ['no', 'yes']
  assert all(int(name[0]) % 2 == label for name, label in zip(train.names(), train.labels))


def test_tables_with_splits_and_ids(tmp_path):
  """Breaks if ids without a suffix, quoted labels, a byte order mark or a column of splits are not understood."""
  write(tmp_path / 'photos', *(f'id {i}.png' for i in range(6)))
  rows = [f'"id {i}","a, b" ,{"Train" if i < 4 else "Valid"}' if i % 2 else f'id {i},c,{"Train" if i < 4 else "Valid"}' for i in range(6)]  # fmt: skip
  (tmp_path / 'x.csv').write_text(
    '\ufeffid,target,subset\r\n' + '\r\n'.join(rows), encoding='utf-8'
  )
  train, test, lines = load(tmp_path / 'x.csv')
  assert (len(train), len(test)) == (4, 2) and list(train.class_names) == ['a, b', 'c']
  assert "labels in 'target'" in '\n'.join(lines)
  unlabelled = table(tmp_path / 'list.txt', [('photos/id 1.png',), ('photos/id 2.png',)])
  assert len(load(unlabelled)[0]) == 2 and not load(unlabelled)[0].labelled
  fields = discover.fields(str(tmp_path / 'photos'), {'data.table': str(tmp_path / 'x.csv')})
  with_folder = config.load('simclr_images', fields)
  assert len(data.load(with_folder.data, 'train')) == 4


@pytest.mark.parametrize(
  'rows, message',
  [
    ([('path', 'label'), ('0.jpg', 'a'), ('missing.jpg', 'b')], "1 of 2 images do not exist, the first: 'missing.jpg'"),
    ([('0.jpg', 'a'), ('0.jpg', 'b')], 'has two labels'),
    ([('path', 'label')], 'has a header and no rows'),
    ([('path', 'label', 'split'), ('0.jpg', 'a', '3'), ('1.jpg', 'b', '4')], 'none of which means train'),
  ],
)  # fmt: skip
def test_wrong_tables_are_one_sentence(tmp_path, rows, message):
  """Breaks if a wrong table is a traceback, or images are lost."""
  write(tmp_path, '0.jpg', '1.jpg')
  with pytest.raises(ConfigError, match=message):
    load(table(tmp_path / 'labels.csv', rows))


def test_tables_that_do_harm(tmp_path):
  """Breaks if a pipe or a device as a table or in one blocks the program, or a cell of a million letters is a traceback."""
  write(tmp_path, '0.jpg', '1.jpg')
  os.mkfifo(tmp_path / 'pipe.csv')
  (tmp_path / 'zero.csv').symlink_to('/dev/zero')
  for name in ('pipe.csv', 'zero.csv'):
    fields = {'data.table': str(tmp_path / name)}
    with pytest.raises(ConfigError, match=f'{name} is no regular file'):
      discover.fields(str(tmp_path), fields)
  long = table(tmp_path / 'long.csv', [('path', 'label'), ('0.jpg', 'a'), ('1.jpg', 'b' * 10**6)])
  with pytest.raises(ConfigError, match='long.csv is damaged in line 3: field larger'):
    load(long)
  os.mkfifo(tmp_path / 'pipe.jpg')
  with pytest.raises(ConfigError, match="do not exist, the first: 'pipe.jpg'"):
    load(table(tmp_path / 'labels.csv', [('0.jpg', 'a'), ('pipe.jpg', 'b')]))


def test_splits_that_do_not_exist(tmp_path, capsys):
  """Breaks if a misspelt split is not reported with the folders that exist."""
  write(tmp_path, *numbered('train/a', 2), *numbered('train/b', 2), *numbered('test/a', 2))
  message = fails(capsys, 'check-data', f'--data={tmp_path}', '--config.data.test_split=tset')
  assert "test, train, did you mean 'test'?" in message
  write(tmp_path / 'only', *numbered('val/a', 2), *numbered('test/a', 2))
  assert 'no training split' in fails(capsys, 'check-data', f'--data={tmp_path / "only"}')


def test_splits_that_the_user_sets(tmp_path):
  """Breaks if a split that the user names is replaced by one that was found."""
  write(tmp_path, *(path for c in ('bus', 'car', 'train') for path in numbered(c, 4)))
  fields = {'data.train_split': 'train'}
  recipe = config.load('simclr_images', {**discover.fields(str(tmp_path), fields), **fields})
  assert len(data.load(recipe.data, 'train')) == 4
  write(tmp_path / 'x', *numbered('val/a', 2), *numbered('test/a', 3))
  fields = {'data.train_split': 'val', 'data.test_split': 'test'}
  recipe = config.load('simclr_images', {**discover.fields(str(tmp_path / 'x'), fields), **fields})
  assert [len(x) for x in data.load_splits(recipe.data)] == [2, 3]


@pytest.mark.parametrize(
  'name', ['trainer', 'latest', 'contest', 'devil', 'validator', 'trains', 'testament']
)
def test_words_that_contain_names_of_splits(name):
  """Breaks if a class such as 'trainer' or 'contest' is taken for a split."""
  if name != 'trains':
    assert layout.role(name) == ''


def test_fingerprints_of_folders(tmp_path):
  """Breaks if a moved folder has another fingerprint, or a replaced image of equal size has not."""
  first = write(tmp_path / 'one', *numbered('a', 3), *numbered('b', 3))
  second = write(tmp_path / 'two', *numbered('a', 3), *numbered('b', 3))
  fingerprints = [load(x)[0].fingerprint() for x in (first, second)]
  assert fingerprints[0] == fingerprints[1]
  write(second, *numbered('b', 3), side=9)
  assert load(second)[0].fingerprint() != fingerprints[0]


@pytest.fixture(autouse=True)
def _remarks(caplog):
  """Remarks on a folder are logged once per process: tests start without any."""
  caplog.set_level(logging.WARNING)
  discover._reported.clear()
