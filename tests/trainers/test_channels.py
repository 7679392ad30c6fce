"""Training with random subsets of channels, and what nnU-Net's commands and ours make of cases that lack some."""

import importlib
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

import nnunet_ssl
from nnunet_ssl.architectures.channels import WAYS, plain, takes_any_channels
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.cli import evaluate
from nnunet_ssl.interface import cli
from nnunet_ssl.interface.placeholders import Channels, completed, find_cases
from nnunet_ssl.interface.segmentation import MISSING, predict
from nnunet_ssl.trainers.arms import nnUNetTrainerMCLMIM
from nnunet_ssl.trainers.channels import ChannelSubsets, check_channels, draw_subsets, present_channels
from nnunet_ssl.trainers.finetuning import nnUNetTrainerSSL
from nnunet_ssl.trainers.freezing import encoder_of, unwrapped
from nnunet_ssl.trainers.settings import Settings
from nnunet_ssl.weights.encoders import read_checkpoint

STEPS = "steps=4,epoch_steps=2,freeze_share=0.5,lr=0.01"
NAMES = ["MR0", "MR1", "MR2"]


@pytest.fixture
def start(incomplete, results, swin_checkpoint, monkeypatch):
    """A function that makes a trainer with settings, in results of its own."""

    def make(settings, cls=nnUNetTrainerMCLMIM, checkpoint=swin_checkpoint, plans="nnUNetPlans"):
        incomplete.enter(
            monkeypatch,
            nnUNet_results=results,
            nnssl_checkpoint=checkpoint,
            nnssl_settings=f"{STEPS},{settings}",
            nnUNet_n_proc_DA=0,
        )
        return incomplete.trainer(cls, plans=plans)

    return make


class Cases(dict):
    """Preprocessed cases by name, as nnU-Net's data sets give them."""

    @property
    def identifiers(self):
        return list(self)

    def load_case(self, name):
        return self[name], None, None, {}


@given(
    present=st.lists(st.lists(st.booleans(), min_size=3, max_size=3).filter(any), min_size=1, max_size=8),
    drop=st.lists(st.sampled_from([0.0, 0.3, 0.9]), min_size=3, max_size=3),
)
def test_what_a_sample_keeps_is_some_of_what_its_case_has_and_never_nothing(present, drop):
    present, drop = torch.tensor(present), torch.tensor(drop)
    kept = draw_subsets(present, drop)
    assert (kept & ~present).sum() == 0 and kept.any(1).all()
    assert torch.equal(kept[:, drop == 0], present[:, drop == 0]), "what is never left out is always kept"


def test_with_a_half_all_subsets_are_equally_likely_and_a_probability_is_each_channels_own():
    torch.manual_seed(0)
    kept = draw_subsets(torch.ones(7000, 3, dtype=torch.bool), torch.full((3,), 0.5))
    counts = (kept * torch.tensor([1, 2, 4])).sum(1).bincount(minlength=8)
    assert counts[0] == 0 and (counts[1:] - 1000).abs().max() < 150
    often = draw_subsets(torch.ones(7000, 3, dtype=torch.bool), torch.tensor([0.0, 0.1, 0.8])).float().mean(0)
    torch.testing.assert_close(often, torch.tensor([1.0, 0.9, 0.2]), atol=0.03, rtol=0)


def test_a_channel_is_present_if_it_varies_anywhere():
    case = np.zeros((4, 8, 6, 6), dtype=np.float32)
    case[0, 4, 3, 3] = 1
    case[1, 1, 2, 2] = 1  # outside the plane that is read first
    case[2] = -3.5
    assert present_channels(case) == [True, True, False, False]


def test_noise_of_the_augmentation_on_a_placeholder_is_taken_away():
    absent = np.zeros((2, 8, 8, 8), dtype=np.float32)
    absent[1] = np.random.default_rng(0).normal(size=(8, 8, 8))
    subsets = ChannelSubsets(Cases(case_a=absent, case_b=np.concatenate([absent[1:]] * 2)), ["DWI", "ADC"], (0.0,))
    assert str(subsets) == "2 training cases: 1 lack DWI"
    kept = subsets.keep_some(torch.randn(2, 2, 8, 8, 8), ["case_a", "case_b"])
    assert [bool(one.any()) for one in kept.flatten(0, 1)] == [False, True, True, True]
    with pytest.raises(UserError, match="All channels of case_c are constant"):
        ChannelSubsets(Cases(case_c=absent[:1]), ["DWI"], (0.5,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("channels=any,channel_drop=0.5x0.2", "channel_drop has 2 probabilities, and the data set 3 channels"),
        ("channel_drop=0.2", "add channels=any"),
        ("channels=any,channel_drop=1", "at least 0 and below 1"),
        ("channels=some", "it can be all, any"),
    ],
)
def test_settings_that_do_not_suit_the_channels_are_refused(start, settings, message):
    with pytest.raises(SystemExit, match=message):
        start(settings)


def test_a_normalisation_that_does_not_keep_zeros_is_refused():
    check_channels(Settings(channels="any"), NAMES, ["ZScoreNormalization", "NoNormalization", "ZScoreNormalization"])
    with pytest.raises(UserError, match="CTNormalization"):
        check_channels(Settings(channels="any"), NAMES, ["CTNormalization", "ZScoreNormalization", "NoNormalization"])


@pytest.mark.parametrize("scheme", ["ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_placeholder_stays_zeros_in_every_other_normalisation(scheme, masked):
    module = importlib.import_module("nnunetv2.preprocessing.normalization.default_normalization_schemes")
    normalization = getattr(module, scheme)(use_mask_for_norm=masked, intensityproperties={})
    brain = np.where(np.arange(6) > 2, 0, -1) * np.ones((4, 5, 6), int)
    normalised = normalization.run(np.zeros((4, 5, 6), np.float32), brain)
    assert not normalised.any()


def test_a_data_set_of_one_channel_has_nothing_to_lack(workplace, results, swin_checkpoint, monkeypatch):
    workplace.enter(monkeypatch, nnssl_checkpoint=swin_checkpoint, nnssl_settings="channels=any")
    with pytest.raises(SystemExit, match="this data set has one, MR0"):
        workplace.trainer(nnUNetTrainerMCLMIM)


def test_probabilities_are_written_like_sizes_and_are_in_the_name_of_the_plans():
    settings = Settings().updated("channels=any,channel_drop=0.1x0.5x0")
    assert settings.channel_drop == (0.1, 0.5, 0.0)
    assert settings.suffix() == "_channels-any_channeldrop0.1x0.5x0.0"
    assert Settings().updated("channels=pooled,channel_drop=0.25").channel_drop == (0.25,)


@pytest.mark.parametrize("backbone", ["swin", "resenc"])
@pytest.mark.parametrize("way", [*WAYS, "any"])
def test_a_pretrained_encoder_rests_and_learns_whatever_the_way(start, request, backbone, way):
    checkpoint = request.getfixturevalue(f"{backbone}_checkpoint")
    plans = "nnUNetResEncUNetLPlans" if backbone == "resenc" else "nnUNetPlans"
    trainer = start(f"channels={way}", nnUNetTrainerSSL, checkpoint, plans)
    trainer.initialize()
    entry = trainer.plans_manager.plans["configurations"]["3d_fullres"]["architecture"]
    assert takes_any_channels(entry) and not takes_any_channels(plain(entry))
    assert trainer.enable_deep_supervision == (backbone == "resenc")
    encoder, before = encoder_of(trainer.network), read_checkpoint(checkpoint).tensors
    if way in ("pooled", "modulated", "any"):
        own = encoder.state_dict()
        same = [name for name, value in before.items() if name in own and torch.equal(own[name], value)]
        assert len(same) > 0.5 * len(before), "loaded as they were, for one channel"
    added = ("gates",) if way == "pooled" else ("gates", "scales", "shifts")
    named = [(name.split("."), value) for name, value in unwrapped(trainer.network).named_parameters()]
    gates = [value for names, value in named if set(names) & set(added)]
    assert {word for names, _ in named for word in names} >= set(added) or way in ("zeros", "scaled")
    assert bool(gates) == (way in ("pooled", "modulated", "any"))
    parts = {id(p): group["part"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert all(parts[id(gate)] == "decoder" for gate in gates)
    assert all(parts[id(p)] == "encoder" for p in encoder.parameters())


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        ("swin", "channels=any"),
        ("swin", "channels=scaled,augmentation=gpu"),
        ("swin", "channels=any,decoder=unet"),
        ("resenc", "channels=any"),
    ],
)
def test_a_training_step_sees_some_channels_and_a_validation_step_all(start, request, backbone, settings):
    plans = "nnUNetResEncUNetLPlans" if backbone == "resenc" else "nnUNetPlans"
    checkpoint = request.getfixturevalue(f"{backbone}_checkpoint")
    trainer = start(f"channel_drop=0.6,{settings}", nnUNetTrainerSSL, checkpoint, plans)
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    seen = []
    trainer.network.register_forward_pre_hook(
        lambda network, inputs: seen.append(inputs[0].clone()),
        prepend=True,  # before the network hides anything
    )
    trainer.current_epoch = 1
    trainer.on_train_epoch_start()
    present = trainer.subsets.present
    assert not all(map(all, present.values())), "some of the cases lack channels themselves"
    for _ in range(3):
        batch = next(trainer.dataloader_train)
        trainer.train_step(batch)
        for case, sample in zip(batch["keys"], seen[-1], strict=True):
            there = [bool(channel.any()) for channel in sample]
            assert any(there) and not any(now and not has for now, has in zip(there, present[case], strict=True))
    assert any(not channel.any() for batch in seen for sample in batch for channel in sample)
    batch = next(trainer.dataloader_val)
    trainer.network.eval()
    trainer.validation_step(batch)
    assert torch.equal(seen[-1], batch["data"]), "a case is validated with all that it has"


def test_a_training_goes_on_with_the_network_of_its_plans(start, incomplete, monkeypatch):
    trainer = start("channels=scaled,channel_drop=0.1x0.2x0.3")
    trainer.initialize()
    incomplete.save_model(trainer)
    monkeypatch.delenv("nnssl_settings")
    monkeypatch.delenv("nnssl_checkpoint")
    continued = incomplete.trainer(nnUNetTrainerMCLMIM, plans=trainer.plans_manager.plans_name)
    continued.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    assert continued.settings.channel_drop == (0.1, 0.2, 0.3)
    x = torch.randn(1, 3, *trainer.configuration_manager.patch_size)
    x[:, 1:] = 5
    with torch.no_grad():
        outputs = [one.network.eval()(x) for one in (trainer, continued)]
        x[:, 1:] = 0
        outputs.append(continued.network(x))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])


@pytest.fixture(scope="module")
def model(incomplete, swin_checkpoint, tmp_path_factory):
    """The folder of a model that was hardly trained, for any subset of channels, and one that wants all."""
    results = tmp_path_factory.mktemp("models")
    folders = []
    with pytest.MonkeyPatch.context() as patch:
        for settings in ("channels=any", "channels=all"):
            incomplete.enter(
                patch, nnUNet_results=results, nnssl_checkpoint=swin_checkpoint, nnssl_settings=f"{STEPS},{settings}"
            )
            trainer = incomplete.trainer(nnUNetTrainerMCLMIM)
            trainer.initialize()
            incomplete.save_model(trainer, "checkpoint_final.pth")
            folders.append(Path(trainer.output_folder_base))
    return folders


@pytest.fixture
def partial_images(incomplete, tmp_path):
    """Three cases: one whole, one with the last channel alone, one without the last."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, places in {"whole": (0, 1, 2), "last": (2,), "first": (0, 1)}.items():
        for place in places:
            shutil.copy(incomplete.test_images / f"case_5_000{place}.nii.gz", folder / f"{name}_000{place}.nii.gz")
    return folder


CHANNELS = Channels.of({"channel_names": dict(enumerate(NAMES)), "file_ending": ".nii.gz"})
QUICK = {
    "folds": None, "checkpoint": "checkpoint_final.pth", "device": torch.device("cpu"), "processes": (0, 0),
    "save_probabilities": True, "overwrite": True,
}  # fmt: skip


def test_cases_are_predicted_from_what_is_there_as_stock_prediction_does_with_placeholders(
    model, partial_images, tmp_path, monkeypatch, results
):
    """And mirrored, in patches of a sliding window."""
    monkeypatch.setenv("nnUNet_results", str(results))
    lacked = predict(model[0], partial_images, tmp_path / "ours", **QUICK)
    assert lacked == {"first": ["MR2"], "last": ["MR0", "MR1"], "whole": []}
    assert json.loads((tmp_path / "ours" / "missing_channels.json").read_text()) == lacked
    assert len(list(partial_images.iterdir())) == 6, "nothing is written beside the images"
    for case in find_cases(partial_images, CHANNELS):
        completed(case, partial_images, CHANNELS)
    assert len(list(partial_images.iterdir())) == 9
    assert [case.missing(CHANNELS) for case in find_cases(partial_images, CHANNELS)] == [["MR2"], ["MR0", "MR1"], []]
    stock = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model[0]), None, "checkpoint_final.pth")
    (tmp_path / "stock").mkdir()
    stock.predict_from_files_sequential(str(partial_images), str(tmp_path / "stock"), save_probabilities=True)
    images = {}
    for name in lacked:
        ours, theirs = (np.load(tmp_path / who / f"{name}.npz")["probabilities"] for who in ("ours", "stock"))
        np.testing.assert_array_equal(ours, theirs)
        masks = [nibabel.load(tmp_path / who / f"{name}.nii.gz") for who in ("ours", "stock")]
        np.testing.assert_array_equal(masks[0].dataobj, masks[1].dataobj)
        np.testing.assert_array_equal(masks[0].affine, nibabel.load(partial_images / f"{name}_0000.nii.gz").affine)
        images[name] = ours
    assert not np.allclose(images["whole"], images["last"]), "channels tell something"
    files = {path.name for path in (tmp_path / "stock").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == files | {"missing_channels.json"}


def test_segmenting_in_python_takes_none_for_a_channel_that_is_missing(model, partial_images, tmp_path, incomplete):
    last = [None, None, partial_images / "last_0002.nii.gz"]
    (segmented,) = nnunet_ssl.segment(model[0], [last], device="cpu")
    predict(model[0], partial_images, tmp_path / "ours", **QUICK)
    np.testing.assert_array_equal(segmented.dataobj, nibabel.load(tmp_path / "ours" / "last.nii.gz").dataobj)
    with pytest.raises(UserError, match="case_0 has none of the channels MR0, MR1, MR2: it has no file"):
        nnunet_ssl.segment(model[0], [[None, None, None]], device="cpu")


def test_a_model_that_wants_all_channels_gets_all_or_nothing(model, partial_images, tmp_path):
    with pytest.raises(UserError, match=r"2 of 3 cases lack channels \(such as first: MR2\), and the model"):
        predict(model[1], partial_images, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
    for path in partial_images.glob("[!w]*"):
        path.unlink()
    assert predict(model[1], partial_images, tmp_path / "out", **QUICK) == {"whole": []}


def test_a_case_without_any_channel_is_named(partial_images):
    for place in range(3):
        image = nibabel.load(partial_images / "whole_0000.nii.gz")
        empty = nibabel.Nifti1Image(np.full(image.shape, 7, np.uint8), image.affine)
        nibabel.save(empty, partial_images / f"empty_000{place}.nii.gz")
    with pytest.raises(UserError, match=r"The case empty has none of the channels.*empty_0002.nii.gz are constant"):
        find_cases(partial_images, CHANNELS)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_image_with_numbers_that_are_not_finite_is_named_and_not_called_missing(partial_images, bad):
    path = partial_images / "whole_0001.nii.gz"
    image = nibabel.load(path)
    values = image.get_fdata(dtype=np.float32)
    values[0, 0, :3] = bad
    nibabel.save(nibabel.Nifti1Image(values, image.affine), path)
    by_nibabel = Channels.of({**CHANNELS.dataset, "overwrite_image_reader_writer": "NibabelIO"})  # ITK reads 0 there
    with pytest.raises(UserError, match=r"^3 voxels of .*whole_0001.nii.gz are NaN or infinite"):
        find_cases(partial_images, by_nibabel)


def test_a_file_that_cannot_be_read_is_named(partial_images):
    file = next(partial_images.glob("*.nii.gz"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        find_cases(partial_images, CHANNELS)


def test_a_placeholder_that_could_not_be_written_leaves_nothing_behind(partial_images, monkeypatch):
    before = sorted(partial_images.iterdir())
    case = next(case for case in find_cases(partial_images, CHANNELS) if None in case.files)

    def half(self, seg, output_fname, properties):
        Path(output_fname).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(type(CHANNELS.reader(before[0])), "write_seg", half)
    with pytest.raises(OSError, match="no space left"):
        completed(case, partial_images, CHANNELS)
    assert sorted(partial_images.iterdir()) == before


def test_the_commands_write_placeholders_and_end_a_mistake_with_one_line(model, partial_images, tmp_path, monkeypatch):
    def run(command, *arguments):
        monkeypatch.setattr("sys.argv", ["nnssl", *map(str, arguments)])
        command()

    run(cli.placeholders, "-i", partial_images, "-m", model[0])
    assert len(list(partial_images.iterdir())) == 9
    for path in partial_images.glob("last_0002*"):
        shutil.copy(partial_images / "last_0000.nii.gz", path)
    light = ("-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta", "--disable_progress_bar")
    with pytest.raises(SystemExit, match=r"^error: The case last has none of the channels"):
        run(cli.predict, "-i", partial_images, "-o", tmp_path / "out", "-m", model[0], *light)
    for path in partial_images.glob("last_*"):
        path.unlink()
    monkeypatch.setenv("nnUNet_results", str(model[0].parents[1]))
    trainer, plans, configuration = model[0].name.split("__")
    which = ("-d", 703, "-tr", trainer, "-p", plans, "-c", configuration)
    run(cli.predict, "-i", partial_images, "-o", tmp_path / "out", *which, *light)
    assert json.loads((tmp_path / "out" / MISSING).read_text()) == {"first": ["MR2"], "whole": []}
    for command in (cli.predict, cli.placeholders):
        with pytest.raises(SystemExit, match=r"^error: .*-m"):
            run(command, "-i", partial_images, *(["-o", tmp_path] if command is cli.predict else []))


def test_a_channel_that_the_data_set_has_not_is_named(partial_images):
    (partial_images / "whole_0003.nii.gz").touch()
    with pytest.raises(UserError, match=r"whole_0003\.nii\.gz is channel 3, and the data set's are 0 to 2"):
        find_cases(partial_images, CHANNELS)
    with pytest.raises(UserError, match="holds no images"):
        find_cases(partial_images.parent, CHANNELS)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("reader", [None, "NibabelIOWithReorient", "SimpleITKIO"])
def test_a_placeholder_lies_where_the_image_lies(tmp_path, axes, reader):
    affine = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(axes), (6, 7, 8)) @ np.diag(
        [1.5, 2, 2.5, 1]
    )
    affine[:3, 3] = (-20, 31, 7)
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((6, 7, 8)), affine)
    nibabel.save(image, tmp_path / "case_0001.nii.gz")
    dataset = dict(CHANNELS.dataset) | ({"overwrite_image_reader_writer": reader} if reader else {})
    (case,) = find_cases(tmp_path, Channels.of(dataset))
    first, *_ = completed(case, tmp_path, Channels.of(dataset))
    placeholder = nibabel.load(first)
    np.testing.assert_allclose(placeholder.affine, affine, atol=1e-5)
    assert placeholder.shape == image.shape and not np.any(placeholder.dataobj)


def test_every_subset_is_measured_beside_its_specialist(
    incomplete, model, workplace, swin_checkpoint, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        settings = {"nnssl_checkpoint": swin_checkpoint, "nnssl_settings": STEPS}
        workplace.enter(patch, nnUNet_results=tmp_path / "results", **settings)
        trainer = workplace.trainer(nnUNetTrainerMCLMIM)  # of MR0
        trainer.initialize()
        workplace.save_model(trainer, "checkpoint_final.pth")
    raw = incomplete.root / "nnUNet_raw" / incomplete.name
    for case in (0, 2):  # the first lacks MR0
        for path in (*raw.glob(f"imagesTr/case_{case}_*"), raw / "labelsTr" / f"case_{case}.nii.gz"):
            target = tmp_path / path.parent.name / path.name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    which = ("-i", tmp_path / "imagesTr", "-ref", tmp_path / "labelsTr", "-o", tmp_path / "out")
    models = ("-m", f"any={model[0]}", f"any={model[0]}", "--specialists", trainer.output_folder_base)
    arguments = ["nnssl_evaluate", "missing", *which, *models, "-device", "cpu", "--disable_tta"]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    evaluate()
    result = json.loads((tmp_path / "out" / "missing.json").read_text())
    assert result["arms"] == ["any", "specialist"]
    assert result["subsets"] == ["MR0", "MR1", "MR2", "MR0+MR1", "MR0+MR2", "MR1+MR2", "MR0+MR1+MR2"]
    numbers = {subset: cell["dice"]["n"] for subset, cell in result["results"]["any"].items()}
    assert numbers == {subset: 1 if "MR0" in subset else 2 for subset in result["subsets"]}
    alone, rival = (result["results"][arm]["MR0"]["dice"] for arm in ("any", "specialist"))
    assert alone["mean"] == rival["mean"] and alone["loss"] == 0, "one channel pools to what it is alone"
    assert "loss" not in result["results"]["any"]["MR1"]["dice"]
    assert (tmp_path / "out" / "missing.png").stat().st_size > 0
    predictions = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/predictions/*/*/*.nii.gz")}
    assert len(predictions) == 11
    evaluate()
    assert all(path.stat().st_mtime_ns == time for path, time in predictions.items()), "those that are there are kept"


@pytest.mark.slow
def test_stock_commands_train_validate_export_install_and_ensemble_a_model_for_any_channels(
    incomplete, swin_checkpoint, results, partial_images, tmp_path
):
    plans = "nnUNetPlans_steps2_epoch1_channels-any"
    shown = incomplete.run(
        "nnUNetv2_train", incomplete.number, "3d_fullres", 0, "-tr", "nnUNetTrainerMCLMIM", "-device", "cpu",
        nnssl_settings="steps=2,epoch_steps=1,channels=any", nnssl_checkpoint=swin_checkpoint, nnUNet_results=results,
    )  # fmt: skip
    assert "lack MR" in shown and "Validation complete" in shown
    which = ("-c", "3d_fullres", "-tr", "nnUNetTrainerMCLMIM", "-p", plans, "-d", incomplete.number, "-f", 0)
    incomplete.run("nnUNetv2_export_model_to_zip", "-o", tmp_path / "model.zip", *which, nnUNet_results=results)
    elsewhere = {"nnUNet_results": tmp_path / "elsewhere", "nnUNet_raw": None, "nnUNet_preprocessed": None}
    elsewhere["nnUNet_results"].mkdir()
    incomplete.run("nnUNetv2_install_pretrained_model_from_zip", tmp_path / "model.zip", **elsewhere)
    light = ("-device", "cpu", "-npp", 1, "-nps", 1, "--disable_tta", "--save_probabilities")
    shown = incomplete.run("nnssl_predict", "-i", partial_images, "-o", tmp_path / "ours", *which, *light, **elsewhere)
    assert "last: without MR0, MR1" in shown and "whole: all channels" in shown
    for case in find_cases(partial_images, CHANNELS):
        completed(case, partial_images, CHANNELS)
    incomplete.run("nnUNetv2_predict", "-i", partial_images, "-o", tmp_path / "stock", *which, *light, **elsewhere)
    for name in ("whole", "last", "first"):
        ours, stock = (np.load(tmp_path / who / f"{name}.npz")["probabilities"] for who in ("ours", "stock"))
        np.testing.assert_array_equal(ours, stock)
    incomplete.run("nnUNetv2_ensemble", "-i", tmp_path / "ours", tmp_path / "stock", "-o", tmp_path / "both", "-np", 1)
    both, ours = (nibabel.load(tmp_path / who / "last.nii.gz") for who in ("both", "ours"))
    np.testing.assert_array_equal(both.dataobj, ours.dataobj)
