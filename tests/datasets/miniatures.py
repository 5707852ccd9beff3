"""Miniatures of public datasets: the folders, file names and columns that people download, with a few drawn images."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medssl.datasets.layouts.dermnet import GROUPS
from medssl.datasets.layouts.eurosat import KINDS


def draw(path: Path) -> None:
    """A small image that differs from every other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32(str(path).encode())
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((24, 20)).save(path)


def table(path: Path, header: str, rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)


def one_hot(classes: Sequence[str], label: str) -> list[str]:
    return [f"{float(name == label)}" for name in classes]


ISIC2018 = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
ISIC2019 = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")


def isic2018(root: Path) -> None:
    first = 24306
    for part, count in (("Training", 8), ("Validation", 3), ("Test", 3)):
        names = [f"ISIC_{first + number:07d}" for number in range(count)]
        first += count
        for name in names:
            draw(root / f"ISIC2018_Task3_{part}_Input" / f"{name}.jpg")
        rows = [[name, *one_hot(ISIC2018, ISIC2018[n % 7])] for n, name in enumerate(names)]
        truth = f"ISIC2018_Task3_{part}_GroundTruth"
        table(root / truth / f"{truth}.csv", "image," + ",".join(ISIC2018), rows)
        (root / f"ISIC2018_Task3_{part}_Input" / "LICENSE.txt").write_text("a licence")
        if part == "Training":
            lesions = [[name, f"HAM_{n // 7:07d}x{n % 7}", "histopathology"] for n, name in enumerate(names)]
            table(root / "ISIC2018_Task3_Training_LesionGroupings.csv", "image,lesion_id,diagnosis_confirm_type", lesions)


def isic2019(root: Path) -> None:
    names = [f"ISIC_{number:07d}{'_downsampled' if number == 3 else ''}" for number in range(16)]
    for name in names:
        draw(root / "ISIC_2019_Training_Input" / f"{name}.jpg")
    rows = [[name, *one_hot(ISIC2019, ISIC2019[n % 8])] for n, name in enumerate(names)]
    table(root / "ISIC_2019_Training_GroundTruth.csv", "image," + ",".join(ISIC2019), rows)
    lesions = [f"MSK4_{n % 8:07d}" if n % 3 else "" for n in range(len(names))]
    facts = [[name, 55 if n else "", "anterior torso", lesions[n], "female"] for n, name in enumerate(names)]
    table(root / "ISIC_2019_Training_Metadata.csv", "image,age_approx,anatom_site_general,lesion_id,sex", facts)
    draw(root / "ISIC_2019_Test_Input" / "ISIC_0034321.jpg")


def ham10000(root: Path) -> None:
    rows = []
    for n in range(6):
        draw(root / f"HAM10000_images_part_{n % 2 + 1}" / f"ISIC_{27419 + n:07d}.jpg")
        label, age = ("bkl", "nv", "mel")[n // 2], "80.0" if n else ""
        rows.append([f"HAM_{n // 2:07d}", f"ISIC_{27419 + n:07d}", label, "histo", age, "male", "scalp"])
    table(root / "HAM10000_metadata.csv", "lesion_id,image_id,dx,dx_type,age,sex,localization", rows)


def isic2017(root: Path) -> None:
    first = 0
    for part, count in (("Training", 4), ("Validation", 3), ("Test_v2", 3)):
        names = [f"ISIC_{first + number:07d}" for number in range(count)]
        first += count
        for name in names:
            draw(root / f"ISIC-2017_{part}_Data" / f"{name}.jpg")
            draw(root / f"ISIC-2017_{part}_Data" / f"{name}_superpixels.png")
        labels = [[name, *(("1.0", "0.0"), ("0.0", "1.0"), ("0.0", "0.0"))[n % 3]] for n, name in enumerate(names)]
        table(root / f"ISIC-2017_{part}_Part3_GroundTruth.csv", "image_id,melanoma,seborrheic_keratosis", labels)
        facts = [[name, "unknown" if n == 0 else 55, "female"] for n, name in enumerate(names)]
        place = root / f"ISIC-2017_{part}_Data" / f"ISIC-2017_{part}_Data_metadata.csv"
        table(place, "image_id,age_approximate,sex", facts)


PAD_COLUMNS = (
    "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,skin_cancer_history,cancer_history,"
    "has_piped_water,has_sewage_system,fitspatrick,region,diameter_1,diameter_2,diagnostic,itch,grew,hurt,changed,bleed,elevation,"
    "img_id,biopsed"
)


def padufes20(root: Path) -> None:
    rows = []
    for n in range(6):
        name = f"PAT_{n // 2}_{n}_{100 + n}.png"
        draw(root / "images" / f"imgs_part_{n % 3 + 1}" / name)
        given = {"patient_id": f"PAT_{n // 2}", "lesion_id": n, "age": 40 + n, "gender": "FEMALE" if n else ""}
        given |= {"fitspatrick": "2.0", "region": "ARM", "diagnostic": ("BCC", "SCC", "ACK", "SEK", "MEL", "NEV")[n]}
        given |= {"img_id": name, "biopsed": "True"}
        rows.append([given.get(column, "") for column in PAD_COLUMNS.split(",")])
    table(root / "metadata.csv", PAD_COLUMNS, rows)


def dermnet(root: Path) -> None:
    for number, group in enumerate(GROUPS):
        draw(root / "train" / group / f"image-{number}.jpg")
    draw(root / "test" / "Eczema Photos" / "image-0.jpg")


def oral(root: Path) -> None:
    for scale in (100, 400):
        for n in range(2):
            draw(root / f"{scale}x Normal Oral Cavity Histopathological Images" / f"Normal_{scale}x_{n}.jpg")
            draw(root / f"{scale}x OSCC Histopathological Images" / f"OSCC_{scale}x_{n}.jpg")


def breakhis400(root: Path) -> None:
    base = root / "BreaKHis_v1" / "histology_slides" / "breast"
    for scale in (40, 400):
        for n in (1, 2):
            draw(base / "benign/SOB/adenosis/SOB_B_A_14-22549AB" / f"{scale}X" / f"SOB_B_A-14-22549AB-{scale}-{n:03d}.png")
        draw(base / "malignant/SOB/ductal_carcinoma/SOB_M_DC_14-13412" / f"{scale}X" / f"SOB_M_DC-14-13412-{scale}-001.png")
        draw(base / "malignant/SOB/lobular_carcinoma/SOB_M_LC_14-13412" / f"{scale}X" / f"SOB_M_LC-14-13412-{scale}-001.png")


def kather2016(root: Path) -> None:
    base = root / "Kather_texture_2016_image_tiles_5000"
    tissues = ("01_TUMOR", "02_STROMA", "03_COMPLEX", "04_LYMPHO", "05_DEBRIS", "06_MUCOSA", "07_ADIPOSE", "08_EMPTY")
    for n, tissue in enumerate(tissues):
        draw(base / tissue / f"{n}A9F_CRC-Prim-HE-{n % 3 + 1:02d}_009{'b' if n else ''}.tif_Row_{n}01_Col_151.tif")


def kermany(root: Path) -> None:
    base = root / "chest_xray"
    for name in ("IM-0115-0001", "NORMAL2-IM-0927-0001", "IM-0115-0002"):
        draw(base / "train" / "NORMAL" / f"{name}.jpeg")
    draw(base / "val" / "NORMAL" / "NORMAL2-IM-1427-0001.jpeg")
    for name in ("person1_bacteria_1", "person1_bacteria_2", "person7_virus_11"):
        draw(base / "train" / "PNEUMONIA" / f"{name}.jpeg")
    draw(base / "test" / "PNEUMONIA" / "person1_virus_6.jpeg")


CHEXPERT = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
    "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


def chexpert(root: Path) -> None:
    for part, patients in (("train", (1, 2)), ("valid", (64541,))):
        rows = []
        for patient in patients:
            for view, side in ((1, "frontal"), (2, "lateral")):
                path = f"CheXpert-v1.0-small/{part}/patient{patient:05d}/study1/view{view}_{side}.jpg"
                draw(root / path)
                findings = ["1.0", "", "", "0.0", "", "-1.0", *[""] * 8]
                rows.append([path, "Female", 68, side.capitalize(), "AP" if view == 1 else "", *findings])
        table(root / "CheXpert-v1.0-small" / f"{part}.csv", CHEXPERT, rows)


NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],"
    "OriginalImagePixelSpacing[x,y],"
)


def nih14(root: Path) -> None:
    names = ["00000001_000.png", "00000001_001.png", "00000002_000.png", "00000003_000.png"]
    findings = ["Cardiomegaly", "Cardiomegaly|Emphysema", "No Finding", "Hernia"]
    for n, name in enumerate(names):
        draw(root / f"images_{n % 2 + 1:03d}" / "images" / name)
    rest = [58, "M", "PA", 2682, 2749, 0.143, 0.143, ""]
    rows = [[name, finding, 0, int(name[:8]), *rest] for name, finding in zip(names, findings, strict=True)]
    table(root / "Data_Entry_2017.csv", NIH, rows)
    (root / "test_list.txt").write_text("00000003_000.png\n")
    (root / "train_val_list.txt").write_text("\n".join(names[:3]))


COVID = (
    "patientid,offset,sex,age,finding,RT_PCR_positive,survival,intubated,intubation_present,went_icu,in_icu,needed_supplemental_O2,"
    "extubated,temperature,pO2_saturation,leukocyte_count,neutrophil_count,lymphocyte_count,view,modality,date,location,folder,"
    "filename,doi,url,license,clinical_notes,other_notes,"
)


def covid_cxr(root: Path) -> None:
    rows = []
    covid = "Pneumonia/Viral/COVID-19"
    for n, finding in enumerate((covid, "Pneumonia/Bacterial/Streptococcus", "todo", covid)):
        modality, folder = ("CT", "volumes") if n == 3 else ("X-ray", "images")
        draw(root / "images" / f"film {n}.jpg")
        given = {"patientid": n // 2 + 1, "sex": "M", "age": 65, "finding": finding, "view": "PA", "modality": modality}
        given |= {"folder": folder, "filename": f"film {n}.jpg", "clinical_notes": "Mr Doe came from abroad"}
        rows.append([given.get(column, "") for column in COVID.split(",")])
    table(root / "metadata.csv", COVID, rows)
    for name in ("annotations/lungVAE-masks/film 0_mask.png", "docs/covid-xray-2.jpg"):  # as in a clone of the collection
        draw(root / name)


def busi(root: Path) -> None:
    for name in ("benign", "malignant", "normal"):
        for n in (1, 2):
            draw(root / "Dataset_BUSI_with_GT" / name / f"{name} ({n}).png")
            draw(root / "Dataset_BUSI_with_GT" / name / f"{name} ({n})_mask.png")
    draw(root / "Dataset_BUSI_with_GT" / "benign" / "benign (1)_mask_1.png")


def brain_mri(root: Path) -> None:
    for name, short in (("glioma", "gl"), ("meningioma", "me"), ("notumor", "no"), ("pituitary", "pi")):
        draw(root / "Training" / name / f"Tr-{short}_0010.jpg")
        draw(root / "Testing" / name / f"Te-{short}_0010.jpg")


def eurosat(root: Path) -> None:
    for kind in KINDS:
        for n in (1, 2):
            draw(root / "2750" / kind / f"{kind}_{n}.jpg")


def patchcamelyon(root: Path) -> None:
    import h5py

    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 4), ("valid", 2), ("test", 2)):
        stem = f"camelyonpatch_level_2_split_{part}"
        noise = np.random.default_rng(count).integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
        with h5py.File(root / f"{stem}_x.h5", "w") as file:
            file.create_dataset("x", data=noise, compression="gzip")
        with h5py.File(root / f"{stem}_y.h5", "w") as file:
            file.create_dataset("y", data=(np.arange(count) % 2).reshape(-1, 1, 1, 1).astype(np.uint8))
        rows = [[n, 10, 20, "True", bool(n % 2), f"camelyon16_{part}_{n // 2:03d}"] for n in range(count)]
        table(root / f"{stem}_meta.csv", ",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi", rows)


MAKERS: dict[str, Callable[[Path], None]] = {
    "isic2018": isic2018, "isic2019": isic2019, "ham10000": ham10000, "isic2017": isic2017, "padufes20": padufes20,
    "dermnet": dermnet, "oral": oral, "breakhis400": breakhis400, "kather2016": kather2016, "patchcamelyon": patchcamelyon,
    "kermany": kermany, "chexpert": chexpert, "nih14": nih14, "covid-cxr": covid_cxr, "busi": busi, "brain-mri": brain_mri,
    "eurosat": eurosat,
}  # fmt: skip
"""What draws a miniature, by the layout's name."""
