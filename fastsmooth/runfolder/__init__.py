"""The folder of a run: written, read back, and taken up again."""
