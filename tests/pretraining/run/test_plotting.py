"""The pictures of a run."""

import numpy as np
import pandas as pd

from nnunet_ssl.pretraining.run.plotting import progress
from nnunet_ssl.pretraining.run.reconstructions import Reconstruction, reconstructions


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes]


def test_a_panel_appears_with_its_first_figure():
    table = pd.DataFrame({"step": [0, 10], "loss/masked": [np.nan, 1.0]})
    assert titles(progress(table, "a run")) == ["Masked loss"]
    table["gradient/masked"] = [2.0, 1.0]
    table["gradient/contrastive"] = np.nan
    figure = progress(table, "a run")
    assert titles(figure) == ["Masked loss", "Gradient norm on the encoder"]
    assert len(figure.axes[1].lines) == 1


def test_curves_pass_over_intervals_without_a_figure():
    table = pd.DataFrame(
        {"step": [0, 10, 20], "loss/masked": [np.nan, 3.0, 2.0], "validation/loss/masked": [4.0, np.nan, 1.0]}
    )
    training, held_out = progress(table, "a run").axes[0].lines
    assert training.get_xydata().tolist() == [[10, 3], [20, 2]]
    assert held_out.get_xydata().tolist() == [[0, 4], [20, 1]]


def test_every_modality_has_its_error():
    table = pd.DataFrame({"step": [1], "validation/error/t1": [0.5], "validation/error/flair": [0.6]})
    axis = progress(table, "a run").axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["t1", "flair"]


def test_hidden_voxels_are_not_shown_and_then_filled_in():
    whole, hidden = np.arange(16.0).reshape(4, 4), np.eye(4, dtype=bool)
    example = Reconstruction(modality="t2", whole=whole, hidden=hidden, prediction=np.full((4, 4), 7.0))
    scan, seen, filled = [axis.images[0].get_array() for axis in reconstructions([example], "title").axes]
    assert np.array_equal(scan, whole)
    assert np.array_equal(seen.mask, hidden)
    assert np.array_equal(filled, np.where(hidden, 7.0, whole))
