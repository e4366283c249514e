"""A server that speaks as `vllm serve` does, a thread of this process; its ids come from an AQAA's own generator.

It keeps to the rules of a request as vLLM does with our plug-in, and can be told to misbehave.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from aqaa.scale.vllm.rules import KEY, Rules
from aqaa.tokenizers import dialogue

NAME = "stub"
ENDLESS_REPLIES = {"models without end": 200, "models in drips": 200, "refusal without end": 500,
                   "refusal in drips": 503}  # fmt: skip
ENDLESS_ANSWERS = {"line without end": b"x", "line in drips": b" ", "comments without end": b": hello\n\n",
                   "chunks without end": b'data: {"choices": []}\n\n', "comments in drips": b": hello\n\n"}  # fmt: skip
SIZES = (1, 2, 1, 3)  # ids in a chunk, in turn: a server may send several at once


class Stub(ThreadingHTTPServer):
    """model: an AQAA. fault: what to do in place of an answer (bytes: an event to send); after: how many ids come
    before that, each time. models: what it says it serves, in place of the truth. raw: logprobs over all ids."""

    daemon_threads = True

    def __init__(self, model, fault=None, after=0, max_model_len=None, models=None, raw=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.fault, self.after = model, fault, after
        self.max_model_len = max_model_len or model.config.backbone.max_seq_len
        self.requests, self.hold, self.models, self.raw = [], threading.Event(), models, raw

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def steps(self, request):
        """What the model says to a request, under the rules that came with it."""
        rules = Rules.from_json(request["vllm_xargs"][KEY])
        n_said, prompt = rules.said, request["prompt"]
        layout = dialogue.Resumed(rules.layout, tuple(prompt[-n_said:])) if n_said else rules.layout
        names = ("temperature", "top_p", "seed", "max_tokens")
        return self.model.generate(prompt, layout=layout, min_audio=rules.min_audio, repetition=rules.repetition,
                                   **{name: request[name] for name in names})

    def scores(self, prompt, ids, count):
        """[{id: logprob} of the `count` likeliest and the one that came], over the whole vocabulary."""
        with torch.inference_mode():
            logits = self.model.backbone(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
        listed = []
        for token, row in zip(ids, logits.log_softmax(-1)):
            values, likely = row.topk(min(count, len(row)))
            listed.append({token: float(row[token]), **dict(zip(likely.tolist(), values.tolist()))})
        return listed

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""


@contextmanager
def serve(model, **settings):
    """A Stub while the block lasts."""
    server = Stub(model, **settings)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.server.fault == "another service":
            return self._whole(200, b"<html>hello</html>")
        if self.server.fault == "moved":
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/elsewhere")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.server.fault in ENDLESS_REPLIES:
            self.send_response(ENDLESS_REPLIES[self.server.fault])
            self.send_header("Content-Length", str(1 << 40))
            self.end_headers()
            return self._endless(b" ", slow="drips" in self.server.fault)
        if self.server.models is not None:
            return self._whole(200, self.server.models)
        model = {"id": NAME, "object": "model", "owned_by": "vllm", "max_model_len": self.server.max_model_len}
        self._whole(200, json.dumps({"object": "list", "data": [model]}).encode())

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        vocabulary = self.server.model.config.backbone.vocab_size
        if max(request["prompt"]) >= vocabulary:
            return self._refuse(400, f"Token id {max(request['prompt'])} is out of vocabulary")
        if self.server.fault == "refuses":
            return self._refuse(503, "the engine is asleep")
        if self.server.fault == "silent":
            return self.server.hold.wait(20)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._answer(request)

    def _answer(self, request):
        """Chunks as /v1/completions sends them, then [DONE]; or the fault, `after` ids into the answer."""
        steps, count, first = list(self.server.steps(request)), 0, {"prompt_token_ids": request["prompt"]}
        self.listed = {}
        if self.server.raw:
            scores = self.server.scores(request["prompt"], [step.id for step in steps], request["logprobs"])
            steps = [step._replace(logprob=all_ids[step.id]) for step, all_ids in zip(steps, scores)]
            self.listed = {id(step): all_ids for step, all_ids in zip(steps, scores)}
        if self.server.fault == "no plug-in":
            steps = [step._replace(id=request["prompt"][0]) for step in steps]
        while count < len(steps):
            if self.server.fault and count >= self.server.after and self._misbehave():
                return
            part = steps[count : count + SIZES[count % len(SIZES)]]
            count += len(part)
            ended = "stop" if count == len(steps) and part[-1].kind == "marker" else None
            if count == len(steps) and not ended:
                ended = "length"
            self._event(json.dumps(self._chunk(part, ended, request["return_token_ids"], first)))
            first = {"prompt_token_ids": None}
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, part, ended, with_ids, first):
        logprobs = {
            "text_offset": [0] * len(part), "token_logprobs": [step.logprob for step in part],
            "tokens": [f"token_id:{step.id}" for step in part],
            "top_logprobs": [{f"token_id:{token}": logprob for token, logprob in
                              getattr(self, "listed", {}).get(id(step), {step.id: step.logprob}).items()}
                             for step in part],
        }  # fmt: skip
        choice = {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": ended, "stop_reason": None, **first,
                  "token_ids": [step.id for step in part] if with_ids else None, "weight_versions": None}  # fmt: skip
        return {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": NAME, "choices": [choice],
                "kv_transfer_params": None}  # fmt: skip

    def _misbehave(self):
        fault, last = self.server.fault, True
        if fault == "dies":
            self.connection.close()
            self.close_connection = True
        elif fault == "ends early":
            self._event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
        elif fault == "gives up":
            self._event(json.dumps({"error": {"message": "EngineCore encountered an issue.", "code": 500}}))
        elif fault == "babbles":
            self._event("{half a chu")
        elif fault == "no event":
            self._line(b"<html>bad gateway</html>\n")
        elif fault == "no ids":
            self._event(json.dumps({"choices": [{"index": 0, "text": "hello"}]}))
        elif isinstance(fault, bytes):
            self._line(b"data: " + fault + b"\n\n")
        elif fault in ENDLESS_ANSWERS:
            self._endless(ENDLESS_ANSWERS[fault], slow="drips" in fault, framed=True)
        elif fault == "stalls":
            self._line(b": still here\n\n")
            self.server.hold.wait(20)
        else:
            last = False
        return last

    def _endless(self, data, slow, framed=False):
        """Send it again and again, now and then if slow, else as fast as it goes."""
        data = data if slow else data * (1000 // len(data))
        while not self.server.hold.wait(0.05 if slow else 0):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if framed else data)

    def _event(self, text):
        self._line(f"data: {text}\n\n".encode())

    def _line(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _refuse(self, status, message):
        fault = {"message": message, "type": "BadRequestError", "param": None, "code": status}
        self._whole(status, json.dumps({"error": fault}).encode())

    def _whole(self, status, data):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
