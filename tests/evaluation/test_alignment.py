import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.alignment import describe_alignment, measure_alignment
from nnunet_ssl.evaluation.cli import evaluate
from nnunet_ssl.evaluation.embeddings import Embeddings, read_embeddings, write_embeddings
from nnunet_ssl.evaluation.figures.alignment import draw_alignment, project

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "reference" / "alignment"


def synthetic(n_patients=12, modalities=("t1", "t2", "flair"), noise=0.3, seed=0) -> Embeddings:
    rng = np.random.default_rng(seed)
    patient = np.repeat([f"site/sub_{number}" for number in range(n_patients)], len(modalities))
    centres = np.repeat(rng.normal(size=(n_patients, 24)), len(modalities), axis=0)
    scans = pd.DataFrame(
        {
            "patient_id": patient,
            "session_id": "1",
            "modality": np.tile(modalities, n_patients),
            "filename": np.tile([f"{name}.nii.gz" for name in modalities], n_patients),
        }
    )
    return Embeddings(vectors=centres + noise * rng.normal(size=centres.shape), scans=scans)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the authors' embeddings are not here")
@pytest.mark.parametrize(("arm", "mean", "std"), [("mcl", "0.0066", "0.0104"), ("cl", "0.5995", "0.1576")])
def test_the_published_embeddings_give_the_published_figures(arm, mean, std):
    result = measure_alignment(read_embeddings(PUBLISHED / f"{arm}_embeddings.npz", PUBLISHED / f"{arm}_metadata.csv"))
    cross_modality = result["cross_modality"]
    assert (f"{cross_modality['mean']:.4f}", f"{cross_modality['std']:.4f}") == (mean, std)
    assert cross_modality["n_patients"] == 147


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_refused_by_the_scan(number):
    embeddings = synthetic()
    vectors = embeddings.vectors.copy()
    vectors[4, 2] = number
    with pytest.raises(UserError, match=r"1 of 36 embeddings are not finite, the first that of patient_id site/sub_1"):
        Embeddings(vectors=vectors, scans=embeddings.scans)


def test_alignment_separates_an_aligned_representation_from_one_that_is_not():
    aligned, scattered = measure_alignment(synthetic(noise=0.05)), measure_alignment(synthetic(noise=5.0))
    assert aligned["cross_modality"]["mean"] < 0.05 < scattered["cross_modality"]["mean"]
    assert aligned["retrieval"]["accuracy"] == 1.0
    assert aligned["cross_subject"]["mean"] > 0.5


def test_every_interval_holds_its_estimate():
    result = measure_alignment(synthetic(noise=1.0))
    for key, estimate in {
        "cross_modality": "mean",
        "cross_subject": "mean",
        "cross_subject_same_modality": "mean",
        "cross_subject_different_modality": "mean",
        "retrieval": "accuracy",
        "effective_rank": "value",
        "uniformity": "value",
    }.items():
        low, high = result[key]["interval"]
        assert low < result[key][estimate] < high, key


def test_scans_of_unknown_modality_change_nothing():
    known = synthetic()
    strange = known.scans.iloc[:3].assign(modality="unknown", filename=["scan_1", "scan_2", "scan_3"])
    mixed = Embeddings(
        vectors=np.concatenate([known.vectors, -known.vectors[:3]]),
        scans=pd.concat([known.scans, strange], ignore_index=True),
    )
    assert measure_alignment(mixed) == measure_alignment(known)


def test_a_set_without_two_modalities_is_refused_with_counts():
    with pytest.raises(UserError, match=r"no patient has two modalities\. Found: 12 scans of 12 patients"):
        measure_alignment(synthetic(modalities=("t1",)))


def test_stored_embeddings_survive_a_round_trip(tmp_path):
    original = synthetic()
    write_embeddings(original, tmp_path)
    again = read_embeddings(tmp_path / "embeddings.npz", tmp_path / "metadata.csv")
    np.testing.assert_allclose(again.vectors, original.vectors, rtol=1e-6)
    pd.testing.assert_frame_equal(again.scans, original.scans, check_dtype=False)


def test_a_scan_listed_twice_counts_once_as_first_listed(tmp_path):
    write_embeddings(synthetic(), tmp_path)
    table = pd.read_csv(tmp_path / "metadata.csv")
    again = table.iloc[[0]].assign(embedding_index=5)
    pd.concat([table, again]).to_csv(tmp_path / "metadata.csv", index=False)
    embeddings = read_embeddings(tmp_path / "embeddings.npz", tmp_path / "metadata.csv")
    assert len(embeddings) == len(table)
    np.testing.assert_allclose(embeddings.vectors, synthetic().vectors, rtol=1e-6)


def test_rows_follow_embedding_index_and_not_the_order_of_the_table(tmp_path):
    write_embeddings(synthetic(), tmp_path)
    table = pd.read_csv(tmp_path / "metadata.csv")
    table.iloc[::-1].to_csv(tmp_path / "metadata.csv", index=False)
    embeddings = read_embeddings(tmp_path / "embeddings.npz", tmp_path / "metadata.csv")
    np.testing.assert_allclose(embeddings.vectors, synthetic().vectors[::-1], rtol=1e-6)


def break_table(folder, change):
    table = pd.read_csv(folder / "metadata.csv")
    change(table).to_csv(folder / "metadata.csv", index=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="modality"), "lacks the column.* modality"),
        (lambda table: table.assign(embedding_index=99), "embedding_index '99' is no row"),
        (lambda table: table.assign(embedding_index="x"), "embedding_index 'x' is no row"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, change, message):
    write_embeddings(synthetic(), tmp_path)
    break_table(tmp_path, change)
    with pytest.raises(UserError, match=message):
        read_embeddings(tmp_path / "embeddings.npz", tmp_path / "metadata.csv")


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2,3\n4,5,6,7\n", b"\xff\xfe\x00\x81"])
def test_a_table_that_is_none_is_refused(tmp_path, content):
    write_embeddings(synthetic(), tmp_path)
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"metadata.csv cannot be read as a table"):
        read_embeddings(tmp_path / "embeddings.npz", tmp_path / "metadata.csv")


def test_arrays_that_are_no_embeddings_are_refused(tmp_path):
    write_embeddings(synthetic(), tmp_path)
    array, table = tmp_path / "embeddings.npz", tmp_path / "metadata.csv"
    np.savez(array, embeddings=np.full((36, 24), np.nan))
    with pytest.raises(UserError, match="not finite, the first in row 0"):
        read_embeddings(array, table)
    np.savez(array, a=np.zeros((36, 2)), b=np.zeros((36, 2)))
    with pytest.raises(UserError, match="holds 2"):
        read_embeddings(array, table)
    array.write_bytes(b"no zip file")
    with pytest.raises(UserError, match="cannot be read"):
        read_embeddings(array, table)
    np.save(tmp_path / "bare.npy", np.zeros((36, 2)))
    with pytest.raises(UserError, match=r"bare array \(\.npy\)"):
        read_embeddings(tmp_path / "bare.npy", table)
    for damage in (lambda whole: whole[:-100], lambda whole: whole[:200] + bytes(100) + whole[300:]):
        np.savez_compressed(array, embeddings=np.random.default_rng(0).normal(size=(36, 24)))
        array.write_bytes(damage(array.read_bytes()))
        with pytest.raises(UserError, match="cannot be read"):
            read_embeddings(array, table)
    array.unlink()
    with pytest.raises(UserError, match="There is no file"):
        read_embeddings(array, table)


@pytest.mark.parametrize("projection", ["pca", "tsne"])
def test_the_figure_is_drawn_for_many_scans_and_for_few(tmp_path, projection):
    for n_patients in (1, 12):
        embeddings = synthetic(n_patients)
        path = tmp_path / f"{n_patients}.png"
        draw_alignment(embeddings, measure_alignment(embeddings), path, projection=projection, title="synthetic")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_map_keeps_a_tight_subject_together():
    embeddings = synthetic(n_patients=12, noise=0.01)
    places = project(embeddings.vectors, "tsne").reshape(12, 3, 2)
    within = np.linalg.norm(places - places.mean(axis=1, keepdims=True), axis=2).max()
    centres = places.mean(axis=1)
    between = np.linalg.norm(centres[:, None] - centres[None], axis=2)[np.triu_indices(12, 1)].min()
    assert within < between


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["nnssl_evaluate", *map(str, arguments)])
    evaluate()


def test_the_command_prints_nothing_but_json_on_standard_output(tmp_path, monkeypatch, capsys):
    write_embeddings(synthetic(), tmp_path)
    stored = ("--embeddings", tmp_path / "embeddings.npz", "--metadata", tmp_path / "metadata.csv")
    run(monkeypatch, "alignment", *stored, "--json", "-o", tmp_path / "out")
    result = json.loads(capsys.readouterr().out)
    assert result["cross_modality"]["n_patients"] == 12
    assert json.loads((tmp_path / "out" / "alignment.json").read_text()) == result
    assert (tmp_path / "out" / "alignment.png").is_file()


def test_the_command_says_in_one_line_which_input_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: --embeddings and --metadata belong together"):
        run(monkeypatch, "alignment", "--embeddings", tmp_path / "e.npz")
    with pytest.raises(SystemExit, match="error: Give either --embeddings and --metadata, or --checkpoint"):
        run(monkeypatch, "alignment")


def test_the_summary_for_a_person_names_both_figures_of_the_paper():
    text = describe_alignment(measure_alignment(synthetic()))
    assert "cross-modality distance" in text
    assert "cross-subject distance" in text
