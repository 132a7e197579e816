"""The control plane, and the only importer of ray."""
