"""A packaged model gives what nnU-Net gives, on the grid of the image that came."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.ensembling.ensemble import average_probabilities
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from scans import scan
from tiny_models import write_model

from nnunet_ssl.conversion import atlas_v2, atlas_v3, bids, fcd_bonn, isles2022
from nnunet_ssl.conversion.dataset import Case
from nnunet_ssl.deployment.packaging import package
from nnunet_ssl.deployment.segmenting import Segmenter
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.operating_point import FILE, OperatingPoint
from nnunet_ssl.evaluation.probabilities import TURNED_TO_RAS, read_map
from nnunet_ssl.imaging.geometry import Volume, read_volume, write_volume

ROUNDING = 1e-3


def turned(volume: Volume, orientation: str) -> Volume:
    """The same image, stored in another orientation."""
    ornt = nib.orientations.ornt_transform(
        nib.io_orientation(volume.affine), nib.orientations.axcodes2ornt(orientation)
    )
    image = nib.Nifti1Image(volume.array, volume.affine).as_reoriented(ornt)
    return Volume(np.asarray(image.dataobj), image.affine)


def as_nnunet_would(model, images, folder, mirroring=True):
    """Predict by nnU-Net's reader, predictor and writer; return the mask, and the map on the mask's grid."""
    paths = [str(folder / f"case_{number:04d}.nii.gz") for number in range(len(images))]
    for path, image in zip(paths, images):
        write_volume(path, image)
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=mirroring, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    reader = predictor.plans_manager.image_reader_writer_class()
    data, properties = reader.read_images(paths)
    predictor.predict_single_npy_array(data, properties, None, str(folder / "case"), True)
    (folder / "plans.json").write_text((model / "plans.json").read_text())
    mask = read_volume(folder / "case.nii.gz")
    return mask, read_map(folder / "case.npz", mask, None)


@pytest.mark.parametrize("asked_for", [None, "None", "SimpleITKIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("reader", TURNED_TO_RAS)
def test_mask_and_map_are_nnunets_whatever_reader_the_data_set_asked_for(tmp_path, reader, asked_for):
    entries = {"overwrite_image_reader_writer": asked_for}
    model = write_model(tmp_path / "model", reader=reader, contrast=4.0, dataset_entries=entries)
    image = turned(scan(), "PSL")
    mask, shown = as_nnunet_would(model, [image], tmp_path)
    package([model], tmp_path / "package")
    result = Segmenter(tmp_path / "package" / "model", torch.device("cpu")).segment([image])
    assert 0.02 < mask.array.mean() < 0.98
    np.testing.assert_allclose(result.probabilities.array, shown, atol=ROUNDING)  # nnU-Net sums in half precision
    sure = np.abs(shown - 0.5) > ROUNDING
    assert np.array_equal(result.labels.array[sure], mask.array[sure])
    np.testing.assert_allclose(result.labels.affine, image.affine)


def odd(channel: str) -> Volume:
    """An image with what its data set's conversion mends: a background that is not 0, another unit, negative voxels."""
    image = scan(seed=len(channel))
    places = np.indices(image.array.shape).T - (np.array(image.array.shape) - 1) / 2
    distance = np.linalg.norm(places, axis=-1).T
    brain = distance < min(image.array.shape) / 2 - 1
    shown = np.where(brain, 800 + 100 * image.array / image.array.std(), 0)
    values = {"T1": shown - 4, "ADC": shown / 1e6, "DWI": np.where(brain, shown, -500)}
    return image.with_array(values.get(channel, shown).astype(np.float32))


@pytest.mark.parametrize(
    ("conversion", "module", "channels", "changes"),
    [
        ("ATLASv2", atlas_v2, ("T1",), False),
        ("ATLASv3", atlas_v3, ("T1",), True),
        ("ISLES2022", isles2022, ("DWI", "ADC"), True),
        ("ISLES2022", isles2022, ("ADC",), False),  # a network does not see the unit, for nnU-Net z-scores
        ("FCDBonn", fcd_bonn, ("FLAIR", "T1"), False),
        ("BIDS", bids, ("FLAIR", "T1"), False),
    ],
)
def test_images_are_prepared_as_the_conversion_of_the_training_data_prepared_those(
    tmp_path, conversion, module, channels, changes
):
    model = write_model(tmp_path / "model", channels=channels, dataset_entries={"prepared_as": conversion})
    package([model], tmp_path / "package")
    images = {channel.lower(): odd(channel) for channel in channels}
    for name, image in images.items():
        write_volume(tmp_path / f"{name}.nii.gz", image)
    paths = {name: tmp_path / f"{name}.nii.gz" for name in images}
    case = getattr(module, "StrokeCase", Case)(id="a", subject="a", images=paths, masks=())
    converted = module.prepare(case).channels
    segmenter = Segmenter(tmp_path / "package" / "model", torch.device("cpu"))
    plain = Segmenter(tmp_path / "package" / "model", torch.device("cpu"))
    plain.prepared_as = None
    result = segmenter.segment(segmenter.choose(images))
    expected = plain.segment([converted[name] for name in images])
    np.testing.assert_allclose(result.probabilities.array, expected.probabilities.array, atol=ROUNDING)
    raw = plain.segment(list(images.values()))
    assert (np.abs(raw.probabilities.array - result.probabilities.array).max() > 0.01) == changes


def test_a_model_of_a_users_own_conversion_says_what_it_wants_and_segments(tmp_path, caplog):
    package([write_model(tmp_path / "model", dataset_entries={"prepared_as": "Flat"})], tmp_path / "package")
    assert "a conversion of yours prepared (Flat)" in caplog.text
    package([write_model(tmp_path / "plain")], tmp_path / "another")
    results = [
        Segmenter(tmp_path / name / "model", torch.device("cpu")).segment([scan()]) for name in ("package", "another")
    ]
    assert np.array_equal(results[0].labels.array, results[1].labels.array)


def test_models_that_want_their_images_prepared_otherwise_are_not_averaged(tmp_path):
    models = [
        write_model(tmp_path / str(name), dataset_entries={"prepared_as": name})
        for name in ("ATLASv3", "ATLASv2", None)
    ]
    for other in models[1:]:
        with pytest.raises(UserError, match="differ in prepared_as: ATLASv3 and"):
            package([models[0], other], tmp_path / "package")


def test_a_model_of_stripped_images_says_what_it_wants(tmp_path, caplog):
    package([write_model(tmp_path / "model", dataset_entries={"skull_strip": "hd-bet"})], tmp_path / "package")
    assert "give it stripped ones" in caplog.text


def test_a_data_set_may_have_nnunets_former_key_for_its_channels(tmp_path):
    entries = {"channel_names": None, "modality": {"0": "T1"}}
    package([write_model(tmp_path / "model", dataset_entries=entries)], tmp_path / "package")
    segmenter = Segmenter(tmp_path / "package" / "model", torch.device("cpu"))
    assert segmenter.channels == ["T1"]
    assert segmenter.segment([scan()]).labels.array.shape == scan().array.shape


def test_models_are_averaged_as_nnunet_averages_ensembles(tmp_path):
    models = [write_model(tmp_path / name, contrast=4.0, seed=seed) for name, seed in (("a", 0), ("b", 5))]
    for model in models:
        (tmp_path / f"predicted_{model.name}").mkdir()
        as_nnunet_would(model, [scan()], tmp_path / f"predicted_{model.name}")
    expected = average_probabilities([str(tmp_path / f"predicted_{name}" / "case.npz") for name in "ab"])
    package(models, tmp_path / "package")
    result = Segmenter(tmp_path / "package" / "model", torch.device("cpu")).segment([scan()])
    np.testing.assert_allclose(result.probabilities.array, expected[1].transpose(2, 1, 0), atol=1e-6)
    assert np.array_equal(result.labels.array, expected.argmax(0).transpose(2, 1, 0))


def test_channels_come_by_name_and_onto_the_firsts_grid(tmp_path, segmenter):
    model = segmenter(channels=("DWI", "FLAIR", "SWI"))
    dwi, flair, swi = scan(), scan(seed=1), scan(seed=2)
    images = model.choose({"flair": flair, "t2s": swi, "dwi": dwi, "t1": None})
    assert images == [dwi, flair, swi]
    result = model.segment(images)
    assert np.array_equal(model.segment([dwi, turned(flair, "PIL"), swi]).labels.array, result.labels.array)
    assert model.segment([scan((9, 9, 5)), flair, swi]).labels.array.shape == (9, 9, 5)
    with pytest.raises(UserError, match="FLAIR is missing"):
        model.choose({"dwi": dwi, "swi": swi})
    with pytest.raises(UserError, match="needs 3 images"):
        model.segment([dwi])


def test_a_single_image_needs_no_name(segmenter):
    model = segmenter()
    assert model.choose({"input": "here"}) == ["here"]


def test_an_image_of_zeros_has_no_lesion(segmenter):
    result = segmenter(lesion_bias=20.0).segment([scan().with_array(np.zeros((6, 7, 8), np.float32))])
    assert not result.labels.array.any() and not result.probabilities.array.any()
    assert result.highest == 0


def test_a_few_voxels_that_are_no_numbers_do_not_spoil_a_case(segmenter):
    image, broken = scan(), scan()
    image.array[0, 0, 0], broken.array[0, 0, 0] = 0, np.nan
    model = segmenter()
    assert np.array_equal(model.segment([image]).labels.array, model.segment([broken]).labels.array)


def point_file(folder, **point):
    (folder / FILE).write_text(json.dumps({"point": point}))
    return folder


def test_an_operating_point_decides(tmp_path, segmenter):
    plain = segmenter().segment([scan()])
    chosen = OperatingPoint(threshold=0.3, minimum_mm3=200.0, connectivity=6)
    result = segmenter(learned=point_file(tmp_path, **vars(chosen))).segment([scan()])
    assert np.array_equal(result.labels.array, chosen.segment(plain.probabilities.array, 9.0))
    assert not np.array_equal(result.labels.array, plain.labels.array)
    assert np.array_equal(result.probabilities.array, plain.probabilities.array)


def test_without_mirroring_where_it_was_chosen_so(tmp_path, segmenter):
    model = write_model(tmp_path / "model", contrast=4.0)
    _, shown = as_nnunet_would(model, [scan()], tmp_path, mirroring=False)
    result = segmenter(learned=point_file(tmp_path, mirroring=False)).segment([scan()])
    np.testing.assert_allclose(result.probabilities.array, shown, atol=ROUNDING)
    assert np.abs(segmenter().segment([scan()]).probabilities.array - shown).max() > 0.01


@pytest.mark.parametrize("constant", [True, False])
def test_an_empty_mask_has_a_constant_map_where_that_is_wanted(tmp_path, segmenter, constant):
    point = point_file(tmp_path, threshold=0.8, constant_map_when_empty=constant)
    result = segmenter(learned=point, lesion_bias=-30.0).segment([scan()])
    assert not result.labels.array.any()
    assert (np.ptp(result.probabilities.array) == 0) == constant
    assert result.highest > 0


def test_a_calibrated_package_tells_within_what_a_volume_lies(tmp_path, segmenter):
    volume = {"reach": np.log(2.0), "coverage_promised": 0.9}
    (tmp_path / "calibration.json").write_text(json.dumps({"temperature": 2.0, "volume": volume}))
    model = segmenter(learned=tmp_path)
    result = model.segment([scan()])
    low, high = result.volume_interval_ml
    assert (high + 0.1) / (result.volume_ml + 0.1) == pytest.approx(2) and low < result.volume_ml
    assert "90%" in result.describe_volume()
    odds = np.array([0.1, 0.5, 0.9], np.float32)
    np.testing.assert_allclose(model.calibrated(odds), [0.25, 0.5, 0.75], rtol=1e-6)


def test_features_are_a_vector_of_one_size_for_images_of_all_sizes_and_orientations(segmenter):
    model = segmenter()
    first = model.embed([scan()])
    assert first.shape == (8,) and first.dtype == np.float32 and np.ptp(first) > 0
    assert np.array_equal(model.embed([turned(scan(), "PSL")]), first)
    assert model.embed([scan((40, 5, 30))]).shape == (8,)
