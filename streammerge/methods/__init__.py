"""The merge methods: one paper per file, one row per method. Pure tensor code; knows nothing of files."""

from collections.abc import Mapping

from streammerge.methods.acm import AcmTa, AcmTies
from streammerge.methods.api import Method
from streammerge.methods.arcee_fusion import ArceeFusion
from streammerge.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from streammerge.methods.dare import DareLinear, DareTies
from streammerge.methods.della import Della, DellaLinear
from streammerge.methods.fim import FimTa, FimTies
from streammerge.methods.fisher_average import FisherAverage
from streammerge.methods.karcher import Karcher
from streammerge.methods.linear import Linear
from streammerge.methods.model_stock import ModelStock
from streammerge.methods.multislerp import Multislerp
from streammerge.methods.nearswap import Nearswap
from streammerge.methods.nuslerp import Nuslerp
from streammerge.methods.passthrough import Passthrough
from streammerge.methods.ram import Ram, RamPlusTl
from streammerge.methods.regmean import Regmean
from streammerge.methods.sce import Sce
from streammerge.methods.sens import Sens
from streammerge.methods.slerp import Slerp
from streammerge.methods.task_arithmetic import TaskArithmetic
from streammerge.methods.ties import Ties

METHODS: Mapping[str, type[Method]] = {
    "fim_ties": FimTies,
    "fim_ta": FimTa,
    "acm_ties": AcmTies,
    "acm_ta": AcmTa,
    "sens": Sens,
    "regmean": Regmean,
    "fisher_average": FisherAverage,
    "linear": Linear,
    "karcher": Karcher,
    "slerp": Slerp,
    "nuslerp": Nuslerp,
    "multislerp": Multislerp,
    "model_stock": ModelStock,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare_linear": DareLinear,
    "dare_ties": DareTies,
    "della": Della,
    "della_linear": DellaLinear,
    "breadcrumbs": Breadcrumbs,
    "breadcrumbs_ties": BreadcrumbsTies,
    "sce": Sce,
    "ram": Ram,
    "ramplus_tl": RamPlusTl,
    "arcee_fusion": ArceeFusion,
    "nearswap": Nearswap,
    "passthrough": Passthrough,
}
