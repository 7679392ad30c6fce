"""Fixtures of small corpora, on disk and prepared, settings for small pre-trainings on them, and a tiny encoder."""

import json

import blosc2
import nibabel
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import zoom

CONTRASTS = {
    "t1": lambda anatomy: anatomy,
    "t2": lambda anatomy: -anatomy,
    "flair": lambda anatomy: np.abs(anatomy) - 1,
    "scan_1": lambda anatomy: anatomy**2 - 1,
}


@pytest.fixture
def write_scan():
    """A function that writes a small "brain": an ellipsoid of smooth tissue and noise, zero outside.

    The tissue is drawn in mm, so that scans of one brain agree whatever their grids; `contrast` varies its look.
    """

    def write(path, *, seed=0, contrast=1.0, shape=(20, 24, 22), spacing=2.0, axes="RAS", nan=0, dtype=np.float32):
        affine = np.diag([*np.broadcast_to(spacing, 3).astype(float), 1.0])
        affine[:3, 3] = -0.5 * affine[:3, :3] @ (np.array(shape) - 1)
        x, y, z = nibabel.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)).transpose(3, 0, 1, 2)
        tissue = 100 + 40 * np.sin(x / 5 + seed) * contrast + 30 * np.cos(y / 7) + 10 * np.sin(z / 3)
        tissue += np.random.default_rng(seed).normal(0, 2, shape)
        data = np.where((x / 15) ** 2 + (y / 20) ** 2 + (z / 17) ** 2 < 1, tissue, 0)
        data[tuple(np.argwhere(data)[:nan].T)] = np.nan
        image = nibabel.Nifti1Image(data.astype(dtype), affine)
        target = nibabel.orientations.axcodes2ornt(axes)
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(
            image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), target)), path
        )
        return path

    return write


@pytest.fixture
def write_prepared(nnunet_folders):
    """A function that writes a prepared corpus of small smooth "brains": each subject has its own anatomy, and each
    modality shows the same anatomy in its own contrast."""

    def write(n_subjects=6, modalities=("t1", "t2", "flair"), unpaired=2, name="Dataset500_FOMO60K"):
        folder = nnunet_folders["nnUNet_preprocessed"] / name
        store = folder / "nnUNetSSLPlans_3d_fullres"
        store.mkdir(parents=True)
        rows, shape = [], (72, 40, 40)
        for subject in range(n_subjects + unpaired):
            stems = modalities if subject < n_subjects else ("scan_1",)
            anatomy = zoom(np.random.default_rng(subject).normal(0, 1, (9, 5, 5)), 8, order=1)  # 72 x 40 x 40
            for stem in stems:
                scan = f"A__sub_{subject}__ses_1__{stem}"
                data = CONTRASTS[stem](anatomy).astype(np.float16)[None]
                blosc2.asarray(data, urlpath=str(store / f"{scan}.b2nd"), chunks=data.shape)
                rows.append(
                    {
                        "scan_id": scan,
                        "dataset": "A",
                        "subject": f"A/sub_{subject}",
                        "session": f"A/sub_{subject}/ses_1",
                        "modality": "unknown" if stem == "scan_1" else stem,
                        "repeat": 1,
                        "age": "",
                        "sex": "",
                        "shape": ",".join(map(str, shape)),
                        "bbox": ",".join(f"0,{size}" for size in shape),
                    }
                )
        pd.DataFrame(rows).to_csv(folder / "manifest.tsv", sep="\t", index=False)
        (folder / "nnUNetSSLPlans.json").write_text(json.dumps({"preprocessing": {"spacing": [1.0, 1.0, 1.0]}}))
        return folder

    return write


@pytest.fixture
def tiny():
    """Overrides that make any recipe a matter of seconds, for corpora of `write_prepared`."""
    return [
        "swin.embed_dim=8",
        "swin.depths=1,1,1,1",
        "swin.num_heads=1,2,2,2",
        "swin.window_size=4",
        "patch_size=64,32,32",
        "batch_size=2",
        "contrastive.hidden=16",
        "contrastive.dim=8",
        "queue_size=16",
        "masked.unpaired_batch_size=2",
        "masked.tokens.prototypes=16",
        "masked.tokens.hidden=16",
        "masked.tokens.bottleneck=8",
        "steps=4",
        "workers=0",
        "log_every=2",
        "gradients_every=2",
        "save_every=2",
        "validation.fraction=0.3",
        "validation.every=4",
        "validation.batches=1",
    ]


@pytest.fixture
def write_tiny_encoder():
    """A function that writes a checkpoint of a tiny, randomly initialised Swin encoder and returns the encoder."""
    import torch

    from nnunet_ssl.architectures.networks import build_encoder
    from nnunet_ssl.weights.encoders import write_encoder

    architecture = {
        "backbone": "swin",
        "in_channels": 1,
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 2],
        "window_size": 4,
    }

    def write(path, config=None, *, step=1, preprocessing=None):
        torch.manual_seed(0)
        encoder = build_encoder(architecture).eval()
        write_encoder(
            path,
            encoder.state_dict(),
            architecture=architecture,
            method="mcl_mim",
            step=step,
            preprocessing=preprocessing,
            metadata={"config": config or {}},
        )
        return encoder

    return write


@pytest.fixture
def source(tmp_path):
    """Where a test lays out its FOMO corpus."""
    return tmp_path / "fomo"


@pytest.fixture
def prepare(nnunet_folders, source):
    """A function that indexes what lies in `source` and prepares it; keywords are PreparationConfig's."""
    from nnunet_ssl.corpus.indexing import index_corpus
    from nnunet_ssl.corpus.prepare import PreparationConfig, prepare_corpus

    def run(*, processes=1, **options):
        index_corpus(source, 500, "FOMO60K")
        return prepare_corpus(500, PreparationConfig(**options), processes=processes)

    return run


@pytest.fixture
def contents():
    """A function that gives every file below a folder with its bytes."""
    return lambda folder: {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
