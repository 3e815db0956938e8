"""The eager definitions: read like the papers, in any dtype; the oracle in float64."""
