import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.cli import evaluate
from nnunet_ssl.evaluation.gradients import describe_gradients, measure_gradients, read_runs
from nnunet_ssl.pretraining.gradients import measure, ratio_factors, scale


def write_run(folder, **columns):
    folder.mkdir(parents=True)
    table = pd.DataFrame({"step": [10, 20, 30, 40], "loss/contrastive": 1.0} | columns)
    table.to_csv(folder / "progress.csv", index=False)
    return folder


@pytest.fixture
def combined(tmp_path):
    """A run whose contrastive gradient is 4, 2, 1 and 0.5 times the masked one; nothing was measured at step 20."""
    return write_run(
        tmp_path / "Dataset500_A" / "mcl_mim",
        **{
            "gradient/contrastive": [4.0, np.nan, 2.0, 0.5],
            "gradient/masked": [1.0, np.nan, 2.0, 1.0],
            "gradient/cosine": [-0.5, np.nan, 0.25, 0.1],
        },
    )


def test_a_run_computed_by_hand(combined):
    run = measure_gradients(read_runs([combined]))["runs"]["mcl_mim"]
    assert (run["steps"], run["n_rows"]) == (40, 3)
    assert {name: one["median"] for name, one in run["branches"].items()} == {"contrastive": 2.0, "masked": 1.0}
    (pair,) = run["pairs"].items()
    assert pair[0] == "contrastive/masked"
    assert (pair[1]["ratio"]["median"], pair[1]["ratio"]["quartiles"]) == (1.0, [0.75, 2.5])
    assert pair[1]["balanced"] == pair[1]["ratio"], "nothing was balanced"
    assert pair[1]["cosine"]["mean"] == pytest.approx(-0.05)
    assert (pair[1]["dominated"], pair[1]["opposed"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_balancing_scales_the_contrastive_branch(tmp_path):
    folder = write_run(
        tmp_path / "balanced",
        **{"gradient/contrastive": 4.0, "gradient/masked": 1.0, "gradient/balance": 0.25, "gradient/cosine": 0.0},
    )
    pair = measure_gradients(read_runs([folder]))["runs"]["balanced"]["pairs"]["contrastive/masked"]
    assert (pair["ratio"]["median"], pair["balanced"]["median"]) == (4.0, 1.0)


def test_a_run_with_one_branch_has_a_norm_and_no_pair(tmp_path):
    result = measure_gradients(read_runs([write_run(tmp_path / "mim", **{"gradient/masked": 1.0})]))
    assert result["runs"]["mim"]["branches"]["masked"]["median"] == 1
    assert result["runs"]["mim"]["pairs"] == {}
    assert "1 [1, 1]" in describe_gradients(result)


def test_any_number_of_branches_is_read_as_a_training_writes_it(tmp_path):
    """In whatever order the table has them: columns are sorted, the branches of a cosine are in the recipe's order."""
    branches = {"masked": [3.0, 0.0], "contrastive": [0.0, 4.0], "brightness": [0.0, -2.0]}
    gradients = {name: [torch.tensor(values)] for name, values in branches.items()}
    heads = {name: nn.Linear(1, 1) for name in branches}
    factors = ratio_factors(gradients, {"masked": 0.5, "brightness": 0.25})
    figures = measure(gradients) | scale(gradients, heads, factors)
    run = write_run(tmp_path / "three", **{name: float(figures[name]) for name in sorted(figures)})
    result = measure_gradients(read_runs([run]))["runs"]["three"]
    assert {name: one["median"] for name, one in result["branches"].items()} == {
        "brightness": 2.0,
        "contrastive": 4.0,
        "masked": 3.0,
    }
    pairs = {name: (one["ratio"]["median"], one["cosine"]["mean"]) for name, one in result["pairs"].items()}
    assert pairs == {
        "brightness/contrastive": (0.5, -1.0),
        "brightness/masked": (pytest.approx(2 / 3), 0.0),
        "contrastive/masked": (pytest.approx(4 / 3), 0.0),
    }
    after = float(gradients["brightness"][0].norm()) / float(gradients["masked"][0].norm())
    assert result["pairs"]["brightness/masked"]["balanced"]["median"] == pytest.approx(after)


def test_runs_are_called_by_the_shortest_names_that_tell_them_apart(combined, tmp_path):
    other = write_run(tmp_path / "Dataset501_B" / "mcl_mim", **{"gradient/masked": 1.0})
    assert list(read_runs([combined, other / "progress.csv"])) == ["Dataset500_A/mcl_mim", "Dataset501_B/mcl_mim"]
    with pytest.raises(UserError, match="The same run is named twice"):
        read_runs([combined, combined])


def test_what_holds_no_gradients_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"There is no .*nowhere: name the folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="gradients_every is above 0"):
        read_runs([write_run(tmp_path / "unmeasured")])
    with pytest.raises(UserError, match="no row with the norm of a branch yet"):
        read_runs([write_run(tmp_path / "young", **{"gradient/masked": np.nan})])
    with pytest.raises(UserError, match="has text where step and gradients are numbers"):
        read_runs([write_run(tmp_path / "damaged", **{"gradient/masked": ["0.1", "0.2", "0.3", "0.0.4"]})])
    (tmp_path / "empty.csv").touch()
    with pytest.raises(UserError, match=r"empty.csv cannot be read as a table"):
        read_runs([tmp_path / "empty.csv"])


def test_the_command_compares_runs(combined, tmp_path, monkeypatch, capsys):
    long = np.arange(200) + 1
    norms = {"gradient/contrastive": 1.0 * long, "gradient/masked": 1.0, "gradient/cosine": 0.1}
    balanced = write_run(tmp_path / "balanced", step=long, **norms, **{"gradient/balance": 1 / long})
    mim = write_run(tmp_path / "mim", **{"gradient/masked": 1.0})
    call = ["gradients", combined, balanced, mim, "-o", tmp_path / "out", "--json"]
    monkeypatch.setattr("sys.argv", ["nnssl_evaluate", *map(str, call)])
    evaluate()
    result = json.loads(capsys.readouterr().out)
    assert list(result["runs"]) == ["mcl_mim", "balanced", "mim"]
    assert result["runs"]["balanced"]["pairs"]["contrastive/masked"]["balanced"]["median"] == 1
    assert result == json.loads((tmp_path / "out" / "gradients.json").read_text())
    assert (tmp_path / "out" / "gradients.png").read_bytes().startswith(b"\x89PNG")
