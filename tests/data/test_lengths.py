"""Token lengths against the encoder that makes the features, samples against the whole, and hubs that fail."""

import http.server
import json
import shutil
import threading

import numpy as np
import pyarrow as pa
import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from pixart_data import lengths, shares
from pixart_data.encoders import TextEncoder
from pixart_data.errors import ConfigError, DataError
from pixart_data.lengths import LengthCounter, Lengths
from pixart_data.sections import TextFeatures

CAPTIONS = [
    "a red house",
    "",
    "The photograph is bright, with soft light, warm colours and a calm atmosphere. " * 3,
    None,
    "In the foreground there are several people, a dog and a bicycle",
    "x",
    " \t\n\u3000 ",
    "two   spaces\nand a line",
    "ein Häuschen \U0001f3e0 \ud800",
    "A large green square stands to the left of a small yellow triangle",
]
USED = [text for text in CAPTIONS if text and text.strip()]


@pytest.fixture(scope="module")
def t5(miniatures):
    return miniatures["t5"]


def counted(t5, captions, **settings):
    counter = LengthCounter(t5, **settings)
    counter.add(captions)
    return counter.take().to_json()


def many(count, seed=0):
    words = ["red", "house", "the", "photograph", "blue", "bicycle"]
    sizes = np.random.default_rng(seed).integers(0, 20, count)
    return [" ".join(words[(i + k) % len(words)] for k in range(size)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("max_tokens", [12, 60, 120])
def test_captions_are_as_long_as_the_features_made_of_them_and_cut_alike(t5, max_tokens):
    encoder = TextEncoder(TextFeatures(model=t5, max_tokens=max_tokens))
    encoded = encoder({"caption": [text.encode("utf-8", "replace").decode() for text in USED]})
    found = counted(t5, CAPTIONS, max_tokens=max_tokens)
    assert found["num_captions"] == len(USED)
    assert found["num_truncated"] == sum(encoded["truncated"])
    assert found["share_truncated"] == sum(encoded["truncated"]) / len(USED)
    kept = np.minimum(np.repeat(np.arange(len(found["counts"])), found["counts"]), max_tokens)
    assert sorted(kept.tolist()) == sorted(len(feature) for feature in encoded["t5"])
    uncut = TextEncoder(TextFeatures(model=t5, max_tokens=5000))({"caption": encoded["caption"]})["t5"]
    num_tokens = sum(map(len, uncut))
    assert found["mean_tokens"] == num_tokens / len(USED)
    assert found["num_tokens_lost"] == num_tokens - kept.sum()
    assert found["share_of_tokens_lost"] == (num_tokens - kept.sum()) / num_tokens
    assert (found["num_tokens_lost"] > 0) == (max_tokens == 12)


def test_the_end_of_sequence_token_counts(t5):
    [length] = [len(row) for row in AutoTokenizer.from_pretrained(t5)(["x"])["input_ids"]]
    assert counted(t5, ["x"], max_tokens=length)["counts"] == [0] * length + [1]
    assert counted(t5, ["x"], max_tokens=length)["num_truncated"] == 0
    assert counted(t5, ["x"], max_tokens=length - 1)["num_truncated"] == 1


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_columns_of_any_type_of_text_are_counted(t5, kind):
    texts = [text and text.replace("\ud800", "?") for text in CAPTIONS]
    array = pa.array(texts, kind)
    assert counted(t5, array) == counted(t5, pa.chunked_array([array[:3], array[3:]])) == counted(t5, CAPTIONS)


def test_bytes_that_are_no_utf8_count_as_they_would_replaced(t5):
    array = pa.array([b"a \xff house", None], pa.binary())
    assert counted(t5, array) == counted(t5, ["a \ufffd house"])


@pytest.mark.parametrize("nothing", [[], [None], ["", " "], pa.nulls(3), pa.array([], pa.string())], ids=str)
def test_of_no_captions_there_are_figures_too(t5, nothing):
    found = counted(t5, nothing)
    assert found["num_captions"] == found["mean_tokens"] == found["share_truncated"] == 0
    assert found["share_of_tokens_lost"] == 0
    assert found["counts"] == []
    assert Lengths.from_json(found).to_json() == found


def test_very_long_captions_are_in_the_last_bin_and_in_the_sums(t5):
    caption = " ".join(["house"] * 3000)
    found = counted(t5, [caption])
    length = len(AutoTokenizer.from_pretrained(t5)([caption], verbose=False)["input_ids"][0])
    assert length > 1024
    assert (len(found["counts"]), found["counts"][-1]) == (1025, 1)
    assert found["mean_tokens"] == length
    assert found["num_tokens_lost"] == length - 120
    assert len(counted(t5, [caption], max_tokens=length)["counts"]) == length + 1


def test_small_corpora_are_counted_in_full_and_large_ones_in_part(t5):
    captions = many(2000)
    assert counted(t5, captions, num_rows=2000, sample_rows=2000)["share_of_rows"] == 1
    part = counted(t5, captions, num_rows=2000, sample_rows=300)
    assert part["share_of_rows"] == 1 / 8
    drawn = shares.levels("", 0, 2000) >= 3
    assert part["num_captions"] == sum(bool(text) for text, is_drawn in zip(captions, drawn, strict=True) if is_drawn)
    expected = counted(t5, [text for text, is_drawn in zip(captions, drawn, strict=True) if is_drawn])
    assert part["counts"] == expected["counts"]


def in_parts(t5, captions, cuts, file="captions", **settings):
    counter = LengthCounter(t5, **settings)
    merged = None
    for start, stop in cuts:
        counter.add(captions[start:stop], start, file)
        part = Lengths.from_json(json.loads(json.dumps(counter.take().to_json())))
        if merged is None:
            merged = part
        else:
            merged.merge(part)
    return merged


def test_parts_add_up_to_the_whole_however_a_file_is_cut(t5):
    captions = many(1500)
    for settings in ({}, {"num_rows": 1500, "sample_rows": 400}):
        whole = in_parts(t5, captions, [(0, 1500)], **settings)
        for cuts in ([(0, 700), (700, 1500)], [(700, 1500), (0, 1), (1, 1), (1, 700)]):
            assert in_parts(t5, captions, cuts, **settings).to_json() == whole.to_json()
        other = in_parts(t5, captions, [(0, 1500)], "another", **settings)
        same = other.to_json()["counts"] == whole.to_json()["counts"]
        assert same == (not settings)  # of another file, other rows are drawn


def test_parts_counted_before_the_corpus_grew_fit_those_counted_after(t5):
    """The first half was counted when it was all there was, at twice the share."""
    captions = many(1600)
    before = in_parts(t5, captions, [(0, 800)], num_rows=800, sample_rows=400)
    after = in_parts(t5, captions, [(800, 1600)], num_rows=1600, sample_rows=400)
    whole = in_parts(t5, captions, [(0, 1600)], num_rows=1600, sample_rows=400)
    assert (before.level, after.level) == (1, 2)
    assert before.to_json()["num_captions"] > after.to_json()["num_captions"] > 0
    for first, second in ((before, after), (after, before)):
        merged = Lengths.from_json(first.to_json())
        merged.merge(second)
        assert merged.to_json() == whole.to_json()


def test_a_worker_takes_the_figures_of_each_unit_apart(t5):
    counter = LengthCounter(t5)
    counter.add(["a red house", "x"])
    assert counter.take().to_json()["num_captions"] == 2
    counter.add(["x"])
    assert counter.take().to_json() == counted(t5, ["x"])
    assert counter.take().to_json()["num_captions"] == 0


def test_a_small_corpus_beside_a_large_one_is_counted_in_full(t5):
    captions = many(400)
    counter = LengthCounter(t5, num_rows=400, sample_rows=100)
    counter.add(captions)
    assert counter.take().to_json()["share_of_rows"] == 1 / 4
    counter.add(captions[:50])
    counter.begin(50)  # what was not taken is gone
    counter.add(captions[:50])
    assert counter.take().to_json() == counted(t5, captions[:50])
    counter.begin(400)
    assert counter.take().level == 2


def test_a_tokenizer_is_known_by_what_it_does_and_not_by_where_it_lies(t5, tmp_path):
    copied = tmp_path / "copied"
    AutoTokenizer.from_pretrained(t5).save_pretrained(copied)
    first, second = (in_parts(name, ["x"], [(0, 1)]) for name in (t5, str(copied)))
    assert first.identity == second.identity
    first.merge(second)
    assert first.to_json()["num_captions"] == 2
    tokenizer = AutoTokenizer.from_pretrained(t5)
    tokenizer.add_tokens(["house"])
    tokenizer.save_pretrained(copied)
    other = in_parts(str(copied), ["x"], [(0, 1)])
    with pytest.raises(DataError, match="expected those of .* found some of .*; count all captions with one"):
        first.merge(other)
    with pytest.raises(DataError, match="up to 120 tokens, found some of .* up to 77"):
        first.merge(in_parts(t5, ["x"], [(0, 1)], max_tokens=77))


@pytest.mark.parametrize("facts", [{}, {"levels": 3}, None, {"tokenizer": "t", "levels": {"level": 0}}])
def test_facts_of_something_else_are_told(facts):
    with pytest.raises(DataError, match="caption lengths: expected what a count of them wrote, found"):
        Lengths.from_json(facts)


# Tokenizers that cannot be had


def test_a_folder_that_is_none_or_holds_none_is_told(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer: no such folder: /no/such/folder; give a folder"):
        LengthCounter("/no/such/folder")
    with pytest.raises(ConfigError, match="tokenizer: .* cannot be loaded: .*; give a folder that"):
        LengthCounter(str(tmp_path))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Put a server of one answer in place of the hub; returns what sets the answer, and the paths that were asked."""
    answer, asked, done = [], [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if not answer:
                done.wait(30)
                return
            status, code = answer
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(lengths, "_HUB_TIMEOUT_S", 0.3)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        try:
            yield answer, asked
        finally:
            done.set()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((404, "RepoNotFound"), "found nobody/t5, which is no folder here and unknown to the hub; check its spelling"),
        ((404, "RevisionNotFound"), "found nobody/t5, which is no folder here"),
        ((403, "GatedRepo"), "the hub lends nobody/t5 only to those who accept its terms; accept them on its page"),
        ((500, ""), "nobody/t5 is not in the cache of this machine, and the hub does not answer .*give a folder"),
        ((), "nobody/t5 is not in the cache of this machine, and the hub does not answer .*give a folder"),
    ],
    ids=str,
)
def test_a_hub_that_gives_nothing_is_asked_once_and_told(hub, answer, expected):
    answers, asked = hub
    answers[:] = answer
    with pytest.raises(ConfigError, match=f"tokenizer: .*{expected}"):
        LengthCounter("nobody/t5")
    assert [path for path in asked if "t5" in path] == ["/api/models/nobody/t5"]


def test_without_a_network_the_error_says_what_to_do():
    with pytest.raises(ConfigError, match=r"the hub does not answer .*; give a folder .*, or leave tokenizer out"):
        LengthCounter("nobody/t5")


def test_a_tokenizer_in_the_cache_needs_no_hub(hub, t5, tmp_path, monkeypatch):
    answers, asked = hub
    answers[:] = (500, "")
    cached = tmp_path / "hub" / "models--nobody--t5"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(t5, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert counted("nobody/t5", ["x"]) == counted(t5, ["x"]) | {"tokenizer": "nobody/t5"}
    assert asked == []
