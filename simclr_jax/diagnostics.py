"""Diagnostics of a run: problems in its recipe and metrics, and the glossary of metrics."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from simclr_jax import methods

# Below these values of z_std and rank, embeddings have collapsed.
COLLAPSED_STD, COLLAPSED_RANK = 0.05, 2.0

# metric -> explanation in the report
GLOSSARY = {
  'loss': 'mean over the queries, in nats (margin losses: no unit); compare with chance_loss',
  'chance_loss': 'chance level: log(number of candidates)',
  'contrastive_acc': 'contrastive top-1 accuracy: how often the positive is more similar than all negatives; it increases, but need not reach 100 %',
  'contrastive_acc5': 'contrastive top-5 accuracy',
  'contrastive_acc_n': 'contrastive top-1 accuracy as in the published SimCLR code, with negatives of the other view only',
  'train_acc': 'accuracy on the training batch',
  'probe_acc': 'training accuracy of a linear classifier on the frozen features',
  'knn_acc': 'accuracy of the online kNN on held-out images',
  'z_std': 'standard deviation of the embeddings per dimension, times sqrt(d): 1 is uniform, 0 is collapse',
  'alignment': 'mean squared distance of the two views of an image, 0 to 4; it decreases',
  'uniformity': 'log of the mean of exp(-2 distance^2) over pairs of images: 0 is collapse, about -4 is uniform',
  'rank': 'effective rank of the embeddings (RankMe)',
  'queue_age': 'age of the oldest key in the queue, in steps',
  'queue_filled': 'fraction of the queue that contains keys; the other rows are random initial values',
  'queue_norm': 'mean norm of the rows of the queue, which should be 1',
  'data_wait': 'fraction of the time in which the devices wait for images from the host',
  'learning_rate': 'learning rate of this step',
  'grad_norm': 'global gradient norm',
  'param_norm': 'parameter norm',
}


def findings(config: Any, records: Sequence[Mapping[str, float]]) -> dict[str, str]:
  """Detects problems of a run.

  Args:
    config: the recipe, with `data.examples`.
    records: the records of `metrics.jsonl`, oldest first; records without a loss are ignored.

  Returns:
    Name of the problem -> a sentence with the remedy; empty without problems. 'queue_filling' is a remark.
  """
  problems = _recipe_problems(config)
  broken = [r['step'] for r in records if None in (r.get('loss', 0), r.get('grad_norm', 0))]
  if broken:
    problems['not_finite'] = (
      f'The loss or its gradient was not finite in step {broken[0]:,}. A lower learning rate or a '
      'longer warm-up usually helps.'
    )
  records = [r for r in records if r.get('loss') is not None]
  if not records:
    return problems
  first = records[0]
  last = {k: v for r in records for k, v in r.items() if v is not None}
  low, high = config['first_loss']
  if first['step'] == 1 and high and not low <= first['loss'] <= high:
    problems['first_loss'] = (
      f'The loss of the first step is {first["loss"]:.2f}; {low:g} to {high:g} is expected for an untrained '
      'network of this recipe. Check the images, the normalisation and the temperature.'
    )
  collapsed = last.get('z_std', 1.0) < COLLAPSED_STD or last.get('rank', math.inf) < COLLAPSED_RANK
  # In the first steps, embeddings are similar in healthy runs, too.
  if collapsed and last['step'] >= 100:
    problems['collapse'] = (
      f'Collapse: all images get nearly the same embedding (z_std {last.get("z_std", 0):.3f}, rank '
      f'{last.get("rank", 0):.1f}). Try a lower learning rate or a longer warm-up first.'
    )
  elif _stuck(records):
    problems['stuck'] = (
      f'Stuck at chance: after {last["step"]:,.0f} steps the loss is {last["loss"]:.2f} and chance '
      f'is {last["chance_loss"]:.2f}. Check the augmented views in the report, then the learning rate.'
    )
  if last.get('queue_filled', 1.0) < 1:
    problems['queue_filling'] = (
      f'The queue is {last["queue_filled"]:.0%} full. Until it is full, the loss may increase, because keys '
      'replace random initial rows and are harder negatives. This is normal.'
    )
  waiting = data_wait(records)
  if waiting > 0.1:
    problems['data_wait'] = (
      f'The devices wait for images {waiting:.0%} of the time. Use more CPU cores or smaller '
      'image files; data.resize_on=device and data.scaled_decoding=true reduce the work of the host.'
    )
  if abs(last.get('queue_norm', 1.0) - 1) > 0.01:
    problems['queue_norm'] = f'Keys in the queue have norm {last["queue_norm"]:.3f} instead of 1.'
  return problems


def data_wait(records: Sequence[Mapping[str, float]]) -> float:
  """Fraction of the time in which the devices waited for images, 0 to 1: median of the last 20 records.

  The first record is ignored, because its time includes compilation.
  """
  waits = [r['data_wait'] for r in records[1:] if r.get('data_wait') is not None][-20:]
  return statistics.median(waits) if waits else 0.0


def _recipe_problems(config):
  problems = {}
  examples = config['data']['examples']
  queue = config.get('queue_size', 0)
  views = max(methods.build(config).joint_views, 1 + config.get('symmetric', False)) if queue else 1
  epoch = views * examples
  if examples and queue > epoch:
    problems['queue_size'] = (
      f'queue_size={queue} is more than the {epoch:,} keys that an epoch adds: the negatives of every '
      f'image include older keys of this image. Set queue_size to {epoch // 2:,} or less.'
    )
  if config['model']['stem'] == 'imagenet' and config['image_size'] < 64:
    problems['stem'] = (
      f'model.stem=imagenet downsamples images of {config["image_size"]} pixels by 4 before the first '
      'block, which reduces the accuracy: use model.stem=cifar.'
    )
  if 'shuffle' in config and config['model']['bn_groups'] == 1:
    problems['bn_groups'] = (
      'model.bn_groups=1: queries and keys are normalised over the entire batch, so that shuffling has no '
      'effect and a network can recognise the key by BatchNorm statistics. MoCo was published with 8 groups.'
    )
  return problems


def _stuck(records):
  """Whether the last quarter of a run of 200 steps or more is still at chance."""
  tail = [r for r in records if r['step'] > 0.75 * records[-1]['step']]
  if records[-1]['step'] < 200 or any('chance_loss' not in r for r in tail):
    return False
  return all(r['loss'] > 0.995 * r['chance_loss'] for r in tail) and all(
    r.get('queue_filled', 1.0) == 1 for r in tail
  )
