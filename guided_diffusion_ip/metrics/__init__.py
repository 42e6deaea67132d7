"""Numbers from images: pure functions of arrays."""
