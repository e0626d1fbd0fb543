"""The forms in which image folders come, a reader each."""
