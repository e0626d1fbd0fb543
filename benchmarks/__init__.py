"""A regular package, since Opacus installs one of the same name, which would hide a folder without
this file."""
