"""Push and pull: probes and data files in Hugging Face repositories, by commit. Safetensors and JSON only.

A commit's hash names exact bytes; a branch's name does not, so none is accepted. The account is the one that
`hf auth login` or HF_TOKEN gives; HF_ENDPOINT may name a hub of your own.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal

from monitor.errors import ConfigInvalid, ProbeInvalid
from probes_store.model_card import model_card
from probes_store.promote import pin
from probes_store.store import MAX_FILE_BYTES, Store, StoredProbe, model_slug, read_folder

FILES = ("card.json", "probe.safetensors")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def push(probe: StoredProbe, repository: str, public: bool = False) -> str:
    """Upload a version with its model card in one commit; returns the commit. The repository is made if it is missing.

    raises: ConfigInvalid if the hub refuses, or if the repository is public and `public` was not given
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    _repository(repository)
    contents = {name: (probe.path / name).read_bytes() for name in FILES}
    if hashlib.sha256(contents["probe.safetensors"]).hexdigest() != probe.card.sha256:
        raise ProbeInvalid(f"{probe.path / 'probe.safetensors'} changed since it was verified; nothing was pushed")
    contents["README.md"] = model_card(probe).encode()
    api = HfApi()
    with _hub(repository):
        api.create_repo(repository, private=not public, exist_ok=True)
        private = api.model_info(repository).private
    if not (private or public):
        raise ConfigInvalid(
            f"{repository} is public; name a private repository, or add --public if everybody may read it"
        )
    operations = [CommitOperationAdd(name, data) for name, data in contents.items()]
    with _hub(repository):
        commit = api.create_commit(repository, operations, commit_message=f"{probe.card.name} {probe.card.version}").oid
    return str(commit)


def pull(store: Store, repository: str, commit: str) -> StoredProbe:
    """Fetch a version, verify it, and publish it under the next free version; what is live stays live.

    A probe that is there already is not published twice. Where it came from stands in the card, under `fit.pulled`.
    raises: ConfigInvalid if the hub does not give it, ProbeInvalid if its hash or form is wrong: then nothing is stored
    """
    with tempfile.TemporaryDirectory(prefix="midstream-pull-") as scratch:
        for name in FILES:
            fetch(repository, commit, name, "model", Path(scratch))
        pulled = read_folder(Path(scratch), shipped=False)
    card, model = pulled.card, model_slug(pulled.card.model.name)
    for version in store.versions(model, card.name):
        with suppress(ProbeInvalid):  # a damaged version is no reason not to have a sound one
            there = store.load(model, card.name, version)
            if there.card.sha256 == card.sha256 and there.card.calibration == card.calibration:
                return there
    pin(store, model, card.name)
    origin = {"repository": repository, "commit": commit, "version": card.version}
    # Its base stays where it was made: it may be of somebody's traffic, and is not pushed.
    card = card.model_copy(update={"fit": card.fit | {"pulled": origin}})
    return read_folder(store.publish(card, pulled.weight, pulled.bias), shipped=False)


def fetch(
    repository: str, commit: str, file: str, kind: Literal["model", "dataset"], folder: Path | None = None
) -> Path:
    """One file of a commit. folder: where to put it, at most 256 MiB; None: the hub client's cache, of any size

    raises: ConfigInvalid, saying which of repository, commit and file is the trouble
    """
    from huggingface_hub import HfApi

    _repository(repository)
    if not _COMMIT.fullmatch(commit):
        raise ConfigInvalid(
            f"{repository}@{commit or '?'}: name the commit, 40 hexadecimal digits: a branch can change"
        )
    download = partial(HfApi().hf_hub_download, repository, file, repo_type=kind, revision=commit, local_dir=folder)
    with _hub(f"{repository}@{commit[:12]}, {file}"):
        if folder is not None and download(dry_run=True).file_size > MAX_FILE_BYTES:
            raise ConfigInvalid(f"{repository}: {file} is larger than {MAX_FILE_BYTES >> 20} MiB; this is no probe")
        return Path(download())


def _repository(name: str) -> None:
    if not _REPOSITORY.fullmatch(name):
        raise ConfigInvalid(f"{name!r} is no repository; write OWNER/NAME")


@contextmanager
def _hub(what: str) -> Iterator[None]:
    """The hub's errors as ours, one line each."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except ConfigInvalid:
        raise
    except OfflineModeIsEnabled as error:
        raise ConfigInvalid(f"{what}: HF_HUB_OFFLINE forbids the hub; unset it") from error
    except (RepositoryNotFoundError, LocalTokenNotFoundError) as error:
        raise ConfigInvalid(
            f"{what}: no such repository, or no right to it: `hf auth login`, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigInvalid(f"{what}: the repository has no such commit") from error
    except LocalEntryNotFoundError as error:
        raise ConfigInvalid(
            f"{what}: the hub can't be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    except EntryNotFoundError as error:
        raise ConfigInvalid(f"{what}: the commit has no such file") from error
    except Exception as error:
        # Its client also raises the errors of its HTTP library, and which library that is depends on its version.
        raise ConfigInvalid(f"{what}: the hub refused: {(str(error).splitlines() or [repr(error)])[0]}") from error
