"""bake's own format: a safetensors file whose names and metadata say everything (version 1).

Metadata: ``format`` is ``bake-directions``, ``version`` is ``1``, ``concept`` is the name of what
was fitted; ``site``, where there is one, is the kind of site of every layer (``resid_post``) or the
site of the one direction (``resid_pre.14``). Anything else is carried along.

Tensors: ``<role>`` for a direction of no layer, ``<role>.<layer>`` for one of a layer, and
``<role>.<site>`` where one layer has several sites (``left.ln1_out.3``).
"""

from pathlib import Path

import torch
from torch import Tensor

from bake.atomic import write_atomically
from bake.checkpoints.header import build_header
from bake.directions.arrays import Place
from bake.directions.direction import DTYPES, Direction, Directions, Role
from bake.directions.reader import Content, Reader, Request
from bake.directions.safetensors_file import opened
from bake.errors import DirectionError, UsageError
from bake.sites import GLOBAL_KINDS, SiteKind, parse_site

FORMAT = "bake-directions"
VERSION = "1"
_OWN_KEYS = ("format", "version", "concept", "site")


def write_directions(directions: Directions, path: Path) -> None:
    """Write directions in bake's own format. Equal directions give equal bytes.

    The file appears whole or not at all. Where the directions were read from another format, its
    name, the digest of its file and its metadata are kept.

    Raises:
        DirectionError: the directions have places that the format cannot name.
    """
    site = _common_site(directions)
    tensors: dict[str, Tensor] = {}
    for item in directions.items:
        suffix = _suffix(item, site)
        tensors |= {f"{role}{suffix}": tensor for role, tensor in item.tensors.items()}
    metadata = dict(directions.metadata)
    if directions.format != "bake":
        metadata |= {"read_as": directions.format, "read_digest": directions.digest}
    metadata |= {"format": FORMAT, "version": VERSION, "concept": directions.concept}
    metadata.pop("site", None)
    if site is not None:
        metadata["site"] = site
    forms = {name: (DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    header, places = build_header(forms, shard=path.name, metadata=metadata)
    values = (tensors[place.name].reshape(-1).view(torch.uint8) for place in places)
    write_atomically(path, b"".join((header, *(value.numpy().tobytes() for value in values))))


def _common_site(directions: Directions) -> str | None:
    """Return the text of the ``site`` entry: the one site, or the kind that all layers share."""
    sites = {item.site for item in directions.items}
    if None in sites:
        if len(sites) > 1:
            raise DirectionError("some directions name their site and others do not")
        return None
    if len(directions.items) == 1 and directions.items[0].layer is None:
        return directions.items[0].site
    kinds = {parse_site(str(site)).kind for site in sites}
    plain = all(item.site == f"{next(iter(kinds))}.{item.layer}" for item in directions.items)
    return str(next(iter(kinds))) if len(kinds) == 1 and plain else None


def _suffix(item: Direction, site: str | None) -> str:
    """Return what follows the role in the names of an item's tensors."""
    if item.site is None or site is not None:
        return "" if item.layer is None else f".{item.layer}"
    if parse_site(item.site).layer != item.layer:
        raise DirectionError(
            f"the direction of {item.site} belongs to no layer, and others stand beside it",
            why="the format names the place of each direction by its layer",
        )
    return f".{item.site}"


def _recognises(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    with opened(path) as file:
        return file.metadata.get("format") == FORMAT


def _read(request: Request) -> Content:
    with opened(request.path) as file:
        metadata = dict(file.metadata)
        if metadata.get("format") != FORMAT:
            raise DirectionError(
                f"the metadata does not say format = {FORMAT!r}",
                fix='leave out reader = "bake" to read it as plain tensors',
            )
        if metadata.get("version") != VERSION:
            raise DirectionError(
                f"the format's version is {metadata.get('version')!r}; this bake reads {VERSION!r}",
                fix="install a newer bake",
            )
        if not metadata.get("concept"):
            raise DirectionError("the metadata names no concept")
        site = metadata.get("site")
        grouped: dict[Place, dict[Role, Tensor]] = {}
        for name in file.names:
            role, place = _parse(name, site)
            tensors = grouped.setdefault(place, {})
            if role in tensors:
                raise DirectionError(f"the tensor {name!r} is there twice, under two names")
            tensors[role] = file.get(name)
        items = tuple(Direction(grouped[place], *place) for place in sorted(grouped, key=_order))
    rest = {key: value for key, value in metadata.items() if key not in _OWN_KEYS}
    return Content(items, rest, concept=metadata["concept"])


def _parse(name: str, site: str | None) -> tuple[Role, Place]:
    """Return the role and the place that a tensor's name and the ``site`` entry say."""
    word, _, rest = name.partition(".")
    if word not in tuple(Role):
        raise DirectionError(
            f"the tensor {name!r} has no known role", fix=f"the roles are {', '.join(Role)}"
        )
    role = Role(word)
    try:
        if rest == "":
            # A bare kind names no one place, unless the model has only one of it.
            kind = site in tuple(SiteKind) and site not in GLOBAL_KINDS
            return role, (None, None if site is None or kind else str(parse_site(site)))
        if rest.isascii() and rest.isdecimal() and len(rest) <= 5:
            layer = int(rest)
            return role, (layer, None if site is None else str(parse_site(f"{site}.{layer}")))
        parsed = parse_site(rest)
        return role, (parsed.layer, str(parsed))
    except UsageError as error:
        raise DirectionError(
            f"the tensor {name!r} names no place: {error.what}",
            fix="write <role>, <role>.<layer> or <role>.<site>",
        ) from error


def _order(place: Place) -> tuple[int, str]:
    layer, site = place
    return (-1 if layer is None else layer, site or "")


READER = Reader("bake's own format (.safetensors with metadata)", _recognises, _read)
