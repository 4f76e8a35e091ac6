"""G(P, T) of phases and their boundaries: SSCHA on a grid, surfaces, the diagram in numbers, words
and pictures."""
