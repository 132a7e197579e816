"""Version 1 of the wire schema; the modules here are generated from the .proto files."""
