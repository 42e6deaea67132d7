"""Reading images, and writing them.

image_io         pixels: uint8 <-> [-1, 1], decoding, crops, PNG files; the only place with 127.5
npz_io           npz files larger than memory, never unpickled
preprocessing    one line of text with each set: how its images were made
image_source     Source, the base: which images there are, their names, labels and classes
sources          folder, zip, remote folder;  npz_source: an npz
image_set        ImageSet: a source -> pixels of one size, by number (evaluation, measures, packing)
batches          batch number `step` as a pure function;  prefetch: the next ones in a thread
image_datasets   load_data: training batches as an endless stream
super_resolution the same with low-resolution copies
"""
