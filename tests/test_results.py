"""Results of evaluations: the table, chance and intervals, and the file that several processes write."""

import json
import multiprocessing

import numpy as np
import pytest

from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import results


def result(top1=54.9, **fields):
  rows = {'untrained': [[34.4, None]], 'pretrained': [[top1, None]]}
  return {'title': 'kNN, k = 20', 'columns': ['top-1 %'], 'rows': rows, **fields}


def about(fingerprint=1, folder='/data/flowers', **fields):
  part = {'fingerprint': fingerprint, 'images': 10, 'split': 'test', 'dir': folder}
  return {
    'step': 7,
    'checkpoint': 5,
    'data': {'train': {**part, 'split': 'train'}, 'test': part},
    **fields,
  }


def test_wilson_interval():
  """Breaks if the interval is another one; the values are those of R's prop.test without correction."""
  assert results.interval(50, 100) == pytest.approx([40.38315, 59.61685], abs=1e-4)
  assert results.interval(0, 10) == pytest.approx([0, 27.75328], abs=1e-4)
  assert results.interval(100, 10) == pytest.approx([72.24672, 100], abs=1e-4)
  assert results.interval(None, 10) is None and results.interval(float('nan'), 10) is None


def test_chance_intervals_and_a_note():
  """Breaks if chance is not that of the test images, or a useless pretraining is not reported."""
  labels = np.repeat([0, 1, 2], [60, 30, 10])
  assessed = results.assess(result(), labels)
  assert assessed['test_images'] == 100 and assessed['notes'] == {}
  assert assessed['chance'] == pytest.approx({'majority': 60, 'uniform': 100 / 3})
  assert results.chance(labels, 4)['uniform'] == 25
  assert assessed['interval']['pretrained'] == [results.interval(54.9, 100)]
  close = results.assess(result(40.0), labels)['notes']['pretraining does not help here']
  assert 'untrained 34.4' in close and 'not larger than the 95 % interval' in close
  assert (
    'negative' in results.assess(result(20.0), labels)['notes']['pretraining does not help here']
  )
  two = result(columns=['top-1 %', 'parameters'])
  two['rows'] = {'student': [[50.0, None], [3.0, None]]}
  assert results.assess(two, labels, [100, None])['interval']['student'][1] is None


def test_table_shows_chance_images_and_intervals_in_100_columns():
  """Breaks if a number is missing from the table, or many columns make it wider than a terminal."""
  many = result(columns=[f'{n} per class' for n in (1, 2, 5, 10, 20, 50)])
  many['rows'] = {name: [[54.92, 0.31]] * 6 for name in ('raw pixels', 'pretrained')}
  text = results.table({**results.assess(many, np.arange(1500) % 10), **about()})
  assert text.count('54.9 ± 0.3 [52.4, 57.4]') == 12 and max(map(len, text.splitlines())) <= 100
  assert '1,500 test images; chance 10.0 % (most frequent class), 10 % (1 of 10 classes)' in text
  assert text.startswith('kNN, k = 20, flowers/test (step 7)')
  old = results.table({**result(), 'step': 3})
  assert old.splitlines()[0] == 'kNN, k = 20 (step 3)' and '54.9' in old


def test_results_on_other_data_stand_beside_each_other(tmp_path):
  """Breaks if a result replaces one on other images, or does not replace one on the same images elsewhere."""
  results.save(tmp_path, 'knn', result(1.0), about(1))
  results.save(tmp_path, 'knn', result(2.0), about(2, '/data/birds'))
  results.save(tmp_path, 'knn', result(3.0), about(1, '/moved/flowers'))
  results.save(tmp_path, 'knn', result(4.0), about(2, '/data/birds'))
  results.save(tmp_path, 'probe', result(5.0), about(2))
  entries = results.load(tmp_path)
  means = {key: entry['rows']['pretrained'][0][0] for key, entry in entries.items()}
  other = next(key for key in means if key.startswith('knn, birds/test ('))
  assert means == {'knn': 3.0, other: 4.0, 'probe': 5.0}
  assert entries[other]['name'] == 'knn' and entries[other]['checkpoint'] == 5
  assert entries[other]['data']['test']['dir'] == '/data/birds'


def test_transfer_to_more_data_sets_replaces_the_result(tmp_path):
  """Breaks if repeating a command after a missing data set was added leaves two results."""
  one = {'a train': {'fingerprint': 1, 'dir': '/d/a'}, 'a test': {'fingerprint': 2, 'dir': '/d/a'}}
  two = {**one, 'b train': {'fingerprint': 3, 'dir': '/d/b'}}
  for data in (one, two):
    results.save(tmp_path, 'transfer', result(), {'step': 1, 'data': data})
  assert set(results.load(tmp_path)) == {'transfer'}
  results.save(
    tmp_path,
    'transfer',
    result(),
    {'step': 1, 'data': {'c test': {'fingerprint': 9, 'dir': '/d/c'}}},
  )
  assert [key.split(' (')[0] for key in results.load(tmp_path)] == ['transfer', 'transfer, c']


def test_results_of_old_versions(tmp_path):
  """Breaks if an old file cannot be read, or a result is lost whose data is not recorded."""
  (tmp_path / results.FILE).write_text(json.dumps({'knn': {**result(), 'step': 3, 'settings': {}}}))
  assert set(results.load(tmp_path)) == {'knn'}
  results.save(tmp_path, 'knn', result(60.0), about())
  entries = results.load(tmp_path)
  assert set(entries) == {'knn', 'knn, data not recorded'}
  assert entries['knn']['rows']['pretrained'] == [[60.0, None]]


@pytest.mark.parametrize(
  'text',
  ['', '{', '[]', '3', 'null', '{"knn": 3}', '{"knn": {}}', '{"knn": {"title": 1, "columns": [], "rows": {}}}',
   '{"knn": {"title": "t", "columns": [1], "rows": {}}}',
   '{"knn": {"title": "t", "columns": [], "rows": {"a": [3]}}}',
   '{"knn": {"title": "t", "columns": [], "rows": {"a": [["x", null]]}}}'],
)  # fmt: skip
def test_damaged_file(text, tmp_path):
  """Breaks if a damaged file is a traceback, or is found only after the evaluation."""
  (tmp_path / results.FILE).write_text(text)
  with pytest.raises(ConfigError, match='delete the file and evaluate again'):
    results.load(tmp_path)
  with pytest.raises(ConfigError, match='delete the file and evaluate again'):
    results.check(tmp_path)


def test_table_is_printed_before_the_file_is_written(tmp_path, capsys):
  """Breaks if a result is lost because it cannot be saved."""
  with pytest.raises(ConfigError, match='--out=FILE'):
    results.check(tmp_path / 'gone')
  with pytest.raises(OSError, match='the table was not saved'):
    results.save(tmp_path / 'gone', 'knn', result(), about())
  assert '54.9' in capsys.readouterr().out
  results.check(tmp_path / 'gone', tmp_path / 'mine.json')
  results.save(tmp_path / 'gone', 'knn', result(), about(), tmp_path / 'mine.json')
  assert set(results.load(tmp_path, tmp_path / 'mine.json')) == {'knn'}


def _save_many(folder, process):
  for i in range(30):
    results.save(folder, f'{process}-{i}', result(), about())


def test_two_processes_lose_no_result(tmp_path, capfd):
  """Breaks if a process overwrites what another one has just saved."""
  context = multiprocessing.get_context('spawn')
  processes = [context.Process(target=_save_many, args=(tmp_path, i)) for i in range(2)]
  for process in processes:
    process.start()
  for process in processes:
    process.join(120)
  assert [p.exitcode for p in processes] == [0, 0]
  assert len(results.load(tmp_path)) == 60


def test_a_planted_link_is_not_followed(tmp_path):
  """Breaks if saving in a run from elsewhere changes a file outside it."""
  (tmp_path / 'mine').write_text('precious')
  run = tmp_path / 'run'
  run.mkdir()
  for name in (results.FILE + '.new', results.LOCK):
    (run / name).symlink_to(tmp_path / 'mine')
  results.save(run, 'knn', result(), about())
  assert (tmp_path / 'mine').read_text() == 'precious' and set(results.load(run)) == {'knn'}


def test_names_in_tables_are_visible(capsys, tmp_path):
  """Breaks if the name of a data set can move the cursor or start a line of its own."""
  hostile = {
    'title': 'a\x1b[2J',
    'columns': ['top\n1'],
    'rows': {'x\r\u202ey': [[1.0, None]]},
    'notes': {'n': 'a\nb'},
  }
  results.save(tmp_path, 'knn', hostile, about())
  out = capsys.readouterr().out
  assert (
    '\x1b' not in out and '\r' not in out and '\u202e' not in out and len(out.splitlines()) == 5
  )


@pytest.mark.parametrize('change', ['"fingerprint": 1', '34.4', '"step": 7'])
def test_edited_results_are_noticed(change, tmp_path):
  """Breaks if somebody can change a number of a result without a word."""
  results.save(tmp_path, 'knn', result(34.4), about())
  path = tmp_path / results.FILE
  text = path.read_text()
  assert change in text
  path.write_text(text.replace(change, change[:-1] + '9'))
  with pytest.raises(ConfigError, match='it was edited'):
    results.load(tmp_path)
