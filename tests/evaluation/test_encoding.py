import json
from dataclasses import replace

import blosc2
import numpy as np
import pandas as pd
import pytest
import torch

from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.devices import find_device
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.cli import evaluate
from nnunet_ssl.evaluation.embeddings import read_embeddings
from nnunet_ssl.evaluation.encoding import EncodingConfig, choose_rows, embed_corpus
from nnunet_ssl.evaluation.probes import probe
from nnunet_ssl.interface.encoders import patch_starts
from nnunet_ssl.weights.encoders import read_checkpoint, write_encoder

CPU = torch.device("cpu")
PATCH = (32, 32, 32)
TINY_ENCODER = {"backbone": "swin", "in_channels": 1, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}


@pytest.fixture
def checkpoint(tmp_path, write_tiny_encoder):
    path = tmp_path / "run" / "encoder.safetensors"
    write_tiny_encoder(path, config={"patch_size": [32, 32, 32], "seed": 0, "validation": {"fraction": 0.34}})
    return path


def test_an_embedding_is_the_spatial_mean_of_the_bottleneck_of_the_central_patch(
    tmp_path, write_corpus, write_tiny_encoder
):
    folder = write_corpus()
    encoder = write_tiny_encoder(tmp_path / "encoder.safetensors")
    embeddings = embed_corpus(tmp_path / "encoder.safetensors", 500, EncodingConfig(patch_size=PATCH), CPU)
    row = embeddings.scans.index[embeddings.scans["filename"] == "A__sub_2__ses_1__flair"].item()
    stored = blosc2.open(str(folder / "nnUNetSSLPlans_3d_fullres" / "A__sub_2__ses_1__flair.b2nd"))[:]
    patch = torch.from_numpy(stored[:, 4:36, 2:34, 0:32].astype(np.float32))  # around the centre of the box
    with torch.no_grad():
        expected = encoder(patch[None])[-1].mean(dim=(2, 3, 4))[0]
    np.testing.assert_allclose(embeddings.vectors[row], expected, rtol=1e-4, atol=1e-5)


def test_tiles_cover_the_foreground_and_their_embeddings_are_averaged(write_corpus, checkpoint):
    write_corpus()
    tiles = EncodingConfig(view="tiles", patch_size=(16, 32, 32))
    starts = patch_starts(open_corpus(500).foreground_box(0), tiles.patch_size, tiles.view)
    assert [start[0] for start in starts][::2] == [4, 20]  # the box spans 4 ... 36 there
    assert {start[1] for start in starts} == {0, 4}
    assert {start[2] for start in starts} == {0}  # 28 voxels fit into one patch around their centre
    together, alone = (
        embed_corpus(checkpoint, 500, EncodingConfig(view="tiles", patch_size=PATCH, batch_size=size), CPU)
        for size in (1, 5)
    )
    np.testing.assert_allclose(together.vectors, alone.vectors, rtol=1e-4, atol=1e-5)


def test_what_the_manifest_knows_stays_with_the_embedding_and_missing_values_stay_missing(write_corpus, checkpoint):
    write_corpus(n_subjects=16)
    embeddings = embed_corpus(checkpoint, 500, EncodingConfig(), CPU)
    assert embeddings.scans["age"].tolist()[:3] == ["", "", "21.5"]
    assert not embeddings.scans.isna().any().any()
    summary = probe(embeddings, "age").summary
    assert (summary["task"], summary["n_subjects"], summary["scans_left_out"]) == ("regression", 15, 2)


def test_a_manifest_with_columns_of_the_embeddings_names_does_not_say_who_a_scan_is_of(write_corpus, checkpoint):
    path = write_corpus() / "manifest.tsv"
    pd.read_csv(path, sep="\t", dtype=str).assign(patient_id="X", filename="Y", centre="Z").to_csv(
        path, sep="\t", index=False
    )
    scans = embed_corpus(checkpoint, 500, EncodingConfig(), CPU).scans
    assert scans["patient_id"].nunique() == 6
    assert scans["filename"].is_unique
    assert set(scans["centre"]) == {"Z"}


def test_validation_means_the_subjects_that_the_pre_training_held_out(write_corpus, checkpoint):
    write_corpus()
    held_out = embed_corpus(checkpoint, 500, EncodingConfig(subjects="validation"), CPU).scans["patient_id"]
    _, validation = open_corpus(500).split(0.34, 0)
    assert set(held_out) == set(validation.scans["subject"])
    assert 0 < held_out.nunique() < 6


@pytest.mark.parametrize(
    ("subjects", "subset", "warned"), [(6, "validation", False), (5, "validation", True), (5, "all", False)]
)
def test_a_corpus_that_has_grown_may_hold_out_whom_the_pre_training_saw_and_that_is_said(
    write_corpus, checkpoint, caplog, subjects, subset, warned
):
    write_corpus()
    pretrained = read_checkpoint(checkpoint)
    told = replace(pretrained, metadata=pretrained.metadata | {"corpus": {"subjects": subjects}})
    rows = choose_rows(open_corpus(500), told, EncodingConfig(subjects=subset))
    assert len(rows)
    assert ("had 5 subjects, and this one has 6" in caplog.text) is warned


def test_a_checkpoint_that_does_not_tell_what_was_held_out_has_no_validation_subjects(
    tmp_path, write_corpus, write_tiny_encoder
):
    write_corpus()
    write_tiny_encoder(tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match=r"does not say which subjects were held out.*--subjects all"):
        embed_corpus(tmp_path / "encoder.safetensors", 500, EncodingConfig(subjects="validation"), CPU)


def test_at_most_so_many_subjects_are_drawn_and_always_the_same(write_corpus, checkpoint):
    write_corpus()
    draws = [
        embed_corpus(checkpoint, 500, EncodingConfig(max_subjects=2), CPU).scans["patient_id"].tolist()
        for _ in range(2)
    ]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) == 2


def test_the_command_measures_a_pre_training_by_its_folder(write_corpus, checkpoint, tmp_path, monkeypatch, capsys):
    write_corpus()
    out = tmp_path / "out"
    call = ["alignment", "--checkpoint", checkpoint.parent, "-d", 500, "-device", "cpu", "-o", out, "--json"]
    monkeypatch.setattr("sys.argv", ["nnssl_evaluate", *map(str, call)])
    evaluate()
    assert json.loads(capsys.readouterr().out)["cross_modality"]["n_patients"] == 6
    stored = read_embeddings(out / "embeddings.npz", out / "metadata.csv")
    assert len(stored) == 12
    assert (out / "alignment.png").is_file()


@pytest.mark.parametrize("option", ["--batch_size", "--max_subjects", "--patch_size"])
def test_counts_are_above_zero(option, monkeypatch, capsys):
    number = ["0"] * (3 if option == "--patch_size" else 1)
    monkeypatch.setattr("sys.argv", ["nnssl_evaluate", "alignment", "--checkpoint", "run", option, *number])
    with pytest.raises(SystemExit):
        evaluate()
    assert f"argument {option}: '0' is not a whole number above 0" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    for name in ("warp", "meta"):
        with pytest.raises(UserError, match=f"-device {name} is no device"):
            find_device(name)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "device_count", lambda: 2)
        assert [str(find_device(name)) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
        with pytest.raises(UserError, match=r"-device cuda:9: PyTorch sees 2 CUDA devices"):
            find_device("cuda:9")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device here"):
            find_device("cuda")


def test_an_encoder_of_several_channels_sees_each_scan_through_their_mean(write_corpus, tmp_path):
    write_corpus(n_subjects=2)
    wide = build_encoder({**TINY_ENCODER, "in_channels": 4})
    single = {**wide.state_dict()}
    single["patch_embed.proj.weight"] = single["patch_embed.proj.weight"].mean(dim=1, keepdim=True)
    vectors = []
    for channels, state in ((4, wide.state_dict()), (1, single)):
        architecture = {**TINY_ENCODER, "in_channels": channels}
        path = tmp_path / f"{channels}.safetensors"
        write_encoder(path, state, architecture=architecture, method=None, step=None, preprocessing=None, metadata={})
        vectors.append(embed_corpus(path, 500, EncodingConfig(patch_size=PATCH), CPU).vectors)
    np.testing.assert_allclose(*vectors, rtol=1e-5, atol=1e-6)


def test_embeddings_that_are_not_finite_are_their_own_error(write_corpus, tmp_path):
    """The weights are finite, but what they make of a scan is not."""
    write_corpus(n_subjects=2)
    encoder = build_encoder(TINY_ENCODER)
    encoder.patch_embed.proj.weight.data.fill_(3e38)
    path = tmp_path / "encoder.safetensors"
    described = {"method": None, "step": None, "preprocessing": None, "metadata": {}}
    write_encoder(path, encoder.state_dict(), architecture=TINY_ENCODER, **described)
    with pytest.raises(UserError, match=r"4 of 4 embeddings are not finite, the first that of patient_id A/sub_0"):
        embed_corpus(path, 500, EncodingConfig(patch_size=PATCH), CPU)


@pytest.mark.parametrize("view", ["centre", "tiles"])
def test_damaged_scans_are_left_out_and_the_others_keep_their_embeddings(write_corpus, checkpoint, caplog, view):
    write_corpus()
    config = EncodingConfig(view=view, patch_size=(16, 32, 32), batch_size=3)
    whole = embed_corpus(checkpoint, 500, config, CPU)
    corpus = open_corpus(500)
    damaged = [0, 5, 6]
    for row in damaged:
        corpus.path(row).write_bytes(corpus.path(row).read_bytes()[:700])
    rest = embed_corpus(checkpoint, 500, config, CPU)
    names = [name for row, name in enumerate(whole.scans["filename"]) if row not in damaged]
    assert rest.scans["filename"].tolist() == names
    np.testing.assert_allclose(rest.vectors, np.delete(whole.vectors, damaged, axis=0), rtol=1e-4, atol=1e-5)
    assert "3 of 12 scans are left out" in caplog.text


def test_a_corpus_damaged_throughout_is_an_error_that_says_what_to_do(write_corpus, checkpoint):
    folder = write_corpus()
    for path in (folder / "nnUNetSSLPlans_3d_fullres").glob("*.b2nd"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"Not one of 12 scans can be read.*\.b2nd.*nnssl_prepare -d Dataset500"):
        embed_corpus(checkpoint, 500, EncodingConfig(), CPU)
