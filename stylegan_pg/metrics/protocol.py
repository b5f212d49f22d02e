"""What a metric's name says about how it is measured.

fid50k_full: Frechet distance of 50,000 generated images and the whole real set; without _full as many real ones as
generated. kid50k_full, pr50k3_full: the same for the kernel distance, and for precision and recall among 3 neighbours.
is50k: the Inception score. ppl2_wend: perceptual path length of 50,000 pairs in w (or z), at the ends of paths (wfull:
all along). swd, ms_ssim: sliced Wasserstein distance and multi-scale structural similarity, which need no network.
Counts can be others (fid2048_full, pr2563: 256 images, swd4096, ppl2_wend10k); _mirror adds the mirrored copies of the
real images, _psi0.7 truncates.

Whatever the metric, RGBA images are seen over white. Networks get grey images as three equal channels, and images of
any shape resized to the network's own square.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

NETWORK = {"fid": "inception", "kid": "inception", "is": "inception", "pr": "vgg16", "ppl2": "lpips"}
MOST_IMAGES = 10_000_000
LEAST_SIDE = {"swd": 8, "ppl2": 16}  # pixels
DEFAULT_COUNT = {"ppl2": 50_000, "swd": 8192, "ms_ssim": 10_000}
_NAME = re.compile(
    r"(?:(?:(?P<many>fid|kid|is)(?P<count>[1-9]\d*k?)|(?P<pr>pr)(?P<prs>[1-9]\d*?k?)3)(?P<full>_full)?"
    r"|ppl2_(?P<space>[wz])(?P<where>end|full)(?P<ppl>[1-9]\d*k?)?|(?P<plain>swd|ms_ssim)(?P<n>[1-9]\d*k?)?)"
    r"(?P<mirror>_mirror)?(?:_psi(?P<psi>\d+(?:\.\d+)?))?"
)


@dataclass(frozen=True)
class Protocol:
    """How one metric is measured.

    Attributes:
        name: in full, what results are reported under.
        kind: fid, kid, is, pr, ppl2, swd or ms_ssim.
        count: generated images (ppl2, ms_ssim: pairs).
        full: the whole real set, rather than `count` of it.
        mirror: with the real images' mirrored copies.
        psi: truncation, 1 for none.
        space, where: of ppl2.
    """

    name: str
    kind: str
    count: int
    full: bool = False
    mirror: bool = False
    psi: float = 1.0
    space: str = "w"
    where: str = "end"


def parse(name: str, *, psi: float = 1.0, images: int | None = None) -> Protocol:
    """A name as a protocol; `psi` is for names that do not say, and `images` for swd and ms_ssim without a count.

    Raises:
        UsageError: for names that mean nothing.
    """
    m = _NAME.fullmatch(name.strip())
    if m is None or (m["many"] == "is" and m["full"]) or (m["mirror"] and not (m["pr"] or m["many"] in ("fid", "kid"))):
        raise UsageError(
            f"unknown metric {printable(repr(name), 60)}: choose for example from fid50k_full, kid50k_full, "
            "pr50k3_full, is50k, ppl2_wend, swd, ms_ssim; counts can be others (fid2048_full), _mirror and _psi0.7 may "
            "follow"
        )
    kind = m["many"] or m["pr"] or m["plain"] or "ppl2"
    text = m["count"] or m["prs"] or m["ppl"] or m["n"]
    count = images if images and kind in ("swd", "ms_ssim") else DEFAULT_COUNT.get(kind, 0)
    if text:  # which may be longer than Python takes for a number
        count = int(text.removesuffix("k")[:12]) * (1000 if text.endswith("k") else 1)
    if count > MOST_IMAGES:
        raise UsageError(f"metric {printable(repr(name), 60)} is of more than {MOST_IMAGES} images: give fewer")
    stated = name.strip()
    if m["psi"]:
        psi = float(m["psi"])
        if not math.isfinite(psi):
            raise UsageError(f"metric {printable(repr(name), 60)}: psi must be a finite number")
    elif psi != 1:
        stated += f"_psi{psi:.9g}"
    return Protocol(
        stated, kind, count, bool(m["full"]), bool(m["mirror"]), psi, m["space"] or "w", m["where"] or "end"
    )
