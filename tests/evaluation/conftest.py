import json

import blosc2
import numpy as np
import pandas as pd
import pytest
from held_out import write_models

from nnunet_ssl.evaluation.operate_cli import operate


@pytest.fixture
def write_corpus(nnunet_folders):
    """A function that writes a prepared corpus of noise whose scans of one subject share their anatomy."""

    def write(n_subjects=6, modalities=("t1", "flair"), shape=(40, 36, 32), bbox=(4, 36, 0, 36, 2, 30)):
        folder = nnunet_folders["nnUNet_preprocessed"] / "Dataset500_FOMO60K"
        (folder / "nnUNetSSLPlans_3d_fullres").mkdir(parents=True)
        rows = []
        for subject in range(n_subjects):
            anatomy = np.random.default_rng(subject).normal(size=shape)
            for place, modality in enumerate(modalities):
                scan = f"A__sub_{subject}__ses_1__{modality}"
                data = (anatomy * (-1) ** place).astype(np.float16)[None]
                blosc2.asarray(data, urlpath=str(folder / "nnUNetSSLPlans_3d_fullres" / f"{scan}.b2nd"))
                rows.append(
                    {
                        "scan_id": scan,
                        "dataset": "A",
                        "subject": f"A/sub_{subject}",
                        "session": f"A/sub_{subject}/ses_1",
                        "modality": modality,
                        "repeat": 1,
                        "age": f"{20.5 + subject}" if subject else "",
                        "sex": "FM"[subject % 2],
                        "shape": ",".join(map(str, shape)),
                        "bbox": ",".join(map(str, bbox)),
                    }
                )
        pd.DataFrame(rows).to_csv(folder / "manifest.tsv", sep="\t", index=False)
        (folder / "nnUNetSSLPlans.json").write_text(json.dumps({"preprocessing": {"spacing": [1.0, 1.0, 1.0]}}))
        return folder

    return write


@pytest.fixture(scope="session")
def held_out_models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return root, write_models(root, "A__nnUNetPlans__3d_fullres", "B__nnUNetPlans__3d_fullres")


@pytest.fixture(scope="session")
def operated(held_out_models):
    """The two models, and the choice for the first, the second and both."""
    root, models = held_out_models
    with pytest.MonkeyPatch.context() as patch:

        def run(*arguments):
            patch.setattr("sys.argv", ["nnssl_operate", *map(str, arguments)])
            operate()

        for model in models:
            run(model, "-ref", root / "labelsTr", "--metric", "recognition_quality")
        run(*models, "-ref", root / "labelsTr", "-o", root / "both")
    return root, models
