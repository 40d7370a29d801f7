"""Diagnostics of a run: sentences about what looks wrong, and a glossary of its metrics."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from simclr_jax import methods

# Below these a representation has collapsed; see `findings`.
COLLAPSED_STD, COLLAPSED_RANK = 0.05, 2.0

# metric -> what it means, for the report
GLOSSARY = {
  'loss': 'mean over the queries, in nats except for the margin losses; compare with chance_loss',
  'chance_loss': 'chance level: log(number of candidates)',
  'contrastive_acc': 'contrastive top-1 accuracy: how often the positive beats all negatives; grows, need not reach 100 %',
  'contrastive_acc5': 'contrastive top-5 accuracy',
  'contrastive_acc_n': 'contrastive top-1 accuracy as in the published SimCLR code: negatives of the other view only',
  'train_acc': 'accuracy on the training batch',
  'probe_acc': 'training accuracy of a linear classifier on the frozen features',
  'knn_acc': 'accuracy of the online kNN on held-out images',
  'z_std': 'standard deviation of the embeddings per dimension, times sqrt(d): 1 is uniform, 0 is collapse',
  'alignment': 'mean squared distance of the two views of an image, 0 to 4: falls',
  'uniformity': 'log mean exp(-2 distance^2) of different images: 0 is collapse, about -4 is uniform',
  'rank': 'effective rank of the embeddings (RankMe)',
  'queue_age': 'age of the oldest key in the queue, in steps',
  'queue_filled': 'share of the queue that holds keys; the rest are random initial rows',
  'queue_norm': 'mean norm of the keys: 1',
  'data_wait': 'share of the time in which the devices wait for images from the host',
  'learning_rate': 'of this step',
  'grad_norm': 'global gradient norm',
  'param_norm': 'parameter norm',
}


def findings(config: Any, records: Sequence[Mapping[str, float]]) -> dict[str, str]:
  """Problems, and what only looks like one: name -> a sentence; empty without problems.

  Args:
    config: the recipe, with `data.examples` filled in.
    records: of `metrics.jsonl`, oldest first; those without a loss are ignored.
  """
  found = _of_recipe(config)
  broken = [r['step'] for r in records if None in (r.get('loss', 0), r.get('grad_norm', 0))]
  if broken:
    found['not_finite'] = (
      f'The loss or its gradient was not finite in step {broken[0]:,}. A lower learning rate or a '
      'longer warm-up usually helps.'
    )
  records = [r for r in records if r.get('loss') is not None]
  if not records:
    return found
  first = records[0]
  last = {k: v for r in records for k, v in r.items() if v is not None}
  low, high = config['first_loss']
  if first['step'] == 1 and high and not low <= first['loss'] <= high:
    found['first_loss'] = (
      f'The first loss is {first["loss"]:.2f}, but an untrained network of this recipe, at its own '
      f'image size, has {low:g} to {high:g}: check the images, the normalisation and the temperature.'
    )
  tight = last.get('z_std', 1.0) < COLLAPSED_STD or last.get('rank', math.inf) < COLLAPSED_RANK
  if (
    tight and last['step'] >= 100
  ):  # the embeddings of an untrained network are close together, too
    found['collapse'] = (
      f'Collapse: all images get nearly the same embedding (spread {last.get("z_std", 0):.3f}, rank '
      f'{last.get("rank", 0):.1f}). Try a lower learning rate or a longer warm-up first.'
    )
  elif _stuck(records):
    found['stuck'] = (
      f'Stuck at chance: after {last["step"]:,.0f} steps the loss is {last["loss"]:.2f} and chance '
      f'is {last["chance_loss"]:.2f}. Check the views in the report, then the learning rate.'
    )
  if last.get('queue_filled', 1.0) < 1:
    found['queue_filling'] = (
      f'The queue is {last["queue_filled"]:.0%} full. Until it is, the loss may rise: keys replace '
      'the random initial rows, which makes the task harder. This is normal.'
    )
  waiting = data_wait(records)
  if waiting > 0.1:
    found['data_wait'] = (
      f'The devices wait for images {waiting:.0%} of the time. Use more CPU cores or smaller '
      'image files; data.resize_on=device and data.scaled_decoding=true save work.'
    )
  if abs(last.get('queue_norm', 1.0) - 1) > 0.01:
    found['queue_norm'] = f'Keys in the queue have norm {last["queue_norm"]:.3f} instead of 1.'
  return found


def data_wait(records: Sequence[Mapping[str, float]]) -> float:
  """The share of the time that the devices waited for images: the median of the last 20 records.

  The first record, whose time includes compilation, does not count.
  """
  waits = [r['data_wait'] for r in records[1:] if r.get('data_wait') is not None][-20:]
  return statistics.median(waits) if waits else 0.0


def _of_recipe(config):
  found = {}
  examples = config['data']['examples']
  queue = config.get('queue_size', 0)
  views = max(methods.build(config).joint_views, 1 + config.get('symmetric', False)) if queue else 1
  epoch = views * examples
  if examples and queue > epoch:
    found['queue_size'] = (
      f'The queue ({queue:,}) holds more keys than an epoch adds ({epoch:,}): the negatives of every '
      f'image include older keys of the same image. Set queue_size to {epoch // 2:,} or less.'
    )
  if config['model']['stem'] == 'imagenet' and config['image_size'] < 64:
    found['stem'] = (
      f'model.stem=imagenet shrinks images of {config["image_size"]} pixels fourfold before the first '
      'block, which costs accuracy: use model.stem=cifar.'
    )
  if 'shuffle' in config and config['model']['bn_groups'] == 1:
    found['bn_groups'] = (
      'model.bn_groups=1: the whole batch is normalised together, so that shuffling has no effect and '
      'a query can recognise its key by the BatchNorm statistics. MoCo was published with 8 groups.'
    )
  return found


def _stuck(records):
  """Whether the last quarter of a run of 200 steps or more is still at chance."""
  tail = [r for r in records if r['step'] > 0.75 * records[-1]['step']]
  if records[-1]['step'] < 200 or any('chance_loss' not in r for r in tail):
    return False
  return all(r['loss'] > 0.995 * r['chance_loss'] for r in tail) and all(
    r.get('queue_filled', 1.0) == 1 for r in tail
  )
