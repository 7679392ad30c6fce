import pandas as pd
import pytest

from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.run.outputs import description
from nnunet_ssl.pretraining.run.summary import training_hours, write_summary


def test_hours_are_steps_by_speed_also_over_a_continuation():
    table = pd.DataFrame({"step": [0, 100, 300, 400], "speed/steps_per_second": [None, 1.0, 2.0, 0.5]})
    assert training_hours(table) == pytest.approx((100 / 1 + 200 / 2 + 100 / 0.5) / 3600)
    assert training_hours(table[["step"]]) == 0


def test_a_run_whose_table_was_removed_goes_on_without_a_report(tmp_path):
    write_summary(tmp_path, load_config("mcl_mim"), {}, processes=1)
    assert not any(tmp_path.iterdir())


def test_a_report_tells_costs_figures_settings_and_whom_to_cite(tmp_path, write_prepared):
    write_prepared()
    config = load_config("mcl_mim", ["steps=400"])
    table = {"step": [0, 400], "speed/steps_per_second": [None, 0.5], "loss/masked": [None, 0.25]}
    pd.DataFrame(table).to_csv(tmp_path / "progress.csv", index=False)
    write_summary(tmp_path, config, description(open_corpus(500), config), processes=4)
    html = (tmp_path / "report.html").read_text()
    assert "step 400 of 400" in html
    assert "0.22 hours of training on 4 process(es), 0.89 device hours" in html
    assert "<td>loss/masked</td>\n<td>0.25</td>" in html
    assert "queue_size: 16384" in html
    assert "arXiv 2511.11311" in html
