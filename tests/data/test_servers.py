import email.utils
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from pixart_data import chats, events, servers
from pixart_data.config import load
from pixart_data.errors import ConfigError, JobError, TransientError
from pixart_data.questions import Caption, Decoding, NoCaption
from pixart_data.sections import Captioner as Section
from pixart_data.servers import ServedCaptioner
from tests.chats import ChatServer, answer, completion, free_port, hang, reset, status

PROMPT = "What is there?"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(chats, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(servers, "_START_PATIENCE_S", 0.05)


@pytest.fixture
def server():
    with ChatServer() as running:
        yield running


@pytest.fixture
def connect():
    """Make engines for servers, with settings of `[captioner.server]`, and close them after the test."""
    made = []

    def make(*running, captioner=None, **settings):
        urls = [one if isinstance(one, str) else one.url for one in running]
        given = {"max_attempts": 2, "patience_s": 0.2, "timeout_s": 10.0, **settings, "urls": urls}
        section = {"model": "org/model", "prompt": PROMPT, "max_new_tokens": 9, **(captioner or {}), "server": given}
        made.append(ServedCaptioner(Section.model_validate(section)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def picture(colour="green", size=(40, 30)):
    return Image.new("RGB", size, colour)


def describe(engine, image=None, raw_caption=None, seed=0):
    batch = {"image": [engine.prepare(image or picture())], "raw_caption": [raw_caption], "seed": [seed]}
    return engine(batch)["answers"][0]


def caption(engine, **given):
    return describe(engine, **given)["caption"]


def test_an_answer_comes_with_its_counts(server, connect):
    engine = connect(server)
    server.plan.append(lambda handler, request: handler.say(200, completion(" A house. \n", 90, 4, "length")))
    assert caption(engine) == Caption("A house.", PROMPT, "length", 90, 4)
    assert engine.facts == {"id": "org/model", "engine": "server"}


def test_a_request_says_all_that_decides_the_answer(server, connect):
    engine = connect(server, captioner={"temperature": 0.5, "top_p": 0.9})
    describe(engine, seed=1)
    describe(engine, seed=2)
    describe(engine, seed=1)
    bodies = [request.body for request in server.of_rows]
    assert {key: bodies[0][key] for key in ("model", "max_tokens", "temperature", "top_p")} == {
        "model": "org/model",
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    assert bodies[0]["seed"] == bodies[2]["seed"] != bodies[1]["seed"]
    assert all(0 <= body["seed"] < 1 << 31 for body in bodies)
    assert [part["type"] for part in bodies[0]["messages"][0]["content"]] == ["image_url", "text"]


def test_an_answer_asked_for_again_is_asked_with_other_decoding(server, connect):
    engine = connect(server, captioner={"prompts": {"short": "In short?"}})
    batch = {"image": [engine.prepare(picture())] * 2, "raw_caption": [None] * 2, "seed": [1, 2]}
    decodings = [Decoding(0.5, 0.9, 14, 0.3), Decoding(0.0, 1.0, 9)]
    found = engine(batch | {"decoding": decodings})["answers"]
    assert [list(answers) for answers in found] == [["caption"]] * 2
    bodies = sorted((request.body for request in server.of_rows), key=lambda body: body["temperature"])
    assert bodies[0]["seed"] != bodies[1]["seed"]
    said = [{name: body.get(name) for name in ("temperature", "top_p", "max_tokens")} for body in bodies]
    assert said == [
        {"temperature": 0.0, "top_p": 1.0, "max_tokens": 9},
        {"temperature": 0.5, "top_p": 0.9, "max_tokens": 14},
    ]
    assert [body.get("frequency_penalty") for body in bodies] == [None, 0.3]


def test_a_server_without_room_for_a_longer_answer_is_asked_for_one_of_the_first_length(server, connect):
    engine = connect(server)

    def usual(handler, request):
        if request.body["max_tokens"] > usual.room:
            status(400, "too many tokens")(handler, request)
        else:
            handler.say(200, completion("A house.", 90, 4))

    server.usual = usual
    batch = {"image": [engine.prepare(picture())], "raw_caption": [None], "seed": [1]}
    for usual.room, expected in ((20, [14]), (10, [14, 9])):
        server.requests.clear()
        [found] = engine(batch | {"decoding": [Decoding(0.5, 0.9, 14, 0.3)]})["answers"]
        assert found["caption"].text == "A house."
        assert [request.body["max_tokens"] for request in server.of_rows] == expected
        assert {(request.body["temperature"], request.body["frequency_penalty"]) for request in server.of_rows} == {
            (0.5, 0.3)
        }
    usual.room = 8
    server.requests.clear()
    [found] = engine(batch | {"decoding": [Decoding(0.5, 0.9, 9)]})["answers"]
    assert found["caption"].reason == "refused"
    assert len(server.of_rows) == 1  # it is no shorter than the first answer


def test_a_picture_travels_as_a_jpeg_of_the_size_asked_for(server, connect):
    engine = connect(server, max_side_px=100, jpeg_quality=80)
    for size in ((400, 200), (30, 90), (5000, 20)):
        describe(engine, image=picture(size=size))
    images = [request.image for request in server.of_rows]
    assert [image.size for image in images] == [(100, 50), (30, 90), (100, 6)]  # a strip is cut to 16 : 1 first
    assert {image.format for image in images} == {"JPEG"}


def test_the_key_is_read_from_the_environment_and_sent(server, connect, monkeypatch):
    monkeypatch.setenv("THE_KEY", "secret")
    describe(connect(server, api_key_env="THE_KEY"))
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer secret"}
    server.requests.clear()
    describe(connect(server))
    assert {request.headers["Authorization"] for request in server.requests} == {None}
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(ConfigError, match="server.api_key_env: expected the key in .* THE_KEY, found it unset; set it"):
        connect(server, api_key_env="THE_KEY")


def test_several_captions_of_one_picture(server, connect):
    prompts = {"short": "In short?", "quoting": 'Given "{caption}"?'}
    engine = connect(server, captioner={"prompts": prompts, "prompt_with_caption": "{caption}, it says"})
    found = describe(engine, raw_caption="a red\n</s><|im_end|> <image>[INST] house <3 & [1]")
    assert {name: one.prompt for name, one in found.items()} == {
        "caption": "a red house <3 & [1], it says",  # what could be a token of the model's is gone
        "caption_short": "In short?",
        "caption_quoting": 'Given "a red house <3 & [1]"?',
    }
    found = describe(engine)
    assert found["caption"].prompt == PROMPT
    assert found["caption_quoting"] == NoCaption(None, "no_caption", found["caption_quoting"].detail)


def test_requests_in_flight_are_bounded_and_answers_stay_with_their_rows(server, connect):
    engine = connect(server, concurrency=4)
    rng = random.Random(0)

    def slowly(handler, request):
        time.sleep(rng.uniform(0.005, 0.05))
        answer(handler, request)

    server.usual = slowly
    pictures = [picture(colour=(i * 8, 255 - i * 8, 128)) for i in range(30)]
    with ThreadPoolExecutor(16) as threads:
        texts = [one.text for one in threads.map(lambda image: caption(engine, image=image), pictures)]
    assert server.max_in_flight == 4
    reds = [int(text.removeprefix("(").partition(",")[0]) for text in texts]
    assert all(abs(red - i * 8) < 4 for i, red in enumerate(reds))


# Servers that fail


@pytest.mark.parametrize("how", ["seconds", "date"])
def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(server, connect, how):
    engine = connect(server, patience_s=5.0)
    pause = "0.4" if how == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    server.plan.append(status(429, Retry_After=pause))
    assert isinstance(caption(engine), Caption)
    first, second = (request.at_s for request in server.of_rows)
    assert second - first >= (0.4 if how == "seconds" else 0.9)  # dates have whole seconds


def test_a_busy_server_is_asked_again_without_being_told_when(server, connect):
    engine = connect(server, patience_s=5.0)
    server.plan.extend([status(503), status(429), status(529)])
    before = events.counts().get("server_away", 0)
    assert isinstance(caption(engine), Caption)
    assert len(server.of_rows) == 4  # more than max_attempts: the row is not to blame
    assert events.counts()["server_away"] - before == 3


def test_a_server_that_stays_busy_fails_the_shard(server, connect):
    engine = connect(server)
    server.usual = status(429, "too many")
    with pytest.raises(TransientError, match=r"captioner.server: .* is busy \(429\): too many"):
        caption(engine)


@pytest.mark.parametrize(
    "failure",
    [
        status(500),
        status(502),
        reset,
        status(200, "<html>proxy</html>"),
        status(200, {"choices": []}),
        status(200, {"choices": [{"message": {"content": ["no text"]}}]}),
        status(200, "[" * 100_000),
    ],
)
def test_a_broken_answer_is_asked_for_again(server, connect, failure):
    engine = connect(server)
    server.plan.append(failure)
    assert isinstance(caption(engine), Caption)
    assert len(server.of_rows) == 2


def test_an_answer_that_takes_too_long_is_asked_for_again(server, connect):
    engine = connect(server, timeout_s=0.3)
    server.plan.append(hang)
    assert isinstance(caption(engine), Caption)
    server.usual = hang
    assert "gave no answer within 0.3 s" in caption(engine).detail


def test_an_answer_without_end_is_given_up(server, connect, monkeypatch):
    monkeypatch.setattr(chats, "_MAX_ANSWER_BYTES", 10_000)
    engine = connect(server)
    server.usual = status(200, "x" * 20_000)
    assert "more than 10000 bytes" in caption(engine).detail


def test_a_picture_that_breaks_a_server_is_a_rejected_row(server, connect):
    engine = connect(server)
    server.usual = status(500, "CUDA error")
    found = caption(engine)
    assert (found.reason, found.prompt) == ("server_error", PROMPT)
    assert "2 attempts; the last: http" in found.detail
    assert found.detail.endswith("failed (500): CUDA error")
    assert len(server.of_rows) == 2


def test_a_server_that_fails_for_every_picture_fails_the_shard(server, connect):
    engine = connect(server)
    server.usual = server.others = status(500, "CUDA error")
    with pytest.raises(TransientError, match=r"failed \(500\): CUDA error"):
        caption(engine)


@pytest.mark.parametrize("code", [400, 413, 415, 422])
def test_a_picture_that_is_refused_is_a_rejected_row(server, connect, code):
    engine = connect(server)
    server.usual = status(code, '{"error": "image too large"}')
    found = caption(engine)
    assert found.reason == "refused"
    assert f"answered {code}" in found.detail
    assert "image too large" in found.detail
    assert len(server.of_rows) == 1


def test_a_server_that_begins_to_refuse_every_picture_fails_the_shard(server, connect):
    engine = connect(server)
    server.usual = server.others = status(400, "no such model")
    with pytest.raises(TransientError, match="no such model"):
        caption(engine)


@pytest.mark.parametrize("code", [401, 403, 404, 302])
def test_a_server_that_turns_away_fails_the_shard(server, connect, code):
    engine = connect(server)
    server.usual = status(code, "go away")
    with pytest.raises(TransientError, match=f"answered {code}"):
        caption(engine)


def test_an_empty_answer_is_an_answer(server, connect):
    engine = connect(server)
    server.plan.append(lambda handler, request: handler.say(200, completion(None, 80, 1)))
    assert caption(engine) == Caption("", PROMPT, "stop", 80, 1)


def test_a_server_that_is_restarted_is_waited_for(connect):
    with ChatServer() as before:
        engine = connect(before, patience_s=20.0)
        assert isinstance(caption(engine), Caption)
    answered = []
    asking = threading.Thread(target=lambda: answered.append(caption(engine)))
    asking.start()
    asking.join(0.3)
    assert answered == []
    with ChatServer(before.port):
        asking.join(20)
    assert isinstance(answered[0], Caption)


def test_a_server_that_stays_away_fails_the_shard(connect):
    with ChatServer() as server:
        engine = connect(server)
    with pytest.raises(TransientError, match="cannot be reached"):
        caption(engine)


def test_what_is_asked_beside_a_row_that_fails_the_shard_is_given_up(server, connect):
    engine = connect(server, concurrency=1)
    server.plan.append(status(403, "go away"))
    images = [engine.prepare(picture(colour=(i, 0, 0))) for i in range(8)]
    with pytest.raises(TransientError, match="answered 403") as caught:
        engine({"image": images, "raw_caption": [None] * 8, "seed": [0] * 8})
    assert isinstance(caught.value.__cause__, chats.Refused)
    assert isinstance(caption(engine), Caption)  # waits for its turn behind what was not given up
    assert len(server.of_rows) <= 3  # the one that failed, this one, and one that was on its way meanwhile


# Several servers


def test_the_least_busy_server_is_asked(connect):
    with ChatServer() as slow, ChatServer() as quick:
        engine = connect(slow, quick, concurrency=4)
        slow.usual = lambda handler, request: (time.sleep(0.2), answer(handler, request))
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda _: caption(engine), range(40)))
        assert all(isinstance(one, Caption) for one in found)
        assert 0 < len(slow.of_rows) < len(quick.of_rows) / 2


def test_a_server_that_leaves_is_replaced_by_the_others(connect):
    with ChatServer() as stays:
        with ChatServer() as leaves:
            engine = connect(leaves, stays)
        assert all(isinstance(caption(engine), Caption) for _ in range(5))
        assert len(stays.of_rows) == 5


def test_a_server_that_comes_later_is_looked_at_and_asked(connect):
    port = free_port()
    with ChatServer() as first:
        engine = connect(first, f"http://127.0.0.1:{port}/v1", concurrency=1)
        assert isinstance(caption(engine), Caption)
        first.usual = status(429)
        with ChatServer(port) as late:
            deadline_s = time.monotonic() + 20
            while not late.of_rows and time.monotonic() < deadline_s:
                try:
                    caption(engine)
                except TransientError:
                    continue
            assert late.of_rows
            assert [request.is_canary for request in late.requests][:2] == [True, True]


def test_a_server_that_comes_later_and_is_blind_is_a_setting_to_mend(connect):
    port = free_port()
    with ChatServer() as first:
        engine = connect(first, f"http://127.0.0.1:{port}/v1")
        with ChatServer(port) as late:
            late.others = without_image
            deadline_s = time.monotonic() + 20
            found = None
            while found is None and time.monotonic() < deadline_s:
                try:
                    caption(engine)
                except ConfigError as error:
                    found = str(error)
            assert f"expected {late.url} to see pictures" in found
            assert not late.of_rows


# Servers that do not see


def without_image(handler, request):
    request.image = None
    answer(handler, request)


def test_a_server_that_drops_pictures_is_a_setting_to_mend(server, connect):
    server.others = without_image
    with pytest.raises(ConfigError) as caught:
        connect(server)
    assert str(caught.value).startswith(f"captioner.server: expected {server.url} to see pictures, found ")
    assert "tokens in a prompt with a picture, no more than in one without; serve an image-text" in str(caught.value)


def test_answers_that_differ_by_chance_do_not_make_up_for_tokens_that_are_not_there(server, connect):
    server.others = lambda handler, request: handler.say(200, completion(f"{len(server.requests)}", 30))
    with pytest.raises(ConfigError, match="found 30 tokens in a prompt with a picture, no more than in one without"):
        connect(server)


@pytest.mark.parametrize("num_words", [None, 3])
def test_a_server_that_answers_the_same_to_red_and_blue_is_blind(server, connect, num_words):
    """It may not count tokens at all, or count the words that stand for a lost picture."""

    def blindly(handler, request):
        handler.say(200, completion("a lovely picture", num_words and (30 + num_words if request.image else 30)))

    server.others = blindly
    with pytest.raises(ConfigError, match="found the same answer to a red and to a blue one: 'a lovely picture'"):
        connect(server)


def test_a_server_that_counts_no_tokens_is_believed_when_its_answers_differ(server, connect):
    def uncounted(handler, request):
        handler.say(200, completion(f"{request.image and request.image.getpixel((0, 0))}"))

    server.others = server.usual = uncounted
    assert caption(connect(server)).num_prompt_tokens is None


def test_answers_that_are_alike_are_believed_when_the_tokens_of_the_picture_are_counted(server, connect, caplog):
    """A small model may have nothing to say of colours."""
    server.others = lambda handler, request: handler.say(200, completion("hm", 100 if request.image else 30))
    connect(server)
    assert "answers 'hm' to a red and to a blue picture" in caplog.text


@pytest.mark.parametrize("raw_caption", [None, "a long caption " * 20])
def test_a_row_whose_picture_was_dropped_is_rejected(server, connect, raw_caption):
    engine = connect(server, captioner={"prompt_with_caption": "{caption}?"})
    assert isinstance(caption(engine, raw_caption=raw_caption), Caption)
    server.plan.append(without_image)
    found = caption(engine, raw_caption=raw_caption)
    assert found.reason == "image_unseen"
    assert "tokens with the image and" in found.detail
    assert isinstance(caption(engine, raw_caption=raw_caption), Caption)


def test_a_server_that_takes_no_words_alone_is_believed(server, connect):
    def pictures_only(handler, request):
        answer(handler, request) if request.image else handler.say(400, "where is the picture?")

    server.others = pictures_only
    assert isinstance(caption(connect(server)), Caption)


# Settings


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (401, "name the variable that holds its key in captioner.server.api_key_env"),
        (404, r"the URL usually ends in /v1, and captioner.model \(org/model\) must be"),
        (301, "the URL usually ends in /v1"),
        (400, r"captioner.model \(org/model\) must be the name of an image-text model that it serves"),
    ],
)
def test_what_a_server_refuses_at_the_start_is_a_setting_to_mend(server, connect, code, remedy):
    server.others = status(code, "no", Location="http://elsewhere/")
    with pytest.raises(ConfigError, match=f"^captioner.server: .*answered {code} .*{remedy}"):
        connect(server)


def test_a_server_that_does_not_answer_at_the_start_is_one_line(connect):
    url = f"http://127.0.0.1:{free_port()}/v1"
    why = f"{url} cannot be reached: Connect call failed .*; start the server, e.g. `vllm serve org/model`"
    with pytest.raises(JobError, match=f"^captioner.server: .*{why}"):
        connect(url)
    with ChatServer() as broken:
        broken.others = hang
        with pytest.raises(JobError, match="gave no answer within 0.2 s"):
            connect(broken, timeout_s=0.2)


def test_a_url_alone_is_a_server():
    assert Section.model_validate({"server": "http://a/v1"}).server.urls == ["http://a/v1"]
    assert Section.model_validate({"server": ["http://a/v1", "https://b/v1"]}).server.urls == [
        "http://a/v1",
        "https://b/v1",
    ]
    with pytest.raises(ValueError, match="expected http://host:port/v1 or https://..., found 'localhost:8000'"):
        Section.model_validate({"server": "localhost:8000"})
    with pytest.raises(ValueError, match="expected names of a-z, 0-9 and _, e.g. short, found 'Very short'"):
        Section.model_validate({"prompts": {"Very short": "x"}})


@pytest.mark.parametrize("given", ["https://user:s3cret@host/v1", "user:s3cret@host", "ftp://me:s3/cret@host"])
@pytest.mark.parametrize("spelt", ["server = '{}'", "server = ['http://a/v1', '{}']", "server = {{urls = '{}'}}"])
def test_a_password_in_a_url_is_refused_and_not_repeated(given, spelt, tmp_path):
    path = tmp_path / "caption.toml"
    path.write_text(spelt.format(given))
    with pytest.raises(ConfigError) as error:
        load(Section, path)
    assert str(error.value) == (
        f"{path}: server.urls: expected URLs without a user name or password, found one before an @; put the key into "
        "an environment variable and name that in api_key_env"
    )


# A real server


def test_transformers_serve_answers_as_the_engine_in_this_process(served_llava, miniatures, connect):
    """The same model, greedy: the same words and counts, although the pictures travel as JPEG."""
    from pixart_data.captioner import Captioner

    settings = {"model": miniatures["llava"], "max_new_tokens": 12, "prompt_with_caption": 'Given "{caption}", go on'}
    settings |= {"prompt": PROMPT, "prompts": {"short": "Describe this image in one sentence"}}
    here = Captioner(Section.model_validate(settings))
    there = connect(served_llava, captioner=settings, timeout_s=60.0)
    pictures = [picture("red"), picture("blue", (90, 200)), Image.linear_gradient("L").convert("RGB")]
    answers = []
    for engine in (here, there):
        images = [engine.prepare(image) for image in pictures]
        batch = {"image": images, "raw_caption": [None, "a caption of an <image>", "two"], "seed": [0, 1, 2]}
        answers.append(engine(batch)["answers"])
    assert answers[0] == answers[1]
    assert len({one["caption"].text for one in answers[1]}) == 3
    assert {one.num_tokens for row in answers[1] for one in row.values()} == {12}


def test_transformers_serve_refuses_another_model(served_llava, connect):
    with pytest.raises(ConfigError, match=r"Server is pinned to .*; captioner.model \(org/model\) must be the name"):
        connect(served_llava)


def test_transformers_serve_with_a_text_only_model_is_a_setting_to_mend(tmp_path, connect):
    """It answers chats with pictures, in silence, as if there were none."""
    from tests.serving import build_text_only, transformers_serve

    folder = tmp_path / "words"
    build_text_only(folder)
    with (
        transformers_serve(folder, tmp_path / "log") as url,
        pytest.raises(ConfigError, match="expected .* to see pictures, found .* no more than in one without"),
    ):
        connect(url, captioner={"model": str(folder)}, timeout_s=60.0)
