"""No file can run code, and a file that cannot be used says why in one line."""

import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nnunet_ssl.architectures.safe_files import read_file
from nnunet_ssl.errors import UserError


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


def test_objects_of_somebody_elses_classes_are_refused_by_name(tmp_path):
    torch.save({"hyper_parameters": pathlib.PurePosixPath("/data")}, tmp_path / "model.ckpt")
    assert "pathlib.PurePosixPath" in refusal(tmp_path / "model.ckpt").replace("._local", "")


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
