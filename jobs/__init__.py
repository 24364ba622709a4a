"""One file a command; listing the folder is reading the pipeline."""
