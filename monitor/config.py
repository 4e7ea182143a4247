"""Settings: one frozen model. Sources, the first wins: arguments, MIDSTREAM_* environment, a YAML file, defaults."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from monitor.errors import ConfigInvalid
from monitor.plain_yaml import read_yaml
from monitor.types import Mode, Phase

PREFIX = "MIDSTREAM_"
DEMO_MODEL = "smollm2-135m-instruct"


def state_dir() -> Path:
    return _base("XDG_STATE_HOME", ".local/state") / "midstream"


def cache_dir() -> Path:
    return _base("XDG_CACHE_HOME", ".cache") / "midstream"


def _base(variable: str, default: str) -> Path:
    """As the XDG specification has it: an empty or relative path is as if none were given."""
    given = os.environ.get(variable, "")
    return Path(given) if os.path.isabs(given) else Path.home() / default


class Settings(BaseSettings):
    """Every bound and every choice of a server, with its unit in its name."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", validate_default=True)

    # Where
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_key: str | None = Field(None, min_length=8)
    """Bearer token of the data routes, the key named "default"; without it and without `keys`: open, for loopback."""
    keys: Path | None = None
    """YAML list of names and SHA-256 digests of more keys: `midstream key create NAME --keys FILE`."""

    admin_host: str = "127.0.0.1"
    admin_port: int = Field(8001, ge=0, le=65535)
    admin_key: str | None = Field(None, min_length=16)
    """Bearer token of the admin port, another one than every data key; None: no admin port."""
    admin_idle_s: float = Field(1800.0, gt=0, le=86_400)
    """A session of the console that was not used for so long has to sign in again."""
    audit: Path = Field(default_factory=lambda: state_dir() / "audit.sqlite3")

    # What
    model: str = DEMO_MODEL
    revision: str | None = None
    engine: Literal["embedded", "vllm"] = "embedded"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Default: float32 in the embedded engine, what the probes were calibrated in with vLLM."""
    canary_tolerance: float | None = Field(None, gt=0, le=2)
    """Largest difference of a canary's logit, instead of the card's: for a dtype that the probes were not made in."""
    store: Path = Field(default_factory=lambda: state_dir() / "probes")
    cache: Path = Field(default_factory=cache_dir)

    # Verdicts: a policy file, or for everybody alike the four below
    policy: Path | None = None
    modes: dict[str, dict[Phase, Mode]] = Field(default_factory=dict)
    """Probe -> phase -> mode. Default: block for a shipped harm probe, or one retrained from it, where it is
    calibrated, else shadow."""
    target_fpr: float = Field(0.01, gt=0, lt=0.5)
    """Share of benign requests that may be blocked: split evenly over blocking probes and their phases."""
    fail_mode: Literal["closed", "open"] = "closed"
    """What a missing score does to a probe that blocks. Probes that only flag never end an answer."""
    on_history: Mode = Mode.FLAG
    score_last: bool = False
    """One more forward pass per answer, so that the last token is scored before it is released."""

    # Bounds
    max_sequences: int = Field(16, ge=1)
    max_step_tokens: int = Field(512, ge=16)
    kv_tokens: int = Field(65_536, ge=256)
    """Tokens that all active sequences may reserve together (prompt + max_tokens each)."""
    max_body_bytes: int = Field(2 * 2**20, ge=1024)
    max_header_bytes: int = Field(16 * 2**10, ge=1024)
    max_connections: int = Field(1024, ge=1)
    max_concurrent: int = Field(256, ge=1)
    """Requests at work at once; one more gets 429."""
    rate_per_key: str | None = None
    """Requests that one key may send, like "600/minute"; without keys, everybody together."""
    receive_deadline_s: float = Field(10.0, gt=0)
    """For a whole request to arrive, headers and body."""
    write_deadline_s: float = Field(30.0, gt=0)
    """For a client to take the next piece of its answer."""
    max_json_depth: int = Field(64, ge=8)
    max_json_values: int = Field(200_000, ge=100)
    """Names of fields, strings, numbers, lists and objects in one body."""
    max_messages: int = Field(1000, ge=1)
    max_queue: int = Field(64, ge=0)
    max_n: int = Field(8, ge=1)
    max_prompts: int = Field(16, ge=1)
    default_max_tokens: int = Field(1024, ge=1)
    max_model_len: int | None = Field(None, ge=16)
    shutdown_timeout_s: float = Field(30.0, ge=0)
    threads: int | None = Field(None, ge=1)
    probe_columns: int = Field(8, ge=1, le=1024)
    """vLLM: probes that a later set may have without a restart."""
    allow_untested_vllm: bool = False

    # In front of an endpoint: its answers are read along by an observer, which is `model` cut after the probes' layers
    upstream: str | None = Field(None, pattern=r"^https?://")
    """The endpoint with its version, like https://HOST/v1."""
    upstream_key_env: str | None = None
    """Environment variable that holds the key for it."""
    upstream_first_s: float = Field(600.0, gt=0)
    """Until an answer begins; one that is not streamed begins when it is whole."""
    upstream_read_s: float = Field(60.0, gt=0)
    """Between two pieces of an answer."""
    upstream_retries: int = Field(2, ge=0, le=10)
    """Of a request that got no answer at all."""
    observer_int8: bool = False
    observer_lag_tokens: int = Field(256, ge=16)
    """More of them that come while the observer reads what was before: then the fail mode decides."""
    observer_lag_s: float = Field(5.0, gt=0)
    """For the observer to read `observer_lag_tokens`, or one piece; a longer prompt has as many times of it."""
    observer_pause_s: float = Field(0.25, gt=0, le=10)
    """Without new text, after which a tail that the tokenizer may still change is read as it is."""

    # Records
    records: Path = Field(default_factory=lambda: state_dir() / "records.sqlite3")
    max_records: int = Field(100_000, ge=1)
    record_queue: int = Field(10_000, ge=1)
    log_url: str | None = None
    """PostgreSQL in place of the file `records`: postgresql://USER@HOST/NAME."""
    log_days: float | None = Field(30, gt=0)
    """Older records go, as do the oldest of more than `max_records`. None: only these."""
    log_required: bool = False
    """A request whose record can't be written gets 503, or the end of its answer is kept back."""
    log_wait_s: float = Field(1.0, gt=0, le=60)
    """How long the end of an answer waits for its record to be written."""
    log_text: bool = False
    """Keep prompts and answers: redacted, then encrypted. Without it only a keyed digest of the prompt is kept."""
    log_key: str | None = Field(None, repr=False)
    """What texts are encrypted with: 32 bytes in base64."""
    log_features: bool = False
    """Keep a pooled activation vector of sampled sequences, for retraining without any text; needs pyarrow."""
    features: Path = Field(default_factory=lambda: state_dir() / "features")
    feature_rate: float = Field(0.01, gt=0, le=1)
    """Probability that any sequence is kept. Flagged and blocked ones all are; older than `log_days` they go."""
    feature_band: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Half width in logits of what is near a threshold, where a label is worth most."""
    feature_band_rate: float = Field(0.2, ge=0, le=1)
    """Added to `feature_rate` there."""
    feature_queue: int = Field(256, ge=1)
    """Sequences that wait to be read again; one more is dropped and counted."""
    retrain_tenant_share: float = Field(0.1, gt=0, le=1)
    """Of the weight of all labels: what one API key's requests may have at most when a probe is retrained."""
    retrain_frozen: tuple[str, ...] = ()
    """Files of labelled rows that a retrained probe is judged on, never fitted."""
    webhook_url: str | None = Field(None, pattern=r"^https?://")
    webhook_queue: int = Field(1_000, ge=1)
    webhook_attempts: int = Field(4, ge=1)

    # Logs on stderr, and traces
    log_format: Literal["text", "json"] = "text"
    """json: one object a line, with the request's id and its trace's; every message of this process is one."""
    access_log: bool = False
    """One line for each request, without its query."""
    otlp_endpoint: str | None = Field(None, pattern=r"^https?://")
    """OTLP over HTTP, like http://collector:4318: a span for each request, never any text. Without it OpenTelemetry's
    own OTEL_EXPORTER_OTLP_ENDPOINT counts; its other variables (OTEL_SERVICE_NAME, ...) do in any case."""

    # Repeat offenders: flags and blocks of one API key in a sliding window
    offender_window_s: float = Field(3600.0, gt=0, le=7 * 86_400)
    offender_limit: int | None = Field(None, ge=1, le=100_000)
    """Events that are told of, once per key and window. None: nobody is an offender."""
    offender_block_s: float = Field(0.0, ge=0, le=7 * 86_400)
    """How long such a key is refused with 429. 0: never."""
    offender_metric_keys: tuple[str, ...] = ()
    """Names of keys that may be a metric's label; every other key is `other`."""

    @property
    def log(self) -> Path | str:
        """Where the records are: a file of SQLite's, or PostgreSQL's URL."""
        return self.log_url or self.records

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings


_SECRET = ("api_key", "admin_key", "log_key", "log_url", "webhook_url", "upstream")
"""Settings that are a secret or may hold one: what is wrong with them is said, they are not."""


def load_settings(file: Path | None = None, **arguments: Any) -> Settings:
    """Settings from all sources; an argument that is None was not given.

    raises: ConfigInvalid, naming the key, its value and what is wanted
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {PREFIX + "CONFIG"}
    unknown = sorted(k for k in os.environ if k.upper().startswith(PREFIX) and k not in known)
    if unknown:
        raise ConfigInvalid(f"environment variable {unknown[0]} is not a setting; unset it or correct its name")
    path = file or (Path(os.environ[PREFIX + "CONFIG"]) if PREFIX + "CONFIG" in os.environ else None)
    from_file = _read_yaml(path) if path is not None else {}
    from_environment = {k[len(PREFIX) :].lower() for k in os.environ if k.startswith(PREFIX)}
    given = {k: v for k, v in from_file.items() if k not in from_environment}
    given |= {k: v for k, v in arguments.items() if v is not None}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = "" if key in _SECRET else f" has value {first['input']!r}"
        raise ConfigInvalid(f"setting {key!r}{value}: {first['msg']}") from error
    except ValueError as error:  # pydantic-settings: a variable that is not the JSON it should be
        raise ConfigInvalid(str(error).splitlines()[0]) from error
    if settings.offender_block_s and settings.offender_limit is None:
        raise ConfigInvalid(
            "setting 'offender_block_s' refuses nobody without 'offender_limit'; set that too: the flags and blocks "
            "that make a key an offender"
        )
    return settings


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(path.read_bytes())
    except OSError as error:
        raise ConfigInvalid(f"settings file {str(path)!r} can't be read: {error}") from error
    except ValueError as error:
        raise ConfigInvalid(f"settings file {str(path)!r} is not YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigInvalid(f"settings file {str(path)!r} must hold keys and values, like `port: 8000`")
    strange = [k for k in data if k not in Settings.model_fields]
    if strange:
        raise ConfigInvalid(f"settings file {str(path)!r}: {strange[0]!r} is not a setting; remove it or correct it")
    return data
