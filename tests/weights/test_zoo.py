"""The table of published encoders, and fetching by a name of it."""

import foreign
import pytest
import torch

from nnunet_ssl.audit.origins import known_corpora
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.checkpoints import explicit_checkpoint
from nnunet_ssl.weights.cli import weights
from nnunet_ssl.weights.encoders import read_checkpoint
from nnunet_ssl.weights.origins import READERS
from nnunet_ssl.weights.zoo import describe_licence, entries, entry_of


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``nnssl_weights``; return its exit status or message, and what it printed."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["nnssl_weights", *arguments])
        try:
            weights()
        except SystemExit as end:
            return end.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


@pytest.mark.parametrize("entry", entries().values(), ids=lambda entry: entry.name)
def test_every_entry_says_where_it_is_from_and_is_of_an_origin_that_is_read(entry):
    assert entry.refused or entry.origin in READERS
    assert entry.verified in ("layout", "stated")
    assert entry.sources
    assert all(source.startswith("https://") for source in entry.sources)
    assert entry.corpus in known_corpora() or "not listed" in entry.corpus


@pytest.mark.parametrize(
    ("name", "restricted"),
    [("openmind-mae", False), ("ssl3d-hilab", True), ("brainsegfounder-ukb", True), ("brainiac", True)],
)
def test_a_licence_that_is_unstated_or_not_for_all_is_called_so(name, restricted):
    assert entry_of(name).is_restricted is restricted
    assert ("Read it" in describe_licence(entry_of(name)) or "none was found" in describe_licence(entry_of(name))) is (
        restricted
    )


def test_list_names_every_entry_and_what_was_checked(run):
    status, printed = run("list")

    assert status == 0
    assert all(f"\n{name} " in printed for name in entries())
    assert "No file of these was opened" in printed


def test_without_a_network_the_licence_is_shown_and_the_file_to_bring_and_its_place_are_named(run, results):
    status, printed = run("fetch", "ssl3d-hilab")

    assert "none was found stated" in printed
    assert "https://huggingface.co/MIC-DKFZ/SSL3D-checkpoints/resolve/main/ResEnc-L/HiLab/HiLab_ResEncL.pth" in status
    assert str(results / "zoo" / "ssl3d-hilab" / "HiLab_ResEncL.pth") in status


def test_a_file_brought_by_hand_is_fetched_and_trained_from_by_name(run, results, monkeypatch):
    network = foreign.resenc_unet()
    (results / "zoo" / "openmind-mae").mkdir(parents=True)
    torch.save(foreign.nnssl_checkpoint(network), results / "zoo" / "openmind-mae" / "checkpoint_final.pth")
    monkeypatch.setenv("nnssl_checkpoint", "openmind-mae")
    with pytest.raises(UserError, match="nnssl_weights fetch openmind-mae"):
        explicit_checkpoint()

    assert "does not tell its revision" in run("fetch", "openmind-mae", "--revision", "v2")[0]
    status, printed = run("fetch", "openmind-mae")

    assert status == 0, status
    path = explicit_checkpoint()
    read = read_checkpoint(path)
    expected = network.encoder.state_dict()
    assert read.tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.tensors.items())
    assert read.metadata["zoo"]["licence"] == "CC-BY-4.0"
    assert "nnssl_checkpoint=openmind-mae" in printed
    assert "was fetched already" in run("fetch", "openmind-mae")[0]


def test_another_family_under_the_name_of_an_entry_is_refused(run, results):
    (results / "zoo" / "openmind-mae").mkdir(parents=True)
    checkpoint = foreign.umbra_checkpoint(foreign.umbra_encoder(), "masked")
    torch.save(checkpoint, results / "zoo" / "openmind-mae" / "checkpoint_final.pth")

    assert "is of umbra; openmind-mae should be of nnssl" in run("fetch", "openmind-mae")[0]


@pytest.mark.parametrize("arguments", [("fetch", "brainiac"), ("list", "openmind-mea"), ("fetch", "openmind-mea")])
def test_what_cannot_be_used_or_is_not_there_is_refused_in_a_sentence(run, results, arguments):
    status, _ = run(*arguments)

    assert "no maps finer than 1/16" in status or "near it: openmind-mae" in status


def test_a_file_of_that_name_comes_before_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openmind-mae").touch()
    monkeypatch.setenv("nnssl_checkpoint", "openmind-mae")

    assert explicit_checkpoint().name == "openmind-mae"
