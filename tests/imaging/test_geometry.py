import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nnunet_ssl.errors import UserError
from nnunet_ssl.imaging.geometry import (
    Volume,
    align_mask,
    alike_but_unplaced,
    lesions_lost,
    onto_grid,
    read_mask,
    read_volume,
    resample_onto,
    same_grid,
    voxels_outside,
    write_volume,
)

AFFINE = np.array([[-2.0, 0.1, 0, 40], [0.1, 2.2, 0.2, -50], [0, -0.2, 3.0, -30], [0, 0, 0, 1]])


def save(path, array, affine=AFFINE, slope=None, codes=(1, 1)):
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine if codes[0] else None, codes[0])
    image.set_qform(affine if codes[1] else None, codes[1])
    if slope:
        image.header.set_slope_inter(slope, 0)
    nib.save(image, path)
    return path


def blob(shape=(12, 14, 10)):
    mask = np.zeros(shape, bool)
    mask[3:7, 4:9, 2:6] = True
    mask[8, 10, 7] = True  # a lesion of one voxel
    return mask


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("value", [1, 100])
def test_masks_of_every_type_and_value_read_the_same(tmp_path, dtype, value):
    path = save(tmp_path / "mask.nii.gz", (blob() * value).astype(dtype))
    np.testing.assert_array_equal(read_mask(path).array, blob())


@pytest.mark.parametrize("value", [1e-60, 0.003, 255.0])
def test_masks_of_any_positive_value_read_the_same(tmp_path, value):
    np.testing.assert_array_equal(read_mask(save(tmp_path / "mask.nii", blob() * value)).array, blob())


def test_a_masks_scale_factor_and_nan_and_negative_values_dont_matter(tmp_path):
    array = np.where(blob(), 3, 0).astype(np.int16)
    assert np.array_equal(read_mask(save(tmp_path / "scaled.nii.gz", array, slope=0.001)).array, blob())
    odd = np.where(blob(), 1.0, 0.0)
    odd[0], odd[-1] = np.nan, -1
    assert np.array_equal(read_mask(save(tmp_path / "odd.nii.gz", odd)).array, blob())


def test_a_trailing_dimension_of_one_is_dropped(tmp_path):
    path = save(tmp_path / "image.nii.gz", np.ones((4, 5, 6, 1), np.float32))
    assert read_volume(path).array.shape == (4, 5, 6)


def _truncated(path):
    save(path, np.random.default_rng(0).random((20, 20, 20)))
    path.write_bytes(path.read_bytes()[:9000])


def _not_nifti(path):
    path.write_bytes(gzip.compress(b"no image" * 100))


def _four_volumes(path):
    save(path, np.ones((4, 5, 6, 4), np.float32))


def _slice(path):
    save(path, np.ones((4, 5, 1), np.float32))


def _colours(path):
    save(path, np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")]))


def _complex(path):
    save(path, np.zeros((4, 5, 6), np.complex64))


@pytest.mark.parametrize("write", [_truncated, _not_nifti, _four_volumes, _slice, _colours, _complex])
def test_a_file_that_is_no_volume_is_refused_by_name_in_one_line(tmp_path, write):
    path = tmp_path / "image.nii.gz"
    write(path)
    with pytest.raises(UserError, match=r"image\.nii\.gz") as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)


def without_sform(path):
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[280:328] = bytes(48)  # srow_x, srow_y, srow_z; its code stays
    path.write_bytes(gzip.compress(bytes(data)))
    return path


def test_a_header_with_a_singular_affine_is_refused(tmp_path):
    path = save(tmp_path / "flat.nii.gz", np.ones((4, 5, 6), np.float32), np.eye(4), codes=(1, 0))
    with pytest.raises(UserError, match="not finite or not invertible"):
        read_volume(without_sform(path))


def test_an_sform_of_zeros_beside_a_good_qform_is_passed_over_with_a_note(tmp_path):
    affine = nib.affines.from_matvec(np.diag([-2.0, 2.0, 3.0]), [40, -50, -30])
    volume = read_volume(without_sform(save(tmp_path / "image.nii.gz", np.ones((4, 5, 6), np.float32), affine)))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    assert volume.oriented
    assert "qform is used" in " ".join(volume.notes)


@pytest.mark.parametrize("read", [read_volume, read_mask])
@pytest.mark.parametrize("scale", [1000.0, 1e-3])
def test_a_header_in_another_unit_is_refused(tmp_path, read, scale):
    path = save(tmp_path / "image.nii.gz", np.ones((4, 5, 6), np.float32), np.diag([scale, scale, scale, 1]))
    with pytest.raises(UserError, match=r"image\.nii\.gz .*no brain scan's"):
        read(path)


@given(shift=st.tuples(*[st.integers(-9, 9)] * 3), grow=st.tuples(*[st.integers(-3, 5)] * 3))
def test_a_grid_that_is_shifted_by_whole_voxels_copies_them(shift, grow):
    array = np.random.default_rng(0).random((6, 7, 8)).astype(np.float32)
    affine = AFFINE.copy()
    affine[:3, 3] = nib.affines.apply_affine(AFFINE, shift)
    fixed = Volume.empty(tuple(np.add(array.shape, grow)), affine)
    moved = onto_grid(Volume(array, AFFINE), fixed)
    assert moved.array.shape == fixed.array.shape
    for index in np.ndindex(fixed.array.shape):
        place = np.add(index, shift)
        inside = (place >= 0).all() and (place < array.shape).all()
        assert moved.array[index] == (array[tuple(place)] if inside else 0)


@pytest.mark.parametrize("codes", [(1, 2), (2, 0), (0, 1), (4, 4)])
def test_sform_and_qform_codes_dont_move_an_image(tmp_path, codes):
    array = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    affine = nib.affines.from_matvec(np.diag([-2.0, 2.0, 3.0]), [40, -50, -30])
    volume = read_volume(save(tmp_path / "image.nii.gz", array, affine, codes=codes))
    assert volume.oriented
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)


def test_written_volumes_come_back_with_both_forms_set(tmp_path):
    array = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)
    write_volume(tmp_path / "a.nii.gz", Volume(array, AFFINE))
    write_volume(tmp_path / "b.nii.gz", Volume(array > 0.5, AFFINE))
    image, label = nib.load(tmp_path / "a.nii.gz"), nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), array)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    assert image.header["sform_code"] == image.header["qform_code"] == 1
    np.testing.assert_array_equal(image.affine, label.affine)
    assert label.get_data_dtype() == np.uint8


def test_grids_that_differ_by_rounding_are_one():
    image = Volume(np.zeros((112, 112, 73)), AFFINE)
    assert same_grid(image, Volume(image.array, AFFINE * (1 + 1e-7)))
    assert not same_grid(image, Volume(image.array[1:], AFFINE))
    moved = AFFINE.copy()
    moved[0, 3] += 1
    assert not same_grid(image, Volume(image.array, moved))


@settings(max_examples=60, deadline=None)
@given(
    axes=st.permutations([0, 1, 2]),
    flips=st.tuples(*[st.booleans()] * 3),
    margin=st.tuples(*[st.integers(0, 4)] * 3),
    rounding=st.floats(-1e-4, 1e-4),
)
def test_a_mask_in_another_order_or_field_of_view_keeps_every_voxel(axes, flips, margin, rounding):
    mask, image = blob(), Volume(np.zeros(blob().shape), AFFINE)
    stored = nib.Nifti1Image(mask.astype(np.uint8), AFFINE)
    ornt = np.array([[axis, -1 if flip else 1] for axis, flip in zip(axes, flips)])
    turned = stored.as_reoriented(ornt)
    array = np.pad(turned.get_fdata() > 0, [(m, m) for m in margin])
    affine = turned.affine.copy() * (1 + rounding * 0.01)
    affine[:3, 3] -= affine[:3, :3] @ margin
    affine[3] = 0, 0, 0, 1
    aligned, how = align_mask(Volume(array, affine), image)
    assert how in ("same grid", "same lattice")
    np.testing.assert_array_equal(aligned, mask)


@settings(max_examples=30, deadline=None)
@given(shift=st.tuples(*[st.floats(-0.45, 0.45)] * 3))
def test_a_mask_off_by_less_than_half_a_voxel_keeps_every_voxel(shift):
    assume(abs(np.abs(shift).max() - 0.1) > 1e-6)  # where rounding decides
    affine = AFFINE.copy()
    affine[:3, 3] += AFFINE[:3, :3] @ shift
    aligned, how = align_mask(Volume(blob(), affine), Volume(np.zeros(blob().shape), AFFINE))
    assert how == ("same grid" if np.abs(shift).max() <= 0.1 else "nearest voxels")
    np.testing.assert_array_equal(aligned, blob())


def test_a_mask_without_orientation_belongs_to_the_image_of_its_shape(tmp_path):
    mask = read_mask(save(tmp_path / "mask.nii.gz", blob().astype(np.uint8), codes=(0, 0)))
    image = Volume(np.zeros(blob().shape), AFFINE)
    assert not mask.oriented
    assert align_mask(mask, image)[1] == "no orientation in header"
    swapped = align_mask(Volume(blob(), AFFINE), Volume(image.array, mask.affine, oriented=False))
    np.testing.assert_array_equal(swapped[0], blob())


@pytest.mark.parametrize("default", [np.eye(4), np.diag([-1.0, -1, 1, 1]), np.diag([1.0, 1, 3, 1])])
@pytest.mark.parametrize("image_affine", [AFFINE, np.diag([1.0, 1, 1, 1]) + 1e1 * np.eye(4, k=3)])
def test_a_default_affine_says_nothing_beside_one_that_does(default, image_affine):
    mask, image = Volume(blob(), default), Volume(np.zeros(blob().shape), image_affine)
    for first, second in ((mask, image), (Volume(blob(), image_affine), Volume(np.zeros(blob().shape), default))):
        aligned, how = align_mask(first, second)
        assert how == "no orientation in header"
        np.testing.assert_array_equal(aligned, blob())
    assert not alike_but_unplaced(Volume(blob((12, 14, 11)), default), image)


@pytest.mark.parametrize("axes", ["LAS", "LPS", "RAI", "LPI"])
def test_a_volume_with_a_default_affine_that_was_turned_is_turned_back(axes):
    stored = nib.Nifti1Image(blob().astype(np.uint8), np.diag([2.0, 2, 3, 1]))
    turned = stored.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(stored.affine), nib.orientations.axcodes2ornt(axes))
    )
    mask = Volume(np.asarray(turned.dataobj) > 0, turned.affine)
    assert not np.array_equal(mask.array, blob())
    aligned, how = align_mask(mask, Volume(np.zeros(blob().shape), stored.affine))
    assert how == "same lattice"
    np.testing.assert_array_equal(aligned, blob())


@given(shift=st.tuples(*[st.integers(-14, 14)] * 3), scale=st.sampled_from([1.0, 0.7, 1.6]))
def test_voxels_inside_and_outside_an_image_are_told_by_their_centres(shift, scale):
    affine = AFFINE @ nib.affines.from_matvec(scale * np.eye(3), np.array(shift) + 0.2)
    mask, image = Volume(blob(), affine), Volume(np.zeros((12, 14, 10)), AFFINE)
    places = np.argwhere(blob()) * scale + shift + 0.2
    inside = ((places > -0.51) & (places < np.array([12, 14, 10]) - 0.49)).all(axis=1)
    assert voxels_outside(mask, image) == (~inside).sum()


def test_lesions_without_a_voxel_left_are_counted():
    mask, image = Volume(blob(), AFFINE), Volume(np.zeros(blob().shape), AFFINE)
    large = blob()
    large[8, 10, 7] = False
    assert lesions_lost(mask, image, blob()) == 0
    assert lesions_lost(mask, image, large) == 1
    assert lesions_lost(mask, image, blob() & ~large) == 1
    assert lesions_lost(mask, image, np.zeros_like(large)) == 2


def test_what_lies_outside_does_not_swell_what_lies_inside():
    ball = np.zeros((20, 20, 20), bool)
    ball[2:18, 8:12, 8:12] = True
    affine = np.diag([1.01, 0.98, 1.02, 1.0])
    affine[:3, 3] = [-10.3, 0.2, 0.3]
    mask, image = Volume(ball, affine), Volume(np.zeros((20, 20, 20)), np.diag([1.0, 1, 1, 1]) + np.eye(4, k=3) * 0.1)
    aligned, how = align_mask(mask, image)
    kept = ball.sum() - voxels_outside(mask, image)
    assert how == "resampled" and kept < ball.sum()
    assert aligned.sum() * image.voxel_ml == pytest.approx(kept * mask.voxel_ml, rel=0.1)


@pytest.mark.parametrize("spacing", [(1.3, 0.9, 4.0), (2.6, 2.6, 2.6)])
def test_a_mask_on_another_lattice_keeps_its_volume_and_place(spacing):
    grid = np.indices((40, 40, 40)) * 1.0
    ball = ((grid - 19.3) ** 2).sum(0) < 11**2
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = 0.37
    image = Volume(np.zeros(np.ceil(40 / np.array(spacing)).astype(int)), affine)
    mask = Volume(ball, np.eye(4))
    aligned, how = align_mask(mask, image)
    assert how == "resampled"
    assert aligned.sum() * image.voxel_ml == pytest.approx(ball.sum() * mask.voxel_ml, rel=0.02)
    centre = np.argwhere(aligned).mean(0) @ affine[:3, :3] + affine[:3, 3]
    np.testing.assert_allclose(centre, 19.3, atol=0.1 * max(spacing))


def test_a_lesion_thinner_than_a_voxel_survives_resampling():
    mask = np.zeros((40, 40, 40), bool)
    mask[10:30, 20, 10:30] = True
    image = Volume(np.zeros((20, 20, 20)), np.diag([2.03, 2.03, 2.03, 1]))
    aligned, how = align_mask(Volume(mask, np.eye(4)), image)
    assert how == "resampled" and aligned.sum() * image.voxel_ml == pytest.approx(0.4, rel=0.1)


def test_resampling_gives_a_linear_ramp_at_the_right_places():
    ramp = np.indices((20, 22, 24))[1] * 3.0
    moving = Volume(ramp.astype(np.float32), AFFINE)
    inner = AFFINE.copy()
    inner[:3, 3] = (AFFINE @ [4.5, 5.25, 6, 1])[:3]
    resampled = resample_onto(moving, Volume(np.zeros((5, 6, 7)), inner))
    np.testing.assert_allclose(
        resampled.array, np.broadcast_to((5.25 + np.arange(6))[:, None] * 3, (5, 6, 7)), rtol=1e-4
    )


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("flip", [1, -1])
def test_thick_slices_reach_half_a_slice_beyond_their_centres(order, flip):
    slices = np.broadcast_to(np.array([50, 20, 30, 90], np.float32), (6, 7, 4))
    moving = Volume(slices, np.diag([2.0, 2.0, 5.0, 1]))  # scanned from -2.5 mm to 17.5 mm, and -1 mm to 11 or 13 mm
    affine = np.diag([2.0, 2.0, 2.0 * flip, 1])
    affine[:3, 3] = -2, -2, -6 if flip == 1 else 20
    resampled = resample_onto(moving, Volume(np.zeros((8, 9, 14)), affine), order=order).array[:, :, ::flip]
    rtol = 0.1 if order == 3 else 1e-4  # splines overshoot
    np.testing.assert_allclose(resampled[1:-1, 1:-1, [2, 3]], 50, rtol)  # at -2 and 0 mm
    np.testing.assert_allclose(resampled[1:-1, 1:-1, 11], 90, rtol)  # at 16 mm
    assert not resampled[..., [0, 1, 12, 13]].any()  # at -6, -4, 18 and 20 mm
    assert not resampled[[0, -1]].any() and not resampled[:, [0, -1]].any()  # one voxel beside


def test_a_moved_image_is_zero_only_where_it_was_not_scanned():
    turn = nib.eulerangles.euler2mat(0.2, -0.1, 0.3)
    scan_affine = nib.affines.from_matvec(np.diag([1.0, 1.0, 5.0]), [-10, -12, -10])
    moving = Volume(np.ones((20, 24, 5), np.float32), scan_affine)
    matrix = nib.affines.from_matvec(turn, [1.3, -2.1, 0.7])
    fixed = Volume(np.zeros((22, 22, 22)), nib.affines.from_matvec(np.eye(3) * 1.7, [-18] * 3))
    to_moving = np.linalg.inv(moving.affine) @ matrix @ fixed.affine
    where = nib.affines.apply_affine(to_moving, np.moveaxis(np.indices(fixed.array.shape), 0, -1))
    scanned = ((where > -0.5) & (where < np.array(moving.array.shape) - 0.5)).all(-1)
    np.testing.assert_allclose(resample_onto(moving, fixed, matrix).array, scanned, rtol=1e-5)


def test_a_lesion_in_the_outermost_slice_keeps_its_volume_and_place():
    mask = np.zeros((30, 30, 6), bool)
    mask[10:20, 10:20, 0] = True
    affine = np.diag([1.01, 1.01, 1.0, 1])
    affine[2, 3] = -2.5
    image = Volume(np.zeros((30, 30, 30)), affine)  # scanned is -3 mm and further, the mask from -2.5 mm to 2.5 mm
    aligned, how = align_mask(Volume(mask, np.diag([1.0, 1.0, 5.0, 1])), image)
    assert how == "resampled" and aligned.sum() * image.voxel_ml == pytest.approx(0.5, rel=0.05)
    assert aligned[:, :, :2].any() and not aligned[:, :, 6:].any()
