"""A campaign file for tests: every kind of step, nothing that needs DFT."""

import copy

import yaml
from ase.io import write
from crystals import h3s

GIVEN = {
    "seed": 3,
    "foundation": "h3s-gpaw-small",
    "host": "embedded",
    "search": {
        "formulaType": "fix",
        "symbols": ["H", "S"],
        "formula": [3, 1],
        "min_n_atoms": 4,
        "max_n_atoms": 4,
        "popSize": 4,
        "numGen": 2,
    },
    "labeler": {"calculator": "ase.calculators.lj.LennardJones", "n_workers": 1},
    "phases": [{"name": "Im-3m", "structure": "cubic.vasp"}, {"name": "C2/c", "space_group": 15}],
    "learning": {"pressures": [75, 125], "settings": {"n_sample": 2}},
    "produce": {"pressures": [50, 100]},
    "relax": {"pressures": [50, 100, 150]},
    "sscha": {"pressures": [100]},
    "dft": {},
    "hessian": {
        "phases": [{"name": "Im-3m", "irreps": ["T1u"]}],
        "pressures": [100, 150],
        "dispersions": [100],
    },
}


def changed(**changes):
    """`GIVEN` with some blocks laid over its own; None removes a block."""
    data = copy.deepcopy(GIVEN)
    for name, value in changes.items():
        if value is None:
            del data[name]
        elif isinstance(value, dict) and isinstance(data.get(name), dict):
            data[name] = {**data[name], **value}
        else:
            data[name] = value
    return data


def write_campaign(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "cubic.vasp", h3s(), format="vasp")
    file = folder / "campaign.yaml"
    file.write_text(yaml.safe_dump(changed(**changes)), encoding="utf-8")
    return file
