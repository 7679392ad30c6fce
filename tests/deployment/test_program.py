"""A package's program as a container runs it: without a network, on two CPUs, over HTTP or by its command line."""

import errno
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scans import AFFINE, scan

from nnunet_ssl.deployment.__main__ import _find_trainers, main
from nnunet_ssl.deployment.bids import segment_dataset
from nnunet_ssl.deployment.challenge import make_server
from nnunet_ssl.deployment.resources import THREADS
from nnunet_ssl.deployment.segmenting import Segmentation
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.operating_point import FILE
from nnunet_ssl.imaging.geometry import Volume, canonical, read_volume
from nnunet_ssl.imaging.metaimage import from_sitk, read_image, write_image

pytestmark = pytest.mark.slow

ORIENTATIONS = [
    "".join(letters[flip] for letters, flip in zip(axes, flips))
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for flips in itertools.product((0, 1), repeat=3)
]
NO_NETWORK = """
import socket
def connect(self, address):
    raise AssertionError(f"a connection to {address}")
socket.socket.connect = connect
"""
MASK, MAP = "images/stroke-lesion-segmentation", "images/lesion-probability-map"
CPUS = 2


@pytest.fixture(scope="module")
def package(packaged, tmp_path_factory):
    """A package with an operating point; without mirroring, for speed."""
    folder = tmp_path_factory.mktemp("point")
    point = {"threshold": 0.5, "minimum_mm3": 100.0, "mirroring": False, "constant_map_when_empty": True}
    (folder / FILE).write_text(json.dumps({"point": point}))
    return packaged(learned=folder)


@pytest.fixture(scope="module")
def start(package, tmp_path_factory):
    """A function that starts the packaged program, on the packaged copy of this package, with two CPUs at most."""
    blocked = tmp_path_factory.mktemp("blocked")
    (blocked / "sitecustomize.py").write_text(NO_NETWORK)
    started = []

    def run(*arguments, mount="nowhere", **options):
        env = {key: value for key, value in os.environ.items() if not key.startswith(("nnUNet", "OMP", "MKL"))}
        env |= {"PYTHONPATH": f"{blocked}{os.pathsep}{package / 'app'}", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "nnunet_ssl.deployment"),
                *("--package", str(package), "--mount", str(mount), *map(str, arguments)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=blocked,
            env=env,
            preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS]),
            **options,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


class Server:
    """The running program, its folders, and what it printed."""

    def __init__(self, process, source, target, port):
        self.process, self.source, self.target = process, source, target
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path, method):
        request = urllib.request.Request(self.url + path, method=method, data=b"{}" if method == "POST" else None)
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                return reply.status, json.loads(reply.read())["detail"]
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["detail"]

    def place(self, volume, name):
        folder = self.source / "images" / "t1-brain-mri"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        write_image(folder / name, volume)

    def segment(self, volume, name):
        """Have a case segmented; return its mask and map, and whether they lie where the image lies."""
        self.place(volume, name)
        assert self.ask("/invoke", "POST") == (201, "ok")
        (mask,), (shown,) = (list((self.target / folder).iterdir()) for folder in (MASK, MAP))
        mask, shown = sitk.ReadImage(str(mask)), sitk.ReadImage(str(shown))
        assert (mask.GetPixelID(), shown.GetPixelID()) == (sitk.sitkUInt8, sitk.sitkFloat32)
        for each in (mask, shown):
            assert each.GetSize() == volume.array.shape
            np.testing.assert_allclose(from_sitk(each).affine, volume.affine, atol=1e-4)
        return from_sitk(mask), from_sitk(shown)


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    root = tmp_path_factory.mktemp("container")
    (root / "opt_ml_model").mkdir()
    (root / "input").mkdir()
    metadata = {"CENTER": None, "CHRONICITY": None, "DAYS_POST_STROKE": None}
    (root / "input" / "stroke-metadata.json").write_text(json.dumps(metadata))
    folders = ("--input", root / "input", "--output", root / "output", "--port", 0)
    process = start("serve", *folders, mount=root / "opt_ml_model")
    assert f"{min(CPUS, len(os.sched_getaffinity(0)))} CPU threads" in process.stdout.readline()
    port = re.search(r"port (\d+)", process.stdout.readline())[1]
    running = Server(process, root / "input", root / "output", port)
    assert running.ask("/health", "GET") == (200, "ok")
    return running


def test_the_mask_comes_back_onto_the_images_grid_in_all_orientations(server):
    image = scan((8, 9, 7))
    expected, shown = server.segment(image, "case.nii.gz")
    assert 0.02 < expected.array.mean() < 0.98
    assert len(set(ORIENTATIONS)) == 48
    for number, orientation in enumerate(ORIENTATIONS):
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation)
        )
        stored = nib.Nifti1Image(image.array, image.affine).as_reoriented(turn)
        name = f"{orientation}.mha" if number % 2 else f"{orientation}.nii.gz"
        found, values = server.segment(Volume(np.asarray(stored.dataobj), stored.affine), name)
        assert np.array_equal(canonical(found).array, expected.array), orientation
        assert np.array_equal(canonical(values).array, shown.array), orientation


def test_thick_slices(server):
    image = scan((16, 16, 4), np.diag([0.8, 0.8, 6.0, 1.0]))
    mask, shown = server.segment(image, "thick.mha")
    assert mask.array.any() and np.ptp(shown.array) > 0


def test_an_empty_result_is_a_mask_of_zeros_and_a_constant_map(server):
    mask, shown = server.segment(scan().with_array(np.zeros((5, 6, 7), np.float32)), "empty.nii.gz")
    assert not mask.array.any() and np.ptp(shown.array) == 0


def test_a_case_that_fails_leaves_no_mask_of_the_one_before_and_the_next_is_served(server):
    server.segment(scan((6, 6, 6)), "good.nii.gz")
    folder = server.source / "images" / "t1-brain-mri"
    (folder / "good.nii.gz").write_bytes(b"no image")
    status, why = server.ask("/invoke", "POST")
    assert status == 500 and "good.nii.gz can't be read" in why
    assert not list((server.target / MASK).iterdir()) and not list((server.target / MAP).iterdir())
    (folder / "good.nii.gz").unlink()
    status, why = server.ask("/invoke", "POST")
    assert status == 500 and "must hold one image" in why
    server.segment(scan((6, 6, 6)), "good.nii.gz")


def test_other_addresses_are_unknown(server):
    assert server.ask("/", "GET")[0] == server.ask("/health", "POST")[0] == 404


def test_a_model_that_can_not_be_loaded_makes_it_ill(tmp_path):
    def load():
        raise UserError("The weights are another's.")

    running = make_server(load, tmp_path, tmp_path, 0)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    asked = Server(None, tmp_path, tmp_path, running.server_address[1])
    assert [asked.ask("/health", "GET"), asked.ask("/invoke", "POST")] == [(500, "The weights are another's.")] * 2
    running.shutdown()
    running.server_close()


def test_health_is_told_amid_a_case(tmp_path):
    asked, told = threading.Event(), threading.Event()

    class Slow:
        def segment(self, images):
            asked.set()
            assert told.wait(60)
            raise UserError("enough")

    running = make_server(Slow, tmp_path, tmp_path, 0)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    server = Server(None, tmp_path, tmp_path, running.server_address[1])
    server.place(scan((4, 4, 4)), "case.mha")
    answers = []
    case = threading.Thread(target=lambda: answers.append(server.ask("/invoke", "POST")))
    case.start()
    assert asked.wait(60)
    assert server.ask("/health", "GET") == (200, "ok")
    told.set()
    case.join()
    assert answers == [(500, "enough")]
    running.shutdown()
    running.server_close()


def test_fomos_command_line_gives_a_mask_on_the_images_grid(start, tmp_path):
    image = scan()
    write_image(tmp_path / "t1.nii.gz", image)
    process = start("predict", "--t1", tmp_path / "t1.nii.gz", "--output", tmp_path / "out" / "mask.nii.gz")
    shown = process.stdout.read()
    assert process.wait() == 0, shown
    assert re.search(r"\d s, [\d.]+ GiB of memory", shown)
    mask = read_volume(tmp_path / "out" / "mask.nii.gz")
    assert mask.array.shape == image.array.shape and 0 < mask.array.mean() < 1
    np.testing.assert_allclose(mask.affine, AFFINE, atol=1e-5)


def program(monkeypatch, *arguments):
    """Run the program in this process."""
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["nnunet_ssl.deployment", *map(str, arguments)])
        for name in (*THREADS, "nnUNet_extTrainer"):
            patch.setenv(name, os.environ.get(name, ""))  # so that it is put back
        main()


def test_fomos_scores_are_a_probability_and_a_vector(package, tmp_path, monkeypatch):
    write_image(tmp_path / "t1.nii.gz", scan())
    for name in ("probability.txt", "features.npy"):
        program(
            monkeypatch,
            *("--package", package, "--mount", tmp_path / "none"),
            *("predict", "--input", tmp_path / "t1.nii.gz", "--output", tmp_path / name),
        )
    assert 0.5 < float((tmp_path / "probability.txt").read_text()) <= 1
    features = np.load(tmp_path / "features.npy")
    assert features.ndim == 1 and features.dtype == np.float32 and np.isfinite(features).all()


def test_the_program_finds_the_trainers_without_an_installation(package, monkeypatch):
    own = package / "app" / "trainers"
    own.mkdir()
    monkeypatch.setenv("nnUNet_extTrainer", "/mine")
    _find_trainers(package)
    _find_trainers(package)
    folders = os.environ["nnUNet_extTrainer"].split(os.pathsep)  # noqa: SIM112
    own.rmdir()
    assert folders[0] == "/mine" and folders[2:] == [str(own)]
    assert (Path(folders[1]) / "nnunet_ssl_arms.py").is_file()


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), MemoryError(), ValueError("of a library")])
def test_whatever_fails_in_a_session_the_others_are_segmented(tmp_path, error):
    for subject in ("sub-1", "sub-2"):
        (tmp_path / subject / "anat").mkdir(parents=True)
        write_image(tmp_path / subject / "anat" / f"{subject}_T1w.nii.gz", scan())

    class Model:
        channels = ("T1",)
        failed = False

        def choose(self, images):
            return [images["t1"]]

        def calibrated(self, probabilities):
            return probabilities

        def segment(self, images):
            if not self.failed:
                self.failed = True
                raise error
            return Segmentation(labels=images[0], probabilities=images[0], highest=1.0)

    assert segment_dataset(Model(), tmp_path, tmp_path / "out") == 1
    assert [path.name for path in (tmp_path / "out").rglob("*_mask.nii.gz")] == ["sub-2_label-lesion_mask.nii.gz"]


def test_a_full_disk_ends_the_run(tmp_path):
    (tmp_path / "sub-1" / "anat").mkdir(parents=True)
    write_image(tmp_path / "sub-1" / "anat" / "sub-1_T1w.nii.gz", scan())
    model = SimpleNamespace(channels=("T1",), choose=lambda images: [images["t1"]], segment=full)
    with pytest.raises(OSError, match="no space"):
        segment_dataset(model, tmp_path, tmp_path / "out")


def full(images):
    raise OSError(errno.ENOSPC, "no space left")


def test_a_bids_data_set_gets_derivatives(package, tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "bids", tmp_path / "bids" / "derivatives" / "lesions"
    for name in ("sub-1/ses-1/anat/sub-1_ses-1_acq-x_T1w", "sub-2/anat/sub-2_T1w", "sub-3/anat/sub-3_FLAIR"):
        (source / name).parent.mkdir(parents=True)
        write_image(source / f"{name}.nii.gz", scan())
    (source / "sub-2" / "anat" / "sub-2_T1w.nii.gz").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="1 sessions failed"):
        program(monkeypatch, "--package", package, "--mount", tmp_path / "none", "bids", source, target)
    stem = target / "sub-1" / "ses-1" / "anat" / "sub-1_ses-1_acq-x_label-lesion"
    assert read_image(stem.with_name(stem.name + "_mask.nii.gz")).array.any()
    assert read_image(stem.with_name(stem.name + "_probseg.nii.gz")).array.max() <= 1
    about = json.loads(stem.with_name(stem.name + "_mask.json").read_text())
    assert about["Sources"] == ["bids::sub-1/ses-1/anat/sub-1_ses-1_acq-x_T1w.nii.gz"]
    assert json.loads((target / "dataset_description.json").read_text())["DatasetType"] == "derivative"
    assert not list(target.rglob("sub-3*")) and "sub-3" in capsys.readouterr().out
