from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vitprune.errors import DamagedFile, InputError
from vitprune_deploy.data import (
    Augmented,
    ImageSet,
    Preprocess,
    Wanted,
    batches,
    check_disjoint,
    open_images,
    open_split,
    picked,
    split_three,
)
from vitprune_deploy.data import images as images_module
from vitprune_deploy.data.classes import class_indices

QUICKSTART = Path(__file__).parents[2] / "profiles/quickstart/fashion-mnist.tar.gz"
CLASSES = ["cat", "dog", "owl"]
TINY = Preprocess((3, 16, 16), crop_pct=1.0)


def encoded(seed: int, format: str = "PNG", size: tuple[int, int] = (20, 24)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def files(per_class: int = 6, first_seed: int = 0, classes=CLASSES) -> dict[str, bytes]:
    """Class folders with PNG, JPEG and WebP files, all different."""
    formats = [("PNG", "png"), ("JPEG", "JPG"), ("WEBP", "webp")]
    made = {}
    for c, name in enumerate(classes):
        for i in range(per_class):
            kind, extension = formats[i % 3]
            made[f"{name}/{i:03d}.{extension}"] = encoded(first_seed + 100 * c + i, kind)
    return made


def folder(root: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def packed(path: Path, content: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


# --- sources


@pytest.mark.parametrize("kind", ["folder", "a.zip", "a.tar", "a.tar.gz", "a.tgz"])
@pytest.mark.parametrize("wrap", ["", "photos-v2/all/", "./"])
def test_every_kind_of_source_gives_the_same_images(tmp_path, kind, wrap):
    content = files()
    wrapped = {wrap + name: data for name, data in content.items()} | {f"{wrap}README.txt": b"no image"}
    source = folder(tmp_path / "set", wrapped) if kind == "folder" else packed(tmp_path / kind, wrapped)
    images = open_images(source, class_names=CLASSES)
    assert [images.name(i) for i in range(len(images))] == sorted(content)
    assert images.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    for i in range(len(images)):
        assert images.read(i) == content[images.name(i)]
        assert images.size_bytes(i) == len(content[images.name(i)])
        want = Image.open(io.BytesIO(content[images.name(i)]))
        np.testing.assert_array_equal(np.asarray(images.image(i)), np.asarray(want))


@pytest.mark.parametrize("kind", ["folder", "a.zip", "a.tar.gz"])
def test_a_part_inside_a_source_is_reached_by_split_or_by_path(tmp_path, kind):
    content = {f"train/{n}": d for n, d in files(6).items()} | {f"test/{n}": d for n, d in files(2, 50).items()}
    source = folder(tmp_path / "set", content) if kind == "folder" else packed(tmp_path / kind, content)
    for images in (open_images(source, split="test"), open_images(source / "test")):
        assert len(images) == 6
        assert images.name(0) == "cat/000.png"
    with pytest.raises(InputError, match="holds parts, not classes: test, train; set split to one of them"):
        open_images(source)
    with pytest.raises(InputError, match="has no images in 'val/'; it has test, train"):
        open_images(source, split="val")


def test_images_without_folders_are_unlabelled(tmp_path):
    root = folder(tmp_path, {f"{i}.png": encoded(i) for i in range(4)})
    images = open_images(root, num_classes=1000)
    assert images.labels is None
    assert images.label(0) is None
    _, labels = next(batches(images, TINY, 4))
    assert labels.tolist() == [-1] * 4
    with pytest.raises(InputError, match=r"labelled is true, but 0.png lies in no class folder"):
        open_images(root, labelled=True)


def test_folders_that_are_no_classes_can_be_declared_so(tmp_path):
    root = folder(tmp_path, files(2, classes=["holiday", "garden"]))
    assert open_images(root, class_names=CLASSES, labelled=False).labels is None
    with pytest.raises(InputError, match=r"set data\.labelled to false"):
        open_images(root, class_names=CLASSES)


def test_hidden_files_and_what_is_no_image_are_passed_over(tmp_path):
    junk = {"cat/.thumb.png": b"x", "__MACOSX/cat/._000.png": b"x", ".git/a.png": b"x", "cat/notes.txt": b"x"}
    images = open_images(packed(tmp_path / "a.zip", files(2) | junk), class_names=CLASSES)
    assert [images.name(i) for i in range(len(images))] == sorted(files(2))


def test_control_characters_in_names_are_escaped(tmp_path):
    images = open_images(packed(tmp_path / "a.zip", {"cat/\x1b[31mred\n.png": encoded(0)}))
    assert images.name(0) == "cat/\\x1b[31mred\\n.png"


@pytest.mark.parametrize("kind", ["a.tar", "a.tar.gz", "a.zip"])
def test_a_cut_off_archive_is_told(tmp_path, kind):
    path = packed(tmp_path / kind, files())
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DamagedFile, match="is not a readable zip or tar archive"):
        open_images(path)


@pytest.mark.parametrize(
    ("name", "data"), [("a.zip", b"PK\x03\x04 nothing"), ("a.tar.gz", b"\x1f\x8b\x08"), ("a.tar", b"")]
)
def test_what_is_no_archive_is_told(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises((DamagedFile, InputError), match=r"is not a readable zip or tar|holds no images"):
        open_images(path)


def test_what_is_no_archive_is_told_in_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("no images")
    with pytest.raises(DamagedFile) as refused:
        open_images(tmp_path / "notes.txt")
    assert str(refused.value).endswith("is not a readable zip or tar archive (file could not be opened successfully)")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_file_that_a_tar_holds_under_two_names_is_two_images(tmp_path, mode):
    root = folder(tmp_path / "set", files(2))
    (root / "owl/again.png").hardlink_to(root / "cat/000.png")
    with tarfile.open(tmp_path / "a.tar", mode) as archive:
        archive.add(root, ".")
    images = open_images(tmp_path / "a.tar", class_names=CLASSES)
    assert len(images) == 7
    assert images.read(6) == images.read(0)


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: there is no such folder or archive"):
        open_images(tmp_path / "nowhere")


def test_a_compressed_tar_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vitprune_deploy.data.sources.MAX_UNPACKED_BYTES", 2000)
    with pytest.raises(InputError, match="too much to hold in memory; unpack it, or pack it as"):
        open_images(packed(tmp_path / "a.tar.gz", files()))


def test_links_that_lead_in_a_circle_end(tmp_path):
    root = folder(tmp_path / "set", files(2))
    (root / "cat" / "again").symlink_to(root)
    assert len(open_images(root, class_names=CLASSES)) == 6


def test_timm_readers_give_images_classes_and_bytes(tmp_path):
    content = files(2)
    root = folder(tmp_path / "set", content)
    images = open_images("timm:image_folder", root=root, split="train", class_names=["owl", "cat", "dog"])
    assert len(images) == 6
    assert images.read(0) == content["cat/000.png"]
    assert images.labels.tolist() == [1, 1, 2, 2, 0, 0]  # by name, not by the reader's own count
    torchvision = open_images("timm:torch/image_folder", root=root, num_classes=3)
    np.testing.assert_array_equal(np.asarray(torchvision.image(0)), np.asarray(images.image(0).convert("RGB")))
    assert torchvision.labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(InputError, match="timm:torch/nothing"):
        open_images("timm:torch/nothing", root=root)


def test_a_timm_reader_without_its_folder_says_what_is_missing():
    with pytest.raises(InputError, match=r"timm:folder \(train\) needs data\.root"):
        open_images("timm:folder")


def test_what_a_timm_reader_prints_does_not_reach_stdout(capsys, monkeypatch):
    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: print("Please install it"))  # noqa: T201
    with pytest.raises(InputError):
        open_images("timm:chatty")
    assert capsys.readouterr().out == ""


# --- classes


def test_folders_find_their_class_by_name_whatever_case_and_hyphens():
    found = class_indices(["Ankle_Boot", "bag", "t-shirt"], "x", class_names=["bag", "T shirt", "ankle-boot"])
    assert found == {"Ankle_Boot": 2, "bag": 0, "t-shirt": 1}


def test_a_folder_of_a_wrong_name_is_told_with_the_nearest_class():
    with pytest.raises(
        InputError, match=r"1 of 2 folders are no class of the model, the first is 'dgo', did you mean 'dog'"
    ):
        class_indices(["cat", "dgo"], "x", class_names=CLASSES)


def test_two_classes_of_one_name_are_told_apart_by_exact_spelling_only():
    names = ["Crane", "crane", "owl"]
    assert class_indices(["crane"], "x", class_names=names) == {"crane": 1}
    with pytest.raises(InputError, match="'CRANE'"):
        class_indices(["CRANE"], "x", class_names=names)


def test_a_folder_whose_class_is_there_twice_is_not_guessed():
    with pytest.raises(InputError, match="the first is 'crane'"):
        class_indices(["crane", "owl"], "x", class_names=["crane", "owl", "crane"])
    with pytest.raises(InputError, match=r"data\.class_map lists folder 'cat' twice"):
        class_indices(["cat", "dog"], "x", class_map=["cat", "cat", "dog"])


def test_a_subset_of_imagenet_is_recognised_by_its_numbers():
    found = class_indices(["n01440764", "n02979186", "n03888257"], "x", num_classes=1000)
    assert found == {"n01440764": 0, "n02979186": 482, "n03888257": 701}  # tench, cassette player, parachute
    assert class_indices(["n02979186"], "x", class_names=[f"name {i}" for i in range(1000)]) == {"n02979186": 482}
    with pytest.raises(InputError, match="'n99999999'"):
        class_indices(["n01440764", "n99999999"], "x", num_classes=1000)


def test_all_of_imagenet_needs_no_look_up():
    folders = [f"n{i:08d}" for i in range(1000)]
    assert class_indices(folders, "x", num_classes=1000)["n00000999"] == 999


def test_sorted_order_counts_when_nothing_else_is_known_and_the_number_fits():
    assert class_indices(["b", "a"], "x", num_classes=2) == {"a": 0, "b": 1}
    assert class_indices(["b", "a"], "x") == {"a": 0, "b": 1}
    with pytest.raises(InputError, match=r"x has 2 class folders \(a, b\) and the model 10 classes"):
        class_indices(["b", "a"], "x", num_classes=10)


def test_folders_called_by_number_are_indices_unless_the_order_is_open_to_doubt():
    assert class_indices(["3", "7"], "x", num_classes=10) == {"3": 3, "7": 7}
    with pytest.raises(InputError, match="folder '10' comes before '2'"):
        class_indices([str(i) for i in range(11)], "x", num_classes=11)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.yaml", "dog: 0\ncat: bird\n"),
        ("map.json", json.dumps({"dog": "fish", "cat": 1})),
        ("map.txt", "dog\ncat\n"),
        ("list.yaml", "[dog, cat]"),
    ],
)
def test_a_map_of_classes_is_read_from_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found = class_indices(["cat", "dog"], "x", class_names=["fish", "bird"], class_map=tmp_path / name)
    assert found == {"cat": 1, "dog": 0}


@pytest.mark.parametrize(
    ("class_map", "words"),
    [
        ({"cat": 0}, "says nothing of folder 'dog'"),
        ({"cat": 0, "dog": 3}, "'dog' is mapped to 3, wanted one of its class names or an index below 3"),
        ({"cat": 0, "dog": "wolf"}, "'dog' is mapped to 'wolf'"),
        ({"cat": 0, "dog": -1}, "'dog' is mapped to -1"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(class_map, words):
    with pytest.raises(InputError, match=words):
        class_indices(["cat", "dog"], "x", class_names=CLASSES, class_map=class_map)


@pytest.mark.parametrize("text", ["- {", "cat: [1]", "3", "cat: true", "!!python/object:os.system {}", "\x00"])
def test_a_map_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(InputError, match=r"data.class_map"):
        class_indices(["cat"], "x", class_map=tmp_path / "map.yaml")


# --- unreadable images


def damaged(tmp_path: Path, broken: int, allowed: float) -> ImageSet:
    content = files(10)
    for name in sorted(content)[:broken]:
        content[name] = content[name][:60]
    return open_images(folder(tmp_path / "set", content), class_names=CLASSES, max_unreadable=allowed)


@pytest.mark.parametrize("threads", [0, 3])
def test_unreadable_images_are_left_out_named_and_counted(tmp_path, threads):
    images = damaged(tmp_path, broken=3, allowed=0.1)
    found = list(batches(images, TINY, 8, threads=threads))
    assert [len(x) for x, _ in found] == [8, 8, 8, 3]
    assert np.concatenate([y for _, y in found]).tolist() == [0] * 7 + [1] * 10 + [2] * 10
    assert list(images.unreadable) == ["cat/000.png", "cat/001.JPG", "cat/002.webp"]
    again = list(batches(images, TINY, 8))
    np.testing.assert_array_equal(again[0][0], found[0][0])


def test_too_many_unreadable_images_are_an_error_that_names_three(tmp_path):
    images = damaged(tmp_path, broken=4, allowed=0.1)
    with pytest.raises(InputError, match=r"4 of 30 images cannot be read, at most 3 may be .*cat/000.png \("):
        list(batches(images, TINY, 8))


def test_one_unreadable_image_raises_by_itself(tmp_path):
    with pytest.raises(DamagedFile, match=r"cat/000.png: not an image of a format|cat/000.png: .*truncated"):
        damaged(tmp_path, broken=1, allowed=0.5).image(0)


def test_a_decompression_bomb_is_unreadable_and_no_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "MAX_PIXELS", 1000)
    content = files(10) | {"cat/big.png": encoded(1, size=(40, 40))}
    images = open_images(packed(tmp_path / "a.zip", content), class_names=CLASSES, max_unreadable=0.1)
    assert sum(len(x) for x, _ in batches(images, TINY, 8)) == 30
    assert images.unreadable == {"cat/big.png": "40 x 40 pixels, more than 1,000"}


def test_pillows_own_bomb_check_is_unreadable_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    images = open_images(folder(tmp_path, {"a.png": encoded(0, size=(40, 40))}))
    with pytest.raises(DamagedFile, match="decompression bomb"):
        images.image(0)


def test_a_member_that_claims_to_be_huge_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("vitprune_deploy.data.sources.MAX_FILE_BYTES", 100)
    for name in ("a.zip", "a.tar"):
        images = open_images(packed(tmp_path / name, {"cat/a.png": encoded(0)}))
        with pytest.raises(DamagedFile, match="more than an image may have"):
            images.image(0)


def test_an_image_too_thin_for_the_model_counts_as_unreadable(tmp_path):
    content = files(10) | {"cat/line.png": encoded(0, size=(1, 9000))}
    images = open_images(folder(tmp_path, content), class_names=CLASSES, max_unreadable=0.1)
    large = Preprocess((3, 224, 224))
    assert sum(len(x) for x, _ in batches(images, large, 8)) == 30
    assert "9000 x 1 pixels would become" in images.unreadable["cat/line.png"]


# --- batches


def test_batches_hold_what_the_transform_gives_in_the_order_of_the_set(tmp_path):
    images = open_images(folder(tmp_path, files()), class_names=CLASSES).subset([5, 0, 17, 3])
    (x, y), (rest, _) = batches(images, TINY, 3)
    assert x.shape == (3, 3, 16, 16)
    assert x.dtype == np.float32
    assert y.dtype == np.int64
    assert y.tolist() == [0, 0, 2]
    np.testing.assert_array_equal(x[1], TINY(images.image(1)))
    np.testing.assert_array_equal(rest[0], TINY(images.image(3)))


def test_threads_change_nothing_and_may_be_left_half_way(tmp_path):
    images = open_images(packed(tmp_path / "a.zip", files(20)), class_names=CLASSES)
    alone, together = list(batches(images, TINY, 7)), list(batches(images, TINY, 7, threads=4))
    for (a, la), (b, lb) in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(la, lb)
    for _ in batches(images, TINY, 7, threads=4):
        break


def test_small_sets_are_decoded_once_and_large_ones_are_not_kept(tmp_path):
    root = folder(tmp_path, files(2))
    images = open_images(root, class_names=CLASSES)
    assert images.image(0) is images.image(0)
    small = images_module.Store(images.store.source, cache_bytes=20 * 24 * 3 * 6 - 1)  # one byte short of all six
    assert small.image(0) is not small.image(0)


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz"])
def test_a_set_can_be_sent_to_another_process(tmp_path, kind):
    images = open_images(packed(tmp_path / kind, files(2)), class_names=CLASSES)
    copy = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(np.asarray(copy.image(3)), np.asarray(images.image(3)))


# --- three parts


def parts_of(images: ImageSet, **numbers) -> dict[str, set[str]]:
    wanted = {name: Wanted(images, numbers.get(name)) for name in ("calibration", "recovery", "test")}
    split = split_three(**wanted, seed=numbers.get("seed", 0))
    return {name: {part.name(i) for i in range(len(part))} for name, part in split._asdict().items()}


def test_parts_of_one_source_are_disjoint_of_the_sizes_wanted_and_balanced(tmp_path):
    images = open_images(folder(tmp_path, files(30)), class_names=CLASSES)
    split = split_three(Wanted(images, 15), Wanted(images, 45), Wanted(images, 30), seed=3)
    assert [len(part) for part in split] == [15, 45, 30]
    assert [np.bincount(part.labels).tolist() for part in split] == [[5, 5, 5], [15, 15, 15], [10, 10, 10]]
    names = [part.name(i) for part in split for i in range(len(part))]
    assert len(set(names)) == 90
    for part in split:
        assert all(CLASSES[part.label(i)] == part.name(i).split("/")[0] for i in range(len(part)))


def test_the_draw_depends_on_the_seed_alone(tmp_path):
    images = open_images(folder(tmp_path, files(10)), class_names=CLASSES)
    first = parts_of(images, calibration=9, seed=1)
    assert parts_of(images, calibration=9, seed=1) == first
    assert parts_of(images, calibration=9, seed=2) != first


def test_parts_without_a_number_share_what_is_left(tmp_path):
    images = open_images(folder(tmp_path, files(10)), class_names=CLASSES)
    assert [len(p) for p in parts_of(images, calibration=8).values()] == [8, 11, 11]


def test_more_images_than_there_are_is_an_error(tmp_path):
    images = open_images(folder(tmp_path, files(4)), class_names=CLASSES)
    with pytest.raises(InputError, match="has 12 images, too few for calibration 8, recovery the rest, test 4"):
        parts_of(images, calibration=8, test=4)


def test_an_image_that_is_in_two_sources_is_found_whatever_its_name(tmp_path):
    train = files(6)
    test = files(6, first_seed=50) | {"owl/copy.png": train["cat/003.png"]}
    a = open_images(folder(tmp_path / "train", train), class_names=CLASSES)
    b = open_images(packed(tmp_path / "test.zip", test), class_names=CLASSES)
    with pytest.raises(InputError, match=r"1 images are in more than one .*recovery: cat/003.png; test: owl/copy.png"):
        check_disjoint({"recovery": a, "test": b})
    del test["owl/copy.png"]
    check_disjoint({"recovery": a, "test": open_images(packed(tmp_path / "b.zip", test), class_names=CLASSES)})


def test_the_same_folder_opened_twice_is_no_way_round(tmp_path):
    root = folder(tmp_path, files(4))
    a, b = open_images(root, class_names=CLASSES), open_images(root, class_names=CLASSES)
    with pytest.raises(InputError, match="12 images are in more than one"):
        check_disjoint({"recovery": a, "test": b})
    with pytest.raises(InputError, match="1 images are in more than one"):
        check_disjoint({"recovery": a.subset([0, 1]), "test": a.subset([1, 2])})


def test_files_of_one_length_and_beginning_are_still_told_apart(tmp_path):
    big = Image.new("RGB", (60, 60), "red")
    content = {}
    for value in (1, 2):
        big.putpixel((59, 59), (value, 0, 0))
        file = io.BytesIO()
        big.save(file, "BMP")
        content[f"{value}.bmp"] = file.getvalue()
    a = open_images(folder(tmp_path / "a", {"1.bmp": content["1.bmp"]}))
    b = open_images(folder(tmp_path / "b", {"2.bmp": content["2.bmp"]}))
    check_disjoint({"recovery": a, "test": b})


def section(**other) -> SimpleNamespace:
    part = {"source": None, "split": None, "images": None}
    parts = {name: SimpleNamespace(**part | other.pop(name, {})) for name in ("calibration", "recovery", "test")}
    rest = {"source": None, "root": None, "labelled": "auto", "class_map": None, "max_unreadable": 0.01}
    return SimpleNamespace(**rest | other, **parts)


def test_the_bundled_images_are_ten_thousand_to_test_and_nine_thousand_to_learn_from():
    names = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
    data = section(
        source=str(QUICKSTART),
        calibration={"split": "train", "images": 1000},
        recovery={"split": "train"},
        test={"split": "test"},
    )
    split = open_split(data, class_names=names)
    assert [len(part) for part in split] == [1000, 8000, 10000]
    assert np.bincount(split.test.labels).tolist() == [1000] * 10
    assert np.bincount(split.calibration.labels).tolist() == [100] * 10
    assert names[split.test.label(0)] == "ankle-boot"
    assert split.test.image(0).size == (28, 28)
    assert QUICKSTART.stat().st_size <= 10_000_000


def test_a_profile_without_images_says_which_key_is_missing():
    with pytest.raises(InputError, match=r"set data.source, or data.calibration.source"):
        open_split(section())


# --- training


@pytest.mark.parametrize("preprocess", [TINY, Preprocess((3, 96, 80))])
def test_training_images_vary_by_seed_and_epoch_and_by_nothing_else(tmp_path, preprocess):
    images = open_images(folder(tmp_path, files()), class_names=CLASSES)

    def drawn(seed: int, epoch: int) -> np.ndarray:
        varied = Augmented(images, preprocess, seed=seed)
        varied.set_epoch(epoch)
        return np.stack([varied[i][0] for i in reversed(range(len(varied)))])

    first = drawn(1, 0)
    assert first.shape == (18, *preprocess.input_size)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(drawn(1, 0), first)
    assert not np.array_equal(drawn(1, 1), first)
    assert not np.array_equal(drawn(2, 0), first)
    assert Augmented(images, preprocess)[17][1] == 17


def test_small_images_are_shifted_by_whole_pixels_or_mirrored(tmp_path):
    images = open_images(folder(tmp_path, files()), class_names=CLASSES)
    plain = TINY.pixels(images.image(0)).astype(int)
    padded = np.pad(plain, ((1, 1), (1, 1), (0, 0)), mode="edge")
    views = [padded[i : i + 16, j : j + 16] for i in range(3) for j in range(3)]
    views += [view[:, ::-1] for view in views]
    seen = set()
    for epoch in range(60):
        varied = Augmented(images, TINY)
        varied.set_epoch(epoch)
        x = varied[0][0]
        matches = [
            i for i, view in enumerate(views) if np.array_equal(TINY.normalise(view[None].astype(np.uint8))[0], x)
        ]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 12  # of 18 equally likely views in 60 draws


def test_large_images_are_cut_out_in_the_shape_of_the_input():
    """A picture whose red is its column and whose green is its row shows which piece was taken."""
    y, x = np.mgrid[0:200, 0:250]
    picture = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    store = SimpleNamespace(image=lambda _: picture, source=None, unreadable={})
    images = ImageSet(store, np.arange(1), None, 0.0)
    wide = Preprocess((3, 80, 100), interpolation="bilinear", mean=(0.0,) * 3, std=(1 / 255,) * 3)
    for epoch in range(20):
        varied = Augmented(images, wide)
        varied.set_epoch(epoch)
        piece, index = varied[0]
        width = abs(piece[0, 0, -1] - piece[0, 0, 0]) * 100 / 99
        height = abs(piece[1, -1, 0] - piece[1, 0, 0]) * 80 / 79
        assert index == 0
        assert 0.75 < width * height / (250 * 200) < 1.05  # 0.8 to 1 of the largest piece of that shape, here all
        assert 0.85 < (width / 100) / (height / 80) < 1.15


def test_without_variation_the_evaluation_view_comes(tmp_path):
    images = open_images(folder(tmp_path, files()), class_names=CLASSES)
    np.testing.assert_array_equal(Augmented(images, TINY, augment=False)[7][0], TINY(images.image(7)))


def test_torch_loads_training_images_in_worker_processes(tmp_path):
    images = open_images(packed(tmp_path / "a.zip", files()), class_names=CLASSES)
    images.image(0)  # the archive is open before the workers are forked
    data = Augmented(images, TINY)
    loader = torch.utils.data.DataLoader(data, batch_size=6, num_workers=2)
    x = torch.cat([x for x, _ in loader])
    assert x.shape == (18, 3, 16, 16)
    assert torch.equal(x[11], torch.from_numpy(data[11][0]))


def test_an_unreadable_training_image_is_replaced_by_the_next(tmp_path):
    data = Augmented(damaged(tmp_path, broken=2, allowed=0.1), TINY, augment=False)
    np.testing.assert_array_equal(data[0][0], data[2][0])
    assert data[0][1] == 2
    with pytest.raises(InputError, match="cannot be read"):
        Augmented(damaged(tmp_path, broken=9, allowed=0.1), TINY)[0]


def test_a_few_picked_images_may_lie_beside_unreadable_ones_which_the_log_names(tmp_path, caplog):
    content = files()
    content["cat/001.JPG"] = b"cut off"
    images = open_images(folder(tmp_path, content), class_names=CLASSES, max_unreadable=0.1)
    with caplog.at_level("INFO"):
        pixels, indices = picked(images, TINY, [0, 1, 2])
    assert indices == [0, 2, 2]
    np.testing.assert_array_equal(pixels[1], TINY(images.image(2)))
    assert caplog.messages == [f"{tmp_path}: cat/001.JPG is left out: not an image of a format that Pillow reads"]
    images.max_unreadable = 0.0
    with pytest.raises(InputError, match="1 of 18 images cannot be read"):
        picked(images, TINY, [1])


def test_when_no_training_image_can_be_read_the_search_for_one_ends(tmp_path):
    root = folder(tmp_path, {f"{i}.png": encoded(0, size=(1, 9000)) for i in range(5)})
    with pytest.raises(InputError, match="5 of 5 images cannot be read, at most 4 may be"):
        Augmented(open_images(root, max_unreadable=0.99), Preprocess((3, 224, 224)), augment=False)[2]
