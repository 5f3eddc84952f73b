"""One door for every format: what is found, what is read, what is refused."""

import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from PIL import Image

import medgen.io as io
from medgen.errors import DataError, GeometryError, UnreadableScan
from medgen.grid import Grid
from medgen.io.dicom.write import Provenance, write_series
from medgen.io.raster import write_npz
from medgen.io.source import ReadOptions, Source
from medgen.scan import Header, Scale, Scan

OBLIQUE = np.array([[-1.9, 0.1, 0.2, 10], [0.15, 2.1, -0.3, -20], [0.1, 0.35, 3.0, 5], [0, 0, 0, 1]])
VALUES = np.arange(1, 61, dtype=np.int16).reshape(1, 5, 4, 3)


def volume(start: int = 0, affine: np.ndarray = OBLIQUE) -> Scan:
    return Scan(VALUES + np.int16(start), Grid((5, 4, 3), affine))


def dicom(folder: Path, start: int = 0, name: str = "SYN-0001") -> list[Path]:
    scan = Scan(VALUES + np.int16(start), Grid((5, 4, 3), np.diag([-2.0, -2, 3, 1])), Scale(unit="HU"), Header("CT"))
    return write_series(scan, folder, provenance=Provenance("test volume", content="synthetic"), name=name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One scan in every format, and much that is none."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    io.write(volume(), tmp_path / "deep" / "a.nii.gz")
    io.write(volume(1), tmp_path / "deep" / "er" / "B.nii")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VALUES[0].T), str(tmp_path / "c.mha"))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VALUES[0].T), str(tmp_path / "d.nrrd"))
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(tmp_path / "e.png")
    images = {"train": np.arange(36, dtype=np.uint8).reshape(3, 4, 3), "test": np.zeros((1, 4, 3), np.uint8)}
    write_npz(tmp_path / "f.npz", images, {"train": np.array([0, 1, 1]), "test": np.array([0])})
    dicom(tmp_path / "series")
    for name in ("notes.txt", "README", "table.csv", "half.nii.gz.part", ".hidden.nii.gz", "old.hdr", "pack.zip"):
        (tmp_path / name).write_bytes(b"nothing")
    (tmp_path / ".git").mkdir()
    io.write(volume(), tmp_path / ".git" / "x.nii")
    return tmp_path


def test_importing_costs_next_to_nothing():
    code = (
        "import time, sys; t = time.perf_counter(); import medgen.io; took = time.perf_counter() - t;"
        "heavy = {'torch', 'monai', 'SimpleITK', 'numpy', 'nibabel', 'pydicom', 'PIL'} & set(sys.modules);"
        "print(took, *heavy)"
    )
    root = Path(io.__file__).parents[2]
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert runs[0][1:] == []
    assert min(float(run[0]) for run in runs) < 0.15


def test_every_format_is_found_and_the_rest_left_out_with_a_reason(folder: Path):
    found = io.find(folder)
    kinds = {Path(source.path).relative_to(folder).as_posix(): source.kind for source in found.sources}
    assert kinds == {
        "c.mha": "itk",
        "d.nrrd": "itk",
        "deep/a.nii.gz": "nifti",
        "deep/er/B.nii": "nifti",
        "e.png": "raster",
        "f.npz#test/0": "npz",
        "f.npz#train/0": "npz",
        "f.npz#train/1": "npz",
        "f.npz#train/2": "npz",
        "series": "dicom",
    }
    reasons = {Path(skip.path).name: skip.reason for skip in found.skipped}
    assert set(reasons) == {"notes.txt", "README", "table.csv", "half.nii.gz.part", "old.hdr", "pack.zip"}
    assert "two-file" in reasons["old.hdr"]
    assert "packed" in reasons["pack.zip"]
    assert all(reasons.values())


def test_npz_items_carry_label_and_split(folder: Path):
    items = [(s.path[-7:], s.label, s.split) for s in io.find(folder / "f.npz").sources]
    assert items == [("#test/0", "0", "test")] + [(f"train/{n}", label, "train") for n, label in enumerate("011")]


def test_links_to_folders_are_not_followed(tmp_path: Path):
    io.write(volume(), tmp_path / "a.nii")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(io.find(tmp_path).sources) == 1


def test_item_two_comes_before_item_ten(tmp_path: Path):
    for name in ("10", "9", "2", "100"):
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / f"x{name}.png")
    assert [Path(s.path).stem for s in io.find(tmp_path).sources] == ["x2", "x9", "x10", "x100"]


def test_each_source_reads_as_what_it_is(folder: Path):
    read = {Path(s.path).name: io.read(s) for s in io.find(folder).sources}
    assert np.array_equal(read["a.nii.gz"].voxels, VALUES)
    assert np.array_equal(read["B.nii"].voxels, VALUES + 1)
    assert np.allclose(read["a.nii.gz"].grid.affine, nibabel.load(folder / "deep" / "a.nii.gz").affine, atol=1e-5)
    assert np.array_equal(read["c.mha"].voxels, VALUES)
    assert np.array_equal(read["series"].physical(), VALUES)
    assert read["series"].scale.unit == "HU"
    assert read["e.png"].voxels[0, :, :, 0].tolist() == np.arange(12).reshape(3, 4).T.tolist()
    assert read["2"].voxels[0, :, :, 0].tolist() == np.arange(24, 36).reshape(4, 3).T.tolist()


def test_a_header_says_what_reading_gives(folder: Path):
    for source in io.find(folder).sources:
        scan, (grid, channels, header) = io.read(source), io.header(source)
        assert grid.close(scan.grid), source.path
        assert (channels, header) == (scan.channels, scan.header), source.path


def test_a_path_reads_like_its_source(folder: Path):
    for source in io.find(folder).sources:
        assert np.array_equal(io.read(source.path).voxels, io.read(source).voxels), source.path
        assert io.header(source.path)[0] == io.header(source)[0]


def test_several_scans_need_a_choice(folder: Path):
    with pytest.raises(DataError, match=r"expected one scan, found 2: a.nii.gz, B.nii"):
        io.read(folder / "deep")


def test_no_scan_says_what_was_left_out(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UnreadableScan, match=r"a\.txt: not a scan"):
        io.read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableScan, match="It is empty"):
        io.read(tmp_path / "empty")


@pytest.mark.parametrize("name", ["gone.nii", "gone", "gone/deeper.nii", "gone#12345678"])
def test_a_missing_path_is_named(tmp_path: Path, name: str):
    with pytest.raises(DataError, match="no such file or folder"):
        io.find(tmp_path / name)


def test_one_of_two_series_in_a_folder(tmp_path: Path):
    for start, name in ((0, "A"), (100, "B")):
        for file in dicom(tmp_path / name, start, name):
            file.rename(tmp_path / f"{name}{file.name}")
        (tmp_path / name).rmdir()
    sources = io.find(tmp_path).sources
    assert len(sources) == 2
    assert all(len(source.path.rpartition("#")[2]) == 8 for source in sources)
    assert {int(io.read(source.path).voxels.min()) for source in sources} == {1, 101}
    assert io.find(sources[1].path).sources == (sources[1],)
    with pytest.raises(DataError, match=r"no series or item #00000000; it holds 2 scans, such as #"):
        io.read(f"{tmp_path}#00000000")


def test_a_hash_in_a_name_is_no_fragment(tmp_path: Path):
    (tmp_path / "run#1").mkdir()
    io.write(volume(), tmp_path / "run#1" / "a#2.nii.gz")
    assert np.array_equal(io.read(tmp_path / "run#1" / "a#2.nii.gz").voxels, VALUES)
    assert len(io.find(tmp_path / "run#1").sources) == 1


# -- channels --------------------------------------------------------------------------------------


def test_files_joined_by_semicolons_are_channels(tmp_path: Path):
    io.write(volume(), tmp_path / "a.nii.gz")
    io.write(volume(7), tmp_path / "b.nii.gz")
    both = f"{tmp_path / 'a.nii.gz'};{tmp_path / 'b.nii.gz'}"
    scan = io.read(both)
    assert np.array_equal(scan.voxels, np.concatenate([VALUES, VALUES + 7]))
    assert scan.voxels.dtype == np.int16
    assert io.header(both)[1] == 2


def test_channels_with_other_scales_meet_as_physical_values(tmp_path: Path):
    io.write(volume(), tmp_path / "a.nii.gz")
    io.write(Scan(VALUES, volume().grid, Scale(0.5, 10.0)), tmp_path / "b.nii.gz")
    scan = io.read(f"{tmp_path / 'a.nii.gz'};{tmp_path / 'b.nii.gz'}")
    assert np.allclose(scan.physical(), np.concatenate([VALUES, VALUES * 0.5 + 10]))


def test_channels_must_share_one_grid(tmp_path: Path):
    moved = OBLIQUE.copy()
    moved[0, 3] += 1
    io.write(volume(), tmp_path / "a.nii.gz")
    io.write(volume(0, moved), tmp_path / "b.nii.gz")
    with pytest.raises(GeometryError, match="channel 1 lies on another grid"):
        io.read(f"{tmp_path / 'a.nii.gz'};{tmp_path / 'b.nii.gz'}")


# -- writing ---------------------------------------------------------------------------------------


def test_the_name_chooses_the_format(tmp_path: Path):
    flat = Scan(np.arange(6, dtype=np.uint8).reshape(1, 3, 2, 1), Grid((3, 2, 1), np.diag([-1.0, -1, 1, 1])))
    io.write(flat, tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[0, 2, 4], [1, 3, 5]]
    for name in ("a.nii", "a.nii.gz"):
        io.write(volume(), tmp_path / name)
        assert np.array_equal(nibabel.load(tmp_path / name).dataobj, VALUES[0])
    for name in ("a.dcm", "a.jpg", "a.npz", "a.mha", "a"):
        with pytest.raises(DataError, match=r"written as \.nii, \.nii\.gz or \.png"):
            io.write(volume(), tmp_path / name)


# -- zips ------------------------------------------------------------------------------------------


def packed(tmp_path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return tmp_path / "data.zip"


def test_a_zip_is_a_folder_while_it_is_opened(tmp_path: Path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    io.write(volume(), tmp_path / "in" / "deep" / "a.nii.gz")
    dicom(tmp_path / "in" / "series", 50)
    with io.opened(packed(tmp_path, tmp_path / "in")) as folder:
        assert folder.is_dir()
        found = {source.kind: source for source in io.find(folder).sources}
        assert np.array_equal(io.read(found["nifti"]).voxels, VALUES)
        assert np.array_equal(io.read(found["dicom"]).physical(), VALUES + 50)
    assert not folder.exists()


def test_the_unpacked_folder_goes_when_the_block_fails(tmp_path: Path):
    (tmp_path / "in").mkdir()
    with pytest.raises(KeyError), io.opened(packed(tmp_path, tmp_path / "in")) as folder:
        raise KeyError
    assert not folder.exists()


def test_other_paths_are_opened_as_they_are(tmp_path: Path):
    with io.opened(tmp_path) as same:
        assert same == tmp_path
    with io.opened(f"{tmp_path}#12345678") as same:
        assert str(same) == f"{tmp_path}#12345678"


def test_a_zip_with_one_scan_is_read_and_searching_it_says_how(tmp_path: Path):
    (tmp_path / "in").mkdir()
    io.write(volume(), tmp_path / "in" / "a.nii")
    archive = packed(tmp_path, tmp_path / "in")
    assert np.array_equal(io.read(archive).voxels, VALUES)
    assert io.header(archive)[0].shape == (5, 4, 3)
    with pytest.raises(DataError, match=r"medgen\.io\.opened"):
        io.find(archive)


@pytest.mark.parametrize(
    "member", ["../x.nii", "a/../../x.nii", "/tmp/x.nii", "C:/x.nii", "..\\x.nii", "\\x.nii", "a/..\\..\\x.nii"]
)
def test_a_member_that_leaves_the_folder_is_refused(tmp_path: Path, member: str):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("fine.txt", "x")
        archive.writestr(zipfile.ZipInfo(member), "x")
    with pytest.raises(UnreadableScan, match="outside the folder"), io.opened(tmp_path / "bad.zip"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["bad.zip"]


def test_links_and_passwords_in_a_zip_are_refused(tmp_path: Path):
    link = zipfile.ZipInfo("link")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UnreadableScan, match="a link"), io.opened(tmp_path / "link.zip"):
        pass
    with zipfile.ZipFile(tmp_path / "locked.zip", "w") as archive:
        archive.writestr("a.txt", "x")
    locked = bytearray((tmp_path / "locked.zip").read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        locked[locked.index(mark) + place] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    with pytest.raises(UnreadableScan, match="encrypted"), io.opened(tmp_path / "locked.zip"):
        pass


def test_a_zip_that_grows_too_large_is_refused_before_it_is_unpacked(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.nii", bytes(2**20))
    with pytest.raises(UnreadableScan, match="unpacks to"), io.opened(tmp_path / "bomb.zip", max_bytes=2**19):
        pass


@pytest.mark.parametrize("cut", [10, 200])
def test_a_damaged_zip_is_an_error_of_ours(tmp_path: Path, cut: int):
    (tmp_path / "in").mkdir()
    io.write(volume(), tmp_path / "in" / "a.nii.gz")
    archive = packed(tmp_path, tmp_path / "in")
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-cut])
    with pytest.raises(UnreadableScan, match="damaged"), io.opened(archive):
        pass
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    archive.write_bytes(flipped)
    with pytest.raises(UnreadableScan), io.opened(archive):
        pass


# -- options ---------------------------------------------------------------------------------------


def test_options_reach_the_reader(tmp_path: Path):
    Image.fromarray(np.zeros((4, 3, 3), np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match="colour"):
        io.read(tmp_path / "colour.png")
    assert io.read(tmp_path / "colour.png", ReadOptions(colour=True)).channels == 3
    source = Source(str(tmp_path / "colour.png"), "raster", (tmp_path / "colour.png",))
    with pytest.raises(DataError, match="colour"):
        io.header(source)


def test_a_damaged_npz_is_left_out_and_the_rest_found(tmp_path: Path):
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    io.write(volume(), tmp_path / "a.nii")
    found = io.find(tmp_path)
    assert [Path(source.path).name for source in found.sources] == ["a.nii"]
    assert [Path(skip.path).name for skip in found.skipped] == ["bad.npz"]
