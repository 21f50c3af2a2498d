"""The command `transferkit`: thin over the library's public names, none of which imports it."""
