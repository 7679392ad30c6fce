"""What the demo runs: the real commands, in order, with small networks and few steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nnunet_ssl.commands import KEPT_MEMORY
from nnunet_ssl.trainers.settings import Settings

SUBJECTS, TRAINING_CASES, TEST_CASES = 24, 24, 6
VOXEL_MM = 4
TRAINER = "nnUNetTrainerMCLMIM"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")

SMALL_PRETRAINING = (
    "swin.embed_dim=16",
    "swin.depths=1,1,1",
    "swin.num_heads=1,2,4",
    "swin.window_size=4",
    "patch_size=32,32,32",
    "batch_size=4",
    "masked.unpaired_batch_size=1",
    "queue_size=256",
    "steps=300",
    "learning_rate=5e-4",
    "workers=1",
    "log_every=25",
    "gradients_every=5",
    "validation.every=50",
    "validation.fraction=0.15",
)
"""At 4 mm, 32 voxels are 128 mm, a third more than the paper has; three stages in place of four leave eight cells."""

SMALL_FINETUNING = "steps=800,epoch_steps=100,patch_size=32x32x32,batch_size=2"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command.

    Attributes:
        name: of its log and of the mark that it is done.
        title: what it is for.
        command: program and arguments.
        continued: arguments to add when an earlier try was interrupted; None: such a try is begun anew.
        leftovers: folders that an earlier try leaves and this command would not overwrite; removed when it begins anew.
    """

    name: str
    title: str
    command: tuple[str, ...]
    continued: tuple[str, ...] | None = None
    leftovers: tuple[Path, ...] = field(default=())


def variables(work: Path, device: str) -> dict[str, str]:
    """The environment of the steps: nnU-Net's folders and number of processes, and the length of the fine-tuning."""
    memory = KEPT_MEMORY if device == "cpu" else {}
    folders = {name: str(work / name) for name in FOLDERS}
    # nnU-Net starts eight processes to write six small files, and each of them imports PyTorch first.
    return {**folders, "nnssl_settings": SMALL_FINETUNING, "nnUNet_def_n_proc": "2", **memory}


def steps(work: Path, device: str) -> list[Step]:
    """List the steps.

    Args:
        work: the demo's folder.
        device: cpu, cuda or mps.
    """
    corpus, atlas, truth, predictions = (work / name for name in ("fomo", "ATLAS_2", "truth", "predictions"))
    raw, preprocessed, results = (work / name for name in FOLDERS)
    images = raw / "Dataset501_ATLASv2" / "imagesTs"
    pretrained = results / "Dataset500_FOMO60K" / "mcl_mim"
    size = ("--voxel_mm", str(VOXEL_MM))
    plans = (
        "nnUNetPlans" + Settings().updated(SMALL_FINETUNING).suffix()
    )  # other settings than the defaults: another model
    model = ("-d", "501", "-c", "3d_fullres", "-f", "0", "-tr", TRAINER, "-p", plans, "-device", device)
    return [
        Step(
            name="01_scans",
            title=f"Write a synthetic corpus of {SUBJECTS} subjects without labels, in FOMO's layout",
            command=("python", "-m", "nnunet_ssl.phantom", "fomo", str(corpus), "-n", str(SUBJECTS), *size),
            leftovers=(corpus,),
        ),
        Step(
            name="02_strokes",
            title="Write a synthetic ATLAS: T1 images with stroke lesions",
            command=(
                *("python", "-m", "nnunet_ssl.phantom", "atlas", str(atlas), "-n", str(TRAINING_CASES)),
                *("--n_test", str(TEST_CASES), "--truth", str(truth), *size),
            ),
            leftovers=(atlas, truth),
        ),
        Step(
            name="03_index",
            title="Index the corpus (a manifest; images stay where they are)",
            command=("python", "-m", "nnunet_ssl.conversion.fomo60k", "-i", str(corpus)),
        ),
        Step(
            name="04_prepare",
            title="Preprocess the corpus",
            command=("nnssl_prepare", "-d", "500", "-np", "2", "--spacing", *[str(VOXEL_MM)] * 3),
            continued=(),
            leftovers=(preprocessed / "Dataset500_FOMO60K",),
        ),
        Step(
            name="05_pretrain",
            title="Pre-train an encoder: modality-invariant contrastive learning and masked image modelling",
            command=("nnssl_pretrain", "-c", "mcl_mim", "-device", device, "--set", *SMALL_PRETRAINING),
            continued=("--c",),
            leftovers=(pretrained,),
        ),
        Step(
            name="06_convert",
            title="Convert ATLAS for nnU-Net",
            command=("python", "-m", "nnunet_ssl.conversion.atlas_v2", "-i", str(atlas), "-np", "2"),
        ),
        Step(
            name="07_plan",
            title="Plan and preprocess: stock nnU-Net",
            command=(
                *("nnUNetv2_plan_and_preprocess", "-d", "501", "-c", "3d_fullres", "-np", "2", "-npfp", "2"),
                "--verify_dataset_integrity",
            ),
            leftovers=(preprocessed / "Dataset501_ATLASv2",),
        ),
        Step(
            name="08_train",
            title="Fine-tune for lesion segmentation: stock nnU-Net, one flag more than usual",
            command=("nnUNetv2_train", "501", "3d_fullres", "0", "-tr", TRAINER, "-device", device),
            continued=("--c",),
            leftovers=(results / "Dataset501_ATLASv2",),
        ),
        Step(
            name="09_predict",
            title="Predict the held-out cases: stock nnU-Net",
            command=(
                *("nnUNetv2_predict", "-i", str(images), "-o", str(predictions)),
                *(*model, "--disable_tta", "-npp", "1", "-nps", "1"),
            ),
            leftovers=(predictions,),
        ),
        Step(
            name="10_lesions",
            title="Compare the predictions with the truth",
            command=(
                *("nnssl_evaluate", "lesions", "-ref", str(truth), "-pred", str(predictions)),
                *("--preset", "atlas", "-o", str(work / "evaluation")),
            ),
        ),
        Step(
            name="11_alignment",
            title="Measure how close a subject's modalities lie in the representation",
            command=(
                *("nnssl_evaluate", "alignment", "-d", "500", "-device", device, "--checkpoint"),
                *(str(pretrained), "-o", str(work / "evaluation")),
            ),
        ),
    ]
