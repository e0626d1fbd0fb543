"""The command line of all commands: flags, what they mean together, and what a person sees."""
