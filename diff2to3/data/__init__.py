"""The dataset on disk: preparing it in stages, reading it back, and feeding it to a training loop.

source ──▶ render ──▶ features ──▶ (latents) ──▶ AssetStore ──▶ TrainLoader
      └──▶ voxels ──┘

<root>/dataset.yaml            the resolved configuration of the latest run
<root>/plan.jsonl              one line an asset: id, key, shard, split, licence
<root>/<stage>/settings.json   what the stage's bytes depend on; other settings are refused
<root>/<stage>/00000.tar       the members of a shard's assets, in WebDataset's layout (see shards.py)
<root>/<stage>/00000.json      its index: places, checksums, facts, and failures with their reasons
<root>/logs/                   times and tracebacks; not part of the data
"""
