"""Which folder of a data set is the training split, which the test split, and which are the classes.

Pure functions of a listing: nothing here reads a file.
"""

import dataclasses
import re
from collections.abc import Iterable

from simclr_jax.errors import ConfigError

TRAIN, TEST, VALIDATION = 'train', 'test', 'validation'
SPLIT_NAMES = {
  TRAIN: {'train', 'training', 'trn', 'trainval', 'trainvalidation'},
  TEST: {'test', 'testing', 'tst', 'eval', 'evaluation', 'evaluate', 'holdout', 'heldout', 'query'},
  VALIDATION: {'val', 'valid', 'validation', 'validate', 'validating', 'dev', 'development'},
}
# Words that the name of a split may contain besides one of `SPLIT_NAMES`.
FILLERS = {
  'set', 'sets', 'seg', 'image', 'images', 'img', 'imgs', 'data', 'dataset', 'split', 'folder', 'dir', 'files', 'file',
  'picture', 'pictures', 'photo', 'photos', 'sample', 'samples', 'part', 'subset', 'cropped', 'crops', 'resized', 'raw',
  'jpg', 'jpeg', 'png', 'the', 'of', 'for', 'ilsvrc', 'coco', 'classes', 'labeled', 'labelled',
}  # fmt: skip
# Folders that operating systems and programs leave behind.
SYSTEM = {
  '__macosx', '@eadir', '$recycle.bin', 'system volume information', 'lost+found', '#recycle', '__pycache__',
}  # fmt: skip
SYSTEM_FILES = {'thumbs.db', 'desktop.ini', 'ehthumbs.db', 'icon\r'}


@dataclasses.dataclass
class Node:
  """A folder: the number of images directly in it, and its sub-folders by name."""

  images: int = 0
  folders: 'dict[str, Node]' = dataclasses.field(default_factory=dict)

  def total(self) -> int:
    """Number of images in the folder and all folders below."""
    return self.images + sum(f.total() for f in self.folders.values())

  def filled(self) -> 'dict[str, Node]':
    """The sub-folders with images in them or below."""
    return {name: folder for name, folder in self.folders.items() if folder.total()}


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a folder is read.

  Attributes:
    root: the folder of the splits or classes below the data set; '' for the data set itself.
    train, test: the splits: a folder below `root`; '.' is `root` itself; in '*/train', the asterisk stands for the
      class. `test` is '' if there is none.
    remarks: what was decided, on what grounds, and the option for another reading; a sentence each.
  """

  root: str = ''
  train: str = '.'
  test: str = ''
  remarks: tuple[str, ...] = ()


def is_system(name: str) -> bool:
  """Whether a folder or file is none of the user's: hidden, or left behind by an operating system."""
  return name.startswith('.') or name.lower() in SYSTEM or name.lower() in SYSTEM_FILES


def role(name: str) -> str:
  """The split that a name stands for: `TRAIN`, `TEST`, `VALIDATION`, or '' for none.

  Letter case, separators, numbers and general words do not matter: Training, train_set, seg_train, val2017.
  """
  kind, rest = _split_word(name)
  return kind if set(rest) <= FILLERS else ''


def _split_word(name) -> tuple[str, tuple[str, ...]]:
  """The split that one of the words of a name stands for, '' for none, and the other words."""
  words = re.findall(r'[a-z]+', re.sub(r'([a-z])([A-Z])', r'\1 \2', name).lower())
  kinds, rest = [], []
  for word in words:
    stem = re.sub(r'(sets?|images?|imgs?|data|split|s)$', '', word)
    stem = re.sub(r'^(seg|img|images?|data)(?=.)', '', stem)
    kind = next((k for k, names in SPLIT_NAMES.items() if word in names or stem in names), '')
    kinds.append(kind) if kind else rest.append(word)
  if set(kinds) == {TRAIN, VALIDATION}:
    kinds = [TRAIN]  # train_val
  return (kinds[0] if len(set(kinds)) == 1 else ''), tuple(rest)


def roles(names: Iterable[str]) -> dict[str, str]:
  """Name -> its `role`. `dogs_train` counts as a split beside `dogs_test`, although `dogs` is no general word."""
  result = {name: role(name) for name in names}
  pairs: dict[tuple[str, ...], dict[str, str]] = {}
  for name in result:
    kind, rest = _split_word(name)
    if kind:
      pairs.setdefault(rest, {})[name] = kind
  for group in pairs.values():
    if TRAIN in group.values() and len(set(group.values())) > 1:
      result |= group
  return result


def splits(names: Iterable[str]) -> tuple[str, str]:
  """The training and the test split among names, '' where there is none.

  Without a test split, the validation split is the test split. Of several names for a split, the first counts.
  """
  first = {kind: name for name, kind in reversed(roles(names).items()) if kind}
  return first.get(TRAIN, ''), first.get(TEST) or first.get(VALIDATION, '')


def read(node: Node, name: str) -> Layout:
  """Finds splits and classes.

  Args:
    node: the folder of a data set.
    name: of the folder, for messages.

  Raises:
    ConfigError: there are splits for evaluation, but no training split.
  """
  remarks: list[str] = []
  root, node = _unwrapped(node, name, remarks)
  place = f'{name}/{root}' if root else name
  folders = node.filled() or node.folders
  kinds = roles(folders)
  split_kinds = {n: k for n, k in kinds.items() if k}
  classes = [n for n in folders if not kinds[n]]
  per_class = _splits_in_classes(folders) if not split_kinds else None
  if per_class:
    train, test = (f'*/{split}' if split else '' for split in per_class)
    remarks.append(
      f'{place}: every class has the splits {", ".join(s for s in per_class if s)} in its folder'
    )
    return Layout(root, train, test, tuple(remarks))
  alone = len(folders) == 1 and TRAIN not in kinds.values()
  if not split_kinds or alone or _are_classes(folders, split_kinds, classes):
    if split_kinds and not alone:
      first = next(iter(split_kinds))
      remarks.append(
        f'{place}: the {len(folders)} sub-folders are read as classes, {_list(split_kinds)} included, because '
        f'{_list(classes[:3])} are beside it; if {first} is the training split: '
        f'--config.data.train_split={first}'
      )
    remarks += _class_remarks(node, place)
    return Layout(root, '.', '', tuple(remarks))
  return _read_splits(node, place, root, split_kinds, classes, remarks)


def _unwrapped(node, name, remarks) -> tuple[str, Node]:
  """The folder inside folders that hold nothing else, as archives unpack, and its path."""
  path: list[str] = []
  while True:
    filled = node.filled()
    if node.images or len(filled) != 1:
      break
    (inner, folder), *_ = filled.items()
    if not folder.filled() or role(inner) == TRAIN:
      break
    path.append(inner)
    node = folder
  if path:
    remarks.append(
      f'{name}: all images are in {"/".join(path)}, so {name}/{"/".join(path)} is read'
    )
  return '/'.join(path), node


def _are_classes(folders, split_kinds, classes) -> bool:
  """Whether folders with the names of splits are classes among others."""
  if not classes:
    return False
  if TRAIN not in split_kinds.values():
    return True
  if len(set(split_kinds.values())) > 1:  # a training split beside a test split
    return False
  # Only a training split: it is one if it has class folders, and the folders beside it have none.
  train = next(n for n, k in split_kinds.items() if k == TRAIN)
  nested = bool(folders[train].filled())
  return not nested or any(folders[n].filled() for n in classes)


def _splits_in_classes(folders) -> tuple[str, str] | None:
  """The splits of classes that each have their own: cat/train, cat/test, dog/train, dog/test."""
  if len(folders) < 2:
    return None
  names = [frozenset(f.filled()) for f in folders.values()]
  if len(set(names)) != 1 or any(f.images for f in folders.values()):
    return None
  kinds = list(roles(names[0]).values())
  if not all(kinds) or len(set(kinds)) < len(kinds) or TRAIN not in kinds:
    return None
  return splits(names[0])


def _read_splits(node, place, root, split_kinds, classes, remarks) -> Layout:
  by_kind: dict[str, list[str]] = {}
  for n, kind in split_kinds.items():
    by_kind.setdefault(kind, []).append(n)
  if TRAIN not in by_kind:
    raise ConfigError(
      f'{place} has {_list(split_kinds)}, but no training split: name the folder to train on with '
      '--config.data.train_split=FOLDER'
    )
  train, *others = sorted(by_kind[TRAIN], key=lambda n: -node.folders[n].total())
  tests = [*by_kind.get(TEST, []), *by_kind.get(VALIDATION, [])]
  test = tests[0] if tests else ''
  if not (train.lower() == 'train' and test.lower() in ('', 'test', 'val', 'validation')):
    remarks.append(
      f'{place}: {train} is the training split' + (f', {test} the test split' if test else '')
    )
  ignored = [*others, *tests[1:]]
  if ignored:
    remarks.append(
      f'{place}: {_list(ignored)} not used; to evaluate on it: --config.data.test_split={ignored[0]}'
    )
  if classes:
    remarks.append(
      f'{place}: {_list(classes)} not used, because {_list(split_kinds)} are splits; to read all folders as classes: '
      '--config.data.train_split=. --config.data.test_split='
    )
  if node.images:
    remarks.append(f'{place}: {node.images:,} images beside the splits are not used')
  paths = [_inner(node.folders[s], s) if s else '' for s in (train, test)]
  remarks += _class_remarks(_at(node, paths[0]), f'{place}/{paths[0]}')
  return Layout(root, paths[0], paths[1], tuple(remarks))


def _inner(node, path):
  """The split inside a folder of the same kind, such as seg_train/seg_train."""
  while not node.images and len(node.filled()) == 1:
    ((name, folder),) = node.filled().items()
    if role(name) != role(path.split('/')[-1]) or not role(name):
      break
    path, node = f'{path}/{name}', folder
  return path


def _at(node, path):
  for name in path.split('/'):
    node = node.folders[name]
  return node


def _class_remarks(node, place):
  """Sentences on nested classes and on images outside the classes."""
  folders = node.filled()
  nested = [n for n, f in folders.items() if f.filled()]
  if len(folders) > 1 and node.images:
    yield (
      f'{place}: {node.images:,} images lie outside its {len(folders)} sub-folders, so the sub-folders are no classes'
    )
  elif len(folders) > 1 and nested:
    inner = next(iter(folders[nested[0]].filled()))
    yield (
      f'{place}: the classes are its {len(folders)} sub-folders; folders inside them, such as {nested[0]}/{inner}, are '
      f'no classes of their own; for those: --data={place}/{nested[0]}'
    )


def _list(names) -> str:
  names = list(names)
  return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')
