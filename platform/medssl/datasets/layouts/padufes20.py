"""PAD-UFES-20: 2,298 smartphone images of skin lesions, with patients and lesions.

`metadata.csv` (patient_id, lesion_id, ..., diagnostic, ..., img_id, biopsed) and `images/imgs_part_{1,2,3}/*.png`.
"""

from __future__ import annotations

from medssl.datasets.layouts.tree import Layout, Record, Tree, number

CLASSES = ("BCC", "SCC", "ACK", "SEK", "MEL", "NEV")


def _read(tree: Tree) -> list[Record]:
    columns = ("patient_id", "lesion_id", "age", "gender", "fitspatrick", "region", "diagnostic", "img_id", "biopsed")
    frame = tree.table(tree.find("metadata.csv"), columns)
    unknown = sorted(set(frame["diagnostic"].dropna()) - set(CLASSES))
    if unknown:
        tree.refuse(f"metadata.csv has diagnostic {unknown[0]}, which is none of {', '.join(CLASSES)}")
    records = []
    for path, row in zip(tree.matched(list(frame["img_id"]), "metadata.csv"), frame.to_dict("records"), strict=True):
        further = {"age": number(row["age"]), "sex": row["gender"], "skin_type": number(row["fitspatrick"])}
        further |= {"region": row["region"], "biopsied": row["biopsed"]}
        patient = row["patient_id"]
        bag = f"{patient}/{row['lesion_id']}" if row["lesion_id"] else None
        records.append(Record(path, (row["diagnostic"].lower(),), patient=patient, bag=bag, further=further))
    return records


LAYOUT = Layout("PAD-UFES-20", "metadata.csv and the images named in its column img_id, as in images/imgs_part_1/", _read)
