"""A tiny package called ``magus`` for the tests: only the names that the plug-ins touch, with the
behaviour they rely on.

Written by `write` into a temporary folder. It searches nothing: its population is a fixed list of
structures.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

FILES = {
    "__init__.py": "__version__ = 'stand-in'",
    "entrypoints/__init__.py": "",
    "entrypoints/search.py": (
        """
        from magus.parameters import magusParameters
        from magus.search.search import Magus
        from magus.search.search_ml import MLMagus

        started = []

        def search(input_file="input.yaml", use_ml=False, restart=False, **kwargs):
            started.append((MLMagus if use_ml else Magus)(magusParameters(input_file), restart=restart))
    """
    ),
    "logger.py": (
        """
        import logging

        def set_logger(name=None, level="INFO", log_path="log.txt"):
            logging.getLogger().addHandler(logging.FileHandler(log_path))
    """
    ),
    "populations/__init__.py": "",
    "search/__init__.py": "",
    "utils.py": (
        """
        class Plugin(dict):
            def register(self, name):
                def keep(thing):
                    self[name] = thing
                    return thing

                return keep

        CALCULATOR_PLUGIN = Plugin()
        EXTRA = []  # what "MAGUS's own files" register at every look-up

        def load_plugins(*args, **kwargs):
            for name, thing in EXTRA:
                CALCULATOR_PLUGIN[name] = thing
    """
    ),
    "fitness.py": (
        """
        class FitnessCalculator:
            def __init__(self, parameters):
                pass

        class EnthalpyFitness(FitnessCalculator):
            def calc(self, pop):
                for ind in pop:
                    ind.info["fitness"]["enthalpy"] = -ind.info["enthalpy"]

        fit_dict = {"Enthalpy": EnthalpyFitness, "Gap": FitnessCalculator, "XRD": FitnessCalculator}
    """
    ),
    "populations/populations.py": (
        """
        import os
        import ase.io
        from ase import Atoms

        class Individual(Atoms):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.info.update(fitness={}, used=0)

            def for_calculate(self):
                self.wrap()
                return self

            def find_spg(self):
                self.info["spg"] = 1

        class Population:
            fit_calcs = []
            results_dir = "results"

            def __init__(self, pop, name="temp", gen=""):
                self.pop = [ind if isinstance(ind, Individual) else Individual(ind) for ind in pop]
                self.name, self.gen = name, gen
                for i, ind in enumerate(self.pop):
                    ind.info.setdefault("identity", f"{name}{gen}-{i}")

            def __iter__(self):
                return iter(self.pop)

            def __len__(self):
                return len(self.pop)

            def __getitem__(self, index):
                return self.pop[index]

            def __setitem__(self, index, ind):
                self.pop[index] = ind.copy()

            def copy(self):
                return type(self)([ind.copy() for ind in self.pop], self.name, self.gen)

            def __add__(self, other):
                new = self.copy()
                new.pop.extend(other)
                return new

            def check(self):
                self.pop = [ind for ind in self.pop if "energy" in ind.info]

            def calc_fitness(self):
                for fit in self.fit_calcs:
                    fit.calc(self)

            def save(self, name, gen):
                frames = []
                for ind in self.pop:
                    frame = Atoms(ind)
                    frame.info = {k: v for k, v in ind.info.items() if k not in ("fitness", "trajs")}
                    frames.append(frame)
                os.makedirs(self.results_dir, exist_ok=True)
                ase.io.write(f"{self.results_dir}/{name}{gen}.traj", frames)
    """
    ),
    "calculators/__init__.py": (
        """
        from magus.utils import CALCULATOR_PLUGIN, load_plugins

        def get_calculator(p_dict):
            load_plugins(__file__, "magus.calculators")
            return CALCULATOR_PLUGIN[p_dict["calculator"]](**p_dict)
    """
    ),
    "calculators/base.py": (
        """
        import os
        from magus.populations.populations import Population

        class Calculator:
            def __init__(self, **parameters):
                self.all_parameters = parameters
                self.work_dir = parameters["workDir"]
                self.job_prefix = parameters.get("job_prefix") or parameters["jobPrefix"]
                self.pressure = parameters.get("pressure", 0.0)
                self.input_dir = f"{self.work_dir}/inputFold/{self.job_prefix}"
                self.calc_dir = f"{self.work_dir}/calcFold/{self.job_prefix}"
                os.makedirs(self.calc_dir, exist_ok=True)
                self.main_info = ["job_prefix", "pressure", "input_dir", "calc_dir"]

            def _prepare(self, pop):
                return [ind.for_calculate() if hasattr(ind, "for_calculate") else ind for ind in pop]

            def _hand_back(self, pop, done):
                return type(pop)(done) if isinstance(pop, Population) else done

            def relax(self, pop, **kwargs):
                return self._hand_back(pop, self.relax_(self._prepare(pop), **kwargs))

            def scf(self, pop):
                return self._hand_back(pop, self.scf_(self._prepare(pop)))
    """
    ),
    "parameters.py": (
        """
        import copy, os
        from magus.calculators import get_calculator
        from magus.fitness import fit_dict
        from magus.populations.populations import Population

        class magusParameters:
            def __init__(self, data):
                here = os.getcwd()
                self.p_dict = {"formulaType": "fix", **data, "workDir": here, "resultsDir": here + "/results"}

            def _calculator(self, block, **more):
                return get_calculator({**copy.deepcopy(self.p_dict), **self.p_dict[block], **more})

            @property
            def MainCalculator(self):
                if not hasattr(self, "main"):
                    self.main = self._calculator("MainCalculator")
                return self.main

            @property
            def MLCalculator(self):
                return self._calculator("MLCalculator", query_calculator=self.MainCalculator)

            @property
            def Population(self):
                names = self.p_dict.get("Fitness", ["Enthalpy"])
                return type("FixPopulation", (Population,), {"fit_calcs": [fit_dict[name](self.p_dict) for name in names]})
    """
    ),
    "search/search.py": (
        """
        import os, shutil

        class Magus:
            def __init__(self, parameters, restart=False):
                self.init_parms(parameters)
                self.seed_dir = self.parameters["workDir"] + "/Seeds"
                self.curgen = 1
                if not restart and os.path.exists("results"):
                    number = 1
                    while os.path.exists(f"results{number}"):
                        number += 1
                    shutil.move("results", f"results{number}")
                os.makedirs("results", exist_ok=True)
                self.good_pop, self.keep_pop = self.Population([], "good"), self.Population([], "keep")
                self.best_pop = self.Population([], "best")

            def init_parms(self, parameters):
                self.parameters = parameters.p_dict
                self.main_calculator = parameters.MainCalculator
                self.Population = parameters.Population

            volume_updates = 0

            def update_volume_ratio(self):
                self.volume_updates += 1

            def one_step(self, population):
                self.update_volume_ratio()
                relaxed = self.main_calculator.relax(self.Population(population, "init", self.curgen))
                relaxed.save("raw", self.curgen)
                self.cur_pop = self.Population(relaxed.pop[: self.parameters.get("distinct")], "cur", self.curgen)
                self.cur_pop.calc_fitness()
                self.cur_pop.save("gen", self.curgen)
                self.analysis()
                self.curgen += 1

            def run(self, population):
                while self.curgen <= self.parameters["numGen"]:
                    self.one_step(population)
                    if self.curgen > self.parameters.get("converged_in", 1000):
                        break

            def analysis(self):
                self.set_good_pop()
                self.best_pop.pop.append(self.good_pop[0].copy())

            def set_good_pop(self):
                self.good_pop = self.good_pop + self.cur_pop
                self.good_pop.calc_fitness()
    """
    ),
    "search/search_ml.py": (
        """
        from .search import Magus

        class MLMagus(Magus):
            def init_parms(self, parameters):
                super().init_parms(parameters)
                self.ml_calculator = parameters.MLCalculator

            def one_step(self, population):
                self.update_volume_ratio()
                relaxed = self.ml_calculator.relax(self.Population(population, "init", self.curgen))
                chosen = self.ml_calculator.select(self.Population(relaxed.copy(), "relax", self.curgen))
                labelled = self.main_calculator.scf(self.ml_calculator.expand_perturb(chosen))
                self.cur_pop = relaxed
                self.ml_calculator.updatedataset(labelled)
                self.ml_calculator.train()
                self.set_good_pop()
                self.curgen += 1
    """
    ),
}


def write(folder: Path) -> Path:
    """Write the package below ``folder`` and return ``folder``."""
    for name, text in FILES.items():
        file = folder / "magus" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    return folder
