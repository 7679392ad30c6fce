"""What an installation brings, in throw-away environments: the trainers for nnU-Net's own commands, and no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN_TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class nnUNetTrainerOfTheUser(nnUNetTrainer):
    pass
"""

pytestmark = pytest.mark.slow


def run(*command, **variables) -> str:
    """Run a command without a value for nnUNet_extTrainer, unless one is given, and return what it printed."""
    env = {key: value for key, value in os.environ.items() if key not in ("nnUNet_extTrainer", "PYTHONPATH")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env | variables, cwd=ROOT.root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Error processing line" not in done.stderr, "Python complains about a start-up file: " + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the repository."""
    folder = tmp_path_factory.mktemp("clone") / "nnunet_ssl"
    ignored = shutil.ignore_patterns(".venv*", ".git", "demo_work", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """Built from a source distribution of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    return next(folder.glob("*.whl"))


@pytest.fixture
def python(tmp_path) -> Path:
    """The Python of a new environment that sees this one's packages, but none of their start-up files."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site_packages(python).joinpath("these_packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def site_packages(python: Path) -> Path:
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))


def pip(python: Path, *arguments) -> None:
    run(sys.executable, "-m", "pip", "--python", python, *arguments, "-q")


def install(python: Path, *what) -> None:
    pip(python, "install", "--no-deps", "--no-build-isolation", *what)


def trainer_folders(python: Path, **variables) -> str:
    return run(python, "-c", "import os; print(os.environ.get('nnUNet_extTrainer', ''))", **variables)


def module_of_trainer(python: Path, name: str, folder: Path, **variables) -> str:
    """Look a trainer up as nnUNetv2_train and nnUNetv2_predict do; return the module that it came from."""
    code = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find;"
        f"print(find({name!r}).__module__)"
    )
    variables |= {key: str(folder) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    return run(python, "-c", code, **variables).splitlines()[-1]


def test_a_wheel_holds_the_package_its_configs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    outside = {name for name in names if not name.startswith("nnunet_ssl/") and ".dist-info/" not in name}
    assert outside == {"nnunet_ssl_trainers.pth"}
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "nnunet_ssl").rglob("*") if path.is_file()}
    expected = {name for name in tracked if "__pycache__" not in name and not name.endswith(".pth")}
    assert {name for name in names if name.startswith("nnunet_ssl/")} == expected
    assert {"nnunet_ssl/pretraining/configs/mcl_mim.yaml", "nnunet_ssl/py.typed"} <= set(names)


@pytest.mark.parametrize("editable", [False, True], ids=["normal", "editable"])
def test_after_an_install_nnunet_finds_the_trainers_and_after_an_uninstall_nothing_is_left(
    python, wheel, source, tmp_path, editable
):
    before = {path.name for path in site_packages(python).iterdir()}
    install(python, *(["-e", source] if editable else [wheel]))
    for name in ("nnUNetTrainerMCLMIM", "nnUNetTrainerSwinFPNScratch", "nnUNetTrainerSSL"):
        assert module_of_trainer(python, name, tmp_path).startswith("nnunet_ssl.trainers")
    assert (python.parent / "nnssl_pretrain").is_file()

    pip(python, "uninstall", "-y", "nnunet_ssl")
    assert trainer_folders(python) == ""
    assert {path.name for path in site_packages(python).iterdir()} == before
    assert not list(python.parent.glob("nnssl_*"))


def test_the_users_own_trainer_folder_keeps_working_beside_ours(python, wheel, tmp_path):
    install(python, wheel)
    own = tmp_path / "trainers"
    own.mkdir()
    (own / "own_trainer.py").write_text(OWN_TRAINER)
    folders = trainer_folders(python, nnUNet_extTrainer=str(own)).split(os.pathsep)
    assert folders[0] == str(own) and len(folders) == 2
    for name in ("nnUNetTrainerOfTheUser", "nnUNetTrainerMCLMIM"):
        assert module_of_trainer(python, name, tmp_path, nnUNet_extTrainer=str(own))
    assert trainer_folders(python, nnUNet_extTrainer=folders[1]) == folders[1], "a child process adds it again"


def test_python_starts_without_complaint_when_the_package_is_half_removed(python, wheel):
    install(python, wheel)
    shutil.rmtree(site_packages(python) / "nnunet_ssl")
    assert trainer_folders(python) == ""
    assert trainer_folders(python, nnUNet_extTrainer="/mine") == "/mine"


def test_starting_python_imports_nothing_more(python, wheel):
    modules = "import sys; print(sorted(sys.modules))"
    before = run(python, "-c", modules)
    install(python, wheel)
    assert run(python, "-c", modules) == before
