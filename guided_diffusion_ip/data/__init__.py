"""Images in memory and on disk: formats, data sets, npz files."""
