"""A calculator of MAGUS that sends EMT single points through MAGUS's own job manager; what VASP is
to its users.

Structures of an element whose symbol stands in the file ``crash`` beside the jobs end the job
without output, as a crashed code does.
"""

import sys
from pathlib import Path

from ase.calculators.emt import EMT
from ase.io import read, write


def register():
    """Entry point of the group ``magus.plugins``."""
    from magus.calculators.base import ClusterCalculator
    from magus.utils import CALCULATOR_PLUGIN

    @CALCULATOR_PLUGIN.register("toy-cluster")
    class ToyCluster(ClusterCalculator):
        """Single points, and relaxations that are no more, by jobs or one after the other."""

        def scf_job(self, index):
            self.J.sub(f"{sys.executable} -m toy_cluster", name="toy", file="job.sh")

        relax_job = scf_job

        def scf_serial(self, frames):
            return single_points(frames)

        relax_serial = scf_serial


def single_points(frames):
    """The structures with MAGUS's keys."""
    for atoms in frames:
        atoms.calc = EMT()
        atoms.info |= {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(),
            "stress": atoms.get_stress(),
        }
        atoms.info["enthalpy"] = atoms.info["energy"] / len(atoms)
        atoms.calc = None
    return frames


def main():
    """The job: initPop.traj -> optPop.traj."""
    frames = read("initPop.traj", ":")
    if Path("../crash").exists():
        sys.exit("the code crashed")
    write("optPop.traj", single_points(frames))


if __name__ == "__main__":
    main()
