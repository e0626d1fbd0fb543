"""Gradient noise measured in the training loops of other libraries, a file each.

A file imports its library, and nothing else of the package imports the file: so none of them has to
be installed. What they share is in common.py. Every adapter measures the update that its host is
about to make, leaves the host's training in the same bits, and writes to the host's own logger.
"""
