"""`python -m quickstart_data --out DIR [--sources DIR]`: fetch the sources, write the pack."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from sailplan.data.writer import BuildError

PER_SHARD = {
    "emoji": 500,
    "icons": 1000,
    "prompts": 300,
    "icon_choices": 1000,
    "icon_histories": 1000,
    "emoji_pairs": 2000,
}


def build(out: Path, sources: Path, scratch: Path) -> None:
    from quickstart_data import images, splits
    from quickstart_data.choices import read_choices
    from quickstart_data.emoji import read_emoji
    from quickstart_data.icons import read_icons
    from quickstart_data.manifest import describe_set, write_manifest
    from quickstart_data.pairs import emoji_pairs
    from quickstart_data.prompts import read_prompts
    from quickstart_data.sources import unpack_all
    from quickstart_data.tokenizer import train_tokenizer
    from sailplan.data.writer import write_shards

    images.check_pillow()
    unpacked = unpack_all(sources, scratch)
    emoji, icons, prompts = read_emoji(unpacked), read_icons(unpacked), read_prompts(unpacked)
    choices, histories = read_choices(
        unpacked.wheel, {icon.id: icon.body["split"] for icon in icons}
    )

    counts = {
        "translations_removed": splits.separate([*emoji, *icons, *choices]),
        "aliases_removed": splits.drop_aliases_of_the_other_side([*emoji, *icons]),
    }
    other_texts = splits.training_texts([*emoji, *icons, *prompts, *choices])
    counts["held_out_keywords"] = splits.hold_out_keywords([*emoji, *icons], other_texts)

    sets = {
        "emoji": emoji,
        "icons": icons,
        "prompts": prompts,
        "icon_choices": choices,
        "icon_histories": histories,
        "emoji_pairs": emoji_pairs(emoji),
    }
    out.mkdir(parents=True, exist_ok=True)
    described = {}
    for name, records in sets.items():
        shards = write_shards(records, out / name, name, PER_SHARD[name])
        described[name] = describe_set(records, shards, out)
        print(
            f"{name}: {len(records)} records, {described[name]['splits']}, {len(shards)} shards",
            flush=True,
        )
    train_tokenizer([*emoji, *icons, *prompts, *choices], out / "tokenizer.json")
    write_manifest(out, described, counts, unpacked.described)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m quickstart_data", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pack into")
    parser.add_argument(
        "--sources", type=Path, help="folder that keeps the fetched archives (default: thrown away)"
    )
    chosen = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            build(
                chosen.out, chosen.sources or Path(scratch) / "archives", Path(scratch) / "unpacked"
            )
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(
            f"error: the Python package {error.name} is needed to build the pack", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
