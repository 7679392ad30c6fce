"""Write what a version leaves on disk, small, as one archive: python tests/samples/make.py tests/samples/NAME.tar.xz

Run once for each version whose files differ, by the commands of that version's environment; `test_samples.py` opens
every archive ever after. Of the version it takes commands alone, so that the same script samples any of them.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import nnunet_ssl

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
ROOT = "/SAMPLES"
"""In text files it stands for where the archive is unpacked."""
SHAPE = (20, 24, 22)
TINY = (
    *("patch_size=16,16,16", "batch_size=2", "steps=2", "workers=0", "save_every=1", "log_every=1", "queue_size=8"),
    *("gradients_every=1", "contrastive.hidden=4", "contrastive.dim=4", "masked.width=4"),
    *("masked.unpaired_batch_size=1", "validation.fraction=0.3", "validation.batches=1"),
)
TINY_SWIN = ("embed_dim=4", "depths=1,1", "num_heads=1,1", "window_size=2")
SETTINGS = "steps=2,epoch_steps=1,patch_size=16x16x16,batch_size=2,freeze_share=0.5,lr=0.01"


def write_image(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)
    os.utime(path, (1_700_000_000, 1_700_000_000))  # whole seconds, which an archive keeps exactly


def write_scans(root: Path) -> None:
    """Five subjects of two contrasts for pre-training, and five cases with a lesion."""
    place = np.indices(SHAPE) - (np.array(SHAPE)[:, None, None, None] - 1) / 2
    brain = (place**2 / np.array([8.0, 9.0, 8.0])[:, None, None, None] ** 2).sum(0) < 1
    for subject in range(5):
        wave = np.sin((place[0] + 2 * place[1] + subject) / 3) + np.cos(place[2] / 2)
        for name, look in (("t1", 100 + 20 * wave), ("flair", 100 - 15 * wave + 5 * wave**2)):
            image = np.where(brain, look, 0).astype(np.int16)
            write_image(root / f"fomo/sub_{subject}/ses_1/{name}.nii.gz", image)
        lesion = brain & (((place - subject) ** 2).sum(0) < 12)
        image = np.where(brain, 100 + 20 * wave + 60 * lesion, 0).astype(np.int16)
        raw = root / "nnUNet_raw/Dataset701_Ball"
        write_image(raw / f"imagesTr/case_{subject}_0000.nii.gz", image)
        write_image(raw / f"labelsTr/case_{subject}.nii.gz", lesion.astype(np.uint8))
    write_image(raw / "imagesTs/case_9_0000.nii.gz", np.flip(image, 0))
    (raw / "dataset.json").write_text(
        '{"channel_names": {"0": "T1"}, "labels": {"background": 0, "lesion": 1}, "numTraining": 5, '
        '"file_ending": ".nii.gz"}'
    )


def rounded(value):
    """Whole numbers stay, others become powers of two, in tensors of any nesting: they take a tenth of the space."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch.where(value == 0, value, value.sign() * 2 ** value.abs().log2().round().clamp(-12, 12))
    return value


def round_weights(folder: Path) -> None:
    """Round what was trained, in all files alike, as if it had come out so."""
    for file in {path.resolve(): path for path in folder.rglob("checkpoint_*.pth")}.values():
        state = torch.load(file, weights_only=False)
        torch.save({key: rounded(value) for key, value in state.items()}, file)
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118 (no mapping)
        save_file({name: rounded(tensor) for name, tensor in tensors.items()}, file, metadata)


def make(root: Path, section: str, plans: str) -> None:
    """Run the commands of the version.

    Args:
        root: an empty folder.
        section: the Swin encoder's in the settings of a pre-training.
        plans: the name of the plans that ``nnssl_plan`` writes.
    """
    write_scans(root)
    environment = os.environ | {name: str(root / name) for name in VARIABLES}
    environment |= {
        "nnssl_settings": SETTINGS,
        "nnUNet_compile": "f",
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
        "OMP_NUM_THREADS": "1",
    }
    for name in VARIABLES:
        (root / name).mkdir(exist_ok=True)

    def run(program: str, *arguments: str | Path) -> None:
        here = Path(sys.executable)
        command = here if program == "python" else here.with_name(program)
        subprocess.run([command, *map(str, arguments)], env=environment, check=True, cwd=root)

    script = Path(nnunet_ssl.__file__).parents[1] / "dataset_conversion/Dataset500_FOMO60K.py"
    run("python", script, "-i", root / "fomo")
    run("nnssl_prepare", "-d", "500")
    swin = [f"{section}.{one}" for one in TINY_SWIN]
    run("nnssl_pretrain", "-c", "mcl_mim", "-device", "cpu", "-o", *swin, *TINY)
    pretrained = root / "nnUNet_results/Dataset500_FOMO60K/mcl_mim"
    round_weights(pretrained)
    run("nnssl_evaluate", "alignment", "--checkpoint", pretrained, "-device", "cpu", "-o", root / "measured")
    run("nnssl_plan", "-d", "701", "-np", "1")
    trainer = ("-tr", "nnUNetTrainerMCLMIM")
    run("nnUNetv2_train", "701", "3d_fullres", "0", *trainer, "-p", plans, "-device", "cpu")
    (model,) = (root / "nnUNet_results/Dataset701_Ball").iterdir()
    round_weights(model)
    named = model.name.split("__")[1]
    run(
        *("nnUNetv2_predict", "-i", root / "nnUNet_raw/Dataset701_Ball/imagesTs", "-o", root / "predicted"),
        *("-d", "701", "-c", "3d_fullres", "-f", "0", *trainer, "-p", named, "-device", "cpu", "--disable_tta"),
        "--save_probabilities",
    )
    probabilities = np.load(root / "predicted/case_9.npz")["probabilities"]
    np.save(root / "predicted/every_third.npy", probabilities[:, ::3, ::3, ::3])


WANTED = (
    "fomo/**/*.nii.gz",
    "nnUNet_raw/Dataset500_*/*",
    "nnUNet_raw/Dataset701_*/imagesTs/*",
    "nnUNet_preprocessed/Dataset500_*/**/*",
    "nnUNet_preprocessed/Dataset701_*/*Plans.json",
    "nnUNet_preprocessed/Dataset701_*/dataset.json",
    "nnUNet_results/Dataset500_*/mcl_mim/checkpoint_latest.pth",
    "nnUNet_results/Dataset500_*/mcl_mim/encoder.safetensors",
    "nnUNet_results/Dataset500_*/mcl_mim/config.yaml",
    "nnUNet_results/Dataset500_*/mcl_mim/progress.csv",
    "nnUNet_results/Dataset701_*/*/*.json",
    "nnUNet_results/Dataset701_*/*/fold_0/checkpoint_final.pth",
    "measured/embeddings.npz",
    "measured/*.tsv",
    "predicted/case_9.nii.gz",
    "predicted/every_third.npy",
)


def pack(root: Path, archive: Path) -> None:
    """Put what is wanted into the archive, in one order, with times in whole seconds, and without this machine."""
    files = sorted({file for pattern in WANTED for file in root.glob(pattern) if file.is_file()})
    with tarfile.open(archive, "w:xz", preset=9, format=tarfile.PAX_FORMAT) as packed:
        for file in files:
            if file.suffix in (".tsv", ".json", ".jsonl", ".csv", ".yaml", ".txt"):
                file.write_text(file.read_text().replace(str(root), ROOT))
            entry = packed.gettarinfo(file, str(file.relative_to(root)))
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = int(entry.mtime), 0, 0, "", ""
            with file.open("rb") as content:
                packed.addfile(entry, content)


if __name__ == "__main__":
    archive, section, plans = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), section, plans)
        pack(Path(folder), Path(archive).absolute())
    sys.stdout.write(f"{archive}: {Path(archive).stat().st_size:,} bytes\n")
