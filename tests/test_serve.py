"""`aqaa serve` as OpenAI's own client finds it: a real server on a port of this machine, tiny weights."""

import asyncio
import base64
import io
import json
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from aqaa import Piece, audio, cli, serve
from aqaa.backbone import vision
from aqaa.config import AQTA, TQAA, TTS
from tests.conftest import RATE, fails, tone

PACKAGES = "starlette", "uvicorn", "websockets", "openai"
for package in PACKAGES:
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'aqaa[test]' brings it.")

import openai  # noqa: E402
from websockets.exceptions import ConnectionClosed  # noqa: E402

from aqaa.serve import app, sound  # noqa: E402
from aqaa.serve.guard import Limits, check_host  # noqa: E402
from aqaa.serve.realtime import Session, line  # noqa: E402
from aqaa.serve.requests import Chats, Fault, cut  # noqa: E402
from aqaa.serve.worker import Reply, Waiting, Worker  # noqa: E402

SAMPLING = {"seed": 3, "max_tokens": 60}
QUIET = np.zeros(RATE, np.float32)


@contextmanager
def serving(model, **options):
    """Its address, while it runs in a thread."""
    with running(model, **options) as server:
        yield address_of(server)


def address_of(server):
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@contextmanager
def running(model, **options):
    server = app.server(model, port=0, **{**SAMPLING, **options})
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server
    finally:
        server.should_exit = True
        thread.join(40)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(tiny):
    with serving(tiny) as place:
        yield place


def client_of(address, kind=openai.OpenAI, key="none"):
    return kind(api_key=key, base_url=f"{address}/v1", max_retries=0)


@pytest.fixture
def client(address):
    return client_of(address)


def wav_of(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV")
    return base64.b64encode(file.getvalue()).decode()


def user(part):
    return {"role": "user", "content": [part]}


def asked(samples):
    return user({"type": "input_audio", "input_audio": {"data": wav_of(samples), "format": "wav"}})


def spoken(form="wav"):
    return {"modalities": ["text", "audio"], "audio": {"voice": "aqaa", "format": form}, "model": "aqaa"}


# ---- sound ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate, to", [(24_000, 16_000), (16_000, 24_000), (22_050, 24_000), (24_000, 24_000)])
def test_packets_are_resampled_as_the_whole_is(rate, to):
    wav, stream, rng = torch.from_numpy(tone(1.0, rate)), audio.Resampled(rate, to), np.random.default_rng(0)
    parts, place = [], 0
    while place < len(wav):
        step = int(rng.integers(1, 3000))
        parts.append(stream.push(wav[place : place + step]))
        place += step
    whole = audio.resample(wav, rate, to)
    made = torch.cat([*parts, stream.finish()])
    assert made.shape == whole.shape and (made - whole).abs().max() < 1e-4


def test_raw_sound_comes_back_and_half_a_sample_is_refused():
    wav = torch.from_numpy(tone(0.1))
    assert (sound.samples(sound.pcm(wav)) - wav).abs().max() < 1e-4
    with fails("half a sample", error=audio.AudioError):
        sound.samples(b"abc")
    with fails("base64", error=audio.AudioError):
        sound.unpacked("no base64!")


def test_the_model_is_asked_as_it_was_trained(tiny, client, monkeypatch):
    """Each way from sound or text to sound or text has the control token of its training."""
    prompts, own = [], tiny.generate
    monkeypatch.setattr(tiny, "generate", lambda prompt, **options: prompts.append(prompt) or own(prompt, **options))
    client.audio.speech.create(model="aqaa", voice="aqaa", input="seven. five", response_format="pcm").read()
    for message in (asked(tone()), {"role": "user", "content": "seven"}):
        client.chat.completions.create(model="aqaa", messages=[message])
        client.chat.completions.create(messages=[message], **spoken())
    markers = [prompt[1] if prompt[1] != tiny.ids.bot else None for prompt in prompts]
    assert markers == [TTS, TTS, AQTA, None, None, TQAA]


def test_texts_are_read_in_the_words_of_the_mini(tiny, client, monkeypatch):
    said = {client.chat.completions.create(model="aqaa", messages=[{"role": "user", "content": text}])
            .choices[0].message.content for text in ("what is seven", "What is SEVEN?")}  # fmt: skip
    assert len(said) == 1
    with pytest.raises(openai.BadRequestError):
        client.audio.speech.create(model="aqaa", voice="aqaa", input="?!", response_format="pcm")


def test_long_sentences_are_cut_between_words():
    text = " ".join(["word"] * 200)
    pieces = list(cut(text))
    assert " ".join(pieces) == text and max(map(len, pieces)) <= 200
    assert max(map(len, cut("x" * 500))) <= 200


# ---- the line before the model ---------------------------------------------------------------------------------------


def test_twenty_wait_in_their_order_and_none_is_lost():
    began = []

    def job(i):
        def make():
            began.append(i)
            for k in range(3):
                time.sleep(0.002)
                yield i, k
        return make

    async def listen(worker, i):
        return [item async for item in Reply(job(i)).items(worker)]

    async def run():
        worker = Worker(seats=2)
        got = await asyncio.gather(*(listen(worker, i) for i in range(20)))
        worker.stop()
        return got

    got = asyncio.run(run())
    for i, items in enumerate(got):
        assert [item for item in items if not isinstance(item, Waiting)] == [(i, k) for k in range(3)]
        places = [int(item) for item in items if isinstance(item, Waiting)]
        assert places == sorted(places, reverse=True)
    assert began == sorted(began) and any(isinstance(item, Waiting) for item in got[19])


def test_one_who_does_not_read_and_one_who_fails_hold_nobody():
    def broken():
        yield 1
        raise Fault("it cannot be done.")

    async def run():
        worker = Worker(seats=1)
        idle = Reply(lambda: iter(range(100_000))).items(worker)
        await anext(idle)  # and reads no more
        with pytest.raises(Fault):
            [item async for item in Reply(broken).items(worker)]
        after = [item async for item in Reply(lambda: iter("ab")).items(worker)]
        await idle.aclose()
        worker.stop()
        return after

    assert [item for item in asyncio.run(run()) if not isinstance(item, Waiting)] == ["a", "b"]


# ---- /v1/audio/speech ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["wav", "mp3", "flac", "opus", "pcm"])
def test_a_text_is_spoken_in_every_format(client, form):
    data = client.audio.speech.create(model="aqaa", voice="aqaa", input="good morning", response_format=form).read()
    if form == "pcm":
        assert len(data) > sound.RATE // 10
        return
    wav, rate = soundfile.read(io.BytesIO(data if form != "wav" else sound.wav_header(len(data) - 44) + data[44:]))
    assert rate == 24_000 and len(wav) > rate // 20 and np.abs(wav).max() > 0


def test_speech_is_streamed(client):
    with client.audio.speech.with_streaming_response.create(
        model="aqaa", voice="aqaa", input="seven plus five. five plus seven.", response_format="pcm"
    ) as response:
        parts = list(response.iter_bytes(512))
    assert len(parts) > 1 and sum(map(len, parts)) % 2 == 0


# ---- /v1/chat/completions --------------------------------------------------------------------------------------------


def test_a_spoken_question_gets_a_spoken_answer_and_a_second_turn(client, tiny):
    first = client.chat.completions.create(messages=[asked(tone())], **spoken())
    message = first.choices[0].message
    wav, rate = soundfile.read(io.BytesIO(base64.b64decode(message.audio.data)))
    local = tiny.ask((tone(), RATE), **SAMPLING)
    assert message.audio.transcript == local.text and first.usage.completion_tokens == len(local.tokens["answer"])
    assert rate == 24_000 and abs(len(wav) / rate - local.seconds) < 0.01
    history = [asked(tone()), {"role": "assistant", "audio": {"id": message.audio.id}}, asked(tone(pitch=200))]
    second = client.chat.completions.create(messages=history, **spoken())
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_an_answer_is_streamed_as_it_is_whole(client):
    options = {"messages": [asked(tone())], **spoken("pcm16")}
    whole = client.chat.completions.create(**options).choices[0].message.audio
    data, words, last = b"", "", None
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        last = chunk
        heard = chunk.to_dict()["choices"][0]["delta"].get("audio", {}) if chunk.choices else {}  # as it was sent
        data += base64.b64decode(heard.get("data", ""))
        words += heard.get("transcript", "")
    assert data == base64.b64decode(whole.data) and words.strip() == whole.transcript
    assert last.usage.total_tokens > 0


def test_a_written_answer_that_is_cut_says_so(tiny, monkeypatch):
    monkeypatch.setattr("aqaa.serve.requests.LONGEST_WRITTEN", 1)
    chats = Chats(tiny, None, {"seed": 3})
    *_, end = chats.answer(chats.asked({"messages": [{"role": "user", "content": "what is seven"}]}))
    assert end["usage"]["completion_tokens"] == 1 and end["finish_reason"] == "length"


def test_text_in_and_text_out_by_the_async_client(address):
    async def run():
        async with client_of(address, openai.AsyncOpenAI) as client:
            messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is seven"}]
            whole = await client.chat.completions.create(model="aqaa", messages=messages)
            stream = await client.chat.completions.create(model="aqaa", messages=messages, stream=True)
            return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(run())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def pictured(colour):
    data = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def test_a_picture_is_looked_at_in_text_and_in_sound(client, tiny, monkeypatch):
    torch.manual_seed(0)
    eyes = vision.Vision(tiny.config).eval()
    looked, pixels = [], vision.pixels
    monkeypatch.setitem(tiny.__dict__, "vision", eyes)
    monkeypatch.setattr(vision, "pixels", lambda *picture: looked.append(pixels(*picture)) or looked[-1])
    try:
        for options in ({"model": "aqaa"}, spoken()):
            said = [{"type": "text", "text": "what is it"}, pictured("red")]
            whole = client.chat.completions.create(messages=[{"role": "user", "content": said}], **options)
            assert whole.usage.prompt_tokens > tiny.config.vision.rows and whole.choices[0].finish_reason
        assert len(looked) == 2 and torch.equal(looked[0], looked[1]) and looked[0].shape[0] == 3
        bad = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
        with pytest.raises(openai.BadRequestError, match="no picture that can be read"):
            client.chat.completions.create(model="aqaa", messages=[user(bad)])
    finally:
        tiny.__dict__.pop("seeing", None)


def test_twenty_at_once_all_get_the_same_answer(address):
    async def run():
        async with client_of(address, openai.AsyncOpenAI) as client:
            calls = [client.chat.completions.create(messages=[asked(tone())], **spoken()) for _ in range(20)]
            return await asyncio.gather(*calls)

    assert len({answer.choices[0].message.audio.data for answer in asyncio.run(run())}) == 1


@pytest.mark.parametrize("messages, more, words", [
    ([], {}, "not the user's"),
    ([user({"type": "input_audio", "input_audio": {"data": "?", "format": "wav"}})], {}, "base64"),
    ([user({"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}})], {}, "input_audio"),
    ([user({"type": "image_url", "image_url": {"url": "http://there/x.png"}})], {}, "no picture in it"),
    ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}})], {}, "picture is no base64"),
    ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}})], {}, "see no pictures"),
    ([user({"type": "file", "file": {}})], {}, "no text, input_audio or image_url"),
    ([{"role": "user", "content": "hello"}], {"temperature": 5}, "temperature"),
    ([{"role": "user", "content": "hello"}], {"n": 3}, "one answer"),
    ([{"role": "user", "content": "hello"}], {"modalities": ["text", "audio"]}, "audio is missing"),
])  # fmt: skip
def test_bad_requests_are_refused_in_one_sentence(client, messages, more, words):
    with pytest.raises(openai.BadRequestError) as fault:
        client.chat.completions.create(model="aqaa", messages=messages, **more)
    assert words in fault.value.body["message"] and fault.value.body["type"] == "invalid_request_error"
    assert "\n" not in fault.value.body["message"] and "Traceback" not in fault.value.body["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_leaves_no_work(tiny, client, monkeypatch, stream):
    closed = threading.Event()

    def endless(*_, **__):
        try:
            while True:
                time.sleep(0.01)
                yield Piece("word ", torch.zeros(160))
        finally:
            closed.set()

    monkeypatch.setattr(tiny, "stream", endless)
    options = {"messages": [{"role": "user", "content": "hello"}], **spoken("pcm16"), "stream": stream}
    if stream:
        with client.chat.completions.create(**options) as chunks:
            # Sound came, so the model has begun; some clients give every delta an `audio`, mostly None.
            next(chunk for chunk in chunks if getattr(chunk.choices[0].delta, "audio", None))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1.0).chat.completions.create(**options)
    assert closed.wait(20)


def test_a_stop_lets_answers_end_and_tells_the_others(tiny):
    with running(tiny) as server:
        client = client_of(address_of(server))
        with client.realtime.connect(model="aqaa") as talk:
            talk.recv()
            chunks = client.chat.completions.create(messages=[asked(tone())], stream=True, **spoken("pcm16"))
            next(chunks)
            server.should_exit = True
            assert list(chunks)[-1].choices[0].finish_reason in ("stop", "length")
            with pytest.raises(Exception, match="1012"):  # the server restarts, in the words of WebSockets
                talk.recv()


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_load", None)
    with app.bound("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--port", port]) == 1
    err = capsys.readouterr().err
    assert port in err and "choose another --port" in err and err.count("\n") == 1


def test_missing_packages_are_one_sentence(monkeypatch):
    monkeypatch.delitem(sys.modules, "aqaa.serve.app")
    monkeypatch.delattr(serve, "app")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with fails("uvicorn", "pip install 'aqaa[serve]'", error=ValueError):
        serve.ready("127.0.0.1", None)


def test_models_and_unknown_paths(client):
    assert [model.id for model in client.models.list()] == ["aqaa"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError) as fault:
        client.embeddings.create(model="aqaa", input="x", encoding_format="float")
    assert fault.value.body["type"] == "invalid_request_error"


# ---- who may ask -----------------------------------------------------------------------------------------------------


def test_others_need_a_token():
    check_host("127.0.0.1", None)
    check_host("0.0.0.0", "secret")
    with fails("0.0.0.0", "--token", error=ValueError):
        check_host("0.0.0.0", None)


def test_the_token_is_asked_for_and_the_page_is_not_hidden(tiny):
    import httpx

    with serving(tiny, token="secret") as address:
        with pytest.raises(openai.AuthenticationError):
            client_of(address, key="guess").models.list()
        assert client_of(address, key="secret").models.list().data
        assert "<button" in httpx.get(address).text
        with client_of(address, key="secret").realtime.connect(model="aqaa") as talk:
            assert talk.recv().type == "session.created"
        with pytest.raises(Exception, match="401"), client_of(address, key="guess").realtime.connect(model="aqaa"):
            pass


def test_pages_of_other_sites_are_refused(address):
    import httpx

    for headers in ({"origin": "https://example.org"}, {"host": "example.org"}, {"origin": "null"}):
        reply = httpx.get(f"{address}/v1/models", headers=headers)
        assert reply.status_code == 403 and "--token" in reply.json()["error"]["message"]


def test_limits_of_size_and_of_sessions(tiny):
    with serving(tiny, limits=Limits(sessions=1, body=2000)) as address:
        client = client_of(address)
        with pytest.raises(openai.APIStatusError) as fault:
            client.chat.completions.create(model="aqaa", messages=[{"role": "user", "content": "x" * 3000}])
        assert fault.value.status_code == 413
        with client.realtime.connect(model="aqaa") as talk:
            talk.recv()
            with pytest.raises(openai.RateLimitError):
                client.chat.completions.create(model="aqaa", messages=[{"role": "user", "content": "x"}])


def test_a_client_that_does_not_read_is_let_go(tiny, monkeypatch):
    monkeypatch.setattr(app, "LEAVE", 0.2)
    with serving(tiny, limits=Limits(unread=3_000_000)) as address:
        with client_of(address).realtime.connect(model="aqaa") as talk:
            talk.recv()
            count = 0
            with pytest.raises(ConnectionClosed):
                told = {"type": "realtime", "instructions": "x" * 100_000}
                for _ in range(300):  # each is told back, more than sockets hold, and nobody reads
                    talk.send({"type": "session.update", "session": told})
                while True:
                    talk.recv()
                    count += 1
            assert count < 300
        assert client_of(address).models.list().data


# ---- /v1/realtime ----------------------------------------------------------------------------------------------------


def append(talk, samples):
    """Send samples at 16 kHz as the interface wants them, 0.1 s at a time."""
    wav = audio.resample(torch.as_tensor(samples), RATE, sound.RATE)
    for part in wav.split(2400):
        talk.input_audio_buffer.append(audio=sound.packed(sound.pcm(part)))


def until(talk, kind):
    """Events up to the first of a kind."""
    events = []
    while not events or events[-1].type != kind:
        events.append(talk.recv())
    return events


def kinds(events):
    return [event.type for i, event in enumerate(events) if not i or event.type != events[i - 1].type]


MANUAL = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}


def test_the_client_ends_the_turns(client):
    with client.realtime.connect(model="aqaa") as talk:
        talk.session.update(session=MANUAL)
        assert until(talk, "session.updated")[-1].session.audio.input.turn_detection is None
        for _ in range(2):  # a second turn
            append(talk, tone())
            talk.input_audio_buffer.commit()
            item = until(talk, "conversation.item.done")[0].item_id
            talk.response.create()
            events = until(talk, "response.done")
            data = b"".join(base64.b64decode(e.delta) for e in events if e.type == "response.output_audio.delta")
            said = "".join(e.delta for e in events if e.type == "response.output_audio_transcript.delta").strip()
            (message,) = events[-1].response.output
            assert events[-1].response.status == "completed" and len(data) > sound.RATE // 10
            assert message.content[0].transcript == said
            heard = until(talk, "conversation.item.input_audio_transcription.completed")[-1]
            assert heard.item_id == item


def test_the_server_finds_the_turns(client):
    with client.realtime.connect(model="aqaa") as talk:
        append(talk, np.concatenate([QUIET, tone(1.0), QUIET, QUIET]))
        told = kinds(until(talk, "response.done"))
        order = ["session.created", "input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped",
                 "input_audio_buffer.committed", "response.created", "response.output_item.added", "response.done"]
        assert [kind for kind in told if kind in order] == order


def test_twenty_talk_at_once_and_those_who_wait_are_told(address):
    async def one(client):
        async with client.realtime.connect(model="aqaa") as talk:
            await talk.session.update(session=MANUAL)
            wav = audio.resample(torch.from_numpy(tone()), RATE, sound.RATE)
            await talk.input_audio_buffer.append(audio=sound.packed(sound.pcm(wav)))
            await talk.input_audio_buffer.commit()
            await talk.response.create()
            events = []
            while not events or events[-1].type != "response.done":
                events.append(await talk.recv())
            return events

    async def run():
        async with client_of(address, openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client) for _ in range(20)))

    told = asyncio.run(run())
    assert {events[-1].response.status for events in told} == {"completed"}
    places = [event.place for events in told for event in events if event.type == "queue.updated"]
    assert places and min(places) == 1 and max(places) <= 18


def session_of(model):
    """A Session without a server, whose clock stands still, and what it tells."""
    told = []
    session = Session(model, told.append, **SAMPLING)
    session.talk.clock = lambda: 0.0
    return session, told


def feed(session, samples, work=False):
    """Sound at 16 kHz by events of 0.1 s."""
    for part in audio.resample(torch.as_tensor(samples), RATE, sound.RATE).split(2400):
        session.put(line({"type": "input_audio_buffer.append", "audio": sound.packed(sound.pcm(part))}))
        session.drain()
        while work and session.busy:
            session.work()


def types(told):
    return [event["type"].removeprefix("input_audio_buffer.") for event in told]


def test_a_turn_that_goes_on_is_another_item(tiny):
    session, told = session_of(tiny)
    feed(session, np.concatenate([QUIET, tone(0.8), QUIET]))
    first = ["speech_started", "speech_stopped", "committed", "conversation.item.added", "conversation.item.done",
             "response.created"]  # fmt: skip
    assert types(told) == ["session.created", *first]
    feed(session, tone(0.5))
    assert types(told)[7:] == ["response.done", "conversation.item.deleted", "speech_started"]
    assert told[7]["response"]["status"] == "cancelled" and told[8]["item_id"] == told[3]["item_id"]
    feed(session, QUIET, work=True)
    assert told[-1]["type"].endswith("transcription.completed") and told[-1]["item_id"] == told[9]["item_id"]
    added = [(event["item"]["id"], event["previous_item_id"])
             for event in told if event["type"] == "conversation.item.added"]  # fmt: skip
    assert added[1][1] is None and added[2][1] == added[1][0]  # the deleted one is before nobody


def test_what_is_cleared_cancelled_and_truncated(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "transcribe", lambda ids: "what is seven")
    session, told = session_of(tiny)

    def send(kind, **content):
        del told[:]
        session.put(line({"type": kind, **content}))
        session.drain()
        return types(told)

    assert send("session.update", session=MANUAL) == ["session.updated"]
    feed(session, tone())
    assert "committed" in send("input_audio_buffer.commit")
    feed(session, tone())  # for the question after it
    assert send("input_audio_buffer.clear") == ["cleared"]  # and the one that was committed stays
    assert "response.created" in send("response.create")
    while session.busy:
        session.work()
    said = next(event["item_id"] for event in told if event["type"] == "response.output_audio.delta")
    assert len(session.talk.history) == 2
    assert send("conversation.item.truncate", item_id="item_x", audio_end_ms=0) == ["error"]
    assert len(session.talk.history) == 2
    send("conversation.item.truncate", item_id=said, content_index=0, audio_end_ms=0)
    assert told[-1]["type"] == "conversation.item.truncated" and session.talk.history == []
    feed(session, tone())
    send("input_audio_buffer.commit")
    send("response.create")
    assert send("response.cancel") == ["conversation.item.deleted", "response.done"]
    assert not session.busy and len(session.talk.turns) == 1


def test_what_comes_too_early_is_kept_for_a_minute(tiny):
    session, told = session_of(tiny)
    session.put(line({"type": "session.update", "session": MANUAL}))
    feed(session, tone())
    session.put(line({"type": "input_audio_buffer.commit"}))
    part = sound.packed(bytes(2 * 10 * sound.RATE))  # 10 s
    for _ in range(9):
        session.put(line({"type": "input_audio_buffer.append", "audio": part}))
    assert session.unread > 9 * len(part)
    session.drain()
    assert session.unread == 0 and told[-1]["type"] == "error" and "60 s" in told[-1]["error"]["message"]
    assert sum(map(len, session._later)) <= 70 * RATE


def test_an_answer_that_failed_and_a_transcript_that_failed_end_nothing(tiny, monkeypatch):
    session, told = session_of(tiny)
    for name in ("transcribe", "stream"):
        with monkeypatch.context() as broken:
            broken.setattr(tiny, name, lambda *_, **__: 1 / 0)
            feed(session, np.concatenate([QUIET, tone(0.8), QUIET]))
            while session.busy:
                try:
                    session.work()
                except ZeroDivisionError as fault:
                    session.fail(fault)
        assert "error" in types(told) and session._untold == [] and session.answer is None
        del told[:]
        session.talk.stop()
    feed(session, np.concatenate([QUIET, tone(0.8), QUIET]), work=True)
    assert types(told)[-1] == "conversation.item.input_audio_transcription.completed"


def test_an_answer_is_cancelled_and_the_session_goes_on(client):
    with client.realtime.connect(model="aqaa") as talk:
        talk.session.update(session=MANUAL)
        append(talk, tone())
        talk.input_audio_buffer.commit()
        talk.response.create()
        until(talk, "response.created")
        talk.response.cancel()
        assert until(talk, "response.done")[-1].response.status in ("cancelled", "completed")
        append(talk, tone())
        talk.input_audio_buffer.clear()
        until(talk, "input_audio_buffer.cleared")
        talk.input_audio_buffer.commit()
        assert until(talk, "error")[-1].error.code == "input_audio_buffer_commit_empty"


@pytest.mark.parametrize("event, words", [
    ({"type": "dance"}, "no event"), ({"type": "input_audio_buffer.append", "audio": "?"}, "base64"),
    ({"type": "input_audio_buffer.append"}, "audio is missing"), ({"type": "response.cancel"}, "no answer"),
    ({"type": "session.update", "session": {"output_modalities": ["text"]}}, "spoken"),
])  # fmt: skip
def test_bad_events_are_answered_and_end_nothing(client, event, words):
    with client.realtime.connect(model="aqaa") as talk:
        talk.send({"event_id": "mine", **event})
        told = until(talk, "error")[-1].error
        assert words in told.message and told.event_id == "mine"
        talk.send(json.loads(json.dumps({"type": "input_audio_buffer.clear"})))
        until(talk, "input_audio_buffer.cleared")


def test_the_async_client_talks_too(address):
    async def run():
        async with client_of(address, openai.AsyncOpenAI).realtime.connect(model="aqaa") as talk:
            await talk.session.update(session=MANUAL)
            wav = audio.resample(torch.from_numpy(tone()), RATE, sound.RATE)
            await talk.input_audio_buffer.append(audio=sound.packed(sound.pcm(wav)))
            await talk.input_audio_buffer.commit()
            await talk.response.create()
            async for event in talk:
                if event.type == "response.done":
                    return event.response.status

    assert asyncio.run(run()) == "completed"
