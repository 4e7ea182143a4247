"""Settings: arguments over environment over YAML over defaults; what is unknown or wrong is an error that says so."""

import json
import os

import pytest

from monitor.config import DEMO_MODEL, Settings, cache_dir, load_settings, state_dir
from monitor.errors import ConfigInvalid
from monitor.types import Mode, Phase


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [k for k in os.environ if k.upper().startswith("MIDSTREAM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def yaml(tmp_path):
    def write(text):
        path = tmp_path / "midstream.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize("given", ["", "here", "./cache"])
def test_an_empty_or_relative_base_folder_is_none(monkeypatch, tmp_path, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(variable, given)
    assert (cache_dir(), state_dir()) == (tmp_path / ".cache/midstream", tmp_path / ".local/state/midstream")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cache_dir() == tmp_path / "c/midstream"


@pytest.mark.parametrize(
    ("argument", "variable", "line", "port"),
    [
        (1, "2", "port: 3", 1),
        (1, None, "port: 3", 1),
        (1, "2", "", 1),
        (None, "2", "port: 3", 2),
        (None, "2", "", 2),
        (None, None, "port: 3", 3),
        (None, None, "", 8000),
    ],
)
def test_precedence(monkeypatch, yaml, argument, variable, line, port):
    if variable is not None:
        monkeypatch.setenv("MIDSTREAM_PORT", variable)
    assert load_settings(yaml(line), port=argument).port == port


def test_every_source_counts_for_its_own_keys(monkeypatch, yaml):
    monkeypatch.setenv("MIDSTREAM_MAX_QUEUE", "7")
    got = load_settings(yaml("max_n: 3\nmax_queue: 9"), max_prompts=2)
    assert (got.max_queue, got.max_n, got.max_prompts, got.model) == (7, 3, 2, DEMO_MODEL)


def test_defaults_hold_and_are_safe():
    got = load_settings()
    assert (got.host, got.fail_mode, got.on_history, got.target_fpr) == ("127.0.0.1", "closed", Mode.FLAG, 0.01)
    assert (got.modes, got.api_key, got.webhook_url, got.score_last) == ({}, None, None, False)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1


def test_the_config_variable_names_the_file_and_an_argument_goes_before(monkeypatch, yaml, tmp_path):
    monkeypatch.setenv("MIDSTREAM_CONFIG", str(yaml("port: 5")))
    assert load_settings().port == 5
    (tmp_path / "other.yaml").write_text("port: 6")
    assert load_settings(tmp_path / "other.yaml").port == 6


@pytest.mark.parametrize("key", ["prot", "midstream_port", "config", "env_prefix"])
@pytest.mark.parametrize("by_variable", [False, True])
def test_an_unknown_key_in_yaml_is_named(monkeypatch, yaml, key, by_variable):
    path = yaml(f"{key}: 1")
    if by_variable:
        monkeypatch.setenv("MIDSTREAM_CONFIG", str(path))
    with pytest.raises(ConfigInvalid, match=key):
        load_settings(None if by_variable else path)


def test_a_key_in_upper_case_is_refused_or_keeps_its_place(monkeypatch, yaml):
    monkeypatch.setenv("MIDSTREAM_PORT", "2")
    try:
        assert load_settings(yaml("PORT: 3")).port == 2
    except ConfigInvalid as error:
        assert "PORT" in str(error)


@pytest.mark.parametrize("key", ["8000", "on", "null", "1.5"])
def test_a_yaml_key_that_is_not_a_string_is_an_error(yaml, key):
    with pytest.raises(ConfigInvalid):  # YAML reads `on` as True
        load_settings(yaml(f"{key}: 1"))


def test_an_unknown_argument_is_named():
    with pytest.raises(ConfigInvalid, match="'prot'"):
        load_settings(prot=1)


@pytest.mark.parametrize("name", ["MIDSTREAM_PROT", "MIDSTREAM_", "MIDSTREAM_port", "MIDSTREAM_MODES__DEMO"])
def test_an_unknown_variable_is_named(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigInvalid, match=f"environment variable {name} is not a setting"):
        load_settings()


def test_a_variable_in_lower_case_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("midstream_port", "2")
    with pytest.raises(ConfigInvalid, match="midstream_port is not a setting"):
        load_settings()


BAD = [
    ("port", "80x"), ("port", "65536"), ("port", "-1"), ("target_fpr", "0"), ("target_fpr", "0.5"),
    ("target_fpr", "nan"), ("fail_mode", "ajar"), ("on_history", "panic"), ("max_sequences", "0"),
    ("max_step_tokens", "15"), ("score_last", "maybe"), ("api_key", "short"), ("webhook_url", "ftp://x"),
    ("shutdown_timeout_s", "-1"), ("dtype", "int8"), ("max_records", "1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD)
@pytest.mark.parametrize("source", ["argument", "environment", "yaml"])
def test_a_bad_value_names_key_and_value(monkeypatch, yaml, source, key, value):
    arguments, path = {}, None
    if source == "argument":
        arguments = {key: value}
    elif source == "environment":
        monkeypatch.setenv(f"MIDSTREAM_{key.upper()}", value)
    else:
        path = yaml(f"{key}: '{value}'")
    secret = key in ("api_key", "webhook_url")
    said = "" if secret else f" has value '{value}'"
    with pytest.raises(ConfigInvalid, match=f"setting '{key}'{said}: ") as refused:
        load_settings(path, **arguments)
    assert (value in str(refused.value)) is not secret, "a secret is in no message"


def test_modes_from_the_environment(monkeypatch, yaml):
    monkeypatch.setenv("MIDSTREAM_MODES", json.dumps({"demo": {"prompt": "block", "response": "flag"}}))
    expected = {"demo": {Phase.PROMPT: Mode.BLOCK, Phase.RESPONSE: Mode.FLAG}}
    assert load_settings().modes == expected
    # The variable stands for the whole table: nothing of the file's is mixed in.
    assert load_settings(yaml("modes: {other: {prompt: flag}, demo: {prompt: shadow}}")).modes == expected


def test_modes_from_yaml_and_arguments(monkeypatch, yaml):
    path = yaml("modes: {demo: {prompt: flag}}")
    assert load_settings(path).modes == {"demo": {Phase.PROMPT: Mode.FLAG}}
    monkeypatch.setenv("MIDSTREAM_MODES", '{"demo": {"prompt": "block"}}')
    given = load_settings(path, modes={"demo": {"prompt": "shadow"}})
    assert given.modes["demo"][Phase.PROMPT] is Mode.SHADOW


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("{", "modes"),
        ("flag", "modes"),
        ("", "modes"),
        ("[]", "'modes' has value"),
        ('{"demo": "flag"}', "'modes.demo' has value 'flag'"),
        ('{"demo": {"prompt": "panic"}}', "'modes.demo.prompt' has value 'panic'"),
        ('{"demo": {"history": "flag"}}', "modes.demo.history"),
    ],
)
def test_bad_modes_in_the_environment(monkeypatch, value, named):
    monkeypatch.setenv("MIDSTREAM_MODES", value)
    with pytest.raises(ConfigInvalid, match=named) as caught:
        load_settings()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: [", "is not YAML"),
        ("port: 1\nhost: x\nport: 2", "is not YAML: key 'port' is given twice, again in line 3"),
        ("model: 2024-13-45", "is not YAML: month must be"),
        ("- port", "must hold keys and values"),
        ("just words", "must hold keys and values"),
        ("!!python/object/apply:os.getpid []", "is not YAML"),
        (b"host: caf\xe9", "midstream.yaml"),
        (b"\x00", "is not YAML"),
    ],
)
def test_a_damaged_file_is_named(yaml, text, message):
    with pytest.raises(ConfigInvalid, match=message):
        load_settings(yaml(text))


def test_a_missing_file_is_named_and_an_empty_one_is_fine(yaml, tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigInvalid, match=f"{path.name}' can't be read"):
            load_settings(path)
    assert load_settings(yaml("# nothing")) == load_settings()


def test_every_setting_has_a_variable(monkeypatch):
    """No field is known to the check of names and unknown to the reader, or the other way round."""
    values = {"model": "m", "port": "9", "store": "/s", "records": "/r", "threads": "2", "score_last": "true"}
    for key, value in values.items():
        monkeypatch.setenv(f"MIDSTREAM_{key.upper()}", value)
    got = load_settings().model_dump(mode="json")
    assert {k: str(got[k]).lower() for k in values} == values
    assert set(values) < set(Settings.model_fields)
