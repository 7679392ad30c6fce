"""Packages of models with random weights."""

from functools import cache

import pytest
import torch
from tiny_models import write_model

from nnunet_ssl.deployment.packaging import package
from nnunet_ssl.deployment.segmenting import Segmenter


@pytest.fixture(scope="session")
def packaged(tmp_path_factory):
    """A function that packages a model of random weights with settings of its own, and returns the package."""

    def make(learned=None, **settings):
        root = tmp_path_factory.mktemp("packaged")
        model = write_model(root / "model", **({"contrast": 4.0} | settings))
        package([model], root / "package", learned=learned)
        return root / "package"

    return make


@pytest.fixture(scope="session")
def segmenter(packaged):
    """A function that packages such a model and loads it, once for the same settings."""

    @cache
    def load(**settings):
        return Segmenter(packaged(**settings) / "model", torch.device("cpu"))

    return load
