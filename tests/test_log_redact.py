"""Secrets as people spell them in settings, code, headers and JSON; and that what is none stays."""

import json

import pytest

from monitor.traffic.redact import redact, redacted

S = "hunter22"
SPELLED = [
    "DB_PASSWORD=hunter22",
    "export PGPASSWORD='hunter22'; psql",
    "POSTGRES_PASSWORD: hunter22",
    "MYSQL_PWD=hunter22",
    "DB_PASS=hunter22",
    "DB_PASS = hunter22",
    'auth: {user: "me", pass: "hunter22"}',
    "SECRET_KEY='hunter22'",
    "SECRET_KEY = b'hunter22'",
    "JWT_SECRET=hunter22",
    "aws_secret_access_key = hunter22",
    "AWS_SESSION_TOKEN=hunter22",
    '"access_token": "hunter22"',
    '{"SecretAccessKey": "hunter22"}',
    '{"clientSecret":"hunter22","n":1}',
    "AccountKey=hunter22;EndpointSuffix=core",
    "spring.datasource.password=hunter22",
    "admin-password: hunter22",
    "password_prod_2: hunter22",
    "password => 'hunter22'",
    'if password == "hunter22":',
    "password := hunter22",
    "DB_PASSWORD=hunter22==",
    "DB_PASSWORD=hunter22=\n",
    "secret: password= hunter22",
    'passphrase: "correct horse hunter22 staple"',
    "password: 'it has spaces, and commas; hunter22'",
    r'"password": "a \"quoted\" hunter22"',
    "password: [hunter22",
    "redis://:hunter22@redis:6379",
    "postgres://me:hunter22@db/x",
    "amqp://me:a:hunter22@mq",
    "Authorization: Basic hunter22",
    "authorization: hunter22",
    "curl -H 'Authorization: Token hunter22' https://x.example",
    '{"Authorization": "Bearer hunter22"}',
    "X-Auth-Token: hunter22",
    "-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: a-b\n\nhunter22\nhunter22\n-----END PGP PRIVATE KEY BLOCK-----",
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,1\n\nhunter22\n-----END",
    json.dumps({"a": json.dumps({"password": "hunter22"})}),
    json.dumps(json.dumps(json.dumps({"api_key": "x hunter22 y", "b": 1}))),
    json.dumps(json.dumps({"password": 'a " hunter22'})),
    "password: abc,hunter22",
    "password=ab'hunter22",
    'token: abcd"hunter22',
    "secret=abcdefgh;hunter22,hunter22",
]


@pytest.mark.parametrize("text", SPELLED)
def test_a_secret_is_found_however_it_is_spelled(text):
    for around in ("{}", "set {} and go on", "[{}]", "a\n{}\nb"):
        found = redact(around.replace("{}", text))
        assert S not in found and "[" in found, found


STAYS = [
    "max_tokens: 5",
    '{"max_tokens": 4096, "prompt_tokens": 12345, "stop_token_ids": [1]}',
    "token_count: 123456, token_type: bearer",
    "def key(x): return tokens[x]",
    "def password_is_strong(text): ...",
    "the secret of good bread is patience",
    "The Secret Garden: a novel; a token gesture; passing: 1234",
    "Basic understanding of a bearer of bad news",
    "tokenizer = AutoTokenizer.from_pretrained(name)",
    "keyboard: 12345; monkey=12345; compass: north; bypass = true; pass_rate = 0.9512",
    "password: null, secret: false, token: None",
    '"password": {"type": "string"}',
    "https://example.com:8080/a@b",
    "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----",
]


@pytest.mark.parametrize("text", STAYS)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


LONG = "aB3/" * 2000
PLAIN = "aB3_" * 2000


@pytest.mark.parametrize(
    "text",
    [
        f"aws_session_token = {LONG}",
        f"password: {LONG}",
        f'{{"client_secret": "{LONG}"}}',
        json.dumps(json.dumps({"client_secret": LONG})),
        f"Authorization: Bearer {LONG}",
        f"authorization: {LONG}",
        f"a bearer {LONG}",
        f"https://me:{PLAIN[:4000]}@host",
        f"eyJhbGciOiJIUzI1NiJ9.{PLAIN}.{PLAIN}",
        f"sk-{PLAIN}",
        f"pypi-{PLAIN}",
        f"xoxb-{PLAIN}",
        f"ghp_{'aB3' * 1000}",
    ],
    ids=lambda text: text[:16],
)
def test_of_a_long_secret_no_end_stays(text):
    found = redact(f"{text} and on")
    assert "aB3" not in found and found.endswith(" and on")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"password":12345678,"user":"me"}', '{"[password],"user":"me"}'),
        ("f(password='hunter22',user='me')", "f([password],user='me')"),
        ("password: foo, bar", "password: foo, bar"),
        ("Password=hunter22;User=me and on", "[password] and on"),
    ],
)
def test_a_value_ends_where_a_field_or_an_argument_does(text, kept):
    assert redact(text) == kept


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ({"password": "hunter22"}, {"password": "[password]"}),
        ({"dbPassword": "a b", "user": "me"}, {"dbPassword": "[password]", "user": "me"}),
        ({"pin": 1, "passwords": ["a", 7, None]}, {"pin": 1, "passwords": ["[password]", "[password]", None]}),
        ({"password": 12345678, "secret": True}, {"password": "[password]", "secret": True}),
        (
            {"auth": {"user": "me", "pass": "x"}, "db_pass": "y"},
            {"auth": {"user": "me", "pass": "[password]"}, "db_pass": "[password]"},
        ),
        ({"Authorization": "Basic x"}, {"Authorization": "[password]"}),
        ({"password": {"type": "string"}}, {"password": {"type": "string"}}),  # the schema of a tool
        ({"env": [{"name": "DB_PASSWORD", "value": "x"}]}, {"env": [{"name": "DB_PASSWORD", "value": "[password]"}]}),
        ({"name": "port", "value": "x"}, {"name": "port", "value": "x"}),
        ({"card": 4111111111111111}, {"card": "[card]"}),
        ({"card": 4111111111111112, "n": 12, "x": 0.5}, {"card": 4111111111111112, "n": 12, "x": 0.5}),
        ({"max_tokens": 5, "token_count": 7}, {"max_tokens": 5, "token_count": 7}),
        ({"a": 10**5000, "b": float("nan")}, None),
        ([{"input": {"api_key": "x"}}, 1], [{"input": {"api_key": "[password]"}}, 1]),
        ({"password": ""}, {"password": ""}),
    ],
)
def test_a_secret_in_json_is_known_by_its_name(value, kept):
    found = redacted(value)
    assert found and (kept is None or found == kept)


def test_the_arguments_of_a_tool_as_a_text():
    arguments = json.dumps({"url": "https://x.example", "password": "hunter22", "card": 4111111111111111})
    for text in (arguments, json.dumps({"arguments": arguments}), json.dumps(json.dumps(arguments))):
        found = redact(text)
        assert S not in found and "4111" not in found and "x.example" in found


@pytest.mark.parametrize(
    "unit",
    ["token_", "password_a_", 'password": "', "password='", "secret\\", 'secret: \\"', "secret=\\\\", "api key",
     "auth-", "authorization: ", "-----BEGIN PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----a-",
     "password = password = ", "://", "://:", "pass=", "secret is ", "tokentoken",
     "password.a.a.a", "basic basic ", "4", "secret=a,b", "secret=a'b ", "secret:a\"", "eyJabcdefgh.", "://a:"],
)  # fmt: skip
def test_no_text_makes_it_hang(unit):
    assert redact(unit * (200_000 // len(unit))) is not None
