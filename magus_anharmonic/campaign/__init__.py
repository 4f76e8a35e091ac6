"""The paper's two stages over several pressures (Fig. 1b): learning searches, one model,
production, SSCHA, checks; resumable.

`run` drives the steps that `steps` plans and says where they stand; the steps themselves are in
`learning`, `structures` (merge), `production` and `modes`. The commands call `run` alone.
"""
