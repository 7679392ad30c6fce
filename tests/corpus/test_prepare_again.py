"""A second run over a store: what is finished stays, what changed is done again or refused, never mixed."""

import itertools
import json
import logging

import pytest

from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.errors import UserError


def test_a_second_run_redoes_nothing(prepare, source, write_scan, monkeypatch):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    folder = prepare().folder
    before = {path: path.stat().st_mtime_ns for path in (folder / "nnUNetSSLPlans_3d_fullres").iterdir()}
    monkeypatch.setattr("nnunet_ssl.corpus.session.read_volume", lambda *_: pytest.fail("a scan was read again"))
    prepare()
    assert {path: path.stat().st_mtime_ns for path in (folder / "nnUNetSSLPlans_3d_fullres").iterdir()} == before


def test_other_options_are_refused(prepare, source, write_scan):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    prepare()
    with pytest.raises(UserError, match="dtype: float16 there, float32 now"):
        prepare(dtype="float32")


def test_a_changed_image_is_prepared_again_and_only_its_session(prepare, source, write_scan, contents):
    changing = write_scan(source / "sub_1/ses_1/t1.nii.gz")
    write_scan(source / "sub_2/ses_1/t1.nii.gz")
    folder = prepare().folder
    store = folder / "nnUNetSSLPlans_3d_fullres"
    before = contents(store)
    times = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    write_scan(changing, seed=7)
    prepare()
    after = contents(store)
    assert before.keys() == after.keys()
    assert before["fomo__sub_1__ses_1__t1.b2nd"] != after["fomo__sub_1__ses_1__t1.b2nd"]
    kept = "fomo__sub_2__ses_1__t1.b2nd"
    assert times[kept] == (store / kept).stat().st_mtime_ns


def test_a_scan_that_leaves_the_index_leaves_the_store(prepare, source, write_scan):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    gone = write_scan(source / "sub_2/ses_1/t1.nii.gz")
    folder = prepare().folder
    gone.unlink()
    prepare()
    assert {path.name for path in (folder / "nnUNetSSLPlans_3d_fullres").glob("*.b2nd")} == {
        "fomo__sub_1__ses_1__t1.b2nd",
        "fomo__sub_1__ses_1__t1_seg.b2nd",
    }


def test_a_scan_that_goes_bad_leaves_the_store(prepare, source, write_scan):
    path = write_scan(source / "sub_1/ses_1/t1.nii.gz")
    write_scan(source / "sub_1/ses_1/t2.nii.gz")
    folder = prepare().folder
    path.write_bytes(b"")
    prepare()
    assert len(open_corpus(500)) == 1
    assert not list((folder / "nnUNetSSLPlans_3d_fullres").glob("*t1*"))


def test_a_missing_file_is_tried_again_when_it_is_back(prepare, source, write_scan, tmp_path):
    path = write_scan(source / "sub_1/ses_1/t1.nii.gz")
    link = source / "sub_1/ses_1/t2.nii.gz"
    link.symlink_to(tmp_path / "offline.nii.gz")
    assert len(prepare().failures) == 1
    (tmp_path / "offline.nii.gz").write_bytes(path.read_bytes())
    assert len(prepare().failures) == 0
    assert len(open_corpus(500)) == 2


def test_a_deleted_result_is_made_again(prepare, source, write_scan, contents):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    folder = prepare().folder
    before = contents(folder)
    (folder / "nnUNetSSLPlans_3d_fullres/fomo__sub_1__ses_1__t1.b2nd").unlink()
    prepare()
    assert contents(folder) == before


def cut(path):
    path.write_bytes(path.read_bytes()[:700])


def lose_the_last_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def swap(path):
    """Put a whole file of another scan in its place."""
    other = path.with_name(path.name.replace("sub_1", "sub_2"))
    path.write_bytes(other.read_bytes())


def forget_sizes(journal):
    """Make the journal what it was before it recorded sizes."""
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    for entry in entries:
        del entry["sizes"]
    journal.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


@pytest.mark.parametrize(
    ("suffix", "damage", "recorded"),
    [
        *itertools.product([".b2nd", "_seg.b2nd", ".pkl"], [cut, lose_the_last_byte, empty], [True, False]),
        (".b2nd", swap, True),
    ],
)
def test_a_damaged_result_is_made_again_and_only_that(
    prepare, source, write_scan, contents, caplog, suffix, damage, recorded
):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    write_scan(source / "sub_1/ses_1/t2.nii.gz", contrast=0.5)
    write_scan(source / "sub_2/ses_1/t1.nii.gz", shape=(22, 24, 26), seed=3)
    folder = prepare().folder
    before = contents(folder)
    if not recorded:
        forget_sizes(folder / "nnUNetSSLPlans_journal.jsonl")
    store = folder / "nnUNetSSLPlans_3d_fullres"
    damaged = store / f"fomo__sub_1__ses_1__t1{suffix}"
    damage(damaged)
    others = [path for path in store.iterdir() if not path.name.startswith("fomo__sub_1__ses_1__t1")]
    times = {path: path.stat().st_mtime_ns for path in others}
    with caplog.at_level(logging.WARNING):
        prepare()
    assert "1 scans are missing or damaged, such as those of fomo__sub_1__ses_1__t1" in caplog.text
    assert contents(folder) == before
    assert times == {path: path.stat().st_mtime_ns for path in others}


def test_a_damaged_case_of_an_unfinished_session_is_not_taken_for_done(prepare, source, write_scan, contents):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    folder = prepare().folder
    before = contents(folder)
    (folder / "nnUNetSSLPlans_journal.jsonl").unlink()
    cut(folder / "nnUNetSSLPlans_3d_fullres/fomo__sub_1__ses_1__t1.b2nd")
    prepare()
    assert contents(folder) == before


@pytest.mark.parametrize("line", [b"{\n", b"\x00\xff\n", b"[1]\n", b'{"session": "fomo/sub_1/ses_1"}\n'])
def test_a_damaged_line_of_the_journal_costs_nothing(prepare, source, write_scan, contents, line):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    write_scan(source / "sub_2/ses_1/t1.nii.gz")
    folder = prepare().folder
    before = contents(folder)
    journal = folder / "nnUNetSSLPlans_journal.jsonl"
    journal.write_bytes(line + journal.read_bytes().splitlines(keepends=True)[1])
    prepare()
    assert contents(folder) == before


def test_a_store_without_recorded_sizes_is_not_redone_and_learns_them(prepare, source, write_scan, contents):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    folder = prepare().folder
    before, store = contents(folder), folder / "nnUNetSSLPlans_3d_fullres"
    times = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    forget_sizes(folder / "nnUNetSSLPlans_journal.jsonl")
    prepare()
    assert contents(folder) == before
    assert times == {path: path.stat().st_mtime_ns for path in store.iterdir()}


def test_leftovers_of_a_kill_are_no_results(prepare, source, write_scan, contents):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    write_scan(source / "sub_2/ses_1/t1.nii.gz")
    folder = prepare().folder
    before = contents(folder)
    store, journal = folder / "nnUNetSSLPlans_3d_fullres", folder / "nnUNetSSLPlans_journal.jsonl"
    (store / ".123.partial.fomo__sub_2__ses_1__t1.b2nd").write_bytes(b"half")
    (folder / ".123.partial.nnUNetSSLPlans_journal.jsonl").write_bytes(b"half")
    (store / "fomo__sub_2__ses_1__t1.pkl").unlink()
    journal.write_text(journal.read_text()[:-30])
    prepare()
    assert contents(folder) == before


def test_the_store_does_not_depend_on_the_number_of_processes(prepare, source, write_scan, nnunet_folders, contents):
    for subject in range(5):
        write_scan(source / f"sub_{subject}/ses_1/t1.nii.gz", seed=subject)
        write_scan(source / f"sub_{subject}/ses_1/scan_1.nii.gz", seed=subject, contrast=0.3)
    folder = prepare(processes=1).folder
    alone = contents(folder)
    folder.rename(nnunet_folders["nnUNet_results"] / "kept")
    prepare(processes=2)
    assert contents(folder) == alone


def test_the_store_does_not_depend_on_what_fits_into_memory(
    prepare, source, write_scan, nnunet_folders, contents, monkeypatch
):
    write_scan(source / "sub_1/ses_1/t1.nii.gz", spacing=2.0)
    write_scan(source / "sub_1/ses_1/t2.nii.gz", spacing=1.5, shape=(26, 30, 28))
    folder = prepare().folder
    kept = contents(folder)
    folder.rename(nnunet_folders["nnUNet_results"] / "kept")
    monkeypatch.setattr("nnunet_ssl.corpus.session.KEPT_BYTES", 0)
    prepare()
    assert contents(folder) == kept


def test_two_runs_do_not_work_on_one_store(prepare, source, write_scan, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr("nnunet_ssl.files.LOCK_PATIENCE_S", 0)
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    folder = prepare().folder
    with FileLock(folder / ".nnssl_prepare.lock"), pytest.raises(UserError, match="Another nnssl_prepare"):
        prepare()


def test_folders_of_others_in_a_store_stay_and_their_links_go(prepare, source, write_scan):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    folder = prepare().folder
    (cases,) = {path.parent for path in folder.rglob("*.b2nd")}
    (cases / "@eaDir").mkdir()
    (cases / "lost.b2nd").symlink_to(cases / "nowhere.b2nd")
    prepare()
    assert (cases / "@eaDir").is_dir() and not (cases / "lost.b2nd").is_symlink()
    assert (folder / "manifest.tsv").is_file()


def test_a_full_disk_stops_the_run_and_costs_nothing_done(prepare, source, write_scan, monkeypatch):
    for subject in range(3):
        write_scan(source / f"sub_{subject}/ses_1/t1.nii.gz", seed=subject)
    from nnunet_ssl.corpus import session

    write, written = session.write_case, []

    def write_until_full(case, *rest, **options):
        if written:
            raise OSError(28, "No space left on device")
        written.append(case)
        write(case, *rest, **options)

    def note_and_write(case, *rest, **options):
        written.append(case)
        write(case, *rest, **options)

    monkeypatch.setattr(session, "write_case", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        prepare()
    with pytest.raises(UserError, match="run to the end"):
        open_corpus(500)
    monkeypatch.setattr(session, "write_case", note_and_write)
    prepare()
    assert len(written) == len(set(written)) == 3
    assert len(open_corpus(500)) == 3
