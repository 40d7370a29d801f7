"""Fine-tuning with few labels and distillation: label subsets, frozen layers, losses, the commands."""

import json

import jax
import numpy as np
import pytest

from simclr_jax import (
  cli,
  config as recipes,
  data,
  downstream,
  losses,
  methods,
  runs,
  sharding,
  train,
  train_state,
)
from simclr_jax.commands import finetune
from simclr_jax.data import labels as subsets
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import metrics
from simclr_jax.models import classifier

TINY = {
  'data.source': 'digits', 'model.depth': '8', 'model.width_multiplier': '0.125', 'model.stem': 'strided',
  'model.head_dim': '16', 'image_size': '32', 'knn_every_epochs': '0', 'tensorboard': 'false',
}  # fmt: skip


# Subsets of the labels.


def test_subsets_are_balanced_nested_and_seeded():
  """Breaks if classes have different numbers of labels, or the 10 % subset does not contain the 1 %
  subset.
  """
  labels = np.random.default_rng(0).integers(0, 5, 1000)
  labels[:300] = 3  # many of one class
  few, more = subsets.balanced_subset(labels, 4, 7), subsets.balanced_subset(labels, 40, 7)
  assert (np.bincount(labels[few]) == 4).all() and (np.bincount(labels[more]) == 40).all()
  assert set(few) < set(more) and (np.diff(more) > 0).all()
  np.testing.assert_array_equal(few, subsets.balanced_subset(labels, 4, 7))
  assert set(few) != set(subsets.balanced_subset(labels, 4, 8))
  assert len(subsets.balanced_subset(labels, 10_000, 0)) == 1000
  labels[few] = -1  # without a label
  assert not set(few) & set(subsets.balanced_subset(labels, 100, 7))


@pytest.mark.parametrize(
  'text, count', [('1%', 6), ('10%', 60), ('0.5%', 3), ('.5 %', 3), ('100%', 600), ('25', 25)]
)
def test_label_fractions_and_counts(text, count):
  """Breaks if a fraction is not taken of all images, or not divided equally among the classes."""
  assert subsets.per_class(text, 6000, 10) == count


@pytest.mark.parametrize('text', ['', '1pct', '-1', '1.5', '101%', '0.01%', '0', '%', '1%2'])
def test_invalid_label_counts_are_refused(text):
  """Breaks if a misspelt number of labels is read as another number, or as 0."""
  with pytest.raises(ConfigError, match='data.labels='):
    subsets.per_class(text, 6000, 10)


def test_unlabelled_images_are_kept_or_dropped():
  """Breaks if a hidden label is visible, or an image without a label is dropped when it must be
  kept.
  """
  c = recipes.load('simclr_digits').data
  complete = data.load(c, 'train')
  with c.unlocked():
    c.labels, c.label_seed = '1%', 3
  hidden = data.load(c, 'train')
  with c.unlocked():
    c.unlabelled = 'drop'
  dropped = data.load(c, 'train')
  labelled = hidden.labels >= 0
  assert len(hidden) == 6000 and labelled.sum() == len(dropped) == 60 and not hidden.labelled
  np.testing.assert_array_equal(hidden.labels[labelled], complete.labels[labelled])
  np.testing.assert_array_equal(dropped.images, complete.images[labelled])
  assert len(data.load(c, 'test')) == 1188
  with c.unlocked():
    c.labels = '601'
  with pytest.raises(ConfigError, match='data.labels=601, but a class has only'):
    data.load(c, 'train')


# Fine-tuning.


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """The workdir of a short SimCLR run, whose BatchNorm statistics are not the initial ones."""
  folder = tmp_path_factory.mktemp('runs') / 'pretrained'
  recipe = recipes.load(
    'simclr_digits', {**TINY, 'steps': '3', 'batch_size': '32', 'warmup_epochs': '0'}
  )
  assert train.pretrain(recipe, folder, quiet=True) == 0
  return folder


def fine_tune(pretrained, steps=3, **fields):
  """Some steps of fine-tuning: (params, state) before and after, the method, the last metrics."""
  values = {'data.labels': '1%', 'data.num_classes': '10', 'batch_size': '32', 'optimizer': 'nesterov', 'learning_rate': '0.03', 'weight_decay': '0.1',
            'init_from': str(pretrained), **fields}  # fmt: skip
  recipe = recipes.load('finetune_small', {**TINY, **values})
  state, step = train_state.build(
    recipe, data.load(recipe.data, 'train'), pretrained=runs.load_pretrained(recipe)
  )
  before = jax.device_get((state.params, state.state))
  for i in range(steps):
    state, metrics = step(state, i)
  step.loader.close()
  return before, jax.device_get((state.params, state.state)), methods.build(recipe), metrics


def leaves(tree):
  """The leaves of a tree by path."""
  return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_fine_tuning_starts_from_the_pretrained_weights(pretrained):
  """Breaks if a layer or a BatchNorm statistic is not the pretrained one, or the classifier is not
  zero-initialised.
  """
  recipe = recipes.load('finetune_small', {**TINY, 'init_from': str(pretrained), 'head_layer': 1})
  pretrained_weights = leaves(runs.load_pretrained(recipe))
  before, _, method, _ = fine_tune(pretrained, 1, head_layer='1')
  initial = leaves(jax.device_get(method.classifier(*before)))
  for name, value in initial.items():
    expected = 0 if 'classifier' in name else pretrained_weights[name]
    np.testing.assert_array_equal(value, expected, name)
  assert "['params']['head']['dense1']['kernel']" in initial
  assert not any('dense2' in name or 'bn2' in name and 'head' in name for name in initial)


@pytest.mark.parametrize(
  'optimizer, block, frozen',
  [
    pytest.param('nesterov', -1, (), marks=pytest.mark.slow),
    pytest.param('nesterov', 0, ('stem',), marks=pytest.mark.slow),
    ('nesterov', 1, ('stem', 'group1')),
    pytest.param('nesterov', 4, ('stem', 'group1', 'group2', 'group3'), marks=pytest.mark.slow),
    pytest.param('lars', 1, ('stem', 'group1'), marks=pytest.mark.slow),
    pytest.param('adamw', 1, ('stem', 'group1'), marks=pytest.mark.slow),
  ],
)
def test_only_frozen_layers_stay_unchanged(pretrained, block, frozen, optimizer):
  """Breaks if weight decay, momentum or BatchNorm statistics change a frozen layer by one bit, or
  another layer is not trained.
  """
  before, after, method, _ = fine_tune(
    pretrained, fine_tune_after_block=str(block), optimizer=optimizer
  )
  before, after = (leaves(jax.device_get(method.classifier(*x))) for x in (before, after))
  assert before.keys() == after.keys()
  for name in before:
    is_frozen = any(f"['encoder']['{part}" in name for part in frozen)
    assert (before[name] == after[name]).all() == is_frozen, name


def test_frozen_encoder_is_a_linear_classifier_on_its_features(pretrained):
  """Breaks if a frozen BatchNorm normalises with batch statistics: only with running statistics is
  this a linear probe.
  """
  _, after, method, step_metrics = fine_tune(
    pretrained,
    1,
    fine_tune_after_block='4',
    head_layer='0',
    learning_rate='0.02',
    **{'augment.view1': 'center_crop(1)'},
  )
  recipe = recipes.load('finetune_small', {**TINY, 'data.labels': '1%'})
  labelled = data.load(recipe.data, 'train')
  encoder = runs.load_encoder(pretrained)
  h = encoder(labelled.images)
  from simclr_jax.data import order

  index = order.rows(0, 0, 32, 60)['index']
  one_hot = np.eye(10)[labelled.labels[index]]
  gradient = h[index].T @ (0.1 - one_hot) / 32  # zero classifier: all classes have probability 0.1
  expected = -0.02 * (1 + 0.9) * gradient  # Nesterov's first step, momentum 0.9
  np.testing.assert_allclose(after[0]['classifier']['kernel'], expected, atol=1e-6)
  np.testing.assert_allclose(step_metrics['loss'], np.log(10), atol=1e-6)


@pytest.mark.slow
def test_pretrained_weights_of_another_network_are_refused(pretrained):
  """Breaks if weights of another shape are loaded in part, or the error does not name the field."""
  for field, value in {
    'model.width_multiplier': '0.25',
    'model.depth': '18',
    'head_layer': '3',
  }.items():
    with pytest.raises(ConfigError, match='init_from is of another network|head_layer=3'):
      fine_tune(pretrained, **{field: value})
  with pytest.raises(ConfigError, match='/nowhere is neither a run directory'):
    fine_tune('/nowhere')


@pytest.mark.parametrize(
  'command, field, message',
  [
    ('finetune', 'seed=5', '--seeds'),
    ('finetune', 'data.label_seed=7', '--seeds'),
    ('finetune', 'data.labels=3', '--labels'),
    ('finetune', 'data.num_classes=3', 'are counted'),
    ('finetune', 'init_from=x', '--workdir'),
    ('finetune', 'epochs=3', 'sets steps=200: use --config.steps'),
    ('distill', 'seed=5', 'of its teacher'),
    ('distill', 'teacher=x', '--teacher'),
  ],
)
def test_fields_without_effect_are_refused(command, field, message, capsys):
  """Breaks if a field that the command sets itself, or that has no effect, is accepted."""
  given = {'finetune': ['--workdir=run'], 'distill': ['--workdir=students', '--teacher=run']}
  assert cli.main([command, *given[command], f'--config.{field}']) == 2
  error = capsys.readouterr().err
  assert message in error and f'--config.{field.split("=")[0]}' in error


def test_fields_that_select_the_images_have_an_effect(pretrained, capsys):
  """Breaks if another split is accepted and ignored, or labels that the pretraining hid stay hidden."""
  arguments = ['finetune', f'--workdir={pretrained}', '--config.data.test_split=nowhere']
  assert cli.main(arguments) == 2
  assert 'nowhere' in capsys.readouterr().err
  fields = finetune.data_fields({'data.train_split': 'x', 'steps': '3'})
  assert fields == {'data.labels': '', 'data.train_split': 'x'}


def test_training_from_scratch_is_a_recipe_of_its_own():
  """Breaks if the baseline keeps the rate, the length or the frozen layers of the fine-tuning."""
  source = recipes.load('simclr_digits', TINY)
  images = data.load(source.data, 'train')
  tuned, subset = downstream.with_labels(
    downstream.recipe('finetune_small', source, {'fine_tune_after_block': 2}), images, '1%', 3
  )
  scratch = downstream.from_scratch(tuned, subset)
  assert (scratch.init_from, scratch.head_layer, scratch.fine_tune_after_block) == ('', 0, -1)
  assert (tuned.steps, scratch.steps, scratch.batch_size) == (200, 400, 60)
  assert (scratch.optimizer, scratch.learning_rate) == ('adamw', 3e-3)
  assert scratch.warmup_epochs * len(subset) / scratch.batch_size == pytest.approx(40)
  assert (scratch.seed, scratch.data.label_seed, scratch.data.labels) == (3, 3, '1%')
  assert 'simclr_crop(area_min=0.5' in scratch.augment.view1 and 'flip' not in scratch.augment.view1
  more, subset = downstream.with_labels(tuned, images, '50%', 0, 10)
  assert more.steps == 500  # 10 epochs of 3,000 images in batches of 60
  assert downstream.least_epochs('finetune_small', {'steps': 3}) == 0
  assert downstream.least_epochs('finetune_small', {'seed': 3}) == 10
  assert downstream.from_scratch(more, subset).steps == 1500  # 30 epochs of 3,000 images
  chosen = downstream.from_scratch(tuned, subset, downstream.Scratch(7, 0.5))
  assert (chosen.steps, chosen.learning_rate) == (7, 0.5)


@pytest.mark.parametrize('rows, devices', [(60, 6), (64, 8), (7, 7), (1, 1), (5, 5), (22, 2)])
def test_devices_share_a_batch_equally(rows, devices):
  """Breaks if a batch does not split over the devices, or fewer devices than possible are used."""
  assert len(sharding.devices_for(rows)) == devices and jax.device_count() == 8


@pytest.mark.slow
def test_fine_tuning_does_not_depend_on_the_devices(pretrained, tmp_path, monkeypatch):
  """Breaks if batch size or weights depend on the number of devices, or a run cannot be resumed on another number."""
  source = recipes.load('simclr_digits', TINY)
  images = data.load(source.data, 'train')
  weights = []
  for count, steps in ((1, 4), (8, 2), (1, 4)):  # the second run is resumed on one device
    config, subset = downstream.with_labels(
      downstream.recipe('finetune_small', source, {'steps': 4}), images, '1%', 0
    )
    assert config.batch_size == 60
    with config.unlocked():
      config.init_from = str(pretrained)
    folder = tmp_path / ('whole' if not weights else 'resumed')
    devices = jax.devices()[:count]
    monkeypatch.setattr(jax, 'devices', lambda devices=devices: devices)
    if steps == 2:
      callback = lambda step, _: step == 2  # noqa: E731
      train.pretrain(
        config,
        folder,
        '',
        subset,
        quiet=True,
        callbacks=[callback],
        devices=sharding.devices_for(60),
      )
      continue
    downstream.run(config, subset, folder, '')
    weights.append(jax.device_get(runs.load_classifier(folder).variables))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *weights)


# Distillation.


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize('temperature', [0.1, 1.0, 4.0])
def test_distillation_loss(temperature):
  """Breaks if one side ignores the temperature, or the teacher gets a gradient."""
  rng = np.random.default_rng(0)
  student, teacher = 2 * rng.normal(size=(2, 33, 10))
  p, q = softmax(teacher / temperature), softmax(student / temperature)
  expected = -(temperature**2) * np.mean(np.sum(p * np.log(q), 1))

  def loss(s, t, hard=False):
    return losses.distillation(s, t, temperature, hard)

  student32, teacher32 = np.float32(student), np.float32(teacher)
  np.testing.assert_allclose(loss(student32, teacher32), expected, rtol=1e-5)
  student_gradient, teacher_gradient = jax.grad(loss, (0, 1))(student32, teacher32)
  np.testing.assert_allclose(student_gradient, temperature * (q - p) / 33, atol=1e-6)
  assert (teacher_gradient == 0).all()
  hard_expected = -(temperature**2) * np.mean(np.log(q)[np.arange(33), teacher.argmax(1)])
  np.testing.assert_allclose(loss(student32, teacher32, True), hard_expected, rtol=1e-5)


@pytest.mark.parametrize('alpha', [pytest.param(1.0, marks=pytest.mark.slow), 0.3])
def test_alpha_weights_teacher_and_labels(pretrained, tmp_path, alpha):
  """Breaks if hidden labels contribute, alpha weights the wrong term, or the teacher is in training
  mode.
  """
  teacher = tmp_path / 'teacher'
  values = {**TINY, 'data.labels': '10%', 'data.num_classes': '10', 'batch_size': '32'}
  recipe = recipes.load(
    'finetune_small', {**values, 'init_from': str(pretrained), 'steps': '5', 'learning_rate': '0.1'}
  )
  assert train.pretrain(recipe, teacher, quiet=True) == 0
  recipe = recipes.load('distill_small', {**values, 'teacher': str(teacher), 'alpha': str(alpha),
                                          'temperature': '2', 'augment.view1': 'center_crop(1)'})  # fmt: skip
  dataset = data.load(recipe.data, 'train')
  recipe = recipes.with_examples(recipe, len(dataset))
  method = methods.build(recipe)
  images = np.float32(dataset.images[:32]) / 255
  batch = {
    'views': images[:, None],
    'label': dataset.labels[:32],
    'teacher': runs.load_teacher(recipe),
  }
  params, state = method.init(jax.random.key(0), batch)
  params['classifier']['kernel'] = jax.random.normal(jax.random.key(1), (64 // 2, 10))
  value, (new, step_metrics) = jax.jit(method.loss)(params, state, batch, jax.random.key(0))

  teacher_logits = np.float64(runs.load_classifier(teacher)(dataset.images[:32]))
  # The student is in training mode: its logits depend on the batch statistics.
  net = classifier.build(recipe.model, 10, recipe.head_layer)
  _, logits, _ = net.apply(method.classifier(params, state), images, True)
  logits = np.float64(logits)
  distilled = -4 * np.mean(np.sum(softmax(teacher_logits / 2) * np.log(softmax(logits / 2)), 1))
  labelled = dataset.labels[:32] >= 0
  assert 0 < labelled.sum() < 32
  entropy = -np.log(softmax(logits)[np.arange(32), dataset.labels[:32]])[labelled].mean()
  expected = alpha * distilled + (1 - alpha) * entropy
  np.testing.assert_allclose(value, expected, rtol=1e-4)
  assert ('train_acc' in step_metrics) == (alpha < 1)


# Evaluations.


def test_each_test_image_is_evaluated_once(pretrained, tmp_path):
  """Breaks if padding rows of the last batch are evaluated, or an image is not."""
  recipe = recipes.load('finetune_small', {**TINY, 'data.labels': '5', 'data.num_classes': '10',
                                           'init_from': str(pretrained), 'steps': '4', 'batch_size': '32'})  # fmt: skip
  assert train.pretrain(recipe, tmp_path, quiet=True) == 0
  test = data.load(recipe.data, 'test').subset(np.arange(77))
  result, fine_tuned = downstream.test(tmp_path, test), runs.load_classifier(tmp_path)
  assert result['images'] == 77 and np.sum(result['confusion']) == 77
  forward = classifier.forward(fine_tuned.architecture)
  logits = np.asarray(forward(fine_tuned.variables, np.float32(test.images) / 255))
  assert result['top1'] == pytest.approx(metrics.top_k(logits, test.labels))
  batched, _ = fine_tuned.embed(test, batch_size=16)
  np.testing.assert_allclose(batched, logits, atol=1e-4)


@pytest.mark.slow
def test_finetune_and_distill_commands(pretrained, tmp_path, capsys):
  """Breaks if a command fails, its table lacks a row, or running it again trains finished runs
  again.
  """
  command = ['finetune', f'--workdir={pretrained}', '--labels=1%', '--seeds=2', '--baselines',
             '--scratch-steps=3', '--config.steps=2', '--config.head_layer=1']  # fmt: skip
  assert cli.main(command) == 0
  printed = capsys.readouterr().out
  assert (
    '4 trainings (fine-tuning with 1%: 2 x 2 steps of 60; from scratch with 1%: 2 x 3 steps of 60)'
    in printed
  )
  result = json.loads((pretrained / 'evaluation.json').read_text())['finetune']
  assert result['columns'] == ['1% (6 per class)']
  assert list(result['rows']) == ['raw pixels', 'untrained encoder', 'from scratch', 'fine-tuned']
  assert all(std is not None for cells in result['rows'].values() for _, std in cells)
  assert result['test_images'] == 1188 and result['chance']['uniform'] == 10
  assert all(low < high for ends in result['interval'].values() for low, high in ends)
  assert 'train' in result['data'] and result['checkpoint']
  assert '--scratch-steps' in result['notes']['from scratch']  # 3 steps do not fit the images
  folders = {p.name for p in (pretrained / 'finetune').iterdir()}
  assert folders == {f'1pct-seed{seed}{y}' for seed in (0, 1) for y in ('', '-scratch')}  # fmt: skip
  subset = [
    json.loads((pretrained / 'finetune' / f'1pct-seed{seed}' / 'config.json').read_text())['config']
    for seed in (0, 1)
  ]
  assert [(c['seed'], c['data']['label_seed']) for c in subset] == [(0, 0), (1, 1)]
  assert {c['batch_size'] for c in subset} == {60}
  capsys.readouterr()
  assert cli.main(command) == 0
  output = capsys.readouterr().out
  assert output.count('is complete') == 4
  assert json.loads((pretrained / 'evaluation.json').read_text())['finetune'] == result

  teachers = ','.join(str(pretrained / 'finetune' / f'1pct-seed{seed}') for seed in (0, 1))
  command = ['distill', f'--teacher={teachers}', f'--workdir={tmp_path / "students"}',
             '--config.steps=2', '--config.model.width_multiplier=0.0625']  # fmt: skip
  assert cli.main(command) == 0
  result = json.loads((tmp_path / 'students' / 'evaluation.json').read_text())['distillation']
  assert list(result['rows']) == ['teacher', 'student']
  assert result['rows']['student'][1][0] < result['rows']['teacher'][1][0]
  assert [len(result['runs'][name]) for name in ('teacher', 'student')] == [2, 2]
  assert np.sum(result['runs']['student'][0]['confusion']) == result['settings']['test_images']
  capsys.readouterr()
  for arguments in (
    ['--labels=1pct'],
    ['--labels=9999'],
    ['--config.steps=x'],
    ['--config=finetun_small'],
  ):
    assert cli.main(['finetune', f'--workdir={pretrained}', *arguments]) == 2  # fmt: skip
    assert capsys.readouterr().err.count('error') == 1
  assert cli.main(['distill', f'--teacher={pretrained}', f'--workdir={tmp_path / "x"}']) == 2
  assert 'has no classifier' in capsys.readouterr().err
