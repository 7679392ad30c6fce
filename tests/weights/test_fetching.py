"""Published files are found by every address that people copy: against a server that answers as Hugging Face does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import foreign
import pytest
import torch
from safetensors.torch import save

from nnunet_ssl.errors import UserError
from nnunet_ssl.weights.encoders import read_checkpoint
from nnunet_ssl.weights.fetching import destination, locate

COMMIT = {"main": "1" * 40, "refs/pr/1": "2" * 40}


class Hub(BaseHTTPRequestHandler):
    """The two requests of huggingface_hub: a repository's files, and one of them."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        if path.startswith("/api/models/OWNER/NAME/tree/"):
            tree = [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in self.files.items()]
            return self._answer(json.dumps(tree).encode(), path.partition("/tree/")[2] in COMMIT)
        for revision in COMMIT:
            start = f"/OWNER/NAME/resolve/{revision}/"
            if path.startswith(start) and path[len(start) :] in self.files:
                return self._answer(self.files[path[len(start) :]], True, COMMIT[revision])
        return self._answer(b"", False)

    do_HEAD = do_GET

    def _answer(self, body, found, commit=""):
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Error-Code", "" if found else "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(stored, tmp_path):
    """Run ``nnssl_weights fetch`` against a hub with some files; return the process."""
    checkpoint = stored(foreign.umbra_checkpoint(foreign.umbra_encoder(), "masked")).read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "nnUNet_results": str(tmp_path / "results"),
        "no_proxy": "*",
    }

    def fetch(*arguments, files=("folder/model.ckpt",)):
        Hub.files = {"README.md": b"# weights"} | dict.fromkeys(files, checkpoint)
        command = [Path(sys.executable).with_name("nnssl_weights"), "fetch", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    yield fetch
    server.shutdown()


ADDRESSES = [
    ("https://huggingface.co/OWNER/NAME",),
    ("https://huggingface.co/OWNER/NAME/", "folder/model.ckpt"),
    ("huggingface.co/OWNER/NAME/tree/main/folder", "model.ckpt"),
    ("https://hf.co/OWNER/NAME/tree/refs%2Fpr%2F1",),
    ("https://huggingface.co/OWNER/NAME/resolve/main/folder/model.ckpt?download=true",),
    ("https://huggingface.co/OWNER/NAME/blob/main/folder/model.ckpt",),
    ("OWNER/NAME", "folder/model.ckpt"),
]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ADDRESSES, ids=" ".join)
def test_every_form_of_an_address_fetches_the_file(hub, arguments, tmp_path):
    done = hub(*arguments)
    assert done.returncode == 0, done.stderr
    found = tmp_path / "results" / "Dataset500_FOMO60K" / "mim" / "encoder.safetensors"  # the file tells the recipe
    assert read_checkpoint(found).metadata["imported"] == {"file": "model.ckpt", "origin": "umbra"}


@pytest.mark.slow
def test_what_the_hub_cannot_give_is_one_line(hub):
    several = hub("https://huggingface.co/OWNER/NAME", files=("a.ckpt", "b.pth"))
    assert several.returncode == 1
    assert "2 files that may be the checkpoint: a.ckpt, b.pth. Name the file" in several.stderr
    for arguments in (("OWNER/NAME", "nothing.ckpt"), ("https://huggingface.co/OWNER/OTHER",)):
        missing = hub(*arguments)
        assert missing.returncode == 1 and "cannot be downloaded from huggingface.co/OWNER/" in missing.stderr
        assert missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/datasets/OWNER/NAME",
        "https://huggingface.co/OWNER",
        "https://example.org/OWNER/NAME",
        "https://zenodo.org/records/1/files/model.pt",
    ],
)
def test_other_addresses_are_refused_with_the_way_out(address):
    with pytest.raises(UserError, match=r"no address of a model on huggingface\.co.* Download the file"):
        locate(address, None, None)


@pytest.mark.parametrize("recipe", ["../elsewhere", "a/b", "/tmp/elsewhere", "", ".", "..", ".hidden", "a b"])
def test_what_a_files_header_calls_its_method_names_no_folder_elsewhere(tmp_path, monkeypatch, recipe):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    with pytest.raises(UserError, match="is no name of a recipe"):
        destination(recipe, "Dataset500_FOMO60K")
    assert destination("mcl_mim-2.1", "Dataset500_FOMO60K").parent.parent == tmp_path / "Dataset500_FOMO60K"


@pytest.mark.parametrize(
    ("key", "value"),
    [("method", 5), ("method", ["mim"]), ("metadata", ["a"]), ("step", "ten"), ("architecture", "swin")],
)
def test_a_header_of_other_types_is_refused_in_a_sentence(tmp_path, key, value):
    described = {"architecture": {"backbone": "swin"}, "method": "mim", "step": 1, "preprocessing": {}, "metadata": {}}
    header = {"format": "nnunet_ssl"} | {name: json.dumps(one) for name, one in (described | {key: value}).items()}
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(save({"patch_embed.weight": torch.zeros(1)}, metadata=header))
    with pytest.raises(UserError, match=f"cannot be used: its header is not as this package writes it: {key} is"):
        read_checkpoint(path)


def test_two_revisions_are_not_guessed_between():
    with pytest.raises(UserError, match="names the revision main, and --revision v2"):
        locate("https://huggingface.co/OWNER/NAME/tree/main", "model.ckpt", "v2")


def test_a_folder_with_one_checkpoint_needs_no_name(tmp_path):
    (tmp_path / "mim").mkdir()
    torch.save({}, tmp_path / "mim" / "model.pth")
    (tmp_path / "README.md").touch()
    assert locate(str(tmp_path), None, None) == tmp_path / "mim" / "model.pth"
    (tmp_path / "other.pt").touch()
    with pytest.raises(UserError, match=r"2 files that may be the checkpoint: mim/model\.pth, other\.pt"):
        locate(str(tmp_path), None, None)
    assert locate(str(tmp_path), "other.pt", None) == tmp_path / "other.pt"
