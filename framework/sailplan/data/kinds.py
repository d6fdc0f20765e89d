"""What a record's members are, by their endings, and which of them its item shows.

An ending says which decoder is asked; what the content is, the decoder finds for itself, so a WebP
called `.jpg` is read.
Members of no kind are passed over and counted by `sailplan data validate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sailplan.data.names import NUMBERED, frame_order

Kind = Literal["picture", "sound", "video", "text", "json"]
ENDINGS: dict[Kind, str] = {
    "picture": "jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff avif avifs jp2 j2k jpx jpf ico icns ppm pgm pbm pnm pfm pcx psd qoi sgi dds mpo",
    "sound": "wav wave ogg oga opus flac mp3 aif aiff aifc au snd caf w64 rf64 voc sf ircam nist sph svx 8svx avr paf pvf htk sds xi mat m4a aac wma amr mka",
    "video": "mp4 m4v webm mkv mov avi mpg mpeg ogv 3gp flv wmv",
    "text": "txt",
    "json": "json",
}
KINDS: dict[str, Kind] = {
    ending: kind for kind, endings in ENDINGS.items() for ending in endings.split()
}
MANY = 0xFFFF  # pictures that a film counts as: a row shows as many of them as it can
Place = tuple[str, int, int]  # extension, offset of the content in bytes, size in bytes


def ending_of(extension: str) -> str:
    """Return the last part of an extension: '0.jpg' -> 'jpg'."""
    return extension.rpartition(".")[2]


def kind_of(extension: str) -> Kind | None:
    """Return what a member with this extension is, None where nobody reads it."""
    return KINDS.get(ending_of(extension))


@dataclass
class Chosen:
    """The members of a record that are read, each (extension, offset, size), and those that
    nobody reads.
    """

    json: Place | None = None
    text: Place | None = None
    pictures: list[Place] = field(default_factory=list)  # plain ones, then frames by number
    sound: Place | None = None
    video: Place | None = (
        None  # None where there are pictures: a film's preview picture is the record's picture
    )
    unread: list[Place] = field(default_factory=list)

    @property
    def read(self) -> bool:
        """Whether there is any member that an item shows."""
        return bool(self.pictures or self.text or self.sound or self.video)


NOTHING = Chosen()


def choose(members: Sequence[Place]) -> Chosen:
    """Return what a record's item shows of its members.

    A plain ending goes before a companion (`KEY.jpg` before `KEY.mask.png`), which is read only
    where there is nothing plain of its kind. Frames `KEY.N.jpg` are all read, in the order of their
    numbers.
    """
    if not members:
        return NOTHING
    if len(members) == 1 and members[0][0] == "json":  # as most records of texts
        return Chosen(json=members[0])
    by_kind: dict[Kind | None, list[Place]] = {}
    for member in members:
        by_kind.setdefault(kind_of(member[0]), []).append(member)
    chosen = Chosen(unread=by_kind.pop(None, []))
    for kind, found in by_kind.items():
        assert kind is not None
        own = [member for member in found if _is_own(member[0])] or (
            found if kind != "json" else []
        )
        chosen.unread += [member for member in found if member not in own]
        if not own:
            continue
        if kind == "picture":
            chosen.pictures = sorted(own, key=lambda member: frame_order(member[0]))
        else:
            setattr(chosen, kind, own[-1])
            chosen.unread += own[:-1]
    if chosen.pictures and chosen.video is not None:
        chosen.unread.append(chosen.video)
        chosen.video = None
    return chosen


def _is_own(extension: str) -> bool:
    middle = extension.rpartition(".")[0]
    return not middle or NUMBERED.fullmatch(middle) is not None
