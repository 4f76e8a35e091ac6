"""Embedded host: runs the same ``input.yaml`` and leaves the same ``results/`` as MAGUS, where
MAGUS is not installed.

`host.run` is a search: random crystals of `generate`, relaxed in `relaxation`, selected and bred in
`population`, kept in `archive`; `keys` has the keys of MAGUS that it knows, for every part.
"""
