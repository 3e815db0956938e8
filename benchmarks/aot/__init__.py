"""Compiles every cell of the Triton backend's launch tables ahead of time, without a GPU, and holds what comes out
against what each architecture has."""
