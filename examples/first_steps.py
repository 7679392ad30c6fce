# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First steps with nnunet_ssl
#
# Pre-train a small encoder on brains without labels, look at what it sees, fine-tune it in stock nnU-Net, and segment
# from Python. **The brains are synthetic** and the networks small, so that all of it takes about ten minutes on two
# CPU cores; with your own files and a published or pre-trained encoder, every step is the same.
#
# Set up, once (in Colab, this is the only cell that differs):

# %%
import importlib.util
import subprocess
import sys

SOURCE = "..[demo]"  # a clone, in whose examples/ this lies; or "nnunet_ssl[demo] @ git+https://..."
if importlib.util.find_spec("nnunet_ssl") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE], check=True)

# %% tags=["parameters"]
SUBJECTS, PRETRAINING_STEPS, FINETUNING_STEPS = 12, 200, 400
WORK = "first_steps"

# %%
import os
import shlex
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel
import numpy as np
import torch

import nnunet_ssl

warnings.filterwarnings("ignore")  # of other packages, about their own future

work = Path(WORK).resolve()
work.mkdir(parents=True, exist_ok=True)
for folder in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):  # nnU-Net's own three variables, no other
    (work / folder).mkdir(exist_ok=True)
    os.environ[folder] = str(work / folder)
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
os.environ["nnUNet_def_n_proc"] = "2"  # processes that nnU-Net starts at a time; eight, where nobody says how many
device = "cuda" if torch.cuda.is_available() else "cpu"


def run(command: str) -> None:
    """Run what one would type into a terminal, and show the end of what it says."""
    done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=work)
    print(f"$ {command}", *done.stdout.splitlines()[-4:], sep="\n")
    done.check_returncode()


# %% [markdown]
# ## 1. Scans without labels, and an encoder
#
# `phantom` writes synthetic brains in the folders of FOMO60K. Index, prepare, pre-train: the commands of the README,
# with small numbers.

# %%
run(f"python -m nnunet_ssl.phantom fomo fomo -n {SUBJECTS}")
run("python -m nnunet_ssl.conversion.fomo60k -i fomo")
run("nnssl_prepare -d 500 -np 2 --spacing 3 3 3")
run(
    f"nnssl_pretrain -c mcl_mim -device {device} --set steps={PRETRAINING_STEPS} patch_size=32,32,32 batch_size=4 "
    "swin.embed_dim=16 swin.depths=1,1,1 swin.num_heads=1,2,4 swin.window_size=4 masked.unpaired_batch_size=1 "
    "queue_size=256 learning_rate=5e-4 workers=1 log_every=50 validation.every=100 validation.fraction=0.15"
)

# %% [markdown]
# ## 2. Three lines of Python
#
# Load an encoder, read a scan as the encoder wants it, embed it.

# %%
encoder = nnunet_ssl.load_encoder(work / "nnUNet_results/Dataset500_FOMO60K/mcl_mim", device)
scan = nnunet_ssl.read_scan(sorted(work.glob("fomo/**/t1.nii.gz"))[0], encoder.preprocessing)
vector = nnunet_ssl.embed(encoder, scan)
print(encoder, scan, vector.shape, sep="\n")

# %% [markdown]
# ## 3. The pyramid of maps
#
# Of each resolution, the channel that varies most. Scans are seen from above: an array's axes run to superior, to
# anterior, and to the right.

# %%
maps = nnunet_ssl.feature_maps(encoder, scan)
middle = [(low + high) // 2 for low, high in scan.foreground]
figure, axes = plt.subplots(1, 1 + len(maps), figsize=(2.2 * (1 + len(maps)), 2.4))
axes[0].imshow(scan.array[0, middle[0]], cmap="gray", origin="lower")
axes[0].set_title("T1 (synthetic)")
for axis, features, stride in zip(axes[1:], maps, encoder.network.strides, strict=False):
    channel = features.reshape(len(features), -1).std(axis=1).argmax()
    axis.imshow(features[channel, features.shape[1] // 2], cmap="viridis", origin="lower")
    axis.set_title(f"stride {stride}")
for axis in axes:
    axis.set_axis_off()

# %% [markdown]
# ## 4. Nearest neighbours across modalities
#
# Embed a T1 and a T2 of each subject. An encoder that has become modality-invariant finds a subject's T2 from its T1:
# the diagonal would be dark. After so few steps there is hardly one yet; the line below says how far from guessing it
# is.

# %%
subjects = sorted({path.parent for path in work.glob("fomo/**/t1.nii.gz") if path.with_name("t2.nii.gz").is_file()})[:8]
t1, t2 = (
    np.stack([nnunet_ssl.embed(encoder, folder / f"{name}.nii.gz") for folder in subjects]) for name in ("t1", "t2")
)
directions = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (t1, t2)]
distance = 1 - directions[0] @ directions[1].T
found = (distance.argmin(axis=1) == np.arange(len(subjects))).mean()
plt.figure(figsize=(3.6, 3))
plt.imshow(distance, cmap="gray")
plt.colorbar(label="cosine distance")
plt.xlabel("T2 of subject")
plt.ylabel("T1 of subject")
print(
    f"The nearest T2 is the same subject's for {found:.0%} of {len(subjects)} T1 (by chance: {1 / len(subjects):.0%})."
)

# %% [markdown]
# ## 5. What the encoder looks at
#
# How much each voxel of a T1 moves its embedding towards that of the same head's T2: the gradient of their similarity.

# %%
pair = nnunet_ssl.read_session([subjects[0] / "t1.nii.gz", subjects[0] / "t2.nii.gz"], encoder.preprocessing)
start = [(low + high - size) // 2 for (low, high), size in zip(pair[0].foreground, encoder.patch_size, strict=True)]
box = tuple(slice(max(first, 0), max(first, 0) + size) for first, size in zip(start, encoder.patch_size, strict=True))
views = [torch.from_numpy(one.array[(slice(None), *box)])[None].to(device) for one in pair]
views[0].requires_grad_()
embedded = [encoder.network(view)[-1].mean(dim=(2, 3, 4)) for view in views]
torch.cosine_similarity(embedded[0], embedded[1].detach()).sum().backward()
image, weight = (tensor.detach().cpu().numpy()[0, 0] for tensor in (views[0], views[0].grad.abs()))
figure, axes = plt.subplots(1, 2, figsize=(5, 2.6))
axes[0].imshow(image[len(image) // 2], cmap="gray", origin="lower")
axes[1].imshow(weight[len(image) // 2], cmap="inferno", origin="lower")
for axis, title in zip(axes, ("T1 (synthetic)", "gradient"), strict=True):
    axis.set_title(title)
    axis.set_axis_off()

# %% [markdown]
# ## 6. Fine-tune in stock nnU-Net, and segment
#
# A synthetic ATLAS: T1 images with stroke lesions. Everything but the trainer's name is nnU-Net's.

# %%
run(f"python -m nnunet_ssl.phantom atlas ATLAS_2 -n {2 * SUBJECTS} --n_test 3 --truth truth")
run("python -m nnunet_ssl.conversion.atlas_v2 -i ATLAS_2 -np 2")
run("nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres -np 2 -npfp 2")
os.environ["nnssl_settings"] = (
    f"steps={FINETUNING_STEPS},epoch_steps={max(1, FINETUNING_STEPS // 8)},patch_size=48x48x48,batch_size=2"
)
run(f"nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerMCLMIM -device {device}")

# %%
(model,) = (work / "nnUNet_results/Dataset501_ATLASv2").glob("nnUNetTrainerMCLMIM__*")
images = sorted((work / "nnUNet_raw/Dataset501_ATLASv2/imagesTs").glob("*.nii.gz"))
predictions = nnunet_ssl.segment(model, images, device=device)

# %%
figure, axes = plt.subplots(1, len(images), figsize=(2.6 * len(images), 3.2), squeeze=False, layout="constrained")
for axis, path, prediction in zip(axes[0], images, predictions, strict=True):
    image = nibabel.load(path).get_fdata()
    truth = nibabel.load(work / "truth" / path.name.replace("_0000", "")).get_fdata() > 0
    predicted = np.asarray(prediction.dataobj) > 0
    middle = int(truth.sum(axis=(0, 1)).argmax())
    axis.imshow(image[:, :, middle].T, cmap="gray", origin="lower")
    for mask, colour in ((truth, "tab:green"), (predicted, "tab:red")):
        if mask[:, :, middle].any():
            axis.contour(mask[:, :, middle].T, [0.5], colors=[colour], linewidths=1.2)
    axis.set_title(f"Dice {2 * (truth & predicted).sum() / max(1, truth.sum() + predicted.sum()):.2f}")
    axis.set_axis_off()
_ = figure.suptitle("Held-out synthetic strokes: truth green, prediction red")

# %% [markdown]
# Next: your own scans. `nnunet_ssl.read_scan("sub-1_T1w.nii.gz")` reads any NIfTI file, and the README's three steps
# train on real data.
