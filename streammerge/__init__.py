"""Merge large language-model checkpoints, streamed: never two models in memory.

    import streammerge

    streammerge.merge({"base": "org/base", "models": ["org/long-reasoner"], "method": "fim_ties"}, "merged")

Importing this imports neither torch nor transformers; the calls do when they need them.
"""

from streammerge import signals  # noqa: F401 - first: Ctrl-C may come while the command line imports the rest

# isort: split
from streammerge import catalogue, errors
from streammerge._version import __version__
from streammerge.diagnose import diagnose
from streammerge.diagnose.settings import DiagnoseSettings
from streammerge.errors import StreammergeError
from streammerge.evaluation import compare, evaluate
from streammerge.evaluation.settings import EvaluationSettings
from streammerge.fisher import fisher
from streammerge.fisher.store import FisherSettings
from streammerge.hub.push import push
from streammerge.hub.settings import PushSettings
from streammerge.merge import merge
from streammerge.methods import METHODS
from streammerge.plan import MergePlan, plan
from streammerge.recipe import Recipe, load_recipe, make_recipe
from streammerge.sweep import sweep
from streammerge.verify import verify

__all__ = [
    "METHODS",
    "DiagnoseSettings",
    "EvaluationSettings",
    "FisherSettings",
    "MergePlan",
    "PushSettings",
    "Recipe",
    "StreammergeError",
    "__version__",
    "catalogue",
    "compare",
    "diagnose",
    "errors",
    "evaluate",
    "fisher",
    "load_recipe",
    "make_recipe",
    "merge",
    "plan",
    "push",
    "sweep",
    "verify",
]
