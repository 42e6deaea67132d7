"""Making data sets, as datasets/*.py do.

writers      images -> folders of PNG files, npz files, references
packed       a folder or zip -> one npz that training reads without decoding
parts        long preparations in parts, so that an interruption costs one part
published    what the publishers of a data set hand out, and where to download it
archives     zip and tar archives
lmdb_source  LSUN's LMDB databases
safe_pickle  pickled arrays, without running what a pickle says
"""
