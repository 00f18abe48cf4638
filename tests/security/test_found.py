"""What fuzzing has found: each kind of it as a plain test."""

import json
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from child_process import run_child
from hostile_media import wav
from PIL import Image
from samples import sounds, tables
from tiny import make_config, make_image, make_image_processor, make_model, make_processor, make_tokenizer
from transformers import AutoModel, BertConfig, CLIPImageProcessor, WhisperFeatureExtractor

from mm_transformers import (
    Classification,
    MMDataCollator,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)
from mm_transformers.analysis.task_comparison import run_comparison
from mm_transformers.cli.metrics_table import print_metrics
from mm_transformers.data import parquet_sizes
from mm_transformers.data.loading import load_files
from mm_transformers.data.tables import TableRows
from mm_transformers.model.audio import AudioError, load_audio
from mm_transformers.model.video import VideoError, load_frames


def sentence(kind, read, *args, **kwargs) -> str:
    with pytest.raises(kind) as info:
        read(*args, **kwargs)
    message = str(info.value)
    assert "\n" not in message
    assert len(message) < 1500
    return message


# Tables


def test_errors_of_parquet_are_one_line(tmp_path):
    content = tables()[".parquet"]
    path = tmp_path / "rows.parquet"
    path.write_bytes(content[:163] + b"\0" + content[164:])  # in the header of a page
    assert "cannot be read as Parquet" in sentence(ValueError, lambda: list(TableRows(path)))


@pytest.mark.parametrize("content", ["a\0b,topic\nx,y\n", '{"a\\u0000b": 1}\n'], ids=["csv", "json"])
def test_a_zero_byte_in_the_name_of_a_column(tmp_path, content):
    path = tmp_path / ("rows.csv" if "," in content else "rows.jsonl")
    path.write_text(content)
    assert "the name of a column has a zero byte" in sentence(ValueError, TableRows, path)
    sentence(ValueError, load_files, {"train": str(path)}, (), cache_dir=str(tmp_path / "cache"))


# Cells


@pytest.mark.parametrize("cast", [3, "L", [1], {3: "L", "x": 1}])
def test_options_of_casts_that_are_none(cast):
    """A cell may hold anything, also where a data set would have put its options."""
    picture = {"bytes": None, "path": "nowhere.png", "cast": cast}
    for column, cell in (("image", picture), ("video", picture)):
        collator = MMDataCollator(make_processor(), make_config())
        assert f"column '{column}'" in sentence(ValueError, collator, [{"text": "a", column: cell}])


def test_a_number_is_no_video():
    for video in (np.array(3), torch.tensor(3.0)):
        sentence(VideoError, load_frames, video, 2)


def test_an_array_in_the_place_of_a_text_is_told_in_one_line():
    collator = MMDataCollator(make_processor(), make_config())
    for cell in (torch.zeros(2, 3), np.zeros((2, 3))):
        for column in ("text", "topic", "score", "tags"):
            sentence(ValueError, collator, [{"text": "a", column: cell}])


# Media


def test_a_damaged_sound_prints_no_traceback(monkeypatch):
    """libsndfile calls back into Python, where nothing can catch an error."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    for content in (*sounds().values(), wav()):
        for place in range(0, min(len(content), 120), 2):
            for value in (b"\xff\xff", b"\x80\x00"):
                damaged = content[:place] + value + content[place + 2 :]
                try:
                    load_audio(damaged, 16_000)
                except AudioError:
                    continue
    assert not printed


# Checkpoints


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer_config.json", {"model_max_length": {"a": 1}}), ("tokenizer_config.json", {"model_max_length": -3}),
        ("processor_config.json", {"num_frames": -5}),
        ("processor_config.json", {"num_frames": "many"}),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_a_processor_have_types(tmp_path, name, changes):
    make_processor().save_pretrained(tmp_path)
    values = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps({**values, **changes}))
    sentence((ValueError, OSError), MMTransformerProcessor.from_pretrained, tmp_path)


@pytest.mark.parametrize("option", [{"rescale_factor": "x"}, {"image_mean": {}}, {"size": {}}])
def test_settings_with_which_an_image_processor_fails(option):
    image_processor = make_image_processor()
    for name, value in option.items():
        setattr(image_processor, name, value)
    processor = MMTransformerProcessor(image_processor=image_processor, tokenizer=make_tokenizer())
    message = sentence(ValueError, processor, text=["a"], images=[make_image()])
    assert "The image processor fails with its settings" in message


def test_an_unknown_image_processor_is_told_without_all_that_are_known(tmp_path):
    make_processor().save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"] = {"size": 3}
    path.write_text(json.dumps(values))
    sentence((ValueError, OSError), MMTransformerProcessor.from_pretrained, tmp_path)


def test_a_processor_that_lacks_what_its_model_takes():
    collator = MMDataCollator(make_processor(), make_config(audio="wav2vec2"))
    message = sentence(ValueError, collator, [{"text": "a", "audio": wav()}])
    assert "column 'audio': This processor has no feature extractor, but got sound" in message
    assert collator([{"text": "a"}])


def test_a_header_of_weights_is_not_shown_whole(tmp_path):
    header = json.dumps({"a": {"dtype": "F32" * 3000, "shape": [1], "data_offsets": [0, 4]}}).encode()
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    message = sentence(OSError, MMTransformerForMultiTask.from_pretrained, tmp_path)
    assert "is damaged or cut short (" in message


def config(**changes):
    return {**json.loads(make_config().to_json_string(use_diff=False)), **changes}


def nested(depth: int):
    value = 3
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "values",
    [
        config(tasks=[{"kind": nested(300), "name": "a"}]), config(tasks=[{"kind": "regression", "name": nested(300)}]),
        config(tasks=[{"kind": "classification", "name": "a", "labels": [[], "b"]}]),
        config(tasks=[{"kind": "classification", "name": "a", "labels": {str(i): i for i in range(999)}}]),
    ],
    ids=lambda values: str(values.get("tasks", values))[:50],
)  # fmt: skip
def test_values_of_configs_are_told_in_short(values):
    sentence(ValueError, MMTransformerConfig.from_dict, values)


def test_labels_are_texts_wherever_a_config_names_them():
    read = MMTransformerConfig.from_dict(
        config(tasks=[{"kind": "classification", "name": "a", "labels": [None, 3, "b"]}])
    )
    assert read.id2label == {0: "None", 1: "3", 2: "b"}
    assert read.get_tasks()["a"].labels == ["None", "3", "b"]
    assert str(read)  # transformers sorts the names
    with pytest.raises(ValueError, match=r"a label must be a name, but is \[\]"):
        Classification("a", labels=[[], "b"])


# States


@pytest.mark.parametrize(
    "runs", [{"a": 3}, {"a": {"0": None}}, {"a": {"0": {"a": None}}}, {"a": {"0": {"a": {"f1": "x"}}}}, {"a": []}]
)  # fmt: skip
def test_comparisons_of_another_form(tmp_path, runs):
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"settings": {}, "runs": runs}))
    message = sentence(ValueError, run_comparison, lambda tasks, seed: {}, ["a", "b"], [0], path, {})
    assert "comparison.json is damaged" in message


def test_metrics_that_are_no_numbers_are_not_shown(capsys):
    values = {"eval_topic_f1": 0.25, "eval_topic_a": None, "eval_topic_b": "x", "eval_topic_c": 10**400}
    print_metrics({"test": values}, {"test": "eval"}, ["topic"])
    shown = capsys.readouterr().out
    assert "0.25" in shown
    assert not any(f" {name} " in shown for name in "abc")


def test_a_column_of_parquet_that_is_far_larger_than_the_file(tmp_path, monkeypatch):
    from mm_transformers import Limits

    monkeypatch.setattr("mm_transformers.model.limits._current", Limits(file_bytes=1_000_000))
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"topic": ["a"], "text": ["x" * 5_000_000]})
    for compression, refused in (("zstd", True), ("none", False)):
        pyarrow.parquet.write_table(table, path, compression=compression, use_dictionary=False)
        if refused:
            message = sentence(ValueError, TableRows, path)
            assert "column 'text' has 5,000," in message
            assert "more than the limit file_bytes=1,000,000" in message
        else:
            assert len(list(TableRows(path))) == 1


def test_settings_of_a_processor_do_not_take_memory(tmp_path):
    processor = make_processor()
    processor.tokenizer.init_kwargs |= {"padding": "max_length", "max_length": 20_000_000}
    assert processor(text=["a b"])["input_ids"].shape[1] < 9
    make_processor().save_pretrained(tmp_path)
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1200)
    extractor.save_pretrained(tmp_path / "audio")
    with pytest.raises(OSError, match=r"n_samples=19200000 is longer than the limit audio_seconds=600"):
        MMTransformerProcessor.from_encoders(text=save_text(tmp_path), audio=str(tmp_path / "audio"))


def save_text(folder):
    model = AutoModel.from_config(BertConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    model.save_pretrained(folder / "text")
    make_tokenizer().save_pretrained(folder / "text")
    return str(folder / "text")


def test_many_columns_are_compared_in_time(tmp_path):
    names = [f"column_{i}" for i in range(20_000)]
    (tmp_path / "a.csv").write_text(",".join(names) + "\n" + "1," * 19_999 + "1\n")
    start = time.process_time()
    assert TableRows(tmp_path / "a.csv").schema.names == names
    assert time.process_time() - start < 5
    (tmp_path / "a.csv").write_text(",".join([*names, "column_7"]) + "\n")
    with pytest.raises(ValueError, match="two columns .*column_7"):
        TableRows(tmp_path / "a.csv")


@pytest.mark.slow
def test_lists_of_large_cells_are_read_a_few_rows_at_a_time(tmp_path):
    """Cells that are equal are stored once, but Arrow copies those in lists for each row."""
    picture = {"bytes": bytes(2**20), "path": None}
    table = pyarrow.table({"image": [[picture] * 3] * 80, "text": ["a"] * 80})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=2**22)
    del table
    assert (tmp_path / "a.parquet").stat().st_size < 2**17
    child = run_child(
        f"""
        from pathlib import Path
        from mm_transformers.data.tables import TableRows
        before = peak()
        rows = TableRows(Path({str(tmp_path)!r}, "a.parquet"))
        tell(before=before, items=len(next(iter(rows))["image"]), after=peak())
        """
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.told["items"] == 3
    assert child.told["after"] - child.told["before"] < 200 * 2**20


def test_pictures_that_a_shortest_edge_would_blow_up(tmp_path):
    processor = make_processor()
    processor.image_processor = CLIPImageProcessor(size={"shortest_edge": 1800}, do_center_crop=False)
    thin, wide = Image.new("RGB", (20_000, 220)), Image.new("RGB", (60, 40))
    with pytest.raises(ValueError, match="image 91 times as long as wide, whose shortest edge becomes 1,800 pixels"):
        processor(text=["a"], images=[thin])
    collator = MMDataCollator(processor, make_config(), on_bad_file="drop")
    assert collator([{"text": "a", "image": thin}, {"text": "b", "image": wide}])["image_index"].tolist() == [[-1], [0]]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_an_empty_column_without_compression_has_a_page_of_no_bytes(tmp_path, version):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": ["a", "b"], "empty": pyarrow.array([None, None], pyarrow.string())})
    pyarrow.parquet.write_table(table, path, compression="none", data_page_version=version)
    assert list(TableRows(path)) == [{"text": "a", "empty": None}, {"text": "b", "empty": None}]


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_headers_of_pages_are_read_as_arrow_reads_them(tmp_path, compression, version):
    rng = np.random.default_rng(0)
    texts = ["a" * int(n) for n in rng.integers(0, 40, 3000)]
    columns = {
        "text": texts, "same": ["x" * 50] * 3000, "number": rng.normal(size=3000), "count": list(range(3000)),
        "tags": [[text, None] if text else None for text in texts], "flag": [True, None, False] * 1000,
    }  # fmt: skip
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table(columns), path, compression=compression, data_page_version=version, data_page_size=500,
        row_group_size=1100, write_page_index=True,
    )  # fmt: skip
    metadata, content = pyarrow.parquet.read_metadata(path), path.read_bytes()
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            pages = list(parquet_sizes._pages(content, column))
            data = pages[column.has_dictionary_page :]
            assert [page.is_dictionary for page in pages] == [True] * column.has_dictionary_page + [False] * len(data)
            assert sum(page.num_values for page in data) == column.num_values
            if column.path_in_schema == "text":
                longest = max(map(len, texts[1100 * group : 1100 * (group + 1)]))
                assert parquet_sizes._longest(content, column, pages[0]) == longest
            # The footer counts the headers of pages, too: 10 to 100 bytes each.
            size = sum(page.size for page in pages)
            assert 5 * len(pages) <= column.total_uncompressed_size - size <= 150 * len(pages)
    assert [row["text"] for row in TableRows(path)] == texts
    array = pyarrow.table(columns).combine_chunks().to_batches()[0].to_struct_array()
    as_text = sum(map(len, texts)) + 3000 * 50
    in_lists = sum(map(len, texts)) + 8 * 2 * sum(map(bool, texts))
    numbers = 2 * 3000 * 8 + 3000 / 8 * 2
    assert as_text + in_lists + numbers - 1 <= parquet_sizes.num_bytes(array) <= as_text + in_lists + numbers + 500


def test_a_footer_that_lies_about_its_pages(tmp_path):
    """One page of 300 MB in 10 kB; the footer says 100 bytes."""
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": ["a" * 10_000] * 30_000})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False, data_page_size=2**30)
    size = pyarrow.parquet.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    content = path.read_bytes()
    wrong, short = varint(2 * size), varint(2 * 100)
    lie = bytes([*(byte | 128 for byte in short), *[128] * (len(wrong) - len(short) - 1), 0])  # of the same length
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    assert wrong in content[footer:]
    path.write_bytes(content[:footer] + content[footer:].replace(wrong, lie))
    assert pyarrow.parquet.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 100
    message = sentence(ValueError, TableRows, path)
    assert "column 'text' has 300," in message
    assert "more than the limit file_bytes" in message


def varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def test_pictures_in_parquet_whose_dictionary_overflows(tmp_path):
    """Arrow cannot read such a structure as a dictionary; most tables of pictures are of this kind."""
    rng = np.random.default_rng(0)
    pictures = [{"bytes": rng.bytes(3000), "path": f"{i}.png"} for i in range(400)]
    rows = [{"text": f"{i} " * 50, "image": picture, "tags": [str(i)] * 3} for i, picture in enumerate(pictures)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), path, row_group_size=150, dictionary_pagesize_limit=1000, data_page_size=1000
    )
    assert list(TableRows(path)) == rows
    assert load_files({"train": str(path)}, (), cache_dir=str(tmp_path / "cache"))["train"].to_list() == rows


def same(value: str, number: int) -> pyarrow.DictionaryArray:
    """Equal cells that are stored once, so that making the file takes little memory."""
    return pyarrow.DictionaryArray.from_arrays([0] * number, [value])


REPEATED = {
    "one row of many values": lambda: pyarrow.table(
        {"tags": pyarrow.ListArray.from_arrays([0, 2_000_000], same("x" * 1000, 2_000_000)), "text": ["a"]}
    ),
    "many rows of one value": lambda: pyarrow.table({"text": same("x" * 1000, 2_000_000)}),
    "rows of a large value": lambda: pyarrow.table({"text": same("x" * 2**23, 300)}),
    "structures with a large value": lambda: pyarrow.table(
        {"image": pyarrow.StructArray.from_arrays([same("x" * 2**23, 300)], ["path"])}
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(REPEATED))
def test_equal_cells_of_parquet_that_fill_the_memory(tmp_path, kind):
    """Files of a few kilobytes, without any large page: equal cells are stored once."""
    path = tmp_path / "a.parquet"
    table = REPEATED[kind]()
    pyarrow.parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**24)
    del table
    assert path.stat().st_size < 2**18
    child = run_child(
        f"""
        from mm_transformers.data.loading import load_files
        before = peak()
        try:
            load_files({{"train": {str(path)!r}}}, (), cache_dir={str(tmp_path / "cache")!r})
        except ValueError as error:
            tell(before=before, error=str(error), after=peak())
        """
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert "limit file_bytes" in child.told["error"]
    assert child.told["after"] - child.told["before"] < 600 * 2**20


@pytest.mark.parametrize("path", [torch.zeros(3), np.zeros(3), [1, 2], {"a": 1}])
def test_paths_that_are_no_texts(path):
    collator = MMDataCollator(make_processor(), make_config())
    assert "column 'image'" in sentence(ValueError, collator, [{"text": "a", "image": {"path": path}}])
