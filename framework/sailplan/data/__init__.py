"""From tar members to step batches: index, reader, order, plan, decoding per modality, collate,
loader.

The way of a sample: `plan` names the record, `reader` fetches its bytes, `views` decodes what the
step's views need, `collate` packs rows into micro-batches, `loader` has the batch ready when the
step asks for it.
"""
