"""Standard data sets are read in exactly their published form: small files of that form stand for them here."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from difffeat.errors import ConfigError, EmptySource, SourceError, SourceFormatError, UntrustedFile
from difffeat.runtime.preprocess import decode
from difffeat.runtime.samples import Source
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_named import DATASETS
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.sources_voc import CLASSES as VOC_CLASSES
from tests.runtime.fake import encoded


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def labels(source: Source) -> dict[str, tuple[str, ...] | None]:
    return {sample.id: sample.labels for sample in source.samples}


def readable(source: Source) -> bool:
    return all(sample.image is not None and sample.image.read() == encoded(0) for sample in source.samples)


TINY = {
    "wnids.txt": "n02124075\nn02012849\nn03126707\n",
    "words.txt": "n02012849\tcrane\nn02124075\tEgyptian cat\nn03126707\tcrane\nn00001740\tentity\n",
    "train/n02124075/images/n02124075_0.JPEG": encoded(0),
    "train/n02124075/n02124075_boxes.txt": "n02124075_0.JPEG\t0\t10\t63\t58\n",
    "train/n02012849/images/n02012849_0.JPEG": encoded(0),
    "val/images/val_0.JPEG": encoded(0),
    "val/images/val_1.JPEG": encoded(0),
    "val/val_annotations.txt": "val_0.JPEG\tn03126707\t0\t32\t44\t62\nval_1.JPEG\tn02124075\t52\t55\t57\t59\n",
    "test/images/test_0.JPEG": encoded(0),
}


def test_tiny_imagenet(tmp_path: Path) -> None:
    root = write(tmp_path, TINY)
    train, val, test = (open_source(f"{root}::{split}") for split in ("train", "val", "test"))
    assert train.classes == val.classes == ("crane (n02012849)", "Egyptian cat", "crane (n03126707)")
    assert labels(train) == {"n02012849_0": ("crane (n02012849)",), "n02124075_0": ("Egyptian cat",)}
    assert labels(val) == {"val_0": ("crane (n03126707)",), "val_1": ("Egyptian cat",)}
    assert (labels(test), test.classes) == ({"test_0": None}, ())
    assert readable(train)
    assert readable(val)


def test_tiny_imagenet_with_a_strange_annotation_is_told(tmp_path: Path) -> None:
    root = write(tmp_path, {**TINY, "val/val_annotations.txt": "val_0.JPEG\tn99999999\t0\n"})
    with pytest.raises(SourceFormatError, match=r"val_0.JPEG is of class n99999999, which is none of the 3 classes"):
        open_source(f"{root}::val")
    write(tmp_path, {"val/val_annotations.txt": "val_0.JPEG\n"})
    with pytest.raises(SourceFormatError, match=r"val_annotations.txt, line 1 is no file and WordNet id, separated by a tab"):
        open_source(f"{root}::val")


def test_imagenet_as_downloaded(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "LOC_synset_mapping.txt": "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n",
        "LOC_val_solution.csv": "ImageId,PredictionString\nILSVRC2012_val_00000001,n01443537 85 1 499 272 n01443537 5 6 7 8 \n",
        "ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_18.JPEG": encoded(0),
        "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG": encoded(0),
        "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG": encoded(0),
    }
    root = write(tmp_path, files)
    train, val, test = (open_source(root, SourceOptions(split=split)) for split in ("train", "val", "test"))
    assert train.classes == val.classes == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    assert labels(train) == {"n01440764_18": ("tench, Tinca tinca",)}
    assert labels(val) == {"ILSVRC2012_val_00000001": ("goldfish, Carassius auratus",)}
    assert labels(test) == {"ILSVRC2012_test_00000001": None}
    assert readable(val)
    (root / "LOC_val_solution.csv").unlink()
    with pytest.raises(SourceError, match=r"has no folders of WordNet ids, and .*LOC_val_solution.csv is not there"):
        open_source(f"{root}::val")


def test_imagenet_in_class_folders_needs_its_name(tmp_path: Path) -> None:
    write(tmp_path, {"val/n01440764/._a.JPEG": b"", "val/.ipynb_checkpoints/a.JPEG": b""})
    root = write(tmp_path, {"val/n01440764/a.JPEG": encoded(0), "val/n01443537/b.JPEG": encoded(0)})
    assert labels(open_source(root, SourceOptions(dataset="imagenet", split="val"))) == {"a": ("n01440764",), "b": ("n01443537",)}
    assert open_source(root, SourceOptions(dataset="imagenet", split="val")).classes == ("n01440764", "n01443537")
    assert labels(open_source(root / "val")) == {"n01440764/a": ("n01440764",), "n01443537/b": ("n01443537",)}


def planes(value: int) -> bytes:
    """32×32 of red `value`, green 10, blue 20, but for the first pixel, which is white."""
    rgb = np.empty((3, 32, 32), np.uint8)
    rgb[0], rgb[1], rgb[2] = value, 10, 20
    rgb[:, 0, 0] = 255
    return rgb.tobytes()


def test_cifar_in_binary_form(tmp_path: Path) -> None:
    batches = {f"data_batch_{number}.bin": bytes([number % 2]) + planes(number) for number in range(1, 6)}
    ten = write(tmp_path / "10", {"batches.meta.txt": "airplane\nautomobile\n\n", **batches, "test_batch.bin": bytes([1]) + planes(9)})
    train = open_source(f"{ten}::train")
    assert labels(train) == {f"train-{n:05d}": ("airplane" if n % 2 else "automobile",) for n in range(5)}
    image = train.samples[3].image
    assert image is not None
    pixels = decode(image.read(), 32, "center")
    assert (pixels[1, 0].tolist(), pixels[0, 0].tolist(), pixels[31, 31].tolist()) == ([4, 10, 20], [255] * 3, [4, 10, 20])

    names: dict[str, str | bytes] = {"fine_label_names.txt": "apple\nbear\n", "coarse_label_names.txt": "fruit\nmammals\n"}
    hundred = write(tmp_path / "100", {**names, "train.bin": bytes([1, 0]) + planes(1), "test.bin": bytes([0, 1]) + planes(2)})
    assert labels(open_source(f"{hundred}::test")) == {"test-00000": ("bear",)}
    assert labels(open_source(f"{hundred}::test", SourceOptions(label_column="coarse"))) == {"test-00000": ("fruit",)}
    (hundred / "test.bin").write_bytes(bytes(3000))
    with pytest.raises(SourceFormatError, match=r"has 3000 bytes, no multiple of 3074: it is cut off"):
        open_source(f"{hundred}::test")


@pytest.mark.parametrize(("name", "files"), [("cifar10", ("batches.meta", "data_batch_1")), ("cifar100", ("meta", "train", "test"))])
def test_cifar_in_pickles_is_refused_unread(name: str, files: tuple[str, ...], tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (tmp_path / "sprung",))

    root = write(tmp_path / "root", {file: pickle.dumps(Trap()) for file in files})
    with pytest.raises(UntrustedFile, match=r"is a pickle, which could run code when it is read. Get the binary version, cifar-100?-binary.tar.gz"):
        open_source(f"{root}::train")
    with pytest.raises(UntrustedFile):
        open_source(root, SourceOptions(dataset=name, split="test"))
    assert not (tmp_path / "sprung").exists()


def coco(root: Path, year: int, images: str) -> Path:
    entries = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in (9, 25, 30)]
    instances = {"images": entries, "categories": [{"id": 1, "name": "person"}], "annotations": [{"image_id": 9, "category_id": 1}]}
    captions = {"images": entries, "annotations": [{"image_id": 25, "caption": "A giraffe. "}]}
    files: dict[str, str | bytes] = {f"{images}/{n:012d}.jpg": encoded(0) for n in (9, 25, 30)}
    return write(root, {
        f"annotations/instances_val{year}.json": json.dumps(instances), f"annotations/captions_val{year}.json": json.dumps(captions), **files,
    })  # fmt: skip


@pytest.mark.parametrize(("year", "images"), [(2014, "val2014"), (2017, "images/val2017")])
def test_coco_is_found_in_its_root_with_captions_and_images(year: int, images: str, tmp_path: Path) -> None:
    root = coco(tmp_path, year, images)
    source = open_source(f"{root}::val")
    assert labels(source) == {"000000000009": ("person",), "000000000025": (), "000000000030": ()}
    assert source.samples[1].captions == ("A giraffe.",)
    assert readable(source)
    with pytest.raises(SourceError, match=rf"lacks .*instances_train{year}.json. Unpack annotations_trainval{year}.zip there"):
        open_source(f"{root}::train")


def test_images_without_annotation_are_left_out_on_demand_and_counted(tmp_path: Path) -> None:
    source = open_source(f"{coco(tmp_path, 2014, 'val2014')}::val", SourceOptions(drop_unlabelled=True))
    assert list(labels(source)) == ["000000000009"]
    assert source.notes == ("2 samples without a label are left out, 1 remain",)
    with pytest.raises(EmptySource, match=r"no sample has a label, and --drop-unlabelled leaves out those without"):
        open_source(tmp_path / "val2014", SourceOptions(drop_unlabelled=True))


def test_two_data_sets_in_one_root_are_told_apart_by_name(tmp_path: Path) -> None:
    coco(coco(tmp_path, 2014, "val2014"), 2017, "val2017")
    with pytest.raises(SourceError, match=r"holds coco2014 and coco2017. Choose one with --dataset"):
        open_source(f"{tmp_path}::val")
    assert len(open_source(tmp_path, SourceOptions(dataset="coco2017", split="val"))) == 3


@pytest.mark.parametrize("part", ["", "ssgrl_partition/"])
def test_visual_genome_500(part: str, tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        f"{part}train_list_500.txt": "1.jpg\n2.jpg\n4.jpg\n",
        f"{part}test_list_500.txt": "3.jpg\n",
        f"{part}vg_category_500_labels_index.json": json.dumps({"1.jpg": [0, 2], "2.jpg": [1], "3.jpg": [11]}),
        "VG_100K/1.jpg": encoded(0), "VG_100K_2/2.jpg": encoded(0), "VG_100K_2/3.jpg": encoded(0),
    }  # fmt: skip
    root = write(tmp_path, files)
    train, test = open_source(f"{root}::train"), open_source(f"{root}::test")
    assert train.classes == test.classes == tuple(map(str, range(12)))
    assert labels(train) == {"1": ("0", "2"), "2": ("1",), "4": None}
    assert train.samples[2].problem == "vg_category_500_labels_index.json has no entry for 4.jpg."
    assert readable(test)
    names = write(tmp_path, {"names.txt": "".join(f"name {n}\n" for n in range(12))}) / "names.txt"
    assert labels(open_source(f"{root}::test", SourceOptions(classes=names))) == {"3": ("name 11",)}
    for label in ('"0"', "500", "9999999999"):
        write(root, {f"{part}vg_category_500_labels_index.json": f'{{"1.jpg": [{label}]}}'})
        with pytest.raises(SourceFormatError, match=r"the entry '1.jpg' is no list of class numbers, 0 to 499: \["):
            open_source(f"{root}::train")


@pytest.mark.parametrize("part", ["", "Groundtruth/"])
def test_nus_wide(part: str, tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "Concepts81.txt": "airport\nlake\n",
        "ImageList/TrainImagelist.txt": "actor\\0001_2124494179.jpg\r\nactor\\0002_174174086.jpg\r\nzoo\\0003_1.jpg\r\n",
        "ImageList/TestImagelist.txt": "zoo\\0004_2.jpg\n",
        f"{part}TrainTestLabels/Labels_airport_Train.txt": "1\n0\n1\n",
        f"{part}TrainTestLabels/Labels_lake_Train.txt": "1\n0\n-1130179\n",
        f"{part}TrainTestLabels/Labels_airport_Test.txt": "0\n",
        f"{part}TrainTestLabels/Labels_lake_Test.txt": "1\n",
        "Flickr/zoo/0004_2.jpg": encoded(0),
    }
    root = write(tmp_path, files)
    train, test = open_source(f"{root}::train"), open_source(f"{root}::test")
    assert train.classes == ("airport", "lake")
    assert labels(train) == {"actor/0001_2124494179": ("airport", "lake"), "actor/0002_174174086": (), "zoo/0003_1": None}
    assert train.samples[2].problem == "Labels_lake_Train.txt, line 3 holds '-1130179', neither 0 nor 1. Mend the label."
    assert train.notes[0].startswith("1 rows cannot be read and will be in quarantine; the first is zoo/0003_1.jpg: Labels_lake_Train.txt")
    assert labels(test) == {"zoo/0004_2": ("lake",)}
    assert readable(test)
    write(root, {"Concepts81.txt": "air\0port\nlake\n"})
    with pytest.raises(SourceFormatError, match=r"cannot be read \(embedded null byte\)"):
        open_source(f"{root}::train")
    write(root, {"Concepts81.txt": "airport\nlake\n", f"{part}TrainTestLabels/Labels_lake_Train.txt": "1\n"})
    with pytest.raises(SourceFormatError, match=r"Labels_lake_Train.txt has 1 lines for 3 images"):
        open_source(f"{root}::train")


def voc(root: Path, folder: str, split: str = "train") -> Path:
    """VOC's lists of three images: the first shows a cat and a dog, the second a dog that is difficult to see."""
    lists = f"{folder}/ImageSets/Main"
    values = dict.fromkeys(VOC_CLASSES, ("-1", "-1", "-1")) | {"cat": (" 1", "-1", "-1"), "dog": (" 1", " 0", "-1")}
    files: dict[str, str | bytes] = {f"{folder}/JPEGImages/00000{n}.jpg": encoded(0) for n in (5, 7, 9)}
    files |= {f"{lists}/{split}.txt": "000005\n000007\n000009\n"}
    for label, (five, seven, nine) in values.items():
        files[f"{lists}/{label}_{split}.txt"] = f"000005 {five}\n000007 {seven}\n000009 {nine}\n"
    return write(root, files)


@pytest.mark.parametrize("folder", ["VOCdevkit/VOC2007", "VOC2007"])
def test_voc(folder: str, tmp_path: Path) -> None:
    root = voc(tmp_path, folder)
    for place in (root, root / folder):
        source = open_source(f"{place}::train")
        assert source.classes == VOC_CLASSES
        assert labels(source) == {"000005": ("cat", "dog"), "000007": (), "000009": ()}
        assert source.notes == ("1 labels are marked as difficult: they are unknown, and neither trained nor scored",)
        assert readable(source)
    with pytest.raises(SourceError, match=r"test.txt is not there. Unpack the data set again, or choose another --split"):
        open_source(f"{root}::test")
    with pytest.raises(SourceError, match=r"has no ImageSets/Main of VOC2012"):
        open_source(root / folder, SourceOptions(dataset="voc2012", split="train"))


def test_voc_of_two_years_in_one_folder_needs_the_year(tmp_path: Path) -> None:
    root = voc(voc(tmp_path, "VOCdevkit/VOC2007"), "VOCdevkit/VOC2012")
    with pytest.raises(SourceError, match=r"holds voc2007 and voc2012. Choose one with --dataset"):
        open_source(f"{root}::train")
    assert len(open_source(root, SourceOptions(dataset="voc2012", split="train"))) == 3


def test_voc_whose_lists_have_gaps_is_told(tmp_path: Path) -> None:
    root, lists = voc(tmp_path, "VOC2012"), tmp_path / "VOC2012/ImageSets/Main"
    (lists / "test.txt").write_text("000005\n")
    test = open_source(f"{root}::test")
    assert (labels(test), test.classes) == ({"000005": None}, ())
    (lists / "dog_train.txt").write_text("000005  1\n000007  2\n")
    train = open_source(f"{root}::train")
    assert [sample.problem for sample in train.samples] == [
        None,
        "dog_train.txt has '2' for it, which is none of 1, -1 and 0. Mend the list.",
        "dog_train.txt has 'no line' for it, which is none of 1, -1 and 0. Mend the list.",
    ]
    (lists / "dog_train.txt").unlink()
    with pytest.raises(SourceError, match=r"lacks dog_train.txt, of 20 lists"):
        open_source(f"{root}::train")


def test_a_data_set_needs_its_split_and_the_way_to_a_plain_folder_is_told(tmp_path: Path) -> None:
    root = write(tmp_path, TINY)
    with pytest.raises(
        SourceError, match=r"is tiny-imagenet, which has several splits: train, val, test. Choose one with --split, or as SOURCE::train"
    ):
        open_source(root)
    with pytest.raises(SourceError, match=r"has no split 'dev': train, val, test"):
        open_source(f"{root}::dev")
    assert len(open_source(root, SourceOptions(dataset="folder"))) == 5


def test_options_that_do_not_fit_are_told(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.png": encoded(0), "m.csv": "image\na.png\n"})
    with pytest.raises(ConfigError, match=rf"--dataset must be one of {', '.join(DATASETS)}, or folder"):
        open_source(root, SourceOptions(dataset="mnist"))
    with pytest.raises(ConfigError, match=r"is a plain folder without splits"):
        open_source(f"{root}::train")
    with pytest.raises(ConfigError, match=r"asks for the split 'train', --split for 'val'"):
        open_source(f"{root}::train", SourceOptions(split="val"))
    with pytest.raises(ConfigError, match=r"--split train is for saved and standard data sets"):
        open_source(root / "m.csv", SourceOptions(split="train"))
    with pytest.raises(SourceError, match=r"is no folder on this disk, which --dataset vg500 needs"):
        open_source(root / "m.csv", SourceOptions(dataset="vg500"))
