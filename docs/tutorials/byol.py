# %% [markdown]
# # A new method: BYOL
#
# BYOL (Grill et al. 2020) has no negatives. An online network predicts the output of a target network for the other view of the
# same image. Below is the whole method, outside of the package; the package trains, resumes, evaluates and exports it as if it
# were built in.
#
# - **Predictor.** An MLP $q$ after the projection head $g$ of the online network. The target has none.
# - **EMA target.** The target's weights are an exponential moving average of the online weights,
#   $\xi \leftarrow \tau \xi + (1 - \tau) \theta$. It gets no gradient.
# - **Loss.** With $p = q(g(f(x)))$ for one view and the target's output $z'$ for the other, both of length 1:
#   $|p - z'|^2 = 2 - 2 \cos(p, z')$. Each view is predicted from the other, and the two terms are added.
#
# One output for all images would make this loss 0: *collapse*. Nothing in the loss forbids it. The predictor and the EMA target
# are what prevents it in practice; below, they are removed one at a time.

# %%
import os
import pathlib
import tempfile

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import simclr_jax as sj
from simclr_jax import losses
from simclr_jax.encoder import untrained
from simclr_jax.fields import Choices, Field, Range
from simclr_jax.methods import Method
from simclr_jax.models import mlp, network
from simclr_jax.momentum import encode, init_ema, update_ema

SMALL = os.environ.get('SIMCLR_JAX_TUTORIAL') == 'small'  # a few steps, to test the notebook
WORK = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## The method
#
# `build`, here called `byol`, returns three functions. `init` makes the parameters, which are learned by gradient, and the
# state, which is everything else: BatchNorm statistics and the target. `loss` returns the loss, the new state and metrics.
# `encoder` selects the weights that are evaluated. `FIELDS` are the method's own fields of a recipe.
#
# As in the paper, $\tau$ increases from `key_momentum` to 1 along a cosine. With `key_momentum=0` it stays 0: the target is the
# online network itself, still without a gradient.

# %%
FIELDS = {
  'key_momentum': Field(0.9, 'momentum of the target at the start', Range(0.0, 1.0)),
  'predictor': Field('mlp', 'mlp, or none: no predictor', Choices('mlp', 'none')),
}


def byol(config):
  net, size = network.build(config), config.model.head_dim
  layers = 2 if config.predictor == 'mlp' else 0
  predictor = mlp.MLP(layers, size, hidden=256, norm='hidden')

  def init(rng, batch):
    params, stats = net.init(rng, batch['views'][:, 0])
    target = init_ema(params, stats)
    fresh = predictor.init(rng, jnp.zeros((2, size)), train=False)
    params['predictor'] = fresh.get('params', {})
    return params, {'stats': stats, 'target': target, 'predictor': fresh.get('batch_stats', {})}

  def momentum(batch):
    cosine = (1 + jnp.cos(jnp.pi * batch['step'] / batch['steps'])) / 2
    return 1 - (1 - config.key_momentum) * cosine if config.key_momentum else 0.0

  def loss(params, state, batch, rng):
    target = update_ema(state['target'], params, momentum(batch))
    stats, predictor_stats, total = state['stats'], state['predictor'], 0.0
    for i in range(2):
      outputs, stats = net.apply(params, stats, batch['views'][:, i])
      p, predictor_stats = network.apply_train(
        predictor, params['predictor'], predictor_stats, outputs[-1]
      )
      z, target = encode(net, target, batch['views'][:, 1 - i])  # unit rows, no gradient
      total += jnp.mean(jnp.sum((losses.l2_normalize(p[-1]) - z) ** 2, axis=-1))
    embeddings = jnp.stack([losses.l2_normalize(outputs[-1]), z], axis=1)
    metrics = {'loss': total, 'features': outputs[0], 'embeddings': embeddings}
    return total, ({'stats': stats, 'target': target, 'predictor': predictor_stats}, metrics)

  def encoder(params, state):
    return network.encoder(params, state['stats'])

  return Method(init, loss, encoder, ema_state=('target',))


# %% [markdown]
# ## Train, and compare
#
# All trainings have the same images, views, encoder, optimizer, learning rate per image and number of epochs. BYOL has the
# projection head of its paper, without BatchNorm at the output: with BatchNorm there, as in SimCLR's head, the embeddings could
# not become constant, and nothing would be seen of a collapse. Batch size, views and $\tau$ of BYOL were chosen in about 30
# short trainings with a fifth of the training images held out; SimCLR has the batch size and temperature of its recipe.

# %%
train, test = sj.load_data('digits'), sj.load_data('digits', 'test')
if SMALL:
  train, test = train.subset(np.arange(500)), test.subset(np.arange(200))
length = {'steps': 4, 'warmup_epochs': 0} if SMALL else {'epochs': 6}
common = {
  'image_size': 24,
  'model.width_multiplier': 0.125,
  'model.variant': 'torchvision',
  'augment.view1': 'simclr_crop(0.4, 1) | simclr_jitter(1.0, p=0.8) | grayscale(p=0.5)',
  'knn_every_epochs': 0,
  'tensorboard': False,
}
head = {'model.head_norm': 'hidden', 'model.head_hidden': 256, 'batch_size': 64}


def pretrain(name, seed, method=None, **fields):
  return sj.pretrain(
    train, 'simclr_digits', WORK / f'{name} {seed}', test=test, method=method, progress=False,
    overrides={**common, **length, **fields}, seed=seed,
  )  # fmt: skip


seeds = range(1 if SMALL else 3)
runs = {
  'SimCLR': [pretrain('simclr', seed) for seed in seeds],
  'BYOL': [pretrain('byol', seed, byol, **head) for seed in seeds],
  'BYOL without predictor': [pretrain('no predictor', 0, byol, **head, predictor='none')],
  'BYOL without EMA': [pretrain('no EMA', 0, byol, **head, key_momentum=0.0)],
}

# %% [markdown]
# kNN accuracy of the features on the test images: mean, and the lowest and highest seed. The *standard deviation* of the
# embeddings over the images, per dimension and times $\sqrt d$, is 1 if they are uniform on the sphere, and 0 if all images have
# the same embedding. The *effective rank* (RankMe, Garrido et al. 2023) counts the dimensions in use, from 1 to 64.

# %%
chance = np.bincount(test.labels).max() / len(test)
print(f'{len(test)} test images, chance {chance:.1%}')
print(f'{"":24}seeds   kNN, mean (lowest to highest)   standard deviation   effective rank')
random = untrained(runs['SimCLR'][0].encoder.architecture)
knn = 100 * sj.knn(*random.embed(train), *random.embed(test), k=20)
print(f'{"untrained encoder":24}{1:5}{knn:10.1f} %')
for name, each in runs.items():
  knn = [100 * run.knn(train, test, k=20) for run in each]
  std, rank = (np.mean([run.history[m][-1] for run in each]) for m in ('z_std', 'rank'))
  text = f'{np.mean(knn):10.1f} % ({min(knn):.1f} to {max(knn):.1f})'
  print(f'{name:24}{len(each):5}{text:32}{std:20.2f}{rank:17.1f}')

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
for name, each in runs.items():
  history = each[0].history
  left.plot(history['step'] * each[0].config.batch_size, history['z_std'], label=name)
  if 'BYOL' in name:
    right.plot(history['step'], history['loss'], label=name, color=left.lines[-1].get_color())
left.set(xlabel='images', ylabel='standard deviation of the embeddings', ylim=(0, 1.1))
right.set(xlabel='step', ylabel="BYOL's loss", ylim=(0, None))
left.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# Read loss and standard deviation together. A loss near 0 with a standard deviation near 0 is collapse: the lowest loss of the
# plot can be the worst encoder. A high standard deviation alone proves nothing, either; that takes an evaluation, and a
# comparison with the untrained encoder.
#
# This small comparison does not rank the methods. The paper trains BYOL for 1,000 epochs of ImageNet with batches of 4,096 and
# $\tau$ from 0.996, so that the target changes slowly over many steps; a training of some hundred steps needs a faster target.
#
# ## As a file
#
# The package has written the method to a file in the run directory, so that other programs can read the run. The same file
# works with every command: `method=path/to/byol.py` in a recipe. See *Code of your own* in the documentation.

# %%
print(runs['BYOL'][0].config.method.replace(str(WORK), 'WORK'))
