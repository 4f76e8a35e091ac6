"""G(P, T) of phases and their boundaries: SSCHA on a grid, surfaces, the diagram in numbers, words
and pictures.

`grid` runs SSCHA and leaves `points`; `surface` fits G(P, T) to those of a phase, `boundaries`
crosses surfaces, `diagram` puts all together and says it in words, `figures` draws and writes it.
"""
