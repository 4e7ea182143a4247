"""A second judge on a real socket, that says what a test wants when it wants it."""

import contextlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class SecondJudge:
    """An OpenAI-compatible endpoint. `says`: probability of yes, or a whole (status, body)

    asked: the requests so far; `hold` keeps answers back until `let_go`
    """

    def __init__(self):
        self.says = 0.0
        self.asked = []
        self._may_go = threading.Event()
        self._may_go.set()
        self._new = threading.Condition()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                length = int(self.headers["content-length"])
                judge._take(dict(self.headers.items()), json.loads(self.rfile.read(length)))
                judge._may_go.wait(30)
                status, body = judge._answer()
                with contextlib.suppress(OSError):  # who asked may have given up
                    self.send_response(status)
                    self.send_header("content-length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def policy(self):
        """For a policy file's `second`."""
        return {"url": self.url, "model": "judge", "deadline_s": 20}

    def hold(self):
        self._may_go.clear()

    def let_go(self):
        self._may_go.set()

    def wait(self, n=1):
        """The n-th request's conversation; the time-out only guards against hanging."""
        with self._new:
            assert self._new.wait_for(lambda: len(self.asked) >= n, 30), f"asked {len(self.asked)} times"
        return self.asked[n - 1][1]["messages"][0]["content"]

    def close(self):
        self.let_go()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def _take(self, headers, body):
        with self._new:
            self.asked.append(({name.lower(): value for name, value in headers.items()}, body))
            self._new.notify_all()

    def _answer(self):
        if isinstance(self.says, tuple):
            return self.says[0], self.says[1]
        yes = min(1 - 1e-9, max(1e-9, self.says))
        top = [{"token": t, "logprob": math.log(p)} for t, p in (("Yes", yes), (" no", 1 - yes))]
        content = [{"token": "Yes", "logprob": 0.0, "top_logprobs": top}]
        choice = {"message": {"content": "Yes"}, "logprobs": {"content": content}}
        return 200, json.dumps({"choices": [choice]}).encode()
