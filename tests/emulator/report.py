"""What watch mode counted: shared-memory wavefronts and global sectors, per source line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .launch import SiteStruct


@dataclass
class Site:
    """All accesses of one kind from one source line."""

    kernel: str
    line: str
    space: str  # "shared" or "global"
    operation: str  # "load", "store" or "atomic"
    bytes: int  # per lane
    requests: int = 0  # warp instructions
    lanes: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    sectors: int = 0
    ideal_sectors: int = 0
    uninitialised: int = 0  # reads of shared memory that the block had not written

    @property
    def cost(self) -> int:
        return self.wavefronts if self.space == "shared" else self.sectors

    @property
    def ideal(self) -> int:
        return self.ideal_wavefronts if self.space == "shared" else self.ideal_sectors


@dataclass
class Report:
    """Sums over every launch since the device was made, or since clear()."""

    sites: list[Site] = field(default_factory=list)
    uncounted: int = 0  # accesses left out because a block made too many between two barriers

    def clear(self) -> None:
        self.sites.clear()
        self.uncounted = 0

    def add(
        self, kernel: str, rows: Iterable[SiteStruct], uncounted: int, line: Callable[[int], str]
    ) -> None:
        known = {(s.kernel, s.line, s.space, s.operation, s.bytes): s for s in self.sites}
        for row in rows:
            space = "shared" if row.shared else "global"
            operation = "atomic" if row.atomic else "store" if row.write else "load"
            key = (kernel, line(row.pc), space, operation, row.bytes)
            if key not in known:
                known[key] = Site(*key)
                self.sites.append(known[key])
            site = known[key]
            for name in (
                "requests",
                "lanes",
                "wavefronts",
                "ideal_wavefronts",
                "sectors",
                "ideal_sectors",
                "uninitialised",
            ):
                setattr(site, name, getattr(site, name) + getattr(row, name))
        self.uncounted += uncounted

    def total(self, name: str, space: str | None = None) -> int:
        """The sum of one column, over one space or both."""
        return sum(getattr(s, name) for s in self.sites if space in (None, s.space))

    def __str__(self) -> str:
        head = ("line", "access", "requests", "lanes", "cost", "ideal", "x ideal")
        rows = [head]
        for s in sorted(self.sites, key=lambda s: (s.kernel, s.space, -s.cost)):
            ratio = f"{s.cost / s.ideal:.2f}" if s.ideal else "-"
            unit = "wavefronts" if s.space == "shared" else "sectors"
            access = f"{s.space} {s.operation} {s.bytes} B"
            if s.uninitialised:
                access += f" ({s.uninitialised} uninitialised)"
            lanes = f"{s.lanes / s.requests:.1f}" if s.requests else "-"
            row = (s.line, access, str(s.requests), lanes, f"{s.cost} {unit}", str(s.ideal), ratio)
            rows.append(row)
        for space, cost in (("shared", "wavefronts"), ("global", "sectors")):
            total, ideal = self.total(cost, space), self.total(f"ideal_{cost}", space)
            ratio = f"{total / ideal:.2f}" if ideal else "-"
            requests = str(self.total("requests", space))
            rows.append(("total", space, requests, "", f"{total} {cost}", str(ideal), ratio))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        if self.uncounted:
            lines.append(f"({self.uncounted} accesses not counted)")
        return "\n".join(lines)
