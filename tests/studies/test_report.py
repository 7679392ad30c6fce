import json

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.axes import Axes
from scipy import stats

from nnunet_ssl.evaluation.alignment import measure_alignment
from nnunet_ssl.evaluation.embeddings import Embeddings
from nnunet_ssl.evaluation.figures.style import PALETTE
from nnunet_ssl.evaluation.gradients import PARTS
from nnunet_ssl.evaluation.results import write_json
from nnunet_ssl.pages import markdown_table
from nnunet_ssl.studies.encoder_tables import compare_figures, summarize_figures
from nnunet_ssl.studies.figures import draw_dominance, draw_fractions
from nnunet_ssl.studies.places import results_of
from nnunet_ssl.studies.report import collect
from nnunet_ssl.studies.segmentation_tables import compare_rows, read_cases, summarize_cells
from nnunet_ssl.studies.study import Experiment, Run
from nnunet_ssl.studies.study_file import study_from

STUDY = """
name: small
arms:
  scratch: {trainer: nnUNetTrainerSwinFPNScratch}
  cl: {label: CL, trainer: nnUNetTrainerCL}
  mcl: {label: MCL, trainer: nnUNetTrainerMCL}
datasets:
  atlas: {label: ATLAS, id: 501, preset: atlas}
  fcd: {label: FCD, id: 516, preset: fcd}
experiments:
  fractions:
    title: By fraction
    datasets: [atlas]
    fractions: [100, 50]
    folds: [0, 1]
    compare: [[cl, scratch], [mcl, cl]]
    published: {source: elsewhere, values: {scratch: [0.41, 0.39], cl: [0.47, 0.45]}}
  modalities: {title: By data set, datasets: [atlas, fcd], metrics: [dice, correctly_empty]}
  alignment:
    kind: alignment
    arms: [cl, mcl]
    published: {source: elsewhere, values: {mcl: [0.0066, 0.0104]}}
"""
N = 20  # cases of a fold


def study():
    return study_from(yaml.safe_load(STUDY))


def case(name, dice, lesions=1, predicted=1):
    empty = lesions == 0
    return {"case": name, "dice": dice, "lesion_f1": dice / 2, "reference_lesions": lesions} | {
        "detected": None if empty else float(dice > 0),
        "correctly_empty": float(predicted == 0) if empty else None,
    }


def write_results(folder, *, gain, skip=()):
    """Every run's validation; an arm scores about its gain above what is random and the same for all arms."""
    for run in study().runs():
        if not isinstance(run, Run) or run.arm in skip:
            continue
        rng = np.random.default_rng([run.fold, run.fraction])
        dice = rng.uniform(0.2, 0.5, N) + gain[run.arm] * rng.uniform(0.5, 1.5, N)
        cases = [case(f"fold{run.fold}_{number}", value) for number, value in enumerate(dice)]
        if run.dataset == "fcd":
            cases += [case("control_1", 1.0, lesions=0, predicted=0), case("control_2", 0.0, lesions=0)]
        path = results_of(run, folder) / "validation" / "lesions.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"cases": cases}))


@pytest.fixture
def results(tmp_path):
    write_results(tmp_path, gain={"scratch": 0.0, "cl": 0.1, "mcl": 0.1})
    return tmp_path


def cell(table, **wanted):
    for column, value in wanted.items():
        table = table[table[column] == value]
    (row,) = table.to_dict("records")
    return row


def test_folds_are_pooled_by_case_and_their_means_show_the_spread(results):
    cases = read_cases(study(), results)
    row = cell(summarize_cells(study(), study().experiments["fractions"], cases), arm="cl", fraction=50, metric="dice")
    own = cases[(cases["arm"] == "cl") & (cases["fraction"] == 50)]
    assert (row["n_cases"], row["n_runs"]) == (2 * N, 2)
    assert row["mean"] == pytest.approx(own["dice"].mean())
    assert row["sd_of_runs"] == pytest.approx(own.groupby("fold")["dice"].mean().std())
    assert row["low"] < row["mean"] < row["high"]


def test_a_case_that_several_runs_evaluate_counts_once(tmp_path):
    values = yaml.safe_load(STUDY)
    values["experiments"] = {"all": {"datasets": ["atlas"], "seeds": [0, 1]}}
    repeated = study_from(values)
    for run in repeated.runs():
        path = results_of(run, tmp_path) / "test" / "lesions.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"cases": [case("a", 0.2 + 0.2 * run.seed), case("b", 0.8)]}))
    row = cell(
        summarize_cells(repeated, repeated.experiments["all"], read_cases(repeated, tmp_path)), arm="cl", metric="dice"
    )
    assert (row["part"], row["n_cases"], row["n_runs"], row["mean"]) == ("test", 2, 2, pytest.approx(0.55))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd"])
def test_cases_with_dots_in_their_names_stay_apart(tmp_path, ending):
    values = yaml.safe_load(STUDY)
    values["datasets"]["atlas"]["preset"] = "classes"
    values["experiments"] = {"one": {"datasets": ["atlas"], "arms": ["cl"]}}
    tissue = study_from(values)
    path = results_of(tissue.runs()[0], tmp_path) / "validation" / "summary.json"
    names = ["sub-1_1.5T", "sub-1_3.0T", "sub-2"]
    found = [{"prediction_file": f"/a.b/{name}{ending}", "metrics": {"1": {"Dice": 0.5}}} for name in names]
    write_json({"metric_per_case": found}, path)
    cases = read_cases(tissue, tmp_path)
    assert cases["case"].tolist() == names
    assert summarize_cells(tissue, tissue.experiments["one"], cases)["n_cases"].tolist() == [3]


def test_controls_count_for_specificity_alone(results):
    table = summarize_cells(study(), study().experiments["modalities"], read_cases(study(), results))
    dice, specificity = (cell(table, arm="cl", dataset="fcd", metric=name) for name in ("dice", "correctly_empty"))
    assert (dice["n_cases"], specificity["n_cases"], specificity["mean"]) == (N, 2, 0.5)
    assert dice["mean"] < 0.7


def test_how_long_a_pre_training_took_is_not_among_the_tests():
    rows = [(arm, seed, name, seed + 1.0) for arm in ("a", "b") for seed in (0, 1) for name in ("loss", "seconds")]
    figures = pd.DataFrame(rows, columns=["arm", "seed", "figure", "value"])
    experiment = Experiment(title="", kind="pretraining", compare=(("a", "b"),))
    assert list(compare_figures(experiment, figures)["figure"]) == ["loss"], "seconds tell of the machine as well"
    assert set(summarize_figures(figures)["figure"]) == {"loss", "seconds"}


def test_the_paired_tests_are_scipys_and_corrected_over_the_experiment(results):
    cases = read_cases(study(), results)
    tests = compare_rows(study(), study().experiments["fractions"], cases)
    assert len(tests) == 2 * 2
    gained = cell(tests, arm="cl", fraction=100)
    assert gained["difference"] == pytest.approx(0.1, abs=0.02)
    assert gained["n_cases"] == 2 * N
    values = {
        arm: cases[(cases["arm"] == arm) & (cases["fraction"] == 100) & (cases["dataset"] == "atlas")]
        .set_index("case")["dice"]
        .sort_index()
        for arm in ("cl", "scratch")
    }
    p = stats.wilcoxon(values["cl"] - values["scratch"]).pvalue
    assert gained["p"] == pytest.approx(p)
    assert gained["p_holm"] == pytest.approx(4 * p)
    assert cell(tests, arm="mcl", fraction=50)["p_holm"] == 1.0, "both are the same numbers"


def test_arms_are_compared_on_the_cases_that_both_have(results):
    missing = results / "results" / "atlas__cl__fraction100__seed0__fold1" / "validation" / "lesions.json"
    missing.unlink()
    cases = read_cases(study(), results)
    tests = compare_rows(study(), study().experiments["fractions"], cases)
    assert cell(tests, arm="cl", fraction=100)["n_cases"] == N
    assert cell(tests, arm="cl", fraction=50)["n_cases"] == 2 * N


def test_the_order_of_cases_changes_nothing(results):
    cases = read_cases(study(), results)
    shuffled = cases.sample(frac=1, random_state=0).reset_index(drop=True)
    experiment = study().experiments["fractions"]
    pd.testing.assert_frame_equal(
        *(
            summarize_cells(study(), experiment, table).sort_values(["arm", "fraction", "metric"], ignore_index=True)
            for table in (cases, shuffled)
        )
    )
    pd.testing.assert_frame_equal(*(compare_rows(study(), experiment, table) for table in (cases, shuffled)))


def alignment(mean):
    distance = {"mean": mean, "std": 0.01, "n_patients": 9, "interval": [mean, mean]}
    share = {"accuracy": 0.5, "chance": 0.1, "interval": [0.4, 0.6]}
    other = {"value": 2.0, "interval": [1.0, 3.0]}
    return {"cross_modality": distance, "cross_subject": distance, "retrieval": share, "dimension": 8} | {
        "effective_rank": other,
        "uniformity": other,
    }


def test_the_report_has_tables_tests_and_figures_beside_what_is_published(results):
    path = results / "results" / "alignment__500_validation__mcl" / "alignment.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(alignment(0.02)))
    report = collect(study(), results)
    text = report.read_text()
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| Dice | ATLAS 100 % | published | ATLAS 50 % | published |" in tables
    (cl,) = [line for line in tables if line.startswith("| CL | ") and "0.4700" in line]
    assert "* [" in cl, "better than scratch"
    assert "| MCL - CL | ATLAS 50 % | +0.000 [+0.000, +0.000] | 40 | 1 | 1 |" in tables
    assert "| MCL | 0.0200 +- 0.0100 [0.0200, 0.0200] | 0.0066 +- 0.0104 |" in text
    assert "| CL | - |  | - | - | - |" in tables, "not measured yet"
    assert "ATLAS 100 %: 40 cases, 2 run(s) per arm" in text
    for name in (
        "fractions_fractions.png",
        "modalities_modalities.png",
        "modalities_intervals.png",
        "modalities_differences.png",
    ):
        assert f"({name})" in text
        assert (report.parent / name).read_bytes().startswith(b"\x89PNG")
    for name in ("cases", "fractions", "fractions_tests", "modalities", "alignment"):
        assert len(pd.read_csv(report.parent / f"{name}.csv"))


def test_more_arms_than_colours_are_drawn(tmp_path):
    names = [f"arm{number}" for number in range(len(PALETTE) + 1)]
    values = yaml.safe_load(STUDY)
    values["arms"] = {name: {"trainer": f"Trainer{name}"} for name in names}
    values["experiments"] = {"fractions": {"datasets": ["atlas"], "fractions": [100, 50]}}
    many = study_from(values)
    figures = {"dataset": "atlas", "part": "test", "metric": "dice", "mean": 0.5, "low": 0.4, "high": 0.6}
    rows = [figures | {"arm": name, "fraction": fraction} for name in names for fraction in (100, 50)]
    draw_fractions(many, many.experiments["fractions"], pd.DataFrame(rows), tmp_path / "many.png")
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("n_runs", [1, 5])
def test_dominance_is_drawn_at_the_values_with_and_without_intervals(tmp_path, monkeypatch, n_runs):
    rows = [
        {"depth": depth, "pair": pair, "part": part, "quantity": quantity, "arm": arm, "mean": 0.5, "n_runs": n_runs}
        | ({"low": np.nan, "high": np.nan} if n_runs == 1 else {"low": 0.4, "high": 0.7})
        for depth in ("encoder", "stage1")
        for pair in ("contrastive/masked", "contrastive/lesions")
        for part in PARTS
        for quantity in ("ratio", "cosine", "opposed")
        for arm in ("one", "two")
    ]
    drawn, errorbar = [], Axes.errorbar

    def noted(axes, x, y, reach, **style):
        drawn.append((list(x), list(y), reach.T))
        return errorbar(axes, x, y, reach, **style)

    monkeypatch.setattr(Axes, "errorbar", noted)
    labels = {"one": "One", "two": "Two", "three": "not measured yet"}
    draw_dominance(labels, pd.DataFrame(rows), tmp_path / "dominance.png")
    assert (tmp_path / "dominance.png").read_bytes().startswith(b"\x89PNG")
    assert len(drawn) == 2 * 2 * 2, "pairs, quantities, arms"
    assert all(list(y) == [0.5, 0.5] for _, y, _ in drawn)
    np.testing.assert_allclose([reach for _, _, reach in drawn], np.nan if n_runs == 1 else [[[0.1, 0.2]] * 2] * 8)


def test_a_study_that_has_not_begun_makes_an_empty_report(tmp_path):
    text = collect(study(), tmp_path).read_text()
    assert text.count("No run is finished.") == 3


def test_an_arm_without_results_leaves_gaps(tmp_path):
    write_results(tmp_path, gain={"cl": 0.1, "mcl": 0.0}, skip=("scratch",))
    report = collect(study(), tmp_path)
    assert "| scratch | - | 0.4100 | - | 0.3900 |" in report.read_text()
    assert (report.parent / "modalities_modalities.png").is_file()


def test_figures_that_do_not_exist_for_one_patient_are_not_available(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(2, 8))
    scans = pd.DataFrame({"patient_id": "p", "session_id": "s", "filename": ["a", "b"], "modality": ["t1", "t2"]})
    measured = measure_alignment(Embeddings(vectors=vectors, scans=scans))
    (run,) = (run for run in study().runs() if run.id == "alignment__500_validation__mcl")
    path = results_of(run, tmp_path) / "alignment.json"
    write_json(measured, path)
    report = collect(study(), tmp_path)
    mean = measured["cross_modality"]["mean"]
    assert f"| MCL | {mean:.4f} +- n/a [n/a, n/a] | 0.0066 +- 0.0104 | n/a +- n/a [n/a, n/a] |" in report.read_text()
    assert len(pd.read_csv(report.parent / "alignment.csv")) == 5


def test_markdown_tables():
    assert markdown_table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |", ""]
