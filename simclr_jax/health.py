"""Is a run healthy? Figures of its embeddings, and plain words when something is off."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import sharding

MOST = 256  # images whose embeddings are looked at
# Below these a representation has collapsed; see `findings`.
COLLAPSED_STD, COLLAPSED_RANK = 0.05, 2.0

# metric -> what it means, for the report
MEANING = {
  'loss': 'mean over the queries, in nats for all but the margin losses; compare with chance',
  'chance_loss': 'the loss of guessing',
  'contrastive_acc': 'how often the positive beats all negatives: grows, and need not reach 100 %',
  'contrastive_acc5': 'how often the positive is among the best five',
  'contrastive_acc_n': 'the same as the published SimCLR code counts it: negatives of the other view only',
  'train_acc': 'accuracy on the training batch',
  'probe_acc': 'training accuracy of a linear classifier on the frozen features',
  'knn_acc': 'accuracy of the online kNN on held-out images',
  'z_std': 'spread of the embeddings: 1 is even in all directions, 0 is collapse',
  'alignment': 'mean squared distance of the two views of an image, 0 to 4: falls',
  'uniformity': 'log mean exp(-2 distance^2) of different images: 0 is one point, about -4 is even',
  'rank': 'effective rank of the embeddings (RankMe): how many directions are used',
  'queue_age': 'age of the oldest key in the queue, in steps',
  'queue_filled': 'share of the queue that holds keys instead of the noise it starts with',
  'queue_norm': 'mean length of the keys: 1',
  'data_wait': 'share of the time in which the devices wait for images from the host',
  'learning_rate': 'of this step',
  'grad_norm': 'length of the whole gradient',
  'param_norm': 'length of all parameters',
}


@jax.named_scope('embedding_figures')  # by which a compiled program tells what it moves
def embedding_figures(z: jax.Array) -> dict[str, jax.Array]:
  """What a batch of embeddings looks like.

  Args:
    z: unit rows, `[n, v, d]`, v views of n images; only the first `MOST` images are looked at.

  Returns:
    float32 scalars: `z_std`, mean over the dimensions of the standard deviation over the images, times
    sqrt(d), so that even coverage of the sphere gives about 1; `alignment` (with two views) and
    `uniformity` of Wang and Isola 2020, with exponents 2; `rank`, RankMe of Garrido et al. 2023: exp
    of the entropy of the normalised singular values, from 1 to d.
  """
  n, v, d = z.shape
  z = sharding.replicate(z[:MOST]).astype(jnp.float32)
  first = z[:, 0]  # [n, d]
  squared = jnp.maximum(2 - 2 * jnp.matmul(first, first.T, precision='highest'), 0.0)
  other = ~np.eye(len(first), dtype=bool)
  small = first if len(first) < d else first.T  # the smaller Gram matrix has the same eigenvalues
  eigenvalues = jnp.linalg.eigvalsh(jnp.matmul(small, small.T, precision='highest'))
  real = eigenvalues > 1e-6 * eigenvalues.max()  # the rest is float32's rounding
  singular = jnp.where(real, jnp.sqrt(jnp.maximum(eigenvalues, 0.0)), 0.0)
  share = singular / singular.sum() + 1e-7
  found = {
    'z_std': jnp.std(first, axis=0).mean() * math.sqrt(d),
    'uniformity': jnp.log(jnp.sum(jnp.exp(-2 * squared) * other) / other.sum()),
    'rank': jnp.exp(-jnp.sum(share * jnp.log(share))),
  }
  if v > 1:
    found['alignment'] = jnp.mean(jnp.sum((z[:, 0] - z[:, 1]) ** 2, axis=1))
  return found


def findings(config: Any, records: Sequence[Mapping[str, float]]) -> dict[str, str]:
  """What is off, or looks off and is not: name -> a plain sentence; empty when all is well.

  Args:
    config: the recipe, with `data.examples` filled in.
    records: of `metrics.jsonl`, oldest first; those without a loss are passed over.
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
      f'The first loss is {first["loss"]:.2f}, but a fresh network of this recipe, at its own '
      f'image size, gives {low:g} to {high:g}: look at the images, the normalisation, the temperature.'
    )
  tight = last.get('z_std', 1.0) < COLLAPSED_STD or last.get('rank', math.inf) < COLLAPSED_RANK
  if tight and last['step'] >= 100:  # a fresh network's embeddings are close together, too
    found['collapse'] = (
      f'Collapse: all images get nearly the same embedding (spread {last.get("z_std", 0):.3f}, rank '
      f'{last.get("rank", 0):.1f}). A lower learning rate or a longer warm-up is the first thing to try.'
    )
  elif _stuck(records):
    found['stuck'] = (
      f'Stuck at chance: after {last["step"]:,.0f} steps the loss is {last["loss"]:.2f} and guessing '
      f'costs {last["chance_loss"]:.2f}. Look at the views in the report, then at the learning rate.'
    )
  if last.get('queue_filled', 1.0) < 1:
    found['queue_filling'] = (
      f'The queue is {last["queue_filled"]:.0%} full. Until it is, the loss may rise: real keys '
      'replace the noise it starts with, which makes the task harder. This is normal.'
    )
  waiting = data_wait(records)
  if waiting > 0.1:
    found['data_wait'] = (
      f'The devices wait for images {waiting:.0%} of the time. More cores would help, or images that '
      'are stored smaller; data.resize_on=device and data.scaled_decoding=true save work.'
    )
  if abs(last.get('queue_norm', 1.0) - 1) > 0.01:
    found['queue_norm'] = f'Keys in the queue have length {last["queue_norm"]:.3f} instead of 1.'
  return found


def data_wait(records: Sequence[Mapping[str, float]]) -> float:
  """The share of the time that the devices lately waited for images: the median of 20 records.

  The first record, in which the program was compiled, does not count.
  """
  waits = [r['data_wait'] for r in records[1:] if r.get('data_wait') is not None][-20:]
  return statistics.median(waits) if waits else 0.0


def _of_recipe(config):
  found = {}
  examples = config['data']['examples']
  queue = config.get('queue_size', 0)
  epoch = examples * (2 if config.get('symmetric') or config['method'] == 'simclr' else 1)
  if examples and queue > epoch:
    found['queue_size'] = (
      f'The queue ({queue:,}) is larger than the data set gives keys in an epoch ({epoch:,}): every '
      f'image meets older keys of itself as negatives. Set queue_size to {epoch // 2:,} or less.'
    )
  if config['model']['stem'] == 'imagenet' and config['image_size'] < 64:
    found['stem'] = (
      f'model.stem=imagenet shrinks images of {config["image_size"]} pixels fourfold before the first '
      'block, which costs accuracy: use model.stem=cifar.'
    )
  if config['method'] in ('moco', 'end_to_end') and config['model']['bn_groups'] == 1:
    found['bn_groups'] = (
      'model.bn_groups=1: all of the batch is normalised together, so that shuffling does nothing and '
      f'a query can recognise its key by the statistics. {config["method"]} was published with 8.'
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
