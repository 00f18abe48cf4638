"""
Random changes of valid files of all kinds. Each either works, or is refused by an error of the package in one sentence;
time and memory are bounded.

`make fuzz MINUTES=60` tries many more than an ordinary run. FUZZ_EXAMPLES says how many of each kind.
"""

import contextlib
import copy
import datetime
import decimal
import gc
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import (
    ANY_JSON,
    HOSTILE_TEXTS,
    RECIPE,
    as_json,
    changed_bytes,
    changed_json,
    changed_values,
    in_base64,
    pictures,
    sounds,
    tables,
    text_tokenizers,
    videos,
)
from tiny import make_config, make_feature_extractor, make_image, make_image_processor, make_model, make_tokenizer

from mm_transformers import (
    Classification,
    Generation,
    Limits,
    Matching,
    MMDataCollator,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    MultiLabel,
    Regression,
    Retrieval,
    TokenClassification,
)
from mm_transformers.analysis.task_comparison import run_comparison
from mm_transformers.data.loading import load_files
from mm_transformers.data.tables import TableRows
from mm_transformers.model import text_tokens
from mm_transformers.model.audio import AudioError, load_audio
from mm_transformers.model.images import ImageError, load_image
from mm_transformers.model.text_tokens import needed_text
from mm_transformers.model.video import VideoError, load_frames
from mm_transformers.training.checkpoints.folders import MANIFEST_NAME, newest_complete_checkpoint, what_is_missing
from mm_transformers.training.recipe import read_recipe
from mm_transformers.training.recipe.builders import training_arguments
from mm_transformers.training.recipe.output_folder import read_state


pytest.importorskip("soundfile")
pytest.importorskip("av")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "4"))  # of each kind
# The most that one example may take: bytes above the state before, and CPU seconds.
MOST_BYTES = 500 * 2**20
MOST_SECONDS = 10
LONGEST_MESSAGE = 1500
RATE = 16_000
# Small, so that whatever is not bounded by them is seen.
SMALL = Limits(
    image_pixels=4_000_000, kept_image_pixels=100_000, slow_image_pixels=20_000, audio_samples=4_000_000,
    video_frame_pixels=500_000, video_pixels=10_000_000, video_frames=2000,
)  # fmt: skip


def fuzz(given_examples, share=1.0):
    """
    Args:
        given_examples: what hypothesis gives.
        share: of the number of examples, for kinds that take long.
    """
    options = {"derandomize": False, "database": None} if "FUZZ_EXAMPLES" in os.environ else {}
    shown = settings(
        max_examples=max(1, int(EXAMPLES * share)), deadline=None, suppress_health_check=list(HealthCheck),
        print_blob=True, **options,
    )  # fmt: skip
    return lambda test: shown(given(given_examples)(test))


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr("mm_transformers.model.limits._current", SMALL)


@contextlib.contextmanager
def bounded(example, *errors):
    """
    What an example may do in the block: work, or raise one of `errors` with one short sentence, within time and memory.

    Args:
        example: what is tried; kept in a file where FUZZ_LAST says so, in case that the process does not survive it.
    """
    if "FUZZ_LAST" in os.environ:
        Path(os.environ["FUZZ_LAST"]).write_text(f"{os.environ.get('PYTEST_CURRENT_TEST')}\n{example!r}")
    message, problem, printed, hook = "", "", [], sys.unraisablehook
    before, start = _resident(), time.process_time()
    sys.unraisablehook = printed.append  # what is raised where nothing can catch it is a traceback on the screen
    try:
        yield
    except errors as error:
        message = str(error)
        problem = repr(error)
    finally:
        sys.unraisablehook = hook
    seconds, taken = time.process_time() - start, 0 if before is None else _status("VmHWM") - before
    assert not printed, [one.exc_value for one in printed]
    assert bool(message) == bool(problem), problem  # an error says something
    assert "\n" not in message
    assert len(message) < LONGEST_MESSAGE
    assert seconds < MOST_SECONDS, f"{seconds:.1f} s"
    assert taken < MOST_BYTES, f"{taken / 2**20:,.0f} MB"


def _resident() -> int | None:
    """Bytes held now, which are the peak so far; `None` where the system does not say, as only Linux does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class TestBound:
    """Of the test itself: what it is to find, it finds."""

    @pytest.mark.skipif(_resident() is None, reason="this system does not say the peak of one example")
    def test_memory(self):
        with pytest.raises(AssertionError, match="MB"), bounded(None):
            bytearray(MOST_BYTES + 2**24)
        with bounded(None):
            bytearray(2**24)

    def test_messages(self):
        with pytest.raises(AssertionError), bounded(None, ValueError):
            raise ValueError("a\nb")
        with pytest.raises(AssertionError), bounded(None, ValueError):
            raise ValueError
        with pytest.raises(KeyError), bounded(None, ValueError):
            raise KeyError("a")


class TestMedia:
    @fuzz(changed_bytes(pictures()), 20)
    def test_images(self, drawn):
        with bounded(drawn, ImageError):
            assert load_image(drawn[1]).mode == "RGB"

    @fuzz(changed_bytes(sounds()), 12)
    def test_sounds(self, drawn):
        with bounded(drawn, AudioError):
            assert load_audio(drawn[1], RATE).dtype == np.float32

    @fuzz(changed_bytes(videos()), 6)
    def test_videos(self, drawn):
        with bounded(drawn, VideoError):
            assert len(load_frames(drawn[1], 2)) <= 2


# Texts

PIECES = st.sampled_from(
    ["the", "cat", "aaaa", "ab", "isn't", ",", "é", "a\n", "\t", " ", "  ", "好", "𝄞", "lovely", "."]
)

# A tokenizer, the pieces of a text, what joins them, and how many tokens are needed.
fuzz_cuts = fuzz(
    st.tuples(
        st.sampled_from(sorted(text_tokenizers())),
        st.lists(PIECES, max_size=60),
        st.sampled_from(["", " "]),
        st.integers(1, 30),
    ),
    4,
)


class TestTexts:
    @fuzz_cuts
    def test_the_first_tokens_are_those_of_the_whole_text(self, monkeypatch, drawn):
        name, pieces, joint, num_tokens = drawn
        tokenizer, text = text_tokenizers()[name], joint.join(pieces) * 5
        monkeypatch.setattr(text_tokens, "_CHARACTERS", (1, 20))  # so that these texts are long
        with bounded(drawn):
            needed = needed_text(tokenizer, text, num_tokens)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert text.startswith(needed)
        ids = tokenizer(needed, add_special_tokens=False)["input_ids"]
        assert ids[:num_tokens] == whole[:num_tokens]
        assert len(ids) > num_tokens or needed == text

    @fuzz_cuts
    def test_the_last_tokens_are_those_of_the_whole_text(self, monkeypatch, drawn):
        name, pieces, joint, num_tokens = drawn
        tokenizer, text = copy.deepcopy(text_tokenizers()[name]), joint.join(pieces) * 5
        tokenizer.truncation_side = "left"
        monkeypatch.setattr(text_tokens, "_CHARACTERS", (1, 20))  # so that these texts are long
        with bounded(drawn):
            needed = needed_text(tokenizer, text, num_tokens)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert text.endswith(needed)
        ids = tokenizer(needed, add_special_tokens=False)["input_ids"]
        assert ids[-num_tokens:] == whole[-num_tokens:]
        assert len(ids) > num_tokens or needed == text


# Tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


class TestTables:
    @fuzz(changed_bytes(tables(), (*HOSTILE_TEXTS, ",", '"', "\r", "\n", "{", "NaN")), 8)
    def test_files(self, folder, drawn):
        path = folder / f"rows{Path(drawn[0]).suffix or drawn[0]}"
        path.write_bytes(drawn[1])
        with bounded(drawn, ValueError):
            for _ in TableRows(path):
                pass

    @fuzz(changed_bytes(tables()), 0.5)
    def test_files_as_data_sets(self, folder, drawn):
        path = folder / f"data{Path(drawn[0]).suffix or drawn[0]}"
        path.write_bytes(drawn[1])
        shutil.rmtree(folder / "cache", ignore_errors=True)
        with bounded(drawn, ValueError):
            data = load_files({"train": str(path)}, ("image",), cache_dir=str(folder / "cache"))
            for _ in data["train"]:
                pass


TASKS = [
    Classification("topic", labels=["animals", "food"]),
    MultiLabel("tags", labels=["red", "green", "blue"]),
    Regression("score"),
    TokenClassification("entities", labels=["O", "NAME"]),
    Retrieval("pair"),
    Matching("fits"),
    Generation("german", max_length=6),
]


@pytest.fixture(scope="module")
def model():
    from transformers import BertConfig

    decoder = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37,
        max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return make_model(audio="wav2vec2", tasks=TASKS, decoder_config=decoder, num_fusion_layers=1)


def make_processor() -> MMTransformerProcessor:
    return MMTransformerProcessor(
        image_processor=make_image_processor(), tokenizer=make_tokenizer(), feature_extractor=make_feature_extractor()
    )


FILES = [*list(pictures().values())[:6], *list(sounds().values())[:3], *list(videos().values())[:2]]
ARRAYS = st.builds(
    lambda shape, kind, value: np.full(shape, value).astype(kind),
    st.lists(st.integers(0, 9), max_size=4), st.sampled_from(["u1", "i8", "f4", "f8", "?", "u2", "c8", "O", "U3",
    "f2"]),
    st.sampled_from([0, 1, 0.5, -3, 255, 70_000]),
)  # fmt: skip
PLAIN_CELLS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30), st.binary(max_size=40), ANY_JSON,
    ARRAYS,
    st.sampled_from(FILES), st.sampled_from(FILES).map(in_base64), st.sampled_from(
        ["red|blue", '["red"]', "=1+1", "'=x", "animals", "2", "-1", "1e400", "0x1", "١", "nan", "inf", "[" * 2000,
        "x" * 50_000,
         "http://localhost:1/a.png", "file:///etc/passwd", "ftp://x/y", "zip://a::b", "hf://a/b", "data:,x",
         "data:;base64,!",
         "/dev/zero", "/proc/self/mem", ".", "", "\x00", "\ud800", "a" * 5000, "O NAME", '["O", "NAME"]', "true",
         "food"]),
    st.sampled_from([float("nan"), 2**70, decimal.Decimal("NaN"), decimal.Decimal(1), datetime.date(2020, 1, 1),
    make_image(),
                     np.datetime64("NaT"), np.float32("nan"), np.int64(3), range(3), {1, 2}, object, 3j, torch.zeros(3),
                     torch.zeros(2, 3), np.zeros((3, 4, 5, 3), np.uint8)]),
)  # fmt: skip
KEYS = st.sampled_from(["path", "bytes", "array", "sampling_rate", "cast", "mode", "stream_index", "x", 3])
CELLS = st.recursive(
    PLAIN_CELLS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=5,
)
GOOD_CELLS = {
    "text": "red cat", "image": make_image(), "video": None, "audio": {"array": np.zeros(800), "sampling_rate": RATE},
    "topic": "food", "tags": "red|blue", "score": "0.5", "entities": ["O", "NAME"], "pair": None, "fits": None,
    "german": "cat",
}  # fmt: skip
CHANGED_ROWS = st.lists(st.dictionaries(st.sampled_from(list(GOOD_CELLS)), CELLS, max_size=3), min_size=1, max_size=3)


class TestRows:
    @fuzz(st.tuples(CHANGED_ROWS, st.sampled_from(["raise", "drop"])), 4)
    def test_cells(self, model, drawn):
        changes, on_bad_file = drawn
        collator = MMDataCollator(make_processor(), model.config, on_bad_file=on_bad_file)
        with bounded(drawn, ValueError):
            batch = collator.with_references()([{**GOOD_CELLS, **row} for row in changes])
            batch.pop("references", None)
            with torch.no_grad():
                model(**batch)


# Recipes


# Of training.
OPTIONS = """
    max_steps learning_rate lr_scheduler_type optim report_to use_cpu output_dir
    gradient_accumulation_steps num_train_epochs warmup_steps eval_strategy save_strategy fsdp optim_args
    lr_scheduler_kwargs accelerator_config metric_for_best_model load_best_model_at_end label_names
    parallelism_config generation_config debug logging_strategy seed data_seed torch_compile bf16 fp16 tf32
    gradient_checkpointing_kwargs liger_kernel_config neftune_noise_alpha eval_steps logging_dir ddp_backend
    fsdp_config hub_strategy optim_target_modules save_steps
"""


class TestRecipes:
    @staticmethod
    def read(folder, content):
        path = folder / "recipe.yaml"
        path.write_bytes(content)
        with bounded(content, ValueError):
            read_recipe(path)

    @fuzz(changed_bytes({"recipe": RECIPE.encode()}, tuple(HOSTILE_TEXTS)), 8)
    def test_text(self, folder, drawn):
        self.read(folder, drawn[1])

    @fuzz(changed_values(yaml.safe_load(RECIPE)), 8)
    def test_values(self, folder, values):
        self.read(folder, as_json(values))

    @fuzz(st.dictionaries(st.sampled_from(OPTIONS.split()), ANY_JSON, max_size=3), 2)
    def test_training_options(self, folder, values):
        recipe = yaml.safe_load(RECIPE)
        recipe["training"] = {**recipe["training"], "output_dir": str(folder / "out"), **values}
        path = folder / "options.yaml"
        path.write_bytes(as_json(recipe))
        with bounded(values, ValueError, ImportError):
            training_arguments(read_recipe(path))


# Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_model(audio="wav2vec2", linear_probe=True, num_fusion_layers=1).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@contextlib.contextmanager
def replaced(path: Path, content: bytes):
    """A file holds something else while the block runs."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


CONFIG = json.loads(
    make_config(audio="wav2vec2", linear_probe=True, num_fusion_layers=1).to_json_string(use_diff=False)
)


class TestCheckpoints:
    @fuzz(changed_values(CONFIG), 2)
    def test_config(self, values):
        with bounded(values, ValueError, ImportError):
            config = MMTransformerConfig.from_dict(values)
            with torch.device("meta"):
                MMTransformerForMultiTask(config)

    @pytest.mark.slow
    @fuzz(changed_json(CONFIG))  # fmt: skip
    def test_loading(self, saved, content):
        with replaced(saved / "config.json", content), bounded(content, ValueError, OSError, ImportError):
            MMTransformerForMultiTask.from_pretrained(saved)
        gc.collect()

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
    def test_processor(self, saved, name):
        path = saved / name
        original = path.read_bytes()

        @fuzz(changed_json(json.loads(original)), 1)  # fmt: skip
        def run(content):
            with replaced(path, content), bounded(content, ValueError, OSError, ImportError):
                processor = MMTransformerProcessor.from_pretrained(saved)
                collator = MMDataCollator(processor, make_config(audio="wav2vec2", num_fusion_layers=1))
                collator([GOOD_CELLS, {"text": "a"}])

        run()

    def test_weights(self, saved):
        path = saved / "model.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]

        def with_header(values):
            text = as_json(values)
            return len(text).to_bytes(8, "little") + text + rest

        damaged = changed_bytes({"weights": content[: 8 + length]}).map(lambda drawn: drawn[1] + rest)

        @fuzz(st.one_of(changed_values(header).map(with_header), damaged), 2)
        def run(content):
            with replaced(path, content), bounded(content[:20_000], ValueError, OSError):
                MMTransformerForMultiTask.from_pretrained(saved)

        run()

    def test_manifests(self, saved, folder):
        names = ("config.json", "trainer_state.json")
        checkpoint = folder / "checkpoint-3"
        checkpoint.mkdir()
        for name in names:
            (checkpoint / name).write_text('{"global_step": 3}')
        manifest = {"files": dict.fromkeys(names, 18), "xxh3_128": dict.fromkeys(names, "0" * 32)}

        @fuzz(changed_json(manifest), 4)  # fmt: skip
        def run(content):
            (checkpoint / MANIFEST_NAME).write_bytes(content)
            with bounded(content):
                problem = what_is_missing(checkpoint, verify=True)
                assert problem is None or ("\n" not in problem and len(problem) < LONGEST_MESSAGE)
                newest_complete_checkpoint(folder, verify=True)

        run()


STATE = {
    "global_step": 3, "epoch": 1.0, "best_metric": 0.5, "log_history": [{"loss": 1.0, "step": 1}], "runs": {
        "topic": {"0": {"topic": {"f1": 0.5}}}, "score": {"0": {"score": {"mse": 0.5}}},
        "<jointly>": {"0": {"topic": {"f1": 0.7}}}},
    "settings": {}, "stateful_callbacks": {"EarlyStoppingCallback": {"args": {"early_stopping_patience": 3},
    "attributes": {}}},
    "eval_topic_f1": 0.5, "format": "onnx", "graphs": {"model": {"inputs": {"a": [None, 3]}, "types": {"a": "int64"},
    "outputs": ["b"]}},
}  # fmt: skip


class TestStates:
    @fuzz(changed_json(STATE), 4)
    def test_results(self, folder, content):
        from mm_transformers.analysis.task_comparison import compare
        from mm_transformers.cli.metrics_table import print_metrics
        from mm_transformers.sharing.export_spec import read_spec
        from mm_transformers.training.recipe.run import _read_metrics

        path = folder / "state.json"

        def tabled():
            metrics = _read_metrics(path)
            with contextlib.redirect_stdout(io.StringIO()):
                print_metrics({"test": metrics}, {"test": "eval"}, ["topic"])

        def compared():
            compare(run_comparison(lambda tasks, seed: {}, ["topic", "score"], [0], path, {}), [0])

        for read in (tabled, compared, lambda: read_state(path), lambda: read_spec(path)):
            path.write_bytes(content)
            with bounded(content, ValueError):
                read()


# The page


class TestPage:
    @pytest.mark.slow
    def test_answers(self, saved, tmp_path, monkeypatch):
        pytest.importorskip("gradio")
        from mm_transformers.cli.page import _answering
        from mm_transformers.cli.uploads import UploadError, check_inputs

        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
        answer = _answering(
            MMTransformerForMultiTask.from_pretrained(saved).eval(), MMTransformerProcessor.from_pretrained(saved),
            ["text", "image", "audio"], [],
        )  # fmt: skip
        files = [tmp_path / "picture", tmp_path / "sound"]
        uploads = [{"path": str(file), "meta": {"_type": "gradio.FileData"}} for file in files]
        good = ["red cat", *uploads, ["topic", "entities"]]
        sent = st.one_of(st.just(good), changed_values(good), st.lists(ANY_JSON, min_size=4, max_size=4))

        @fuzz(st.tuples(sent, changed_bytes(pictures()), changed_bytes(sounds())), 0.5)
        def run(drawn):
            given, *contents = drawn
            for file, (_, content) in zip(files, contents, strict=True):
                file.write_bytes(content)
            with bounded(drawn, UploadError):
                check_inputs(given)
                if isinstance(given, list) and len(given) == 4:  # gradio refuses others
                    assert isinstance(answer(*given), str)

        run()
