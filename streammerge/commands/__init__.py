"""The commands of the command line, one file each; every one is one call of the library."""
