"""Pictures of a pool and of evaluations. matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from langchain_lora_retriever.errors import InvalidRequestError, MissingDependencyError
from langchain_lora_retriever.evaluation.pool_map import check_rows, make_map

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from langchain_lora_retriever.evaluation.retrieval import Accuracy
    from langchain_lora_retriever.retrieval.retriever import LoraRetriever

__all__ = ["adapter_vectors", "plot_accuracy", "plot_map", "plot_similarity", "plot_throughput"]


def adapter_vectors(retriever: LoraRetriever) -> tuple[list[str], NDArray[np.float32]]:
    """Return the names of the adapters that can be found, and their embeddings `[n, d]`, rows of length 1.

    Raises:
        InvalidRequestError: If there is none.
    """
    vectors = retriever.adapter_vectors()
    if not vectors:
        raise InvalidRequestError(
            f"the pool has {len(retriever.pool)} adapters, and none that prompts can find: add adapters with samples. "
            "Its `undescribed` and the retriever's `rejected` say why others are not found."
        )
    return list(vectors), np.stack(list(vectors.values()))


def plot_similarity(
    file: str | Path, names: Sequence[str], vectors: NDArray[np.float32], *, domains: Mapping[str, str] | None = None
) -> Path:
    """Draw the cosines between adapters, those of one domain side by side.

    Args:
        file: Where the picture goes; its suffix decides the format.
        names: Of the adapters.
        vectors: `[len(names), d]`, rows of length 1.
        domains: Domain by name, to order and part them.

    Raises:
        InvalidRequestError: If there are not as many vectors as names.
        MissingDependencyError: If matplotlib is not installed.
    """
    check_rows(names, vectors)
    domain = [(domains or {}).get(name, "") for name in names]
    order = sorted(range(len(names)), key=lambda i: (domain[i], names[i]))
    figure, axes = _figure(len(names) * 0.2 + 2, len(names) * 0.2 + 1.5)
    picture = axes.imshow(vectors[order] @ vectors[order].T, cmap="viridis", vmax=1)
    figure.colorbar(picture, label="cosine", shrink=0.8)
    for place, labels in ((axes.set_xticks, {"rotation": 90}), (axes.set_yticks, {})):
        place(range(len(names)), [names[i] for i in order], fontsize=6, **labels)
    for row in range(1, len(names)):
        if domain[order[row]] != domain[order[row - 1]]:
            axes.axhline(row - 0.5, color="white", linewidth=0.8)
            axes.axvline(row - 0.5, color="white", linewidth=0.8)
    return _save(figure, file)


def plot_accuracy(
    file: str | Path, curves: Mapping[str, Accuracy], *, label: str = "right adapter among them, %"
) -> Path:
    """Draw accuracy over k, a curve per encoder, part of the pool or setting.

    Args:
        file: Where the picture goes; its suffix decides the format.
        curves: Accuracy in [0, 1] by k, by label.
        label: What the accuracy is of.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure, axes = _figure(5, 3.5)
    for name, accuracy in curves.items():
        ks = sorted(accuracy)
        axes.plot(ks, [100 * accuracy[k] for k in ks], marker="o", label=name)
    axes.set(xlabel="adapters retrieved (k)", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, file)


def plot_map(
    file: str | Path, names: Sequence[str], vectors: NDArray[np.float32], *, domains: Mapping[str, str] | None = None
) -> Path:
    """Draw the pool in two dimensions, its principal components, coloured by domain.

    Args:
        file: Where the picture goes; its suffix decides the format.
        names: Of the adapters, two at least.
        vectors: `[len(names), d]`, rows of length 1.
        domains: Domain by name, for the colours.

    Raises:
        InvalidRequestError: If there are not as many vectors as names, or fewer than two.
        MissingDependencyError: If matplotlib is not installed.
    """
    places = make_map(names, vectors).places
    if len(names) < 2:
        raise InvalidRequestError(f"a map of {len(names)} adapters is not allowed: pass two or more.")
    figure, axes = _figure(7, 5)
    groups = [(domains or {}).get(name, "") for name in names]
    for group in dict.fromkeys(groups):
        chosen = np.array([g == group for g in groups])
        axes.scatter(places[chosen, 0], places[chosen, 1], s=18, label=group or None)
    for name, place in zip(names, places, strict=True):
        axes.annotate(name, place, fontsize=6, xytext=(3, 2), textcoords="offset points")
    if domains:
        axes.legend(fontsize=6)
    axes.margins(x=0.12)  # room for names at the right edge
    axes.set(xticks=[], yticks=[])
    return _save(figure, file)


def plot_throughput(file: str | Path, curves: Mapping[str, Mapping[int, float]]) -> Path:
    """Draw tokens per second over the number of concurrent requests.

    Args:
        file: Where the picture goes; its suffix decides the format.
        curves: Tokens per second by number of requests, by label.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure, axes = _figure(5, 3.5)
    for label, speeds in curves.items():
        sizes = sorted(speeds)
        axes.plot(sizes, [speeds[size] for size in sizes], marker="o", label=label)
    axes.set(xlabel="concurrent requests", ylabel="tokens per second", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, file)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        # Not pyplot: that would keep the figures and may look for a screen.
        from matplotlib.figure import Figure  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise MissingDependencyError(
            "Plots need the package matplotlib. Install it: pip install 'langchain-lora-retriever[evaluate]'."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, file: str | Path) -> Path:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
