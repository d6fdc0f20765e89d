"""Shards that lie elsewhere: byte ranges of them are fetched, kept on disk within bounds, and
read from there.

`address` says how a URL is read. `service` is a process that fetches for all processes of a rank
and keeps what it fetched in a `disk` cache, which all ranks of a machine share; `client` asks it.
A process of its own, because workers are forked, and obstore's threads do not survive a fork (a
call in the child waits for ever).
"""
