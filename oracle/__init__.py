"""The oracle: the right answer to a case in float64, and a rigorous bound on the error of any correct kernel.

Reading order: `case`, `attend`, `bound`, `verdict`. NumPy and ml_dtypes only; no JAX, nothing of `rpa`.
"""

from oracle.attend import attend
from oracle.case import Case, visible

__all__ = ["Case", "attend", "visible"]
