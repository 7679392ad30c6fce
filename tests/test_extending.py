"""What docs/extending.md walks through: an objective and a backbone from a package outside, found and trained, and a
data set by a script."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml

from nnunet_ssl.architectures import backbones
from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining import config, objectives
from nnunet_ssl.pretraining.config import from_dict, load_config
from nnunet_ssl.pretraining.loop import pretrain
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.weights.encoders import load_encoder, read_checkpoint, write_encoder

DOCS = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
FAST = ["patch_size=16", "batch_size=2", "steps=2", "workers=0", "log_every=1", "gradients_every=1"]
FAST += ["validation.fraction=0.3", "validation.batches=1", "masked.width=8", "masked.unpaired_batch_size=2"]
SMALL_SWIN = ["swin.embed_dim=8", "swin.depths=1,1", "swin.num_heads=1,2", "swin.window_size=4"]


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    """The page's code as an installed package."""
    code = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    points = re.findall(r'```toml\n\[project.entry-points\."(.*?)"\]\n(\w+) = "(.*?)"\n```', DOCS)
    assert len(code) - 1 == len(points) == 2
    (tmp_path / "my_package.py").write_text("\n\n".join(code[:2]))
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(f"[{group}]\n{name} = {where}" for group, name, where in points))
    monkeypatch.syspath_prepend(str(tmp_path))
    for cached in (objectives.announced, backbones.known):
        cached.cache_clear()
    yield
    for cached in (objectives.announced, backbones.known):
        cached.cache_clear()
    sys.modules.pop("my_package", None)


def figures_of(nnunet_folders, recipe):
    return (nnunet_folders["nnUNet_results"] / "Dataset500_FOMO60K" / recipe / "progress.csv").read_text()


def test_an_objective_from_outside_learns_beside_ours(my_package, write_prepared, nnunet_folders, tmp_path):
    write_prepared()
    recipe = tmp_path / "mim_brightness.yaml"
    recipe.write_text(re.search(r"```yaml\n(.*?)```", DOCS, re.DOTALL)[1])
    settings = load_config(recipe, [*FAST, *SMALL_SWIN])
    assert from_dict(yaml.safe_load(settings.as_yaml())) == settings
    assert [objective.name for objective in settings.objectives] == ["masked", "brightness"]
    pretrain(settings, 500, False, torch.device("cpu"))
    header = figures_of(nnunet_folders, "mim_brightness").splitlines()[0]
    assert {"loss/brightness", "gradient/brightness", "gradient/masked", "gradient/cosine"} <= set(header.split(","))
    balanced = load_config(recipe, ["balance=learning_rates", "branches.brightness=2"])
    assert balanced.branch_numbers == {"masked": 1, "brightness": 2}
    with pytest.raises(UserError, match=r"did you mean 'brightness\.weight'"):
        load_config(recipe, ["brightness.weigt=1"])
    with pytest.raises(UserError, match=r"brightness\.weight is -1\.0; it must be 0 or more"):
        load_config(recipe, ["brightness.weight=-1"])


def test_a_backbone_from_outside_is_pretrained_and_read_back(my_package, write_prepared, nnunet_folders):
    write_prepared()
    settings = load_config("mim", [*FAST, "backbone=pooled", "pooled.width=8"])
    assert from_dict(yaml.safe_load(settings.as_yaml())) == settings
    pretrain(settings, 500, False, torch.device("cpu"))
    folder = nnunet_folders["nnUNet_results"] / "Dataset500_FOMO60K" / "mim"
    for file in ("encoder.safetensors", "checkpoint_final.pth"):
        pretrained = read_checkpoint(folder / file)
        assert pretrained.architecture == {"backbone": "pooled", "in_channels": 1, "width": 8}
        encoder = build_encoder(pretrained.architecture)
        assert load_encoder(encoder, pretrained).fraction == 1.0
    header = figures_of(nnunet_folders, "mim").splitlines()[0].split(",")
    assert {"gradient/depth/0_part1/masked", "gradient/depth/1_part2/masked"} <= set(header)


@pytest.fixture
def converted(nnunet_folders, tmp_path):
    """A data set of nnU-Net, by the page's script from images in somebody's folder; and what the script said."""
    (tmp_path / "my_dataset.py").write_text(re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)[2])
    place = np.indices((24, 24, 24)) - 11.5
    brain = (place**2).sum(0) < 11**2
    for number in range(6):
        lesion = ((place - number) ** 2).sum(0) < 16
        image = np.where(brain, 100 + 50 * lesion + number, 0).astype(np.float32)
        for name, array in (("flair", image), ("lesion", lesion.astype(np.uint8))):
            if (number, name) != (5, "lesion"):
                nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / f"case{number}_{name}.nii.gz")
    done = subprocess.run(
        [sys.executable, tmp_path / "my_dataset.py", "-i", tmp_path, "-np", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return nnunet_folders["nnUNet_raw"] / "Dataset610_Flat", done.stdout


def test_a_data_set_from_outside_becomes_nnunets(converted, tmp_path):
    folder, said = converted
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 5
    assert "Skipped (no lesion mask): case5" in said
    for number in range(5):
        mask = nibabel.load(folder / "labelsTr" / f"case{number}.nii.gz").get_fdata()
        assert np.array_equal(mask, nibabel.load(tmp_path / f"case{number}_lesion.nii.gz").get_fdata())
        assert (folder / "imagesTr" / f"case{number}_0000.nii.gz").is_file()


@pytest.mark.slow
def test_a_data_set_from_outside_is_planned_and_trained(converted, tmp_path, monkeypatch):
    architecture = {"backbone": "swin", "in_channels": 1, "embed_dim": 6, "depths": [1, 1], "num_heads": [1, 1]}
    weights = tmp_path / "encoder.safetensors"
    tensors = build_encoder(architecture).state_dict()
    about = {"method": "toy", "step": 1, "preprocessing": None, "metadata": {}}
    write_encoder(weights, tensors, architecture=architecture, **about)
    monkeypatch.setenv("nnssl_checkpoint", str(weights))
    monkeypatch.setenv("nnssl_settings", "steps=1,freeze_share=0,patch_size=16x16x16,batch_size=2")
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    programs = Path(sys.executable).parent
    for command in (
        "nnUNetv2_plan_and_preprocess -d 610 -c 3d_fullres -np 1 -npfp 1 --verify_dataset_integrity",
        "nnUNetv2_train 610 3d_fullres 0 -tr nnUNetTrainerSSL -device cpu",
    ):
        program, *options = command.split()
        done = subprocess.run([programs / program, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert list(tmp_path.glob("nnUNet_results/Dataset610_Flat/*/fold_0/checkpoint_final.pth"))


def test_an_unknown_backbone_is_an_error_that_lists_the_known(my_package):
    with pytest.raises(UserError, match="'perceiver'; it can be swin, resenc, primus, pooled"):
        build_encoder({"backbone": "perceiver"})
    with pytest.raises(UserError, match="'perceiver'; it can be swin, resenc, primus, pooled"):
        load_config("mim", ["backbone=perceiver"])


@pytest.mark.parametrize("section", ["steps", "masked", "swin"])
def test_a_section_of_another_package_never_takes_a_key_of_ours(monkeypatch, section):
    kind = type("Theirs", (objectives.Contrastive,), {"section": section})
    monkeypatch.setattr(config, "announced", lambda: (kind,))
    with pytest.raises(UserError, match=f"section '{section}', which is taken"):
        load_config("mim")


def test_a_backbone_of_another_package_never_takes_the_place_of_ours(monkeypatch):
    monkeypatch.setattr(backbones, "announced", lambda group: [backbones.SWIN])
    backbones.known.cache_clear()
    with pytest.raises(UserError, match="Two backbones have one name"):
        backbones.known()


def test_a_package_that_cannot_be_imported_is_named(my_package, tmp_path):
    (tmp_path / "my_package.py").write_text("import nowhere_to_be_found")
    with pytest.raises(UserError, match=r"my_package announces 'brightness' .* pip uninstall my_package"):
        load_config("mim")


def test_an_encoder_whose_maps_do_not_halve_the_grid_is_refused(my_package):
    from my_package import Pooled

    settings = load_config("mim", [*FAST, "backbone=pooled"])
    stretched = dataclasses.replace(
        backbones.known()["pooled"], encoder=type("Stretched", (Pooled,), {"__init__": stretch(Pooled)})
    )
    backbones.known()["pooled"] = stretched
    with pytest.raises(ValueError, match=r"cells of 4 voxels.*the strides of Stretched are \(2, 8\)"):
        Learner(settings)


@pytest.mark.parametrize("missing", ["channels", "strides", "parts"])
def test_a_module_that_is_no_encoder_is_refused(my_package, missing):
    from my_package import Pooled

    def without(*given, **settings):
        encoder = Pooled(*given, **settings)
        delattr(encoder if missing in vars(encoder) else Pooled, missing)
        return encoder

    settings = load_config("mim", [*FAST, "backbone=pooled"])
    backbones.known()["pooled"] = dataclasses.replace(backbones.known()["pooled"], encoder=without)
    with pytest.raises(TypeError, match=r"Pooled is no encoder, which has channels, strides and parts\(\)"):
        Learner(settings)


def stretch(kind):
    def build(encoder, *arguments, **keywords):
        kind.__init__(encoder, *arguments, **keywords)
        encoder.strides = (2, 8)

    return build
