"""No file can run code, and a file that cannot be used says why in one line."""

import argparse
import collections
import importlib
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nnunet_ssl.errors import UserError
from nnunet_ssl.weights.safe_files import Placeholder, read_file


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, victim: pathlib.Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        read_file(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, as_zip):
    path, victim = tmp_path / "model.ckpt", tmp_path / "victim"
    content = {"state_dict": {"weight": torch.zeros(2)}, "hyper_parameters": Malicious(victim)}
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    assert "posix.mkdir" in refusal(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the file is as dangerous as it claims
    assert victim.exists()


def test_plain_pickle_is_refused_and_not_run(tmp_path):
    path, victim = tmp_path / "model.pkl", tmp_path / "victim"
    path.write_bytes(pickle.dumps(Malicious(victim)))
    refusal(path)
    assert not victim.exists()


class Victimiser:
    """Whatever is done with it, it makes a folder; as a class of a package that is nobody's but the file's."""

    victim: pathlib.Path

    def __new__(cls, *arguments):
        cls.victim.mkdir(exist_ok=True)
        return super().__new__(cls)

    def __reduce__(self):
        return Victimiser, (1,), {"state": 2}

    def __setstate__(self, state):
        self.victim.mkdir(exist_ok=True)


def test_objects_of_other_packages_become_placeholders_and_none_of_their_code_runs(tmp_path):
    Victimiser.victim = tmp_path / "victim"
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(2)}, "hyper_parameters": {"model": Victimiser(), "lr": 0.1}}, path)
    Victimiser.victim.rmdir()
    content = read_file(path).content
    assert torch.equal(content["state_dict"]["weight"], torch.ones(2)) and content["hyper_parameters"]["lr"] == 0.1
    assert repr(content["hyper_parameters"]["model"]).endswith("Victimiser>")
    assert not Victimiser.victim.exists()
    torch.load(path, weights_only=False)
    assert Victimiser.victim.exists()


def test_no_package_is_imported_for_a_placeholder(tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "victims_package.py").write_text("import os\nos.mkdir('victim')\nclass Model: pass\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "packages")}
    code = "import torch, victims_package as v; torch.save({'model': v.Model(), 'x': torch.ones(1)}, 'model.ckpt')"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
    (tmp_path / "victim").rmdir()
    code = "from nnunet_ssl.weights.safe_files import read_file; print(read_file('model.ckpt').content)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "<victims_package.Model>" in done.stdout and not (tmp_path / "victim").exists()


def test_paths_and_modules_among_the_hyper_parameters_do_not_matter(tmp_path):
    settings = {
        "path": pathlib.PurePosixPath("/data"),
        "model": torch.nn.Linear(2, 2),
        "names": argparse.Namespace(a=1),
    }
    torch.save({"state_dict": {"weight": torch.ones(2)}, "hyper_parameters": settings}, tmp_path / "model.ckpt")
    content = read_file(tmp_path / "model.ckpt").content
    assert all(isinstance(value, Placeholder) for value in content["hyper_parameters"].values())


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (eval, "eval"),
        (exec, "exec"),
        (__import__, "__import__"),
        (subprocess.Popen, "Popen"),
        (shutil.rmtree, "shutil.rmtree"),
        (importlib.import_module, "importlib.import_module"),
        (os.system, "system"),
    ],
)
def test_calls_of_pythons_library_are_refused_by_name(tmp_path, function, name, as_zip):
    path, content = tmp_path / "model.ckpt", {"state_dict": {"weight": torch.ones(2)}, "x": Calls(function, "argument")}
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    message = refusal(path)
    assert name in message and "store the weights alone" in message


def test_a_whole_network_is_refused_with_the_way_to_its_weights(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt")
    assert "holds a torch.nn.modules.linear.Linear" in message and "network.state_dict()" in message


def test_what_only_its_own_class_could_fill_is_refused_with_the_way_out(tmp_path):
    torch.save({"hyper_parameters": collections.defaultdict(list, a=[1])}, tmp_path / "model.ckpt")
    assert "store the weights alone" in refusal(tmp_path / "model.ckpt")


def test_an_archive_of_checkpoints_is_to_be_unpacked(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "fold0.zip", "w") as archive:
        archive.write(tmp_path / "model.pt", "fold0/model.pt")
    assert "unpack it, and take fold0/model.pt" in refusal(tmp_path / "fold0.zip")


def test_objects_hidden_in_numpys_arrays_are_refused(tmp_path):
    torch.save({"log": np.array([{}, None], dtype=object)}, tmp_path / "model.ckpt")
    refusal(tmp_path / "model.ckpt")


@pytest.mark.parametrize("as_zip", [True, False])
def test_numpys_numbers_are_read(tmp_path, as_zip):
    log = {
        "dice": [np.float32(0.5), np.float64(0.25)],
        "epoch": np.int64(3),
        "flag": np.bool_(True),
        "spacing": np.array([1.0, 2.0]),
        "shape": np.array([96, 96]),
        "name": np.str_("fold_0"),
        "device": torch.device("cpu"),
    }
    torch.save(log, tmp_path / "model.pth", _use_new_zipfile_serialization=as_zip)
    content = read_file(tmp_path / "model.pth").content
    assert content["dice"] == [0.5, 0.25] and content["epoch"] == 3 and content["flag"] and content["name"] == "fold_0"
    np.testing.assert_array_equal(content["spacing"], [1, 2])
    np.testing.assert_array_equal(content["shape"], [96, 96])


@pytest.mark.parametrize("first", [b"\x80", b"P"], ids=["as a pickle", "as a zip"])
def test_a_safetensors_file_may_begin_as_another_format(tmp_path, first):
    path = tmp_path / "encoder.safetensors"
    for length in range(256):  # the first byte is the lowest of the header's length, a multiple of eight
        save_file({"weight": torch.ones(2)}, path, metadata={"filler": "x" * length})
        if path.read_bytes()[:1] == first:
            break
    file = read_file(path)
    assert file.header["filler"] == "x" * length and torch.equal(file.content["weight"], torch.ones(2))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_file(tmp_path, share, suffix):
    path = tmp_path / f"model{suffix}"
    tensors = {"weight": torch.randn(64, 64)}
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "Copy or download it again" in refusal(path)


def test_flipped_bits_are_noticed(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"weight": torch.full((64, 64), 1.5)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "checksum" in refusal(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "neither"),
        (b"<html>Not found</html>", "neither"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\x80", "damaged|cannot be read"),
        (b"\x80\x04garbage", "damaged|cannot be read"),
        (b"PK\x03\x04garbage", "not a complete PyTorch file"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{garbage", "not a complete safetensors file"),
    ],
)
def test_other_files(tmp_path, content, reason):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_file(path)


def test_a_zip_that_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refusal(tmp_path / "model.pth")


def test_a_checkpoint_that_is_no_mapping(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "model.pth")
    assert "holds a list" in refusal(tmp_path / "model.pth")


def test_missing_file(tmp_path):
    assert "There is no checkpoint" in refusal(tmp_path / "model.pth")
