"""Every kind of data through the one door, offline, against NumPy, Pillow and scikit-learn."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import sklearn.datasets
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, config
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image
from pyarrow.lib import ArrowInvalid

from metalearn.base import Source
from metalearn.tasks import sources
from metalearn.tasks.decoding import as_image
from metalearn.tasks.examples import PARTS, moments, part_rows
from metalearn.tasks.sources import ImageSource, TableSource, open_dataset
from metalearn.tasks.synthetic import RandomSource
from metalearn.tasks.text import TextSource

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "decoded"))
    monkeypatch.delenv("METALEARN_DATA", raising=False)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    monkeypatch.chdir(tmp_path)


def pixels(num_images: int = 12, size: int = 4, seed: int = 0) -> np.ndarray:
    """(N, H, W) bytes; the first pixel is constant."""
    images = np.random.default_rng(seed).integers(0, 256, (num_images, size, size), dtype=np.uint8)
    images[:, 0, 0] = 7
    return images


def image_dataset(images: np.ndarray | None = None) -> Dataset:
    images = pixels() if images is None else images
    content = {"image": [Image.fromarray(image) for image in images], "label": [i % 3 for i in range(len(images))]}
    return Dataset.from_dict(content, features=Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)}))


def parquet_folder(folder: Path, images: np.ndarray | None = None) -> Path:
    """Files of a "train" and a "test" split, as the hub has them."""
    folder.mkdir(parents=True)
    image_dataset(images).to_parquet(folder / "train-00000-of-00001.parquet")
    image_dataset(pixels(6, seed=1)).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def table_rows() -> list[dict[str, float | str]]:
    values = np.random.default_rng(2).normal(size=(20, 2)) * [1.0, 1000.0]
    return [{"width": float(a), "height": float(b), "species": NAMES[i % 3]} for i, (a, b) in enumerate(values)]


def all_rows(source: ImageSource | TableSource) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [source.read(part) for part in PARTS]
    return torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts])


# Kinds of data: the same images by every way must give the same parts.


def _in_memory(_: Path) -> Dataset:
    return image_dataset()


def _dataset_dict(_: Path) -> DatasetDict:
    return DatasetDict({"train": image_dataset(), "test": image_dataset(pixels(6, seed=1))})


def _parquet(folder: Path) -> str:
    return str(parquet_folder(folder / "parquet"))


def _parquet_file(folder: Path) -> str:
    return str(parquet_folder(folder / "parquet") / "train-00000-of-00001.parquet")


def _saved(folder: Path) -> str:
    image_dataset().save_to_disk(folder / "saved")
    return str(folder / "saved")


def _saved_dict(folder: Path) -> str:
    _dataset_dict(folder).save_to_disk(folder / "saved")
    return str(folder / "saved")


def _json(folder: Path) -> str:
    rows = [{"image": image.tolist(), "label": NAMES[i % 3]} for i, image in enumerate(pixels())]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder / "rows.jsonl")


def _npz(folder: Path) -> str:
    np.savez(folder / "rows.npz", x=pixels(), y=np.array(NAMES)[np.arange(12) % 3])
    return str(folder / "rows.npz")


@pytest.mark.parametrize("make", [_dataset_dict, _parquet, _parquet_file, _saved, _saved_dict, _json, _npz])
def test_matches_in_memory_images(make, tmp_path: Path) -> None:
    expected, source = ImageSource(image_dataset(), validation=0.25), ImageSource(make(tmp_path), validation=0.25)
    for part in PARTS:
        assert torch.equal(source.read(part).inputs, expected.read(part).inputs)
        assert torch.equal(source.read(part).targets, expected.read(part).targets)
    assert source.class_names == tuple(NAMES) and source.num_classes == 3 and source.image_shape == (1, 4, 4)


def test_matches_numpy_parts_of_images() -> None:
    images, source = pixels().reshape(12, 16), ImageSource(image_dataset(), test=0.25, validation=1 / 3, seed=5)
    rows = part_rows(12, 0.25, 1 / 3, 5)
    assert {part: len(numbers) for part, numbers in rows.items()} == {"train": 6, "validation": 3, "test": 3}
    train = images[rows["train"]].astype(np.float64)
    deviation = np.sqrt(((train - train.mean(0)) ** 2).mean())
    for part in PARTS:
        inputs, targets = source.read(part)
        np.testing.assert_allclose(inputs, (images[rows[part]] - train.mean(0)) / deviation, rtol=1e-4, atol=1e-6)
        assert targets.dtype == torch.int64 and targets.tolist() == (rows[part] % 3).tolist()
        assert inputs.dtype == torch.float32


def test_reads_class_folders_of_images(tmp_path: Path) -> None:
    for i, image in enumerate(pixels()):
        folder = tmp_path / "folder" / "train" / NAMES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    lone = tmp_path / "folder" / "test" / "cat"
    lone.mkdir(parents=True)
    Image.fromarray(pixels()[2]).save(lone / "lone.png")
    source = ImageSource(str(tmp_path / "folder"), test=0.0, validation=0.25)
    assert source.class_names == tuple(NAMES)
    assert sorted(torch.cat([source.read(part).targets for part in PARTS[:2]]).tolist()) == [0] * 4 + [1] * 4 + [2] * 4


def test_labels_of_a_test_split_go_by_name() -> None:
    other = image_dataset().cast_column("label", ClassLabel(names=NAMES)).map(lambda row: {"label": 2 - row["label"]})
    other = other.cast_column("label", Value("int64")).cast_column("label", ClassLabel(names=NAMES[::-1]))
    source = ImageSource(DatasetDict({"train": image_dataset(), "test": other}), test="test")
    assert source.read("test").targets.tolist() == [0, 1, 2] * 4


# Parts.


@given(st.integers(0, 200), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 2**32))
def test_parts_are_disjoint_and_complete(num_rows: int, test: float, validation: float, seed: int) -> None:
    rows = part_rows(num_rows, test, validation, seed)
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(num_rows))
    assert len(rows["test"]) == round(test * num_rows)


def test_parts_depend_on_the_seed_alone() -> None:
    def targets(seed: int) -> list[int]:
        return TableSource("iris", seed=seed).read("train").targets.tolist()

    assert targets(0) == targets(0) != targets(1)


def test_a_row_stays_in_its_part_for_any_classes() -> None:
    whole, few = TableSource("iris", normalise="scalar"), TableSource("iris", normalise="scalar", classes=[2, 0])
    for part in PARTS:
        assert few.read(part).targets.tolist() == [{2: 0, 0: 1}[t] for t in whole.read(part).targets.tolist() if t != 1]


def test_separate_test_split_is_sealed(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "data")
    (folder / "test-00000-of-00001.parquet").write_bytes(b"not parquet: whoever opens this fails")
    source = ImageSource(str(folder), test="test")
    assert len(source.read("train").targets) == 11 and len(source.read("validation").targets) == 1
    source.fingerprint()
    with pytest.raises(ArrowInvalid):
        source.read("test")


def test_separate_test_split_leaves_all_rows_to_the_others(tmp_path: Path) -> None:
    source = ImageSource(str(parquet_folder(tmp_path / "data")), test="test", validation=0.25, normalise="scalar")
    train = pixels()[part_rows(12, 0.0, 0.25, 0)["train"]]
    expected = (pixels(6, seed=1).reshape(6, 16) - train.mean()) / train.std()
    np.testing.assert_allclose(source.read("test").inputs, expected, rtol=1e-4, atol=1e-6)


def test_matches_slices_of_rows() -> None:
    dataset = Dataset.from_dict({"number": range(40)})
    assert open_dataset(dataset, split="train[:10%]")["number"][:] == [0, 1, 2, 3]
    assert open_dataset(dataset, split="train[-2:]+train[:1]")["number"][:] == [38, 39, 0]
    with pytest.raises(ValueError, match="rows twice"):
        open_dataset(dataset, split="train[:10]+train[9:]")


# Normalisation, classes, decoding.


@pytest.mark.parametrize("offset", [0.0, 0.1, 1e6])
def test_matches_numpy_moments(offset: float) -> None:
    values = np.random.default_rng(0).normal(size=(43, 3)) * [1, 10, 0] + offset  # the mean of 43 times 0.1 is not 0.1
    inputs = torch.from_numpy(values)
    centred = values - values.mean(0)
    expected = {
        "scalar": (values - values.mean()) / values.std(),
        "per_pixel": centred / np.sqrt((centred**2).mean()),
        "largest": values / np.abs(values).max(),
        "per_feature": np.concatenate([centred[:, :2] / values.std(0)[:2], np.zeros((43, 1))], axis=1),
    }
    for normalise, result in expected.items():
        mean, std = moments(inputs, normalise)
        np.testing.assert_allclose((inputs - mean) / std, result, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("normalise", ["scalar", "per_pixel"])
def test_constant_images_become_zero(normalise: str) -> None:
    source = ImageSource(image_dataset(np.full((12, 4, 4), 9, dtype=np.uint8)), normalise=normalise)
    assert not source.read("train").inputs.any() and not source.read("test").inputs.any()


@pytest.mark.parametrize("classes", [[2, 0], ["cat", "ant"]])
def test_classes_are_relabelled_in_the_order_given(classes: list) -> None:
    source = ImageSource(image_dataset(), classes=classes)
    expected = [{2: 0, 0: 1}[row % 3] for row in part_rows(12, 0.2, 0.1, 0)["train"] if row % 3 != 1]
    assert source.read("train").targets.tolist() == expected
    assert source.class_names == ("cat", "ant") and source.num_classes == 2


def test_number_of_a_class_is_its_name_where_names_are_numbers() -> None:
    dataset = Dataset.from_dict({"a": range(12), "label": [10, 20, 30] * 4})
    assert TableSource(dataset, classes=[30, 10]).class_names == ("30", "10")
    with pytest.raises(ValueError, match=r"classes has \[0\]; accepted: 10, 20, 30"):
        _ = TableSource(dataset, classes=[0]).class_names


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (None, "RGB")])
def test_matches_pillow(channels: int | None, mode: str) -> None:
    colours = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 7, 3), dtype=np.uint8)) for i in range(5)]
    features = Features({"img": ImageFeature(), "label": Value("string")})
    dataset = Dataset.from_dict({"img": colours, "label": list("aabba")}, features=features)
    source = ImageSource(dataset, image_size=4, channels=channels, test=0.0, validation=0.0, normalise="scalar")
    resized = [image.convert(mode).resize((4, 4), Image.Resampling.BILINEAR) for image in colours]
    bytes_ = np.stack([np.atleast_3d(np.asarray(image)) for image in resized])
    expected = bytes_[part_rows(5, 0.0, 0.0, 0)["train"]].transpose(0, 3, 1, 2).reshape(5, -1)
    np.testing.assert_allclose(
        source.read("train").inputs, (expected - bytes_.mean()) / bytes_.std(), rtol=1e-4, atol=1e-5
    )


def test_arrays_of_any_channel_order_are_images() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (5, 6, 3))
    for array in (colour, colour.transpose(2, 0, 1)):
        assert np.array_equal(np.asarray(as_image(array, "x")), colour)
    assert np.array_equal(np.asarray(as_image(colour[None, :, :, 0], "x")), colour[:, :, 0])
    for wrong in (colour / 255, colour + 200, colour[:, :, :2]):
        with pytest.raises(ValueError, match="column 'x' holds"):
            as_image(wrong, "x")


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, decoded = str(parquet_folder(tmp_path / "data")), []
    original = sources.decode_images
    monkeypatch.setattr(sources, "decode_images", lambda *args: decoded.append(args[1:]) or original(*args))
    first = ImageSource(folder, seed=0)
    parts = [first.read(part) for part in PARTS]
    assert all(first.read(part).inputs is read.inputs for part, read in zip(PARTS, parts, strict=True))
    ImageSource(folder, seed=1, normalise="scalar", classes=[1]).read("train")
    assert decoded == [(None, None)]
    ImageSource(folder, image_size=2).read("train")
    assert decoded == [(None, None), (2, None)]
    assert not [path for path in (tmp_path / "decoded").iterdir() if path.suffix != ".safetensors"]


def test_images_of_different_size_need_image_size() -> None:
    images = [Image.new("L", (size, size)) for size in (3, 3, 4)]
    dataset = Dataset.from_dict({"image": images, "label": [0, 1, 0]})
    with pytest.raises(ValueError, match=r"\(1, 3, 3\) and \(1, 4, 4\)"):
        ImageSource(dataset).read("train")
    assert ImageSource(dataset, image_size=3, test=0.0, validation=0.0).read("train").inputs.shape == (3, 9)


# Tables.


def _csv(folder: Path) -> str:
    Dataset.from_list(table_rows()).to_csv(folder / "rows.csv", index=False)
    return str(folder / "rows.csv")


def _headless_csv(folder: Path) -> str:
    Dataset.from_list(table_rows()).to_csv(folder / "rows.csv", index=False, header=False)
    return str(folder / "rows.csv")


def _json_table(folder: Path) -> str:
    (folder / "rows.json").write_text(json.dumps(table_rows()))
    return str(folder / "rows.json")


@pytest.mark.parametrize("make", [_csv, _headless_csv, _json_table])
def test_matches_numpy_tables(make, tmp_path: Path) -> None:
    source = TableSource(make(tmp_path), header=make is not _headless_csv)
    values = np.array([[row["width"], row["height"]] for row in table_rows()])
    rows = part_rows(20, 0.2, 0.1, 0)
    train = values[rows["train"]]
    for part in PARTS:
        inputs, targets = source.read(part)
        np.testing.assert_allclose(inputs, (values[rows[part]] - train.mean(0)) / train.std(0), rtol=1e-5, atol=1e-6)
        assert [NAMES[target] for target in targets] == [table_rows()[row]["species"] for row in rows[part]]


def test_csv_without_header_does_not_lose_a_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="header=False"):
        TableSource(_headless_csv(tmp_path)).read("train")


def test_matches_chosen_columns_and_regression() -> None:
    source = TableSource(
        Dataset.from_list(table_rows()), feature_columns=["height"], target_column="width", task="regression"
    )
    targets = source.read("train").targets
    rows = part_rows(20, 0.2, 0.1, 0)["train"]
    np.testing.assert_array_equal(targets, np.array([table_rows()[row]["width"] for row in rows], dtype=np.float32))
    assert source.num_features == 1 and source.num_classes == 1 and source.class_names == ()


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer", "diabetes", "digits"])
def test_matches_scikit_learn(name: str) -> None:
    bundled = getattr(sklearn.datasets, f"load_{name}")()
    task = "regression" if name == "diabetes" else "classification"
    inputs, targets = all_rows(TableSource(name, task=task, normalise="scalar"))
    order = np.concatenate(list(part_rows(len(bundled.data), 0.2, 0.1, 0).values()))
    np.testing.assert_array_equal(targets, bundled.target[order].astype(np.float32))
    # An affine map of the data, one for all columns.
    assert np.corrcoef(inputs.numpy().ravel(), bundled.data[order].ravel())[0, 1] == pytest.approx(1.0, abs=1e-6)


def test_digits_are_images_too() -> None:
    as_images, as_table = ImageSource("digits", normalise="scalar"), TableSource("digits", normalise="scalar")
    torch.testing.assert_close(as_images.read("test").inputs, as_table.read("test").inputs)
    assert as_images.image_shape == (1, 8, 8)


@pytest.mark.parametrize("names", [("x", "y"), ("embeddings", "labels"), None])
def test_matches_npz_arrays(names: tuple[str, str] | None, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    inputs, targets = generator.normal(size=(30, 6)).astype(np.float32), generator.normal(size=30).astype(np.float32)
    arrays = {names[0]: inputs, names[1]: targets} if names else {"data": np.column_stack([inputs, targets])}
    np.savez(str(tmp_path / "rows.npz"), allow_pickle=False, **arrays)
    read, values = all_rows(TableSource(str(tmp_path / "rows.npz"), task="regression", normalise="per_feature"))
    rows = part_rows(30, 0.2, 0.1, 0)
    order, train = np.concatenate(list(rows.values())), inputs[rows["train"]]
    np.testing.assert_allclose(read, ((inputs - train.mean(0)) / train.std(0))[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(values, targets[order])


# Text, random.


def test_text_is_cut_in_its_own_order(tmp_path: Path) -> None:
    lines = [f"line {i}" if i % 4 else "" for i in range(20)]
    (tmp_path / "input.txt").write_text("\n".join(lines))
    for source in (TextSource(str(tmp_path / "input.txt")), TextSource(Dataset.from_dict({"text": lines}))):
        parts = [source.read(part) for part in PARTS]
        assert [len(part) for part in parts] == [14, 2, 4]
        assert [line for part in parts for line in part] == lines


def test_tokens_files_are_splits(tmp_path: Path) -> None:
    (tmp_path / "wiki").mkdir()
    for name, word in {"wiki.valid.tokens": "valid", "wiki.test.tokens": "test"}.items():
        (tmp_path / "wiki" / name).write_text(f"{word}\n" * 10)
    source = TextSource(str(tmp_path / "wiki"), split="validation", test="test", validation=0.5)
    assert source.read("train") == ("valid",) * 5 and source.read("test") == ("test",) * 10


def test_random_source_repeats_one_set() -> None:
    source = RandomSource(num_examples=2000, num_features=50, num_classes=4, seed=3)
    inputs, targets = source.read("train")
    assert all(torch.equal(source.read(part).inputs, inputs) for part in PARTS) and source.repeat
    assert inputs.shape == (2000, 50) and abs(inputs.mean()) < 0.02 and abs(inputs.std() - 1) < 0.02
    assert (torch.bincount(targets, minlength=4) > 400).all()
    assert source.fingerprint() != RandomSource(num_examples=2000, num_features=50, num_classes=4).fingerprint()


# Where data are found.


def test_bare_name_is_never_a_folder_of_the_working_directory(tmp_path: Path) -> None:
    parquet_folder(tmp_path / "mnist")
    parquet_folder(tmp_path / "insects")
    for name in ("mnist", "insects"):
        with pytest.raises(ValueError, match="no data set of that name"):
            open_dataset(name)
    assert len(open_dataset("./mnist")) == 12 and len(open_dataset(tmp_path / "mnist")) == 12


def test_names_are_found_in_metalearn_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALEARN_DATA", str(tmp_path / "shelf"))
    parquet_folder(tmp_path / "shelf" / "mnist")
    assert len(open_dataset("mnist", split="test")) == 6
    assert len(open_dataset("mnist/test-00000-of-00001.parquet")) == 6


def test_cached_hub_set_is_read_offline(tmp_path: Path) -> None:
    file, commit = parquet_folder(tmp_path / "data") / "train-00000-of-00001.parquet", "a" * 40
    builder = datasets.load_dataset_builder("parquet", data_files={"train": str(file)})
    builder = type(builder)(dataset_name="insects", config_id="default", data_files=builder.config.data_files)
    builder.download_and_prepare(str(tmp_path / "arrow" / "someone___insects" / "default" / "0.0.0" / commit))
    for revision in (None, commit):
        assert open_dataset("someone/insects", revision=revision)["label"][:] == [0, 1, 2] * 4
    with pytest.raises(ValueError, match=f"revision is 'v2'.*{commit}"):
        open_dataset("someone/insects", revision="v2")


_OFFLINE = """
import time
from metalearn.tasks.sources import open_dataset
import datasets
start = time.perf_counter()
try:
    open_dataset("mnist")
except ValueError as error:
    print(time.perf_counter() - start)
    print(error)
"""


@pytest.mark.parametrize(
    "variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_DATASETS_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_fails_at_once_without_network(variables: dict[str, str], tmp_path: Path) -> None:
    dropped = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "METALEARN_DATA", "http_proxy", "HTTP_PROXY"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= variables | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", _OFFLINE], env=environment, capture_output=True, text=True, check=True)
    seconds, message = run.stdout.split("\n", 1)
    assert float(seconds) < 2
    for words in ("'mnist'", "ylecun/mnist", "$METALEARN_DATA/mnist", "absolute path", "go online once"):
        assert words in message


def test_a_silent_host_costs_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)

    def hang(*args: object, **options: object) -> None:
        time.sleep(30)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", hang)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="did not answer within 1 s"):
        open_dataset("someone/absent")
    assert time.perf_counter() - start < 2


# Fingerprints.


def test_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    original, copied = parquet_folder(tmp_path / "a"), parquet_folder(tmp_path / "b")
    changed_pixels = pixels()
    changed_pixels[3, 1, 1] ^= 1
    changed = parquet_folder(tmp_path / "c", changed_pixels)
    source = ImageSource(str(original), test="test")
    before = source.fingerprint()
    source.read("test")
    assert source.fingerprint() == before == ImageSource(str(copied), test="test").fingerprint()
    others = [ImageSource(str(changed), test="test"), ImageSource(str(original)), ImageSource(str(original), seed=1)]
    assert len({before, *(other.fingerprint() for other in others)}) == 4


def test_fingerprint_is_equal_across_processes(tmp_path: Path) -> None:
    folder = str(parquet_folder(tmp_path / "data"))
    program = f"from metalearn.tasks.sources import ImageSource; print(ImageSource({folder!r}).fingerprint())"
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "METALEARN_CACHE": str(tmp_path / "other")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ImageSource(folder).fingerprint()


def test_a_rewritten_file_is_decoded_again(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "data")
    before = ImageSource(str(folder)).fingerprint()
    image_dataset(pixels(seed=9)).to_parquet(folder / "train-00000-of-00001.parquet")
    assert ImageSource(str(folder)).fingerprint() != before


# Building from YAML, and refusals.


@pytest.mark.parametrize("class_path", ["metalearn.tasks.sources.ImageSource", "ImageSource"])
def test_is_built_from_yaml(class_path: str, tmp_path: Path) -> None:
    init_args = "{path: digits, classes: [0, 1, 2, 3, 4], test: 0.25}"
    (tmp_path / "run.yaml").write_text(f"source:\n  class_path: {class_path}\n  init_args: {init_args}\n")
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--source", type=Source)
    source = parser.instantiate(parser.parse_args(["--config", str(tmp_path / "run.yaml")])).source
    assert isinstance(source, ImageSource) and source.test == 0.25 and source.classes == [0, 1, 2, 3, 4]
    assert source.num_classes == 5 and len(source.read("train").targets) > 500


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageSource("digits", test=1.0), "test is 1.0; accepted: 0 <= test < 1"),
        (lambda: ImageSource("digits", validation=-0.1), "validation is -0.1"),
        (lambda: ImageSource("digits", test="train[90%:]"), "test is 'train"),
        (lambda: ImageSource("digits", normalise="none"), "accepted: 'scalar', 'per_pixel', 'largest'"),
        (lambda: ImageSource("digits", channels=2), "channels is 2; accepted: None, 1, 3"),
        (lambda: ImageSource("digits", image_size=0), "image_size is 0"),
        (lambda: TableSource("iris", task="ranking"), "task is 'ranking'"),
        (lambda: RandomSource(num_examples=0), "num_examples is 0"),
        (lambda: ImageSource("digits", label_column="digit").read("train"), "accepted: image, label"),
        (lambda: ImageSource("digits", classes=[11]).read("train"), r"classes has \[11\]; accepted: 0, 1, 2"),
        (lambda: ImageSource("digits", classes=[1, 1]).read("train"), "each at most once"),
        (lambda: ImageSource("digits", validation=0.0).read("validation"), "part 'validation' is empty"),
        (lambda: ImageSource("digits").read("all"), "accepted: 'train', 'validation', 'test'"),
        (lambda: ImageSource("digits", test="test").read("test"), "accepted: train"),
        (lambda: ImageSource("digits", split="train[:ten]").read("train"), "split is 'train"),
        (lambda: ImageSource("digits", revision="v1").read("train"), "revision is 'v1'"),
        (lambda: ImageSource("iris").read("train"), "image_column is None; accepted: sepal"),
        (lambda: TableSource("diabetes", target_column="bmi").read("train"), "fractional"),
        (lambda: TableSource("wine", feature_columns=["label"]).read("train"), "accepted: alcohol"),
        (lambda: TableSource("/absent/rows.csv").read("train"), "does not exist"),
        (lambda: TableSource(Dataset.from_list(table_rows()), target_column="width").read("train"), r"\['species'\]"),
        (lambda: TableSource(Dataset.from_dict({"a": [1, None], "y": [0, 1]})).read("train"), r"columns \['a'\]"),
        (lambda: TableSource(Dataset.from_dict({"a": [1, 2], "y": ["b", None]})).read("train"), "without a label"),
        (lambda: TextSource("iris").read("train"), "none holds text"),
    ],
)
def test_refuses_with_value_and_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_test_split_that_is_not_there_is_noticed_before_it_is_read() -> None:
    with pytest.raises(ValueError, match=r"test 'tset', but 'digits' has no \['tset'\]; accepted: train"):
        ImageSource(path="digits", test="tset").read("train")
