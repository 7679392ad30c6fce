"""A folder for Hugging Face: complete, honest about what is not known, and read back by `fetch`."""

import json

import foreign
import huggingface_hub
import pytest
import torch
import yaml

from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.weights.cli import weights
from nnunet_ssl.weights.encoders import read_checkpoint, write_encoder

SIZES = {"backbone": "resenc", "in_channels": 1, "features": [4, 8], "blocks": [1, 1]}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run ``nnssl_weights``; return its exit status or message, and what it printed."""
    for name in ("nnUNet_raw", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["nnssl_weights", *map(str, arguments)])
        try:
            weights()
        except SystemExit as end:
            return end.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


@pytest.fixture
def encoder(tmp_path):
    """An encoder as a pre-training leaves it."""
    file = tmp_path / "nnUNet_results" / "Dataset500_FOMO60K" / "mim" / "encoder.safetensors"
    counts = {"subjects": 1234, "sessions": 1300, "scans": 4000, "scans_by_modality": {"t1": 4000}, "sessions_mcl": 7}
    write_encoder(
        file,
        build_encoder(SIZES).state_dict(),
        architecture=SIZES,
        method="mim",
        step=200,
        preprocessing={"spacing": [1, 1, 1]},
        metadata={"config": {"recipe": "mim", "seed": 3}, "corpus": counts, "citations": ["He et al. MAE. 2022."]},
    )
    return file


@pytest.fixture
def audited(tmp_path):
    verdict = {
        "labelled": "Dataset501_ATLASv2",
        "content_compared": True,
        "pairs": {"same scan": 2, "same head": 1, "same name": 0, "alike": 0},
        "cases_met": 3,
        "cases": 655,
        "subjects_to_exclude": 3,
        "origins_shared": ["ARC"],
    }
    path = tmp_path / "nnUNet_raw" / "Dataset500_FOMO60K" / "audits" / "Dataset501_ATLASv2" / "verdict.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(verdict))


def test_the_folder_is_read_back_by_fetch(run, encoder, tmp_path):
    folder = tmp_path / "repository"
    assert run("push", encoder, "-o", folder, "--licence", "CC-BY-4.0")[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "encoder.safetensors"]
    assert json.loads((folder / "config.json").read_text())["architecture"] == SIZES

    assert run("fetch", folder, "-d", "Dataset600_Other")[0] == 0
    fetched = read_checkpoint(tmp_path / "nnUNet_results" / "Dataset600_Other" / "mim" / "encoder.safetensors")
    original = read_checkpoint(encoder)
    assert all(torch.equal(tensor, original.tensors[name]) for name, tensor in fetched.tensors.items())
    assert fetched.metadata["corpus"] == original.metadata["corpus"]


def test_the_card_tells_recipe_counts_audit_licence_citations_and_use(run, encoder, audited):
    status, card = run("card", encoder, "--licence", "CC-BY-4.0", "--repository", "OWNER/NAME")

    assert status == 0
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    for told in (
        '"seed": 3',
        "1,234 subjects",
        "2 same scan, 1 same head found, 3 of 655 cases",
        "He et al. MAE. 2022.",
    ):
        assert told in card
    assert "nnssl_weights fetch OWNER/NAME --recipe mim" in card


def test_what_nobody_knows_is_said_to_be_unknown(run, encoder):
    _, card = run("card", encoder)

    assert "Not audited" in card
    assert "Unstated" in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "other"


def test_imported_weights_keep_their_licence_and_source(run, tmp_path):
    (tmp_path / "nnUNet_results" / "zoo" / "openmind-mae").mkdir(parents=True)
    torch.save(
        foreign.nnssl_checkpoint(foreign.resenc_unet()),
        tmp_path / "nnUNet_results" / "zoo" / "openmind-mae" / "checkpoint_final.pth",
    )
    assert run("fetch", "openmind-mae")[0] == 0
    _, card = run("card", tmp_path / "nnUNet_results" / "zoo" / "openmind-mae" / "encoder.safetensors")

    assert "CC-BY-4.0" in card
    assert "OpenMind, of AnonRes/ResEncL-OpenMind-MAE" in card


def test_without_a_token_the_folder_is_written_and_the_way_on_is_said(run, encoder, tmp_path):
    status, _ = run("push", encoder, "-o", tmp_path / "out", "--repository", "OWNER/NAME")

    assert "HF_TOKEN" in status
    assert (tmp_path / "out" / "README.md").is_file()


def test_with_a_token_the_folder_is_uploaded_into_a_private_repository(run, encoder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **given: calls.append((name, given)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **given: calls.append(given))
    status, printed = run("push", encoder, "-o", tmp_path / "out", "--licence", "MIT", "--repository", "OWNER/NAME")

    assert status == 0
    assert calls[0] == ("OWNER/NAME", {"private": True, "exist_ok": True})
    assert calls[1]["folder_path"] == str(tmp_path / "out")
    assert "https://huggingface.co/OWNER/NAME" in printed


def test_other_files_are_not_published(run, encoder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "participants.tsv").touch()

    assert "participants.tsv" in run("push", encoder, "-o", tmp_path / "out")[0]


def test_a_checkpoint_of_others_is_to_be_imported_first(run, tmp_path):
    torch.save(foreign.umbra_checkpoint(foreign.umbra_encoder(), "masked"), tmp_path / "x.ckpt")

    assert "nnssl_weights import" in run("card", tmp_path / "x.ckpt")[0]
