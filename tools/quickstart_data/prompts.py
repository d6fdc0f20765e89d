"""The `prompts` set: telephone prompts spoken by Allison Smith, with their written text.

The 17 files without speech (silence, tones, monkeys: their text is in brackets) are left out. A
prompt and its text are held out together; recordings of the same text are on the same side.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import soundfile

from quickstart_data.audio import opus
from quickstart_data.sources import Unpacked
from quickstart_data.splits import split_by_name
from sailplan.data.writer import BuildError, Record


def spoken_form(transcript: str) -> str:
    """A transcript without case and punctuation, to find recordings of the same words."""
    return " ".join(
        "".join(char if char.isalnum() or char == "'" else " " for char in transcript)
        .lower()
        .split()
    )


def read_transcripts(path: Path) -> dict[str, str]:
    """`name: text` lines; comments begin with a semicolon."""
    transcripts = {}
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        name, colon, text = line.strip().partition(":")
        if colon and not name.startswith(";"):
            transcripts[name] = " ".join(text.split())
    return transcripts


def read_prompts(unpacked: Unpacked) -> list[Record]:
    transcripts = read_transcripts(
        unpacked.file("asterisk-core-sounds-en", "usr/share/doc/*/core-sounds-en.txt.gz")
    )
    folder = unpacked.file(
        "asterisk-core-sounds-en-wav", "usr/share/asterisk/sounds/en_US_f_Allison"
    )
    records = []
    for path in sorted(folder.rglob("*.wav")):
        name = str(path.relative_to(folder).with_suffix(""))
        if name not in transcripts:
            raise BuildError(f"recording {name} has no transcript")
        text = transcripts[name]
        if text[:1] in "[<(":
            continue
        samples, rate = soundfile.read(path, dtype="int16")
        body = {
            "id": f"prompts/{name}",
            "group": name.split("/")[0] if "/" in name else "general",
            "seconds": round(len(samples) / rate, 3),
            "fields": {"asr": {"en": text}},
        }
        records.append(Record(body, ogg=opus(samples, rate)))
    sides = split_by_name([spoken_form(record.body["fields"]["asr"]["en"]) for record in records])
    for record, side in zip(records, sides, strict=True):
        record.body["split"] = side
    return records
