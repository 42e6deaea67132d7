"""Making data sets, as datasets/*.py do.

writers      images -> folders of PNG files, npz files, references; each whole or not there
publishers   what the publishers of a data set hand out, where to download it, its archives
lmdb_source  LSUN's LMDB databases
safe_pickle  pickled arrays, without running what a pickle says
"""
