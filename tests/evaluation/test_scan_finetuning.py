import json

import blosc2
import numpy as np
import pandas as pd
import pytest
import torch

from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.cli import evaluate
from nnunet_ssl.evaluation.scan_finetuning import FinetuningConfig, box_around, finetune_scans
from nnunet_ssl.learning import check_gradients
from nnunet_ssl.weights.encoders import read_checkpoint

CPU = torch.device("cpu")
FAST = {"steps": 40, "batch_size": 4, "box": (32, 32, 32), "learning_rate": 1e-3}


@pytest.fixture
def checkpoint(tmp_path, write_tiny_encoder):
    write_tiny_encoder(tmp_path / "run" / "encoder.safetensors")
    return tmp_path / "run"


@pytest.fixture
def write_ages(write_corpus):
    """A function that writes a corpus of noise in which a ball is the larger, the older its subject is, on one of the
    two modalities; sex is chance."""

    def write(n_subjects=16, seen=("t1", "flair")):
        folder = write_corpus(n_subjects, shape=(32, 32, 32), bbox=(0, 32, 0, 32, 0, 32))
        path = folder / "manifest.tsv"
        scans = pd.read_csv(path, sep="\t", dtype=str)
        ages = np.random.default_rng(0).permutation(np.linspace(20, 80, n_subjects))
        distance = np.linalg.norm(np.indices((32, 32, 32)) - 15.5, axis=0)
        for number, scan in enumerate(scans.itertuples()):
            age = ages[number // 2]
            image = 0.3 * np.random.default_rng(number).normal(size=distance.shape)
            if scan.modality in seen:
                image += 3.0 * (distance < 4 + (age - 20) / 6)
            file = folder / "nnUNetSSLPlans_3d_fullres" / f"{scan.scan_id}.b2nd"
            file.unlink()
            blosc2.asarray(image.astype(np.float16)[None], urlpath=str(file))
        scans["age"] = [f"{ages[number // 2]:.2f}" for number in range(len(scans))]
        scans.to_csv(path, sep="\t", index=False)
        return folder

    return write


def run(checkpoint, target="age", **options):
    settings = {name: options.pop(name) for name in list(options) if name in ("scratch", "seed", "steps")}
    return finetune_scans(checkpoint, 500, target, FinetuningConfig(**(FAST | settings)), CPU, folds=2, **options)


@pytest.mark.slow
def test_an_age_that_the_scans_show_is_learnt(checkpoint, write_ages):
    write_ages()
    scores = run(checkpoint, scratch=True, steps=60).summary["scores"]
    assert scores["R2"]["value"] > 0.5
    assert scores["mean absolute error"]["value"] < 0.7 * scores["mean absolute error"]["baseline"]


@pytest.mark.slow
def test_what_one_modality_shows_is_learnt_from_it_and_not_from_the_other(checkpoint, write_ages):
    write_ages(seen=("t1",))
    across = run(checkpoint, scratch=True, steps=60, across=True).summary["across"]
    r2 = {row: {name: cell["scores"]["R2"] for name, cell in cells.items()} for row, cells in across.items()}
    assert set(r2) == {"all", "flair", "t1"}
    assert r2["t1"]["t1"] > 0.5
    assert max(r2["t1"]["flair"], r2["flair"]["flair"], r2["flair"]["t1"]) < 0.3


def test_what_the_scans_do_not_show_is_not_learnt_and_no_subject_is_in_both_parts(checkpoint, write_ages):
    write_ages(seen=())
    result = run(checkpoint, steps=10)
    assert result.summary["scores"]["R2"]["value"] < 0.2
    assert (result.predictions.groupby("patient_id")["fold"].nunique() == 1).all()


def test_classes_have_probabilities_and_the_scores_of_probes(checkpoint, write_ages):
    write_ages(n_subjects=8)
    result = run(checkpoint, "sex", steps=6)
    assert list(result.summary["scores"]) == ["balanced accuracy", "ROC AUC"]
    np.testing.assert_allclose(result.predictions[["p(F)", "p(M)"]].sum(axis=1), 1)


def test_the_same_seed_gives_the_same_predictions_and_another_seed_others_in_the_same_folds(checkpoint, write_ages):
    write_ages(n_subjects=6)
    one, two, other = (run(checkpoint, steps=4, task="regression", seed=seed).predictions for seed in (0, 0, 1))
    assert one["predicted"].tolist() == two["predicted"].tolist()
    assert one["predicted"].tolist() != other["predicted"].tolist()
    assert one["fold"].tolist() == other["fold"].tolist()


@pytest.mark.parametrize("scratch", [False, True])
def test_the_encoder_starts_from_the_checkpoint_or_from_chance_rests_and_then_learns(
    checkpoint, write_ages, monkeypatch, scratch
):
    from nnunet_ssl.evaluation import scan_finetuning

    learns, networks = [], []
    predict = scan_finetuning._predict

    def watch(parts):
        learns.append(all(parameter.requires_grad for parameter in parts["encoder"].parameters()))
        check_gradients(parts)

    monkeypatch.setattr(scan_finetuning, "check_gradients", watch)
    monkeypatch.setattr(
        scan_finetuning, "_predict", lambda network, *rest: networks.append(network) or predict(network, *rest)
    )
    write_ages(n_subjects=6)
    run(checkpoint, task="regression", steps=10, scratch=scratch, seed=1)
    assert learns == ([True] if scratch else [False, True]) * 2  # in each fold: at the first step, and when it wakes up
    before = read_checkpoint(checkpoint / "encoder.safetensors").tensors
    name = "patch_embed.proj.weight"
    moved = float((networks[0].encoder.state_dict()[name] - before[name]).abs().max())
    assert moved > 0.1 if scratch else 0 < moved < 0.01


def test_a_network_at_rest_normalises_by_all_training_scans_whatever_its_batches_were():
    from nnunet_ssl.evaluation.scan_finetuning import ScanNetwork

    class Mean(torch.nn.Module):
        channels = (1,)

        def forward(self, x):
            return [x]

    scans = torch.from_numpy(np.random.default_rng(0).normal(5, 3, (8, 1, 4, 4, 4)).astype(np.float32))
    scans += torch.arange(8.0)[:, None, None, None, None]
    network = ScanNetwork(Mean(), 1)
    settled = network.train().settle([scans[:5], scans[5:]])
    with torch.no_grad():
        seen = settled.head[0](settled.embed(scans))
    assert not settled.training
    assert float(seen.mean()) == pytest.approx(0, abs=1e-5)
    assert float(seen.std()) == pytest.approx(1, abs=1e-3)


def test_a_part_without_gradients_ends_the_training(checkpoint, write_ages, monkeypatch):
    from nnunet_ssl.evaluation import scan_finetuning

    monkeypatch.setattr(scan_finetuning, "pooled", lambda maps: maps.detach().mean(dim=(2, 3, 4)))
    write_ages(n_subjects=6)
    with pytest.raises(UserError, match=r"tensors of the encoder received no gradient"):
        run(checkpoint, task="regression", steps=10)


@pytest.mark.parametrize("useful", [True, False])
def test_trainings_are_in_bf16_where_that_is_of_use_and_predictions_never(checkpoint, write_ages, monkeypatch, useful):
    from nnunet_ssl.evaluation import scan_finetuning

    seen, pooled = [], scan_finetuning.pooled

    def watch(maps):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return pooled(maps)

    monkeypatch.setattr(scan_finetuning, "computes_in_bf16", lambda device: useful)
    monkeypatch.setattr(scan_finetuning, "pooled", watch)
    write_ages(n_subjects=6)
    run(checkpoint, task="regression", steps=1)
    assert set(seen) == {(True, useful), (False, False)}


def test_the_box_holds_every_brain_in_whole_cells(write_corpus):
    write_corpus(shape=(80, 70, 60), bbox=(4, 69, 0, 64, 2, 30))
    corpus = open_corpus(500)
    assert box_around(corpus, np.arange(len(corpus)), 32) == (96, 64, 32)


def test_scans_that_cannot_be_read_are_left_out(checkpoint, write_ages, caplog):
    folder = write_ages(n_subjects=8)
    broken = sorted((folder / "nnUNetSSLPlans_3d_fullres").glob("*.b2nd"))[3]
    broken.write_bytes(b"")
    assert len(run(checkpoint, steps=2, task="regression").predictions) == 15
    assert "1 of 16 scans are left out" in caplog.text


def test_the_command_writes_what_the_probe_writes(checkpoint, write_ages, tmp_path, monkeypatch, capsys):
    write_ages(n_subjects=8)
    out = tmp_path / "out"
    call = ["finetune", "--checkpoint", checkpoint, "-d", 500, "--target", "age", "--task", "regression"]
    call += ["--across", "--folds", 2, "--steps", 3, "--batch_size", 4, "-device", "cpu", "-o", out, "--json"]
    monkeypatch.setattr("sys.argv", ["nnssl_evaluate", *map(str, call)])
    evaluate()
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((out / "finetune.json").read_text())
    assert len(pd.read_csv(out / "predictions.tsv", sep="\t")) == 16
    assert len(pd.read_csv(out / "across.tsv", sep="\t")) == 6
    assert (out / "finetune.png").is_file()
    assert (out / "across.png").is_file()


@pytest.mark.parametrize("number", ["1", "0"])
def test_a_batch_of_one_scan_cannot_be_normalised(monkeypatch, capsys, number):
    monkeypatch.setattr("sys.argv", ["nnssl_evaluate", "finetune", "--checkpoint", "run", "--batch_size", number])
    with pytest.raises(SystemExit):
        evaluate()
    assert "--batch_size" in capsys.readouterr().err


def test_a_seed_is_a_whole_number(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["nnssl_evaluate", "finetune", "--checkpoint", "run", "--seed=-1"])
    with pytest.raises(SystemExit):
        evaluate()
    assert "--seed: '-1' is not a whole number from 0" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "nan", "1e9", "fast"])
def test_a_learning_rate_with_which_nothing_can_be_learnt_is_refused(monkeypatch, capsys, number):
    call = ["nnssl_evaluate", "finetune", "--checkpoint", "run", f"--learning_rate={number}"]
    monkeypatch.setattr("sys.argv", call)
    with pytest.raises(SystemExit):
        evaluate()
    assert f"--learning_rate: '{number}' is not a number between 0 and 1" in capsys.readouterr().err
