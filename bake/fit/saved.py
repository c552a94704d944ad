"""Activations that somebody has saved: the class's rows, at the sites that the file names.

| file | what it is |
|---|---|
| ``.npy`` [N, d] | at the one site that ``--at`` names |
| ``.npy`` [N, L, d] | at the L sites that ``--at`` names, in that order |
| ``.safetensors`` of [N, d] | named by their sites, ``resid_post.14``, or by their layers, ``14`` |
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bake.directions.arrays import listing, place_of
from bake.directions.npy import read_array
from bake.directions.safetensors_file import opened
from bake.errors import DirectionError, InputError
from bake.families import Layout
from bake.fit.sweep import Activations
from bake.sites import Site, parse_site, summary

SUFFIXES = (".npy", ".safetensors")


def read_saved(path: Path, sites: Sequence[Site], layout: Layout) -> Activations:
    """Return the activations of a file at some sites.

    Args:
        path: of a suffix in ``SUFFIXES``.
        sites: what ``--at`` selects. Tensors named by layers are of their one kind.
        layout: the model that they were taken from.

    Raises:
        InputError: the file cannot be read; it lacks a site or has another number of them, or of
            channels, than the model; a value is not finite.
    """
    try:
        found = _array(path, sites) if path.suffix == ".npy" else _tensors(path, sites, layout)
    except OSError as error:
        raise InputError(
            f"the activations cannot be read: {error.strerror or error}", where=str(path)
        ) from error
    except DirectionError as error:
        raise InputError(error.what, where=str(path), why=error.why, fix=error.fix) from error
    for site, rows in found.items():
        _check(rows, site, layout, path)
    counts = {len(rows) for rows in found.values()}
    if len(counts) > 1:
        raise InputError(
            f"the sites hold {', '.join(map(str, sorted(counts)))} examples",
            where=str(path),
            why="row i is the same example at every site",
            fix="save them together",
        )
    return found


def _array(path: Path, sites: Sequence[Site]) -> Activations:
    array = read_array(path.read_bytes())
    shape = list(array.shape)
    if array.dim() == 2:
        array = array.unsqueeze(1)
    if array.dim() != 3 or 0 in shape:
        raise DirectionError(
            f"an array of shape {shape} is neither [N, d] nor [N, L, d]",
            why="a row is an example",
        )
    if array.shape[1] != len(sites):
        raise DirectionError(
            f"an array of shape {shape} is of {array.shape[1]} site"
            f"{'s' * (array.shape[1] != 1)}, and --at selects {len(sites)}",
            why=f"these are {summary(sites)}",
            fix="name the sites that were saved, in their order: --at resid_post.14",
        )
    return {site: array[:, i] for i, site in enumerate(sites)}


def _tensors(path: Path, sites: Sequence[Site], layout: Layout) -> Activations:
    with opened(path) as file:
        named = _named(file.names, sites, layout)
        missing = [site for site in sites if site not in named]
        if missing:
            raise DirectionError(
                f"the file holds nothing at {summary(missing)}",
                why=f"its tensors are {listing(file.names)}",
                fix=f"name what it holds: --at {named_as_patterns(tuple(named))}",
            )
        return {site: file.get(named[site]) for site in sites}


def _named(names: Sequence[str], sites: Sequence[Site], layout: Layout) -> Mapping[Site, str]:
    """Return the tensor of each site, by their names."""
    kinds = {site.kind for site in sites}
    found: dict[Site, str] = {}
    for name in names:
        place = place_of(name)
        if place is None:
            raise DirectionError(
                f"the tensor {name!r} names neither a site nor a layer",
                fix="name tensors by their sites: resid_post.14",
            )
        layer, text = place
        if text is None and len(kinds) > 1:
            raise DirectionError(
                f"the tensor {name!r} names a layer, and no site of it",
                fix="say which with --at: --at 'resid_post.*'",
            )
        site = Site(next(iter(kinds)), layer) if text is None else parse_site(text)
        if layer is not None and layer >= layout.layers:
            raise DirectionError(
                f"the tensor {name!r} is of layer {layer}, and the model has {layout.layers} "
                f"blocks, 0 to {layout.layers - 1}",
                why="the activations are another model's, or count layers otherwise than from 0",
            )
        if site in found:
            raise DirectionError(f"{found[site]!r} and {name!r} are of one site")
        found[site] = name
    if not found:
        raise DirectionError("the file holds no tensor")
    return found


def named_as_patterns(sites: Sequence[Site]) -> str:
    """Return sites as values of ``--at``."""
    return " --at ".join(summary([site]) for site in sites[:4])


def _check(rows: Tensor, site: Site, layout: Layout, path: Path) -> None:
    where = f"{path}, {site}"
    if rows.dim() != 2 or 0 in rows.shape:
        raise InputError(
            f"a tensor of shape {list(rows.shape)} is no [N, d]",
            where=where,
            why="a row is an example",
        )
    width = layout.width(site)
    if rows.shape[1] != width:
        raise InputError(
            f"the activations are {rows.shape[1]} wide, and the site is {width} wide",
            where=where,
            fix="name the model and the site that they were taken from",
        )
    if not rows.is_floating_point():
        raise InputError(f"the activations are {rows.dtype}, and no floats", where=where)
    check_finite(rows, where)


def check_finite(rows: Tensor, where: str) -> None:
    """Refuse activations that are not finite.

    Raises:
        InputError: naming the first example.
    """
    bad = ~torch.isfinite(rows).all(1)
    if bool(bad.any()):
        raise InputError(
            f"the activations of {int(bad.sum())} examples are not finite, first of example "
            f"{int(bad.nonzero()[0]) + 1}",
            where=where,
            why="a NaN or an infinity would be in every mean",
            fix="compute them in float32; float16 overflows at 65504",
        )
