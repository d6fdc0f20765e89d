"""From the data that people have to shards that a run reads: `sailplan data import` and
`sailplan new`.

A *source* (tables, folders) is cut into *parts* of a fixed number of rows, in the source's own
order. Each part becomes one shard, whoever works at it: the bytes depend neither on the number of
processes nor on where an import was stopped.
"""
