import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.cli import evaluate
from nnunet_ssl.evaluation.gradients import PARTS, describe_gradients, measure_gradients, read_runs, summarise_seeds
from nnunet_ssl.pretraining.gradients import measure, measure_by_depth, ratio_factors, scale


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


DEPTHS = {"stem": [0], **{f"stage{number}": [number] for number in range(1, 11)}, "other": [11]}


def write_seed(folder, seed, rows=9):
    """A run as a training writes it: contrastive gradients 10 times as long, the same way in the stem, opposed in
    stage 10; the masked branch does not reach the rest."""
    generator = torch.Generator().manual_seed(seed)
    table = []
    for _ in range(rows):
        masked = [torch.rand(3, generator=generator) + 0.5 for _ in range(12)]
        signs = {"stem": 1, "stage10": -1}
        gradients = {
            "contrastive": [10 * signs.get(depth, 0.5) * one for depth, one in zip(DEPTHS, masked)],
            "masked": [one if depth in signs else None for depth, one in zip(DEPTHS, masked)],
        }
        figures = measure(gradients) | measure_by_depth(gradients, DEPTHS)
        table.append({name: float(value) for name, value in figures.items()})
    columns = pd.DataFrame(table)
    steps = [100 * (row + 1) for row in range(rows)]
    return write_run(folder, **{"step": steps, "loss/contrastive": 1.0, **columns[sorted(columns)]})


def test_depths_are_told_finest_first_with_the_share_of_each_branch_and_their_cosine(tmp_path):
    result = measure_gradients(read_runs([write_seed(tmp_path / "seed", 0)]))
    depths = result["runs"]["seed"]["depths"]
    assert list(depths) == list(DEPTHS)
    assert depths["stem"]["branches"]["contrastive"]["share"] == pytest.approx(10 / 11)
    assert depths["stem"]["branches"]["masked"]["share"] == pytest.approx(1 / 11)
    cosines = {depth: one["pairs"]["contrastive/masked"]["cosine"]["mean"] for depth, one in depths.items()}
    assert (cosines["stem"], cosines["stage10"]) == (pytest.approx(1), pytest.approx(-1))
    assert np.isnan(cosines["stage1"]), "a gradient that is not there has no direction"
    assert depths["stage1"]["branches"]["contrastive"]["share"] == 1
    assert depths["stage10"]["pairs"]["contrastive/masked"]["opposed"] == 1
    told = describe_gradients(result).partition("by depth")[2].splitlines()
    assert [line.split()[-4:] for line in told[2:4]] == [["91%", "9%", "+1.000", "0%"], ["100%", "0%", "-", "-"]]


def test_a_run_that_did_not_record_depths_is_told_without_them(combined):
    result = measure_gradients(read_runs([combined]))
    assert result["runs"]["mcl_mim"]["depths"] == {}
    assert "depth" not in describe_gradients(result)


def test_a_branch_without_gradient_has_no_cosine(tmp_path):
    """A training writes 0 there, as if the branches ignored each other."""
    columns = {"gradient/contrastive": [1.0, 0.0, 1.0, 1.0], "gradient/masked": 1.0}
    run = write_run(tmp_path / "run", **columns, **{"gradient/cosine": [-0.5, 0.0, -0.5, -0.5]})
    pair = measure_gradients(read_runs([run]))["runs"]["run"]["pairs"]["contrastive/masked"]
    assert (pair["cosine"]["mean"], pair["opposed"]) == (-0.5, 1)


def test_seeds_of_an_arm_are_summarised_with_intervals(tmp_path):
    runs = [
        write_run(
            tmp_path / f"seed{seed}",
            **{
                "step": [100, 200, 300],
                "loss/contrastive": 1.0,
                "gradient/contrastive": [2.0**seed, 1.0, 8.0],
                "gradient/masked": [1.0, 1.0, 2.0],
                "gradient/cosine": [0.1 * seed, -0.2, 0.3],
            },
        )
        for seed in range(5)
    ]
    table = summarise_seeds(list(read_runs(runs).values()))
    assert list(table) == ["depth", "pair", "part", "quantity", "mean", "low", "high", "n_runs"]
    assert set(table["depth"]) == {"encoder"} and set(table["pair"]) == {"contrastive/masked"}
    rows = table.set_index(["part", "quantity"])[["mean", "low", "high", "n_runs"]]
    assert set(rows.index) == {(part, one) for part in PARTS for one in ("ratio", "cosine", "opposed")}
    mean, low, high, count = rows.loc[("first third", "ratio")]
    expected = stats.ttest_1samp(np.log(2) * np.arange(5), 0).confidence_interval()
    assert (mean, count) == (pytest.approx(2**2.0), 5), "the geometric mean of 1, 2, 4, 8, 16"
    assert (np.log(low), np.log(high)) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert rows.loc[("whole", "ratio"), "mean"] == pytest.approx((1 * 2 * 4 * 4 * 4) ** 0.2)
    expected = stats.ttest_1samp(0.1 * np.arange(5), 0).confidence_interval()
    assert rows.loc[("first third", "cosine")].tolist() == pytest.approx([0.2, expected.low, expected.high, 5])
    assert rows.loc[("second third", "opposed")].tolist() == [1, 1, 1, 5]
    # of the three rows of a run the second is below 0; of the seed 0, the first is 0
    assert rows.loc[("whole", "opposed"), "mean"] == pytest.approx(1 / 3)


def test_seeds_are_summarised_by_depth_finest_first(tmp_path):
    table = summarise_seeds([*read_runs([write_seed(tmp_path / f"seed{seed}", seed) for seed in range(3)]).values()])
    assert list(dict.fromkeys(table["depth"])) == ["encoder", *DEPTHS]
    rows = table.set_index(["depth", "part", "quantity"])
    assert rows.loc[("stem", "whole", "ratio"), "mean"] == pytest.approx(10)
    assert rows.loc[("stage10", "last third", "cosine"), ["mean", "low"]].tolist() == pytest.approx([-1, -1])
    assert rows.loc[("stage1", "whole", "ratio"), "n_runs"] == 0


def test_the_order_of_two_branches_turns_their_ratio_over_and_nothing_else(tmp_path):
    norms = np.exp(np.random.default_rng(0).normal(size=(3, 2, 4)))
    tables = []
    for turn in (1, -1):
        runs = [
            write_run(tmp_path / f"{turn}/{seed}", **dict(zip(("gradient/a", "gradient/b"), of_seed[::turn])))
            for seed, of_seed in enumerate(norms)
        ]
        tables.append(summarise_seeds([*read_runs(runs).values()]).query("quantity == 'ratio'"))
    one, other = tables
    for column, turned in {"mean": "mean", "low": "high", "high": "low"}.items():
        assert one[column].tolist() == pytest.approx((1 / other[turned]).tolist())


def test_one_seed_has_no_interval_and_other_arms_are_no_seeds(combined, tmp_path):
    (run,) = read_runs([combined]).values()
    table = summarise_seeds([run])
    assert table["low"].isna().all() and table["high"].isna().all()
    assert set(table["n_runs"]) == {0, 1}, "nothing was measured in a part of the training"
    (mim,) = read_runs([write_run(tmp_path / "mim", **{"gradient/masked": 1.0})]).values()
    assert summarise_seeds([mim, mim]).empty
    with pytest.raises(UserError, match="no seeds of one pre-training"):
        summarise_seeds([run, mim])
    (deep,) = read_runs([write_seed(tmp_path / "seed", 0)]).values()
    numbers = summarise_seeds([run, deep]).set_index(["depth", "part", "quantity"])["n_runs"]
    assert (numbers[("encoder", "whole", "ratio")], numbers[("stem", "whole", "ratio")]) == (2, 1), "one is older"


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
    deep = write_seed(tmp_path / "deep", 0)
    call = ["gradients", combined, balanced, mim, deep, "-o", tmp_path / "out", "--json"]
    monkeypatch.setattr("sys.argv", ["nnssl_evaluate", *map(str, call)])
    evaluate()
    result = json.loads(capsys.readouterr().out)
    assert list(result["runs"]) == ["mcl_mim", "balanced", "mim", "deep"]
    assert result["runs"]["deep"]["depths"]["stage1"]["pairs"]["contrastive/masked"]["cosine"]["mean"] is None
    assert result["runs"]["balanced"]["pairs"]["contrastive/masked"]["balanced"]["median"] == 1
    assert result == json.loads((tmp_path / "out" / "gradients.json").read_text())
    assert (tmp_path / "out" / "gradients.png").read_bytes().startswith(b"\x89PNG")
