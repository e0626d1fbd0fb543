"""A run: what it will do, what it is made of, its updates, and how it ends."""
