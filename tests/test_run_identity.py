"""A run knows its recipe, its images and its length: other images, edited files, extensions, warm starts."""

import json
import os
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from common import records
from conftest import TINY, fails
from PIL import Image

from simclr_jax import cli, config, data, methods, recorder, run_config, runs, train
from simclr_jax.errors import ConfigError
from simclr_jax.runs import load_encoder
from simclr_jax.runtime import checkpoint

SETTINGS = {**TINY, 'steps': '4', 'checkpoint_every_steps': '2', 'data.holdout': '0'}


def pretrain(workdir, data, **changes):
  """The arguments of a short training."""
  settings = {**SETTINGS, **changes}
  return [
    'pretrain', '--config=simclr_digits', f'--workdir={workdir}', f'--data={data}',
    *(f'--config.{k}={v}' for k, v in settings.items()),
  ]  # fmt: skip


def write_images(path, seed):
  """An npz file with 64 images of 28 x 28 pixels and their labels."""
  rng = np.random.default_rng(seed)
  path.parent.mkdir(parents=True, exist_ok=True)
  images = rng.integers(0, 256, (64, 28, 28, 3), dtype=np.uint8)
  np.savez(path, images=images, labels=np.arange(64) % 10)
  return path


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  """A data set."""
  return write_images(tmp_path_factory.mktemp('data') / 'one/train.npz', 1)


@pytest.fixture(scope='module')
def complete(tmp_path_factory, images):
  """A complete run on these images."""
  workdir = tmp_path_factory.mktemp('runs') / 'complete'
  assert cli.main(pretrain(workdir, images)) == 0
  return workdir


@pytest.fixture
def run(complete, tmp_path):
  """A copy of the complete run."""
  return pathlib.Path(shutil.copytree(complete, tmp_path / 'run'))


def test_other_images_are_refused(run, images, tmp_path, capsys):
  """Breaks if a run is resumed, or called complete, with images on which it was not trained."""
  other = write_images(tmp_path / 'two/train.npz', 2)
  message = fails(capsys, *pretrain(run, other))
  assert str(images.parent) in message and str(other.parent) in message and '--workdir' in message


def test_a_moved_data_set_is_accepted(run, images, tmp_path, capsys):
  """Breaks if equal images in another folder are refused."""
  moved = tmp_path / 'moved/train.npz'
  moved.parent.mkdir()
  shutil.copy(images, moved)
  assert cli.main(pretrain(run, moved)) == 0
  assert 'is complete: 4 steps' in capsys.readouterr().out


def test_replaced_images_are_refused(tmp_path, capsys):
  """Breaks if images that were replaced in their folder are not noticed."""
  data = write_images(tmp_path / 'data/train.npz', 1)
  assert cli.main(pretrain(tmp_path / 'run', data)) == 0
  write_images(data, 2)
  assert 'was trained on other images' in fails(capsys, *pretrain(tmp_path / 'run', data))


def test_checkpoints_record_images_and_checksum(complete, images):
  """Breaks if an encoder does not know which images and which checkpoint it comes from."""
  provenance = load_encoder(complete).provenance
  recorded = json.loads((complete / 'config.json').read_text())['images']
  assert provenance['images'] == recorded
  assert recorded['place'] == str(images.parent) and recorded['images'] == 64
  assert provenance['step'] == 4 and len(provenance['checksum']) == 8


@pytest.mark.parametrize('field, value', [('image_size', 20), ('augment.eval', 'center_crop(0.5)')])
def test_edited_config_is_noticed(run, caplog, field, value):
  """Breaks if an edited config.json changes how a run is evaluated, or nobody is told."""
  path = run / 'config.json'
  contents = json.loads(path.read_text())
  before = contents['config']
  *group, key = field.split('.')
  part = before[group[0]] if group else before
  old, part[key] = part[key], value
  path.write_text(json.dumps(contents))
  recipe = config.flatten(run_config.load(run))
  assert recipe[field] == old
  assert f'{field}: {old!r} -> {value!r}' in caplog.text and 'config.json was edited' in caplog.text


def test_edited_export_is_refused(complete, tmp_path, capsys):
  """Breaks if an edited encoder.json changes the features of an export."""
  out = tmp_path / 'encoder'
  assert cli.main(['export', f'--workdir={complete}', '--to=orbax', f'--out={out}']) == 0
  assert load_encoder(out).architecture['normalize'] == 'none'
  text = (out / 'encoder.json').read_text()
  (out / 'encoder.json').write_text(text.replace('"normalize": "none"', '"normalize": "imagenet"'))
  capsys.readouterr()
  message = fails(
    capsys, 'embed', f'--workdir={out}', '--data=digits', f'--out={tmp_path / "x.npy"}'
  )
  assert 'encoder.json was edited' in message


def test_extend(run, images, capsys):
  """Breaks if a complete run cannot be trained longer, or the new schedule is not reported and recorded."""
  longer = pretrain(run, images, steps='8')
  assert '--extend' in fails(capsys, *longer)
  assert cli.main([*longer, '--extend']) == 0
  out = capsys.readouterr().out
  assert 'extended at step 4: the cosine schedule now covers all 8 steps' in out
  assert 'resuming' in out and 'complete: 8 steps' in out
  assert [r['step'] for r in records(run)] == [1, 2, 3, 4, 5, 6, 7, 8]
  rates = [r['learning_rate'] for r in records(run)]
  np.testing.assert_allclose(rates[4:], [rates[0] * (1 + np.cos(np.pi * s / 8)) / 2 for s in range(4, 8)], rtol=1e-5)  # fmt: skip
  contents = json.loads((run / 'config.json').read_text())
  assert contents['config']['steps'] == 8
  assert [(e['from_step'], e['steps']) for e in contents['extended']] == [(4, 4)]
  assert cli.main(['pretrain', f'--workdir={run}']) == 0
  assert 'is complete: 8 steps' in capsys.readouterr().out


def test_interrupted_extension_resumes(run, images):
  """Breaks if the same command with --extend=EPOCHS extends an interrupted extension once more."""

  class Stop(train.recorder.Callback):
    def on_step(self, step, metrics):
      return step >= 6

  recipe = run_config.load(run, {'steps': 12})
  train.pretrain(recipe, run, extend=True, callbacks=[Stop()])
  assert records(run)[-1]['step'] < 12
  assert cli.main(['pretrain', f'--workdir={run}', '--extend=4']) == 0  # 8 steps more than 4
  assert records(run)[-1]['step'] == 12


def test_extend_is_refused_without_a_complete_run(tmp_path, images, run, capsys):
  """Breaks if --extend starts a new run, shortens one, or is accepted without a length."""
  assert 'no finished run' in fails(capsys, *pretrain(tmp_path / 'new', images), '--extend')
  assert 'has 4 steps already' in fails(capsys, *pretrain(run, images, steps='3'), '--extend')
  assert 'needs the new length' in fails(capsys, 'pretrain', f'--workdir={run}', '--extend')


def test_warm_start(complete, images, tmp_path, capsys):
  """Breaks if a pretraining with init_from does not start from the weights of the other run, head included."""
  warm = tmp_path / 'warm'
  fields = {'init_from': str(complete), 'learning_rate': '0', 'steps': '2'}
  assert cli.main(pretrain(warm, images, **fields)) == 0
  assert f'initialised from {complete}, with its projection head' in capsys.readouterr().out
  old, new = load_encoder(complete).variables['params'], load_encoder(warm).variables['params']
  jax.tree.map(np.testing.assert_array_equal, old, new)
  message = fails(capsys, *pretrain(tmp_path / 'x', images, init_from=tmp_path))
  assert 'neither a run directory' in message
  message = fails(
    capsys,
    *pretrain(tmp_path / 'y', images, **{'init_from': complete, 'model.width_multiplier': '0.25'}),
  )
  assert 'init_from is of another network' in message


def test_default_workdirs_differ(tmp_path, monkeypatch, capsys):
  """Breaks if two data sets of one name share a run, or a name is cut at a dot."""
  monkeypatch.chdir(tmp_path)
  from simclr_jax.commands.pretrain import default_workdir

  for project in ('A', 'B'):
    write_images(tmp_path / project / 'my.images.v2/train.npz', 1)
  first = default_workdir('A/my.images.v2')
  assert first == pathlib.Path('runs/my.images.v2')
  assert cli.main(pretrain(first, 'A/my.images.v2', steps='1')) == 0
  assert default_workdir('A/my.images.v2') == first
  assert default_workdir(str(tmp_path / 'A/my.images.v2')) == first
  capsys.readouterr()
  assert default_workdir('B/my.images.v2') == pathlib.Path('runs/my.images.v2-2')
  assert 'has a run on other data' in capsys.readouterr().out


def test_errors_come_before_the_data_is_read(run, capsys, monkeypatch):
  """Breaks if a changed recipe or a wrong field is reported only after the images were read."""
  from simclr_jax import data

  def fail(*_):
    raise AssertionError('the data was read')

  monkeypatch.setattr(data, 'load', fail)
  monkeypatch.setattr(data, 'load_splits', fail)
  arguments = pretrain(run, 'digits')
  assert 'seed: 0 -> 1' in fails(capsys, *arguments, '--config.seed=1')
  assert "no field 'sed'" in fails(capsys, *arguments, '--config.sed=1')


def test_callbacks(tmp_path, images):
  """Breaks if a callback misses a step or an epoch, gets other metrics than the log, or cannot stop a run."""
  steps, epochs = [], []

  class Recorder(train.recorder.Callback):
    def on_epoch(self, epoch, metrics):
      epochs.append((epoch, metrics['loss']))
      return epoch == 3

  def on_step(step, metrics):
    steps.append((step, metrics['loss']))

  recipe = config.load('simclr_digits', {
    **SETTINGS, 'steps': '8', 'data.source': 'arrays', 'data.dir': str(images.parent), 'data.test_split': '',
  })  # fmt: skip
  code = train.pretrain(recipe, str(tmp_path / 'run'), callbacks=[on_step, Recorder()], quiet=True)
  log = records(tmp_path / 'run')
  assert steps == [(r['step'], r['loss']) for r in log]
  assert [epoch for epoch, _ in epochs] == [
    1,
    2,
    3,
  ]  # 64 images in batches of 32: after steps 2, 4, 6
  np.testing.assert_allclose(epochs[0][1], np.mean([r['loss'] for r in log[:2]]))
  assert len(log) < 8 and code == 0


@pytest.mark.parametrize(
  'typed, meant',
  [
    ('--epochs=3', '--config.epochs=3'),
    ('--lr=1', '--config.learning_rate=1'),
    ('--batch-size=8', '--config.batch_size=8'),
    ('--depht=18', '--config.model.depth=18'),
    ('--output=x', '--workdir=x'),
    ('photos', '--data=photos'),
  ],
)
def test_near_misses_of_options(typed, meant, capsys):
  """Breaks if an option of another program is refused without the option that was meant."""
  assert f'did you mean {meant}?' in fails(capsys, 'pretrain', '--data=digits', typed)


def test_warm_start_of_moco(complete):
  """Breaks if the EMA encoder of MoCo does not start from the same weights, or a head of another size is copied."""
  recipe = config.load('moco_cifar10', {
    'init_from': str(complete), 'model.depth': 8, 'model.width_multiplier': 0.125, 'model.stem': 'strided',
    'model.variant': 'simclr', 'model.normalize': 'none', 'image_size': 28, 'queue_size': 64, 'batch_size': 64,
  })  # fmt: skip
  method = methods.build(recipe)
  params, state = method.init(jax.random.key(1), {'views': np.zeros((2, 2, 28, 28, 3), np.float32)})
  pretrained = runs.load_pretrained(recipe)
  new, new_state = method.load_pretrained(params, state, pretrained)
  same = jax.tree.map(np.array_equal, new['encoder'], pretrained['params']['encoder'])
  assert all(jax.tree.leaves(same))
  jax.tree.map(np.testing.assert_array_equal, new_state['key']['params']['encoder'], new['encoder'])
  assert new['head'] is params['head'] and not methods.head_fits(params, pretrained)


# Nothing lost: what belongs to a run is made good or read from the checkpoints.


def without_lines(workdir, text):
  """Removes the lines of metrics.jsonl that contain a text, as if the run had been killed before it wrote them."""
  path = workdir / 'metrics.jsonl'
  path.write_text(''.join(x for x in path.read_text().splitlines(True) if text not in x))


def test_the_end_of_a_run_is_made_good(run, images, capsys):
  """Breaks if a run that was killed after its last checkpoint is called complete without its last event."""
  steps = records(run)
  without_lines(run, '"complete"')
  for _ in range(2):
    assert cli.main(pretrain(run, images)) == 0
    assert 'complete: 4 steps' in capsys.readouterr().out or _
    assert (run / 'metrics.jsonl').read_text().count('"complete"') == 1
  assert records(run) == steps


def test_a_missing_online_knn_is_made_good(run):
  """Breaks if the last online kNN of a run stays missing, or a run without test images is never complete."""
  setup = types.SimpleNamespace(steps=4, test=None)
  assert recorder.missing_at_end(setup, run) == []
  assert recorder.missing_at_end(types.SimpleNamespace(steps=4, test='images'), run) == ['knn_acc']
  with (run / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "knn_acc": 0.5}\n')
  assert recorder.missing_at_end(types.SimpleNamespace(steps=4, test='images'), run) == []
  without_lines(run, '"complete"')
  assert recorder.missing_at_end(setup, run) == ['complete']


@pytest.mark.parametrize('content', [None, b'', b'{"config": 3}', b'{"config": {"method": "simclr", "a": {"b": {}}}}', b'\xff'])  # fmt: skip
def test_a_lost_config_is_read_from_the_checkpoint(run, images, content, caplog):
  """Breaks if a run whose config.json is missing or damaged can neither be read nor be resumed."""
  expected = load_encoder(run).digest()
  (run / 'config.json').unlink()
  if content is not None:
    (run / 'config.json').write_bytes(content)
  encoder = load_encoder(run)
  assert encoder.digest() == expected and encoder.provenance['config']['image_size'] == 32
  assert 'the recipe of the newest checkpoint is used' in caplog.text
  if content is None:
    assert cli.main(pretrain(run, images)) == 0 and (run / 'config.json').is_file()
  shutil.rmtree(run / 'checkpoints')
  if content is not None:
    with pytest.raises(ConfigError, match='config.json'):
      load_encoder(run)


@pytest.mark.parametrize('old, new', [('float32', 'float33'), ('"crc32"', '"crc33"'), ('"step": 4', '"step": 3'), ('{', '')])  # fmt: skip
def test_damaged_metadata_is_not_another_network(run, old, new, caplog):
  """Breaks if damage to the metadata of the newest checkpoint hides the sound one before it."""
  path = run / 'checkpoints/4/_CHECKPOINT_METADATA'
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new, 1))
  before = checkpoint.load_tree(run / 'checkpoints/2')[0]['params']['encoder']
  params = load_encoder(run).variables['params']
  jax.tree.map(np.testing.assert_array_equal, params, before)
  assert 'checkpoints/4' in caplog.text and len(caplog.text) < 1000


def test_an_interrupted_removal_of_a_checkpoint_is_finished(run, images):
  """Breaks if a part of an old checkpoint stays in a complete run, or if a checkpoint that is kept is removed."""
  (run / 'checkpoints/1/state').mkdir(parents=True)
  assert cli.main(pretrain(run, images)) == 0
  assert checkpoint.steps(run / 'checkpoints') == [2, 4]


def test_a_checkpoint_that_the_run_removes_meanwhile(run, monkeypatch, caplog):
  """Breaks if an evaluation fails because the training replaces the checkpoint that is about to be read."""
  steps, listed = checkpoint.steps, []

  def old_list(folder):
    if listed:
      return steps(folder)
    listed.append(folder)
    shutil.rmtree(folder / '2')
    return [2]

  monkeypatch.setattr(checkpoint, 'steps', old_list)
  assert load_encoder(run).provenance['step'] == 4
  assert not caplog.text


def test_a_renamed_checkpoint_is_not_used(run, caplog):
  """Breaks if a checkpoint is taken for one of another step."""
  (run / 'checkpoints/4').rename(run / 'checkpoints/9')
  assert load_encoder(run).provenance['step'] == 2 and 'checkpoints/9 was renamed' in caplog.text


def test_huge_arrays_in_small_files_are_refused(run, tmp_path):
  """Breaks if an export that declares arrays beyond its files fills the memory."""
  checkpoint.save_tree(tmp_path / 'tree', {'a': np.zeros(2**27, np.float32)}, {})
  with pytest.raises(checkpoint.CheckpointError, match='it declares 0.5 GiB'):
    checkpoint.load_tree(tmp_path / 'tree')


def test_folders_of_others_are_no_workdirs(complete, images, tmp_path, capsys):
  """Breaks if a run replaces a user's file, or deletes files behind a link in its workdir."""
  folder = tmp_path / 'mine'
  folder.mkdir()
  (folder / 'metrics.jsonl').write_text('{"epoch": 1}\n')
  assert 'is not a run, but has metrics.jsonl' in fails(capsys, *pretrain(folder, images))
  assert (folder / 'metrics.jsonl').read_text() == '{"epoch": 1}\n'
  linked = tmp_path / 'linked'
  linked.mkdir()
  (linked / 'checkpoints').symlink_to(complete / 'checkpoints')
  assert 'checkpoints is a link' in fails(capsys, *pretrain(linked, images))


def test_replaced_files_are_noticed_by_their_times(tmp_path, monkeypatch, caplog):
  """Breaks if an image that was replaced by one of equal size, outside the sample of contents, goes unnoticed."""
  for i in range(4):
    Image.fromarray(np.full((8 + i, 8, 3), i, np.uint8)).save(tmp_path / f'{i}.png')
    os.utime(tmp_path / f'{i}.png', (10**9 + i, 10**9 + i))

  def loaded():
    fields = {
      **SETTINGS,
      'data.source': 'folder',
      'data.dir': str(tmp_path),
      'data.train_split': '.',
    }
    recipe = config.load('simclr_digits', {**fields, 'data.test_split': ''})
    images = data.load(recipe.data, 'train')
    return images, train._describe_images(recipe, images)

  images, described = loaded()
  monkeypatch.setattr(checkpoint, 'newest_metadata', lambda _: {'images': described})
  train._check_images(loaded()[1], images, tmp_path)
  assert not caplog.text
  os.utime(tmp_path / '2.png', (2 * 10**9, 2 * 10**9))
  images, now = loaded()
  assert now['fingerprint'] == described['fingerprint']
  with pytest.raises(ConfigError, match='1 images were changed after .* such as 2.png'):
    train._check_images(now, images, tmp_path)
  for i in range(4):  # copied
    os.utime(tmp_path / f'{i}.png', (2 * 10**9, 2 * 10**9))
  images, now = loaded()
  train._check_images(now, images, tmp_path)
  assert 'as if they had been copied' in caplog.text
