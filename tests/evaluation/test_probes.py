import json
import warnings

import numpy as np
import pandas as pd
import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import scan_prediction
from nnunet_ssl.evaluation.cli import evaluate
from nnunet_ssl.evaluation.embeddings import Embeddings, write_embeddings
from nnunet_ssl.evaluation.figures.across import draw_across
from nnunet_ssl.evaluation.probes import probe
from nnunet_ssl.evaluation.scan_prediction import describe_prediction

MODALITIES = ("t1", "flair")


def known_signal(n_subjects=60, dimension=20, noise=0.3, seed=0) -> Embeddings:
    """Two scans per subject; one direction holds the age linearly, another the sex, the rest is noise."""
    rng = np.random.default_rng(seed)
    age, sex = rng.uniform(20, 80, n_subjects), rng.integers(0, 2, n_subjects)
    owner = np.repeat(np.arange(n_subjects), len(MODALITIES))
    vectors = rng.normal(size=(len(owner), dimension))
    vectors[:, 0] = (age[owner] - 50) / 17 + noise * rng.normal(size=len(owner))
    vectors[:, 1] = 2.0 * sex[owner] - 1 + noise * rng.normal(size=len(owner))
    scans = pd.DataFrame(
        {
            "patient_id": [f"sub_{number}" for number in owner],
            "session_id": "1",
            "filename": np.tile(MODALITIES, n_subjects),
            "modality": np.tile(MODALITIES, n_subjects),
            "age": [f"{value:.1f}" for value in age[owner]],
            "sex": np.array(["F", "M"])[sex[owner]],
        }
    )
    return Embeddings(vectors=vectors, scans=scans)


def with_column(embeddings: Embeddings, name: str, values) -> Embeddings:
    return Embeddings(vectors=embeddings.vectors, scans=embeddings.scans.assign(**{name: values}))


def shuffled_by_subject(embeddings: Embeddings, seed=0) -> Embeddings:
    """The same vectors, each subject's pair given to another subject."""
    rows = np.arange(len(embeddings)).reshape(-1, len(MODALITIES))
    rows = np.random.default_rng(seed).permutation(rows).ravel()
    return Embeddings(vectors=embeddings.vectors[rows], scans=embeddings.scans)


def test_an_age_that_is_encoded_linearly_is_found():
    summary = probe(known_signal(), "age").summary
    assert summary["task"] == "regression"
    scores = summary["scores"]
    assert scores["R2"]["value"] > 0.8
    assert scores["mean absolute error"]["value"] < 6 < scores["mean absolute error"]["baseline"]
    assert scores["R2"]["interval"][0] < scores["R2"]["value"] < scores["R2"]["interval"][1]


def test_embeddings_of_other_subjects_predict_no_age():
    scores = probe(shuffled_by_subject(known_signal()), "age").summary["scores"]
    assert scores["R2"]["value"] < 0.2
    assert scores["mean absolute error"]["value"] > 0.8 * scores["mean absolute error"]["baseline"]


def test_a_class_that_is_encoded_linearly_is_found_and_one_that_is_not_stays_at_chance():
    scores = probe(known_signal(), "sex").summary["scores"]
    assert scores["balanced accuracy"]["value"] > 0.95
    assert scores["ROC AUC"]["value"] > 0.97
    assert (scores["balanced accuracy"]["baseline"], scores["ROC AUC"]["baseline"]) == (0.5, 0.5)
    shuffled = probe(shuffled_by_subject(known_signal()), "sex").summary["scores"]
    assert 0.3 < shuffled["ROC AUC"]["value"] < 0.7


def test_who_a_subject_is_never_leaks_from_one_of_its_scans_to_another():
    # Each subject's scans are one point of their own: a split by scan would predict a random age perfectly.
    rng = np.random.default_rng(0)
    embeddings = known_signal(n_subjects=40)
    own = np.repeat(100 * np.eye(40), len(MODALITIES), axis=0)
    ages = np.repeat(rng.uniform(20, 80, 40), len(MODALITIES)).astype(str)
    result = probe(with_column(Embeddings(vectors=own, scans=embeddings.scans), "age", ages), "age")
    assert result.summary["scores"]["R2"]["value"] < 0.1
    folds_of = result.predictions.groupby("patient_id")["fold"].nunique()
    assert (folds_of == 1).all()


def test_three_classes_have_a_probability_each_and_those_add_up():
    embeddings = known_signal()
    third = np.digitize(embeddings.vectors[::2, 0], [-0.6, 0.6])
    groups = np.repeat(np.array(["young", "middle", "old"])[third], len(MODALITIES))
    result = probe(with_column(embeddings, "group", groups), "group")
    assert set(result.summary["classes"]) == {"young", "middle", "old"}
    total = result.predictions[["p(young)", "p(middle)", "p(old)"]].sum(axis=1)
    np.testing.assert_allclose(total, 1)
    assert result.summary["scores"]["balanced accuracy"]["value"] > 0.6


def test_few_different_numbers_are_classes_unless_told_otherwise():
    embeddings = known_signal(n_subjects=20)
    grade = np.repeat((np.arange(20) % 3).astype(str), len(MODALITIES))
    graded = with_column(embeddings, "grade", grade)
    assert probe(graded, "grade").summary["task"] == "classification"
    assert probe(graded, "grade", task="regression").summary["task"] == "regression"


@pytest.mark.parametrize("missing", ["", "n/a", " NaN "])
def test_scans_without_a_value_are_left_out_and_counted(missing):
    embeddings = known_signal(n_subjects=20)
    ages = embeddings.scans["age"].to_numpy(object)
    ages[:4] = missing
    summary = probe(with_column(embeddings, "age", ages), "age").summary
    assert (summary["n_subjects"], summary["scans_left_out"], summary["task"]) == (18, 4, "regression")


def test_a_class_of_too_few_subjects_is_left_out():
    embeddings = known_signal(n_subjects=20)
    sites = np.repeat(["a"] * 9 + ["b"] * 9 + ["c"] * 2, len(MODALITIES))
    assert set(probe(with_column(embeddings, "site", sites), "site").summary["classes"]) == {"a", "b"}


@pytest.mark.parametrize("others", [("common",), ("common", "other")])
def test_a_class_of_which_a_training_part_has_too_little_is_refused_by_name(others):
    """Of three subjects in two folds, one of the training parts has one."""
    names = ["rare"] * 3 + [other for other in others for _ in range(5)]
    embeddings = with_column(
        known_signal(n_subjects=len(names), dimension=2), "kind", np.repeat(names, len(MODALITIES))
    )
    with pytest.raises(UserError, match=r"Of 'rare' a training part has [01] subject\(s\), too few to choose"):
        probe(embeddings, "kind", folds=2)


def test_a_class_written_with_a_space_is_no_class_of_its_own():
    embeddings = known_signal(n_subjects=20)
    sites = np.repeat(["a", " a", "b ", "b"] * 5, len(MODALITIES))
    assert set(probe(with_column(embeddings, "site", sites), "site").summary["classes"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "height"}, "no column 'height'. Columns: patient_id"),
        ({"target": "age", "folds": 1}, "at least two folds; 1"),
        ({"target": "few"}, r"needs two classes with 3 subjects each.*: none"),
        ({"target": "few", "task": "regression"}, "needs 4 subjects with a number to predict; there are 0"),
        ({"target": "session_id"}, r"needs two classes .*: 1 \(10\)"),
    ],
)
def test_what_cannot_be_probed_is_refused(options, message):
    embeddings = with_column(known_signal(n_subjects=10), "few", "")
    with pytest.raises(UserError, match=message):
        probe(embeddings, **options)


def test_the_smallest_sets_are_probed_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe(known_signal(n_subjects=4), "age", task="regression").summary["folds"] == 4
        embeddings = known_signal(n_subjects=6)
        halves = np.repeat(["a", "b"] * 3, len(MODALITIES))
        assert probe(with_column(embeddings, "half", halves), "half").summary["folds"] == 3


@pytest.mark.parametrize("seed", range(5))
def test_every_fold_holds_its_share_of_every_class(seed):
    embeddings = known_signal(n_subjects=25)
    rare = np.repeat(np.random.default_rng(seed).permutation(["a"] * 5 + ["b"] * 20), len(MODALITIES))
    table = probe(with_column(embeddings, "rare", rare), "rare", seed=seed).predictions
    assert (pd.crosstab(table["fold"], table["truth"]) == [len(MODALITIES), 4 * len(MODALITIES)]).all(axis=None)


def test_the_same_call_gives_the_same_result():
    assert probe(known_signal(n_subjects=12), "age").summary == probe(known_signal(n_subjects=12), "age").summary


@pytest.mark.parametrize("target", ["age", "sex"])
def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys, target):
    write_embeddings(known_signal(n_subjects=24), tmp_path)
    stored = ["--embeddings", tmp_path / "embeddings.npz", "--metadata", tmp_path / "metadata.csv"]
    call = ["nnssl_evaluate", "probe", *stored, "--target", target, "-o", tmp_path / "out", "--json"]
    monkeypatch.setattr("sys.argv", [*map(str, call)])
    evaluate()
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((tmp_path / "out" / "probe.json").read_text())
    assert f"of '{target}': 24 subjects, 48 scans" in describe_prediction(summary)
    table = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t")
    assert {"patient_id", "truth", "predicted", "fold"} <= set(table.columns)
    assert len(table) == 48
    assert (tmp_path / "out" / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_a_mistake_is_one_line(tmp_path, monkeypatch):
    write_embeddings(known_signal(n_subjects=6), tmp_path)
    stored = ["--embeddings", tmp_path / "embeddings.npz", "--metadata", tmp_path / "metadata.csv"]
    monkeypatch.setattr("sys.argv", [*map(str, ["nnssl_evaluate", "probe", *stored, "--target", "iq"])])
    with pytest.raises(SystemExit, match="error: There is no column 'iq'"):
        evaluate()


def two_directions(n_subjects=40, seed=0) -> Embeddings:
    """T1 and T2 hold the age in one direction, FLAIR in another one; PD in none."""
    rng = np.random.default_rng(seed)
    names = ("t1", "t2", "flair", "pd")
    owner, modality = np.repeat(np.arange(n_subjects), len(names)), np.tile(names, n_subjects)
    age = rng.uniform(20, 80, n_subjects)[owner]
    vectors = rng.normal(size=(len(owner), 10))
    for name, direction in (("t1", 0), ("t2", 0), ("flair", 1)):
        vectors[modality == name, direction] += 4 * (age[modality == name] - 50) / 17
    scans = pd.DataFrame({"patient_id": owner.astype(str), "session_id": "1", "filename": modality})
    return Embeddings(vectors=vectors, scans=scans.assign(modality=modality, age=age.round(3).astype(str)))


def test_a_probe_carries_to_the_modalities_that_are_encoded_alike_and_to_no_other():
    result = probe(two_directions(), "age", across=True)
    matrix = {
        row: {name: cell["scores"]["R2"] for name, cell in cells.items()}
        for row, cells in result.summary["across"].items()
    }
    assert list(matrix) == ["all", "flair", "pd", "t1", "t2"]
    assert min(matrix[one][other] for one in ("t1", "t2") for other in ("t1", "t2")) > 0.8
    assert matrix["flair"]["flair"] > 0.8
    assert max(matrix["t1"]["flair"], matrix["flair"]["t1"], matrix["t1"]["pd"], matrix["pd"]["t1"]) < 0.3
    assert matrix["all"] == {name: cell["scores"]["R2"] for name, cell in result.summary["by_modality"].items()}
    cell = result.summary["across"]["t1"]["t2"]
    assert (cell["n_subjects"], cell["n_scans"]) == (40, 40)
    assert cell["intervals"]["R2"][0] < cell["scores"]["R2"] < cell["intervals"]["R2"][1]
    assert cell["without_images"]["R2"] < 0.1


def test_no_model_of_any_modality_saw_the_subjects_it_is_tested_on():
    """Each subject is a point of its own in every modality: if a probe saw it in one, it would know it in another."""
    embeddings = two_directions(n_subjects=30)
    ages = np.repeat(np.random.default_rng(1).uniform(20, 80, 30), 4).astype(str)
    own = Embeddings(vectors=np.repeat(100 * np.eye(30), 4, axis=0), scans=embeddings.scans)
    result = probe(with_column(own, "age", ages), "age", across=True)
    for cells in result.summary["across"].values():
        assert max(cell["scores"]["R2"] for cell in cells.values()) < 0.1
    folds = pd.concat([result.predictions, result.across]).groupby("patient_id")["fold"].nunique()
    assert (folds == 1).all()


def test_the_cells_of_the_matrix_are_the_scores_of_the_predictions_that_are_written():
    result = probe(known_signal(n_subjects=16), "sex", across=True)
    for (trained_on, tested_on), rows in result.across.groupby(["trained_on", "modality"]):
        cell = result.summary["across"][trained_on][tested_on]
        hit = rows["truth"] == rows["predicted"]
        assert cell["scores"]["balanced accuracy"] == pytest.approx(hit.groupby(rows["truth"]).mean().mean())
    assert len(result.across) == 2 * len(result.predictions)


def test_a_modality_of_too_few_subjects_is_predicted_and_not_learnt_from(caplog):
    embeddings = known_signal(n_subjects=20)
    modality = embeddings.scans["modality"].to_numpy(object)
    modality[[0, 2]] = "dwi"
    modality[4] = "unknown"
    matrix = probe(with_column(embeddings, "modality", modality), "sex", across=True).summary["across"]
    assert list(matrix) == ["all", "flair", "t1"]
    assert list(matrix["t1"]) == ["dwi", "flair", "t1"]
    assert "Not learnt from, with too few subjects: scans of dwi." in caplog.text


def test_across_modalities_of_which_none_is_known_is_refused_before_anything_is_learnt(monkeypatch):
    monkeypatch.setattr(scan_prediction, "_outputs", None)
    with pytest.raises(UserError, match=r"the modality of all scans is unknown"):
        probe(with_column(known_signal(n_subjects=12), "modality", "unknown"), "sex", across=True)


@pytest.mark.parametrize("only", ["F", "M"])
def test_a_modality_of_one_class_has_an_accuracy_and_a_place_in_the_figure(tmp_path, monkeypatch, only):
    """What guesses one class is perfect there, or never right; there is no area under a curve."""
    embeddings = known_signal(n_subjects=24)
    modality = np.where(embeddings.scans["sex"] == only, embeddings.scans["modality"], "t1")
    summary = probe(with_column(embeddings, "modality", modality), "sex", across=True).summary
    cell = summary["across"]["t1"]["flair"]
    assert cell["without_images"]["balanced accuracy"] == (only == "F")
    assert np.isnan(cell["scores"]["ROC AUC"])
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda *arguments, **options: shown.append(arguments[3]))
    draw_across(summary, tmp_path / "across.png", title="one class")
    low, high = cell["intervals"]["balanced accuracy"]
    assert f"{cell['scores']['balanced accuracy']:.2f}\n[{low:.2f}, {high:.2f}]" in shown
    assert "-" in shown


def test_a_column_that_never_changes_has_a_figure(tmp_path):
    constant = with_column(known_signal(n_subjects=12), "age", "30")
    summary = probe(constant, "age", task="regression", across=True).summary
    draw_across(summary, tmp_path / "across.png", title="constant")
    assert (tmp_path / "across.png").is_file()


@pytest.mark.parametrize("value", ["inf", "-Infinity", "1e999"])
def test_an_infinite_number_is_none(value):
    embeddings = known_signal(n_subjects=12)
    ages = embeddings.scans["age"].to_numpy(object)
    ages[:2] = value
    summary = probe(with_column(embeddings, "age", ages), "age", task="regression").summary
    assert (summary["n_scans"], summary["scans_left_out"]) == (22, 2)


def test_only_the_modalities_that_are_named_are_learnt_from_and_predicted():
    result = probe(two_directions(n_subjects=12), "age", across=True, modalities=["t1", "pd"])
    assert {name: list(cells) for name, cells in result.summary["across"].items()} == {
        name: ["pd", "t1"] for name in ("all", "pd", "t1")
    }
    assert set(result.predictions["modality"]) == {"t1", "pd"}
    with pytest.raises(UserError, match=r"no scans of ct; there are scans of flair, pd, t1, t2"):
        probe(two_directions(n_subjects=12), "age", modalities=["ct"])


@pytest.mark.parametrize("target", ["age", "sex"])
def test_the_command_writes_the_matrix_as_table_and_figure(tmp_path, monkeypatch, capsys, target):
    write_embeddings(known_signal(n_subjects=12), tmp_path)
    stored = ["--embeddings", tmp_path / "embeddings.npz", "--metadata", tmp_path / "metadata.csv"]
    call = ["nnssl_evaluate", "probe", *stored, "--target", target, "--across", "-o", tmp_path / "out", "--json"]
    monkeypatch.setattr("sys.argv", [*map(str, call)])
    evaluate()
    summary = json.loads(capsys.readouterr().out)
    table = pd.read_csv(tmp_path / "out" / "across.tsv", sep="\t").set_index(["trained_on", "tested_on"])
    assert len(table) == 6
    for name in summary["scores"]:
        cell = summary["across"]["t1"]["flair"]
        written = table.loc[("t1", "flair"), [name, f"{name} low", f"{name} high"]].to_list()
        assert written == pytest.approx([cell["scores"][name], *cell["intervals"][name]], rel=1e-4)
    assert "learnt from the modality of a row" in describe_prediction(summary)
    assert len(pd.read_csv(tmp_path / "out" / "across_predictions.tsv", sep="\t")) == 48
    assert (tmp_path / "out" / "across.png").read_bytes().startswith(b"\x89PNG")
