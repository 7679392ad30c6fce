"""The demo: its real commands at a smaller size still, interrupted and taken up again; and what users get wrong."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnunet_ssl.demo import cli, resuming, steps

TINY_PRETRAINING = (
    *("swin.embed_dim=8", "swin.depths=1,1,1", "swin.num_heads=1,2,2", "swin.window_size=4"),
    *("patch_size=32,32,32", "batch_size=2", "masked.unpaired_batch_size=1", "queue_size=16", "steps=4", "workers=0"),
    *("log_every=2", "validation.every=4", "validation.fraction=0.2"),
)


@pytest.fixture
def tiny(monkeypatch):
    """The demo's commands on few coarse brains, with networks that learn nothing in their few steps."""
    for name, value in {"SUBJECTS": 6, "TRAINING_CASES": 6, "TEST_CASES": 2, "VOXEL_MM": 4}.items():
        monkeypatch.setattr(steps, name, value)
    monkeypatch.setattr(steps, "SMALL_PRETRAINING", TINY_PRETRAINING)
    monkeypatch.setattr(steps, "SMALL_FINETUNING", "steps=4,epoch_steps=2,patch_size=32x32x32,batch_size=2")


@pytest.fixture
def demo(monkeypatch):
    """A function that calls nnssl_demo with arguments, in this process; its commands are processes of their own."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["nnssl_demo", *map(str, arguments)])
        cli.main()

    return run


@pytest.mark.slow
def test_the_whole_story_from_scans_to_a_table_and_a_figure_and_again(tiny, demo, tmp_path, capsys):
    demo("-w", tmp_path / "work", "-device", "cpu")
    told = capsys.readouterr().out
    for command in (
        "$ nnssl_pretrain -c mcl_mim",
        "$ nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerMCLMIM -device cpu\n",
        "$ nnUNetv2_predict",
        "export nnUNet_raw=",
    ):
        assert command in told
    assert "mean Dice on 2 held-out cases" in told and "nnssl_pretrain -c mcl_mim\n" in told
    assert (tmp_path / "work" / "demo.png").stat().st_size > 20_000
    assert len(list((tmp_path / "work" / "predictions").glob("*.nii.gz"))) == 2
    assert len(json.loads((tmp_path / "work" / "evaluation" / "lesions.json").read_text())["cases"]) == 2

    demo("-w", tmp_path / "work", "-device", "cpu")
    assert capsys.readouterr().out.count("done before") == 11


@pytest.mark.parametrize(("device", "kept"), [("cpu", True), ("cuda", False)])
def test_memory_is_kept_between_layers_where_the_cpu_computes(tmp_path, device, kept):
    assert ("MALLOC_TRIM_THRESHOLD_" in steps.variables(tmp_path, device)) is kept


def step(name, code, **options):
    return steps.Step(name=name, title=name, command=("python", "-c", code), **options)


def test_a_failed_step_is_shown_and_taken_up_again_with_what_follows(tmp_path, capsys):
    calls = tmp_path / "calls"
    first = step("1", f"open({str(calls)!r}, 'a').write('1')")
    tells = f"import sys; open({str(calls)!r}, 'a').write('2' + ''.join(sys.argv[1:]))"
    second = step("2", f"{tells}; sys.argv[1:] or exit('the reason')", continued=("c",))
    last = step("3", f"open({str(calls)!r}, 'a').write('3')")
    with pytest.raises(resuming.UserError, match=r"(?s)the reason.*'2' failed with status 1"):
        resuming.run_steps([first, second, last], tmp_path, {})
    resuming.run_steps([first, second, last], tmp_path, {})
    assert calls.read_text() == "122c3"
    resuming.run_steps([first, second, last], tmp_path, {})
    assert calls.read_text() == "122c3"
    second = step("2", tells, continued=("c",))
    resuming.run_steps([first, second, last], tmp_path, {})
    assert calls.read_text() == "122c323", "another command"
    resuming.run_steps([step("1", f"open({str(calls)!r}, 'a').write('new')"), second, last], tmp_path, {})
    assert calls.read_text() == "122c323new23", "nothing old is continued on new data"


def test_a_step_done_with_other_variables_is_done_again(tmp_path):
    calls = tmp_path / "calls"
    notes = step("1", f"import os; open({str(calls)!r}, 'a').write(os.environ['nnssl_settings'])")
    for settings in ("short", "short", "long"):
        resuming.run_steps([notes], tmp_path, {"nnssl_settings": settings})
    assert calls.read_text() == "shortlong"


@pytest.mark.parametrize(("continued", "left"), [(None, ["1"]), (("2",), ["1", "2"])])
def test_leftovers_of_an_interrupted_step_are_removed_unless_it_is_continued(tmp_path, continued, left):
    folder, reason = tmp_path / "half", tmp_path / "reason to fail"
    code = f"""
import pathlib, sys
folder = pathlib.Path({str(folder)!r})
folder.mkdir(exist_ok="2" in sys.argv)
(folder / sys.argv[-1]).touch()
sys.exit(pathlib.Path({str(reason)!r}).exists())
"""
    makes = steps.Step(
        name="1", title="1", command=("python", "-c", code, "1"), continued=continued, leftovers=(folder,)
    )
    reason.touch()
    with pytest.raises(resuming.UserError, match="status 1"):
        resuming.run_steps([makes], tmp_path, {})
    reason.unlink()
    resuming.run_steps([makes], tmp_path, {})
    assert sorted(path.name for path in folder.iterdir()) == left


def test_an_interrupted_step_is_not_continued_with_another_command_or_after_a_repeated_step(tmp_path):
    calls, folder = tmp_path / "calls", tmp_path / "results"
    tell = f"import sys; open({str(calls)!r}, 'a').write('{{}}' + ''.join(sys.argv[1:]) + ' '); "

    def tries(first, second, variables=None):
        folder.mkdir(exist_ok=True)
        one = step("1", tell.format(first))
        two = step("2", tell.format(second) + "sys.exit(3)", continued=("c",), leftovers=(folder,))
        with pytest.raises(resuming.UserError, match="'2' failed"):
            resuming.run_steps([one, two], tmp_path, variables or {})
        return folder.is_dir()

    assert tries("a", "b")
    assert tries("a", "b"), "kept, because it is continued"
    assert not tries("a", "other")
    assert not tries("new", "other")
    assert not tries("new", "other", variables={"nnssl_settings": "long"})
    assert calls.read_text().split() == ["a", "b", "bc", "other", "new", "other", "new", "other"]


def test_folders_that_no_try_of_the_demo_has_written_are_left_alone(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    resuming.run_steps([step("1", "pass", leftovers=(mine,))], tmp_path / "logs", {})
    assert mine.is_dir()


def test_a_full_disk_is_named(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.shutil, "disk_usage", lambda path: SimpleNamespace(free=3e8))
    with pytest.raises(SystemExit, match=r"error: .*work has 0\.3 GB left; the demo needs 1 GB.*-w"):
        demo("-w", tmp_path / "work")


def test_without_nilearn_the_extra_is_named(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install .nnunet_ssl\[demo\]"):
        demo("-w", tmp_path / "work")


def test_the_demo_needs_no_clone():
    """It runs what an installation has: commands, and modules of packages."""
    for step in steps.steps(Path("work"), "cpu"):
        program, *arguments = step.command
        assert program.startswith(("nnU", "nnssl")) or (program == "python" and arguments[0] == "-m")
        assert not any("dataset_conversion" in argument for argument in arguments)
