"""The report of a packing: what was packed, what was left out, and how SOURCE and options were interpreted."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from stylegan_pg.data.datasets.description import check_index
from stylegan_pg.data.datasets.fields import Field
from stylegan_pg.data.images.decode import SQUARE, size_at
from stylegan_pg.data.pack import ledger
from stylegan_pg.data.pack.selection import Chosen
from stylegan_pg.data.pack.source_files import few
from stylegan_pg.data.pack.sources import told
from stylegan_pg.untrusted import printable, whole_number

LONGEST_LINE = 4000  # characters of a report's lines


@dataclass(frozen=True)
class PackReport:
    """The result of a packing.

    `unreadable`: (path within SOURCE, reason). `gone`: files that were listed and then not found. `unlabelled`:
    pictures left out because they have no label. `repacked`: pictures changed since an earlier packing. `decided`:
    (path, a decision that the picture's owner may not expect). `ignored`: counts of other files by kind. `remarks`: how
    labels and options were interpreted. `notes`: how SOURCE was interpreted. `unpaired`: pictures left out because they
    have no partner. `fields`: those besides the picture and its class, by name.
    """

    out: str
    count: int
    resolutions: tuple[int, ...]
    base: tuple[int, int]
    label_names: tuple[str, ...]
    identity: str
    unreadable: tuple[tuple[str, str], ...]
    gone: tuple[str, ...]
    unlabelled: tuple[str, ...]
    repacked: tuple[str, ...]
    upscaled: int
    ignored: dict[str, int]
    empty_classes: tuple[str, ...]
    remarks: tuple[str, ...]
    was_complete: bool
    notes: tuple[str, ...] = ()
    unpaired: tuple[str, ...] = ()
    fields: dict[str, Field] = dataclass_field(default_factory=dict)
    decided: tuple[tuple[str, str], ...] = ()

    def summary(self) -> str:
        """The report as a few lines of text."""
        names = f", {len(self.label_names)} classes" if self.label_names else ", no labels"
        heights_widths = [size_at(r, self.base) for r in self.resolutions]
        sizes = [str(h) if h == w else f"{h}x{w}" for h, w in heights_widths]
        what = "pixels" if self.base[0] == self.base[1] else "rows x columns"
        lines = [f"{self.out}: {self.count} pictures at {', '.join(sizes)} {what}{names}"]
        if self.was_complete:
            lines.insert(0, f"{self.out} is already complete with these options: nothing to do")
        lines += self.remarks
        if self.repacked:
            lines.append(
                f"{len(self.repacked)} pictures had changed since they were packed, and were packed again: "
                f"{printable(few(list(self.repacked)))}"
            )
        if self.upscaled:
            lines.append(f"warning: {self.upscaled} pictures were smaller than {sizes[-1]} {what} and were enlarged")
        if self.unreadable:
            path, reason = self.unreadable[0]
            lines.append(
                f"warning: {len(self.unreadable)} pictures were left out, the first {printable(path)}: "
                f"{printable(reason)} (all of them in report.json)"
            )
        if self.gone:
            lines.append(
                f"warning: {len(self.gone)} pictures were gone from their folders when their turn came: "
                f"{printable(few(list(self.gone)))} (all of them in report.json)"
            )
        if self.empty_classes:
            named = printable(few(list(self.empty_classes)))
            lines.append(f"warning: {len(self.empty_classes)} classes have no picture that could be packed: {named}")
        lines += (f"note: {note}" for note in self.notes)
        for what, count in Counter(what for _, what in self.decided).items():
            path = next(path for path, one in self.decided if one == what)
            lines.append(f"note: {path} {what}" + (f" (and {count - 1} others)" if count > 1 else ""))
        if self.ignored:
            lines.append(f"ignored files that are not pictures: {told(self.ignored)}")
        return "\n".join(printable(line, LONGEST_LINE) for line in lines)


def report_of(out: Path, chosen: Chosen, changed: Sequence[str], was_complete: bool) -> PackReport:
    with ledger.damage_named(out / "index.json", out):
        index = ledger.table_in(out / "index.json")
        check_index(index)
    report: dict[str, Any] = {}
    file = out / "report.json"  # this file is for information only and may have been removed
    with contextlib.suppress(FileNotFoundError), ledger.damage_named(file, file):
        report = ledger.table_in(file)
    labels = index.get("labels") or {"names": [], "counts": []}
    with ledger.damage_named(file, file):
        return PackReport(
            out=str(out),
            count=index["count"],
            resolutions=tuple(index["resolutions"]),
            base=tuple(index.get("base", SQUARE)),
            label_names=tuple(labels["names"]),
            identity=str(index.get("identity")),
            unreadable=tuple((path, reason) for path, reason in report.get("unreadable", [])),
            gone=tuple(report.get("gone", [])),
            unlabelled=tuple(report.get("unlabelled", [])),
            unpaired=tuple(report.get("unpaired", [])),
            fields=dict(chosen.fields),
            repacked=tuple(changed),
            upscaled=whole_number(report.get("upscaled", 0), 0, 1 << 53, "upscaled", "it counts pictures"),
            ignored={str(kind): int(count) for kind, count in report.get("ignored", {}).items()},
            empty_classes=tuple(n for n, count in zip(labels["names"], labels["counts"], strict=True) if not count),
            remarks=tuple(chosen.remarks),
            was_complete=was_complete,
            notes=tuple(map(str, report.get("notes", ()))),
            decided=tuple((path, what) for path, what in report.get("decided", [])),
        )
