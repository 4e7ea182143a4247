"""Bodies that no application should see, for both engines: oversize and malformed shapes (T12), and fuzzed ones."""

import contextlib
import json
import random
import select
import time

from .web import HEAD, status, whole

MB2 = 2 * 2**20
CHAT = {"model": "tiny-llama", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def chunks(body, size=65536):
    pieces = (body[i : i + size] for i in range(0, len(body), size))
    return CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


def chat(**fields):
    return json.dumps(CHAT | fields).encode()


def bomb():
    import gzip

    return gzip.compress(b" " * 50_000_000 + b"{}")


LONG = b'{"model": "tiny-llama", "x": "' + b"a" * MB2 + b'"}'
SHAPES = {
    "64 KiB of headers": (HEAD + b"X: " + b"a" * 65536 + b"\r\n\r\n", 431, "headers"),
    "5 MB of headers": (HEAD + b"X: " + b"a" * 5_000_000 + b"\r\n\r\n", 431, "headers"),
    "2 MB + 1": (whole(LONG[:MB2] + b"}"), 413, "body"),
    "2 MB + 1 in chunks": (chunks(LONG[:MB2] + b"}"), 413, "body"),
    "2 MB + 1, never sent": (HEAD + b"Content-Length: %d\r\n\r\n" % (MB2 + 1), 413, "body"),
    "endless chunks": (None, 413, "body"),
    "10,000 deep": (whole(b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"), 400, "depth"),
    "10,000 deep, objects": (whole(b'{"a":' * 10_000 + b"1" + b"}" * 10_000), 400, "depth"),
    "65 deep": (whole(b"[" * 65 + b"]" * 65), 400, "depth"),
    "2 million brackets": (whole(b"[" * MB2), 400, "json"),
    "a million messages": (whole(b'{"messages": [' + b"1," * 1_000_000 + b"1]}"), 400, "json"),
    "1,001 messages": (whole(chat(messages=CHAT["messages"] * 1001)), 400, "messages"),
    "1,001 in conversations": (whole(chat(messages=[CHAT["messages"] * 77] * 13)), 400, "messages"),
    "1,001 inputs": (whole(chat(input=["x"] * 1001)), 400, "messages"),
    "NaN": (whole(b'{"temperature": NaN}'), 400, "json"),
    "Infinity": (whole(b'{"temperature": Infinity}'), 400, "json"),
    "-Infinity": (whole(b'{"a": [-Infinity]}'), 400, "json"),
    "1e999": (whole(b'{"temperature": 1e999}'), 400, "json"),
    "1e+0999": (whole(b'{"temperature": 1E+0999}'), 400, "json"),
    "210 digits and e99": (whole(b'{"temperature": ' + b"9" * 210 + b"e99}"), 400, "json"),
    "310 digits and a point": (whole(b'{"temperature": ' + b"9" * 310 + b".5}"), 400, "json"),
    "a number of 5,000 digits": (whole(b'{"seed": ' + b"9" * 5000 + b"}"), 400, "json"),
    "half a pair, escaped": (whole(b'{"a": "\\ud800"}'), 400, "json"),
    "half a pair in a name": (whole(b'{"\\uDfff": 1}'), 400, "json"),
    "pairs in the wrong order": (whole(b'["\\ude00\\ud83d"]'), 400, "json"),
    "half a pair in raw bytes": (whole(b'{"a": "\xed\xa0\x80"}'), 400, "json"),
    "UTF-16": (whole(chat().decode().encode("utf-16")), 400, "json"),
    "a byte order mark": (whole(b"\xef\xbb\xbf" + chat()), 400, "json"),
    "overlong UTF-8": (whole(b'{"a": "\xc0\xaf"}'), 400, "json"),
    "no JSON": (whole(b"hello"), 400, "json"),
    "two bodies": (whole(chat() + chat()), 400, "json"),
    "a comment": (whole(b'{"a": 1} // x'), 400, "json"),
    "a bare NUL": (whole(b'{"a": "\x00"}'), 400, "json"),
    "gzip bomb": (whole(bomb(), b"Content-Encoding: gzip\r\n"), 415, "body"),
    "deflate after identity": (whole(chat(), b"Content-Encoding: identity\r\nContent-Encoding: br\r\n"), 415, "body"),
}


def send_shape(port_of, data):
    """(status, seconds from the last byte that mattered to the answer)"""
    with port_of() as raw, contextlib.suppress(ConnectionError):
        if data is None:
            raw.sendall(CHUNKED)
            piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
            for _ in range(100_000):
                start = time.perf_counter()
                raw.sendall(piece)
                if select.select([raw], [], [], 0)[0]:
                    break
        else:
            start = time.perf_counter()
            with contextlib.suppress(ConnectionError):
                raw.sendall(data)
        said = raw.recv(65536)
        return status(said), time.perf_counter() - start
    raise AssertionError("reset before an answer")


def fuzzed(n, seed=0):
    """Bodies that are no JSON in UTF-8, each one mutation or more away from one that is."""
    chance = random.Random(seed)
    valid = chat(stop=["a", "\u2028"], logit_bias={"5": 1.5}, stream=True, user='\U0001f600 \\ " /')
    found = []
    while len(found) < n:
        body = bytearray(valid)
        for _ in range(chance.randint(1, 4)):
            at, kind = chance.randrange(len(body)), chance.randrange(5)
            if kind == 0:
                del body[at:]
                body += chance.choice([b"", b"\x00", b"\xff", b"{"])
            elif kind == 1:
                body[at] = chance.randrange(256)
            elif kind == 2:
                body[at:at] = chance.choice([b'"', b"\\", b"]", b"NaN", b"\xed\xa0\x80", b"\\ud800", b",,", b"\x1f"])
            elif kind == 3:
                del body[at : at + chance.randint(1, 9)]
            else:
                body[at:at] = bytes(body[at : at + 30])
            if not body:
                break
        if body and not is_json(bytes(body)):
            found.append(bytes(body))
    return found


def is_json(body):
    try:
        json.dumps(json.loads(body.decode()), ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return False
    return True
