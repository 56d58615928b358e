"""Token methods, one a file; the file name is what a profile calls ``tokens.method``."""
