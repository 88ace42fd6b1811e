"""The oracle: the right answer to a case in float64, and a rigorous bound on the error of any correct kernel.

Reading order: `case`, `attend`, `claim`, `bound`, `verdict`. NumPy and ml_dtypes only; no JAX, nothing of `rpa`.
"""

from oracle.attend import attend
from oracle.bound import Analysis, analyse, error_bound, lse_bound, soft_bound
from oracle.case import Case, visible
from oracle.claim import Claim, default_claim
from oracle.verdict import Verdict, compare, judge

__all__ = [
    "Analysis",
    "Case",
    "Claim",
    "Verdict",
    "analyse",
    "attend",
    "compare",
    "default_claim",
    "error_bound",
    "judge",
    "lse_bound",
    "soft_bound",
    "visible",
]
