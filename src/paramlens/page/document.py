"""The data for the page's scripts: one document, and a packed one for each site, unpacked when the reader opens the site."""

import base64
import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROUNDED = 4
"""Number of significant digits in the page; the analyses in the run directory have full precision."""


@dataclass(frozen=True)
class Packed:
    """A page's data. sites: gzipped JSON in base64, one per site. parts: number of subcomponents; left_out: those without token strips."""

    document: dict[str, Any]
    sites: list[str]
    left_out: int
    parts: int

    @property
    def size(self) -> int:
        """Size of the data, in bytes."""
        return len(json.dumps(self.document)) + sum(map(len, self.sites))


def pack(
    opened: str, circuit: Mapping[str, Any], catalogue: Mapping[str, Any], edges: Mapping[str, Any], *, command: str | None, room: float
) -> Packed:
    """Pack all data; if it exceeds `room` bytes, leave out the token strips of the least important subcomponents until it fits.

    opened: Python code that opens the run. command: the shell command that inspects the run. None: no command can open it.
    """
    parts = [(part["mean"], site, i) for site, each in catalogue["sites"].items() for i, part in enumerate(each["parts"])]
    parts.sort(reverse=True)
    document = _document(circuit, catalogue, edges) | {"opened": opened, "command": command}
    kept = len(parts)
    while True:
        with_strips = {(site, i) for _, site, i in parts[:kept]}
        sites = [_packed(_site(name, circuit, catalogue, with_strips)) for name in circuit["sites"]]
        packed = Packed(document, sites, left_out=len(parts) - kept, parts=len(parts))
        if packed.size <= room or not kept:
            return packed
        kept = min(kept - 1, int(kept * max(0, room) / packed.size))


def _document(circuit: Mapping[str, Any], catalogue: Mapping[str, Any], edges: Mapping[str, Any]) -> dict[str, Any]:
    removed = {change["site"]: change["kl"] for change in circuit["interventions"] if change["name"].endswith(" removed")}
    names = list(circuit["sites"])
    return _short(
        {
            "threshold": circuit["threshold"],
            "masked": catalogue["masked"],
            "roles": circuit["roles"],
            "tokens": catalogue["tokens"],
            "tokenRoles": catalogue["roles"],
            "sites": [
                {"name": name, "place": list(_place(name)), "unique": circuit["sites"][name]["unique"], "removed": removed.get(name)}
                | {
                    "parts": len(catalogue["sites"][name]["parts"]),
                    "C": catalogue["counts"][name],
                    "silent": circuit["sites"][name]["silent"],
                }
                for name in names
            ],
            "views": list(_views(circuit, catalogue)),
            "edges": [[names.index(e["source"]), names.index(e["target"]), e["inner"], e["importance"]] for e in edges["edges"]],
        }
    )


def _views(circuit: Mapping[str, Any], catalogue: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Importance maps Σ_c g, site × column: by role, around each role with a single position, and for each shown sequence."""
    sites, roles = circuit["sites"], circuit["roles"]
    label = "all positions" if len(roles) == 1 else "by token" if catalogue["roles"] is None else "by role"
    yield {
        "kind": "role",
        "label": label,
        "columns": roles,
        "values": [[site["importance"][role] for role in roles] for site in sites.values()],
    }
    for role, each in circuit["maps"].items():
        columns = [role if offset == 0 else f"{offset:+d}" for offset in each["offsets"]]
        values = [each["importance"][name] for name in sites]
        yield {"kind": "around", "role": role, "offsets": each["offsets"], "label": f"around {role}", "columns": columns, "values": values}
    for i, tokens in enumerate(catalogue["tokens"]):
        label = f"sequence {i + 1}" if len(catalogue["tokens"]) > 1 else "the inputs"
        values = [catalogue["sites"][name]["importance"][i] for name in sites]
        yield {"kind": "sequence", "sequence": i, "label": label, "columns": tokens, "values": values}


def _site(name: str, circuit: Mapping[str, Any], catalogue: Mapping[str, Any], with_strips: set[tuple[str, int]]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    by_role = circuit["sites"][name]["subcomponents"]
    for i, part in enumerate(catalogue["sites"][name]["parts"]):
        own = {key: value for key, value in part.items() if (name, i) in with_strips or key not in ("importance", "inner")}
        for key in ("reads", "positions", "writes", "suppresses"):
            own[key] = [[each["what"], each["value"]] for each in part[key]]
        parts.append(own | {"roles": [by_role[role][part["subcomponent"]] for role in circuit["roles"]]})
    return _short(parts)


def _place(site: str) -> Iterator[str]:
    """The block of a site and the site's name in the block, such as ("blocks.0", "attn.q")."""
    found = re.match(r"(.*?\.?\d+)\.(.+)$", site)
    yield from found.groups() if found else ("", site)


def _packed(document: Any) -> str:
    return base64.b64encode(gzip.compress(json.dumps(document, allow_nan=False).encode(), mtime=0)).decode()


def _short(tree: Any) -> Any:
    """Round every float of a tree to `ROUNDED` significant digits. One that is not finite becomes None, as JSON cannot hold it."""
    if isinstance(tree, float):
        return float(f"{tree:.{ROUNDED}g}") if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {key: _short(value) for key, value in tree.items()}
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        return [_short(value) for value in tree]
    return tree
