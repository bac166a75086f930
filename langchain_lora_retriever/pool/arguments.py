"""What callers give a pool (names, folders, repositories, samples), checked; and what it tells them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from langchain_lora_retriever.errors import (
    InvalidAdapterError,
    InvalidRequestError,
    InvalidSamplesError,
    LoraRetrieverError,
    PoolError,
)
from langchain_lora_retriever.pool.card import read_card
from langchain_lora_retriever.pool.dataset_samples import draw_samples
from langchain_lora_retriever.pool.entry import check_encoder, make_embedding
from langchain_lora_retriever.pool.regular_files import AdapterFolder
from langchain_lora_retriever.pool.samples import make_samples
from langchain_lora_retriever.pool.state import some
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.support.warn import warn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike

    from langchain_lora_retriever.errors import AdapterError
    from langchain_lora_retriever.pool.entry import PoolEntry
    from langchain_lora_retriever.pool.hub import Hub

    V = TypeVar("V")

__all__ = [
    "as_path",
    "check_encoder_given",
    "check_name",
    "check_printable",
    "check_same",
    "check_samples_from",
    "named_repositories",
    "tell_undescribed",
    "warn_rejected",
    "with_dataset",
    "with_routing",
    "without",
    "writing",
]

_logger = logging.getLogger(__name__)

_MAX_NAME_BYTES = 200


def with_routing(
    entry: PoolEntry,
    samples: Sequence[str | Mapping[str, Any]] | None,
    embedding: ArrayLike | None,
    encoder: str | None,
) -> PoolEntry:
    """The entry with what the caller gave."""
    where = f"adapter {entry.adapter.name!r}"
    if samples is not None:
        made = make_samples(samples, where=where)
        entry = replace(entry, samples=made, embedding=None, encoder=None)
        entry = replace(entry, samples_from="samples", card_text=(), note="")
    if embedding is not None:
        entry = replace(
            entry, embedding=make_embedding(embedding, where=where), encoder=check_encoder(encoder, where=where)
        )
    return entry


def check_encoder_given(name: object, embedding: object, encoder: object) -> None:
    """Refuse the name of an encoder that is said to have made nothing.

    Raises:
        InvalidSamplesError: If there is no embedding beside it.
    """
    if encoder is not None and embedding is None:
        raise InvalidSamplesError(
            f"adapter {shown(name)}: encoder={shown(encoder)} names what made the embedding, and none is given. "
            "Pass embedding=[...] as well, or leave encoder out: a pool's samples are embedded by the encoder of the "
            "retriever or chat model."
        )


def check_samples_from(samples_from: object) -> None:
    """Refuse what samples cannot be had from."""
    if samples_from not in (None, "dataset"):
        raise InvalidRequestError(f"samples_from={shown(samples_from)} is not allowed: pass 'dataset', or None.")


def with_dataset(entry: PoolEntry, source: Path, hub: Hub) -> PoolEntry:
    """The entry with samples of the data set that its card names, unless it brings samples or an embedding."""
    if entry.described_by in ("samples", "embedding"):
        return entry
    with AdapterFolder(source) as folder:
        names = read_card(folder).datasets
    samples, note = draw_samples(names, where=f"adapter {entry.name!r}", hub=hub)
    return replace(entry, samples=samples, samples_from="dataset", card_text=(), note=note)


def named_repositories(repositories: object) -> dict[str, str]:
    """Repositories by the names that their adapters are to have."""
    if isinstance(repositories, Mapping):
        given = list(repositories.values())
    elif isinstance(repositories, Sequence) and not isinstance(repositories, str | bytes):
        given = list(repositories)
    else:
        raise PoolError(f"repositories={shown(repositories)} is not allowed: pass a list of `user/repo`.")
    for repository in given:
        if not isinstance(repository, str):
            raise PoolError(f"repositories has {shown(repository)}, which is not allowed: pass `user/repo`, strings.")
    named: dict[str, str] = dict(repositories) if isinstance(repositories, Mapping) else _by_their_names(given)
    if not named:
        raise PoolError("repositories is empty: pass `user/repo`, at least one.")
    return named


def _by_their_names(repositories: Sequence[str]) -> dict[str, str]:
    lasts = Counter(repository.partition("@")[0].rpartition("/")[2] for repository in set(repositories))
    named: dict[str, str] = {}
    for repository in repositories:
        whole = repository.partition("@")[0]
        last = whole.rpartition("/")[2]
        name = last if lasts[last] == 1 else whole.replace("/", "--")
        if named.setdefault(name, repository) != repository:
            raise PoolError(
                f"repositories has {shown(named[name])} and {shown(repository)}, which would both be named {name!r}. "
                "Pass a dictionary of repositories by the names that their adapters are to have."
            )
    return named


def check_same(read: PoolEntry, written: PoolEntry) -> None:
    """Refuse a copy of files that were changed between reading and copying."""
    if written.adapter.fingerprint != read.adapter.fingerprint:
        raise InvalidAdapterError(
            f"adapter {read.adapter.name!r}: its files in {read.adapter.path} were changed after they were read. Do it "
            "again once they are whole."
        )


def as_path(path: object, name: str) -> Path:
    """A checkpoint's folder, as it was given."""
    if not isinstance(path, str | os.PathLike):
        raise InvalidAdapterError(f"adapter {name!r}: path={shown(path)} is not allowed: pass the checkpoint's folder.")
    return Path(path)


def check_printable(folder: Path) -> None:
    """Refuse an adapter whose folder's name cannot be printed."""
    if not folder.name.isprintable():
        raise InvalidAdapterError(
            f"adapter {folder.name!a} has a folder whose name cannot be printed. Rename the folder."
        )


def check_name(name: object) -> None:
    """Refuse a name that cannot be a folder's."""
    if (
        not isinstance(name, str)
        or not name.strip()
        or name.startswith(".")
        or not name.isprintable()
        or len(name.encode()) > _MAX_NAME_BYTES
        or any(character in '/\\:*?"<>|' for character in name)
    ):
        raise InvalidAdapterError(
            f"adapter name {shown(name)} cannot be the name of a folder. Allowed are up to 200 bytes of printable "
            'characters without / \\ : * ? " < > |, not starting with a dot.'
        )


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `PoolError` that names the folder."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, LoraRetrieverError):
            raise
        raise PoolError(f"cannot write to the pool {root}: {error}") from error


def without(mapping: Mapping[str, V], name: str) -> dict[str, V]:
    """A mapping without a name."""
    return {key: value for key, value in mapping.items() if key != name}


def tell_undescribed(root: Path, undescribed: Mapping[str, str]) -> None:
    """Say in the log which adapters no prompt finds."""
    if len(undescribed) == 1:
        _logger.warning("pool %s: %s", root, *undescribed.values())
    elif undescribed:
        _logger.warning(
            "pool %s: %d adapters have neither samples nor an embedding, nor a model card that says what they are for: "
            "no prompt finds them, and they run only where they are pinned: %s. Write a samples.jsonl beside their "
            "weights, or call pool.update(name, samples=[...]).",
            root, len(undescribed), some(list(undescribed)),
        )  # fmt: skip


def warn_rejected(error: AdapterError) -> None:
    """Say why an adapter was refused, in the log and as a warning."""
    warn(_logger, f"refused: {error}", stacklevel=4)
