"""An adapter's files: written, read again, merged, probed, tried out."""
