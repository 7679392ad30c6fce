import pytest

from nnunet_ssl.corpus.plans import PreparationConfig, make_plans
from nnunet_ssl.corpus.session import ScanTask, SessionTask, prepare_session
from nnunet_ssl.errors import UserError


def test_a_machine_that_does_not_see_the_store_says_so_and_writes_nothing(tmp_path):
    scan = ScanTask(scan_id="a", path=str(tmp_path / "a.nii.gz"), modality="t1")
    plans = make_plans("Dataset500_FOMO60K", PreparationConfig())
    task = SessionTask(session="s", fingerprint="f", scans=(scan,), folder=str(tmp_path / "absent"), plans=plans)
    with pytest.raises(UserError, match=r"absent is not seen from .*same paths"):
        prepare_session(task)
    assert not (tmp_path / "absent").exists()
