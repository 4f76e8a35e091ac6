"""Who gets how much SSCHA effort, the store of free energies, and the ranking with error bars.

`structures` ranks structures from anywhere, `rank` a population; the table is one `candidate` a
row. All else (races in `elimination`, `runs` and `jobs`, `stability`, `phases`, `uncertainty`,
`fitness`, the `store`) is of this package, but for the `matcher`, which tells structures apart.
"""
