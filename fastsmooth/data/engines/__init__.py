"""What makes chunks of images: a module an engine."""
