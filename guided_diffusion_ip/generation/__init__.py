"""Making images by the thousand: batches whose noise has an address, shards on disk, one npz in the end."""
