"""Adapters from the Hugging Face hub: which files of a repository make one, and a folder that holds these alone.

`huggingface_hub` does the work: its cache, its offline mode, its token, its progress bars. Of a repository only an
adapter's own files are fetched, at one commit; nothing of it is run.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_lora_retriever.errors import HubError, LoraRetrieverError, UnsupportedAdapterError
from langchain_lora_retriever.pool.card import CARD_FILE, MAX_CARD_BYTES
from langchain_lora_retriever.pool.checkpoint_files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    PICKLE_FILE,
    WEIGHTS_FILE,
)
from langchain_lora_retriever.pool.entry import EMBEDDING_FILE, EMBEDDING_INFO, MAX_EMBEDDING_BYTES, MAX_INFO_BYTES
from langchain_lora_retriever.pool.origin import HubOrigin
from langchain_lora_retriever.pool.regular_files import said
from langchain_lora_retriever.pool.samples import MAX_SAMPLES_BYTES, SAMPLES_FILE
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from huggingface_hub.hf_api import ModelInfo

__all__ = ["Hub", "HubAdapter", "is_repo_id"]

_logger = logging.getLogger(__name__)

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_BYTES = {
    CONFIG_FILE: MAX_CONFIG_BYTES,
    WEIGHTS_FILE: MAX_WEIGHTS_BYTES,
    SAMPLES_FILE: MAX_SAMPLES_BYTES,
    EMBEDDING_FILE: MAX_EMBEDDING_BYTES,
    EMBEDDING_INFO: MAX_INFO_BYTES,
    CARD_FILE: MAX_CARD_BYTES,
}
"""The files of an adapter, and the most bytes of each; of a card that is larger nothing is fetched."""
_MAX_TRIES = 3
_NUM_NAMED = 5
_HASH_BYTES = 1 << 20


class HubAdapter(NamedTuple):
    """An adapter's files, fetched.

    Attributes:
        folder: Where they lie, in the hub's cache.
        origin: Where they are from.
    """

    folder: Path
    origin: HubOrigin


def is_repo_id(path: object, *, is_meant: bool = False) -> bool:
    """Whether what was given as a path names a repository: `user/name`, where no such file or folder is.

    Args:
        path: The path.
        is_meant: Whether a repository is meant, as a revision of it was given: then whatever lies here does not count.
    """
    return isinstance(path, str) and _REPO_ID.fullmatch(path) is not None and (is_meant or not os.path.lexists(path))


@dataclass(frozen=True, kw_only=True)
class Hub:
    """How the hub is reached. What is not given is `huggingface_hub`'s: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, ...

    Attributes:
        endpoint: Address of a server that speaks its protocol.
        token: Of a user who may read the repositories; False sends none.
        cache_dir: Where files are kept.
    """

    endpoint: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None

    def fetch(
        self, repo_id: str, *, revision: str | None = None, subfolder: str | None = None, with_pickle: bool = False
    ) -> HubAdapter:
        """Fetch the adapter of a repository; what is in the cache already is taken from there.

        If the hub is off limits (`HF_HUB_OFFLINE=1`) or cannot be reached, the cache alone is looked at.

        Args:
            repo_id: `user/name`.
            revision: Branch, tag or commit; by default the main branch.
            subfolder: Where in the repository the adapter lies; needed if there are several and none at the top.
            with_pickle: Fetch `adapter_model.bin` where there are no safetensors. It is not opened.

        Raises:
            HubError: If there is no such repository, revision or adapter, it may not be read, or it cannot be reached
                and is not in the cache.
            UnsupportedAdapterError: If its weights are a pickle.
        """
        from huggingface_hub import errors  # noqa: PLC0415 - loaded where it is needed

        where = f"the repository {repo_id!r}" + (f" at {revision!r}" if revision else "")
        try:
            for _ in range(_MAX_TRIES):
                found = self._fetch(repo_id, revision, subfolder, where, with_pickle=with_pickle)
                if found is not None:
                    return found
        except LoraRetrieverError:
            raise
        except errors.GatedRepoError as error:
            raise HubError(
                f"{where} is gated: accept its terms on the hub, and pass a token of that account (`hf auth login`, or "
                "HF_TOKEN)."
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise HubError(
                f"the hub has no repository {repo_id!r}, or it is private and needs a token (`hf auth login`, or "
                f"HF_TOKEN). There is no folder {repo_id} here either."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise HubError(f"{where}: there is no such revision. Pass a branch, a tag or a whole commit.") from error
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            raise HubError(
                f"{where} is not in the cache as a whole, and the hub cannot be reached or is off limits "
                f"(HF_HUB_OFFLINE): {error}"
            ) from error
        except Exception as error:  # of the hub's protocol, of the HTTP client, of the cache's disk
            raise HubError(f"{where} cannot be fetched: {type(error).__name__}: {said(error)}") from error
        raise HubError(f"{where} is changed again and again while it is fetched. Pass a commit as its revision.")

    def _fetch(
        self, repo_id: str, revision: str | None, subfolder: str | None, where: str, *, with_pickle: bool
    ) -> HubAdapter | None:
        """The adapter; None if the revision is another commit by the time its files are there."""
        info = self._look(repo_id, revision)
        if info is None:
            folder = self._download(repo_id, revision, None)
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            inside = _place_of(files, subfolder, where)
            _check_weights(files, inside, where, with_pickle=with_pickle)
            return HubAdapter(folder / inside, HubOrigin(repo_id, folder.name, revision or "main", inside))
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        inside = _place_of(sizes, subfolder, where)
        _check_weights(sizes, inside, where, with_pickle=with_pickle)
        wanted = _wanted(sizes, inside, where, with_pickle=with_pickle)
        folder = self._download(repo_id, revision, wanted)
        if folder.name != info.sha:
            if revision is not None and _COMMIT.fullmatch(revision):
                raise HubError(f"{where}: the hub says that this is commit {info.sha}, and sends {folder.name}.")
            return None
        _check_hashes(folder, info, wanted, where)
        return HubAdapter(folder / inside, HubOrigin(repo_id, folder.name, revision or "main", inside))

    def _download(self, repo_id: str, revision: str | None, wanted: Sequence[str] | None) -> Path:
        """The folder of a commit in the cache, with some files in it; None for what it has already."""
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - loaded where it is needed

        folder: Any = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=None if wanted is None else [glob.escape(name) for name in wanted],
            local_files_only=wanted is None,
            endpoint=self.endpoint,
            token=self.token,
            cache_dir=self.cache_dir,
        )
        return Path(folder)

    def _look(self, repo_id: str, revision: str | None) -> ModelInfo | None:
        """What the hub says of a repository; None if it cannot be reached."""
        from huggingface_hub import HfApi, errors  # noqa: PLC0415 - loaded where it is needed

        try:
            return HfApi(endpoint=self.endpoint, token=self.token).model_info(
                repo_id, revision=revision, files_metadata=True
            )
        except errors.OfflineModeIsEnabled:
            return None
        except (errors.HfHubHTTPError, errors.HFValidationError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever its HTTP client raises, which is another in each version
            _logger.warning("The hub cannot be reached, so its cache is looked at for %r: %s", repo_id, error)
            return None


def _place_of(files: Iterable[str], subfolder: str | None, where: str) -> str:
    """Where in a repository the adapter lies; "" for the top."""
    places = sorted(
        _parent(path)
        for path in map(PurePosixPath, files)
        if path.name == CONFIG_FILE and ".." not in path.parts and not path.is_absolute()
    )
    if subfolder is not None:
        wanted = subfolder.strip("/")
        if wanted not in places:
            raise HubError(f"{where} holds no adapter in {shown(subfolder)}. Allowed are {_listed(places) or 'none'}.")
        return wanted
    if not places:
        raise HubError(
            f"{where} holds no adapter: it has no {CONFIG_FILE}. Pass the repository that PEFT's "
            "push_to_hub() or save_pretrained() wrote."
        )
    if "" not in places and len(places) > 1:
        raise HubError(
            f"{where} holds {len(places)} adapters: {_listed(places)}. Say which one: subfolder=, or --subfolder."
        )
    return places[0]


def _listed(places: Sequence[str]) -> str:
    named = [repr(place) for place in places[:_NUM_NAMED]]
    return ", ".join(named) + ", ..." * (len(places) > _NUM_NAMED)


def _check_weights(files: Iterable[str], inside: str, where: str, *, with_pickle: bool) -> None:
    names = dict(_within(files, inside))
    if WEIGHTS_FILE in names or (with_pickle and PICKLE_FILE in names):
        return
    if PICKLE_FILE in names:
        raise UnsupportedAdapterError(
            f"{where} has its weights in {PICKLE_FILE}, a pickle, which can run code when it is read, and is not "
            "opened here. Convert it, in a process that may do nothing else: pool.add(..., convert=True), or --convert."
        )
    raise HubError(f"{where} has a {CONFIG_FILE} but no {WEIGHTS_FILE}, or its cache has not: it holds no adapter.")


def _wanted(sizes: Mapping[str, int | None], inside: str, where: str, *, with_pickle: bool) -> list[str]:
    """The files to fetch, none of them too large."""
    limits = dict(_MAX_BYTES)
    files = _within(sizes, inside)
    if with_pickle and WEIGHTS_FILE not in dict(files):
        limits[PICKLE_FILE] = MAX_WEIGHTS_BYTES
    wanted = []
    for name, file in files:
        if name not in limits:
            continue
        size = sizes[file]
        if size is not None and size > limits[name]:
            if name == CARD_FILE:
                continue
            raise HubError(f"{where}: {file} has {size:,} bytes; allowed are {limits[name]:,}.")
        wanted.append(file)
    return wanted


def _parent(path: PurePosixPath) -> str:
    """The folder of a file, "" for the top."""
    return "" if str(path.parent) == "." else str(path.parent)


def _within(files: Iterable[str], inside: str) -> list[tuple[str, str]]:
    """The files of one folder, each with its name in it."""
    return [(path.name, file) for file in files if _parent(path := PurePosixPath(file)) == inside]


def _check_hashes(folder: Path, info: ModelInfo, wanted: Sequence[str], where: str) -> None:
    """Compare files with the hashes that the hub lists for them: it does so for the large ones."""
    for file in info.siblings or ():
        if file.rfilename not in wanted or file.lfs is None:
            continue
        digest = hashlib.sha256()
        with (folder / file.rfilename).open("rb") as stream:
            while piece := stream.read(_HASH_BYTES):
                digest.update(piece)
        if digest.hexdigest() != file.lfs.sha256:
            raise HubError(
                f"{where}: {file.rfilename} is not what the hub lists for commit {info.sha}: its sha256 is "
                f"{digest.hexdigest()}, not {file.lfs.sha256}. Remove {folder.parent.parent} and fetch it again."
            )
