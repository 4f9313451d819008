"""What is written as DICOM, held against dciodvfy of dicom3tools, and the command that writes it."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset

from app.cli import main
from app.clinical import dicom_out
from app.model.labels import NOTICE
from tests.app.clinical.drawn import FILES, LESION, PATIENT, judgement, native
from tests.conftest import encode, make_manifest

SOURCE = native(LossyImageCompression="00")
PNG = encode(LESION)
MANIFEST = make_manifest("7")
SHARED = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyID",
    "AccessionNumber",
)


def report(source: bytes = SOURCE, **changes: Any) -> Dataset:
    fields = {"probabilities": {"benign": 0.25, "malignant": 0.75}} | changes
    return read(dicom_out.structured_report(source, judgement(**fields), MANIFEST))


def capture(source: bytes = SOURCE) -> Dataset:
    return read(dicom_out.secondary_capture(source, PNG, MANIFEST, description="Grad-CAM for malignant 0.750"))


def read(data: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(data))


def complaints(path: Path) -> list[str]:
    """What dciodvfy finds wrong; warnings are of what a DICOMDIR would need."""
    command = [str(Path(sys.executable).with_name("dciodvfy")), "-new", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (said.stdout + said.stderr).splitlines()
    assert lines  # it names the kind of object, at least
    return [line for line in lines if line.startswith("Error")]


@pytest.mark.parametrize("make", [report, capture])
def test_dciodvfy_finds_no_error(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "out.dcm"
    for source in (SOURCE, native(StudyID=None, PatientSex=None, BurnedInAnnotation=None)):
        make(source).save_as(file)
        assert complaints(file) == []


def test_dciodvfy_would_find_one(tmp_path: Path) -> None:
    broken, file = report(), tmp_path / "out.dcm"
    del broken.CompletionFlag
    broken.save_as(file)
    assert complaints(file)


@pytest.mark.parametrize("make", [report, capture])
def test_it_can_be_filed_beside_its_photograph(make: Any) -> None:
    made, source = make(), read(SOURCE)
    assert [made.get(keyword) for keyword in SHARED] == [source.get(keyword) for keyword in SHARED]
    assert made.PatientName == PATIENT  # which was Latin-1 and is UTF-8 now
    assert made.SOPInstanceUID != source.SOPInstanceUID
    assert made.SeriesInstanceUID != source.SeriesInstanceUID
    assert make().SOPInstanceUID != made.SOPInstanceUID
    assert (made.Manufacturer, made.ManufacturerModelName, made.SoftwareVersions) == ("dermlens", MANIFEST.name, "7")


def test_a_report_is_preliminary_and_says_what_the_model_said() -> None:
    made = report(refer_because=("conformal",), reasons=("both benign and malignant are plausible at 95% coverage",))
    assert (made.CompletionFlag, made.VerificationFlag, made.PreliminaryFlag) == (
        "PARTIAL",
        "UNVERIFIED",
        "PRELIMINARY",
    )
    content = hd.sr.ComprehensiveSR.from_dataset(made).content
    [group] = hd.sr.MeasurementReport.from_sequence(content, is_root=True).get_image_measurement_groups()
    [measurement] = group.get_measurements()
    assert measurement.name == hd.sr.CodedConcept("111047", "DCM", "Probability of cancer")
    assert (measurement.value, measurement.unit.value) == (75, "%")
    assert group.finding_type == hd.sr.CodedConcept("21594007", "SCT", "Malignant")
    [algorithm] = [item.TextValue for item in group[0].ContentSequence if item.name.meaning == "Algorithm Version"]
    [comment] = [item.TextValue for item in group[0].ContentSequence if item.name.meaning == "Comment"]
    assert algorithm == "7"
    assert "refer: both benign" in comment
    assert comment.endswith(NOTICE)
    [study] = made.CurrentRequestedProcedureEvidenceSequence
    [image] = study.ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert image.ReferencedSOPInstanceUID == read(SOURCE).SOPInstanceUID


def test_a_capture_holds_the_picture_and_where_it_came_from() -> None:
    made = capture()
    assert np.array_equal(made.pixel_array, np.asarray(Image.open(io.BytesIO(PNG))))
    assert made.SourceImageSequence[0].ReferencedSOPInstanceUID == read(SOURCE).SOPInstanceUID
    assert made.DerivationDescription == f"Grad-CAM for malignant 0.750. {NOTICE}"
    assert made.LossyImageCompression == "00"


def test_a_capture_says_of_burned_in_text_what_its_photograph_says() -> None:
    """The overlay adds none."""
    said = [capture(native(BurnedInAnnotation=value)).get("BurnedInAnnotation") for value in ("NO", "YES", None)]
    assert said == ["NO", "YES", None]


def test_what_cannot_be_filed_is_not_written() -> None:
    with pytest.raises(ValueError, match="has no StudyInstanceUID"):
        report(native(StudyInstanceUID=None))
    with pytest.raises(ValueError, match="only of a DICOM file"):
        capture(PNG)
    with pytest.raises(ValueError, match="benign and malignant"):
        report(probabilities={"nevus": 1.0})


def dermlens(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return int(str(ended.value.code))


def test_the_command_writes_both(
    careful_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(careful_store))
    photograph, sr, overlay = (tmp_path / name for name in ("in.dcm", "sr.dcm", "overlay.dcm"))
    photograph.write_bytes(FILES["jpeg-2000"][0])
    assert dermlens("dicom", photograph, "--sr", sr, "--overlay", overlay) == 0
    assert complaints(sr) == complaints(overlay) == []
    said = capsys.readouterr()
    assert NOTICE in said.err
    assert "Grün" not in said.out + said.err


def test_predict_writes_the_report_too(
    careful_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(careful_store))
    photograph, sr = tmp_path / "in.dcm", tmp_path / "sr.dcm"
    photograph.write_bytes(FILES["jpeg-2000"][0])
    assert dermlens("predict", photograph, "--sr", sr, "--operating-point", "sensitivity-95") == 0
    assert complaints(sr) == []
    assert capsys.readouterr().out.startswith(f"{photograph}: ")
    assert dermlens("predict", photograph, "--sr", sr, "--operating-point", "none") == 2
    assert "no operating point 'none'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "unfit",
    [
        ["--overlays", "x"],
        ["--csv", "x.csv"],
        ["--url", "http://x"],
        ["--json"],
        ["--tta", "flips"],
        ["--recursive"],
        ["--restart"],
        ["--workers", "2"],
        ["--api-key-file", "key"],
    ],
)
def test_predict_writes_the_report_of_one_file_alone(unfit: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert dermlens("predict", "x.dcm", "--sr", "sr.dcm", *unfit) == 2
    assert dermlens("predict", "x.dcm", "y.dcm", "--sr", "sr.dcm") == 2
    told = capsys.readouterr().err
    assert told.count("--sr: give one DICOM file") == 2
    assert f"without {unfit[0]}" in told


@pytest.mark.parametrize(
    "outputs", [["--sr", "a.dcm"], ["--overlay", "a.dcm"], ["--sr", "b.dcm", "--overlay", "b.dcm"]]
)
def test_no_file_is_overwritten_by_what_comes_of_it(
    outputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.dcm").write_bytes(SOURCE)
    assert dermlens("dicom", "a.dcm", *outputs) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert Path("a.dcm").read_bytes() == SOURCE
    assert not Path("b.dcm").exists()


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "app.clinical.dicom_out")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    assert dermlens("dicom", "x.dcm", "--sr", "sr.dcm") == 2
    assert capsys.readouterr().err == "dermlens: to write DICOM: pip install '.[clinical]'\n"


def test_without_anything_to_write_it_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert dermlens("dicom", "x.dcm") == 2
    assert "--sr" in capsys.readouterr().err
