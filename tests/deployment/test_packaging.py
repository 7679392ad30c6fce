"""What a package holds, what can't be packaged, and which weights a container takes."""

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tiny_models import write_model

import nnunet_ssl
from nnunet_ssl.deployment.cli import package as command
from nnunet_ssl.deployment.packaging import _distributions_of, _requirements, package
from nnunet_ssl.deployment.weights import find_weights
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.operating_point import FILE, OperatingPoint

OURS = Path(nnunet_ssl.__file__).parent / "trainers" / "discovery"
FOREIGN = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from helper_of_the_trainer import SOMETHING
class nnUNetTrainerForeign(nnUNetTrainer):
    pass
"""


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", folds=(0, 1))


@pytest.fixture(scope="module")
def made(packaged):
    return packaged(folds=(0, 1))


def test_the_command_packages_and_says_how_to_build(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["nnssl_package", str(model), "-o", str(tmp_path / "package"), "-f", "1"])
    command()
    assert "docker build" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "package" / "model" / "model_0").glob("fold_*")] == ["fold_1"]


def test_weights_are_small_and_safe_to_open(made):
    for path in made.glob("model/model_0/fold_*/checkpoint_final.pth"):
        content = torch.load(path, weights_only=True)
        assert set(content) == {"network_weights", "trainer_name", "inference_allowed_mirroring_axes", "init_args"}
    assert len(json.loads((made / "weights.json").read_text())) == 5


@pytest.mark.parametrize("name", ["Dockerfile", "apptainer.def"])
def test_a_build_copies_what_is_there_and_not_to_the_mount_point(made, name):
    text = (made / name).read_text()
    copied = re.findall(r"^(?:COPY|   ) (\S+) (/opt\S+)", text, flags=re.MULTILINE)
    assert {source for source, _ in copied} == {"requirements.txt", "app", "weights.json", "model"}
    assert all((made / source).exists() for source, _ in copied)
    assert not any(place.startswith("/opt/ml") for _, place in copied)
    assert "${" not in text and "python -m nnunet_ssl.deployment" in text.replace('", "', " ")


def test_an_image_says_how_grand_challenge_is_to_call_it(made):
    text = (made / "Dockerfile").read_text()
    assert "LABEL org.grand-challenge.api-method=invoke" in text and "EXPOSE 4743" in text and "USER user" in text


def test_all_that_is_needed_is_listed_with_its_version(made):
    lines = (made / "requirements.txt").read_text().split()
    names = {line.partition("==")[0] for line in lines}
    assert {"torch", "nnunetv2", "numpy", "simpleitk", "dynamic-network-architectures", "monai"} <= names
    assert "nnunet-ssl" not in names and not {"pytest", "ruff"} & names
    assert all(re.fullmatch(r"[a-z0-9-]+==[^+]+", line) for line in lines)


def test_the_models_operating_point_goes_along(model, tmp_path):
    (model / FILE).write_text(json.dumps({"point": {"threshold": 0.4}}))
    package([model], tmp_path / "one")
    package([model, write_model(tmp_path / "other")], tmp_path / "two")
    assert (tmp_path / "one" / "model" / FILE).is_file()
    assert not (tmp_path / "two" / "model" / FILE).exists(), "one model's point is not an ensemble's"


def test_a_calibration_goes_along_with_the_point_that_it_was_measured_at(model, tmp_path):
    point = OperatingPoint(threshold=0.4)
    calibration = model / "calibration.json"
    calibration.write_text(json.dumps({"temperature": 1.5, "volume": {}, "point": asdict(point)}))
    with pytest.raises(UserError, match="of another operating point"):
        package([model], tmp_path / "none")
    (model / FILE).write_text(json.dumps({"point": {"threshold": 0.3}}))
    with pytest.raises(UserError, match="of another operating point"):
        package([model], tmp_path / "other")
    (model / FILE).write_text(json.dumps({"point": {"threshold": 0.4}}))
    package([model], tmp_path / "same")
    assert (tmp_path / "same" / "model" / "calibration.json").is_file()
    calibration.write_text("[]")
    with pytest.raises(UserError, match="not what nnssl_evaluate calibration writes"):
        package([model], tmp_path / "broken")


def nothing_learned(model):
    return {"learned": model}


def no_trainer(model):
    write_model(model, trainer="nnUNetTrainerForeign")
    return {}


def a_second_fold_that_is_cut_off(model):
    path = model / "fold_1" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:2000])
    return {}


@pytest.mark.parametrize("spoil", [nothing_learned, no_trainer, a_second_fold_that_is_cut_off])
def test_a_package_that_fails_leaves_nothing_in_the_way_of_the_next(model, tmp_path, spoil):
    with pytest.raises(UserError):
        package([model], tmp_path / "package", **spoil(model))
    assert not list(tmp_path.glob("package/*"))
    package([write_model(tmp_path / "sound")], tmp_path / "package")


def forget_a_fold(model):
    (model / "fold_1" / "checkpoint_final.pth").rename(model / "fold_1" / "checkpoint_best.pth")


def make_a_cascade(model):
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    (model / "plans.json").write_text(json.dumps(plans))


def read_pictures(model):
    text = (model / "plans.json").read_text()
    (model / "plans.json").write_text(text.replace("NibabelIOWithReorient", "NaturalImage2DIO"))


def test_a_networks_package_is_installed_by_the_name_that_pip_knows():
    assert _distributions_of("cc3d") == ["connected-components-3d"]
    assert _distributions_of("torch") == ["torch"]
    assert "connected-components-3d" in {line.partition("==")[0] for line in _requirements({"cc3d"})}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (forget_a_fold, "no checkpoint_final.pth of fold 1"),
        (make_a_cascade, "second stage of a cascade"),
        (read_pictures, "NaturalImage2DIO"),
        (lambda model: (model / "plans.json").unlink(), "no folder of a model"),
        (lambda model: (model / "fold_0" / "checkpoint_final.pth").write_bytes(b"PK\3\4"), "not a complete"),
    ],
)
def test_what_can_not_be_packaged_is_refused(model, tmp_path, spoil, message):
    spoil(model)
    with pytest.raises(UserError, match=message):
        package([model], tmp_path / "package", folds=["0", "1"])


def test_models_that_differ_in_what_they_see_are_refused(model, tmp_path):
    other = write_model(tmp_path / "other", channels=("T2",))
    with pytest.raises(UserError, match="differ in channels"):
        package([model, other], tmp_path / "package")


def test_a_full_folder_is_left_alone(model, tmp_path):
    with pytest.raises(UserError, match="not empty"):
        package([model], tmp_path)


def test_a_trainer_of_ones_own_goes_along_with_its_folder(tmp_path, monkeypatch):
    own = tmp_path / "trainers"
    own.mkdir()
    (own / "foreign_trainer.py").write_text(FOREIGN)
    (own / "helper_of_the_trainer.py").write_text("SOMETHING = 1\n")
    model = write_model(tmp_path / "model", trainer="nnUNetTrainerForeign")
    with pytest.raises(UserError, match="nnUNetTrainerForeign"):
        package([model], tmp_path / "without")
    monkeypatch.setenv("nnUNet_extTrainer", f"{own}{os.pathsep}{OURS}")
    package([model], tmp_path / "package")
    names = {path.name for path in (tmp_path / "package" / "app" / "trainers").iterdir()}
    assert names == {"foreign_trainer.py", "helper_of_the_trainer.py"}


def test_the_weights_are_found_wherever_they_lie_and_only_if_they_are_whole(made, tmp_path):
    mount = tmp_path / "mount"
    assert find_weights(made, mount) == made / "model", "no mount point"
    (mount / "lost+found").mkdir(parents=True)
    assert find_weights(made, mount) == made / "model", "nothing was uploaded"
    shutil.copytree(made / "model", mount, dirs_exist_ok=True)
    assert find_weights(made, mount) == mount
    plans = mount / "model_0" / "plans.json"
    plans.write_text(plans.read_text() + " ")
    with pytest.raises(UserError, match=r"plans.json is not the file that was packaged"):
        find_weights(made, mount)


def test_weights_that_are_nowhere_are_an_error_that_names_the_places(made, tmp_path):
    shutil.copytree(made, tmp_path / "package", ignore=shutil.ignore_patterns("model", "app"))
    with pytest.raises(UserError, match=r"neither in .*mount nor in .*model"):
        find_weights(tmp_path / "package", tmp_path / "mount")


def test_the_packaged_program_is_this_one(made):
    ours = Path(__file__).parents[2] / "nnunet_ssl" / "deployment" / "challenge.py"
    assert (made / "app" / "nnunet_ssl" / "deployment" / "challenge.py").read_bytes() == ours.read_bytes()
