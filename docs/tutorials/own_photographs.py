# %% [markdown]
# # Your own photographs
#
# From a folder of images to an encoder, with the questions to ask at each step. Set `FOLDER` to a folder of yours, whose
# sub-folders may be classes. Without it, this notebook writes a small folder of real images: handwritten digits, tinted
# and placed at random, in ten sub-folders.

# %%
import os
import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import simclr_jax as sj
from simclr_jax.encoder import raw_pixels, untrained
from simclr_jax.evaluate.knn import neighbours

SMALL = os.environ.get('SIMCLR_JAX_TUTORIAL') == 'small'  # a few steps, to test the notebook
FOLDER = ''
WORK = pathlib.Path(tempfile.mkdtemp())

if not FOLDER:
  digits = sj.load_data('digits')
  for i in range(300 if SMALL else 2000):
    folder = WORK / 'images' / f'digit {digits.labels[i]}'
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(digits.images[i])).save(folder / f'{i}.png')
  FOLDER = str(WORK / 'images')

# %% [markdown]
# ## 1. Look at the data first
#
# `check-data` lists sizes, classes, corrupt files and duplicates, and writes a contact sheet.

# %%
# !simclr-jax check-data --data="{FOLDER}" --sheet={WORK}/sheet.png 2>/dev/null

# %%
plt.figure(figsize=(8, 5))
plt.imshow(Image.open(WORK / 'sheet.png'))
plt.axis('off')
plt.show()

# %% [markdown]
# ## 2. Pretrain
#
# Without `recipe`, one is suggested by the number and the size of the images. Here it is the recipe of the digits, which has
# no flip: a mirrored digit is another sign. A fifth of each class is held out for the evaluation.

# %%
length = {'steps': 10, 'warmup_epochs': 0} if SMALL else {'epochs': 16}
run = sj.pretrain(FOLDER, 'simclr_digits', WORK / 'run', progress=False, **length)
print(f'{run.step} steps')

# %%
history = run.history
plt.plot(history['step'], history['loss'], label='loss')
plt.plot(history['step'], history['chance_loss'], '--', label='chance')
plt.xlabel('step')
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# The loss must leave the chance level. How low it gets depends on batch size and temperature, so compare the losses of two
# runs only if these are equal.
#
# ## 3. Are the features useful?
#
# The encoder is compared with raw pixels and with itself before training, by the same classifier on the same images.
# A pretraining that does not beat both rows was too short, had too few images, or had unsuitable views.

# %%
train, test = sj.load_data(FOLDER), sj.load_data(FOLDER, 'test')
chance = max(np.bincount(test.labels)) / len(test)
rows = {
  'raw pixels': raw_pixels,
  'untrained encoder': untrained(run.encoder.architecture).embed,
  'pretrained encoder': run.encoder.embed,
}
print(f'kNN accuracy on {len(test)} held-out images (chance {chance:.1%})')
for name, features in rows.items():
  print(f'{name:20} {sj.knn(*features(train), *features(test), k=20):.1%}')

# %% [markdown]
# ## 4. Nearest neighbours
#
# The first image of a row is a held-out image, the others are the most similar training images.

# %%
h, labels = run.encoder.embed(train)
queries, _ = run.encoder.embed(test)
_, nearest = neighbours(h, queries[:6], k=7)
fig, axes = plt.subplots(6, 8, figsize=(8, 6))
for row, query in enumerate(nearest):
  shown = [test.sample(len(test)), *[train] * 7]
  for axis, dataset, i in zip(axes[row], shown, [row, *query]):
    axis.imshow(dataset.images[i] if hasattr(dataset, 'images') else plt.imread(dataset.paths[i]))
    axis.axis('off')
plt.show()

# %% [markdown]
# ## 5. Take the encoder with you
#
# `embed` writes the features, `export` the weights; with `--to=timm` or `--to=safetensors` for PyTorch. The report is one
# HTML file.

# %%
features = run.embed(WORK / 'features.npz')
print({name: array.shape for name, array in np.load(features).items()})
print(run.report())
# !simclr-jax export --workdir={WORK}/run --to=safetensors --out={WORK}/for_pytorch 2>/dev/null
